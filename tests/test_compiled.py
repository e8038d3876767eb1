"""A training with compiled layers takes the steps of one without.

The compiler is torch's own in the long tests and only traces otherwise."""

import json
from pathlib import Path

import pytest

import micro


def only_trace():
    """torch.compile without its code writer, which takes a minute."""
    import functools, torch

    torch.compile = functools.partial(torch.compile, backend="eager")


def losses(params):
    return [
        json.loads(line)["loss"]
        for line in (Path(params["output"]) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    "change",
    [pytest.param(only_trace, marks=pytest.mark.ci), pytest.param(None, marks=pytest.mark.long)],
)
def test_the_same_steps(tmp_path, change):
    world = dict(micro.micro_world(tmp_path), max_steps=4)
    plain, compiled = (
        dict(world, output=str(tmp_path / str(on)), compile_layers=on) for on in (False, True)
    )
    assert micro.run(plain) == 0 and micro.run(compiled, change=change) == 0
    assert len(losses(plain)) == 4 and losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
