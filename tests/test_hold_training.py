"""What broke runs before: processes that lose each other, ends that are cut off, full disks."""

import functools, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch

import micro


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"))


def processes(folder, params, change="", script=None, number=2, timeout=240):
    "Train in `number` processes, each of which first does `change` (it knows RANK, loop, state)."
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


def first_in_ci(*values):
    "Values of a parameter, the first for `make test-ci`, the others long."
    marks = [pytest.mark.ci, *[pytest.mark.long] * (len(values) - 1)]
    return [pytest.param(v, marks=m) for v, m in zip(values, marks, strict=True)]


@pytest.mark.parametrize(
    "more", first_in_ci(dict(gradient_caching=1), dict(gradient_accumulation_steps=2), {})
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


@pytest.mark.parametrize("accumulate", first_in_ci(2, 1))
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
state.GROUP_TIMEOUT_S = 20
sys.modules["fgclip_nb.training.interruption"].TELL_S = 3
run_step = loop.run_step
def step(s, batches):
    if RANK and s.step + 1 == 3:
        time.sleep(600)
    return run_step(s, batches)
loop.run_step = step
"""


@pytest.mark.ci
def test_a_hang_ends_with_process_and_step(world, tmp_path):
    params = dict(world, batch_size=2, output=str(tmp_path / "run"))
    done = processes(tmp_path, params, STUCK)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "ProcessLost: process 0 of 2 lost the others in step 3" in said, said[-3000:]
    assert "process 1 of 2: nothing has happened for 18 s after step 2" in said
    log = (tmp_path / "run" / "training.log").read_text()
    assert "a wait of more than 20 s" in log
    assert "process 0 of 2: no end of the step after step 2 for 3 s; it waits for" in log


def killed_before_the_report():
    from rebind import rebind

    rebind("report_html", lambda whole: lambda *args: micro.die())


@pytest.mark.ci
@pytest.mark.parametrize("early", [{}, dict(early_stop=1, eval_every=2, learning_rate=0.0)])
def test_a_run_killed_before_its_report_gets_it_on_the_next_call(world, tmp_path, early):
    from fgclip_nb.core.folder import Run

    params = dict(world, max_steps=6, output=str(tmp_path / "run"), **early)
    assert micro.run(params, change=killed_before_the_report) == -9
    run = Run(tmp_path / "run")
    assert not run.finished and not (run.path / "report.html").exists()
    before = (run.path / "metrics.jsonl").read_bytes()
    assert micro.run(params) == 0
    assert run.finished and run.verdicts()
    assert "still running or stopped" not in (run.path / "report.html").read_text()
    assert (run.path / "metrics.jsonl").read_bytes() == before, "nothing is trained again"
    (run.path / "report.html").unlink()  # as an older version left it
    assert micro.run(params) == 0 and (run.path / "report.html").exists()


GROUP_AT_EXIT = """
import atexit, torch.distributed as dist
from fgclip_nb.core.config import TrainConfig
def look():
    print("GROUP LEFT" if not dist.is_initialized() else "GROUP THERE", flush=True)
atexit.register(look)  # runs after what is registered later
{fault}
loop.train(TrainConfig(**{params!r}))
"""


@pytest.mark.ci
@pytest.mark.parametrize("fault", ["", "loop.prepare = None"])
def test_a_script_leaves_its_process_group_also_after_an_error(world, tmp_path, fault):
    params = dict(world, batch_size=2, max_steps=2, output=str(tmp_path / "run"))
    script = GROUP_AT_EXIT.format(params=params, fault=fault)
    done = processes(tmp_path, {}, script=script)
    assert (done.returncode != 0) == bool(fault)
    assert "GROUP LEFT" in done.stdout and "GROUP THERE" not in done.stdout, done.stderr[-2000:]


def small_checkpoints():
    import torch
    from fgclip_nb.model.config import FGCLIPConfig, model_sizes
    from fgclip_nb.model.fgclip import FGCLIP

    model = FGCLIP(FGCLIPConfig(**model_sizes(32, 16, 64, 1, 64, 1, 16)))
    return model, torch.optim.AdamW(model.parameters())


def test_a_damaged_checkpoint_crowds_out_no_sound_one(tmp_path):
    from fgclip_nb.core.folder import Run, get_logger
    from fgclip_nb.training.checkpoints import newest_checkpoint, prune_checkpoints, save_checkpoint

    model, optimizer = small_checkpoints()
    for step in (3, 9):
        save_checkpoint(tmp_path, step, model, optimizer, None, {})
    os.truncate(tmp_path / "checkpoints/step_00000009/model.safetensors", 100)
    for step in (5, 7):  # training goes on from step 3
        save_checkpoint(tmp_path, step, model, optimizer, None, {})
        prune_checkpoints(tmp_path, 1, None)
        assert newest_checkpoint(tmp_path, get_logger())[0] == step
    assert [step for step, _ in Run(tmp_path).checkpoints()] == [7, 9]


@pytest.mark.parametrize("file", ["optimizer", "bank", "model"])
def test_a_full_disk_inside_safetensors_is_a_disk_error(tmp_path, monkeypatch, file):
    import safetensors.torch
    from safetensors import SafetensorError
    from fgclip_nb.core.folder import Run
    from fgclip_nb.training import checkpoints

    model, optimizer = small_checkpoints()
    checkpoints.save_checkpoint(tmp_path, 1, model, optimizer, None, {})
    save = safetensors.torch.save_file

    def full(tensors, path, *args, **kwargs):
        save(tensors, path, *args, **kwargs)
        if file in str(path):
            os.truncate(path, 10)
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    if file == "model":
        monkeypatch.setattr(model, "save_pretrained", lambda aside: full({}, aside / "model"))
    with pytest.raises(OSError, match="checkpoint of step 2 could not be written") as e:
        checkpoints.save_checkpoint(tmp_path, 2, model, optimizer, None, {})
    assert e.value.errno == 28
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert [step for step, _ in Run(tmp_path).checkpoints()] == [1]


def test_a_board_without_a_disk_is_told_once(tmp_path):
    import logging
    from fgclip_nb.core.folder import get_logger
    from fgclip_nb.diagnostics.board import Board

    lines, watch = [], logging.Handler()
    watch.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(watch)
    try:
        board = Board(tmp_path / "tensorboard")
        board.scalars(dict(step=1, loss=1.0))
        board.writer.flush()
        shutil.rmtree(tmp_path / "tensorboard")
        for step in range(2, 40):
            board.scalars(dict(step=step, loss=1.0))
            if board.writer is not None:
                with board.spared():
                    board.writer.flush()
        board.close()
    finally:
        get_logger().removeHandler(watch)
    assert board.lost and sum("no more events are written" in line for line in lines) == 1


def test_metrics_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    from types import SimpleNamespace
    from fgclip_nb.training import resuming

    order, fsync = [], os.fsync

    def noted(fd):
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(resuming, "save_checkpoint", lambda *args: order.append("checkpoint"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    cfg = SimpleNamespace(as_dict=dict, keep_checkpoints=1)
    counters = {k: 0 for k in resuming.COUNTERS} | dict(best={})
    data = SimpleNamespace(fingerprint="f")
    s = SimpleNamespace(is_main=True, cfg=cfg, data=data, path=tmp_path, step=1, **counters)
    s.model = torch.nn.Linear(1, 1)  # its weights are named by their fingerprint
    s.optimizer = s.bank = None
    s.term_states = {}
    s.scaler = None
    resuming.checkpoint(s)
    assert order.index("metrics.jsonl") < order.index("checkpoint")


# Processes whose launcher is killed


def descendants(pid):
    "Numbers of a process's children and theirs."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.append((int(stat.parent.name), int(fields[1])))
    below = {pid}
    while more := {p for p, parent in found if parent in below} - below:
        below |= more
    return below - {pid}


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid):
    "Whether a process is there and has not ended unfetched."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


@pytest.mark.ci
@pytest.mark.parametrize("when", ["at once", "while it imports", "in training"])
def test_ranks_end_with_their_launcher_and_the_notebook_notices(world, tmp_path, when):
    "The launcher between notebook and ranks is killed, as a full memory would do it."
    params = dict(world, processes=2, batch_size=2, max_steps=500, output=str(tmp_path / "run"))
    words = [f"{k}={json.dumps(v)}" for k, v in params.items()]
    command = [sys.executable, "-m", "fgclip_nb.training", *words]
    with open(tmp_path / "said.txt", "w") as said:
        notebook = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    def ranks():
        below = [p for p in descendants(notebook.pid) if "-m fgclip_nb.training" in command_of(p)]
        return [p for p in below if "torch.distributed.run" not in command_of(p)]

    try:
        found = wait_until(lambda: len(ranks()) == 2 and ranks())
        if when == "while it imports":
            time.sleep(1)
        if when == "in training":
            metrics = tmp_path / "run/metrics.jsonl"
            wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        launcher = int(Path(f"/proc/{found[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGKILL)
        assert notebook.wait(200) != 0
        assert not [p for p in found if alive(p)]
    finally:
        for p in [*descendants(notebook.pid), notebook.pid]:
            os.kill(p, signal.SIGKILL) if alive(p) else None
    assert "LaunchFailed: the run in" in (tmp_path / "said.txt").read_text()


# Loader processes that die, and errors inside of them


def killing_a_loader():
    import torch.multiprocessing as mp
    from rebind import rebind

    def wrapped(run_step):
        def step(s, batches):
            if s.step == 3:
                for child in mp.active_children():
                    os.kill(child.pid, signal.SIGKILL)
                time.sleep(1)  # here torch's signal handler would raise
                sum(range(100_000))
            return run_step(s, batches)

        return step

    rebind("run_step", wrapped)


def stopping_a_loader(steps):
    "Stop one loader process in each of `steps`; a batch is late after half a second."
    import torch.multiprocessing as mp
    from fgclip_nb.training import reading
    from rebind import rebind

    reading.TELL_S = 0.5

    def wrapped(run_step):
        def step(s, batches):
            if s.step in steps:
                os.kill(mp.active_children()[0].pid, signal.SIGSTOP)
            return run_step(s, batches)

        return step

    rebind("run_step", wrapped)


def failing_in_a_loader():
    from fgclip_nb.batches.loading import Examples

    whole = Examples.__getitem__

    def broken(self, where):
        if self.drawing.train:
            raise RuntimeError("a mistake in somebody's code")
        return whole(self, where)

    Examples.__getitem__ = broken


@pytest.mark.ci
def test_a_loader_that_dies_during_a_step_costs_nothing(world, tmp_path):
    params = dict(world, num_workers=1, max_steps=6, eval_every=0)
    assert micro.run(dict(params, output=str(tmp_path / "killed")), change=killing_a_loader) == 0
    assert "a loader process died" in (tmp_path / "killed/training.log").read_text()
    assert micro.run(dict(params, output=str(tmp_path / "whole"))) == 0
    assert micro.outcome(tmp_path / "killed") == micro.outcome(tmp_path / "whole")


STOPPED_IN = dict(once=((1,), "ci"), twice=((1, 4), "long"), at_the_end=((9,), "ci"))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(steps, id=name, marks=getattr(pytest.mark, mark))
        for name, (steps, mark) in STOPPED_IN.items()
    ],
)
def test_a_stopped_loader_is_told_and_replaced(world, tmp_path, steps):
    params = dict(world, num_workers=2, max_steps=10, eval_every=0)
    stops = functools.partial(stopping_a_loader, steps)
    assert micro.run(dict(params, output=str(tmp_path / "stops")), change=stops, timeout=120) == 0
    log = (tmp_path / "stops/training.log").read_text()
    assert log.count("Reading again at batch") == (0 if steps == (9,) else len(steps))
    assert ("(stopped)" in log) == (steps != (9,))
    assert micro.run(dict(params, output=str(tmp_path / "whole"))) == 0
    assert micro.outcome(tmp_path / "stops") == micro.outcome(tmp_path / "whole")


def reading_slowly():
    from fgclip_nb.batches.loading import Examples
    from fgclip_nb.training import reading

    reading.TELL_S, whole = 0.5, Examples.__getitem__
    Examples.__getitem__ = lambda self, where: time.sleep(0.3) or whole(self, where)


@pytest.mark.long
def test_a_late_batch_is_told_without_loader_processes_too(world, tmp_path):
    params = dict(world, max_steps=1, eval_every=0, output=str(tmp_path / "run"))
    assert micro.run(params, change=reading_slowly) == 0
    log = (tmp_path / "run/training.log").read_text()
    assert "no batch for 1 s; waiting for a photo or clip of this process" in log


@pytest.mark.ci
def test_an_error_inside_a_loader_is_no_death(world, tmp_path):
    params = dict(world, num_workers=1, max_steps=6, output=str(tmp_path / "run"))
    assert micro.run(params, change=failing_in_a_loader) == 1
    assert "a loader process died" not in (tmp_path / "run/training.log").read_text()
    said = next(tmp_path.glob("run.*.txt")).read_text()
    assert "RuntimeError: Caught RuntimeError in DataLoader worker" in said


# The command line


@pytest.mark.parametrize(
    "word",
    [
        "batch_size=[1",
        "seed=" + "[" * 100_000,
        "seed=" + "9" * 5000,
        f"learning_rate={10**400}",
        "seed=2001-99-99",
        "seed=*a",
        "output=\0",
        "output=\udcff",
        "x" * 5000,
        "seed",
        "=3",
        "seed: 3",
        "params.yaml",
    ],
    ids=lambda word: ascii(word)[:30],
)
def test_a_broken_word_on_the_command_line_is_status_2(tmp_path, monkeypatch, capsys, word):
    from fgclip_nb.training import __main__

    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"a: [\xff\n")
    monkeypatch.setattr(__main__, "train", lambda cfg: None)
    assert __main__.main([word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(("ConfigError: ", "DataError: ")) and len(said) < 1000


def test_help_is_help(capsys):
    from fgclip_nb.training.__main__ import main

    assert main(["--help"]) == 0 and main(["seed=1", "-h"]) == 0
    said = capsys.readouterr().out
    assert "name=value" in said and "learning_rate (float" in said


def test_a_name_that_is_code_ends_the_notebook(tmp_path):
    "papermill pastes names as they are; what it ran is told, and values stay values."
    from fgclip_nb.core.identity import ConfigError
    from fgclip_nb.core.notebook import notebook_params, refuse_unknown
    from papermill.translators import PythonTranslator

    own = "# Parameters of this run:\nseed: int = 0"
    for names in ({'print("ran"); seed': 3}, {"import os; seed": 3}):
        cell = PythonTranslator.codify(names)
        for read in (notebook_params, refuse_unknown):
            with pytest.raises(ConfigError, match="papermill ran"):
                read(dict(In=[own, cell], seed=3))
    text = 'x"; import os; os.system("true") #\n\''
    space = {}
    exec(PythonTranslator.codify(dict(data=text)), space)
    assert space["data"] == text
