"""The step that trains and the plain step of the benchmark compute the same, whatever a batch
lacks; and a difference is noticed."""

import pytest
import torch

import planted
from fgclip_nb import bench
from fgclip_nb.bench import __main__, batch as batch_room, plain, step, table
from fgclip_nb.losses.table import row_names
from fgclip_nb.model.config import FGCLIPConfig
from fgclip_nb.model.fgclip import FGCLIP


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FGCLIP(FGCLIPConfig(**planted.MICRO)).train()


BATCHES = {
    "full": ([4, 4, 4], [2, 2, 2]),
    "absent slots": ([4, 0, 1, 3], [0, 0, 1, 3]),
    "one box": ([1, 0], [0, 0]),
    "one hard box": ([0, 1], [0, 1]),
    "none": ([0, 0, 0], [0, 0, 0]),
}


def batch_of(model, name):
    return batch_room.bench_batch(model.config.vision_config.image_size, *BATCHES[name])


@pytest.mark.parametrize("kind", ["fast", "apart"])
@pytest.mark.parametrize("name", BATCHES)
def test_fast_and_plain_steps_agree(model, name, kind):
    batch = batch_of(model, name)
    differences = step.compare_steps(
        step.Step(kind, model, batch), step.Step("plain", model, batch)
    )
    assert not step.disagreement(differences), differences


def test_the_parts_make_the_step_of_the_model(model):
    "Features and gradients of the parts are those of `model(batch)` and one backward."
    batch = batch_of(model, "absent slots")
    loss, parts = step.gradients(step.Step("fast", model, batch))
    rows = {k: v for k, v in model(batch).items() if k in row_names()}
    total = step.fast_loss(model, rows, batch)
    total.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert abs(loss - float(total.detach())) <= 1e-6 * abs(loss) and set(parts) == set(whole)
    assert all(torch.allclose(parts[n], whole[n], rtol=1e-4, atol=1e-6) for n in whole)


def test_a_difference_is_noticed(model, monkeypatch, capsys):
    monkeypatch.setattr(
        table, "bench_model", lambda cfg: (model, torch.optim.SGD(model.parameters(), 0.0))
    )
    monkeypatch.setattr(
        table, "setting_batch", lambda cfg, setting, photos=None: batch_of(model, "full")
    )
    monkeypatch.setitem(plain.WEIGHTS, "loss_region", 0.2)  # both read it: still equal
    table.check_agreement(bench.BenchConfig("tiny", device="cpu"), model, "+ boxes")
    real = step.fast_loss
    monkeypatch.setitem(step.KINDS, "fast", (step.fast_parts, lambda *a: real(*a) * 1.0001))
    assert __main__.main(["--quick", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert (
        "the losses differ by 1.0e-04" in said.err
        and "nothing was timed" in said.err
        and "plain / fast" not in said.out
    )


def test_wrong_parameters_are_named(capsys):
    assert __main__.main(["--hard", "9"]) == 2 and "hard is 9" in capsys.readouterr().err
