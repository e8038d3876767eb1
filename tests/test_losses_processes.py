"""1, 2 and 4 gloo processes against one process with the whole batch: losses, gradients, bank and
parameters after ten steps.

Not a cell: it starts processes. Some processes have no region at all, one image has no caption,
captions repeat, groups differ in size."""

import time
from pathlib import Path

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fgclip_nb.losses.processes import gather_rows
from fgclip_nb.losses.bank import MemoryBank
from fgclip_nb.losses.contrast import global_loss, hard_negative_loss, region_loss
from fgclip_nb.losses.objective import compute_losses, push_regions
from fgclip_nb.losses.gradient_caching import gradient_cached_backward
from official import BOS, EOS, golden_model, make_batch

pytestmark = pytest.mark.ci

WEIGHTS = dict(loss_global_short=1.0, loss_global_long=1.0, loss_region=0.1, loss_hard=0.5)
REGIONS = (
    [2, 1, 0, 3, 0, 0, 1, 2],
    [1, 2, 0, 1, 0, 0, 0, 0],
    [0] * 8,
)  # per image; of 2 processes the second, of 4 the third has none
WORLDS, DEADLINE = (1, 2, 4), 600  # seconds; ten are enough on two free cores


def batch_of(step, dtype):
    "Eight images; the counts of regions alternate from step to step."
    g = torch.Generator().manual_seed(step)

    def word(n):
        return [BOS, *torch.randint(0, 500, (n,), generator=g).tolist(), EOS]

    counts = REGIONS[2 if step == 7 else step % 2]
    owner = [i for i, n in enumerate(counts) for _ in range(n)]
    phrases = [word(2 + k % 3) for k in range(len(owner))]
    if len(phrases) > 3:
        phrases[3] = phrases[0]  # a caption that repeats, across processes too
    hard = list(range(0, len(owner), 2))
    groups = [[phrases[k], *[word(3) for _ in range(1 + k)]] for k in hard]
    corners = torch.rand(len(owner), 2, 2, generator=g).sort(1).values.flatten(1)
    short = [word(5) for _ in range(7)]  # the last image has no short caption
    long = [word(25) for _ in range(8)]
    pixels = torch.randn(8, 3, 64, 64, generator=g, dtype=dtype)
    return make_batch(pixels, short, long, corners.reshape(-1, 4), owner, phrases, groups, hard)


def average_gradients(model):
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if dist.is_initialized():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def train(rank, world, steps=10, dtype=torch.float64, chunk=0):
    """A few AdamW steps on this process's part of each batch; everything that must not depend on
    `world`."""
    model, bank = golden_model(dtype), MemoryBank(7, 32, warmup_steps=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = dict(losses=[], values=[], grads=[])

    def loss_fn(features, ids):
        terms = compute_losses(features, ids, bank)
        return sum(WEIGHTS[k] * t.loss for k, t in terms.items()), terms, features

    for step in range(steps):
        part = batch_of(step, dtype).split(8 // world)[rank]
        bank.tick()
        optimizer.zero_grad()
        if chunk:
            _, terms, features = gradient_cached_backward(model, part.split(chunk), loss_fn)
        else:
            total, terms, features = loss_fn(model(part), part)
            total.backward()
        average_gradients(model)
        push_regions(bank, features, part)
        seen["losses"].append({k: t.loss.detach() for k, t in terms.items()})
        seen["values"].append({k: t.as_dict() for k, t in terms.items()})
        if step in (0, 4, 7):
            seen["grads"].append({k: p.grad.clone() for k, p in model.named_parameters()})
        optimizer.step()
    return seen | dict(parameters=dict(model.named_parameters()), bank=bank.state_dict())


def call_functions(rank, world):
    "The losses called directly, with rows of this process only; and the bank pushed directly."
    g = torch.Generator().manual_seed(0)
    sizes = {1: [9], 2: [9, 0], 4: [4, 0, 3, 2]}[world]  # regions per process; the second has none

    def mine(x, counts=sizes):
        return x.split(counts)[rank].clone().requires_grad_(x.is_floating_point())

    r, t, old_r, old_t = (torch.randn(9, 6, generator=g, dtype=torch.float64) for _ in range(4))
    captions, regions = torch.tensor([1, 2, 3, 1, 5, 6, 2, 8, 9]), torch.arange(9)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([1, 2, 3, 4, 2, 1, 5, 2, 2])
    texts = torch.randn(int(groups.sum()), 6, generator=g, dtype=torch.float64)
    bank = MemoryBank(5, 6, 0)
    bank.push(mine(old_r), mine(old_t), mine(captions) + 4, None, mine(regions) + 5)
    a, b, c = mine(r), mine(t), mine(texts, [int(x.sum()) for x in groups.split(sizes)])
    terms = dict(
        g=global_loss(a, b, s, mine(captions), mine(regions)),
        r=region_loss(a, b, s, mine(captions), None, mine(regions), bank),
        h=hard_negative_loss(a, c, mine(groups), s),
    )
    sum(x.loss for x in terms.values()).backward()
    zero = torch.zeros_like
    return dict(
        losses={k: x.loss.detach() for k, x in terms.items()},
        values={k: x.as_dict() for k, x in terms.items()},
        bank=bank.state_dict(),
        scale=s.grad,
        grads=[(x.grad if x.grad is not None else zero(x)) / world for x in (a, b, c)],
    )


def gathered_unevenly(rank, world):
    "gather_rows by itself: values, integer rows, and a gradient that averages to the right one."
    n = [3, 0, 1, 2][:world]
    x = (
        torch.arange(n[rank] * 2, dtype=torch.float64).reshape(-1, 2) + 100 * rank
    ).requires_grad_()
    whole = gather_rows(x)
    whole.pow(2).sum().backward()
    assert torch.equal(x.grad / world, 2 * x.detach()) and len(whole) == sum(n) and whole[0, 0] == 0
    assert gather_rows(torch.full((n[rank],), rank)).tolist() == [
        k for k in range(world) for _ in range(n[k])
    ]
    assert len(gather_rows(x[:0])) == 0


def work(rank, folder):
    """One of four processes; in turn the first alone, the first two and all four form a group
    (starting processes is the slow part)."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous_{world}", rank=rank, world_size=world
        )
        results = dict(
            functions=call_functions(rank, world),
            train=train(rank, world),
            cached=train(rank, world, 5, chunk=3 if world < 4 else 1),
            single=train(rank, world, 1, torch.float32),
        )
        gathered_unevenly(rank, world)
        torch.save(results, Path(folder) / f"{world}_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The folder in which four processes have left what they computed."
    folder = tmp_path_factory.mktemp("processes")
    context, until = (
        mp.start_processes(work, (str(folder),), nprocs=4, join=False, start_method="spawn"),
        time.monotonic() + DEADLINE,
    )
    while not context.join(2):
        if time.monotonic() < until:
            continue
        for p in context.processes:
            p.kill()
        pytest.fail(f"four processes did not finish within {DEADLINE} s")
    return folder


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield dict(
        functions=call_functions(0, 1),
        train=train(0, 1),
        five=train(0, 1, 5),
        single=train(0, 1, 1, torch.float32),
    )
    torch.set_num_threads(threads)


@pytest.fixture(params=WORLDS)
def by_rank(request, folder):
    "What each of 1, 2 or 4 processes computed, in rank order."
    return [
        torch.load(folder / f"{request.param}_{rank}.pt", weights_only=True)
        for rank in range(request.param)
    ]


def near(x, y, rtol=1e-5, atol=1e-9):
    torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


def same_named(x, y, **tolerance):
    assert x.keys() == y.keys()
    for name in x:
        near(x[name], y[name], **(dict(rtol=0, atol=1e-6) if "k_proj.bias" in name else tolerance))


def same_terms(one, other, **tolerance):
    for x, y in zip(one["losses"], other["losses"]):
        same_named(x, y, **tolerance)
    for x, y in zip(one["values"], other["values"]):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k] == pytest.approx(y[k], rel=1e-5, abs=1e-6)


def test_ten_steps_end_in_the_same_parameters_and_bank(by_rank, alone):
    for each in by_rank:
        same_terms(each["train"], alone["train"])
        for x, y in zip(each["train"]["grads"], alone["train"]["grads"]):
            same_named(x, y)
        same_named(each["train"]["parameters"], alone["train"]["parameters"], atol=1e-8)
        same_named(each["train"]["bank"], alone["train"]["bank"])
    assert len(alone["train"]["bank"]["born"]) == 7 and bool(alone["train"]["bank"]["on"])
    assert set(alone["train"]["losses"][0]) == set(WEIGHTS) and set(
        alone["train"]["losses"][7]
    ) == {"loss_global_short", "loss_global_long"}


def test_every_process_reports_the_same_bitwise(by_rank):
    for each in by_rank[1:]:
        for x, y in zip(each["train"]["losses"], by_rank[0]["train"]["losses"]):
            assert all(torch.equal(x[k], y[k]) for k in y)
        assert all(
            torch.equal(each["train"]["bank"][k], v) for k, v in by_rank[0]["train"]["bank"].items()
        )


def test_gradient_caching_within_each_process(by_rank, alone):
    for each in by_rank:
        same_terms(each["cached"], alone["five"])
        same_named(each["cached"]["parameters"], alone["five"]["parameters"], atol=1e-8)
        same_named(each["cached"]["bank"], alone["five"]["bank"])


def test_losses_and_gradients_in_float32(by_rank, alone):
    for each in by_rank:
        same_terms(each["single"], alone["single"], rtol=1e-5, atol=1e-6)
        for name, g in alone["single"]["grads"][0].items():
            assert (each["single"]["grads"][0][name] - g).norm() <= 1e-4 * g.norm() + 1e-6, name


def test_called_directly_the_losses_and_the_bank_gather(by_rank, alone):
    for each in by_rank:
        same_named(each["functions"]["losses"], alone["functions"]["losses"], rtol=1e-12)
        same_named(each["functions"]["bank"], alone["functions"]["bank"])
        near(each["functions"]["scale"], alone["functions"]["scale"])
    for k, whole in enumerate(alone["functions"]["grads"]):
        near(torch.cat([each["functions"]["grads"][k] for each in by_rank]), whole)
