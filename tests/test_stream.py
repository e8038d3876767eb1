"""Streams of tars, Parquet and `datasets`, which no cell can hold: trainings killed and resumed by
other loader processes, two training processes, damaged files, a pass over the data that is
stopped. What comes out is compared with the same photos read from a list of files."""

import io, json, random, tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import micro
from fgclip_nb.core.identity import DataError
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.stream import index_shard, open_source

MAP = "image=img, caption=text, regions=boxes"


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def rows_of(data):
    "(row of regions.jsonl, bytes of its photo) of a made world."
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    return [(row, (Path(data).parent / row["image"]).read_bytes()) for row in rows]


def write_tars(data, folder, each=6):
    folder.mkdir(parents=True)
    rows = rows_of(data)
    for at in range(0, len(rows), each):
        with tarfile.open(folder / f"shard-{at:04d}.tar", "w") as tar:
            for row, pixels in rows[at : at + each]:
                key = Path(row["image"]).stem
                add(tar, f"{key}.png", pixels)
                add(tar, f"{key}.json", json.dumps(row).encode())
    return str(folder)


def write_parquet(data, folder, each=10):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rows = rows_of(data)
    for at in range(0, len(rows), each):
        table = [
            dict(row, image=dict(bytes=pixels, path=None), id=row["image"])
            for row, pixels in rows[at : at + each]
        ]
        file = folder / f"part-{at:04d}.parquet"
        pq.write_table(pa.Table.from_pylist(table), file, row_group_size=4)
    return str(folder)


def saved_dataset(data, folder):
    import datasets

    table = [dict(row, image=dict(bytes=pixels, path=None)) for row, pixels in rows_of(data)]
    whole = datasets.Dataset.from_list(table).cast_column("image", datasets.Image())
    whole.save_to_disk(str(folder))
    return str(folder)


def hub_folder(data, folder):
    return "hub:" + write_parquet(data, folder)


WRITERS = dict(tars=write_tars, parquet=write_parquet, saved=saved_dataset, hub=hub_folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"), photos=36)


def contents(samples):
    return [
        (s.captions, s.split, [(r.phrase, r.box, r.negatives) for r in s.regions]) for s in samples
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_what_the_files_give(world, tmp_path, kind):
    whole, _ = load_samples(world["data"])
    streamed, rejects = load_samples(WRITERS[kind](world["data"], tmp_path / kind))
    assert contents(streamed) == contents(whole) and not rejects
    assert [s.data for s in streamed] == [pixels for _, pixels in rows_of(world["data"])]
    counts = streamed.counts
    assert counts["entries"] == counts["entries_kept"] == len(whole)
    assert counts["regions"] == counts["regions_kept"] == sum(len(s.regions) for s in whole)
    half = streamed.subset(range(0, len(whole), 2))
    assert list(half.column("id")) == [s.id for s in half]
    assert sum(half.block_sizes()) == len(half)


def test_tars_become_shards(world, tmp_path):
    from fgclip_nb.data.conversion import convert

    counts = convert(write_tars(world["data"], tmp_path / "tars"), tmp_path / "shards")
    whole, _ = load_samples(world["data"])
    shards, _ = load_samples(tmp_path / "shards")
    assert contents(shards) == contents(whole) and counts["entries"] == len(whole)
    assert [s.data for s in shards] == [pixels for _, pixels in rows_of(world["data"])]


def killed_and_resumed(params, tmp_path, event="step:7"):
    """A training killed and gone on with two loader processes is that of one process without."""
    assert micro.run(dict(params, output=str(tmp_path / "whole"))) == 0
    broken = dict(params, output=str(tmp_path / "broken"), num_workers=2)
    assert micro.run(broken, event) == -9
    assert micro.run(broken) == 0
    assert micro.outcome(tmp_path / "broken") == micro.outcome(tmp_path / "whole")


@pytest.mark.ci
def test_tars_train_and_resume_bitwise(world, tmp_path):
    params = dict(world, data=write_tars(world["data"], tmp_path / "tars"), stream_lanes=2)
    killed_and_resumed(params, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_other_kinds_train_and_resume_bitwise(world, tmp_path, kind):
    params = dict(world, data=WRITERS[kind](world["data"], tmp_path / kind), gradient_caching=2)
    killed_and_resumed(params, tmp_path)


@pytest.mark.long
def test_two_processes_share_a_stream(world, tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    params = dict(
        world, data=write_tars(world["data"], tmp_path / "tars"), processes=2, batch_size=2,
        num_workers=1, max_steps=6, augment="none",
    )  # fmt: skip
    two = train(TrainConfig(**dict(params, output=str(tmp_path / "two"))))
    again = train(TrainConfig(**dict(params, output=str(tmp_path / "again"), num_workers=0)))
    lines = [(run.path / "metrics.jsonl").read_bytes() for run in (two, again)]
    assert lines[0] == lines[1] and lines[0].count(b"\n") == 6


def test_an_address_trains_like_the_folder(world, tmp_path):
    import fsspec

    near = write_tars(world["data"], tmp_path / "tars")
    for file in Path(near).glob("*.tar"):
        with fsspec.open(f"memory://{tmp_path.name}/{file.name}", "wb") as f:
            f.write(file.read_bytes())
    far, _ = load_samples(f"memory://{tmp_path.name}")
    here, _ = load_samples(near)
    assert [(s.id, s.data) for s in far] == [(s.id, s.data) for s in here]
    from fgclip_nb.batches.loading import Drawing, Examples

    drawn = [Examples(samples, Drawing(32))[1, 5] for samples in (far, here)]
    assert (drawn[0].pixels == drawn[1].pixels).all() and drawn[0].caption == drawn[1].caption


# ---- what is wrong is counted -------------------------------------------------------------------


def one_tar(world, folder, changed):
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k, (row, pixels) in enumerate(rows_of(world["data"])[:6]):
            for name, content in changed(k, {"png": pixels, "json": json.dumps(row).encode()}):
                add(tar, f"{k:03d}.{name}" if "/" not in name else name, content)
    return folder


def test_rejects_of_a_tar_are_named_by_reason(world, tmp_path):
    def changed(k, files):
        if k == 1:
            files["json"] = files["json"][:40]
        if k == 2:
            del files["png"]
        if k == 3:
            files["json"] = b"[1]"
        if k == 4:
            files = {"../escaped.png": files["png"]}
        return files.items()

    streamed, rejects = load_samples(one_tar(world, tmp_path / "t", changed))
    assert len(streamed) == 2
    assert sorted(r.rule for r in rejects) == sorted(
        ["broken_json", "malformed", "missing_media", "outside_media_root"]
    )
    counts = streamed.counts
    assert counts["entries"] == counts["entries_kept"] + counts["entries_rejected"] == 6
    assert all(r.file.endswith("a.tar") and r.entry for r in rejects)
    assert not (tmp_path / "escaped.png").exists()


def test_a_photo_that_goes_bad_later_is_counted_by_training(world, tmp_path):
    folder = one_tar(world, tmp_path / "t", lambda k, files: files.items())
    streamed, _ = load_samples(folder)
    data = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(data[: len(data) // 2])
    from fgclip_nb.batches.loading import Drawing, Examples, collate_loaded

    examples = Examples(streamed, Drawing(32))
    batch, rejects = collate_loaded([examples[0, i] for i in range(6)])
    assert 0 < len(batch) < 6 and len(batch) + len(rejects) == 6
    assert {r.rule for r in rejects} == {"unreadable_media"}
    assert all("a.tar" in r.reason for r in rejects)


def test_keys_that_nobody_reads_stand_once(world, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    for n in range(3):
        with tarfile.open(folder / f"{n}.tar", "w") as tar:
            for row, pixels in rows_of(world["data"])[:2]:
                add(tar, f"{row['id'] if 'id' in row else row['image']}", pixels)
                row = dict(row, boxes=[[0, 0, 1, 1]])
                add(tar, f"{Path(row['image']).stem}.json", json.dumps(row).encode())
    _, rejects = load_samples(folder)
    unread = [r for r in rejects if r.field == "boxes"]
    assert len(unread) == 1 and "2 more shards" in unread[0].reason


def test_a_photo_of_another_size_than_declared_is_no_sample(world, tmp_path):
    def changed(k, files):
        row = json.loads(files["json"])
        if k == 0:
            row |= dict(width=1000, height=10)
        return [("png", files["png"]), ("json", json.dumps(row).encode())]

    streamed, _ = load_samples(one_tar(world, tmp_path / "t", changed))
    with pytest.raises(DataError, match="declared"):
        streamed[0]
    assert streamed[1].regions


def test_column_names_that_are_not_there(world, tmp_path):
    data = write_parquet(world["data"], tmp_path / "p")
    with pytest.raises(DataError, match="no column 'photo'; there are .*captions"):
        load_samples(data, columns="image=photo")


# ---- a pass that is stopped ---------------------------------------------------------------------


def test_an_index_is_taken_up_where_it_was_stopped(world, tmp_path, monkeypatch):
    from fgclip_nb.data import stream as room

    data = write_tars(world["data"], tmp_path / "tars")
    seen = []

    def stopped(source, shard, *args):
        seen.append(shard)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return index_shard(source, shard, *args)

    monkeypatch.setattr(room, "index_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        room.open_stream(data, processes=1)
    streamed, _ = room.open_stream(data, processes=1)
    assert seen == [0, 1, 2, 3, *range(3, streamed.parts)]
    assert contents(streamed) == contents(load_samples(world["data"])[0])


@pytest.mark.long
def test_processes_make_the_same_index_and_filter_the_same(world, tmp_path):
    from fgclip_nb.data import filters, stream as room

    data = write_tars(world["data"], tmp_path / "tars", each=2)
    alone, _ = room.open_stream(data, processes=1)
    names = sorted(p.name for p in alone.folder.iterdir())
    places = (alone.folder / "places.npy").read_bytes()
    (alone.folder / "about.json").unlink()
    several, _ = room.open_stream(data, processes=3)
    assert (several.folder / "places.npy").read_bytes() == places
    assert set(names) <= {p.name for p in several.folder.iterdir()}
    kept, rejects = filters.filter_regions(several, min_area=0.3)
    plain, plain_rejects = filters.filter_regions(load_samples(world["data"])[0], min_area=0.3)
    assert len(rejects) == len(plain_rejects) > 0
    assert contents(kept) == contents(plain)


# ---- damaged files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_tar(world, tmp_path_factory):
    folder = one_tar(world, tmp_path_factory.mktemp("fuzz") / "t", lambda k, files: files.items())
    return (folder / "a.tar").read_bytes()


def sound_index(path, columns=""):
    "The index of one file, or None for a DataError; its sums agree."
    try:
        source, _ = open_source(str(path), columns)
        part = index_shard(source, 0)
    except DataError:
        return None
    counts = part["counts"]
    assert counts["entries"] == counts["entries_kept"] + counts["entries_rejected"]
    json.dumps(part)
    return part


def test_any_damage_to_a_tar_is_a_reject(whole_tar, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "damaged.tar"
    for _ in range(120):
        data = bytearray(whole_tar)
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(len(data) // 512) * 512 + rng.randrange(512)
            data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        part = sound_index(path)
        assert part is not None
        if len(part["places"]) < 6:
            assert part["rejects"], "a sample was lost without a word"


def test_any_damage_to_parquet_is_a_reject_or_an_error(world, tmp_path):
    whole = Path(write_parquet(world["data"], tmp_path / "p", each=6)) / "part-0000.parquet"
    rng, path = random.Random(1), tmp_path / "damaged.parquet"
    for _ in range(60):
        data = bytearray(whole.read_bytes())
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        sound_index(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ENTRIES = st.dictionaries(
    st.sampled_from(
        "image caption captions regions f_path bbox_info txt width height split".split()
    ),
    VALUES,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_any_entries_in_a_tar_are_kept_or_rejected(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("any") / "a.tar"
    with tarfile.open(path, "w") as tar:
        for k, entry in enumerate(entries):
            add(tar, f"{k}.jpg", b"\xff\xd8")
            add(tar, f"{k}.json", json.dumps(entry).encode())
    part = sound_index(path)
    assert part["counts"]["entries"] == len(entries)


@settings(max_examples=40, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_any_rows_of_datasets_are_kept_or_rejected(entries):
    from fgclip_nb.data.dataset_sources import IterableSource
    import datasets

    def rows(shards):
        yield from shards

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs=dict(shards=entries))
    source = IterableSource(stream, "any")
    parts = [index_shard(source, k, "/nowhere") for k in range(len(source.names))]
    assert sum(part["counts"]["entries"] for part in parts) == len(entries)
