"""Whole runs and injected faults, which no cell can hold: identity of run folders, torn
checkpoints, full disks, NaN batches, vanished files, dead workers, second writers, exhausted
memory, trackers, several processes."""

import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

import micro
from rebind import rebind


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return micro.micro_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    params = dict(world, output=str(tmp_path_factory.mktemp("runs") / "run"))
    assert micro.run(params) == 0
    return params


def log_of(params):
    return (Path(params["output"]) / "training.log").read_text()


def test_a_run_folder_is_complete(finished):
    from fgclip_nb.core.folder import Run

    run = Run(finished["output"])
    assert run.finished and len(run.metrics()) == 10 and len(run.timing()) == 10
    for name in (
        "params.yaml",
        "manifest.json",
        "training.log",
        "rejects.jsonl",
        "verdicts.json",
        "report.html",
        "expectations.json",
        "retrieval.json",
    ):
        assert (run.path / name).exists(), name
    assert [s for s, _ in run.checkpoints()][-1] == 10
    manifest = run.manifest()
    assert (
        manifest["data"]["train"] == 20
        and manifest["data"]["val"] == 4
        and len(manifest["weights"]) == 12
    )
    log = log_of(finished)
    for line in (
        "Loaded logit_scale = 2.6592 (exp=14.3)",
        "[Memory Bank] enabled @ training_step 3 (optimizer step 3)",
        "[LOSS] Step 5 Epoch",
        "[VERDICT]",
    ):
        assert log.count(line) >= 1, line
    assert log.count("[Memory Bank] enabled") == 1


def test_the_same_command_again_has_nothing_to_do(finished):
    before = {
        p: p.stat().st_mtime_ns
        for p in Path(finished["output"]).rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    assert micro.run(finished) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_other_parameters_are_refused_by_name(finished):
    assert micro.run(dict(finished, seed=1)) == 2


def test_twice_the_same_numbers(world, finished, tmp_path):
    again = dict(world, output=str(tmp_path / "again"))
    assert micro.run(again) == 0
    assert micro.outcome(again["output"]) == micro.outcome(finished["output"])


@pytest.mark.ci
def test_two_scales_differ_where_they_should(world, tmp_path):
    runs = {}
    for scale in (2.6592, 4.6052):
        params = dict(
            world,
            output=str(tmp_path / str(scale)),
            logit_scale_init=scale,
            override_logit_scale=True,
            max_steps=2,
        )
        assert micro.run(params) == 0
        runs[scale] = params
    log = log_of(runs[4.6052])
    assert (
        "Loaded logit_scale = 4.6052 (exp=100.0)" in log
        and "logit_scale (finegrained): 4.605170 (exp=100.0000)" in log
    )
    a, b = [json.loads((Path(p["output"]) / "manifest.json").read_text()) for p in runs.values()]
    assert all(a[k] == b[k] for k in ("data", "versions")) and all(
        a[k] != b[k] for k in ("weights", "params_hash")
    )


def test_without_output_the_folder_is_named_by_its_parameters(world, tmp_path, monkeypatch):
    from fgclip_nb.core.config import TrainConfig, params_hash, run_folder

    monkeypatch.chdir(tmp_path)
    cfg = TrainConfig(**world)
    first = tmp_path / "runs" / f"train-{params_hash(cfg)}"
    assert run_folder(cfg) == first
    first.mkdir(parents=True)
    assert run_folder(cfg) == first, "unfinished: the same command resumes it"
    (first / "finished.json").write_text("{}")
    assert run_folder(cfg) == first.with_name(first.name + "-2")


MORE_DAMAGE = [pytest.param(d, marks=pytest.mark.ci) for d in ("truncate", "remove", "no state")]


@pytest.mark.parametrize("damage", ["flip", *MORE_DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, tmp_path, damage):
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, "step:8") == -9
    newest = Path(params["output"]) / "checkpoints/step_00000006"
    weights = newest / "model.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        os.truncate(weights, 1000)
    elif damage == "remove":
        weights.unlink()
    else:
        (newest / "state.json").write_text("{")
    assert micro.run(params) == 0
    log = log_of(params)
    assert "checkpoint step_00000006 is not used" in log and "resumed from step_00000005" in log


def test_a_resumed_run_keeps_the_facts_of_its_start(world, finished, tmp_path):
    from fgclip_nb.core.folder import Run

    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, "step:8") == -9
    start = Run(params["output"]).manifest()
    assert micro.run(params) == 0
    manifest = Run(params["output"]).manifest()
    [again] = manifest.pop("resumed")
    start.pop("trained"), manifest.pop("trained")  # what the checkpoints on disk hold
    assert (
        manifest == start and start["weights"] == Run(finished["output"]).manifest()["weights"]
    ), "not the weights it went on with"
    assert again["step"] == 6 and again["versions"] == start["versions"]
    assert again.pop("changed") == {}
    assert set(again) == {"step", "versions", "code", "device", "hardware", "processes", "threads"}
    assert "resumed" not in Run(finished["output"]).manifest()


class Remembering:
    """A tracker of somebody else's, known to accelerate by name, that keeps its calls in a file."""

    def __init__(self, file):
        self.file = str(file)

    def __call__(self):
        from accelerate.tracking import GeneralTracker, register_tracker_class

        file = self.file

        class Memory(GeneralTracker):
            name, requires_logging_directory = "memory", False

            def __init__(self, project):
                super().__init__()
                self.project = project

            def _note(self, **what):
                with open(file, "a") as f:
                    f.write(json.dumps(what) + "\n")

            @property
            def tracker(self):
                return self

            def store_init_configuration(self, values):
                self._note(project=self.project, seed=values["seed"])

            def log(self, values, step=None, **kw):
                self._note(step=step, values=values)

            def finish(self):
                self._note(finished=True)

        register_tracker_class(Memory)


@pytest.mark.ci
def test_trackers_by_name(world, tmp_path):
    params = dict(world, output=str(tmp_path / "run"), tracker="memory,tensorboard")
    assert micro.run(params, change=Remembering(tmp_path / "told.jsonl")) == 0
    first, *rows, last = [
        json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()
    ]
    assert first == dict(project="fgclip_nb", seed=0) and last == dict(finished=True)
    metrics = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == [m["step"] for m in metrics] == list(range(1, 11)), (
        "every step once"
    )
    tags = {
        "train/loss": "loss",
        "train/loss_region": "loss_region",
        "watch_memory_bank/len": "bank_len",
        "watch_diagnostics/lr": "lr",
    }
    for tag, column in tags.items():
        assert [r["values"][tag] for r in rows] == pytest.approx([m[column] for m in metrics])


@pytest.mark.ci
def test_tensorboard_holds_every_step_once_also_after_a_kill(world, tmp_path):
    from fgclip_nb.diagnostics.table_logs import event_rows

    params = dict(world, output=str(tmp_path / "run"), tracker="tensorboard")
    assert micro.run(params, "step:8") == -9
    assert micro.run(params) == 0
    metrics = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    rows = event_rows(tmp_path / "run/tensorboard")
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert [r["loss"] for r in rows] == pytest.approx([m["loss"] for m in metrics], rel=1e-6)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(tmp_path / "run/tensorboard"), size_guidance=dict(scalars=0)
    ).Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/loss_global",
        "train/loss_region",
        "watch_memory_bank/ptr",
        "watch_diagnostics/grad_norm",
    } <= set(tags["scalars"])
    assert "watch_diagnostics/cosine_region" in tags["histograms"]
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11)), (
        "no scalar is written twice"
    )


def test_an_unknown_tracker_ends_the_run_before_it_begins(world, tmp_path):
    for name, advice in (
        ("wanbd", "did you mean `wandb`?"),
        ("aim", "not installed (pip install aim)"),
    ):
        assert micro.run(dict(world, output=str(tmp_path / name), tracker=name)) == 2
        assert not (tmp_path / name).exists()
        [line] = [
            x
            for p in tmp_path.glob(f"{name}.*.txt")
            for x in p.read_text().splitlines()
            if x.startswith("ConfigError")
        ]
        assert advice in line and "installed are tensorboard" in line


def test_changed_data_is_refused_unless_allowed(world, tmp_path):
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, "step:5") == -9
    rows = Path(world["data"]).read_text().splitlines()
    other = Path(world["data"]).with_name("other.jsonl")
    other.write_text("\n".join(rows[1:]) + "\n")
    changed = dict(params, data=str(other))
    assert micro.run(changed) == 2, "another data file is another parameter"
    assert micro.run(dict(changed, allow_changed="data")) == 0


def no_space():
    def no_room(save):
        def full(tensors, file, *args):
            if "optimizer" in str(file) and ".aside_00000006" in str(file):
                raise OSError(28, "No space left on device", str(file))
            return save(tensors, file, *args)

        return full

    rebind("save_file", no_room)


def test_a_full_disk_leaves_the_last_good_checkpoint(world, tmp_path):
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, change=no_space) == 4
    root = Path(params["output"]) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "step_00000003", "step_00000005"]
    assert micro.run(params) == 0


def nan_at_four():
    def broken(run_step):
        def step(s, batches):
            if s.step + 1 == 4:
                s.model.visual_projection.register_forward_hook(
                    lambda m, a, out: out * float("nan"), always_call=True
                )
            done = run_step(s, batches)
            s.model.visual_projection._forward_hooks.clear()
            return done

        return step

    rebind("run_step", broken)


def nan_from_four():
    def broken(run_step):
        def step(s, batches):
            if s.step + 1 == 4:
                s.model.visual_projection.register_forward_hook(
                    lambda m, a, out: out * float("nan")
                )
            return run_step(s, batches)

        return step

    rebind("run_step", broken)


def test_a_nan_batch_never_reaches_the_optimiser(world, tmp_path):
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, change=nan_at_four) == 0
    bad = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert (
        [b["step"] for b in bad] == [4]
        and len(bad[0]["sample_ids"]) == 4
        and bad[0]["first_non_finite"].startswith("features")
    )
    from fgclip_nb.core.folder import Run
    from safetensors.torch import load_file

    metrics = Run(tmp_path / "run").metrics()
    assert metrics["skipped"].astype(bool).tolist() == [n == 4 for n in range(1, 11)]
    assert all(
        t.isfinite().all()
        for t in load_file(
            Run(tmp_path / "run").checkpoints()[-1][1] / "model.safetensors"
        ).values()
    )


def test_too_many_bad_steps_stop_the_run(world, tmp_path):
    assert (
        micro.run(dict(world, output=str(tmp_path / "run"), max_bad_steps=3), change=nan_from_four)
        == 3
    )
    assert len((tmp_path / "run/bad_steps.jsonl").read_text().splitlines()) == 3


class NoMemory:
    """An allocator that fails in step 4, in the words of the CPU's, of CUDA's, or of Python's."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self):
        import torch

        error = dict(
            cpu=RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 99 bytes."
            ),
            cuda=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99.00 GiB."),
            python=MemoryError(),
        )[self.kind]

        def without_memory(work):
            def fails(s, batch):
                if s.step == 4:
                    raise error
                return work(s, batch)

            return fails

        rebind("forward_backward", without_memory)


OTHER_KINDS = [pytest.param(kind, marks=pytest.mark.ci) for kind in ("cuda", "python")]


@pytest.mark.parametrize("kind", ["cpu", *OTHER_KINDS])
def test_out_of_memory_names_the_batch_and_what_to_lower(world, tmp_path, kind):
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(params, change=NoMemory(kind)) == 5
    [message] = [
        line
        for p in tmp_path.glob("run.*.txt")
        for line in p.read_text().splitlines()
        if line.startswith("OutOfMemory")
    ]
    for words in (
        "in step 4",
        "4 samples as",
        "pictures of 64 x 64",
        "short texts",
        "regions in",
        "Lower first: `gradient_caching` from",
    ):
        assert words in message, words
    assert message.count(".png") == 4 and message.index("gradient_caching") < message.index(
        "max_regions"
    ) < message.index("`batch_size`")
    assert micro.run(params) == 0, "the checkpoint of step 3 is intact"


def test_another_runtime_error_is_left_as_it_is():
    from fgclip_nb.training.memory import explain_memory

    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        explain_memory(None, "step 1"),
    ):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def vanish():
    """After the data were checked, one photo disappears."""

    def prepared(prepare):
        def gone(cfg):
            data = prepare(cfg)
            os.rename(data.train[0].media, data.train[0].media + ".gone")
            return data

        return gone

    rebind("prepare_data", prepared)


def test_a_vanished_file_is_rejected_and_counted(tmp_path):
    world = micro.micro_world(tmp_path)
    params = dict(world, output=str(tmp_path / "run"))
    assert micro.run(dict(params, max_reject_share=0.2), change=vanish) == 0
    rejects = [
        json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()
    ]
    assert (
        rejects
        and rejects[-1]["rule"] == "unreadable_media"
        and "tried 3 times" in rejects[-1]["reason"]
    )
    os.rename(*[str(tmp_path / f"data/{n}") for n in ("000.png.gone", "000.png")])
    assert (
        micro.run(
            dict(params, output=str(tmp_path / "strict"), max_reject_share=0.0, max_steps=30),
            change=vanish,
        )
        == 2
    )


def worker_dies():
    from fgclip_nb.batches import loading

    read, flag = loading.Examples._read, Path(os.environ["FGCLIP_TEST_FLAG"])

    def dying(self, sample, epoch, index):
        import torch

        if (
            torch.utils.data.get_worker_info() is not None
            and epoch == 0
            and index == 3
            and not flag.exists()
        ):
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, sample, epoch, index)

    loading.Examples._read = dying


class WorkerDies:
    def __init__(self, flag):
        self.flag = str(flag)

    def __call__(self):
        os.environ["FGCLIP_TEST_FLAG"] = self.flag
        worker_dies()


@pytest.mark.ci
def test_a_dead_worker_is_reported_and_replaced(world, finished, tmp_path):
    params = dict(world, output=str(tmp_path / "run"), num_workers=2)
    assert micro.run(params, change=WorkerDies(tmp_path / "died")) == 0
    assert (tmp_path / "died").exists()
    log = log_of(params)
    assert "a loader process died" in log and "003.png" in log
    assert (
        micro.outcome(params["output"])["metrics"] == micro.outcome(finished["output"])["metrics"]
    )


def test_a_second_writer_is_kept_out(world, tmp_path):
    from fgclip_nb.core.lock import FolderLock

    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    assert micro.run(dict(world, output=str(tmp_path / "run"))) == 2
    lock.close()
    assert micro.run(dict(world, output=str(tmp_path / "run"), max_steps=2)) == 0


def test_a_dry_run_says_what_it_takes_and_starts_nothing(world, tmp_path, monkeypatch, capsys):
    from fgclip_nb.training.__main__ import main

    monkeypatch.chdir(tmp_path)
    words = [f"{k}={json.dumps(v)}" for k, v in world.items()]
    assert main(["--dry-run", *words, "max_steps=1000"]) == 0
    lines = dict(
        line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line
    )
    assert lines["total steps"].startswith("1,000 (computed")
    assert lines["step"].endswith("(measured: 1 x 4 photos, forward, backward, update)")
    for name in (
        "parameters",
        "weights, gradients, moments",
        "activations",
        "memory per process",
        "fits",
        "reading a sample",
        "whole run",
    ):
        assert name in lines
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert main(["--dry-run", *words, "batch_sice=3"]) == 2


@pytest.mark.parametrize(
    "changes", [dict(), dict(gradient_caching=2), dict(gradient_checkpointing=True)]
)
def test_probes_measure_what_a_step_really_takes(world, changes):
    """Peak of the whole batch, probed at once, against the line through two and four photos."""
    from fgclip_nb import training
    from fgclip_nb.training import forecast, state
    from fgclip_nb.core.folder import get_logger
    from fgclip_nb.core.config import TrainConfig

    cfg = TrainConfig(**world | dict(batch_size=16) | changes)
    s = state.new_state(
        cfg, training.prepare_data(cfg), state.make_accelerator(cfg), Path("nowhere"), get_logger()
    )
    forecast.probe_step(s, forecast.probe_batch(s, 1))
    probes = [forecast.probe(s, n) for n in (2, 4, 16)]
    chunk = cfg.gradient_caching or 16
    line = forecast.straight([(p.size, p.bytes) for p in probes[:2] if p.size <= chunk], chunk)
    assert 0.7 < line / probes[-1].bytes < 1.4, (line, probes)


def test_a_video_run_says_at_its_start_what_its_frames_show(world, tmp_path):
    from fgclip_nb.core.folder import Run

    params = dict(
        world,
        data="video_sample",
        num_frames=2,
        batch_size=2,
        max_steps=1,
        output=str(tmp_path / "run"),
    )
    assert micro.run(params) == 0
    known = {r["name"]: r["value"] for r in Run(params["output"]).expectations()}
    assert (
        0.5 < known["regions shown by the sampled frames"] < 1
        and 1 <= known["visible frames per region"] <= 2
    )
    assert 0 < known["annotated time within the sampled range"] < 1 and known["parameters"] > 1e5
    assert "expected: regions shown by the sampled frames = 0." in log_of(params)


@pytest.mark.ci
def test_class_negatives_reach_the_loss(world, tmp_path):
    """Labelled samples without negatives of their own get a file's; the hard loss counts them."""
    rows = [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]
    for row in rows:
        row["label"] = "Squares"
        for region in row["regions"]:
            region["negatives"] = []
    other = Path(world["data"]).with_name("labelled.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "wrong.json").write_text(
        '{"Squares": {"captions": [], "negatives": ["a circle", "a triangle", "a star"]}}'
    )
    params = dict(world, data=str(other), output=str(tmp_path / "run"), max_steps=2)
    assert (
        micro.run(params) == 0 and "loss_hard" not in (tmp_path / "run/metrics.jsonl").read_text()
    )
    assert (
        micro.run(
            dict(
                params,
                output=str(tmp_path / "more"),
                class_negatives=str(tmp_path / "wrong.json"),
                make_negatives=3,
            )
        )
        == 0
    )
    assert [
        json.loads(line)["candidates_hard"]
        for line in (tmp_path / "more/metrics.jsonl").read_text().splitlines()
    ] == [4, 4]


def test_clear_errors_before_the_first_step(world, tmp_path):
    from fgclip_nb.core.identity import ConfigError, DataError
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    with pytest.raises(DataError, match="nowhere"):
        train(
            TrainConfig(
                **world | dict(media_root=str(tmp_path / "nowhere"), output=str(tmp_path / "a"))
            )
        )
    empty = tmp_path / "only_val.jsonl"
    empty.write_text(
        "".join(
            line + "\n" for line in Path(world["data"]).read_text().splitlines() if '"val"' in line
        )
    )
    with pytest.raises(DataError, match="no training sample"):
        train(
            TrainConfig(
                **world
                | dict(
                    data=str(empty),
                    media_root=str(Path(world["data"]).parent),
                    output=str(tmp_path / "b"),
                )
            )
        )
    with pytest.raises((ConfigError, DataError), match="no-such-model"):
        train(TrainConfig(**world | dict(model="no-such-model", output=str(tmp_path / "c"))))


@pytest.mark.ci
def test_bf16_and_checkpointing_train_too(world, tmp_path):
    params = dict(
        world,
        output=str(tmp_path / "run"),
        precision="bf16",
        gradient_checkpointing=True,
        max_steps=4,
    )
    assert micro.run(params) == 0
    from safetensors.torch import load_file
    from fgclip_nb.core.folder import Run

    weights = load_file(Run(tmp_path / "run").checkpoints()[-1][1] / "model.safetensors")
    assert {str(t.dtype) for t in weights.values()} == {"torch.float32"}, (
        "master weights stay in float32"
    )


def test_checkpointing_changes_no_number(world, finished, tmp_path):
    params = dict(world, output=str(tmp_path / "run"), gradient_checkpointing=True)
    assert micro.run(params) == 0
    from fgclip_nb.core.folder import Run

    ours, plain = (Run(p["output"]).metrics()["loss"].tolist() for p in (params, finished))
    assert ours == pytest.approx(plain, rel=1e-5)


def stand_in(monkeypatch, code):
    """In place of two training processes: a small program."""
    from fgclip_nb.training import launcher

    monkeypatch.setattr(launcher, "launch_command", lambda cfg, file: [sys.executable, "-c", code])


@pytest.mark.ci
def test_a_notebook_starts_and_follows_two_processes(world, tmp_path):
    """`processes` above 1: the run is a program of its own, its lines appear here, and its numbers
    are those of one process with the same global batch."""
    from fgclip_nb.core.folder import Run, get_logger
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train
    import logging

    lines, watch = [], logging.Handler()
    watch.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(watch)
    try:
        run = train(
            TrainConfig(
                **world
                | dict(
                    output=str(tmp_path / "two"),
                    processes=2,
                    batch_size=2,
                    max_steps=4,
                    device="auto",
                )
            )
        )
    finally:
        get_logger().removeHandler(watch)
    assert run.finished and run.manifest()["processes"] == 2 and run.params()["processes"] == 2
    assert any(
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m fgclip_nb.training" in line
        for line in lines
    )
    assert sum("[LOSS] Step 1 " in line for line in lines) == 1 and any(
        "[VERDICT]" in line for line in lines
    )
    assert micro.run(dict(world, output=str(tmp_path / "one"), max_steps=4)) == 0
    ours, theirs = run.metrics(), Run(tmp_path / "one").metrics()
    names = ["loss", *(c for c in theirs.columns if c.startswith("val_"))]
    assert {"val_loss_region", "val_chance_region", "val_mean_rank"} <= {*names}
    for name in names:
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=2e-4, nan_ok=True)
    assert micro.run(dict(world, output=str(tmp_path / "two"), batch_size=2, max_steps=4)) == 2, (
        "one process is another run than two"
    )


def test_a_failed_child_fails_the_run_with_its_status_and_last_words(world, tmp_path, monkeypatch):
    from fgclip_nb import training
    from fgclip_nb.training import __main__
    from fgclip_nb.core.config import TrainConfig

    cfg = TrainConfig(**world | dict(output=str(tmp_path / "run"), processes=2))
    stand_in(
        monkeypatch,
        "print('ConfigError: something is wrong'); print('  exitcode  : 4 (pid: 7)'); "
        "raise SystemExit(1)",
    )
    with pytest.raises(
        training.LaunchFailed, match="(?s)ended with status 4.*ConfigError: something is wrong"
    ) as e:
        training.train(cfg)
    assert e.value.status == 4
    assert __main__.main([f"{k}={json.dumps(v)}" for k, v in cfg.as_dict().items()]) == 4


def test_a_signal_is_passed_on_to_the_child(world, tmp_path, monkeypatch):
    from fgclip_nb import training
    from fgclip_nb.core.config import TrainConfig

    stand_in(
        monkeypatch,
        f"""import os, signal, time
def stop(number, frame):
    open({str(tmp_path / "heard")!r}, "w").write(str(number))
    raise SystemExit(1)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)""",
    )
    cfg = TrainConfig(**world | dict(output=str(tmp_path / "run"), processes=2))
    with pytest.raises(training.Interrupted, match="the same command resumes") as e:
        training.train(cfg)
    assert e.value.status == 143 and (tmp_path / "heard").read_text() == "15"


@pytest.mark.ci
def test_a_child_ends_with_its_parent(tmp_path):
    """A killed notebook leaves no training behind."""
    child = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
        "time.sleep(600)"
    )
    parent = (
        "import sys, os, signal; from fgclip_nb.training.launcher import follow\n"
        f"follow([sys.executable, '-c', {child!r}], print)"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    started.kill()
    started.wait()
    wait_for(lambda: not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists())


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.long
def test_two_processes_stop_after_the_same_step_and_resume(world, tmp_path):
    """SIGTERM reaches the notebook; both processes save and stop together; the same command goes on
    to the numbers of the run that was never interrupted."""
    params = dict(world, processes=2, batch_size=2, max_steps=60, save_every=1000, eval_every=0)
    words = [f"{k}={json.dumps(v)}" for k, v in dict(params, output=str(tmp_path / "run")).items()]
    child = subprocess.Popen(
        [sys.executable, "-m", "fgclip_nb.training", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in child.stdout:
        if "[LOSS] Step 5 " in line:
            child.send_signal(signal.SIGTERM)
    assert child.wait() == 143
    from fgclip_nb.core.folder import Run

    run = Run(tmp_path / "run")
    assert (
        not run.finished
        and 5 <= run.checkpoints()[-1][0] < 60
        and len(run.metrics()) == run.checkpoints()[-1][0]
    )
    assert (
        subprocess.run(
            [sys.executable, "-m", "fgclip_nb.training", *words], stdin=subprocess.DEVNULL
        ).returncode
        == 0
    )
    whole = [w for w in words if not w.startswith("output=")] + [f"output={tmp_path / 'whole'}"]
    assert (
        subprocess.run(
            [sys.executable, "-m", "fgclip_nb.training", *whole], stdin=subprocess.DEVNULL
        ).returncode
        == 0
    )
    assert micro.outcome(tmp_path / "run") == micro.outcome(tmp_path / "whole")


def two_processes(params, tmp_path, kill_rank=None):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, torch\ntorch.set_num_threads(1)\n"
        "from fgclip_nb.training import __main__, loop\n"
        + (
            "run_step = loop.run_step\ndef step(s, b):\n    done = run_step(s, b)\n"
            f"    if s.step == 4 and os.environ['RANK'] == '{kill_rank}': "
            "os.kill(os.getpid(), 9)\n    return done\n"
            "loop.run_step = step\n"
            if kill_rank is not None
            else ""
        )
        + "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    words = [f"{k}={json.dumps(v)}" for k, v in params.items()]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        *words,
    ]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, env=env
    )


@pytest.mark.ci
def test_two_processes_train_like_one_and_survive_a_lost_rank(world, tmp_path):
    """The same global batch on two gloo processes; one is killed, the same command resumes."""
    one = dict(world, output=str(tmp_path / "one"), max_steps=6)
    two = dict(one, output=str(tmp_path / "two"), batch_size=2)
    assert micro.run(one) == 0
    lost = two_processes(two, tmp_path, kill_rank=1)
    assert lost.returncode != 0
    done = two_processes(two, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (
        [
            json.loads(line)
            for line in (Path(p["output"]) / "metrics.jsonl").read_text().splitlines()
        ]
        for p in (one, two)
    )
    assert [r["step"] for r in b] == list(range(1, 7))
    for x, y in zip(a, b):
        for key in ("loss", "loss_region", "loss_global", "candidates_region", "bank_len"):
            assert y[key] == pytest.approx(x[key], rel=2e-4), (x["step"], key)
