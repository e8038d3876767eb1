"""What a third attack found: files of kilobytes that become gigabytes, tracebacks, wrong words."""

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


def test_a_row_whose_picture_is_null_says_so(tmp_path):
    import io
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    for name, pictures in (
        ("plain", [png.getvalue(), None]),
        ("struct", [dict(bytes=png.getvalue(), path="a.png"), None]),
    ):
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(dict(image=pictures, caption=["a cat", "a dog"])), file)
        samples, rejects = load_samples(file)
        assert samples[0].data == png.getvalue()
        if name == "plain":  # pixels are not read for the index
            with pytest.raises(DataError, match="row 1: `image` is null: no picture"):
                samples[1]
        else:
            assert len(samples) == 1 and rejects[0].entry == "row 1"


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
    import os
    from fgclip_nb.core.folder import FolderLock, write_atomic
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
