"""FG-CLIP 2 through training and what follows: chance row, bias, the three faults named, resuming
with its margin, two processes as one, either loss for either model. Not a cell: whole runs, faults
that are planted, processes."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fgclip_nb.batches.batch import collate
from fgclip_nb.batches.examples import Drawing, image_example
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.core.folder import Run
from fgclip_nb.data.load import load_samples
from fgclip_nb.diagnostics import report
from fgclip_nb.diagnostics.judgement import verdicts as judge
from fgclip_nb.evaluation.encoder import Encoder
from fgclip_nb.evaluation.anomaly import anomaly_scores
from fgclip_nb.evaluation.features import load_model
from fgclip_nb.evaluation.results import evaluate
from fgclip_nb.evaluation.tasks import TASKS
from fgclip_nb.losses.objective import compute_losses, total_loss
from fgclip_nb.losses.sigmoid import fitting_bias, sigmoid_chance
from fgclip_nb.model.fgclip2 import FGCLIP2
from fgclip_nb.model.siglip import FGCLIP2Config
from fgclip_nb.text import pieces as pieces_room
from fgclip_nb.training.loop import train
from ranks import start_ranks
from test_front_door import papermill, said

pytestmark = pytest.mark.ci
SMALL = dict(
    model="fgclip2-tiny",
    patch_budget=16,
    batch_size=8,
    max_regions=2,
    augment="none",
    max_steps=2,
    eval_every=0,
    memory_bank_size=0,
    device="cpu",
    tracker="none",
)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    "Most of the time of a short run is that of the plots in its report."
    monkeypatch.setattr(report, "PLOTS", {})


def run(tmp_path, **changes):
    return train(TrainConfig(output=str(tmp_path / "run"), **(SMALL | changes)))


def verdicts(found):
    return {v.name: v for v in judge(found)}


def test_a_run_its_chance_its_verdicts_and_its_use(tmp_path):
    found = run(tmp_path)
    first = found.metrics().iloc[0] if hasattr(found.metrics(), "iloc") else found.metrics()[0]
    assert first["chance_global"] == pytest.approx(sigmoid_chance(fitting_bias(8), 8), abs=0.02)
    for name in ("spread", "hard_contrast", "ranking"):
        assert f"loss_{name}" in first
    assert first["margin_ranking"] == 0 and 0.3 < first["expected_matches_global"] < 5
    assert first["logit_bias"] == pytest.approx(fitting_bias(8), abs=0.01)
    assert first["luck_hard_contrast"] > 1 / first["candidates_hard_contrast"]
    assert first["logits_i2t_mean"] - first["logit_bias"] == pytest.approx(
        10 * first["cosine_i2t_mean"], abs=0.01
    )
    judged = verdicts(found)
    for name in ("bias_fits", "texts_padded", "texts_lowered", "finite_numbers"):
        assert judged[name].result == "pass", judged[name]
    model = load_model(found.path)
    assert isinstance(model, FGCLIP2)
    rows, kept = Encoder(model, budget=16).images(load_samples("sample")[0][:3])
    assert rows.shape == (3, 64) and kept.tolist() == [0, 1, 2]
    # its folder tells the budget that it was trained with
    again, _ = Encoder(load_model(found.path)).images(load_samples("sample")[0][:3])
    assert np.array_equal(again, rows)


def test_every_task_of_evaluation(tmp_path):
    found = run(tmp_path, max_steps=1)
    samples = [s for s in load_samples("sample")[0] if s.regions][:12]
    tasks = [name for name in TASKS if name != "classification"]
    score = evaluate(found.path, samples, tasks=tasks, permutations=20)
    assert set(score.results) == set(tasks)
    figures = [lists[0] for lists in (list(r.values()) for r in score.results.values())]
    assert all(f["mean_rank"] >= 1 and f["queries"] for f in figures)


def test_clips_train_and_are_scored(tmp_path):
    clips = dict(data="video_sample", num_frames=4, batch_size=2, max_steps=1, min_area=0.01)
    cache = str(tmp_path / "frames")
    found = run(tmp_path, **clips, frame_cache=cache, make_negatives=3)
    assert "loss_ranking" in json.loads((found.path / "metrics.jsonl").read_text())
    samples = load_samples("video_sample")[0]
    tasks = ["short_retrieval", "region_phrases", "classification"]
    assert evaluate(found.path, samples, tasks=tasks, permutations=20).results.keys() == set(tasks)
    videos, model = sorted({s.media for s in samples})[:1], load_model(found.path)
    first = anomaly_scores(model, videos, every=64, cache=tmp_path / "features")
    again = anomaly_scores(model, videos, every=64, cache=tmp_path / "features")
    for scores, kept in zip(first[0].values(), again[0].values()):
        assert 0 < scores.min() <= scores.max() < 1 and np.allclose(scores, kept, atol=1e-6)


FAULTS = {
    "bias_fits": (dict(logit_bias_init=-10.0), None, "too low for 8 candidates"),
    "texts_lowered": ({}, "capitals", "have capital letters"),
    "texts_padded": ({}, "padding", "no end mark"),
}


def faulty(fault, whole=pieces_room.cut_text):
    "A planted `cut_text`: capitals kept, or padding put on the left."

    def cut_text(tokenizer, text, length, lower=True):
        if fault == "capitals":
            return whole(tokenizer, text.title(), length, lower=False)
        ids = whole(tokenizer, text, length)
        n = ids.count(0)
        return [0] * n + ids[: length - n]

    return cut_text


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(tmp_path, name):
    changes, fault, words = FAULTS[name]
    planted = faulty(fault) if fault else pieces_room.cut_text
    with patch.object(pieces_room, "cut_text", planted):
        found = run(tmp_path, max_steps=1, **changes)
    judged = verdicts(found)
    assert judged[name].result == "fail" and words in judged[name].why, judged[name]
    assert [n for n in FAULTS if judged[n].result == "fail"] == [name]


def test_the_notebook_shows_chance_bias_and_band(tmp_path):
    "`papermill nbs/train.ipynb … -p model fgclip2-tiny`, with a bias that does not fit the batch."
    asked = SMALL | dict(max_steps=1, diag_every=1, logit_bias_init=-10.0)
    done, cells = papermill("train.ipynb", tmp_path / "o.ipynb", **asked, output=tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    words = said(cells)
    for row in ("softplus(-b) + 7 softplus(b)", "spread chance level", "ranking chance level"):
        assert row in words
    assert "logit_bias -10.00 is too low for 8 candidates" in words
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert row["logits_i2t_max"] < -5, "the band is that of the logits that the loss sees"
    judged = verdicts(Run(tmp_path / "run"))
    assert [n for n in FAULTS if judged[n].result == "fail"] == ["bias_fits"]


def test_the_stored_bias_of_a_folder_is_not_guessed(tmp_path):
    model = FGCLIP2(FGCLIP2Config.preset("tiny"))
    with torch.no_grad():
        model.logit_bias.fill_(-16.0)
    model.save_pretrained(tmp_path / "model")
    found = run(tmp_path, model=str(tmp_path / "model"), max_steps=1)
    level = next(r for r in found.expectations() if r["name"] == "global chance level")
    assert level["value"] is None and "chance_global" in level["explanation"]
    row = json.loads((found.path / "metrics.jsonl").read_text())
    assert row["chance_global"] == pytest.approx(sigmoid_chance(-16.0, 8), abs=0.01)


@pytest.mark.parametrize("model, losses", [("tiny", "sigmoid"), ("fgclip2-tiny", "softmax")])
def test_either_loss_for_either_model(tmp_path, model, losses):
    found = run(tmp_path, model=model, losses=losses)
    row = json.loads((found.path / "metrics.jsonl").read_text().splitlines()[0])
    expected = np.log(8) if losses == "softmax" else sigmoid_chance(fitting_bias(8), 8)
    assert row["chance_global"] == pytest.approx(expected, abs=0.05)
    again = load_model(found.path)
    assert hasattr(again, "logit_bias")
    judged = verdicts(found)
    assert judged.get("loss_as_defined", judged["finite_numbers"]).result != "fail"


def test_a_resumed_run_keeps_its_margin(tmp_path):
    found = run(tmp_path, max_steps=4, save_every=2, keep_checkpoints=2)
    lines = (found.path / "metrics.jsonl").read_text()
    (found.path / "finished.json").unlink()  # as if it had been stopped after step 2
    shutil.rmtree(found.path / "checkpoints/step_00000004")
    (found.path / "checkpoints/best").unlink(missing_ok=True)
    run(tmp_path, max_steps=4, save_every=2, keep_checkpoints=2)
    assert (found.path / "metrics.jsonl").read_text() == lines
    rows = [json.loads(line) for line in lines.splitlines()]
    margins = {row["step"]: row.get("margin_ranking") for row in rows}
    # no region of step 2 has altered copies: no ranking term, the margin waits for step 3
    assert margins[1] == 0 and margins[2] is None and margins[3] > 0
    assert margins[3] == pytest.approx(rows[0]["lead_ranking"])


# ---- two processes ------------------------------------------------------------------------------


def whole_batch(model):
    drawing = Drawing(128, most=3, patch=16, budget=20)
    samples = [s for s in load_samples("sample")[0] if s.regions][:8]
    drawn = [image_example(s, drawing, np.random.default_rng(0)) for s in samples]
    return collate(drawn, form=model.form())


def losses_and_gradients(part, model):
    cfg = TrainConfig(
        model="fgclip2-tiny", spread_weight=0.1, hard_contrast_weight=0.3, ranking_weight=0.2
    )
    states = dict(ranking=dict(margin=torch.tensor(0.7, dtype=torch.float64)))
    terms = compute_losses(model(part), part, cfg=cfg, states=states)
    total_loss(terms, cfg).backward()
    values = {name: term.loss.item() for name, term in terms.items()}
    return values | dict(margin=states["ranking"]["margin"].item()), {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def double_model():
    torch.manual_seed(0)
    model = FGCLIP2(FGCLIP2Config.preset("tiny")).double()
    with torch.no_grad():
        model.logit_bias.fill_(-2.0)
        for name in ("logit_scale", "logit_scale_finegraind", "logit_scale_hardneg"):
            getattr(model, name).fill_(2.0)
    return model


def as_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = double_model()
    part = whole_batch(model).split(4)[rank]
    values, grads = losses_and_gradients(part, model)
    for g in grads.values():
        dist.all_reduce(g)
    torch.save((values, {n: g / 2 for n, g in grads.items()}), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    start_ranks(as_rank, Path(tmp_path))
    model = double_model()
    values, grads = losses_and_gradients(whole_batch(model), model)
    assert {"loss_spread", "loss_hard_contrast", "loss_ranking", "loss_hard"} <= set(values)
    for rank in range(2):
        theirs, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == pytest.approx(values, abs=1e-10)
        for name, g in grads.items():
            assert (gradients[name] - g).abs().max() < 1e-9, name
