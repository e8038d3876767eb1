"""A loss term of a user's own, written in one cell of one module, followed through a whole run: a
cell of the library cannot show that papermill, the command and other processes know it too."""

import functools
import json
import os
import site
import subprocess
import sys
import textwrap

import micro
import pytest

CELL = """
    import torch
    from fgclip_nb.losses.table import loss_term
    from fgclip_nb.losses.terms import LossTerm

    @loss_term("dense", weight="dense_weight", default=0.5, range=(0, 10), help="own loss")
    def dense_term(features, batch, state):
        if "text_features" not in features:
            return None
        images = features["image_features"][batch.caption_rows]
        cosines = torch.cosine_similarity(images, features["text_features"])
        state["margin"] = 0.9 * state.get("margin", torch.zeros(())) + 0.1 * cosines.mean().detach()
        loss = (1 + state["margin"] - cosines).mean()
        return LossTerm.of(loss, rows=len(cosines), chance=1.0, margin=state["margin"])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "(folder with the module, parameters of a short run)"
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_terms.py").write_text(textwrap.dedent(CELL))
    params = micro.micro_world(folder) | dict(
        extensions="my_terms", dense_weight=0.25, max_steps=12, tracker="tensorboard"
    )
    return folder, params


def train(params, folder, event=None):
    "In a child that can import the modules of `folder`, whatever its fork server was started with."
    return micro.run(params, event, functools.partial(site.addsitedir, str(folder)))


@pytest.fixture(scope="module")
def run(world):
    from fgclip_nb.core.folder import Run

    folder, params = world
    assert train(params | dict(output=str(folder / "run")), folder) == 0
    return Run(folder / "run")


@pytest.mark.ci
def test_it_is_in_the_weighted_sum_and_has_its_columns(run):
    from fgclip_nb.core.config import TrainConfig

    weights = TrainConfig()
    for row in run.metrics().to_dict("records"):
        expected = 0.25 * row["loss_dense"]
        for part, weight in (
            ("global_short", weights.global_weight),
            ("global_long", weights.global_weight),
            ("region", weights.region_weight),
            ("hard", weights.hard_weight),
        ):
            value = row.get(f"loss_{part}", 0.0)
            expected += weight * (value if value == value else 0.0)
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["chance_dense"] == 1.0 and row["margin_dense"] == row["margin_dense"]
    held_out = run.metrics()[["val_loss_dense", "val_chance_dense"]].dropna()
    assert len(held_out) == 3 and (held_out["val_chance_dense"] == 1).all()
    log = (run.path / "training.log").read_text()
    assert "loss_dense=" in log and "[VAL]" in log


@pytest.mark.ci
def test_it_is_expected_judged_plotted_and_on_the_board(run):
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fgclip_nb.diagnostics.judgement import run_evidence
    from fgclip_nb.diagnostics.plots import plot_losses, plot_validation
    from fgclip_nb.diagnostics.report import expected_and_observed
    from fgclip_nb.runs.comparison import run_row

    rows = {
        name: row for name, *row in expected_and_observed(run.expectations(), run_evidence(run))
    }
    assert rows["dense chance level"][1] == "1"
    judged = {v["name"]: v for v in json.loads((run.path / "verdicts.json").read_text())}
    assert {"dense_loss_rise", "dense_above_chance"} <= set(judged)
    titles = [ax.get_title(loc) for ax in plot_losses(run).axes for loc in ("left", "center")]
    assert any(t.startswith("dense") for t in titles), titles
    legend = plot_validation(run).axes[0].get_legend_handles_labels()[1]
    assert "held-out dense" in legend
    plt.close("all")
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    assert "train/loss_dense" in board.Tags()["scalars"]
    assert 0 < run_row(run)["dense_over_chance"] < 1.2


ASKED = """
    import dataclasses, json, pickle, sys
    from fgclip_nb.core.config import TrainConfig, known_parameters
    from fgclip_nb.core.notebook import notebook_params
    from fgclip_nb.training.__main__ import config_from_args

    cell = "# Parameters\\nextensions = 'my_terms'\\ndense_weight = 0.25"
    names = dict(In=[cell])
    exec(cell, names)
    of_papermill = TrainConfig.from_params(notebook_params(names))
    assert config_from_args([sys.argv[1]]) == of_papermill
    assert pickle.loads(pickle.dumps(of_papermill)) == of_papermill
    assert of_papermill.as_dict()["dense_weight"] == 0.25 and "dense_weight" in known_parameters()
    try:
        dataclasses.replace(of_papermill, dense_weight=11)
    except ValueError as e:
        print(e)
"""


@pytest.mark.ci
def test_papermill_and_yaml_know_its_weight(world):
    folder, _ = world
    (folder / "params.yaml").write_text("extensions: my_terms\ndense_weight: 0.25\n")
    env = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", textwrap.dedent(ASKED), str(folder / "params.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=micro.Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "`dense_weight` = 11.0 is outside its range [0, 10]: own loss" in done.stdout


@pytest.mark.ci
def test_without_its_module_the_weight_is_unknown(world):
    folder, params = world
    params = {k: v for k, v in params.items() if k != "extensions"}
    assert micro.run(params | dict(output=str(folder / "unknown"))) == 2
    told = "".join(p.read_text() for p in folder.glob("unknown*.txt"))
    assert "unknown parameter `dense_weight`" in told and "`extensions`" in told


@pytest.mark.ci
def test_what_it_keeps_between_steps_survives_a_kill(world, run):
    folder, params = world
    again = params | dict(output=str(folder / "killed"))
    assert train(again, folder, event="step:8") == -9
    assert train(again, folder) == 0
    assert micro.outcome(folder / "killed") == micro.outcome(run.path)
