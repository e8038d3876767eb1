"""Logs that this package did not write, and runs that are still going: whole files and processes,
which a notebook cell cannot show."""

import subprocess, sys
from pathlib import Path
import pytest
from fgclip_nb import diagnostics as dx
from fgclip_nb.diagnostics.board import Board
from fgclip_nb.diagnostics import __main__, judgement, report, rules
from synthetic_runs import synthetic_run
from fgclip_nb.core.identity import DataError

LOGS = Path(__file__).parent / "logs"


def results(source):
    return {v.name: v.result for v in dx.verdicts(source)}


@pytest.mark.parametrize("name", ["old_project.log", "diag_only.log"])
def test_the_old_projects_numbers(name):
    found = {v.name: v for v in dx.verdicts(LOGS / name)}
    assert (
        found["region_above_chance"].result == "fail"
        and "ln of 4 candidates is 1.386" in found["region_above_chance"].why
    )
    assert (
        found["scale_as_asked"].result == "fail"
        and "2.6592 rounded to bfloat16" in found["scale_as_asked"].why
    )
    assert found["bank_comes_on"].result == "fail" and "never on" in found["bank_comes_on"].why
    assert found["logits_in_range"].result == "pass"


def test_targets_behind_the_last_step_are_not_reached():
    by_name = results(LOGS / "old_project.log")
    assert (
        by_name["region_loss_by_step_200"] == "fail"
        and by_name["region_loss_by_step_500"] == "not reached"
    )


@pytest.mark.parametrize("name", ["healthy.log", "hf_healthy", "hf_healthy/trainer_state.json"])
def test_a_healthy_log_trips_no_rule(name):
    verdicts = dx.verdicts(LOGS / name)
    assert len(verdicts) >= 10 and not [v for v in verdicts if v.tripped]


@pytest.mark.parametrize("step", range(1, 501, 7))
def test_a_healthy_log_trips_no_rule_at_any_moment(step):
    cut = judgement.evidence(LOGS / "healthy.log").until(step)
    assert not [
        v for v in dx.verdicts(cut) if v.result == "fail" and judgement.rank_of(v) < rules.SYMPTOM
    ]


def test_trainer_state_at_chance():
    by_name = results(LOGS / "hf_chance")
    assert (
        by_name["region_above_chance"] == "fail"
        and by_name["scale_as_asked"] == "fail"
        and by_name["scale_can_move"] == "fail"
    )


def test_tensorboard_events(tmp_path):
    board = Board(tmp_path / "tb")
    for step in range(1, 101):
        board.scalars(
            dict(
                step=step,
                loss=3.0,
                loss_region=1.4,
                regions=4.0,
                logit_scale_finegraind=2.65625,
                bank_ptr=0,
                bank_full=False,
                bank_enabled=False,
            )
        )
    board.close()
    by_name = results(tmp_path / "tb")
    assert (
        by_name["region_above_chance"] == "fail"
        and by_name["scale_as_asked"] == "fail"
        and by_name["bank_comes_on"] == "fail"
    )
    event_file = next((tmp_path / "tb").glob("*tfevents*"))
    assert results(event_file) == by_name


def test_colours_carriage_returns_nan_and_noise_do_not_matter(tmp_path):
    log = tmp_path / "messy.log"
    lines = ["\x1b[32mINFO\x1b[0m starting  50%|#####     | 3/6\r"]
    lines += [
        f"\x1b[32mINFO\x1b[0m [LOSS] Step {s} Epoch 0.1 total={'nan' if s == 30 else 3.0} "
        f"global=1.0 region=1.4 hard=2.0\r"
        for s in range(10, 100, 10)
    ]
    log.write_text("\n".join(lines) + "\n[LOSS] Step 100 Ep", encoding="latin-1")
    verdicts = {v.name: v for v in dx.verdicts(log)}
    assert (
        verdicts["finite_numbers"].result == "fail" and "step 30" in verdicts["finite_numbers"].why
    )


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.log").write_text("nothing to see")
    with pytest.raises(DataError, match="no .*LOSS"):
        dx.verdicts(tmp_path / "empty.log")
    with pytest.raises(DataError, match="no such"):
        dx.verdicts(tmp_path / "absent")


def test_the_command_reads_text_without_torch():
    code = (
        "import sys; from fgclip_nb.diagnostics.__main__ import main; main(sys.argv[1:]); "
        "loaded = {'torch', 'tensorboard', 'matplotlib'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    r = subprocess.run(
        [sys.executable, "-c", code, str(LOGS / "old_project.log"), str(LOGS / "hf_chance")],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert "at chance" in r.stdout and "rounded to bfloat16" in r.stdout


def test_the_command_exits_with_2_for_an_unreadable_source():
    r = subprocess.run(
        [sys.executable, "-m", "fgclip_nb.diagnostics", str(LOGS / "nothing")],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 2 and "nothing" in r.stderr and "Traceback" not in r.stderr


def test_a_running_folder_is_judged_by_phase(tmp_path):
    run = synthetic_run(tmp_path / "run", steps=70, bank=128, finished=False)
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 71, "loss": 0.')  # the writer is at it
    states = {p["phase"]: p["state"] for p in report.phases(run)}
    assert states == {
        "first 10 steps": "judged",
        "bank coming on": "judged",
        "steps 50 to 100": "running",
        "after step 100": "not reached",
    }
    r = subprocess.run(
        [sys.executable, "-m", "fgclip_nb.diagnostics", str(run.path)],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0 and "by phase" in r.stdout and "running" in r.stdout


def test_a_fault_shows_in_the_first_phase(tmp_path):
    run = synthetic_run(tmp_path / "run", steps=12, dead="text", finished=False)
    first = report.phases(run)[0]
    assert first["state"] == "judged" and [v.name for v in first["tripped"]] == ["modules_train"]


def test_a_folder_that_just_started(tmp_path):
    (tmp_path / "params.yaml").write_text("max_steps: 10\n")
    assert dx.verdicts(tmp_path) == [] and dx.headline([]) == "Nothing to judge yet."
    assert __main__.main([str(tmp_path)]) == 0


def test_four_decimals_and_lines_after_the_last_loss_are_enough(tmp_path):
    """A short excerpt, as somebody pastes it: the printed scale is rounded once more, and the
    bank's line comes last."""
    log = tmp_path / "old.log"
    log.write_text(
        "[DIAG] logits_i2t: min=-0.6758, max=0.5508, mean=-0.0410, std=0.2012\n"
        "Loaded logit_scale = 2.6562 (exp=14.2)\n"
        "[LOSS] Step 200 Epoch 0.10 total=3.1 global=1.38 region=1.4000 hard=n/a candidates=4\n"
        "[DIAG] memory_bank: ptr=0, full=False, size=128, len=0, enabled=False\n"
    )
    found = {v.name: v for v in dx.verdicts(judgement.evidence(log))}
    assert {n for n, v in found.items() if v.result == "fail"} == {
        "scale_as_asked",
        "bank_comes_on",
        "region_above_chance",
        "region_loss_by_step_200",
    }
    assert (
        "2.6592 rounded to bfloat16" in found["scale_as_asked"].why
        and "one record" in found["region_loss_by_step_200"].why
    )
    assert found["region_loss_by_step_50"].result == "not comparable"
