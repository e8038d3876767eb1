"""The best checkpoint, not the newest: saved when found, named on disk, taken by its run."""

import json
import logging
from pathlib import Path

import pytest

import micro


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"))


def validations_of(run):
    "Step -> (weighted loss as the log has it, mean rank) of every validation."
    rows = run.metrics().dropna(subset=["val_mean_rank"])
    return dict(zip(rows.step, rows.val_mean_rank))


@pytest.fixture(scope="module")
def worsening(world, tmp_path_factory):
    "A run that learns for three steps and is then driven off; no save step is near its best."
    params = dict(
        world,
        output=str(tmp_path_factory.mktemp("worsening") / "run"),
        max_steps=8,
        learning_rate=0.05,
        save_every=100,
        eval_every=1,
        keep_checkpoints=1,
    )
    assert micro.run(params) == 0
    return params


def said(caplog, logger="fgclip_nb"):
    return "\n".join(r.getMessage() for r in caplog.records if r.name == logger)


@pytest.fixture
def heard(caplog):
    log = logging.getLogger("fgclip_nb")
    log.addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    yield lambda: said(caplog)
    log.removeHandler(caplog.handler)


@pytest.mark.ci
def test_a_run_and_its_evaluation_name_the_same_weights(world, tmp_path):
    from fgclip_nb.core.folder import Run
    from fgclip_nb.core.identity import weights_fingerprint
    from fgclip_nb.evaluation.features import load_model
    from fgclip_nb.evaluation.results import evaluate
    from safetensors.torch import load_file

    params = dict(world, output=str(tmp_path / "run"), max_steps=2, lr_warmup_steps=0)
    assert micro.run(params) == 0
    run = Run(params["output"])
    evaluated = evaluate(str(run.path), data=world["data"]).manifest
    step, folder = run.best_checkpoint()
    assert run.manifest()["trained"][folder.name] == evaluated["weights"]
    assert json.loads((folder / "state.json").read_text())["weights"] == evaluated["weights"]
    assert weights_fingerprint(load_file(folder / "model.safetensors")) == evaluated["weights"]
    start = weights_fingerprint(load_model(world["model"]))
    assert run.manifest()["weights"] == start != evaluated["weights"]


@pytest.mark.ci
def test_an_improvement_is_saved_at_a_step_that_is_no_save_step(worsening):
    from fgclip_nb.core.folder import Run

    run = Run(worsening["output"])
    best = run.summary()["best"]
    assert best["step"] < 8, "the run was to get worse at its end"
    assert run.best() == dict(
        step=best["step"], folder=f"step_{best['step']:08d}", score=best["score"], by="loss"
    )
    assert [step for step, _ in run.checkpoints()] == [best["step"], 8]
    assert set(run.manifest()["trained"]) == {f.name for _, f in run.checkpoints()}


@pytest.mark.ci
def test_whoever_names_the_run_gets_the_best_and_is_told(worsening, heard):
    from fgclip_nb.core.folder import Run
    from fgclip_nb.core.identity import weights_fingerprint
    from fgclip_nb.evaluation.features import load_model
    from fgclip_nb.training.build import weights_source

    run = Run(worsening["output"])
    name = run.best()["folder"]
    assert weights_source(worsening["output"]).name == name
    assert f"{name} is taken (the best by loss, score" in heard()
    trained = run.manifest()["trained"]
    for source in (run.path, run.path / "checkpoints/best", run.path / "checkpoints" / name):
        assert weights_fingerprint(load_model(source)) == trained[name]
    newest = run.checkpoints()[-1][1]
    assert weights_fingerprint(load_model(newest)) == trained[newest.name] != trained[name]


@pytest.mark.ci
def test_without_validation_the_newest_sound_one_is_taken(world, tmp_path, heard):
    from fgclip_nb.core.folder import Run
    from fgclip_nb.core.identity import DataError
    from fgclip_nb.evaluation.features import load_model
    from fgclip_nb.training.build import weights_source

    run = Run(tmp_path / "run")
    data = Path(world["data"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    trained_on = data.with_name("all_train.jsonl")
    trained_on.write_text(
        "\n".join(json.dumps(r) for r in rows if r.get("split", "train") == "train")
    )
    params = dict(world, data=str(trained_on), output=str(run.path), max_steps=6)
    assert micro.run(params) == 0
    assert run.best() == {} and not (run.path / "checkpoints/best").exists()
    assert weights_source(str(run.path)).name == "step_00000006"
    assert "the newest; none was judged" in heard()
    (run.path / "checkpoints/step_00000006/model.safetensors").write_bytes(b"torn")
    assert weights_source(str(run.path)).name == "step_00000003"
    (run.path / "checkpoints/step_00000003/state.json").write_text("{")
    for load in (load_model, weights_source):
        with pytest.raises(DataError, match="none of its checkpoints is sound"):
            load(str(run.path))


@pytest.mark.ci
def test_the_best_by_rank_is_the_first_of_the_lowest_rank(worsening, tmp_path):
    from fgclip_nb.core.folder import Run

    params = dict(worsening, output=str(tmp_path / "run"), best_by="rank")
    assert micro.run(params) == 0
    run, by_loss = Run(params["output"]), Run(worsening["output"])
    ranks = validations_of(run)
    lowest = min(ranks.values())
    first = next(step for step, rank in ranks.items() if rank == lowest)
    best = {k: run.best()[k] for k in ("step", "score", "by")}
    assert best == dict(step=first, score=lowest, by="rank")
    same = [(r.path / "metrics.jsonl").read_bytes() for r in (run, by_loss)]
    assert same[0] == same[1], "what is chosen changes nothing that is computed"


def test_a_rank_cannot_choose_where_nothing_is_ranked(world, tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.core.identity import ConfigError
    from fgclip_nb.training.validation import check_best_by

    with pytest.raises(ConfigError, match="there are 0"):
        check_best_by(TrainConfig(best_by="rank"), [])


@pytest.mark.ci
def test_a_best_between_two_saves_outlives_a_kill(worsening, tmp_path):
    """Killed after the best was found: the same command ends bit for bit as without."""
    from fgclip_nb.core.folder import Run

    best = Run(worsening["output"]).best()
    broken = dict(worsening, output=str(tmp_path / "broken"))
    assert micro.run(broken, f"step:{best['step'] + 1}") == -9
    assert Run(broken["output"]).best() == best
    assert micro.run(broken) == 0
    assert Run(broken["output"]).best() == best
    assert micro.outcome(broken["output"]) == micro.outcome(worsening["output"])
