"""Killed trainings, which no cell can hold: real processes die at chosen steps, inside checkpoint
writes and inside metrics lines, and the same command goes on.

The outcome has to be bitwise that of the run that was never interrupted: parameters, optimiser,
bank, and every line of metrics once."""

import json

import pytest

import micro

SIX = ["line:2", "step:4", "save:6:torn", "save:6:unsealed", "save:9:unrenamed", "step:9"]
SAVES = {n: [f"save:{n}:{stage}" for stage in ("torn", "unsealed", "unrenamed")] for n in (3, 6, 9)}
# in the order of steps: a run gone on from step 6 cannot die in the checkpoint of step 3 any more
TWENTY = [
    "step:1",
    "step:2",
    "step:3",
    *SAVES[3],
    "step:4",
    "line:5",
    "step:5",
    "step:6",
    *SAVES[6],
    "step:7",
    "line:8",
    "step:8",
    "step:9",
    *SAVES[9],
]
CHANGES = dict(
    plain=dict(),
    workers=dict(num_workers=2),
    accumulation=dict(gradient_accumulation_steps=2, batch_size=2),
    caching=dict(gradient_caching=3, batch_size=8),
    caching_workers=dict(gradient_caching=2, num_workers=2),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"))


def shards_of(world, folder):
    from fgclip_nb.data.conversion import convert

    convert(world["data"], folder / "shards", embed=True)
    return dict(world, data=str(folder / "shards"))


def killed_like_uninterrupted(params, tmp_path, events):
    assert micro.run(dict(params, output=str(tmp_path / "whole"))) == 0
    broken = dict(params, output=str(tmp_path / "broken"))
    for event in events:
        assert micro.run(broken, event) == -9, event
    assert micro.run(broken) == 0
    assert micro.outcome(tmp_path / "broken") == micro.outcome(tmp_path / "whole")
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, params["max_steps"] + 1))
    assert not list((tmp_path / "broken/checkpoints").glob(".aside*"))


@pytest.mark.ci
def test_six_kills_of_one_combined_run(world, tmp_path):
    """Streamed from shards, two loader processes, accumulation, mid-epoch: all at once."""
    params = shards_of(world, tmp_path) | dict(
        num_workers=2, gradient_accumulation_steps=2, batch_size=2
    )
    killed_like_uninterrupted(params, tmp_path, SIX)


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_twenty_kills(world, tmp_path, name, streamed):
    params = (shards_of(world, tmp_path) if streamed else world) | CHANGES[name]
    killed_like_uninterrupted(params, tmp_path, TWENTY)


@pytest.mark.parametrize(
    "name, status",
    [
        pytest.param("SIGTERM", 143, marks=pytest.mark.ci),
        pytest.param("SIGINT", 130, marks=pytest.mark.long),
    ],
)
def test_a_polite_signal_saves_and_ends_with_its_own_status(world, tmp_path, name, status):
    params = dict(world, output=str(tmp_path / "run"), gradient_caching=2)
    assert micro.run(params, f"{name}:5") == status
    from fgclip_nb.core.folder import Run

    assert Run(tmp_path / "run").checkpoints()[-1][0] == 5 and not Run(tmp_path / "run").finished
    assert micro.run(params) == 0
    assert micro.run(dict(params, output=str(tmp_path / "whole"))) == 0
    assert micro.outcome(tmp_path / "run") == micro.outcome(tmp_path / "whole")


@pytest.mark.long
def test_a_finished_run_of_constant_rate_goes_on_as_one(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.core.identity import ConfigError
    from fgclip_nb.training.loop import train

    def config(name, steps, **kw):
        kw = dict(lr_schedule="constant") | kw
        kw |= dict(batch_size=4, memory_bank_warmup_steps=2, diag_every=2, tracker="none")
        return TrainConfig(output=str(tmp_path / name), max_steps=steps, device="cpu", **kw)

    def losses(run):
        metrics = run.metrics()
        return metrics[["step", "loss", "lr"]].values.tolist()

    whole = train(config("whole", 6))
    train(config("parts", 3))
    parts = train(config("parts", 6))
    assert parts.finished and parts.summary()["of"] == 6
    assert losses(parts) == losses(whole)
    train(config("cosine", 3, lr_schedule="cosine"))
    with pytest.raises(ConfigError, match="starts one from its weights"):
        train(config("cosine", 6, lr_schedule="cosine"))
