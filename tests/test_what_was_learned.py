"""What a run is said to have learned, on whole runs: the numbers are those of `evaluate`, the
weights are the best ones, and no sentence of a report contradicts another. A cell has no run."""

import json, math
import pandas as pd, pytest
from fgclip_nb import diagnostics as dx
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.core.folder import Run
from fgclip_nb.diagnostics.expectations import target_share
from fgclip_nb.diagnostics.skills import (
    LEARNED,
    TRACE,
    UNJUDGED,
    WORSE,
    advice_for,
    in_a_word,
    kind_sentences,
    kinds_by_word,
    skill_sentence,
)
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
    kinds = set(kept["held_out"]["hard_negatives"]) - {"hard"}
    assert "count" in kinds and "count" in kept["training"]["hard_negatives"]
    said = [x for x in dx.what_was_learned(run[0]).sentences if x.startswith("near misses by kind")]
    assert said and all(f"{kind} " in " ".join(said) for kind in kinds)


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


def table(first, rank, within, luck=(0.42, 2.17), band=(2.07, 2.3), queries=246, among=4.0):
    "A table of scores as `evaluate` writes it."
    return dict(
        queries=queries,
        candidates=among,
        acc1=first,
        mean_rank=rank,
        permuted=dict(acc1=luck[0], mean_rank=luck[1]),
        interval=dict(acc1=[max(0, first - 0.3), min(1, first + 0.2)], mean_rank=list(within)),
        chance_interval=dict(acc1=[0.37, 0.48], mean_rank=list(band)),
        above_chance=dict(acc1=first > 0.48, mean_rank=rank < band[0]),
    )


GOOD = table(0.62, 1.6, (1.5, 1.65), (0.019, 6.0), (5.8, 6.1), 746, 11.0)
UNDER = table(0.14, 2.67, (2.57, 2.78))
FEW = table(0.33, 3.06, (2.2, 5.2), (0.35, 2.98), (2.6, 3.4), 18, 11.0)


def test_a_kind_under_luck_does_not_hide_behind_the_mean_of_all():
    held_out = dict(hard_negatives=dict(hard=GOOD, colour=GOOD, count=UNDER))
    training = dict(hard_negatives=dict(hard=GOOD, count=table(0.76, 1.3, (1.2, 1.4))))
    said = skill_sentence("near misses", held_out, training, {})
    assert said.startswith("near misses: learned, but not count")
    assert list(kinds_by_word(held_out)) == [LEARNED, WORSE]
    worst = kind_sentences(held_out, training)[-1]
    assert "count 14% of 246 (luck 42%, training 76%): the wrong one is preferred" in worst
    old = kind_sentences(held_out, {})[-1]  # files from before training was asked by kind
    assert "count 14% of 246 (luck 42%)" in old


def test_two_sentences_are_judged_too():
    size = table(0.94, 1.06, (1.04, 1.09), (0.5, 1.5), (1.45, 1.57), 238, 2.0)
    assert in_a_word(size)[0] == LEARNED


@pytest.mark.parametrize(
    "scores, word",
    [
        (FEW, UNJUDGED),
        (
            FEW | dict(queries=700, interval=dict(acc1=[0.3, 0.36], mean_rank=[2.9, 3.2])),
            "not learned",
        ),
        (UNDER, WORSE),
    ],
)
def test_few_questions_are_not_called_a_failure(scores, word):
    found, why = in_a_word(scores)
    assert found == word and ("18 questions" in why) == (word == UNJUDGED)


@pytest.mark.parametrize("first, heart", [(0.28, False), (0.94, True)])
def test_by_heart_is_what_was_nearly_all_right(first, heart):
    little = table(0.05, 17.0, (14.0, 18.0), (0.02, 22.0), (19.0, 25.0), 86, 43.0)
    seen = table(first, 5.0, (4.0, 6.0), (0.02, 22.0), (19.0, 25.0), 86, 43.0)
    parts = (dict(region_phrases=dict(phrases=t)) for t in (little, seen))
    said = skill_sentence("box and phrase", *parts, {})
    assert in_a_word(little)[0] == TRACE
    assert ("by heart" in said) == heart and ("far more than held out" in said) != heart


def test_colours_are_spoken_of_where_they_were_asked():
    assert "colours" not in in_a_word(GOOD)[1] and "colours" in in_a_word(GOOD, line=3.0)[1]


@pytest.mark.parametrize("data", ["world", "world:seed=4:hard=0.5"])
def test_the_advice_names_a_world_that_was_not_trained_on(data):
    gap = advice_for(LEARNED, GOOD, GOOD | dict(acc1=0.93), dict(data=data))
    assert f"world:seed={5 if '4' in data else 1}:size=250 -p split train" in gap


def test_new_scenes_with_combinations_of_training_can_be_asked(run):
    found = evaluate(run[0].path, "world:seed=1:size=20", "hard_negatives", split="train")
    assert found.results["hard_negatives"]["colour"]["queries"] > 5


def test_log_lines_say_whole_passes_and_every_held_out_loss(run):
    log = (run[0].path / "training.log").read_text()
    assert "[LOSS] Step 1 Epoch 0.14 " in log  # one batch of seven
    looks = [line for line in log.splitlines() if "[VAL]" in line]
    assert len(looks) == 2
    for line in looks:
        assert all(f"loss_{kind}=" in line for kind in ("global", "region", "hard"))


def test_the_page_says_on_what_and_with_what_input_it_trains(run):
    expected = {row["name"]: row["value"] for row in run[0].expectations()}
    assert expected["model input"] == "112 × 112 pixels" and "cpu" in expected["device"]
