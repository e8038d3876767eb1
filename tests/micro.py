"""A data set and a model that train in seconds, and trainings in real processes that kill
themselves at a chosen event.

Children come from a fork server that has imported the library once, and what it imports late, so
that twenty of them cost seconds, not minutes."""

import json, multiprocessing, os, signal
from pathlib import Path

import planted
from rebind import rebind

LATE = "torch._dynamo accelerate matplotlib.pyplot pandas scipy.stats jinja2".split()
MODULES = ["fgclip_nb.training.__main__", "fgclip_nb.evaluation.results", "planted", *LATE]


def micro_world(folder, photos=20, held_out=4):
    """Photos with regions, and the folder of a two-layer model with random weights.

    Returns parameters of a short run on them."""
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP
    import torch

    folder = Path(folder)
    data = planted.make_world(folder / "data", photos=photos, held_out=held_out)
    torch.manual_seed(0)
    FGCLIP(FGCLIPConfig(**planted.MICRO)).save_pretrained(folder / "model", processor=False)
    return dict(
        data=str(data),
        model=str(folder / "model"),
        batch_size=4,
        max_steps=10,
        learning_rate=1e-3,
        lr_warmup_steps=2,
        memory_bank_size=24,
        memory_bank_warmup_steps=3,
        save_every=3,
        eval_every=5,
        diag_every=4,
        log_every=5,
        tracker="none",
        device="cpu",
        keep_checkpoints=2,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def _after_step(n, number):
    def killed(whole):
        def step(s, batches):
            done = whole(s, batches)
            if s.step == n:
                os.kill(os.getpid(), number)
            return done

        return step

    rebind("run_step", killed)


def _in_save(n, stage):
    """Die inside the checkpoint of step n: half of the optimiser written, everything but the seal,
    or sealed and not yet renamed."""
    now = {}
    rename = os.rename

    def noted(saving):
        def save(path, step, *args):
            now["step"] = step
            return saving(path, step, *args)

        return save

    def torn(save_file):
        def save(tensors, file, *args):
            save_file(tensors, file, *args)
            if now["step"] == n and stage == "torn" and "optimizer" in str(file):
                os.truncate(file, os.path.getsize(file) // 2)
                die()

        return save

    rebind("save_checkpoint", noted)
    rebind("save_file", torn)
    if stage == "unsealed":
        rebind(
            "_seal",
            lambda seal: lambda folder, state: die() if state["step"] == n else seal(folder, state),
        )
    if stage == "unrenamed":
        os.rename = lambda a, b: die() if now.get("step") == n else rename(a, b)


def _in_line(n):
    """Die with half of the metrics line of step n written."""
    from fgclip_nb.diagnostics import numbers

    write = numbers.JsonLines.write

    def half(self, row):
        if row.get("step") != n or self.path.name != "metrics.jsonl":
            return write(self, row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row)[:40])
        die()

    numbers.JsonLines.write = half


def _child(params, event, change):
    import sys, torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # loader processes inherit what a test has patched
    with open(
        f"{params['output']}.{os.getpid()}.txt", "w"
    ) as sink:  # kept beside the run folder, for whoever reads a failure
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    kind, *rest = (event or "none").split(":")
    if kind == "step":
        _after_step(int(rest[0]), signal.SIGKILL)
    if kind in ("SIGTERM", "SIGINT"):
        _after_step(int(rest[0]), getattr(signal, kind))
    if kind == "save":
        _in_save(int(rest[0]), rest[1])
    if kind == "line":
        _in_line(int(rest[0]))
    if change:
        change()
    from fgclip_nb.training.__main__ import main

    sys.exit(main([f"{k}={json.dumps(v)}" for k, v in params.items()]))


def run(params, event=None, change=None, timeout=240):
    """Train in a process of its own; returns its exit status (-9 when killed).

    `change`: a picklable function called in the child first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    child = context.Process(target=_child, args=(params, event, change))
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        raise TimeoutError(
            f"a training of {params['max_steps']} steps did not end within {timeout} s"
        )
    return child.exitcode


def outcome(folder):
    """What has to be equal bitwise: every metrics line, and the last checkpoint's checksums."""
    from fgclip_nb.core.folder import Run

    r = Run(folder)
    step, last = r.checkpoints()[-1]
    files = json.loads((last / "state.json").read_text())["files"]
    return dict(
        step=step,
        metrics=(r.path / "metrics.jsonl").read_bytes(),
        **{k: v for k, v in files.items() if k.endswith("safetensors")},
    )
