"""The memory bank against a plain list, over random pushes.

Not a cell: hypothesis draws hundreds of histories."""

import math
from collections import deque

import pytest, torch
from hypothesis import given, settings, strategies as st

from fgclip_nb.losses.processes import NO_ID, usable_rows
from fgclip_nb.losses.bank import MemoryBank, bank_schedule

D = 3
ROW = st.sampled_from(["good", "good", "good", "zero", "nan", "inf", "zero text"])
HISTORY = st.lists(st.lists(ROW, max_size=9), max_size=8)


def rows_of(kinds, seed):
    g = torch.Generator().manual_seed(seed)
    r, t = (torch.randn(len(kinds), D, generator=g) for _ in range(2))
    for k, kind in enumerate(kinds):
        if kind == "zero":
            r[k] = 0
        if kind in ("nan", "inf"):
            r[k, 1] = float(kind)
        if kind == "zero text":
            t[k] = 0
    return r, t, torch.arange(len(kinds)) + 100 * seed


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 7), st.integers(0, 4), HISTORY)
def test_bank_is_a_bounded_list(size, warmup, history):
    bank, model = MemoryBank(size, D, warmup), deque(maxlen=size)
    pushed = 0
    for step, kinds in enumerate(history, 1):
        bank.tick()
        r, t, ids = rows_of(kinds, step)
        stored, refused = bank.push(r, t, ids, -ids, ids + 7)
        if step < warmup:
            assert (stored, refused, len(bank)) == (0, 0, 0)
            continue
        good = [k for k, kind in enumerate(kinds) if kind == "good"]
        model.extend((step, r[k], t[k], int(ids[k])) for k in good)
        pushed += len(good)
        if size:
            assert (stored, refused) == (min(len(good), size), len(kinds) - len(good))
    e = bank.entries()
    assert len(bank) == len(model) == len(e["age"]) and bank.full == (0 < size == len(model))
    assert bank.ptr == (pushed % size if size else 0)
    if model:
        steps, r, t, ids = zip(*model)
        assert torch.equal(e["region_features"], torch.stack(r)) and torch.equal(
            e["region_text_features"], torch.stack(t)
        )
        assert (
            e["caption_ids"].tolist() == list(ids)
            and e["sample_ids"].tolist() == [-i for i in ids]
            and e["region_ids"].tolist() == [i + 7 for i in ids]
        )
        assert e["age"].tolist() == [len(history) - s for s in steps]
    assert usable_rows(e["region_features"], e["region_text_features"]).all()


@settings(max_examples=40, deadline=None)
@given(HISTORY, HISTORY, st.sampled_from([torch.float32, torch.float64]))
def test_resume_is_bitwise(before, after, dtype):
    def play(bank, history, start):
        for step, kinds in enumerate(history, start):
            bank.tick()
            r, t, ids = rows_of(kinds, step)
            bank.push(r.to(dtype), t.to(dtype), ids, ids)

    straight, first = MemoryBank(5, D, 2), MemoryBank(5, D, 2)
    play(straight, before, 1)
    play(first, before, 1)
    resumed = MemoryBank(5, D, 2)
    resumed.load_state_dict(first.state_dict())
    play(straight, after, len(before) + 1)
    play(resumed, after, len(before) + 1)
    for name, value in straight.state_dict().items():
        other = resumed.state_dict()[name]
        assert torch.equal(value, other) and value.dtype == other.dtype, name


def test_state_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    bank = MemoryBank(4, D, 1)
    bank.tick()
    bank.push(torch.ones(3, D), torch.ones(3, D), torch.arange(3), None)
    save_file(bank.state_dict(), tmp_path / "bank.safetensors")
    other = MemoryBank(4, D, 1)
    other.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    assert (
        other.enabled
        and other.ptr == 3
        and len(other) == 3
        and other.entries()["sample_ids"].tolist() == [NO_ID] * 3
    )


def test_nothing_pushed_requires_grad_and_bf16_is_widened():
    bank = MemoryBank(4, D, 0)
    bank.push(
        torch.ones(1, D, dtype=torch.bfloat16, requires_grad=True),
        torch.ones(1, D, dtype=torch.bfloat16),
        None,
        None,
    )
    e = bank.entries()
    assert not e["region_features"].requires_grad and e["region_features"].dtype == torch.float32


def test_a_copied_bank_is_independent():
    import copy

    a = MemoryBank(2, D, 0)
    b = copy.deepcopy(a)
    b.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in b.state_dict().items()}
    )
    assert b.region_features.dtype == torch.float64 and a.region_features.dtype == torch.float32


@pytest.mark.parametrize("accumulation,step", [(1, 50), (8, 7), (16, 4)])
def test_warm_up_counts_forwards_and_names_the_step(accumulation, step, caplog):
    bank = MemoryBank(8, D, 50)
    with caplog.at_level("INFO", "fgclip_nb"):
        turned_on = [
            f for f in range(1, 121) if bank.tick(optimizer_step=math.ceil(f / accumulation))
        ]
    assert turned_on == [50] and [r.getMessage() for r in caplog.records] == [
        f"[Memory Bank] enabled @ training_step 50 (optimizer step {step})"
    ]
    assert bank_schedule(8, 50, 4, accumulation)["on_step"] == step
