"""Faults planted into real, tiny trainings: whether a rule finds its fault, and stays silent in a
healthy run, shows only over whole runs.

Here run a healthy training and the quickest faults, the others with make test-all; the catalogues
of nbs/faults.ipynb are judged in tests/test_faultbench.py."""

import sys
from pathlib import Path
import pandas as pd, pytest

sys.path.insert(0, str(Path(__file__).parent))
import planted
from fgclip_nb import diagnostics as dx
from fgclip_nb.diagnostics import judgement, recorder, report, rules

QUICK = ("zero_vectors", "text_frozen", "scale_reset", "bank_never_on")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return planted.run_planted(tmp_path_factory.mktemp("healthy"))


def test_a_healthy_run_trips_no_rule(healthy):
    assert planted.tripped(healthy) == []


def test_no_prefix_of_a_healthy_run_names_a_cause(healthy):
    ev = judgement.run_evidence(healthy)
    for step in range(1, 101, 9):
        assert not [
            v
            for v in dx.verdicts(ev.until(step))
            if v.tripped and judgement.rank_of(v) < rules.SYMPTOM
        ], step


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.long]) for n in planted.FAULTS],
)
def test_the_headline_names_the_planted_fault(tmp_path, name):
    run = planted.run_planted(tmp_path, planted.FAULTS[name], steps=40 if name in QUICK else None)
    assert planted.tripped(run)[:1] == [planted.FAULTS[name].rule]


def test_metrics_are_bitwise_reproducible_and_hold_no_clock(healthy, tmp_path):
    short = planted.run_planted(tmp_path, steps=100)
    assert (short.path / "metrics.jsonl").read_bytes() == (
        healthy.path / "metrics.jsonl"
    ).read_bytes()
    assert not [c for c in short.metrics() if "time" in c or c.endswith("_s")]


def test_each_line_is_what_the_schema_says(healthy):
    m = healthy.metrics()
    every = [
        "step",
        "forwards",
        "epoch",
        "regions",
        "loss",
        "loss_global",
        "loss_global_short",
        "loss_region",
        "loss_region_in_batch",
        "candidates_global",
        "chance_global",
        "chance_region_in_batch",
        "top1_region",
        "positive_cosine_region",
        "masked_share_region",
        "logit_scale",
        "logit_scale_finegraind",
        "logit_scale_hardneg",
        "lr",
        "grad_norm",
        "clipped",
        "skipped",
    ]
    assert not [c for c in every if c not in m or m[c].isna().any()]
    seldom = [
        "logits_i2t_min",
        "cosine_region_p95",
        "norm_image_mean",
        "zero_share_region",
        "effective_rank_region",
        "grad_norm/vision",
        "update_norm/text",
        "changed_share/projections",
    ]
    for c in seldom:
        assert list(m.loc[m[c].notna(), "step"]) == [1, *range(5, 101, 5)], c
    assert list(m["step"]) == list(range(1, 101))


def test_expected_beside_observed(healthy):
    rows = {
        n: (e, o)
        for n, e, o, _ in report.expected_and_observed(
            healthy.expectations(), judgement.run_evidence(healthy)
        )
    }
    for name in ("total steps", "global chance level"):
        assert rows[name][0] == rows[name][1], (name, rows[name])
    assert float(rows["duplicate floor"][0]) == pytest.approx(
        float(rows["duplicate floor"][1]), rel=0.05
    )


def test_runtime_lines_only_when_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ENABLE_RUNTIME_DIAG", "3")
    run = planted.run_planted(tmp_path, steps=6)
    text = (run.path / "training.log").read_text()
    assert text.count("logits_i2t: min=") == 2 and text.count("img_norms: ") == 2
    monkeypatch.delenv("ENABLE_RUNTIME_DIAG")
    assert recorder.runtime_interval() == 0


def test_weights_that_do_not_fit_are_named():
    ev = dx.Evidence(
        pd.DataFrame([dict(step=1, loss=1.0)]),
        facts=dict(load_report=dict(matched=["a"] * 127, missing=["b"] * 72, misshaped={})),
    )
    v = next(v for v in dx.verdicts(ev) if v.name == "weights_loaded")
    assert v.result == "fail" and v.value == "127 of 199"
