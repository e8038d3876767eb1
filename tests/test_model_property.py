"""Generated batches (any number of boxes, negatives, lengths, repeated texts, missing parts)
against one sample at a time.

No notebook cell: hypothesis looks for the combination that breaks."""

from functools import lru_cache

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st

from official import EOS, BOS, golden_model, make_batch, plain_image, plain_roi, plain_text

MODEL = golden_model(torch.float64)
WEIGHTS = dict(MODEL.named_parameters())
IMAGES = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@lru_cache(maxsize=4096)
def slow_text(ids, path):
    return plain_text(WEIGHTS, MODEL.config, list(ids), path).detach()


@lru_cache
def slow_image(i):
    return tuple(x.detach() for x in plain_image(WEIGHTS, MODEL.config, IMAGES[i]))


def texts(limit):
    "Texts over few tokens, so that they share beginnings and repeat; some of them long."
    word = st.integers(0, 3)
    middle = st.one_of(
        st.lists(word, max_size=6), st.lists(word, min_size=limit - 4, max_size=limit - 2)
    )
    return middle.map(lambda m: [BOS, *m, EOS])


numbers = st.floats(-0.5, 1.5, width=32)
special = [(0, 0, 1, 1), (0.25, 0.25, 0.75, 0.5), (0.5, 0.5, 0.5, 0.9), (0.9, 0.1, 0.2, 0.5)]
box = st.one_of(st.tuples(numbers, numbers, numbers, numbers), st.sampled_from(special))
region = st.tuples(st.integers(0, 3), box, texts(77), st.lists(texts(77), max_size=12))


@st.composite
def batches(draw):
    """Regions in the order of their images; a region with n negatives heads a group of n + 1 texts,
    with none it has no group."""
    B = draw(st.integers(1, 4))
    regions = sorted(
        (r for r in draw(st.lists(region, max_size=6)) if r[0] < B), key=lambda r: r[0]
    )
    hard = [i for i, r in enumerate(regions) if r[3]]
    long = draw(st.lists(texts(248), min_size=B, max_size=B)) if draw(st.booleans()) else []
    short, boxes = (
        draw(st.lists(texts(77), min_size=B, max_size=B)),
        torch.tensor([r[1] for r in regions]).reshape(-1, 4),
    )
    groups = [[regions[i][2], *regions[i][3]] for i in hard]
    return make_batch(
        IMAGES[:B],
        short,
        long,
        boxes,
        [r[0] for r in regions],
        [r[2] for r in regions],
        groups,
        hard,
    )


def rows(t):
    return [tuple(t.input_ids[i, : t.lengths[i]].tolist()) for i in t.index.tolist()]


def slow_features(batch, text=slow_text, image=slow_image):
    "The same by name, one at a time."
    B, R, short = len(batch), batch.n_regions, [text(ids, "short") for ids in rows(batch.texts)]
    out = dict(
        image_features=[image(i)[0] for i in range(B)],
        text_features=short[:B],
        region_text_features=short[B : B + R],
        hard_text_features=short[B + R :],
        region_features=[
            plain_roi(image(i)[1], b) for i, b in zip(batch.box_image.tolist(), batch.boxes)
        ],
        long_text_features=[text(ids, "long") for ids in rows(batch.long_texts)]
        if batch.long_texts is not None
        else [],
    )
    return {k: torch.stack(v) for k, v in out.items() if v}


@pytest.mark.ci
@settings(max_examples=200, **QUIET)
@given(batches())
def test_any_batch_equals_one_sample_at_a_time(batch):
    with torch.no_grad():
        ours = MODEL(batch)
    expected = slow_features(batch)
    assert set(ours) == {*expected, "logit_scale", "logit_scale_finegraind", "logit_scale_hardneg"}
    for name, e in expected.items():
        assert (ours[name] - e).abs().max() <= (2e-6 if name == "region_features" else 1e-9), name


@settings(max_examples=12, **QUIET)
@given(batches(), st.integers(0, 2**31))
def test_any_gradient_equals_one_sample_at_a_time(batch, seed):
    ours = MODEL(batch)
    expected = slow_features(
        batch,
        lambda ids, path: plain_text(WEIGHTS, MODEL.config, list(ids), path),
        lambda i: plain_image(WEIGHTS, MODEL.config, IMAGES[i]),
    )
    g = torch.Generator().manual_seed(seed)
    weights = {k: torch.randn(v.shape, dtype=v.dtype, generator=g) for k, v in expected.items()}

    def total(features):
        return sum((features[k] * w).sum() for k, w in weights.items())

    a, b = (
        torch.autograd.grad(total(f), list(WEIGHTS.values()), allow_unused=True)
        for f in (ours, expected)
    )
    for name, x, y in zip(WEIGHTS, a, b):
        x, y = (torch.zeros(()) if v is None else v for v in (x, y))
        assert (x - y).norm() <= 1e-6 * y.norm() + 1e-9, name


@settings(max_examples=20, **QUIET)
@given(batches(), st.sampled_from(["float32", "bf16 autocast"]))
def test_any_batch_is_finite_forward_and_backward_in_training_precision(batch, precision):
    model = golden_model()
    batch.pixel_values = batch.pixel_values.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        out = model(batch)
    sum(v.float().pow(2).sum() for v in out.values()).backward()
    assert all(v.isfinite().all() for v in out.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
