"""Losses against a slow row-by-row reference over random shapes, the reference implementation's
own numbers, and large N.

Not cells: hypothesis draws hundreds of cases, and memory is measured in a process of its own."""

import json, math, os, subprocess, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fgclip_nb import losses as L
from fgclip_nb.losses import contrast, pairs
from fgclip_nb.losses.bank import MemoryBank

ROOT = Path(__file__).resolve().parent.parent
MODES = ("mask", "positive", "ignore")


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def one_direction(queries, keys, scale, mode, equal):
    """Loss, and what is counted, of each query i among `keys` (right: key i); equal[i] = other keys
    that equal it. Plain Python."""
    out = []
    for i, q in enumerate(queries):
        cosines = [float(q @ k) for k in keys]
        kept = [j for j in range(len(keys)) if mode != "mask" or j not in equal[i]]
        wrong = [
            cosines[j]
            for j in range(len(keys))
            if j != i and (mode == "ignore" or j not in equal[i])
        ]
        right = [i, *equal[i]] if mode == "positive" else [i]
        lse = math.log(sum(math.exp(scale * cosines[j]) for j in kept))
        ties = sum(w >= cosines[i] - 1e-12 for w in wrong)
        out.append(
            dict(
                loss=lse - scale * sum(cosines[j] for j in right) / len(right),
                chance=math.log(len(kept)),
                floor=math.log(1 + len(equal[i])),
                masked=len(keys) - len(kept),
                hardest=max(wrong, default=None),
                top1=0 if any(w > cosines[i] + 1e-12 for w in wrong) else 1 / (1 + ties),
                positive=cosines[i],
            )
        )
    return out


def slow(r, t, scale, mode, ids, bank_r, bank_t, bank_ids):
    n, all_ids = len(r), ids + bank_ids
    equal = [
        [
            j
            for j in range(len(all_ids))
            if j != i and any(x == y for x, y in zip(ids[i], all_ids[j]))
        ]
        for i in range(n)
    ]
    return one_direction(r, torch.cat([t, bank_t]), scale, mode, equal) + one_direction(
        t, torch.cat([r, bank_r]), scale, mode, equal
    )


def mean(xs):
    return sum(xs) / len(xs)


@st.composite
def cases(draw):
    n, k, d = draw(st.integers(1, 7)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    ids = [(draw(st.integers(0, 4)), draw(st.integers(0, 12))) for _ in range(n + k)]
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    r, t = (torch.randn(n + k, d, dtype=torch.float64, generator=g) * 3 for _ in range(2))
    return n, r, t, ids, draw(st.sampled_from(MODES)), draw(st.floats(-1, 4.6))


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 4), st.integers(1, 4))
def test_region_loss_is_the_slow_one_dense_and_tiled(case, rows, columns):
    n, r, t, ids, mode, log_scale = case
    captions, regions = (torch.tensor([i[c] for i in ids]) for c in (0, 1))
    bank = MemoryBank(max(len(r) - n, 1), r.shape[1], 0)
    bank.push(r[n:], t[n:], captions[n:], None, regions[n:])
    expected = slow(
        unit(r[:n]),
        unit(t[:n]),
        math.exp(log_scale),
        mode,
        ids[:n],
        unit(r[n:]),
        unit(t[n:]),
        ids[n:],
    )
    alone = slow(unit(r[:n]), unit(t[:n]), math.exp(log_scale), mode, ids[:n], r[:0], t[:0], [])
    results = []
    for tile in (None, (rows, columns)):
        a, b, s = (
            r[:n].clone().requires_grad_(),
            t[:n].clone().requires_grad_(),
            torch.tensor(log_scale, dtype=torch.float64, requires_grad=True),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contrast, "tile_for", lambda *args, tile=tile: tile)
            term = L.region_loss(a, b, s, captions[:n], None, regions[:n], bank, mode)
        term.loss.backward()
        results.append((term, a.grad, b.grad, s.grad))
        assert term.loss.item() == pytest.approx(
            mean([e["loss"] for e in expected]), rel=1e-9, abs=1e-9
        )
        assert term.in_batch.item() == pytest.approx(
            mean([e["loss"] for e in alone]), rel=1e-9, abs=1e-9
        )
        assert term.chance == pytest.approx(
            mean([e["chance"] for e in expected])
        ) and term.chance_in_batch == pytest.approx(mean([e["chance"] for e in alone]))
        assert term.floor == pytest.approx(
            mean([e["floor"] for e in expected])
        ) and term.top1 == pytest.approx(mean([e["top1"] for e in expected]))
        assert term.positive_cosine == pytest.approx(mean([e["positive"] for e in expected]))
        assert term.masked_share == pytest.approx(
            mean([e["masked"] for e in expected]) / max(len(r) - 1, 1)
        )
        hardest = [e["hardest"] for e in expected if e["hardest"] is not None]
        assert (
            term.hardest_negative_cosine == pytest.approx(mean(hardest))
            if hardest
            else math.isnan(term.hardest_negative_cosine)
        )
        assert (term.candidates, term.candidates_in_batch, term.rows) == (len(r), n, n)
    for x, y in zip(*(result[1:] for result in results)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_bank_is_its_rows_appended_forward_and_backward(case):
    n, r, t, ids, mode, log_scale = case
    captions, s = torch.tensor([i[0] for i in ids]), torch.tensor(log_scale, dtype=torch.float64)
    bank = MemoryBank(max(len(r) - n, 1), r.shape[1], 0)
    bank.push(r[n:], t[n:], captions[n:], None)
    a, b = (x[:n].clone().requires_grad_() for x in (r, t))
    L.region_loss(a, b, s, captions[:n], bank=bank, duplicates=mode).loss.backward()
    c, d = (x[:n].clone().requires_grad_() for x in (r, t))
    same = (captions[:n, None] == captions[None]) & ~torch.eye(n, len(r), dtype=torch.bool)
    sides = [
        s.exp() * unit(x) @ unit(torch.cat([y, old[n:]])).T for x, y, old in ((c, d, t), (d, c, r))
    ]
    (sum(pairs.row_losses(x, same, mode).mean() for x in sides) / 2).backward()
    torch.testing.assert_close(a.grad, c.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(b.grad, d.grad, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.01, 100.0))
def test_norms_do_not_matter_and_masking_never_costs(case, factor):
    n, r, t, ids, mode, log_scale = case
    s, ids = torch.tensor(log_scale, dtype=torch.float64), torch.tensor([i[0] for i in ids])
    one, two = (L.global_loss(x, t, s, ids, duplicates=mode) for x in (r, r * factor))
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-9, atol=1e-9)
    loss = {m: L.global_loss(r, t, s, ids, duplicates=m).loss for m in MODES}
    assert loss["mask"] <= loss["ignore"] + 1e-12
    order = torch.randperm(len(r), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        L.global_loss(r[order], t[order], s, ids[order], duplicates=mode).loss,
        one.loss,
        rtol=1e-9,
        atol=1e-9,
    )


@settings(max_examples=60, deadline=None)
@given(
    cases(), st.lists(st.sampled_from(["zero", "nan", "inf", "zero text"]), min_size=1, max_size=4)
)
def test_rows_without_direction_change_nothing(case, kinds):
    n, r, t, ids, mode, log_scale = case
    s, captions = torch.tensor(log_scale, dtype=torch.float64), torch.tensor([i[0] for i in ids])
    bad_r, bad_t = (torch.ones(len(kinds), r.shape[1], dtype=torch.float64) for _ in range(2))
    for k, kind in enumerate(kinds):
        (bad_t if kind == "zero text" else bad_r)[k] = 0 if kind.startswith("zero") else float(kind)
    a, b = torch.cat([bad_r, r]).requires_grad_(), torch.cat([bad_t, t]).requires_grad_()
    c, d = r.clone().requires_grad_(), t.clone().requires_grad_()
    with_bad = L.region_loss(
        a, b, s, torch.cat([captions[:1].expand(len(kinds)), captions]), duplicates=mode
    )
    without = L.region_loss(c, d, s, captions, duplicates=mode)
    with_bad.loss.backward()
    without.loss.backward()
    assert (
        with_bad.dropped == len(kinds)
        and torch.equal(with_bad.loss, without.loss)
        and with_bad.values == pytest.approx(without.values, nan_ok=True)
    )
    for x, y in ((a, c), (b, d)):
        assert torch.equal(x.grad, torch.cat([torch.zeros_like(bad_r), y.grad]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 5),
    st.floats(-1, 4.6),
    st.integers(0, 10**6),
)
def test_hard_groups_are_the_mean_of_their_parts(sizes, d, log_scale, seed):
    g = torch.Generator().manual_seed(seed)
    r, t = (
        torch.randn(k, d, dtype=torch.float64, generator=g).requires_grad_()
        for k in (len(sizes), sum(sizes))
    )
    s = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
    term = L.hard_negative_loss(r, t, torch.tensor(sizes), s)
    parts = [
        F.cross_entropy(s.exp() * unit(q) @ unit(x).T, torch.tensor(0))
        for q, x in zip(r, t.split(sizes))
        if len(x) > 1
    ]
    assert (term.rows, term.dropped) == (len(parts), sizes.count(1))
    grads = torch.autograd.grad(term.loss, (r, t, s), allow_unused=True)
    if not parts:
        assert term.loss == 0 and all(x is None or (x == 0).all() for x in grads)
        return
    expected = torch.stack(parts).mean()
    torch.testing.assert_close(term.loss, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(grads, torch.autograd.grad(expected, (r, t, s))):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    assert term.chance == pytest.approx(
        mean([math.log(k) for k in sizes if k > 1])
    ) and term.candidates == pytest.approx(mean([k for k in sizes if k > 1]))


def test_hard_groups_with_vectors_without_direction_are_left_out():
    r, t, s = torch.randn(4, 5), torch.randn(12, 5), torch.tensor(3.0)
    r[1], t[7] = 0, float("nan")  # groups 1 and 2
    r, t = r.requires_grad_(), t.requires_grad_()
    term = L.hard_negative_loss(r, t, torch.tensor([3, 3, 3, 3]), s)
    term.loss.backward()
    keep = [0, 1, 2, 9, 10, 11]
    assert term.dropped == 2
    torch.testing.assert_close(
        term.loss, L.hard_negative_loss(r[[0, 3]], t[keep], torch.tensor([3, 3]), s).loss
    )
    assert r.grad.isfinite().all() and t.grad.isfinite().all() and (r.grad[1:3] == 0).all()


def test_autocast_does_not_touch_logits():
    r, t, s = torch.randn(40, 16), torch.randn(40, 16), torch.tensor(4.6052)
    sizes = torch.full((20,), 2)
    for f in (lambda: L.global_loss(r, t, s), lambda: L.hard_negative_loss(r[:20], t, sizes, s)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = f().loss
        assert torch.equal(inside, f().loss)
    assert L.global_loss(r.bfloat16(), t.bfloat16(), s).loss.dtype == torch.float32


def test_large_losses_say_so_once(caplog, monkeypatch):
    monkeypatch.setattr(contrast, "DENSE_LIMIT", 99)
    contrast._say_tiled.cache_clear()
    with caplog.at_level("INFO", "fgclip_nb"):
        for n in (9, 10, 11):
            L.global_loss(torch.randn(n, 4), torch.randn(n, 4), torch.tensor(1.0))
    assert [r.getMessage() for r in caplog.records] == [
        "contrastive losses of more than 99 logits are computed in tiles of 1024 x 1024, never "
        "holding the matrix"
    ]


def golden_folder():
    folders = [
        p / "golden_a"
        for p in (ROOT / "tests/goldens", ROOT.parent / "shared/goldens")
        if (p / "golden_a/losses.json").exists()
    ]
    return folders[0] if folders else pytest.skip("tests/goldens/golden_a is not there")


@pytest.mark.parametrize(
    "precision,short,atol", [("float32", "f32", 5e-6), ("float64", "f64", 1e-12)]
)
def test_the_reference_s_own_losses(precision, short, atol):
    from safetensors.torch import load_file

    folder = golden_folder()
    i, o, w = (
        load_file(folder / f"{name}.safetensors")
        for name in ("inputs", f"outputs_{short}", "model")
    )
    expected = json.loads((folder / "losses.json").read_text())[precision]["stage2"]

    def scale(name):
        return w[name].to(o["image_features"].dtype)

    def valid(counts):
        return torch.cat([4 * k + torch.arange(int(c)) for k, c in enumerate(counts)])

    boxes, hard = valid(i["box_nums"]), valid(i["hard_nums"])
    off = MemoryBank(128, 32, 50)
    terms = dict(
        global_short=L.global_loss(
            o["image_features"], o["text_features_short"], scale("logit_scale"), duplicates="ignore"
        ),
        global_long=L.global_loss(
            o["image_features"], o["text_features_long"], scale("logit_scale"), duplicates="ignore"
        ),
        region=L.region_loss(
            o["image_box_roi_features_box"][boxes],
            o["text_features_box"][boxes],
            scale("logit_scale_finegraind"),
            bank=off,
            duplicates="ignore",
        ),
        hard=L.hard_negative_loss(
            o["image_box_roi_features_hard"][hard],
            o["text_features_hard"],
            torch.full((len(hard),), 11),
            scale("logit_scale_hardneg"),
        ),
    )
    for name, term in terms.items():
        assert term.loss.item() == pytest.approx(expected[name], abs=atol), name
    total = (
        terms["global_long"].loss
        + terms["global_short"].loss
        + 0.1 * terms["region"].loss
        + 0.5 * terms["hard"].loss
    )
    assert total.item() == pytest.approx(expected["total"], abs=2 * atol)


LARGE = """
import resource, sys, time, torch
from fgclip_nb.losses import contrast as L
n, d, limit = (int(x) for x in sys.argv[1:4])
L.DENSE_LIMIT = limit or L.DENSE_LIMIT
a, b = (torch.randn(n, d, requires_grad=True) for _ in range(2))
s = torch.tensor(4.6, requires_grad=True)
ids = torch.randint(0, n, (n,))
L.global_loss(torch.randn(64, d), torch.randn(64, d), s).loss.backward(); s.grad = None
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
before, begun = peak(), time.process_time()
L.global_loss(a, b, s, ids).loss.backward()
print(peak() - before, time.process_time() - begun)
"""


def measured(n, d, limit=0):
    """(extra peak GiB, processor seconds on one core) of a forward and backward in a fresh process.

    `limit`: logits up to which the dense form is used."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, *map(str, (n, d, limit))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    return tuple(float(x) for x in done.stdout.split())


def test_memory_grows_with_rows_not_with_their_square():
    assert measured(6000, 32)[0] < 0.12  # dense: about 0.6 GiB


@pytest.mark.long
def test_large_n():
    extra, seconds = measured(65_536, 512)
    print(f"N=65,536, D=512, float32: {extra:.2f} GiB extra, {seconds:.0f} s")
    assert extra < 1.0


@pytest.mark.long
def test_tiled_is_at_most_half_as_slow_again_as_dense():
    n = 8192
    tiled, dense = (min(measured(n, 512, limit)[1] for _ in range(3)) for limit in (1, n * n))
    print(f"N={n}: tiled {tiled:.2f} s, dense {dense:.2f} s")
    assert tiled < 1.5 * dense
