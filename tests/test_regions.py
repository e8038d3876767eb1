"""Readers on files: every format, every way to name them, shards.

A cell cannot hold this much material."""

import gzip, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from data_formats import (
    BOX,
    COCO,
    COCO_CAPTIONS,
    DOCUMENTS,
    FGOVD,
    FINEHARD,
    LABEL_STUDIO,
    REGIONS,
    SUGARCREPE,
    TRACK,
    UCA,
    VIDEO_DICT,
    VIDEO_LIST,
    VIDEO_TIMES,
    VIDEOS,
    media_root,
    write,
)
from fgclip_nb.core.identity import DataError
from fgclip_nb.core.folder import asset
from fgclip_nb.data.samples import Keyframe, boxes_at
from fgclip_nb.data.order import epoch_order
from fgclip_nb.data.shards import open_shards
from fgclip_nb.data.load import load_samples, sample_path
from fgclip_nb.data.conversion import convert


@pytest.fixture
def root(tmp_path):
    return media_root(tmp_path / "media")


def load(tmp_path, root, document, name="d.json", **kw):
    samples, rejects = load_samples(write(tmp_path / name, document, **kw), root)
    c = samples.counts
    assert (
        c["entries"] == c["entries_kept"] + c["entries_rejected"]
        and c["regions"] == c["regions_kept"] + c["regions_rejected"]
    )
    return samples, rejects


def test_finehard(tmp_path, root):
    s, r = load(tmp_path, root, FINEHARD)
    assert (len(s), r, set(s.formats.values())) == (3, [], {"finehard"})
    a = s[0]
    assert (a.caption, a.short_caption, a.media, a.kind) == (
        "A long caption of photo 0.",
        "photo 0",
        str(root / "a.jpg"),
        "image",
    )
    mug, table = a.regions
    assert mug.box == tuple(BOX) and len(mug.negatives) == 10 and mug.negatives[0] == "a green mug"
    assert mug.long_phrase.startswith("a red mug that")
    assert (
        table.box == (0.5, 0.5, 0.9, 0.9) and table.negatives == ()
    )  # the fifth number is a score; flag_short_neg 0


def test_array_named_jsonl_and_gzip_and_lines(tmp_path, root):
    for name, lines in (("x.jsonl", False), ("y.json", True)):
        assert len(load(tmp_path, root, FINEHARD, name, lines=lines)[0]) == 3
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(json.dumps(FINEHARD).encode("utf-8-sig")))
    assert len(load_samples(tmp_path / "z.jsonl.gz", root)[0]) == 3


def test_grit_fragment_is_dropped(tmp_path, root):
    s, _ = load(tmp_path, root, [dict(FINEHARD[0], f_path="grit-20m/data-12m/a.jpg")])
    assert s[0].media == str(root / "a.jpg")


def test_short_captions_of_finehard_itself_read_as_the_reference_reads_them(tmp_path, root):
    def short(path, caption):
        row = dict(FINEHARD[0], f_path=path, short_caption=caption)
        return load(tmp_path, root, [row])[0][0]

    released = short("grit-20m/data-12m/a.jpg", "two cats")
    assert (released.short_caption, released.captions) == (
        "a photo of two cats",
        ("a photo of two cats",),
    )
    assert short("a.jpg", "two cats").short_caption == "two cats", (
        "a file of one's own keeps its captions as they are written"
    )
    assert (
        short("grit-20m/data-12m/a.jpg", "A photo of two cats").short_caption
        == "A photo of two cats"
    )
    assert short("grit-20m/data-12m/a.jpg", "").captions == ()


@pytest.mark.parametrize(
    "document", [VIDEO_DICT, VIDEO_LIST, VIDEO_TIMES], ids=["dict", "list", "times"]
)
def test_video_forms(tmp_path, root, document):
    s, r = load(tmp_path, root, document)
    assert (
        (len(s), r) == (2, [])
        and s[0].kind == "video"
        and (s[0].label, s[1].label) == ("Abuse", "Normal")
    )
    region = s[0].regions[0]
    assert region.phrase == "a man hits"
    assert region.keyframes == (
        Keyframe(192, (0.1, 0.2, 0.3, 0.6)),
        Keyframe(333, (0.2, 0.2, 0.4, 0.6), False),
    )
    assert not s[1].regions or s[1].regions[0].keyframes == ()


def test_video_spans(tmp_path, root):
    assert load(tmp_path, root, VIDEO_LIST)[0][0].regions[0].span == (192, 333)
    assert load(tmp_path, root, VIDEO_TIMES)[0][0].span == (1.5, 9.25)


def test_more_boxes_than_captions(tmp_path, root):
    s, r = load(tmp_path, root, [dict(VIDEO_TIMES[0], region_captions=["a man hits"])])
    assert (
        len(s[0].regions) == 1
        and [x.rule for x in r] == ["more_boxes_than_captions"]
        and r[0].regions == 1
    )


def test_video_named_twice(tmp_path, root):
    text = json.dumps(VIDEO_DICT)
    (tmp_path / "d.json").write_text(text[:-1] + ", " + text[1:])
    s, r = load_samples(tmp_path / "d.json", root)
    assert len(s) == 2 and [x.rule for x in r] == ["duplicate_key"] * 2


def test_label_studio(tmp_path, root):
    s, r = load(tmp_path, root, LABEL_STUDIO)
    assert r == [] and s[0].caption == "A man is beaten." and s[0].media == str(root / VIDEOS[0])
    region = s[0].regions[0]
    assert region.phrase == "a man hits" and region.keyframes[0].bbox == pytest.approx(
        (0.1, 0.2, 0.3, 0.6)
    )
    assert not region.keyframes[1].enabled


def test_fgovd_gathers_an_image(tmp_path, root):
    s, r = load(tmp_path, root, FGOVD, "d.jsonl", lines=True)
    assert (
        [len(x.regions) for x in s] == [2, 2]
        and s[0].regions[0].box == pytest.approx((0.1, 0.1, 0.4, 0.3))
        and s.counts["entries"] == 4
    )


def test_fgovd_level_is_the_files(tmp_path, root):
    for name, level in (
        ("h_attributes_llava.jsonl", "hard"),
        ("shuffle_negatives_llava.jsonl", "trivial"),
        ("mine.jsonl", "given"),
    ):
        s, _ = load(tmp_path, root, FGOVD, name, lines=True)
        assert [list(r.levels()) for x in s for r in x.regions] == [[level]] * 4


def test_sugarcrepe_gathers_a_photo_over_its_files(tmp_path, root):
    for name in ("swap_att.json", "add_obj.json"):
        write(tmp_path / name, SUGARCREPE)
    s, r = load_samples(tmp_path, root)
    assert (
        len(s) == 3
        and not r
        and set(s.formats.values()) == {"sugarcrepe"}
        and s.counts["entries_kept"] == 6
    )
    assert [(n.negative, n.type) for n in s[1].caption_negatives] == [
        ("A table on mug 1.", "add_obj"),
        ("A table on mug 1.", "swap_att"),
    ]
    s, r = load(
        tmp_path,
        root,
        dict(SUGARCREPE, **{"9": {"filename": "a.jpg", "caption": "A mug."}}),
        "swap_att.json",
    )
    assert len(s) == 3 and [(x.field, x.reason) for x in r] == [("negative_caption", "missing")]


def test_coco_boxes_and_captions_meet(tmp_path, root):
    for name, d in (("instances_val2017.json", COCO), ("captions_val2017.json", COCO_CAPTIONS)):
        write(tmp_path / name, d)
    s, r = load_samples(
        [tmp_path / "instances_val2017.json", tmp_path / "captions_val2017.json"], root
    )
    assert len(s) == 3 and r == [] and {x.split for x in s} == {"val"}
    assert s[0].captions == ("Caption 0", "Caption 2", "Caption 4")
    assert s[0].caption == "Caption 0. Caption 2. Caption 4." and s[2].captions == ()
    assert [x.phrase for x in s[0].regions] == ["a dog", "an apple"] and s[0].regions[
        0
    ].box == pytest.approx((0.1, 0.1, 0.4, 0.3))


def test_coco_rejects(tmp_path, root):
    bad = [
        {"image_id": 99, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"image_id": 0, "category_id": 77, "bbox": [1, 1, 2, 2]},
        {"image_id": 0, "category_id": 1, "bbox": [1, 1, 2, 2], "iscrowd": 1},
        {"image_id": 0, "category_id": 1, "bbox": [1, 1, "2", 2]},
        3,
    ]
    s, r = load(tmp_path, root, dict(COCO, annotations=COCO["annotations"] + bad))
    assert [x.rule for x in r] == [
        "unknown_image",
        "unknown_category",
        "crowd",
        "malformed",
        "malformed",
    ]
    assert sum(len(x.regions) for x in s) == 5


def test_uca_a_sample_per_sentence(tmp_path, root):
    s, r = load(tmp_path, root, UCA, "UCFCrime_Test.json")
    assert (len(s), r, s[1].caption, s[1].span, s[1].split, s[1].label) == (
        3,
        [],
        "He leaves.",
        (7.0, 8.5),
        "test",
        "Abuse",
    )


def test_temporal_annotation(tmp_path):
    lines = [
        "Abuse028_x264  Abuse  165  240  -1  -1",
        "Normal_Videos_003_x264 Normal -1 -1 -1 -1",
        "broken line",
    ]
    (tmp_path / "Temporal_Anomaly_Annotation.txt").write_text("\n".join(lines))
    s, r = load_samples(tmp_path / "Temporal_Anomaly_Annotation.txt")
    assert [(x.label, [y.span for y in x.regions], x.split) for x in s] == [
        ("Abuse", [(165, 240)], "test"),
        ("Normal", [], "test"),
    ]
    assert len(r) == 1


def test_own_format(tmp_path, root):
    s, r = load(tmp_path, root, REGIONS, "regions.jsonl", lines=True)
    assert r == [] and [x.kind for x in s] == ["image", "image", "video"]
    assert s[0].captions == ("A mug.", "a red mug on a table")
    assert s[0].caption == "A mug. a red mug on a table." and s[0].short_caption == "A mug."
    assert [(x.phrase, x.source) for x in s[0].regions] == [
        ("a red mug", "expression"),
        ("an apple", "category"),
    ]
    assert s[0].regions[0].box == (0.1, 0.1, 0.5, 0.9)
    assert s[0].regions[0].levels() == {"hard": ("a green mug",), "trivial": ("a dog",)}
    assert (
        s[1].regions[0].box == tuple(BOX)
        and s[2].span == (1.0, 9.0)
        and s[0].caption_negatives[0].negative == "A bowl."
    )


def test_levels_without_plain_negatives(tmp_path, root):
    region = {"bbox": BOX, "caption": "a red mug"}
    for extra, by_level in (
        (
            {"negatives_by_level": {"easy": ["a dog"], "hard": ["a red jug"]}},
            {"easy": ("a dog",), "hard": ("a red jug",)},
        ),
        (
            {
                "negatives_level": "hard",
                "negatives_by_level": {"easy": ["a dog"], "hard": ["a red jug"]},
            },
            {"hard": ("a red jug",), "easy": ("a dog",)},
        ),
        ({"negatives_level": "hard"}, {}),
        ({"negatives": ["a jug"]}, {"given": ("a jug",)}),
    ):
        s, _ = load(
            tmp_path,
            root,
            [{"image": "a.jpg", "regions": [region | extra]}],
            "regions.jsonl",
            lines=True,
        )
        assert s[0].regions[0].levels() == by_level and s[0].regions[0].negatives == next(
            iter(by_level.values()), ()
        )
    s, r = load(
        tmp_path,
        root,
        [{"image": "a.jpg", "regions": [region | {"negatives_by_level": {"easy": [3]}}]}],
        "regions.jsonl",
        lines=True,
    )
    assert r[0].field == "regions[0].negatives_by_level.easy[0]"


def test_pixels_need_a_size(tmp_path, root):
    s, r = load(
        tmp_path,
        root,
        [{"image": "a.jpg", "regions": [{"bbox": [10, 20, 50, 180], "caption": "a red mug"}]}],
    )
    assert len(s) == 1 and s[0].regions == [] and "width" in r[0].reason


def test_folder_list_and_txt(tmp_path, root):
    write(tmp_path / "one.json", FINEHARD), write(tmp_path / "two.jsonl", REGIONS, lines=True)
    (tmp_path / "list.txt").write_text("one.json\ntwo.jsonl\nabsent.json\n")
    assert (
        len(load_samples(tmp_path, root)[0]) == 6
        and len(load_samples([tmp_path / "one.json", tmp_path / "two.jsonl"], root)[0]) == 6
    )
    s, r = load_samples(tmp_path / "list.txt", root)
    assert len(s) == 6 and [(x.rule, "line 3" in x.entry) for x in r] == [("missing_file", True)]


@pytest.mark.parametrize("name", [*DOCUMENTS, "temporal"])
def test_every_format_from_file_list_and_folder(tmp_path, root, name):
    "The same samples, however the file is named."
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "temporal":
        file = folder / "labels.txt"
        file.write_text("Abuse001_x264  Abuse  165  240  -1  -1\n")
    else:
        file = write(folder / f"{name}.json", DOCUMENTS[name])
    (tmp_path / "list.txt").write_text(f"data/{file.name}\n")
    whole, rejects = load_samples(file, root)
    assert (
        whole
        and not rejects
        and list(whole.formats.values()) == ["coco" if name == "coco_captions" else name]
    )
    ways = [[file], [str(file)], tmp_path / "list.txt", str(file)] + [folder] * (name != "temporal")
    for way in ways:
        assert list(load_samples(way, root)[0]) == list(whole), way


def test_the_json_of_the_readme_is_read(tmp_path, root):
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    block = text.split("```json\n")[1].split("```")[0]
    assert len(block.splitlines()) <= 12
    (tmp_path / "my.json").write_text(block)
    (root / "kitchen.jpg").write_bytes((root / "a.jpg").read_bytes())
    [sample], rejects = load_samples(tmp_path / "my.json", root)
    assert (
        not rejects
        and sample.short_caption == "a kitchen with a table"
        and sample.caption.startswith("A small kitchen")
    )
    assert [len(r.negatives) for r in sample.regions] == [2, 0] and all(
        0 <= v <= 1 for r in sample.regions for v in r.box
    )


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.json"):
        load_samples(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="media_root"):
        load_samples("sample", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no .*json"):
        load_samples(tmp_path)


def test_missing_media(tmp_path, root):
    (root / "b.jpg").unlink()
    s, r = load(tmp_path, root, FINEHARD)
    assert len(s) == 2 and [(x.rule, x.entries, x.regions) for x in r] == [("missing_media", 1, 2)]
    assert (
        len(load(tmp_path, tmp_path, FINEHARD)[0]) == 3
    )  # none is there: annotations alone are looked at
    assert len(load_samples(tmp_path / "d.json", tmp_path, missing="reject")[0]) == 0


def test_paths_stay_inside(tmp_path, root):
    (tmp_path / "secret.jpg").write_bytes((root / "a.jpg").read_bytes())
    (
        (root / "link.jpg").symlink_to(tmp_path / "secret.jpg"),
        (root / "inner.jpg").symlink_to(root / "a.jpg"),
        (root / "up").symlink_to(tmp_path),
    )
    names = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "up/secret.jpg",
        "sub/../../secret.jpg",
        "a\0.jpg",
        "",
        ".",
        "x" * 5000,
        "file:///etc/passwd",
    ]
    s, r = load(
        tmp_path,
        root,
        [
            dict(FINEHARD[0], f_path=n)
            for n in names + ["inner.jpg", str(root / "a.jpg"), "sub/../b.jpg"]
        ],
    )
    assert len(r) == len(names) and [x.media for x in s] == [str(root / "a.jpg")] * 2 + [
        str(root / "b.jpg")
    ]


def test_rejects_name_the_place(tmp_path, root):
    rows = json.loads(json.dumps(FINEHARD))
    rows[1]["bbox_info"][1]["bbox"] = [0.1, "0.2", 0.3, 0.4]
    rows[2]["caption"] = 5
    s, r = load(tmp_path, root, rows)
    assert [(x.entry, x.field) for x in r] == [("[1]", "bbox_info[1].bbox[1]"), ("[2]", "caption")]
    assert r[0].value == "'0.2'" and len(s) == 2


def test_all_formats_are_told(tmp_path, root):
    for name, document in DOCUMENTS.items():
        write(tmp_path / f"{name}.json", document)
    formats = {
        os.path.basename(f)[:-5]: format_name
        for f, format_name in load_samples(tmp_path, root)[0].formats.items()
    }
    assert formats == {name: "coco" if name == "coco_captions" else name for name in DOCUMENTS}


def test_track_with_a_gap():
    keyframes = [
        dict(frame=f, bbox=[f / 100, 0, f / 100 + 0.1, 1], enabled=e)
        for f, e in ((0, True), (10, False), (20, True), (30, True))
    ]
    boxes, visible = boxes_at(keyframes, [0, 5, 10, 11, 19, 20, 25, 30, 31])
    assert visible.tolist() == [True, True, True, False, False, True, True, True, False]
    assert (
        boxes[1] == pytest.approx([0.05, 0, 0.15, 1])
        and boxes[6, 0] == pytest.approx(0.25)
        and not boxes[~visible].any()
    )


def test_boxes_at_nothing():
    assert boxes_at([], [1, 2])[1].tolist() == [False, False] and boxes_at(TRACK, [])[0].shape == (
        0,
        4,
    )


def test_shipped_sample():
    s, r = load_samples("sample")
    folder = sample_path().parent
    assert (len(s), len(r)) == (151, 0) and {x.split for x in s} == {"train", "val"}
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4e6
    credits = (folder / "CREDITS.csv").read_text().splitlines()
    assert len(credits) == 152 and all("flickr" in line and "http" in line for line in credits[1:])
    from PIL import Image

    for x in s[::10]:
        with Image.open(x.media) as image:
            assert image.size == (x.width, x.height) and max(image.size) <= 288
    assert all(0 <= a <= 1 for x in s for y in x.regions for a in y.box)


def test_shards_equal_the_list(tmp_path, root):
    for name, document in DOCUMENTS.items():
        write(tmp_path / f"{name}.json", document)
    s, _ = load_samples(tmp_path, root)
    totals = convert(tmp_path, tmp_path / "shards", root)
    shards = open_shards(tmp_path / "shards")
    assert (
        totals["samples"] == len(s) == len(shards)
        and list(shards) == list(s)
        and shards[-1] == s[-1]
    )
    import pickle

    assert pickle.loads(pickle.dumps(shards))[0] == s[0]  # as a loader's worker gets it


def test_shards_elsewhere(tmp_path, root):
    convert(write(tmp_path / "d.json", FINEHARD), tmp_path / "shards", root)
    os.rename(root, tmp_path / "moved")
    s, _ = load_samples(tmp_path / "shards", tmp_path / "moved")
    assert s[0].media == str(tmp_path / "moved/a.jpg")


def test_embedding_rejects_what_is_not_there(tmp_path, root):
    (root / "b.jpg").unlink()
    totals = convert(write(tmp_path / "d.json", FINEHARD), tmp_path / "shards", root, embed=True)
    assert (totals["samples"], totals["entries_rejected"], totals["regions_rejected"]) == (2, 1, 2)
    assert json.loads((tmp_path / "shards/rejects.jsonl").read_text())["rule"] == "missing_media"
    assert open_shards(tmp_path / "shards")[0].data == (root / "a.jpg").read_bytes()


def test_a_lost_shard_is_noticed(tmp_path, root):
    convert(write(tmp_path / "d.json", FINEHARD), tmp_path / "shards", root)
    (tmp_path / "shards/shards.json").write_text(
        (tmp_path / "shards/shards.json").read_text().replace('"samples": 3', '"samples": 4')
    )
    with pytest.raises(DataError, match="missing or foreign"):
        open_shards(tmp_path / "shards")


def test_command_line(tmp_path, root):
    write(tmp_path / "d.json", FINEHARD)

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "fgclip_nb.data", *map(str, words)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    done = run("convert", tmp_path / "d.json", tmp_path / "out", "--media-root", root)
    assert done.returncode == 0 and "3 samples in 1 file(s)" in done.stdout, done.stderr
    again = run("convert", tmp_path / "d.json", tmp_path / "out")
    assert (
        again.returncode == 1
        and "finished conversion" in again.stderr
        and "Traceback" not in again.stderr
    )


def test_order_is_a_permutation_and_a_function():
    for n in (1, 2, 3, 151, 4096):
        assert np.array_equal(np.sort(epoch_order(n, 5, 2)), np.arange(n))
    assert np.array_equal(epoch_order(999, 5, 2), epoch_order(999, 5, 2))
    assert not np.array_equal(epoch_order(999, 5, 2), epoch_order(999, 5, 3))
    first = np.bincount([epoch_order(6, s, 0)[0] for s in range(3000)], minlength=6)
    assert abs(first - 500).max() < 90  # every sample comes first about as often


def test_import_is_light():
    heavy = {"torch", "pandas", "datasets", "av", "PIL", "matplotlib"}
    code = (
        "import sys, fgclip_nb.data.load, fgclip_nb.data.filters; "
        f"bad = {heavy} & set(sys.modules); assert not bad, bad"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_word_lists_are_shipped():
    assert {p.name for p in asset("words").iterdir()} >= {"attributes.txt", "nouns.txt"}
