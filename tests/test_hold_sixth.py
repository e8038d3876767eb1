"""What a sixth attack found: places that cannot be written, words that mean a path."""

import os, subprocess, sys
from pathlib import Path

import pytest

from fgclip_nb.core.config import TrainConfig, run_folder
from fgclip_nb.core.identity import ConfigError


def test_a_home_in_a_path_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder(TrainConfig(output="~/runs/a")) == tmp_path / "runs/a"
    assert run_folder(TrainConfig(output=str(tmp_path / "b"))) == tmp_path / "b"


def test_names_by_commas_may_have_blanks():
    assert TrainConfig(allow_changed="seed, data").allow_changed == "seed, data"
    with pytest.raises(ConfigError, match="names 'sed', which is no parameter"):
        TrainConfig(allow_changed="data, sed")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no place that refuses even root")
@pytest.mark.parametrize("temporary", ["can be written", "/proc/none"])
def test_tars_without_a_place_for_their_index(tmp_path, monkeypatch, temporary, capsys):
    import shutil, tarfile, tempfile

    from fgclip_nb.core.folder import asset
    from fgclip_nb.data.__main__ import main

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        photo = next(asset("sample", "images").glob("*.jpg"))
        tar.add(photo, "a.jpg")
        (tmp_path / "a.txt").write_text("a photo of something")
        tar.add(tmp_path / "a.txt", "a.txt")
    (tmp_path / "a.txt").unlink()
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: str(p) != str(tmp_path) and allowed(p, mode)
    )  # a folder that is mounted read-only
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    (tmp_path / "temporary").mkdir()
    places = {"can be written": str(tmp_path / "temporary")}
    monkeypatch.setattr(tempfile, "tempdir", places.get(temporary, temporary))
    status = main(["report", str(tmp_path)])
    said = capsys.readouterr()
    if temporary == "/proc/none":
        assert status == 1 and "no place to keep an index: /proc/none" in said.err
    else:
        assert "1 kept + 0 rejected" in said.out
        shutil.rmtree(tmp_path / "temporary")


def test_a_disk_error_of_a_command_is_a_line(tmp_path):
    command = [sys.executable, "-m", "fgclip_nb.data", "convert", "sample", "/proc/none/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: ") and "/proc/none" in done.stderr
    )


def test_a_parameter_that_stands_twice_is_refused(tmp_path, capsys):
    from fgclip_nb.training.__main__ import main

    (tmp_path / "mine.yaml").write_text("seed: 1\nmax_steps: 3\nseed: 2\n")
    assert main([str(tmp_path / "mine.yaml"), "--dry-run"]) == 2
    assert "mine.yaml: not readable YAML ('seed' stands twice)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz", "00000.tgz"])
def test_a_folder_of_packed_files_says_what_to_do(tmp_path, name):
    from fgclip_nb.data.load import load_samples
    from fgclip_nb.core.identity import DataError

    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"holds {name}: unpack it"):
        load_samples(tmp_path)


def test_a_drawn_result_of_an_unknown_type_is_a_reject(tmp_path):
    import json

    from PIL import Image
    from fgclip_nb.data.load import load_samples

    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    place = dict(x=10, y=10, width=20, height=20, rotation=0, rectanglelabels=["a cat"])
    sizes = dict(original_width=80, original_height=60)
    kinds = ("rectanglelabels", "Rectangle Labels", None, 3)
    results = [
        dict(id=f"r{k}", type=kind, from_name="a", to_name="b", value=place, **sizes)
        for k, kind in enumerate(kinds)
    ]
    task = dict(id=1, data=dict(image="a.png"), annotations=[dict(id=1, result=results)])
    (tmp_path / "a.json").write_text(json.dumps([task]))
    samples, rejects = load_samples(tmp_path / "a.json")
    assert len(samples[0].regions) == 1
    assert [r.rule for r in rejects] == ["no_rectangle"] * 3


@pytest.mark.parametrize("columns", ["", "caption=text"])
def test_two_columns_of_one_name_are_a_reject(tmp_path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fgclip_nb.data.load import load_samples

    names = ["image", "image", "text"] if columns else ["file_name", "text", "text"]
    pq.write_table(pa.table([pa.array([b"a"])] * 3, names=names), tmp_path / "a.parquet")
    samples, rejects = load_samples(tmp_path / "a.parquet", columns=columns)
    assert not len(samples) and [r.rule for r in rejects] == ["duplicate_key"]


def test_a_table_that_is_removed_while_it_grows_says_so(tmp_path, capsys):
    from fgclip_nb.diagnostics.numbers import JsonLines

    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(dict(step=1))
    (tmp_path / "metrics.jsonl").unlink()
    lines.write(dict(step=2))
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'
    assert "metrics.jsonl was removed while it was written" in capsys.readouterr().out
