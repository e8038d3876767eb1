"""The front door: the run notebooks under papermill, as README calls them, and what they record.

Whole runs are no cell. Each notebook is executed from another folder, like a user's."""

import json, subprocess, sys
from pathlib import Path

import pytest

from fgclip_nb.core.folder import Run

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(max_steps=3, batch_size=4, eval_every=3, save_every=3, diag_every=1, device="cpu")


def papermill(notebook, out, cwd=ROOT, **params):
    "Execute a run notebook; returns the finished process and the executed notebook's cells."
    words = [w for k, v in params.items() for w in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / notebook), str(out), *words]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=400
    )
    cells = json.loads(out.read_text())["cells"] if out.exists() else []
    return done, cells


def pictures(cells) -> int:
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


def said(cells) -> str:
    "All text that the executed notebook shows."
    outputs = [o for c in cells for o in c.get("outputs", [])]
    texts = [o.get("text", "") for o in outputs]
    for o in outputs:
        texts += [v for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(t) for t in texts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "`papermill nbs/train.ipynb … -p logit_scale_init 4.6052`, three steps."
    folder = tmp_path_factory.mktemp("front")
    params = dict(QUICK, logit_scale_init=4.6052, output=folder / "run")
    done, cells = papermill("train.ipynb", folder / "train.ipynb", folder, **params)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder / "run"), cells


@pytest.mark.ci
def test_train_records_its_metrics_and_shows_its_plots(trained):
    run, cells = trained
    metrics = run.metrics()
    assert run.finished and metrics["step"].tolist() == [1, 2, 3]
    assert metrics["loss"].notna().all() and metrics["loss_region"].notna().all()
    assert metrics["logit_scale"].iloc[0] == pytest.approx(4.60517, abs=1e-4)
    assert metrics["val_mean_rank"].notna().sum() == 1
    verdicts = json.loads((run.path / "verdicts.json").read_text())
    assert {v["name"] for v in verdicts} >= {"scale_as_asked", "bank_comes_on", "finite_numbers"}
    assert (run.path / "report.html").stat().st_size > 10_000
    assert pictures(cells) >= 8
    assert "scale_as_asked" in said(cells) or "scale as asked" in said(cells)


@pytest.mark.ci
def test_evaluate_scores_the_trained_run(trained, tmp_path):
    run, _ = trained
    params = dict(
        model=run.path, tasks="short_retrieval", permutations=20, output=tmp_path / "eval"
    )
    done, cells = papermill("evaluate.ipynb", tmp_path / "o.ipynb", tmp_path, **params)
    assert done.returncode == 0, done.stderr[-3000:]
    score = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert 1 <= score["results"]["short_retrieval"]["i2t"]["mean_rank"] <= 500
    assert pictures(cells) >= 1


@pytest.mark.ci
def test_data_report_finds_nothing_wrong_with_the_shipped_photos(tmp_path):
    done, cells = papermill("data_report.ipynb", tmp_path / "o.ipynb", output=tmp_path / "report")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report/summary.json").read_text())
    assert report["counts"]["samples"] == 151
    assert pictures(cells) >= 3


@pytest.mark.ci
def test_compare_sets_runs_side_by_side(trained, tmp_path):
    run, _ = trained
    done, cells = papermill("compare.ipynb", tmp_path / "o.ipynb", runs=run.path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run.path.name in said(cells)


@pytest.mark.ci
def test_a_misspelt_name_in_the_notebook_ends_the_run(tmp_path):
    "What a typo in a cell must do: papermill's status says so, and the notebook keeps the error."
    broken = json.loads((ROOT / "nbs/train.ipynb").read_text())
    code = [c for c in broken["cells"] if "plot_losses" in "".join(c["source"])]
    code[0]["source"] = "".join(code[0]["source"]).replace("plot_losses", "plot_loses")
    (tmp_path / "broken.ipynb").write_text(json.dumps(broken))
    params = dict(QUICK, max_steps=1, output=tmp_path / "run")
    done, _ = papermill(tmp_path / "broken.ipynb", tmp_path / "o.ipynb", **params)
    assert done.returncode != 0 and "plot_loses" in done.stderr
