"""Hostile logs, data, weights and run folders that once were believed, hung, or raised."""

import json, os, shutil, threading, time

import pytest, torch

from fgclip_nb.core.identity import ConfigError, DataError


def within(seconds, work):
    "What `work` gives, done in a thread: an assertion where it is not done in time."
    result = []

    def call():
        try:
            result.append(work())
        except Exception as e:
            result.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"not done in {seconds} s"
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# Run folders


def unfinished(folder, **changes):
    "A folder with two checkpoints, as a killed run leaves it; `changes`: of the last state.json."
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training import resuming
    from fgclip_nb.training.checkpoints import save_checkpoint
    from test_hold_training import small_checkpoints

    model, optimizer = small_checkpoints()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    counters = dict.fromkeys(resuming.COUNTERS, 0) | dict(best={})
    cfg = TrainConfig(output=str(folder), data="sample", learning_rate=0.25)
    state = dict(counters, params=cfg.as_dict(), data="f")
    for step in (2, 4):
        save_checkpoint(folder, step, model, optimizer, None, dict(state))
    last = folder / "checkpoints/step_00000004/state.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | changes))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {k}}}\n' for k in range(1, 6)))
    return model, cfg


def usable(folder, model):
    "The step that a run in `folder` would go on from."
    from types import SimpleNamespace
    from fgclip_nb.core.folder import get_logger
    from fgclip_nb.training.resuming import usable_checkpoint

    s = SimpleNamespace(path=folder, log=get_logger(), model=model, bank=None, is_main=True)
    return within(60, lambda: usable_checkpoint(s))[0]


@pytest.mark.parametrize("text", [None, "{}\n", "data: sample\n"])
def test_parameters_that_params_yaml_lost_are_those_of_the_checkpoint(tmp_path, text):
    from dataclasses import replace
    from fgclip_nb.core.config import check_params

    _, cfg = unfinished(tmp_path)
    if text:
        (tmp_path / "params.yaml").write_text(text)
    check_params(tmp_path, cfg)
    with pytest.raises(ConfigError, match="`learning_rate`: 0.25 in the folder, 0.5 asked for"):
        check_params(tmp_path, replace(cfg, learning_rate=0.5))


@pytest.mark.parametrize("name", ["step_00000004", "step_00000005"])
def test_a_checkpoint_under_the_name_of_another_step_is_not_used(tmp_path, name):
    model, _ = unfinished(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    shutil.copytree(checkpoints / "step_00000002", checkpoints / name)
    assert usable(tmp_path, model) == 2


@pytest.mark.parametrize(
    "best", [dict(waited="x"), dict(score=None), dict(step="../.."), dict(step=1.5)]
)
def test_a_best_that_is_no_number_is_not_gone_on_from(tmp_path, best):
    model, _ = unfinished(tmp_path, best=best)
    assert usable(tmp_path, model) == 2


@pytest.mark.parametrize("kind", ["pipe", "link to nothing"])
def test_a_state_that_is_no_file_is_passed_over(tmp_path, kind):
    model, _ = unfinished(tmp_path)
    state = tmp_path / "checkpoints/step_00000004/state.json"
    state.unlink()
    os.mkfifo(state) if kind == "pipe" else state.symlink_to("/nowhere")
    assert usable(tmp_path, model) == 2


@pytest.mark.parametrize("name, value", [("resumed", "x"), ("resumed", {"a": 1}), ("trained", [1])])
def test_a_manifest_of_another_shape_is_named(tmp_path, name, value):
    from fgclip_nb.core.folder import Run

    (tmp_path / "manifest.json").write_text(json.dumps({name: value}))
    with pytest.raises(DataError, match=f"manifest.json: `{name}` is no"):
        Run(tmp_path).manifest()


@pytest.mark.parametrize("name", ["params.yaml", "manifest.json", "finished.json"])
def test_a_pipe_in_a_run_folder_keeps_nobody_waiting(tmp_path, name):
    from fgclip_nb.core.folder import Run

    os.mkfifo(tmp_path / name)
    look = dict(zip(("params.yaml", "manifest.json"), (Run.params, Run.manifest)))
    with pytest.raises(DataError, match=f"{name}.*pipe or device"):
        within(20, lambda: look.get(name, Run.summary)(Run(tmp_path)))


# Logs


WORDS = {
    "letters": "a" * 300_000 + "=",
    "region": "region" + "w" * 300_000,
    "slashes": "[LOSS] " + "loss_a/" * 50_000,
    "exponents": "loss: " + "1e" * 150_000,
    "digits": "loss: " + "1" * 300_000 + "x",
    "dots": "1." * 150_000 + " samples",
    "titles": "\x1b]" * 150_000,
    "colours": "\x1b[" + "1;" * 150_000,
    "bank": "[Memory Bank] enabled @ " * 20_000,
    "overflow": "overflow " * 40_000,
    "scale": "logit_scale" * 30_000,
    "pairs": "loss=1 " * 300_000,
    "blank": "\n" * 300_000,
}


@pytest.mark.parametrize("name", WORDS)
def test_a_long_line_is_read_in_seconds(tmp_path, name):
    from fgclip_nb.diagnostics.judgement import evidence

    log = tmp_path / "a.log"
    log.write_text(f"{WORDS[name]}\n[LOSS] Step 7 loss=2.5\n")
    begun = time.process_time()
    ev = evidence(log)
    assert time.process_time() - begun < 5
    assert ev.series("loss").iloc[-1] == 2.5


@pytest.mark.ci
@pytest.mark.parametrize("words", [2000, 100_000])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_log_of_many_names_is_judged_or_refused_in_seconds(tmp_path, words, kind):
    from fgclip_nb.diagnostics.judgement import evidence
    from fgclip_nb.diagnostics.rules import loss_kinds

    names = ["step", *(f"loss_{k}" for k in range(words))]
    rows = [json.dumps(dict.fromkeys(names, 1)), '{"step": 2, "loss": 1}']
    if kind == "csv":
        rows = [",".join(names), ",".join("1" * len(names))]
    log = tmp_path / f"a.{kind}"
    log.write_text("\n".join(rows) + "\n")
    begun = time.process_time()
    if words > 10_000:
        with pytest.raises(DataError, match="100,00. names of numbers"):
            evidence(log)
    else:
        loss_kinds(evidence(log))
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_what_is_no_log_file_is_refused_at_once(tmp_path, kind):
    from fgclip_nb.diagnostics.judgement import evidence

    log = tmp_path / "a.log"
    if kind == "pipe":
        os.mkfifo(log)
    elif kind == "device":
        log.symlink_to("/dev/zero")
    else:
        log.touch()
        os.truncate(log, 1 << 40)  # a hole: no disk is needed
    with pytest.raises(DataError, match="no ordinary file" if kind != "large" else "give a part"):
        within(20, lambda: evidence(log))


def test_a_ragged_row_of_a_table_costs_only_what_is_beyond_it(tmp_path):
    from fgclip_nb.diagnostics.judgement import evidence

    (tmp_path / "a.csv").write_text("step,loss\n1,2\n2,3,4,5\n3\n4,1\n")
    assert evidence(tmp_path / "a.csv").series("loss").to_dict() == {1: 2, 2: 3, 4: 1}


# Data


def rejects_of(path):
    from fgclip_nb.data.load import load_samples

    samples, rejects = within(60, lambda: load_samples(str(path)))
    return len(samples), [r.reason for r in rejects]


def test_references_to_references_in_a_description_are_refused(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: *i", "train: ."]))
    kept, reasons = rejects_of(tmp_path / "data.yaml")
    assert kept == 0 and "references" in reasons[0]


def test_a_quote_that_never_closes_swallows_no_rows_in_silence(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\nd.jpg,four\n')
    kept, reasons = rejects_of(table)
    assert kept == 1 and "never closes" in reasons[0]
    table.write_text(
        'image,caption\na.jpg,"one\ntwo"\nb.jpg,three'
    )  # closed; no newline at the end
    assert rejects_of(table) == (2, [])


def test_a_column_that_stands_twice_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption,Caption\na.jpg,one,two\n")
    kept, reasons = rejects_of(tmp_path / "a.csv")
    assert kept == 0 and "twice" in reasons[0]


def test_a_pipe_among_shards_is_no_shard(tmp_path):
    from fgclip_nb.data.stream import shard_files

    os.mkfifo(tmp_path / "a.tar")
    assert within(20, lambda: shard_files(tmp_path)) == {}
    assert within(20, lambda: shard_files(str(tmp_path / "*.tar"))) == {}


@pytest.mark.parametrize("address", ["zzz://x", "ftp://127.0.0.1:9/x", "hub:no/such"])
def test_an_address_out_of_reach_is_named(monkeypatch, address):
    from fgclip_nb.data import stream

    def offline(name):
        raise RuntimeError("no network")

    monkeypatch.setattr(stream, "_hub_stamp", offline)
    with pytest.raises(DataError, match=f"{address}.*cannot be reached or read"):
        stream.open_source(address)


# Weights


@pytest.mark.ci
def test_a_damaged_archive_of_weights_is_refused_in_words(tmp_path):
    import random
    from fgclip_nb.model.opening import open_model

    torch.save({"a": torch.zeros(3)}, tmp_path / "whole.pt")
    whole, draw = (tmp_path / "whole.pt").read_bytes(), random.Random(0)
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(DataError):
            open_model(tmp_path / "a.pt")


# Signals


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_after_the_processes_agreed_is_for_the_next_step(processes):
    "One process that left at once would wait at another place than the others, for ever."
    import signal
    from types import SimpleNamespace
    from fgclip_nb.training.interruption import agree_to_stop, stop_signals

    company = SimpleNamespace(num_processes=processes, device="cpu", gather=lambda mine: mine)
    s = SimpleNamespace(signal_here="", stop_signal="", accelerator=company)
    with stop_signals(s):
        agree_to_stop(s)
        os.kill(os.getpid(), signal.SIGTERM)
        assert s.stop_signal == ""
        agree_to_stop(s)
        assert s.stop_signal == "SIGTERM"
