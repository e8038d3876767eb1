"""Runs made again from their folders, and sweeps over processes: both need whole trainings and
processes of their own."""

import gzip, json, shutil, subprocess, sys
from pathlib import Path
from unittest.mock import patch
import nbformat as nbf, pytest

sys.path.insert(0, str(Path(__file__).parent))
import planted
from fgclip_nb import diagnostics as dx, model, runs
from synthetic_runs import synthetic_run
from fgclip_nb.runs import reproduction
from fgclip_nb.core.identity import DataError


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return planted.run_planted(tmp_path_factory.mktemp("short"), steps=6)


def again(run, output=None, tell=None):
    with (
        patch.dict(model.PRESETS, tiny=planted.MICRO),
        patch.object(dx, "conclude", lambda run: []),
    ):
        return runs.reproduce(run, output, tell)


def test_a_run_reproduces_bitwise_from_its_folder(short):
    said = []
    result = again(short, tell=said.append)
    assert result.equal and result.steps == 6 and said == [] and "bitwise equal" in str(result)
    assert (short.path.parent / "run-again" / "metrics.jsonl").exists()


def test_a_packed_run_as_it_is_committed_reproduces(short, tmp_path):
    packed = tmp_path / "committed"
    packed.mkdir()
    for name in ("params.yaml", "manifest.json"):
        shutil.copy(short.path / name, packed / name)
    metrics = (short.path / "metrics.jsonl").read_bytes()
    (packed / "metrics.jsonl.gz").write_bytes(gzip.compress(metrics))
    result = again(packed, tmp_path / "again")
    assert result.equal and result.alike and result.steps == 6


def test_what_differs_first_is_named(short, tmp_path):
    lines = (short.path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    row["loss_region"] += 1e-6
    (short.path / "metrics.jsonl").write_text(
        "\n".join([*lines[:3], json.dumps(row), *lines[4:]]) + "\n"
    )
    try:
        result = again(short, tmp_path / "again")
    finally:
        (short.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert (
        not result.equal and result.first[:2] == (4, "loss_region") and 0 < result.largest[2] < 1e-5
    )


def test_other_versions_code_or_data_are_named_before_the_run(short):
    kept = (short.path / "manifest.json").read_text()
    changed = json.loads(kept)
    changed["versions"]["torch"], changed["code"]["package"], changed["data"]["fingerprint"] = (
        "1.0",
        "0000",
        "ffff",
    )
    (short.path / "manifest.json").write_text(json.dumps(changed))
    try:
        differences = " ".join(reproduction.unlike_now(short))
    finally:
        (short.path / "manifest.json").write_text(kept)
    assert all(
        w in differences
        for w in (
            "versions.torch was '1.0'",
            "code.package was '0000'",
            "data.fingerprint was 'ffff'",
        )
    )
    assert reproduction.unlike_now(short) == []


def test_no_run_folder_no_reproduction(tmp_path):
    with pytest.raises(DataError, match="no params.yaml"):
        runs.reproduce(tmp_path)


@pytest.fixture
def toy(tmp_path):
    "A notebook that makes a run folder, fails for seed 1 and dies for seed 2."
    body = (
        "import os, pathlib, signal\nassert seed != 1, 'planted'\n"
        "if seed == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "p = pathlib.Path(output); p.mkdir(parents=True, exist_ok=True)\n"
        "(p/'params.yaml').write_text(f'seed: {seed}\\nlearning_rate: {learning_rate}\\n'); "
        "(p/'metrics.jsonl').write_text('{\"step\": 1, \"loss\": 1.0}\\n')\n"
        "(p/'finished.json').write_text('{}')"
    )
    cells = [
        nbf.v4.new_code_cell(
            "seed, learning_rate, output = 0, 1e-3, ''", metadata=dict(tags=["parameters"])
        ),
        nbf.v4.new_code_cell(body),
    ]
    path = tmp_path / "toy.ipynb"
    nbf.write(
        nbf.v4.new_notebook(
            cells=cells,
            metadata=dict(
                kernelspec=dict(name="python3", display_name="python3", language="python")
            ),
        ),
        path,
    )
    return path


@pytest.mark.ci
def test_a_sweep_goes_on_after_failures_and_resumes(toy, tmp_path):
    pytest.importorskip("submitit")
    command = [
        sys.executable,
        "-m",
        "fgclip_nb.runs",
        "sweep",
        str(toy),
        "-p",
        "seed",
        "0,1,2,3",
        "-p",
        "learning_rate",
        "1e-4",
        "--output",
        str(tmp_path / "out"),
        "--jobs",
        "2",
        "--cluster",
        "local",
    ]
    first = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert first.returncode == 1, first.stdout + first.stderr
    assert first.stdout.count(": finished after") == 2 and first.stdout.count(": failed after") == 2
    assert "AssertionError: planted" in first.stdout
    assert (
        json.loads((tmp_path / "out/sweep.json").read_text())["state"][
            "seed=0,learning_rate=0.0001"
        ]
        == "finished"
    )
    toy.write_text(toy.read_text().replace("seed != 1", "True").replace("seed == 2", "False"))
    second = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert second.returncode == 0 and "2 of 4 finished before" in second.stdout, second.stdout
    assert second.stdout.count(": finished after") == 2


def test_a_misspelt_name_in_a_sweep_says_what_was_meant(toy):
    r = subprocess.run(
        [sys.executable, "-m", "fgclip_nb.runs", "sweep", str(toy), "-p", "logit_scal_init", "4"],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 2 and "did you mean `logit_scale_init`" in r.stderr


def test_runs_of_other_data_are_not_comparable(short, tmp_path):
    other = synthetic_run(tmp_path / "other", steps=6)
    notes = " ".join(runs.compare_runs([short, other]).notes)
    assert "Different data" in notes and "candidates" in notes
