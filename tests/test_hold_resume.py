"""Run folders that were damaged between two attempts: the checkpoint before is used, a hole in the
metrics is repaired, and nothing ends in a traceback.

No cell: trainings in processes of their own, killed and gone on with."""

import functools
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import micro
from fgclip_nb.core.folder import Run
from fgclip_nb.diagnostics.judgement import verdicts
from fgclip_nb.diagnostics.rules import Evidence

# of the kinds of damage some are in `make test-ci`, the others are long
FEW = ("a dangling link", "a bank of NaN", "a hole before both")


def marked(names):
    return [pytest.param(n, marks=pytest.mark.ci if n in FEW else pytest.mark.long) for n in names]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "(parameters, folder of a run killed in step 9, lines to 8, checkpoints 3, 6; whole outcome)."
    folder = tmp_path_factory.mktemp("runs")
    params = dict(micro.micro_world(folder / "world"), eval_every=0)
    assert micro.run(dict(params, output=str(folder / "whole"))) == 0
    assert micro.run(dict(params, output=str(folder / "killed")), "step:9") == -9
    return params, folder / "killed", micro.outcome(folder / "whole")


def rewrite_state(folder, step, **changes):
    "state.json with other entries; its own checksum is nobody's."
    file = folder / f"checkpoints/step_{step:08d}/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reseal(folder, step, name, change):
    "Change the tensors of a file and write its new checksum, as an attacker would."
    from fgclip_nb.core.identity import sha256_file

    file = folder / f"checkpoints/step_{step:08d}/{name}.safetensors"
    save_file(change({k: v.clone() for k, v in load_file(file).items()}), file, {"format": "pt"})
    files = json.loads((file.parent / "state.json").read_text())["files"]
    rewrite_state(folder, step, files=files | {file.name: sha256_file(file)})


def change_first(change):
    def changed(tensors):
        name = max(tensors, key=lambda n: tensors[n].ndim)
        return tensors | {name: change(tensors[name])}

    return changed


def raw(name, text):
    def write(folder):
        (folder / "checkpoints/step_00000006" / name).write_text(text)

    return write


def state(**changes):
    return lambda folder: rewrite_state(folder, 6, **changes)


def tensors(name, change):
    return lambda folder: reseal(folder, 6, name, change)


def no_sums(folder):
    "The optimiser is half of it, and nobody can tell because there are no checksums."
    rewrite_state(folder, 6, files={})
    file = folder / "checkpoints/step_00000006/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def dangling(folder):
    file = folder / "checkpoints/step_00000006/state.json"
    file.unlink()
    file.symlink_to(folder / "nowhere")


def fill_first(value):
    return change_first(lambda t: torch.full_like(t, value))


def other_steps(value):
    return lambda t: {k: torch.tensor(value) if k.endswith(":step") else v for k, v in t.items()}


DAMAGES = {
    "a dangling link": dangling,
    "no moments": tensors("optimizer", lambda t: {}),
    "moments of half a parameter": tensors("optimizer", lambda t: dict(list(t.items())[1:])),
    "moments of NaN": tensors("optimizer", fill_first(float("nan"))),
    "moments of half precision": tensors("optimizer", change_first(lambda t: t.half())),
    "a later step": tensors("optimizer", other_steps(1e30)),
    "a negative step": tensors("optimizer", other_steps(-3.0)),
    "weights of half precision": tensors("model", change_first(lambda t: t.half())),
    "one weight more": tensors("model", lambda t: t | {"more": torch.ones(1)}),
    "a bank of NaN": tensors("bank", change_first(lambda t: t.float() * float("nan"))),
    "no checksums": no_sums,
    "a list": raw("state.json", "[1]"),
    "null": raw("state.json", "null"),
    "empty": raw("state.json", ""),
    "nested": raw("state.json", "[" * 100_000),
    "bytes": lambda folder: (folder / "checkpoints/step_00000006/state.json").write_bytes(
        b"\xff\xfe"
    ),
    "files a list": state(files=[1]),
    "files of numbers": state(files={"model.safetensors": 3}),
    "files outside": state(files={"../../params.yaml": "x"}),
    "counters are text": state(loads="7"),
    "counters are null": state(forwards=None),
    "best is a list": state(best=[1]),
    "data is null": state(data=None),
    "weights of another shape": tensors("model", change_first(lambda t: t[:-1].contiguous())),
    "weights of another kind": tensors("model", change_first(lambda t: t.to(torch.int8))),
    "a weight is missing": tensors("model", lambda t: dict(list(t.items())[1:])),
    "moments of another shape": tensors("optimizer", change_first(lambda t: t[:-1].contiguous())),
    "moments of another kind": tensors("optimizer", change_first(lambda t: t.bool())),
    "moments of nobody": tensors("optimizer", lambda t: t | {"no such:exp_avg": torch.ones(1)}),
    "a bank of another shape": tensors("bank", change_first(lambda t: t[:-1].contiguous())),
    "an empty bank": tensors("bank", lambda t: {}),
}


@pytest.mark.parametrize("damage", marked(DAMAGES))
def test_the_checkpoint_before_a_damaged_one_is_used(killed, tmp_path, damage):
    params, folder, whole = killed
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    DAMAGES[damage](run)
    assert micro.run(dict(params, output=str(run))) == 0
    log = (run / "training.log").read_text()
    assert "checkpoint step_00000006 is not used: " in log and "resumed from step_00000003" in log
    assert micro.outcome(run) == whole


def lines(*kept, text=None, at=None):
    "metrics.jsonl with these steps (numbers from 1), or with `text` in place of step `at`."

    def change(folder):
        file = folder / "metrics.jsonl"
        rows = file.read_text().splitlines(keepends=True)
        if text is not None:
            rows[at - 1] = text
        file.write_text("".join(rows[k - 1] for k in kept) if kept else "".join(rows))

    return change


HOLES = {
    "a hole after the older checkpoint": (lines(1, 2, 3, 4, 6, 7, 8), "step_00000003"),
    "a hole before both": (lines(1, 3, 4, 5, 6, 7, 8), ""),
    "a list": (lines(text="[1]\n", at=5), "step_00000003"),
    "no step": (lines(text="{}\n", at=5), "step_00000003"),
    "a step that is text": (lines(text='{"step": "5"}\n', at=5), "step_00000003"),
    "no JSON": (lines(text="\x00\x00\x00\n", at=5), "step_00000003"),
    "no JSON behind": (lines(text="\x00\x00\x00\n", at=8), "step_00000006"),
    "a step twice": (lines(1, 2, 3, 4, 4, 5, 6, 7, 8), "step_00000003"),
    "no metrics at all": (lambda folder: (folder / "metrics.jsonl").unlink(), ""),
}


@pytest.mark.parametrize("hole", marked(HOLES))
def test_a_hole_in_the_metrics_is_told_and_repaired(killed, tmp_path, hole):
    params, folder, whole = killed
    change, start = HOLES[hole]
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    change(run)
    (run / "timing.jsonl").write_text("[]\n" + (run / "timing.jsonl").read_text())
    assert micro.run(dict(params, output=str(run))) == 0
    log = (run / "training.log").read_text()
    assert (f"resumed from {start}" in log) if start else ("resumed from" not in log)
    assert start == "step_00000006" or "metrics.jsonl has every step only up to" in log
    assert micro.outcome(run) == whole


@pytest.mark.ci
def test_without_a_checkpoint_that_fits_the_run_says_so(killed, tmp_path):
    params, folder, _ = killed
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    for step in (3, 6):
        reseal(run, step, "model", change_first(lambda t: t[:-1].contiguous()))
    assert micro.run(dict(params, output=str(run))) == 2
    assert "No checkpoint fits this run" in next(tmp_path.glob("run.*.txt")).read_text()


# Parameters that change on the way (`allow_changed`)


@pytest.mark.ci
def test_a_change_that_does_not_fit_leaves_the_run_as_it_was(killed, tmp_path):
    params = dict(killed[0], output=str(tmp_path / "run"), max_steps=6)
    assert micro.run(params) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.*") if p.is_file()}
    other = dict(params, memory_bank_size=64, max_steps=8, lr_schedule="constant")
    words = "memory_bank_size,max_steps,lr_schedule"
    assert micro.run(dict(other, allow_changed=words)) == 2
    for name in ("params.yaml", "finished.json", "metrics.jsonl", "manifest.json"):
        assert (tmp_path / "run" / name).read_bytes() == before[name], name
    assert micro.run(params) == 0


CHANGES = dict(
    learning_rate=1e-5, memory_bank_warmup_steps=40, batch_size=8, region_weight=0.0, seed=9
)


CHEAP = ("learning_rate",)  # the others are long


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.ci if n in CHEAP else pytest.mark.long) for n in CHANGES],
)
def test_a_changed_parameter_accuses_nobody(killed, tmp_path, name):
    "Rules hold all steps against one value: where it changed, they cannot judge."
    params = dict(
        killed[0], output=str(tmp_path / "run"), max_steps=60, diag_every=2, eval_every=20
    )
    assert micro.run(params, "SIGTERM:30") == 143
    assert micro.run(dict(params, **{name: CHANGES[name]}, allow_changed=name)) == 0
    run = Run(tmp_path / "run")
    (values,) = run.manifest()["resumed"][0]["changed"].values()
    assert values[1] == CHANGES[name] and values[0] == params.get(name, values[0])
    assert f"parameter `{name}`: " in (run.path / "training.log").read_text()
    failed = [v.name for v in verdicts(run) if v.result == "fail"]
    assert not set(failed) & {"learning_rate_zero", "bank_comes_on", "term_unweighted"}, failed


def test_a_rule_that_asks_for_a_changed_parameter_cannot_judge():
    run = dict(params=dict(processes=1), facts=dict(resumed=[CHANGED]), frame=LOOKS)
    apart = [v for v in verdicts(Evidence(**run)) if v.name == "loss_miscomputed"]
    assert [v.result for v in apart] == ["cannot be judged"]
    assert "`processes` was 2 up to step 3, then 1" in apart[0].why
    run["facts"] = {}
    assert "fail" in [v.result for v in verdicts(Evidence(**run)) if v.name == "loss_miscomputed"]


LOOKS = pd.DataFrame(
    dict(step=range(1, 9), loss_global_short=[2.0] * 8, check_global_short=[1.3] * 4 + [2.0] * 4)
)
CHANGED = dict(step=3, changed=dict(processes=[2, 1]))


# Checkpoints and folders that somebody removes while a run goes on


def removing(what):
    "After every step: remove older checkpoints, the newest, or the whole folder after step 5."
    import pathlib

    from rebind import rebind

    def wrapped(run_step):
        def step(s, batches):
            folders = sorted((pathlib.Path(s.path) / "checkpoints").glob("step_*"))
            if what == "run" and s.step == 5:
                shutil.rmtree(s.path)
            for folder in folders[:-1] if what == "older" else folders:
                shutil.rmtree(folder, ignore_errors=True)
            return run_step(s, batches)

        return step

    rebind("run_step", wrapped)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("older", marks=pytest.mark.ci),
        pytest.param("all", marks=pytest.mark.long),
        pytest.param("run", marks=pytest.mark.ci),
    ],
)
def test_what_is_removed_while_training_ends_no_run_without_a_word(killed, tmp_path, what):
    params = dict(killed[0], output=str(tmp_path / "run"), save_every=1)
    status = micro.run(params, change=functools.partial(removing, what))
    said = next(tmp_path.glob("run.*.txt")).read_text()
    assert status == (4 if what == "run" else 0), said
    if what == "run":
        assert "was moved or deleted while the run trained" in said


def test_a_checkpoint_that_goes_while_it_is_read_is_not_sound(tmp_path, monkeypatch):
    from fgclip_nb.core import folder

    step = tmp_path / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    (step / "a.bin").write_text("a")
    (step / "state.json").write_text(json.dumps(dict(files={"a.bin": "0"})))

    def gone(path):
        raise FileNotFoundError(2, "No such file", str(path))

    monkeypatch.setattr(folder, "sha256_file", gone)
    assert folder.checkpoint_fault(step).startswith("it vanished or cannot be read")
