"""The old project's list for "still not converging": is the scale loaded, is the bank on, what do
the diagnostics say, what does the box filter reject. Each point as a fault with the verdict that
answers it; whole runs and logs, which no cell holds."""

import importlib, sys
from pathlib import Path
import pytest
from fgclip_nb.diagnostics import judgement
from synthetic_runs import synthetic_run

sys.path.insert(0, str(Path(__file__).parent / "faultbench"))
bench = importlib.import_module("bench")


@pytest.fixture(scope="module")
def packed():
    return bench.load("dev")


def leads(source):
    verdict = judgement.leading(judgement.verdicts(source))
    return verdict.name if verdict else ""


@pytest.mark.parametrize(
    "name, rule",
    [
        ("bf16_scale", "scale_as_asked"),
        ("scale_frozen", "scale_can_move"),
        ("scale_low", "scale_too_low"),
        ("bank_late", "bank_comes_on"),
        ("divided_twice", "boxes_rejected"),
        ("pixels_as_shares", "boxes_rejected"),
        ("small", "boxes_rejected"),
        ("xywh", "boxes_misread"),
        ("weights_lost", "weights_loaded"),
    ],
)
def test_each_point_of_the_list_has_its_verdict(packed, name, rule):
    assert bench.first_line(bench.judged(packed[name]))[0] == rule


def test_a_bank_whose_counter_does_not_tick(tmp_path):
    run = synthetic_run(tmp_path / "run", bank=128, bank_off=True)
    assert leads(run) == "bank_comes_on"


def test_the_diagnostics_alone_say_it(tmp_path):
    "Lines that ENABLE_RUNTIME_DIAG=1 prints, without a single metric."
    log = tmp_path / "diag.log"
    line = "[DIAG] logits_i2t: min=-0.6, max=0.5, mean=0.0, std=0.2\n"
    norms = "[DIAG] region_norms: min=0.0000, mean=7.1, zero_share=0.2500\n"
    log.write_text((line + norms) * 30)
    assert leads(log) == "zero_regions"


def test_a_scale_set_again_after_loading(tmp_path):
    run = synthetic_run(tmp_path / "run")
    (run.path / "training.log").write_text("Loaded logit_scale = 4.6052 (exp=100.0)\n")
    assert leads(run) == "scale_as_asked"
