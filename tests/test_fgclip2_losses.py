"""Every loss term of FG-CLIP 2 against recordings of the official code: values, gradients, six
steps with the growing margin, two processes. And any number of boxes and altered copies, where the
official code drops terms. No notebook cell: the recordings are files, and processes are started."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fgclip_nb.losses.contrast import region_loss
from fgclip_nb.losses.hard_groups import AdaptiveMargin, hard_contrast_loss, ranking_loss
from fgclip_nb.losses.sigmoid import sigmoid_loss
from fgclip_nb.losses.spread import spread_loss
from fgclip_nb.training.build import parameter_groups
from official2 import (
    WEIGHTS,
    golden_model2,
    official_features,
    official_terms,
    official_total,
    recorded,
    recorded_batch,
)
from ranks import start_ranks

SETTINGS = {
    "stage1": dict(box=False, hard=False),
    "box_only": dict(hard=False),
    "hard_only": dict(box=False),
    "stage2": {},
    "stage2_threshold_1.25": dict(margin=1.25),
    "stage2_threshold_9.5": dict(margin=9.5),
    "short_only": dict(box=False, hard=False, long=False),
}
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-10}
both = pytest.mark.parametrize("dtype", TOLERANCE)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@both
def test_terms_are_the_official_ones(dtype):
    model, x = golden_model2(dtype), recorded_batch()
    with torch.no_grad():
        features = official_features(model, x)
        for setting, options in SETTINGS.items():
            expected = recorded("losses")[name_of(dtype)][setting]
            terms = official_terms(model, features, **options)
            for name, term in terms.items():
                assert float(term.loss) == pytest.approx(expected[name], abs=TOLERANCE[dtype])
            total = float(official_total(terms))
            assert total == pytest.approx(expected["total"], abs=3 * TOLERANCE[dtype])
            if "hard_cmr" in terms:
                lead = float(terms["hard_cmr"].details["lead"])
                assert lead == pytest.approx(expected["threshold_local"], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("setting", ["stage1", "stage2"])
def test_gradients_are_the_official_ones(setting):
    model = golden_model2(torch.float64)
    features = official_features(model, recorded_batch())
    official_total(official_terms(model, features, **SETTINGS[setting])).backward()
    expected = recorded("grad_norms")["float64"][setting]
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            norm = 0.0 if p.grad is None else p.grad.norm().item()
            assert norm == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def follow(dtype, batch, steps=6):
    "AdamW as the official trainer has it: the terms and the margin of each step, as floats."
    model, margin = golden_model2(dtype), AdaptiveMargin()
    groups = parameter_groups(model, 0.001)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        terms = official_terms(model, official_features(model, batch), margin.value)
        total = official_total(terms)
        total.backward()
        if dist.is_initialized():
            average(model)
        row = dict(total=total.item(), threshold_before=margin.value)
        margin.update(terms["hard_cmr"].details["lead"])
        optimizer.step()
        row |= {name: term.loss.item() for name, term in terms.items()}
        rows.append(row | dict(threshold_after=margin.value))
    return rows, model


@both
def test_six_steps_with_the_growing_margin(dtype):
    rows, model = follow(dtype, recorded_batch())
    expected = recorded("trajectory")[name_of(dtype)]
    tolerance = 2e-5 if dtype is torch.float32 else 1e-10
    for row, official in zip(rows, expected["steps"], strict=True):
        for name, value in row.items():
            assert value == pytest.approx(official[name], abs=tolerance), name
    for name, norm in expected.get("final_parameter_norms", {}).items():
        assert model.get_parameter(name).norm().item() == pytest.approx(norm, rel=1e-9), name


def test_groups_of_parameters_are_the_official_ones():
    model, expected = golden_model2(torch.float32), recorded("param_groups")
    names = {id(p): n for n, p in model.named_parameters()}
    decay, rest = parameter_groups(model, 0.001)
    assert {names[id(p)] for p in decay["params"]} == set(expected["decay"])
    assert {names[id(p)] for p in rest["params"]} == set(expected["no_decay"])


# ---- two processes ------------------------------------------------------------------------------


def average(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def as_rank(rank, folder):
    "One process: terms and averaged gradients of its half, then six steps."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batch, seen = recorded_batch(rank, 2), {}
    for setting in ("stage1", "stage2"):
        model = golden_model2(torch.float64)
        features = official_features(model, batch)
        terms = official_terms(model, features, **SETTINGS[setting])
        official_total(terms).backward()
        average(model)
        norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
        seen[setting] = {n: t.loss.item() for n, t in terms.items()}, norms
    seen["steps"] = follow(torch.float64, batch)[0]
    torch.save(seen, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ci
def test_two_processes(tmp_path):
    start_ranks(as_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    expected = recorded("two_rank")

    def check(rows, official, name, tolerance=1e-10):
        "Terms of regions per process; global ones are those of the undivided batch on both."
        pairs = zip([row[name] for row in rows], [row[name] for row in official])
        if name.startswith("global") or name == "total":
            values = [sum(side) / 2 for side in zip(*pairs)]
            assert values[0] == pytest.approx(values[1], abs=tolerance), name
        else:
            for value, theirs in pairs:
                assert value == pytest.approx(theirs, abs=tolerance), name

    for setting in ("stage1", "stage2"):
        rows = [seen[setting][0] for seen in ranks]
        for name in rows[0]:
            check(rows, [r[f"{setting}_gather"] for r in expected["per_rank"]], name)
        norms = expected["mean_grad_norms"][setting]
        for name, norm in norms.items():
            ours = ranks[0][setting][1].get(name)
            if ours is not None:
                assert ours == pytest.approx(norm or 0.0, rel=1e-9, abs=1e-12), name
    for step in range(6):
        rows = [seen["steps"][step] for seen in ranks]
        for name in rows[0]:
            check(rows, [r[step] for r in expected["trajectory_per_rank"]], name)


# ---- any number of boxes and altered copies ----------------------------------------------------


def by_hand(r, t, sizes, scale, margin):
    "The official formulas written out for groups of any size: contrast, ranking."
    groups = t.split(sizes.tolist())
    right = torch.stack([g[0] for g in groups])
    everything = torch.cat([right, *[g[1:] for g in groups]])
    target = torch.arange(len(r))
    contrast = F.cross_entropy(scale * r @ everything.T, target)
    contrast = (contrast + F.cross_entropy(scale * right @ r.T, target)) / 2
    behind = [margin + scale * (g[1:] @ row - g[0] @ row) for row, g in zip(r, groups)]
    return contrast, F.relu(torch.cat(behind)).mean()


@pytest.mark.parametrize("sizes", [[11], [2], [3, 12, 5], [2] * 11, [11] * 9, [4, 7] * 6])
def test_groups_of_any_number_and_size(sizes):
    g = torch.Generator().manual_seed(len(sizes))
    sizes = torch.tensor(sizes)
    r = F.normalize(torch.randn(len(sizes), 12, generator=g, dtype=torch.float64), dim=1)
    t = F.normalize(torch.randn(int(sizes.sum()), 12, generator=g, dtype=torch.float64), dim=1)
    scale = torch.tensor(2.0, dtype=torch.float64)
    contrast, ranking = by_hand(r, t, sizes, scale.exp(), 0.7)
    ours = hard_contrast_loss(3 * r, 2 * t, sizes, scale, duplicates="ignore")
    assert ours.loss.item() == pytest.approx(contrast.item(), abs=1e-12)
    ours = ranking_loss(3 * r, 2 * t, sizes, scale, 0.7)
    assert ours.loss.item() == pytest.approx(ranking.item(), abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2, 9, 10, 11, 40])
def test_any_number_of_boxes(n):
    g = torch.Generator().manual_seed(n)
    r, t = (torch.randn(n, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale = torch.zeros((), dtype=torch.float64)
    spread, region = spread_loss(t), region_loss(r, t, scale)
    (spread.loss + region.loss).backward()
    assert r.grad.isfinite().all() and t.grad.isfinite().all()
    assert spread.rows == region.rows == n
    if n:
        unit = F.normalize(t, dim=1)
        q = (unit @ unit.T).fill_diagonal_(0)
        q = torch.where(q > 0.95, 0.0, q)
        k = min(10, n)
        expected = q.topk(k, 1).values.logsumexp(1).mean().item()
        assert spread.loss.item() == pytest.approx(expected, abs=1e-12)
        assert spread.chance == pytest.approx(math.log(k))


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
def test_a_large_batch_in_bands_is_the_same(duplicates, monkeypatch):
    from fgclip_nb.losses import sigmoid

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    ids = torch.randint(0, 30, (50,), generator=g)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -3.0))

    def run():
        term = sigmoid_loss(a, b, scale, bias, ids, duplicates=duplicates)
        return term, torch.autograd.grad(term.loss, (a, b, scale, bias))

    whole, grads = run()
    monkeypatch.setattr(sigmoid, "tile_for", lambda *_: (7, 7))
    banded, others = run()
    values = whole.as_dict()
    assert banded.as_dict() == pytest.approx(values, abs=1e-9)
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(grads, others))


def test_weights_are_the_official_sum():
    official = recorded("losses")["float64"]["stage2"]
    total = sum(weight * official[name] for name, weight in WEIGHTS.items())
    assert total == pytest.approx(official["total"], abs=1e-12)
