"""A rehearsal of CUDA where there is none: tensors that say cuda:0 and hold data on the CPU.

    python tests/pretend.py OUT [SCENARIO…]      runs scenarios, writes OUT/pretend.json

A pretended tensor refuses to meet a CPU tensor of one or more dimensions and to become a NumPy
array, as a GPU's would. Counted are the places where the host would have to wait for the device,
and the copies to it. What this cannot show: kernels, streams, autocast on CUDA, memory, speed.
torch's CPU build is needed.
"""

import collections
import contextlib
import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
# operations whose result the host needs, or whose shape depends on what the tensors hold
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "bincount",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
LAPACK = {"_linalg_eigh", "_linalg_svd"}  # torch asks them for errors
waits, copies = collections.Counter(), collections.Counter()


def place() -> str:
    "Innermost line of the package on the stack."
    for frame in reversed(traceback.extract_stack()):
        if "/fgclip_nb/" in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "outside"


class There(torch.Tensor):
    "A tensor that says it is on cuda:0; `inside` holds its data."

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device="meta",
        )

    def __init__(self, inside):
        self.inside = inside

    def __repr__(self):
        return f"There({self.inside})"

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return carried_out(op, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for a in args:
            if isinstance(a, str | torch.device):
                device = a
            elif isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, torch.Tensor):
                device, dtype = a.device, a.dtype
        if device is not None and torch.device(device).type == "cpu":
            return Home.apply(self, dtype)
        if dtype is None or dtype == self.dtype:
            return self
        return super().to(dtype)

    def cpu(self, *args):
        return self.to("cpu")

    def __getitem__(self, key):
        if any(isinstance(k, list) for k in (key if isinstance(key, tuple) else (key,))):
            raise TypeError(f"a list as index is copied to the device on the spot, at {place()}")
        return super().__getitem__(key)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"a tensor on cuda:0 becomes no array, at {place()}")

    __array__ = numpy


class Home(torch.autograd.Function):
    "A copy to the host."

    @staticmethod
    def forward(ctx, x, dtype):
        waits[f"to the host {place()}"] += 1
        inside = x.inside.detach().clone()
        return inside if dtype is None else inside.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return There(grad), None


def inside_of(x):
    return x.inside if isinstance(x, There) else x


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def note_wait(name: str, args, kwargs):
    masks = [
        x
        for x in tree_flatten(args[1:])[0]
        if isinstance(x, There) and x.dtype in (torch.bool, torch.uint8)
    ]
    counted = name in WAITING or name in LAPACK or (name in INDEXING and masks and name == "index")
    if counted or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        waits[f"{name} {place()}"] += 1


def carried_out(op, args, kwargs):
    "Do an operation with the data inside, once it is known where its tensors live."
    name = op._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    mine = [x for x in tensors if isinstance(x, There)]
    foreign = [x for x in tensors if not isinstance(x, There) and x.dim()]
    device = kwargs.get("device")
    onto = on_gpu(device) if device is not None else bool(mine)
    if mine:
        note_wait(name, args, kwargs)
    if name == "_to_copy":
        if onto and not mine:
            copies[place()] += 1
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        out = op(inside_of(args[0]), **kwargs)
        return There(out) if onto else out
    if name == "copy_":
        inside_of(args[0]).copy_(inside_of(args[1]))
        if foreign and isinstance(args[0], There):
            copies[place()] += 1
        if foreign and isinstance(args[1], There):
            waits[f"to the host {place()}"] += 1
        return args[0]
    if mine and foreign and name not in INDEXING:
        shapes = [tuple(x.shape) for x in foreign]
        raise RuntimeError(f"{name}: tensors on cuda:0 meet CPU tensors {shapes} at {place()}")
    if on_gpu(device):
        kwargs = dict(kwargs, device=torch.device("cpu"))
    out = op(*tree_map(inside_of, args), **tree_map(inside_of, kwargs))
    known = {id(x.inside): x for x in mine}

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return There(x) if onto else x

    return tree_map(wrapped, out)


class Rehearsal(TorchDispatchMode):
    "While it is on, tensors that are put on cuda are pretended ones."

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return carried_out(op, args, kwargs or {})


def where(condition, *choices, _where=torch.where):
    "torch.where makes numbers into tensors below the dispatcher; here they are made above it."
    if choices and isinstance(condition, There):
        kinds = [x.dtype for x in choices if isinstance(x, torch.Tensor)]
        dtype = kinds[0] if kinds else torch.float32
        choices = [
            x if isinstance(x, torch.Tensor) else There(torch.tensor(x, dtype=dtype))
            for x in choices
        ]
    return _where(condition, *choices)


def to_number(self, *args, _to=torch.Tensor.to, **kwargs):
    "Tensor.to for `cuda` without a number, which torch would ask the driver for."

    def numbered(x):
        bare = isinstance(x, str | torch.device) and str(x) == "cuda"
        return CUDA if bare else x

    return _to(self, *map(numbered, args), **{k: numbered(v) for k, v in kwargs.items()})


def believe():
    "Make torch and accelerate believe in one GPU."
    import accelerate

    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *a, **k: None)
    cuda.reset_peak_memory_stats = lambda *a: None
    cuda.max_memory_allocated = cuda.memory_allocated = cuda.memory_reserved = lambda *a: 1 << 20
    cuda.mem_get_info = lambda *a: (80 << 30, 80 << 30)
    cuda.get_rng_state_all = lambda: []
    cuda.is_bf16_supported = lambda *a, **k: True
    cuda.get_device_capability = lambda *a: (9, 0)
    cuda.get_device_name = lambda *a: "pretended"
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.where = where
    torch.Tensor.to = to_number
    torch.inference_mode = torch.no_grad
    found = accelerate.Accelerator.device.fget
    accelerate.Accelerator.device = property(
        lambda self: CUDA if found(self).type == "cuda" else found(self)
    )
    There.new_tensor = lambda self, data, dtype=None, **k: torch.tensor(
        data, dtype=dtype or self.dtype, device=CUDA
    )


# What is rehearsed


SMALL = dict(batch_size=4, diag_every=4, memory_bank_warmup_steps=2, tracker="none", eval_every=0)
RUNS = {
    "photos": dict(max_steps=9, make_negatives=2, memory_bank_size=40),
    "on_the_cpu": dict(max_steps=9, make_negatives=2, memory_bank_size=40, device="cpu"),
    "positive": dict(max_steps=3, duplicates="positive"),
    "ignore": dict(max_steps=3, duplicates="ignore", memory_bank_size=0),
    "caching": dict(max_steps=4, gradient_caching=3, make_negatives=2),
    "accumulation": dict(max_steps=4, gradient_accumulation_steps=3, batch_size=2),
    "video": dict(max_steps=4, data="video_sample", num_frames=4, batch_size=2),
    "world": dict(max_steps=3, data="world:size=24"),
    "validation": dict(max_steps=4, eval_every=2, save_every=2),
    "trackers": dict(max_steps=5, tracker="tensorboard"),
}


def counted_steps(run):
    "Run something; returns the waits and copies from the end of each step to that of the next."
    from fgclip_nb.training import loop

    ends = []
    real = loop.timed_step

    def step(s, batches):
        done = real(s, batches)
        ends.append((s.step, waits.total(), copies.total()))
        return done

    loop.timed_step = step
    try:
        run()
    finally:
        loop.timed_step = real
    return [dict(step=b[0], waits=b[1] - a[1], copies=b[2] - a[2]) for a, b in zip(ends, ends[1:])]


def a_run(out, name):
    from fgclip_nb import TrainConfig, train

    cfg = TrainConfig(**(SMALL | RUNS[name] | dict(output=str(out / name))))
    return dict(steps=counted_steps(lambda: train(cfg)))


def taken_up_again(params, step, look) -> list:
    """A run that is cut off before the step after `step`, and taken up again from its checkpoint.

    Returns what `look` said of the state there, both times."""
    from fgclip_nb import TrainConfig, train
    from fgclip_nb.training import loop

    real = loop.run_step
    seen = []

    def watched(s, batches):
        if s.step == step:
            seen.append(look(s))
            if len(seen) == 1:
                raise KeyboardInterrupt
        return real(s, batches)

    loop.run_step = watched
    try:
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**params))
        train(TrainConfig(**params))
    finally:
        loop.run_step = real
    return seen


def resumed(out):
    "A run that is cut off after step 4, and taken up again from the checkpoint of step 3."
    params = SMALL | RUNS["photos"] | dict(save_every=3, output=str(out / "resumed"))
    assert taken_up_again(params, 4, lambda s: s.step) == [4, 4]
    return {}


def evaluated(out):
    from fgclip_nb import FGCLIP, FGCLIPConfig, evaluate, load_samples
    from fgclip_nb.evaluation.anomaly import anomaly_scores

    model = FGCLIP(FGCLIPConfig.preset("tiny")).to(CUDA).eval()
    scores = evaluate(model, load_samples("sample")[0][:12])
    anomaly_scores(model, [load_samples("video_sample")[0][0].media], every=64)
    return dict(tasks=str(scores))


def forecast(out):
    from fgclip_nb import TrainConfig
    from fgclip_nb.training.forecast import estimate_rows

    return dict(rows=len(list(estimate_rows(TrainConfig(**SMALL), seconds=1))))


def benched(out):
    from fgclip_nb.bench import BenchConfig, benchmark

    made = benchmark(BenchConfig(model="tiny", batch=2, repeats=1, warmup=0))
    return dict(rows=len(made.times))


def half(out):
    "Precisions with a scaler: its scale goes on where it stood."
    from fgclip_nb.training import state

    state.forward_context = lambda precision, device: contextlib.nullcontext()  # no autocast here
    params = SMALL | dict(precision="fp16", max_steps=4, save_every=2, output=str(out / "half"))
    seen = taken_up_again(params, 2, lambda s: s.scaler.get_scale())
    assert len(set(seen)) == 1, seen
    return dict(scale=seen)


def gpu_parts(out):
    "`make gpu` at tiny size, but for the notebook."
    from fgclip_nb.bench.gpu import run_gpu

    with torch.compiler.set_stance("force_eager"):  # what is pretended cannot be compiled for
        told = run_gpu(out / "gpu", "a,b,c,d,e,f,g")
    wrong = {k: p["failed"] for k, p in told["parts"].items() if "failed" in p}
    assert not wrong, wrong
    assert told["card"] == "pretended"
    return dict(parts={k: len(p["rows"]) for k, p in told["parts"].items()})


OTHERS = dict(
    half=half,
    gpu_parts=gpu_parts,
    resumed=resumed,
    evaluated=evaluated,
    forecast=forecast,
    benched=benched,
)


def main(out, *wanted):
    believe()
    out = Path(out)
    found = {}
    with Rehearsal():
        for name in wanted or [*RUNS, *OTHERS]:
            waits.clear()
            copies.clear()
            try:
                found[name] = OTHERS[name](out) if name in OTHERS else a_run(out, name)
            except Exception:
                found[name] = dict(failed=traceback.format_exc()[-3000:])
            found[name] |= dict(
                waits=dict(waits.most_common(20)), copies=dict(copies.most_common(9))
            )
            (out / "pretend.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
