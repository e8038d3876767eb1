"""What broke runs before: processes that lose each other, ends that are cut off, disks that fill up. Each test plays the fault."""

import json, os, subprocess, sys, time
from pathlib import Path

import pytest

import micro


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"))


def processes(folder, params, change="", script=None, number=2, timeout=240):
    """Run a training in `number` processes, `change` (Python that knows RANK, loop and state) done first in each."""
    file = folder / "rank.py"
    file.write_text(
        "import os, sys, torch\ntorch.set_num_threads(1)\n"
        "from fgclip_nb.training import __main__, loop, state\n"
        "RANK = int(os.environ['RANK'])\n"
        f"{change}\n{script or 'sys.exit(__main__.main(sys.argv[1:]))'}\n"
    )
    words = [f"{k}={json.dumps(v)}" for k, v in params.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={number}", str(file), *words]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, env=env
    )


SPOILT = """
run_step = loop.run_step
def step(s, batches):
    if RANK in {ranks} and s.step + 1 == 3:
        for b in batches:
            b.pixel_values = b.pixel_values * float("nan")
    if s.step + 1 == 5:  # the loss alone, on all processes
        torch.nn.init.constant_(s.model.logit_scale, float("inf"))
    done = run_step(s, batches)
    torch.nn.init.constant_(s.model.logit_scale, 2.6)
    return done
loop.run_step = step
"""


@pytest.mark.ci
@pytest.mark.parametrize(
    "more", [{}, dict(gradient_accumulation_steps=2), dict(gradient_caching=1)]
)
def test_a_step_that_is_not_finite_is_skipped_by_all_processes(world, tmp_path, more):
    from fgclip_nb.core.folder import Run, read_jsonl

    params = dict(world, batch_size=2, max_steps=6, output=str(tmp_path / "run"), **more)
    done = processes(tmp_path, params, SPOILT.format(ranks=(1,)))
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "run")
    assert run.finished
    bad = list(read_jsonl(run.path / "bad_steps.jsonl"))
    skipped = run.metrics().set_index("step")["skipped"]
    assert [b["step"] for b in bad] == skipped[skipped].index.tolist() and 5 in skipped[skipped]
    assert run.summary()["skipped"] == len(bad)
    forwards = more.get("gradient_accumulation_steps", 1)
    assert all(len(b["sample_ids"]) == 4 * forwards for b in bad), "the samples of all processes"
    assert "not finite: " in (run.path / "training.log").read_text()


LOST_PHOTOS = """
train_loop = loop.train_loop
def without(s, examples, val_examples):
    for k in {batches}:
        for _, i in s.order.indices(k, 1):
            os.path.exists(s.data.train[i].media) and RANK and os.remove(s.data.train[i].media)
    s.accelerator.wait_for_everyone()
    train_loop(s, examples, val_examples)
loop.train_loop = without
"""


@pytest.mark.ci
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_process_without_a_batch_keeps_nobody_waiting(tmp_path, accumulate):
    from fgclip_nb.core.folder import Run

    world = micro.micro_world(tmp_path / "world")
    params = dict(world, batch_size=1, max_steps=5, gradient_accumulation_steps=accumulate)
    params |= dict(output=str(tmp_path / "run"), max_reject_share=0.9)
    done = processes(tmp_path, params, LOST_PHOTOS.format(batches=(2, 5)), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "run")
    assert run.finished and run.metrics()["step"].tolist() == [1, 2, 3, 4, 5]
    log = (run.path / "training.log").read_text()
    assert "none of the samples of process 1 could be loaded" in log
    assert run.summary()["skipped"] == (1 if accumulate == 1 else 0)


STUCK = """
import time
state.GROUP_TIMEOUT_S = 8
run_step = loop.run_step
def step(s, batches):
    if RANK and s.step + 1 == 3:
        time.sleep(60)
    return run_step(s, batches)
loop.run_step = step
"""


@pytest.mark.ci
def test_a_hang_ends_with_process_and_step(world, tmp_path):
    params = dict(world, batch_size=2, output=str(tmp_path / "run"))
    begun = time.monotonic()
    done = processes(tmp_path, params, STUCK)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and time.monotonic() - begun < 55
    assert "ProcessLost: process 0 of 2 lost the others in step 3" in said, said[-3000:]
    assert "process 1 of 2: nothing has happened for 7 s after step 2" in said
    log = (tmp_path / "run" / "training.log").read_text()
    assert "a wait of more than 8 s" in log
