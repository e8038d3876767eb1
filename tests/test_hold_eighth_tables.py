"""Hugging Face's layouts of detection and classification, by every way a set is kept: one set of
rows written as Parquet, by `datasets`, as tars and as metadata, and read the same from each."""

import io, json, tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given, settings, strategies as st
from PIL import Image as Picture

from fgclip_nb.data.load import load_samples

CLASSES = ["cat", "dog", "cow"]
NUMBERS = List(Value("float32"), length=4)
BOXES = [[16.0, 18.0, 60.0, 40.0], [80.0, 60.0, 40.0, 30.0]]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def photo(shade) -> bytes:
    kept = io.BytesIO()
    Picture.new("RGB", (160, 120), (shade, 90, 160)).save(kept, "JPEG")
    return kept.getvalue()


def rows_of(objects, more=(), count=3):
    "Rows of three photos in their folder; `objects(i)`: the things of one."
    rows = []
    for i in range(count):
        row = dict(image=f"p{i}.jpg", objects=objects(i), caption=f"Photo {i}.")
        rows.append(row | {key: value(i) if callable(value) else value for key, value in more})
    return rows


def as_lists(names=True):
    "Things of a photo as a dict of lists, with names or numbers of classes."

    def objects(i):
        found = [i % 3, (i + 1) % 3]
        return dict(
            bbox_id=[1, 2], area=[2400.0, 1200.0], bbox=BOXES,
            category=[CLASSES[k] for k in found] if names else found,
        )  # fmt: skip

    return objects


def as_items(key="category", names=True, **more):
    "Things of a photo as a list of dicts."

    def objects(i):
        found = [CLASSES[(i + k) % 3] if names else (i + k) % 3 for k in range(2)]
        return [dict({"bbox": box, key: name}, **more) for box, name in zip(BOXES, found)]

    return objects


def embedded(rows):
    pictures = [dict(bytes=photo(30 * i), path=row["image"]) for i, row in enumerate(rows)]
    return [dict(row, image=picture) for row, picture in zip(rows, pictures)]


def to_parquet(rows, folder):
    pq.write_table(pa.Table.from_pylist(embedded(rows)), folder / "a.parquet")
    return folder / "a.parquet"


def to_disk(rows, folder):
    data = Dataset.from_list(embedded(rows)).cast_column("image", Image())
    data.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def to_iterable(rows, folder):
    data = Dataset.from_list(embedded(rows)).cast_column("image", Image())
    return data.to_iterable_dataset()


def to_tars(rows, folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, row in enumerate(rows):
            rest = {k: v for k, v in row.items() if k != "image"}
            for end, content in (("jpg", photo(30 * i)), ("json", json.dumps(rest).encode())):
                member = tarfile.TarInfo(f"p{i}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "a.tar"


def photos_in(rows, folder):
    for i, row in enumerate(rows):
        (folder / row["image"]).write_bytes(photo(30 * i))


def to_metadata(rows, folder):
    photos_in(rows, folder)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "metadata.jsonl"


def to_csv(rows, folder):
    import pandas as pd

    photos_in(rows, folder)
    table = [dict(r, objects=json.dumps(r["objects"])) for r in rows]
    pd.DataFrame(table).to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


def to_paths(rows, folder):
    "Parquet with paths to the photos."
    photos_in(rows, folder)
    pq.write_table(pa.Table.from_pylist(rows), folder / "paths.parquet")
    return folder / "paths.parquet"


WAYS = dict(
    parquet=to_parquet, saved=to_disk, iterable=to_iterable, tars=to_tars,
    metadata=to_metadata, csv=to_csv, paths=to_paths,
)  # fmt: skip


def contents(samples):
    def placed(region):
        return region.phrase, [round(v, 4) for v in region.box]

    return [(s.captions, s.caption, s.label, [placed(r) for r in s.regions]) for s in samples]


def boxes_as_shares():
    return [
        [round(v, 4) for v in b] for b in ((0.1, 0.15, 0.475, 58 / 120), (0.5, 0.5, 0.75, 0.75))
    ]


def consistent(samples, rejects):
    "Entries and regions are those kept and those rejected, and the kept are what came back."
    counts = samples.counts
    for kind in ("entries", "regions"):
        assert counts[kind] == counts[f"{kind}_kept"] + counts[f"{kind}_rejected"], counts
    assert counts["samples"] == len(list(samples)) and all(s.entries for s in samples)
    assert counts["entries_kept"] == sum(s.entries for s in samples)
    assert counts["entries_rejected"] == sum(r.entries for r in rejects)
    assert counts["regions_kept"] == sum(len(s.regions) for s in samples)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_objects_are_read_the_same_from_every_way(way, sized, tmp_path):
    more = [("image_id", lambda i: i)] + [("width", 160), ("height", 120)] * sized
    samples, rejects = load_samples(WAYS[way](rows_of(as_lists(), more), tmp_path))
    names = [[f"a {CLASSES[i % 3]}", f"a {CLASSES[(i + 1) % 3]}"] for i in range(3)]
    expected = [
        ((f"Photo {i}.",), "", "", list(zip(names[i], boxes_as_shares()))) for i in range(3)
    ]
    assert contents(samples) == expected and not rejects
    assert [(s.width, s.height) for s in samples] == [(160, 120)] * 3
    consistent(samples, rejects)


@pytest.mark.parametrize(
    "others", [{}, dict(caption=None), dict(text="a photo"), dict(captions=["a", "b"])]
)
def test_with_and_without_texts(others, tmp_path):
    rows = [
        {k: v for k, v in (row | others).items() if v is not None} for row in rows_of(as_lists())
    ]
    found = []
    for way in ("parquet", "metadata", "saved"):
        (tmp_path / way).mkdir()
        samples, rejects = load_samples(WAYS[way](rows, tmp_path / way))
        assert not rejects and all(len(s.regions) == 2 for s in samples) and len(samples) == 3
        found.append(contents(samples))
    assert found[0] == found[1] == found[2]


SPELLINGS = dict(
    label=lambda i: dict(bbox=BOXES, label=as_lists()(i)["category"]),
    coco=as_items(area=2.0, iscrowd=0),
    words=as_items("label"),
    plain=as_items(),
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("way", ["parquet", "saved", "paths"])
def test_other_spellings_of_objects(way, spelling, tmp_path):
    samples, rejects = load_samples(WAYS[way](rows_of(SPELLINGS[spelling]), tmp_path))
    assert not rejects
    assert [r.box for r in samples[0].regions] == [
        pytest.approx(b, abs=1e-3) for b in boxes_as_shares()
    ]
    assert [r.phrase for r in samples[1].regions] == ["a dog", "a cow"]


def test_a_list_of_our_own_keeps_its_corners(tmp_path):
    own = dict(bbox=[16, 18, 76, 58], category="cat")
    rows = rows_of(lambda i: [own], [("width", 160), ("height", 120)])
    for way in ("parquet", "metadata"):
        (tmp_path / way).mkdir()
        samples, rejects = load_samples(WAYS[way](rows, tmp_path / way))
        assert [r.box for r in samples[0].regions] == [
            pytest.approx(boxes_as_shares()[0], abs=1e-3)
        ]
    shares = rows_of(lambda i: [dict(bbox=[0.1, 0.15, 0.475, 0.5], category="cat")])
    samples, _ = load_samples(to_parquet(shares, tmp_path))
    assert samples[0].regions[0].box == (0.1, 0.15, 0.475, 0.5)


@pytest.mark.parametrize("form", ["lists", "items"])
@pytest.mark.parametrize("sized", [False, True])
def test_numbers_get_their_names(form, sized, tmp_path):
    about = ClassLabel(names=CLASSES)
    lists = dict(bbox=List(NUMBERS), category=List(about))
    items = List(dict(bbox=NUMBERS, category=about))
    sizes = [("width", 160), ("height", 120)] * sized
    features = Features(
        image=Image(), caption=Value("string"), objects=lists if form == "lists" else items
    )
    features.update({key: Value("int32") for key, _ in sizes})
    rows = embedded(rows_of(as_lists(False) if form == "lists" else as_items(names=False), sizes))
    for row in rows if form == "lists" else ():
        row["objects"] = {key: row["objects"][key] for key in ("bbox", "category")}
    data = Dataset.from_list(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "saved", tmp_path / "a.parquet", data, data.to_iterable_dataset()):
        samples, rejects = load_samples(source)
        assert not rejects, rejects[:1]
        assert [[r.phrase for r in s.regions] for s in samples] == [
            ["a cat", "a dog"], ["a dog", "a cow"], ["a cow", "a cat"]
        ]  # fmt: skip
        assert samples[0].regions[0].box == pytest.approx(boxes_as_shares()[0], abs=1e-3)
        assert samples[0].captions == ("Photo 0.",)


@pytest.mark.parametrize("way", [w for w in WAYS])
def test_numbers_without_names_are_rejects_of_regions(way, tmp_path):
    samples, rejects = load_samples(WAYS[way](rows_of(as_lists(False)), tmp_path))
    assert len(samples) == 3 and [s.captions for s in samples][0] == ("Photo 0.",)
    assert [r.rule for r in rejects] == ["unknown_category"] * 6
    assert all("a number without its name" in r.reason for r in rejects)
    consistent(samples, rejects)


@pytest.mark.parametrize("way", ["parquet", "saved", "tars", "metadata", "csv"])
def test_a_rejected_row_leaves_no_sample(way, tmp_path):
    def objects(i):
        return dict(as_lists()(i), category=["cat"]) if i == 1 else as_lists()(i)

    rows = rows_of(objects)
    rows[2]["objects"]["bbox"] = [BOXES[0], [0.0, 0.0, 9.0]]  # one region of it is broken
    samples, rejects = load_samples(WAYS[way](rows, tmp_path))
    assert [s.captions for s in samples] == [("Photo 0.",), ("Photo 2.",)]
    assert [len(s.regions) for s in samples] == [2, 1]
    assert sorted((r.entries, r.regions) for r in rejects) == [(0, 1), (1, 0)]
    consistent(samples, rejects)


def test_a_photo_keeps_its_good_rows(tmp_path):
    photos_in(rows_of(as_lists()), tmp_path)
    rows = [
        dict(file_name="p0.jpg", text="one", objects=dict(bbox=BOXES, category=["cat"])),
        dict(file_name="p0.jpg", text="two"),
        dict(file_name="gone.jpg", text="three", objects=as_lists()(0)),
        dict(file_name="p1.jpg", text="four"),
        dict(file_name="p1.jpg", text="five", width="wide", height=3),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, rejects = load_samples(tmp_path / "metadata.jsonl")
    assert [s.captions for s in samples] == [("two",), ("four",)] and len(rejects) == 3
    assert [r.rule for r in rejects] == ["malformed", "missing_size", "malformed"]
    consistent(samples, rejects)


def test_a_photo_that_cannot_be_read_is_a_reject(tmp_path):
    rows = embedded(rows_of(as_lists()))
    rows[1]["image"]["bytes"] = b"no photo"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    samples, rejects = load_samples(tmp_path / "a.parquet")
    assert [s.captions for s in samples] == [("Photo 0.",), ("Photo 2.",)]
    assert [(r.rule, r.entry) for r in rejects] == [("missing_size", "row 1")]
    assert [s.captions for s in samples.part(0)] == [("Photo 0.",), ("Photo 2.",)]
    consistent(samples, rejects)


def classified(folder, names=True):
    "A set of photos with a class each; -1 is of no class."
    feature = ClassLabel(names=CLASSES) if names else Value("int64")
    rows = [dict(image=dict(bytes=photo(i), path=None), label=n) for i, n in enumerate((0, 2, -1))]
    return Dataset.from_list(rows, features=Features(image=Image(), label=feature))


def test_classes_of_photos_have_their_names(tmp_path):
    data = classified(tmp_path)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "saved", tmp_path / "a.parquet", data, data.to_iterable_dataset()):
        samples, rejects = load_samples(source)
        assert [s.label for s in samples] == ["cat", "cow", ""] and not rejects
        assert list(samples.column("label")) == ["cat", "cow", ""]
    other = Dataset.from_dict(dict(kind=[1]), features=Features(kind=ClassLabel(names=CLASSES)))
    both = datasets.concatenate_datasets([data.select([0]), other], axis=1)
    assert load_samples(both, columns="label=kind")[0][0].label == "dog"


def test_a_class_without_a_name_is_a_reject(tmp_path):
    samples, rejects = load_samples(classified(tmp_path, names=False))
    assert not len(samples) and {r.rule for r in rejects} == {"unknown_category"}
    assert all("a number without its name" in r.reason for r in rejects) and len(rejects) == 3
    photos_in(rows_of(as_lists()), tmp_path)
    (tmp_path / "a.csv").write_text("file_name,label\np0.jpg,0\np1.jpg,dog\n")
    samples, rejects = load_samples(tmp_path / "a.csv")
    assert [s.label for s in samples] == ["dog"] and len(rejects) == 1
    consistent(samples, rejects)
    # a row with a caption is kept for it, and the number is told once
    for name in ("image", "file_name"):
        rows = [{name: f"p{i}.jpg", "caption": f"Photo {i}.", "label": i} for i in range(3)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        samples, rejects = load_samples(tmp_path / "data.jsonl")
        assert [s.label for s in samples] == [""] * 3
        assert [(r.rule, r.entries) for r in rejects] == [("unknown_category", 0)]
        consistent(samples, rejects)


def test_splits_of_a_saved_set_are_its_parts(tmp_path):
    data = classified(tmp_path)
    splits = dict(train=data, validation=data.select([1]), test=data.select([0, 1]))
    DatasetDict(splits).save_to_disk(tmp_path / "all")
    samples, rejects = load_samples(tmp_path / "all")
    assert [s.split for s in samples] == ["train"] * 3 + ["val"] + ["test"] * 2 and not rejects
    assert [s.label for s in samples] == ["cat", "cow", "", "cow", "cat", "cow"]
    assert len({s.id for s in samples}) == 6
    assert [s.data for s in samples.part(1)] == [None]
    assert {s.split for s in load_samples(tmp_path / "all" / "test")[0]} == {"test"}
    assert {s.split for s in load_samples(tmp_path / "all", split="train")[0]} == {"train"}
    DatasetDict(dev=data, testA=data, unlabeled=data).save_to_disk(tmp_path / "odd")
    samples, rejects = load_samples(tmp_path / "odd")
    assert [s.split for s in samples][::3] == ["val", "test", "unlabeled"]
    assert [r.rule for r in rejects] == ["unread_split"]


def test_what_a_file_says_of_its_columns_may_be_nonsense(tmp_path):
    table = pa.Table.from_pylist(embedded(rows_of(as_lists(False))))
    kinds = [dict(names="cat", _type="ClassLabel"), dict(names=["x" * 10_000], _type="ClassLabel")]
    kinds += [None, [], dict(feature=dict(feature=None), _type="List"), dict(names=[], _type={})]
    texts = [json.dumps(dict(info=dict(features=dict(objects=dict(category=k))))) for k in kinds]
    for number, text in enumerate(
        texts + ["[" * 100_000, "{}", "\ud800".encode("utf-8", "replace")]
    ):
        file = Path(tmp_path / f"{number}.parquet")
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), file)
        samples, rejects = load_samples(file)
        assert len(samples) == 3 and len(rejects) == 6


VALUES = st.recursive(
    st.none() | st.integers(-2, 200) | st.floats() | st.sampled_from(["cat", "", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from("bbox category label area id".split()), inner, max_size=3)
    ),
    max_leaves=9,
)
ROWS = st.fixed_dictionaries(
    dict(objects=VALUES),
    optional=dict.fromkeys("caption text label width height captions regions".split(), VALUES),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["image", "file_name"]), ROWS), min_size=2, max_size=4))
def test_any_objects_are_kept_or_rejected(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    (folder / "p0.jpg").write_bytes(photo(0))
    lines = [json.dumps({name: "p0.jpg"} | row) for name, row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    samples, rejects = load_samples(folder / "metadata.jsonl")
    consistent(samples, rejects)
    assert samples.counts["entries"] == len(rows)
    to_tars([dict(row, image="x") for _, row in rows], folder)
    samples, rejects = load_samples(folder / "a.tar")
    consistent(samples, rejects)
    assert samples.counts["entries"] == len(rows)
