"""Training and what surrounds it on tensors that say they are on cuda:0 (`tests/pretend.py`):
nothing meets the wrong device, and the host waits and copies no more than it must. A process of its
own, because torch is made to believe in a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RUNS = ("photos", "positive", "ignore", "caching", "accumulation", "video", "world", "trackers")
RUNS += ("validation",)
OTHERS = ("resumed", "evaluated", "forecast", "benched", "gpu_parts", "half")


def rehearse(out, *scenarios):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
    done = subprocess.run(
        [sys.executable, str(HERE / "pretend.py"), str(out), *scenarios],
        capture_output=True,
        text=True,
        timeout=1500,
        stdin=subprocess.DEVNULL,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "pretend.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretend")
    return dict(out=out, **rehearse(out, "on_the_cpu", *RUNS, *OTHERS))


@pytest.mark.ci
@pytest.mark.parametrize("name", [*RUNS, *OTHERS])
def test_it_runs_where_tensors_lie_on_a_gpu(found, name):
    assert "failed" not in found[name], found[name]["failed"]


@pytest.mark.ci
@pytest.mark.parametrize("name", [n for n in RUNS if n != "validation"])
def test_a_step_waits_little_and_copies_little(found, name):
    for step in found[name]["steps"][1:]:  # the first makes what stays
        recorded = (step["step"] - 1) % 4 == 0  # the line of the step before is in these counts
        assert step["waits"] <= (6 if recorded else 2), (step, found[name]["waits"])
        batches = 3 if name == "accumulation" else 1
        assert step["copies"] <= 4 * batches, (step, found[name]["copies"])


@pytest.mark.ci
def test_the_numbers_are_those_of_the_cpu(found):
    from fgclip_nb.core.folder import Run

    there = Run(found["out"] / "photos").metrics()
    here = Run(found["out"] / "on_the_cpu").metrics()
    resumed = Run(found["out"] / "resumed").metrics()
    assert list(there.columns) == list(here.columns)
    for column in here:
        if column not in ("nonfinite", "bank_drift_cosine"):
            assert there[column].to_numpy() == pytest.approx(
                here[column].to_numpy(), rel=1e-4, abs=1e-6, nan_ok=True
            ), column
    assert resumed["loss"].tolist() == there["loss"].tolist()


BOTH = """
import sys
sys.path.insert(0, {tests!r})
import torch, pretend
pretend.believe()
with pretend.Rehearsal():
    x = torch.arange(4.0, device="cuda")
    x[torch.tensor([0, 1])]  # indices may lie on the host
    pretend.waits.clear()
    float(x.sum()), x[x > 1], bool((x > 1).any()), x.tolist()
    print(pretend.waits.total())
    for wrong in (lambda: x + torch.ones(4), lambda: x.numpy()):
        try:
            wrong()
        except (RuntimeError, TypeError) as e:
            print(type(e).__name__)
"""


@pytest.mark.ci
def test_the_rehearsal_sees_waits_and_mixing():
    done = subprocess.run(
        [sys.executable, "-c", BOTH.format(tests=str(HERE))], capture_output=True, text=True
    )
    assert done.stdout.split() == ["4", "RuntimeError", "TypeError"], done.stderr[-2000:]
