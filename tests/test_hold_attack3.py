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
