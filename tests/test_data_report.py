"""The report notebook under papermill: it runs on a user's folder, stops when told to, and checks
its parameters."""

import ast, json, os, subprocess, sys
from pathlib import Path

import pytest

from data_formats import FINEHARD, media_root, put_box, write

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs/data_report.ipynb"
UCA = ROOT.parent / "shared/data/ucf_crime"


def papermill(out, *parameters, cwd=ROOT):
    args = [x for k, v in parameters for x in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(out), *args]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_the_parameters_cell_is_tagged_and_read():
    cell = next(
        c
        for c in json.loads(NOTEBOOK.read_text())["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    )
    from papermill.inspection import inspect_notebook

    known = inspect_notebook(str(NOTEBOOK))
    written = [
        line for line in "".join(cell["source"]).splitlines()[1:] if ": " in line and " = " in line
    ]
    assert len(known) == len(written) and all(p["help"] for p in known.values())
    assert {"data", "media_root", "model", "context_length", "strict"} <= set(known)


def test_the_report_has_the_defaults_of_training():
    """What it says about floors, drawn regions and small boxes is about the run that the same
    command without parameters starts."""
    from papermill.inspection import inspect_notebook
    from fgclip_nb.core.config import known_parameters

    own = {"output", "model"}
    for name, parameter in inspect_notebook(str(NOTEBOOK)).items():
        if name in known_parameters() and name not in own:
            assert ast.literal_eval(parameter["default"]) == known_parameters()[name].default, name


@pytest.mark.ci
def test_a_users_folder_and_strict(tmp_path):
    media_root(tmp_path / "photos")
    write(tmp_path / "photos.json", put_box(FINEHARD, 1, [0.5, 0.5, 0.5, 0.9]))
    parameters = (
        ("data", "photos.json"),
        ("media_root", "photos"),
        ("output", tmp_path / "out"),
        ("strict", True),
    )
    done = papermill(tmp_path / "o.ipynb", *parameters, cwd=tmp_path)
    assert (
        done.returncode != 0
        and "strict: 1 thing(s) must be fixed" in done.stderr
        and "no_area" in done.stderr
    ), done.stderr[-2000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["regions"], summary["regions_kept"], summary["rules"]) == (6, 5, {"no_area": 1})
    rejects = [
        json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    ]
    assert [(r["rule"], r["entry"]) for r in rejects] == [("no_area", "[1]")]
    cells = json.loads((tmp_path / "o.ipynb").read_text())["cells"]
    kinds = [set(o.get("data", {})) for c in cells for o in c.get("outputs", [])]
    pictures = [k for k in kinds if k & {"image/png", "image/jpeg"}]
    assert len(pictures) >= 5


@pytest.mark.ci
def test_the_shipped_sample_has_nothing_to_fix(tmp_path):
    done = papermill(tmp_path / "o.ipynb", ("output", tmp_path / "out"), ("strict", True))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["counts"]["samples"] == 151 and summary["regions"] == 1014
    assert not [f for f in summary["findings"] if f["level"] == "fix"]


@pytest.mark.ci
def test_clips_tell_what_sampled_frames_miss(tmp_path):
    """Eight frames a segment leave one track out; the first 512 frames of each video would leave
    out eleven segments and thirty tracks."""
    done = papermill(
        tmp_path / "o.ipynb", ("data", "video_sample"), ("output", tmp_path / "out"), ("pages", 0)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["spans"], summary["spans_not_hit"], summary["rules"]) == (
        88,
        1,
        {"never_visible": 1},
    )
    text = (tmp_path / "o.ipynb").read_text()
    assert (
        "Spans no sampled frame hits: 1 of 88" in text and "not hit by the first 512 frames" in text
    )


@pytest.mark.ci
@pytest.mark.skipif(not UCA.exists(), reason="UCA's files are not beside this checkout")
def test_absent_videos_are_counted_and_reported_quickly(tmp_path):
    begun = os.times()
    done = papermill(
        tmp_path / "o.ipynb",
        ("data", UCA),
        ("test_data", UCA / "Anomaly_Test.txt"),
        ("output", tmp_path / "out"),
    )
    used = sum(os.times()[2:4]) - sum(
        begun[2:4]
    )  # processor time: a busy machine makes the clock mean nothing
    assert done.returncode == 0 and used < 60, (used, done.stderr[-2000:])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    counts = {f["what"]: f["count"] for f in summary["findings"]}
    assert (
        counts["samples whose photo or video is not on this machine"] == 23542
        and summary["spans_not_hit"] == 0
    )
    assert (
        counts["media in train and test list"] == 214
        and summary["files"][-1]["media not here"] == 1854
    )


@pytest.mark.ci
def test_a_misspelt_parameter_is_named(tmp_path):
    done = papermill(tmp_path / "o.ipynb", ("strikt", True))
    assert done.returncode != 0 and "did you mean `strict`" in done.stderr
