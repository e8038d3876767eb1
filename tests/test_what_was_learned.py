"""What a run is said to have learned, on whole runs: the numbers are those of `evaluate`, the
weights are the best ones, and no sentence of a report contradicts another. A cell has no run."""

import json, math
import pandas as pd, pytest
from fgclip_nb import diagnostics as dx
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.core.folder import Run
from fgclip_nb.diagnostics.expectations import target_share
from fgclip_nb.evaluation.results import evaluate
from fgclip_nb.training.loop import train
from fgclip_nb.training.rundata import prepare_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cfg = TrainConfig(
        data="world:size=60",
        batch_size=8,
        max_steps=4,
        eval_every=2,
        best_by="rank",
        memory_bank_warmup_steps=1,
        tracker="none",
        device="cpu",
        output=str(tmp_path_factory.mktemp("learned") / "run"),
    )
    return train(cfg), cfg


def rounded(tables):
    "Tables of numbers to six digits: texts of other batches differ in the last of float32."
    if isinstance(tables, dict):
        return {k: rounded(v) for k, v in tables.items()}
    if isinstance(tables, list):
        return [rounded(v) for v in tables]
    return round(tables, 6) if isinstance(tables, float) else tables


def test_evaluate_of_the_run_gives_the_numbers_of_its_skills(run):
    run, cfg = run
    kept = json.loads((run.path / "skills.json").read_text())
    assert kept["step"] == run.summary()["best"]["step"]
    tasks = list(kept["held_out"])
    assert tasks == ["short_retrieval", "region_phrases", "hard_negatives"]
    found = evaluate(
        run.path, list(prepare_data(cfg).val), tasks, captions=1, permutations=200
    ).results
    assert rounded(json.loads(json.dumps(found, default=float))) == rounded(kept["held_out"])
    score = json.loads((run.path / "retrieval.json").read_text())
    assert score["mean_rank"] == kept["held_out"]["short_retrieval"]["both"]["mean_rank"]


def test_training_data_are_asked_among_as_many_candidates(run):
    kept = json.loads((run[0].path / "skills.json").read_text())
    for task, name in (("short_retrieval", "i2t"), ("hard_negatives", "hard")):
        asked, seen = (kept[part][task][name]["candidates"] for part in ("held_out", "training"))
        assert asked == seen, task


def test_the_report_opens_with_what_was_learned(run):
    page = (run[0].path / "report.html").read_text()
    assert page.index("What was learned") < page.index("<h2>Verdicts")
    learned = dx.what_was_learned(run[0])
    assert learned.sentences[0].startswith("photo and caption: ")


@pytest.mark.parametrize("loss, result", [(0.519, "pass"), (2.077, "pass"), (3.5, "fail")])
def test_a_target_reads_the_same_before_and_after(loss, result):
    rows = [
        dict(step=k, loss_region=loss, candidates_region=95, loss_global=1.0, candidates_global=16)
        for k in range(1, 51)
    ]
    table = dx.evidence(pd.DataFrame(rows))
    judged = {v.name: v for v in dx.verdicts(table)}["region_loss_by_step_50"]
    assert judged.result == result
    assert judged.value == pytest.approx(loss / math.log(95))
    assert (judged.value < target_share(1.0)) == (result == "pass")


def test_no_sentence_calls_a_run_faultless_above_a_missed_target():
    missed = [dx.Verdict("region_loss_by_step_50", 0.8, "", "fail", "72% is asked")]
    passed = [dx.Verdict(f"rule_{k}", 1, "", "pass", "") for k in range(20)]
    said = dx.headline(passed + missed)
    assert said.startswith("No fault found by 20 rules; 1 of 1 step targets missed.")
    assert "72% is asked" in said
    page = dx.judge(passed + missed)._repr_html_()
    assert page.index("region loss by step 50") < page.index("<details>") < page.index("rule 0")


def test_a_run_with_nothing_held_out_says_so(tmp_path):
    assert "nothing is held out" in repr(dx.what_was_learned(Run(tmp_path)))
