"""Gradient caching with the real model: any chunk size, all loss terms together, dropout, bank,
random state. Not a cell: it compares whole gradients many times."""

import pytest, torch
from hypothesis import given, settings, strategies as st

from fgclip_nb.losses.bank import MemoryBank
from fgclip_nb.losses.objective import batch_ids, compute_losses, merge_ids
from fgclip_nb.losses.gradient_caching import gradient_cached_backward
from official import golden_model
from test_losses_processes import WEIGHTS, batch_of

MODEL = golden_model(torch.float64)


def loss_fn(features, ids, bank=None):
    terms = compute_losses(features, ids, bank)
    return sum(WEIGHTS[k] * t.loss for k, t in terms.items()), terms


def gradients(model):
    return {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}


def undivided(model, batch, bank=None):
    model.zero_grad(set_to_none=True)
    total, terms = loss_fn(model(batch), batch, bank)
    total.backward()
    return total.detach(), gradients(model)


def filled_bank():
    bank, g = MemoryBank(6, 32, 0), torch.Generator().manual_seed(9)
    bank.push(
        torch.randn(6, 32, generator=g, dtype=torch.float64),
        torch.randn(6, 32, generator=g, dtype=torch.float64),
        torch.arange(6),
        torch.arange(6),
    )
    return bank


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 8), st.integers(1, 9), st.booleans())
def test_exact_at_any_chunk_size(step, chunk, with_bank):
    batch, bank = batch_of(step, torch.float64), filled_bank() if with_bank else None
    total, expected = undivided(MODEL, batch, bank)
    MODEL.zero_grad(set_to_none=True)
    cached, terms = gradient_cached_backward(
        MODEL, batch.split(chunk), lambda f, ids: loss_fn(f, ids, bank)
    )
    torch.testing.assert_close(cached.detach(), total, rtol=1e-10, atol=0)
    assert terms["loss_global_long"].candidates == 8
    for name, g in gradients(MODEL).items():
        if expected[name] is None:
            assert g is None or not g.any(), name
        else:
            torch.testing.assert_close(g, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_adds_to_the_gradients_that_are_there():
    batch = batch_of(0, torch.float64)
    _, expected = undivided(MODEL, batch)
    gradient_cached_backward(MODEL, batch.split(3), loss_fn)
    for name, g in gradients(MODEL).items():
        if g is not None:
            torch.testing.assert_close(g, 2 * expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_dropout_draws_the_same_masks_twice(chunk):
    "Reference: every chunk with its activations in memory, one loss, one backward."
    model = golden_model(torch.float64).train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.2  # attention dropout
    chunks = batch_of(0, torch.float64).split(chunk)
    torch.manual_seed(5)
    parts = [model(c) for c in chunks]
    whole = {
        k: torch.cat([p[k] for p in parts if k in p]) if k.endswith("features") else v
        for p in parts
        for k, v in p.items()
    }
    assert parts[0]["image_features"].ne(MODEL(chunks[0])["image_features"]).any(), (
        "dropout is off: this test would prove nothing"
    )
    loss_fn(whole, merge_ids([batch_ids(c) for c in chunks]))[0].backward()
    expected, after = gradients(model), torch.rand(1)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    gradient_cached_backward(model, chunks, loss_fn)
    assert torch.equal(torch.rand(1), after)
    for name, g in gradients(model).items():
        if g is not None:
            torch.testing.assert_close(g, expected[name], rtol=1e-7, atol=1e-9)


def test_autocast_and_ids_of_a_split_batch():
    batch = batch_of(0, torch.float64)
    whole, merged = batch_ids(batch), merge_ids([batch_ids(c) for c in batch.split(3)])
    for name in set(vars(whole)) - {"host"}:
        assert torch.equal(getattr(whole, name), getattr(merged, name)), name
    model, batch = golden_model(torch.float32), batch_of(0, torch.float32)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        features = model(batch)
    loss_fn(features, batch)[0].backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    gradient_cached_backward(model, batch.split(3), loss_fn, autocast=autocast)
    for name, g in gradients(model).items():
        if g is not None and "k_proj.bias" not in name and g.norm() > 1e-3:
            assert (g - expected[name]).norm() < 0.1 * g.norm(), name
