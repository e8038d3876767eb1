"""What a third attack found: files of kilobytes that become gigabytes, tracebacks, wrong words."""

import json
import os
import resource
import time

import numpy as np
import pytest

from fgclip_nb.core.identity import DataError
from fgclip_nb.data.load import load_samples

ZEROS = "\0" * (20 << 20)


def shared(text, rows):
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(np.zeros(rows, "i4"), [text])


def bomb(name) -> dict:
    "Columns of a Parquet file of some kilobytes."
    import pyarrow as pa

    short = {"image": shared("a.jpg", 50_000)}
    long_list = pa.ListArray.from_arrays(
        np.arange(11, dtype="i4") * 500_000, shared("x" * 50, 5_000_000).dictionary_decode()
    )
    return {
        "wide": {"image": ["a.jpg"]} | {f"c{k}": [ZEROS] for k in range(5)},
        "skew": {"image": ["a.jpg"] * 99} | {f"c{k}": ["x"] * 98 + [ZEROS] for k in range(5)},
        "shared text": short | {"caption": shared("word " * 200_000, 50_000)},
        "lists": {"image": ["a.jpg"] * 10, "captions": long_list},
        "one list": {"image": ["a.jpg"] * 2, "captions": [["x" * 3000] * 100_000, ["y"]]},
    }[name]


def peak_now() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize("columns", ["", "image=image"])
@pytest.mark.parametrize("name", ["wide", "skew", "shared text", "lists", "one list"])
def test_a_little_parquet_file_takes_little_memory(tmp_path, name, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(bomb(name)), tmp_path / "a.parquet", compression="zstd")
    before, begun = peak_now(), time.process_time()
    samples, rejects = load_samples(tmp_path / "a.parquet", missing="keep", columns=columns)
    assert time.process_time() - begun < 5 and peak_now() - before < 400
    assert [r.rule for r in rejects][-1] == "too_large", name
    assert any(word in rejects[-1].reason for word in ("more than", "unpack"))


def test_rows_beside_one_that_is_too_large_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="zstd") as file:
        for name, text in (("a.jpg", "a cat"), ("b.jpg", ZEROS * 4), ("c.jpg", "a dog")):
            file.write_table(pa.table(dict(image=[name], caption=[text])))
    samples, rejects = load_samples(tmp_path / "a.parquet", missing="keep")
    assert [s.caption for s in samples] == ["a cat", "a dog"]
    assert [(r.entry, r.rule) for r in rejects] == [("row 1", "too_large")]


def test_rows_without_anything_end_the_reading(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fgclip_nb.data import source

    monkeypatch.setattr(source, "MOST_LOST", 500)
    nothing = {name: pa.nulls(20_000, pa.string()) for name in ("image", "caption")}
    pq.write_table(pa.table(nothing), tmp_path / "a.parquet")
    for columns in ("", "image=image"):
        _, rejects = load_samples(tmp_path / "a.parquet", columns=columns)
        assert len(rejects) <= 501 and rejects[-1].rule == "not_read"


@pytest.mark.parametrize("statistics", [True, False])
def test_a_row_whose_picture_is_null_is_a_reject(tmp_path, statistics):
    import io
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    picture = png.getvalue()
    tables = dict(
        plain=[picture, None],
        struct=[dict(bytes=picture, path="a.png"), None],
        nulls=[dict(bytes=picture, path="a.png"), dict(bytes=None, path=None)],
        outside=[dict(bytes=picture, path="a.png"), dict(bytes=None, path="../../../etc/passwd")],
        elsewhere=[dict(bytes=picture, path="a.png"), dict(bytes=None, path="/etc/passwd")],
    )
    for name, pictures in tables.items():
        folder = tmp_path / name
        folder.mkdir()
        file, data = folder / "a.parquet", None
        table = pa.table(dict(image=pictures, caption=["a cat", "a dog"]))
        pq.write_table(table, file, write_statistics=statistics)
        parts = [file, f"hub:{folder}"]
        if name != "plain":  # bytes without a feature are no picture there
            data = datasets.Dataset.from_parquet(str(file))
            data.save_to_disk(tmp_path / f"{name} saved")
            parts += [data, str(tmp_path / f"{name} saved")]
        if name in ("struct", "nulls"):
            parts.append(data.cast_column("image", datasets.Image()))
        for source in parts:
            if source is data and name == "elsewhere":
                continue  # who gives a Dataset answers for its paths
            samples, rejects = load_samples(source)
            assert [s.data for s in samples] == [picture], (name, source)
            assert [r.entry for r in rejects] == ["row 1"], (name, source)


LAUGHS = "names:\n  - &a0 [x, y]\n" + "".join(
    f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
LABELS = {
    "references.yaml": LAUGHS,
    "itself.yaml": "&a [*a]",
    "time.yaml": "- !!timestamp abc",
    "number.yaml": '- !!int ""',
    "truth.yaml": "- !!bool zz",
    "sexagesimal.yaml": "- " + ":".join(["1"] * 6000),
    "nan.json": "[NaN, 1]",
    "deep.json": "[" * 5000,
    "digits.json": "[" + "9" * 5000 + "]",
}


@pytest.mark.parametrize("name", LABELS)
def test_a_strange_label_file_is_a_sentence(tmp_path, name):
    from fgclip_nb.evaluation.label_files import read_labels

    (tmp_path / name).write_text(LABELS[name])
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / name)


def test_a_long_label_file_takes_time_by_its_length(tmp_path):
    from fgclip_nb.evaluation.label_files import read_labels

    begun = time.process_time()
    (tmp_path / "many.txt").write_text("\n".join(f"name {k}x" for k in range(60_000)))
    assert len(read_labels(tmp_path / "many.txt")) == 60_000
    (tmp_path / "long.txt").write_text("a" + " ," * 20_000 + "x\nb" + " ," * 20_000 + "x\n")
    assert len(read_labels(tmp_path / "long.txt")) == 2
    assert time.process_time() - begun < 5
    (tmp_path / "marked.txt").write_text("mug, 0\na jug: 1\nice tea =2")
    assert read_labels(tmp_path / "marked.txt") == ["mug", "a jug", "ice tea"]


TEMPLATES = [b"[1,2", b"[" * 5000, b'["a {}", foo()]', b"\xff\xfe\0\0{}\n", b"[" + b"-" * 9999]


@pytest.mark.parametrize("text", TEMPLATES)
def test_strange_templates_are_a_sentence(tmp_path, text):
    from fgclip_nb.evaluation.label_files import read_templates

    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(DataError, match="cannot be read"):
        read_templates(tmp_path / "a.txt")


COUNTS = ["A,²", "A," + "9" * 5000, "A,1000000000000", "A", 'A,"' + "x" * 200_000, "A,10\nA.mp4,9"]


@pytest.mark.parametrize("lines", [*COUNTS, b"\xff\xfe\0", None])
def test_strange_frame_counts_are_a_sentence(tmp_path, lines):
    from fgclip_nb.evaluation.annotations import read_frame_counts

    if lines is not None:
        data = lines if isinstance(lines, bytes) else f"video,n_frames\n{lines}\n".encode()
        (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match="a.csv"):
        read_frame_counts(tmp_path / "a.csv")


SCORES = ['["a"]', "[[1], [2, 3]]", '{"a": 1}', "[1, null]", '"x"', "[" + "9" * 400 + "]"]


@pytest.mark.parametrize("scores", SCORES)
def test_strange_scores_name_their_video(tmp_path, scores):
    from fgclip_nb.evaluation.annotations import read_scores

    (tmp_path / "a.json").write_text(f'{{"clip": {scores}}}')
    with pytest.raises(DataError, match="scores of clip"):
        read_scores(tmp_path / "a.json")


@pytest.mark.parametrize(
    "head",
    [
        "[[[[",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}\n",
        "{'descr': ',<f8', 'fortran_order': False, 'shape': (1,)}\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (3000000000,)}\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
    ],
)
def test_a_strange_npy_file_is_a_sentence(tmp_path, head):
    from fgclip_nb.evaluation.features import read_plain_npy

    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    (tmp_path / "a.npy").write_bytes(data + bytes(80))
    with pytest.raises(DataError, match="no plain npy array"):
        read_plain_npy(tmp_path / "a.npy")


def test_features_of_two_models_are_a_sentence(tmp_path):
    from fgclip_nb.evaluation.features import CachedFeatures

    for kind, names, width in (("image", "image_names", 4), ("text", "texts", 5)):
        np.save(tmp_path / f"{kind}_features.npy", np.ones((1, width)))
        (tmp_path / f"{names}.json").write_text('["a"]')
    with pytest.raises(DataError, match="4 of images, 5 of texts"):
        CachedFeatures(tmp_path)
    (tmp_path / "texts.json").unlink()
    (tmp_path / "texts.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="texts.txt: not UTF-8"):
        CachedFeatures(tmp_path)


def test_a_full_disk_names_the_file_and_nothing_is_left(tmp_path, monkeypatch):
    import errno
    from fgclip_nb.core.folder import write_atomic
    from fgclip_nb.core.lock import FolderLock
    from fgclip_nb.diagnostics.numbers import JsonLines

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "a.json", "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device: '.*a.json'"):
            write_atomic(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    lines = JsonLines("/dev/full")
    with pytest.raises(OSError, match="'/dev/full'"):
        lines.write(dict(step=1))
    (tmp_path / ".a.json.999999999.tmp").write_text("half")  # of a process that was killed
    FolderLock(tmp_path).close()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    "A frame cache of one shipped clip, raw: (FrameCache, clip, bytes of its file)."
    from fgclip_nb.core.folder import asset
    from fgclip_nb.data.frame_cache import FrameCache, cache_clip

    clip = next(p for p in sorted(asset("video_sample").rglob("*")) if p.suffix == ".mp4")
    cache = FrameCache(tmp_path_factory.mktemp("cache"), 32, "raw")
    cache_clip(cache, clip, range(8))
    return cache, clip, cache.file(clip).read_bytes()


def test_any_flipped_bit_of_a_frame_cache_is_told(cached):
    cache, clip, whole = cached
    file = cache.file(clip)
    sound = cache.get(clip)
    pixels, times = sound.read(range(8)), sound.times.tolist()
    told = 0
    places = [*range(0, 12_000, 37), *range(len(whole) - 900, len(whole), 7)]
    for k, place in enumerate(places):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << k % 8)]) + whole[place + 1 :])
        os.utime(file, ns=(k, k))
        try:
            held = cache.get(clip)
            assert (held.read(range(8)) == pixels).all() and held.times.tolist() == times
        except DataError as e:
            assert "build it again" in str(e)
            told += 1
    file.write_bytes(whole)
    assert told > len(places) / 2


HEADS = [
    dict(rows=None),
    dict(rows="8"),
    dict(size=10**6),
    dict(size=-1),
    dict(encoding="zip"),
    dict(info={}),
    dict(info=None),
    dict(times=["x"]),
    dict(times=[0.0]),
    [1],
    3,
]


@pytest.mark.parametrize("change", HEADS, ids=str)
def test_a_strange_head_of_a_frame_cache_is_told(cached, change):
    import zlib
    import pyarrow as pa

    cache, clip, whole = cached
    file = cache.file(clip)
    table = pa.ipc.open_stream(whole).read_all()
    head = json.loads(table.schema.metadata[b"fgclip_nb"])
    said = json.dumps(head | change if isinstance(change, dict) else change).encode()
    crc = str(zlib.crc32(said)).encode()
    table = table.replace_schema_metadata({b"fgclip_nb": said, b"crc": crc})
    with pa.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(DataError, match="build it again"):
        cache.get(clip).read([0])
    file.write_bytes(whole)


def test_a_picture_of_another_size_is_no_frame(cached):
    import io
    from PIL import Image
    from fgclip_nb.data.frame_cache import _decode

    for size, mode in (((1, 1), "RGB"), ((3, 32), "L"), ((32, 32), "L")):
        data = io.BytesIO()
        Image.new(mode, size).save(data, "JPEG")
        with pytest.raises(ValueError):
            _decode(data.getvalue(), "jpeg", 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for k in range(6):
        Image.new("RGB", (40, 40), (k * 40, 0, 0)).save(folder / f"{k}.jpg")
        rows.append(dict(image=f"{k}.jpg", caption=f"photo {k} of a red square"))
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_any_flipped_bit_of_a_shard_is_told(photos, tmp_path):
    from fgclip_nb.data.conversion import convert

    convert(photos / "d.jsonl", tmp_path / "s", embed=True)
    assert len(load_samples(tmp_path / "s")[0]) == 6
    shard = tmp_path / "s/shard-00000.parquet"
    whole = shard.read_bytes()
    for place in range(5, len(whole), len(whole) // 12):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match="shard-00000.parquet: .* convert again"):
            load_samples(tmp_path / "s")
    shard.write_bytes(whole)
    assert len(load_samples(tmp_path / "s")[0]) == 6


def test_a_damaged_index_is_made_again(photos, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(4):
            (tmp_path / f"{k}.txt").write_text(f"a caption of photo {k}")
            tar.add(photos / f"{k}.jpg", f"{k}.jpg")
            tar.add(tmp_path / f"{k}.txt", f"{k}.txt")

    def captions():
        return [s.caption for s in load_samples(str(tmp_path / "a.tar"))[0]]

    sound = captions()
    (index,) = (tmp_path / ".fgclip_nb").iterdir()
    files = ("about.json", "places.npy", "names.parquet")
    for name in files:
        whole = (index / name).read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-3] + b"\1\2\3", None):
            (index / name).unlink()
            if damaged is not None:
                (index / name).write_bytes(damaged)
            assert captions() == sound


def test_a_first_try_that_was_refused_does_not_own_the_folder(tmp_path):
    from fgclip_nb.core.config import TrainConfig, check_params
    from fgclip_nb.core.identity import ConfigError
    from fgclip_nb.training.preparation import open_folder

    first = TrainConfig(output=str(tmp_path / "run"), batch_size=4)
    other = TrainConfig(output=str(tmp_path / "run"), batch_size=8)
    for cfg in (first, other):
        open_folder(cfg, True)[1].close()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    check_params(tmp_path / "run", other)
    with pytest.raises(ConfigError, match="batch_size"):
        open_folder(first, True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "training.log", "timing.jsonl"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path, name):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.core.folder import Run
    from fgclip_nb.training.preparation import open_folder

    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe or device"):
        open_folder(TrainConfig(output=str(tmp_path)), True)
    if name != "training.log":
        with pytest.raises(DataError, match="a pipe or device"):
            Run(tmp_path).metrics(), Run(tmp_path).timing()


@pytest.mark.parametrize("text", ['{"resumed": null}', '{"code": []}', "[]", "{", ""])
def test_a_damaged_manifest_says_the_way_out(tmp_path, text):
    from fgclip_nb.core.folder import Run

    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="manifest.json.*rename this file"):
        Run(tmp_path).manifest()


@pytest.mark.parametrize("name", [".x", "..", "../../x", "a b", "x.", "a/b.py"])
def test_an_extension_that_is_no_name_is_a_sentence(name):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.core.identity import ConfigError

    with pytest.raises(ConfigError, match="`extensions` names the module"):
        TrainConfig(extensions=name)


def test_class_sentences_are_read_from_an_ordinary_file():
    from fgclip_nb.data.hard_negatives import load_class_sentences

    for path in ("/dev/zero", "/nowhere"):
        with pytest.raises(DataError, match="class sentences"):
            load_class_sentences(path)


def test_a_bank_that_does_not_fit_names_its_parameter(monkeypatch, tmp_path):
    from types import SimpleNamespace
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training import preparation
    from fgclip_nb.training.memory import OutOfMemory

    def no_room(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")

    monkeypatch.setattr(preparation, "new_state", no_room)
    monkeypatch.setattr(preparation, "check_best_by", lambda *args: None)
    cfg = TrainConfig(memory_bank_size=999, output=str(tmp_path))
    accelerator = SimpleNamespace(log_with=[], is_main_process=False)
    with pytest.raises(OutOfMemory, match="`memory_bank_size`, which is 999"):
        preparation.prepare(cfg, accelerator, tmp_path, None, SimpleNamespace(val=[1]))


def test_an_end_of_several_processes_is_one_sentence():
    from fgclip_nb.training.launcher import why_it_ended

    box = ["=" * 9, "  exitcode  : 2 (pid: 7)", "=" * 9]
    told = why_it_ended("run", 1, ["[rank0]: ConfigError: 3 samples are too few", *box])
    assert str(told).endswith("ConfigError: 3 samples are too few") and told.status == 2
    for status, last in ((-9, []), (1, ["  exitcode  : -9 (pid: 7)"])):
        told = why_it_ended("run", status, last)
        assert told.status == 137 and "SIGKILL" in str(told) and "resumes" in str(told)


def test_one_strange_row_of_a_log_costs_that_row(tmp_path):
    from fgclip_nb.diagnostics.judgement import evidence

    rows = [json.dumps(dict(step=k, loss=1 / k)) for k in range(1, 30)]
    for digits in (400, 5000):
        odd = f'{{"step": 9, "loss": {"9" * digits}}}'
        (tmp_path / "a.jsonl").write_text("\n".join([*rows[:8], odd, *rows[9:]]))
        assert len(evidence(tmp_path / "a.jsonl").frame) == 28
    for odd in ("9", "9,1,2,3,4", '9,"1', "", ",,,"):
        lines = [f"{k},{1 / k}" for k in range(1, 30)]
        (tmp_path / "a.csv").write_text("\n".join(["step,loss", *lines[:8], odd, *lines[9:]]))
        assert len(evidence(tmp_path / "a.csv").frame) >= (8 if '"' in odd else 28), odd


def test_many_unread_keys_are_few_lines(tmp_path, capsys):
    keys = {f"k{k}": "a sentence of words" for k in range(5000)}
    entry = dict(f_path="a.jpg", caption="a b c", bbox_info=[]) | keys
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    load_samples(tmp_path / "a.json", missing="keep")
    assert len(capsys.readouterr().out.splitlines()) < 12


def test_dollars_in_tables_are_no_formula():
    import pandas as pd
    from fgclip_nb.core.plain import page_table
    from fgclip_nb.diagnostics.expectations import html_table

    for page in (page_table(pd.DataFrame(dict(a=["$x$"]))).to_html(), html_table(["a"], [["$"]])):
        assert "mathjax_ignore" in page


def test_a_checkpoint_whose_state_is_a_dangling_link_is_passed_over(tmp_path):
    from fgclip_nb.core.folder import checkpoint_fault
    from fgclip_nb.training.checkpoints import is_sound

    (tmp_path / "state.json").symlink_to(tmp_path / "nowhere")
    assert "state.json" in checkpoint_fault(tmp_path) and not is_sound(tmp_path)


def test_metrics_that_an_editor_saved_are_read(tmp_path):
    from fgclip_nb.core.folder import Run

    (tmp_path / "metrics.jsonl").write_bytes(b'\xef\xbb\xbf{"step": 1, "loss": 2.0}\n')
    assert Run(tmp_path).metrics()["loss"].tolist() == [2.0]


def made_clip(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for level in range(0, 200, 20):
            picture = np.full((64, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_list_of_clips_named_as_one_opens_no_other_file(tmp_path):
    from fgclip_nb.data.video_index import opened_video

    made_clip(tmp_path / "other.mp4")
    with opened_video(tmp_path / "other.mp4") as (container, stream):
        assert stream.codec_context.width > 0
    lists = {"concat.mp4": "ffconcat version 1.0\nfile other.mp4\n"}
    lists["list.mp4"] = "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}: cannot be read as a video"):
            with opened_video(tmp_path / name):
                pass


def test_what_a_demuxer_stumbles_over_is_told_of_the_file(tmp_path):
    from fgclip_nb.data.video_index import opened_video

    clip = made_clip(tmp_path / "real.mp4")
    for raised in (IndexError("list index out of range"), OverflowError("too large")):
        with pytest.raises(DataError, match="real.mp4: cannot be read as a video"):
            with opened_video(clip):
                raise raised
