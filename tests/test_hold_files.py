"""Model files, run folders and logs that were made to harm: nothing is run, nothing takes for
ever, and every refusal is a sentence that names the file.

No notebook cell: crafted archives and dozens of broken files."""

import contextlib
import copy
import gzip
import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fgclip_nb.batches.loading import plot_samples
from fgclip_nb.core.folder import Run
from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.core.plain import plain_line
from fgclip_nb.data.samples import Region, Sample
from fgclip_nb.model.config import FGCLIPConfig
from fgclip_nb.model.fgclip import FGCLIP
from fgclip_nb.model.openai import read_openai
from fgclip_nb.training.preparation import file_logger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# A TorchScript archive is read and not run


class Inner(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2).to(dtype))
        self.register_parameter("bias", None)
        self.register_buffer("turned", torch.arange(6).view(2, 3).T)

    def forward(self, x: torch.Tensor):
        return x


class Honest(nn.Module):
    "Shared weights, a view of larger storage, empty and scalar tensors, attributes of many kinds."

    def __init__(self):
        super().__init__()
        self.small = Inner(torch.float16)
        self.rest = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.twice = self.rest[0].weight
        self.same = self.small
        large = torch.randn(10, 10, dtype=torch.float64)
        self.register_buffer("part", large[2:5, ::3])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("brain", torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.plain = torch.ones(5)
        self.texts = ["a", "b"]
        self.table = {"x": 2**40}
        self.numbers = [1, 2, 3]
        self.tensors = [torch.ones(1), torch.zeros(2)]
        self.pair = (1, 2.5, None, -7)
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor):
        return self.rest(x) + torch.ones(4)


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


@pytest.mark.parametrize("module", [Honest, lambda: nn.MultiheadAttention(8, 2)])
def test_an_honest_archive_gives_what_torch_gives(tmp_path, module):
    path = script(module(), tmp_path / "model.pt")
    ours, theirs = read_openai(path), torch.jit.load(path).state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_a_traced_archive_gives_what_torch_gives(tmp_path):
    torch.jit.trace(Honest().eval(), torch.ones(2, 3)).save(str(tmp_path / "traced.pt"))
    ours, theirs = (
        read_openai(tmp_path / "traced.pt"),
        torch.jit.load(tmp_path / "traced.pt").state_dict(),
    )
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


class Restoring(nn.Module):
    "Its `__setstate__` writes a file."

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.weight = torch.from_file(state[0], True, 2).copy_(state[1])
        self.training = state[2]


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda m: m, Holder, lambda m: nn.Sequential(Holder(m))])
def test_setstate_of_an_archive_is_not_run(tmp_path, wrap):
    harmed = tmp_path / "harmed"
    path = script(wrap(Restoring(str(harmed))), tmp_path / "evil.pt")
    for load in (read_openai, FGCLIP.from_openai):
        with pytest.raises(DataError, match="evil.pt.*nothing of the archive was run.*convert"):
            load(path)
    assert not harmed.exists()
    torch.jit.load(path)
    assert harmed.exists()  # the archive is as evil as it should be


def test_an_archive_named_like_transformers_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    script(Restoring(str(tmp_path / "harmed")), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="pytorch_model.bin.*TorchScript archive.*convert"):
        FGCLIP.from_clip(tmp_path)
    assert not (tmp_path / "harmed").exists()


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    "A copy of a zip whose entries went through `change(name, bytes)`; None leaves one out."
    other = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", compression) as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return other


class Calling:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickles(harmed):
    "Pickles that would do something, end late, or fill the memory."
    nested = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    return {
        "a call": pickle.dumps(Calling(harmed), protocol=2),
        "an object": f"\x80\x02(S'touch {harmed}'\nios\nsystem\n.".encode("latin1"),
        "an extension": b"\x80\x02\x82\x01.",
        "a global": b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x001 + 1\x85R.",
        "a class": b"\x80\x02ctorch.nn\nModule\n)\x81}b.",
        "a far place in memory": b"\x80\x02Nr\xff\xff\xff\xff0.",
        "a long text": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "deep tuples": nested,
        "nothing": b"",
        "a torn end": b"\x80\x02(",
        "no module": b"\x80\x02N.",
        "an object in itself": b"\x80\x02c__torch__\nHolder\n)\x81q\x00}"
        b"X\x05\x00\x00\x00innerh\x00sb.",
    }


@pytest.mark.parametrize("kind", list(pickles("")))
def test_hostile_pickles_in_an_archive(tmp_path, kind):
    harmed = tmp_path / "harmed"
    path = script(Holder(nn.Linear(2, 2)), tmp_path / "honest.pt")
    data = pickles(harmed)[kind]
    changed = rewritten(path, lambda n, old: data if n.endswith("/data.pkl") else old)
    with pytest.raises(DataError, match="changed.pt: not a readable TorchScript archive"):
        read_openai(changed)
    assert not harmed.exists()


def with_numbers(path, count=4, offset=0, size=(2, 2), stride=(2, 1)):
    "Pickle of a Linear(2, 2) whose weight says this about itself."
    out = io.BytesIO()
    with zipfile.ZipFile(path) as archive:
        start = archive.read("honest/data.pkl").partition(b"q")[0]  # its class's name varies
    out.write(start + b")\x81}(X\x06\x00\x00\x00weight")
    out.write(
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    )
    out.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu")

    def number(n):
        digits = n.to_bytes(9, "little", signed=True)
        out.write(b"\x8a\x09" + digits)

    number(count)
    out.write(b"tQ")
    number(offset)
    for sides in (size, stride):
        out.write(b"(")
        [number(n) for n in sides]
        out.write(b"t")
    out.write(b"\x89}tRub.")
    return out.getvalue()


@pytest.mark.parametrize(
    "sizes",
    [
        dict(count=2**60),
        dict(count=-1),
        dict(offset=1),
        dict(offset=-1),
        dict(size=(2**31, 2**31), stride=(0, 0)),
        dict(size=(2, 2), stride=(2**61, 2**61)),
        dict(size=(-2, -2)),
        dict(size=(2,)),
        dict(size=(1,) * 100, stride=(1,) * 100),
    ],
)
def test_sizes_are_held_against_the_numbers_there_are(tmp_path, sizes):
    path = script(nn.Linear(2, 2), tmp_path / "honest.pt")

    def changed(**sizes):
        data = with_numbers(path, **sizes)
        return rewritten(path, lambda n, old: data if n.endswith("/data.pkl") else old)

    assert torch.equal(read_openai(changed())["weight"], read_openai(path)["weight"])
    with pytest.raises(DataError, match="changed.pt: not a readable TorchScript archive"):
        read_openai(changed(**sizes))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_are_more_than_they_seem(tmp_path):
    path = script(nn.Linear(2, 2), tmp_path / "honest.pt")
    bomb = rewritten(
        path, lambda n, old: bytes(64 << 20) if n.endswith("/data/0") else old, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(DataError, match="would unpack to"):
        read_openai(bomb)
    double = tmp_path / "double.pt"
    double.write_bytes(path.read_bytes())
    with zipfile.ZipFile(double, "a") as archive:
        archive.writestr("honest/data.pkl", b"N.")
    with pytest.raises(DataError, match="two entries of one name"):
        read_openai(double)
    for lacking in ("/data.pkl", "/data/0", ".py"):
        torn = rewritten(path, lambda n, old, end=lacking: None if n.endswith(end) else old)
        with pytest.raises(DataError, match="lacks code/" if lacking == ".py" else lacking[1:]):
            read_openai(torn)


def test_bytes_of_any_kind_are_a_sentence(tmp_path):
    path = script(Holder(nn.Linear(2, 2)), tmp_path / "honest.pt")
    data = path.read_bytes()
    changed = tmp_path / "changed.pt"
    for i in range(0, len(data), 61):
        changed.write_bytes(data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :])
        try:
            read_openai(changed)
        except DataError as e:
            assert "changed.pt" in str(e)


# Run folders of wrong shape

NESTED = "[" * 100_000
BILLION = "a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    "name, content, read",
    [
        *[
            ("params.yaml", c, Run.params)
            for c in (
                "- 1\n",
                "- " * 30_000,
                "3: 4\n",
                "a: [",
                "text",
                "a: 2001-99-99",
                "\x00",
                BILLION,
                NESTED,
            )
        ],
        *[
            (f"{file}.json", c, read)
            for file, read in (("manifest", Run.manifest), ("finished", Run.summary))
            for c in ("[]", "null", "3", '"x"', "", "{", NESTED, '{"a": ' + "9" * 5000 + "}")
        ],
        ("manifest.json", '{"versions": [1]}', Run.manifest),
        ("manifest.json", '{"load_report": "none"}', Run.manifest),
        *[
            (f"{file}.json", c, read)
            for file, read in (("verdicts", Run.verdicts), ("expectations", Run.expectations))
            for c in ("{}", "null", "3", "[3]", "[{}]", '[{"name": 3}]', "[", NESTED)
        ],
        *[
            (f"{file}.jsonl", c + "\n", read)
            for file, read in (("metrics", Run.metrics), ("timing", Run.timing))
            for c in (
                "[1]",
                "null",
                "3",
                "{}",
                '{"loss": 1}',
                '{"step": "1"}',
                '{"step": 1.5}',
                '{"step": true}',
                '{"step": 1, "loss": [1]}',
                '{"step": 1, "loss": {}}',
                '{"step": 1, "loss": 1}\n{"step": 2, "loss": "low"}',
                '{"step": 1, "loss": ' + "9" * 400 + "}",
                NESTED,
            )
        ],
    ],
)
def test_a_run_folder_of_wrong_shape_is_a_sentence(tmp_path, name, content, read):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}")):
        read(Run(tmp_path))


def test_bytes_that_are_no_text_and_folders_are_a_sentence(tmp_path):
    run = Run(tmp_path)
    for name, read in (
        ("params.yaml", run.params),
        ("manifest.json", run.manifest),
        ("verdicts.json", run.verdicts),
        ("metrics.jsonl", run.metrics),
    ):
        (tmp_path / name).write_bytes(b"\xff\xfe{}\n\n")
        with pytest.raises(DataError, match=name):
            read()
        (tmp_path / name).unlink()
    for name, read in (("params.yaml", run.params), ("manifest.json", run.manifest)):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=name):
            read()


def test_a_packed_table_that_fills_the_memory_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(b" " * (200 << 20)))
    with pytest.raises(DataError, match="metrics.jsonl.gz.*unpack to more than"):
        Run(tmp_path).metrics()


# Names and values in logs and figures

FORGED = (
    "a.jpg\n[VERDICT] PASS            all is well",
    "a.jpg\r\n[LOSS] Step 5 loss=0.1",
    "a.jpg\x0b[VERDICT] PASS",
    "a.jpg\x1c[VERDICT] PASS",
    "a.jpg\x85[VERDICT] PASS",
    "a.jpg\u2028[VERDICT] PASS",
    "\x1b[2K\x1b[1G[VERDICT] PASS",
    "\x9b2K[VERDICT] PASS",
    "a\b\b\b\b[VERDICT] PASS",
    "a\u202eSSAP",
    "nothing \x00",
)


@pytest.mark.parametrize("name", FORGED, ids=ascii)
def test_a_name_writes_one_line_of_the_log(tmp_path, name):
    log, handler = file_logger(tmp_path, True)
    try:
        log.warning(f"{name}: not loaded")
        log.warning("%s: not loaded", name)
        log.info("[LOSS] Step 1")
    finally:
        log.removeHandler(handler)
        handler.close()
    lines = (tmp_path / "training.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and lines[2] == "[LOSS] Step 1"
    assert all(line.endswith("not loaded") and line.isprintable() for line in lines[:2])


@pytest.mark.parametrize(
    "text", ["$_$", "$5 and $3", r"\$_$", "$\\frac$ $", "a\ud83d$^$", "\x1b[1m"], ids=ascii
)
def test_captions_and_phrases_are_drawn_as_they_are_written(tmp_path, text):
    import matplotlib

    matplotlib.use("Agg")
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    region = Region(text, box=(0.1, 0.1, 0.9, 0.9), negatives=(text + "x",))
    sample = Sample(id=text, media=str(tmp_path / "a.png"), captions=(text,), regions=[region])
    fig = plot_samples([sample])
    fig.canvas.draw()
    drawn = [t for ax in fig.axes for t in (ax._left_title, *ax.texts)]
    assert len(drawn) == 2
    for t in drawn:
        shown, as_math = t._preprocess_math(t.get_text())
        assert not as_math and shown == plain_line(text)


# Model folders of wrong shape

TOWER = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
TEXT = dict(TOWER, vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=99)
VISION = dict(TOWER, image_size=32, patch_size=16)
CONFIG = dict(projection_dim=16, text_config=TEXT, vision_config=VISION)


@pytest.fixture(scope="module")
def small_weights():
    torch.manual_seed(0)
    return FGCLIP(FGCLIPConfig(**copy.deepcopy(CONFIG))).state_dict()


def model_folder(folder, weights, config=CONFIG, name="model.safetensors"):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    tensors = {n: t.clone().contiguous() for n, t in weights.items()}
    write = save_file if name.endswith("safetensors") else torch.save
    write(tensors, folder / name)
    return folder


def changed_config(part, **values):
    config = copy.deepcopy(CONFIG)
    (config[part] if part else config).update(values)
    return config


BAD_SIZES = [
    (part, name, value)
    for part, names in (
        ("", ["projection_dim"]),
        ("text_config", [*TOWER, "vocab_size"]),
        ("vision_config", [*TOWER, "image_size", "patch_size"]),
    )
    for name in names
    for value in (None, 0, -1, 10**9, 10**30, 1.5, "12", [1], {}, True)
]
BAD_NUMBERS = [
    (part, name, value)
    for part in ("text_config", "vision_config")
    for name in ("layer_norm_eps", "attention_dropout")
    for value in (None, -1, math.nan, math.inf, "0", [1])
]
OTHERS = [
    ("", "logit_scale_init_value", math.nan),
    ("", "logit_scale_init_value", "x"),
    ("", "temporal_layers", 10**6),
    ("", "temporal_layers", "x"),
    ("", "text_config", [1]),
    ("", "text_config", "x"),
    ("", "vision_config", None),
    ("", "vision_config", 3),
    ("", "quantization_config", {"bits": 8}),
    ("", "quantization_config", {}),
    ("text_config", "quantization_config", {"load_in_8bit": True}),
    ("vision_config", "quantization_config", 8),
    ("vision_config", "num_channels", 1),
    ("vision_config", "hidden_act", "no such"),
    ("text_config", "hidden_act", None),
    ("text_config", "hidden_act", [1]),
    ("text_config", "num_attention_heads", 3),
    ("text_config", "eos_token_id", [1]),
    ("text_config", "bos_token_id", "x"),
    ("text_config", "pad_token_id", -5),
    ("text_config", "max_position_embeddings", [77]),
]


@pytest.mark.parametrize("part, name, value", BAD_SIZES + BAD_NUMBERS + OTHERS)
def test_a_config_of_wrong_shape_is_a_sentence(tmp_path, small_weights, part, name, value):
    config = changed_config(part, **{name: value})
    folder = model_folder(tmp_path, small_weights, config)
    with pytest.raises((ConfigError, DataError)) as e:
        FGCLIP.from_pretrained(folder)
    assert "config.json" in str(e.value) and name in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"x"', "", "{", NESTED, "\ud800"], ids=lambda t: ascii(t)[:20]
)
def test_a_config_that_is_no_object_is_a_sentence(tmp_path, small_weights, text):
    folder = model_folder(tmp_path, small_weights)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="config.json"):
        FGCLIP.from_pretrained(folder)


def bad_tensors(t):
    flat = torch.zeros(1)
    return {
        "NaN": torch.full_like(t, math.nan),
        "one infinite": torch.cat([torch.full((1,), -math.inf), t.flatten()[1:]]).view_as(t),
        "int8": t.to(torch.int8),
        "int64": t.to(torch.int64),
        "bool": t.bool(),
        "complex": t.to(torch.complex64),
        "float8": t.to(torch.float8_e4m3fn),
        "shape": t[:-1],
        "scalar": torch.tensor(1.0),
        "sparse": t.to_sparse(),
        "quantised": torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "without numbers": t.to("meta"),
        "one number many times": flat.expand(t.shape),
        "half infinite": torch.full_like(t, math.inf, dtype=torch.float16),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(bad_tensors(torch.ones(2, 2))))
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_none_are_refused_by_name(tmp_path, small_weights, kind, file):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    bad = bad_tensors(small_weights[name])[kind]
    if file == "pytorch_model.bin":
        model_folder(tmp_path, small_weights, name="model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        torch.save({**small_weights, name: bad}, tmp_path / file)
    elif kind in ("sparse", "quantised", "without numbers", "one number many times"):
        pytest.skip("safetensors cannot hold it")
    else:
        model_folder(tmp_path, {**small_weights, name: bad}, name=file)
    with pytest.raises(DataError) as e:
        FGCLIP.from_pretrained(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert name in str(e.value) or kind in ("quantised", "without numbers")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        "null",
        "{",
        NESTED,
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": "x"}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "."}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_of_wrong_shape_is_a_sentence(tmp_path, index, file):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / f"{file}.index.json").write_text(index)
    with pytest.raises(DataError, match=re.escape(f"{file}.index.json")):
        FGCLIP.from_pretrained(tmp_path)


def openai_like(width=64, features=8):
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")},
    }
    shapes = {
        f"{tower}.resblocks.0.{name}": shape
        for tower in ("visual.transformer", "transformer")
        for name, shape in block.items()
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes.update({f"{name}.{kind}": (width,) for kind in ("weight", "bias")})
    shapes.update(
        {
            "visual.conv1.weight": (width, 3, 16, 16),
            "visual.class_embedding": (width,),
            "visual.proj": (width, features),
            "visual.positional_embedding": (5, width),
            "token_embedding.weight": (100, width),
            "positional_embedding": (77, width),
            "text_projection": (width, features),
            "logit_scale": (),
        }
    )
    counts = dict(input_resolution=32, context_length=77, vocab_size=100)
    tensors = {name: torch.full(shape, 0.1) for name, shape in shapes.items()}
    return tensors | {name: torch.tensor(n) for name, n in counts.items()}


COUNTS = ("input_resolution", "context_length", "vocab_size")  # not needed, shapes tell them


def test_every_tensor_of_openai_missing_or_of_another_shape_is_a_sentence(tmp_path):
    whole, path = openai_like(), tmp_path / "model.pt"
    torch.save(whole, path)
    FGCLIP.from_openai(path)
    others = [torch.zeros(1, 0, 2), torch.ones(1, 1, 1, 1, 1)]
    for name, tensor in whole.items():
        if name in COUNTS:
            continue
        scalar = [torch.tensor(1.0)] * (name != "logit_scale")
        values = [tensor.to(torch.int8), tensor * math.nan] * name.startswith("visual.t")
        for other in [None, *scalar, *others, *values]:
            changed = {n: t for n, t in whole.items() if n != name}
            torch.save(changed | ({} if other is None else {name: other}), path)
            with pytest.raises(DataError, match="model.pt"):
                FGCLIP.from_openai(path)


@pytest.mark.parametrize("number", ["999999", "9" * 30, "9" * 5000, "1"])
def test_a_far_block_of_openai_builds_no_million_layers(tmp_path, number):
    far = {f"transformer.resblocks.{number}.ln_1.weight": torch.ones(64)}
    torch.save(openai_like() | far, tmp_path / "model.pt")
    with pytest.raises((ConfigError, DataError), match="model.pt"):
        FGCLIP.from_openai(tmp_path / "model.pt")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e30])
def test_a_scale_asked_for_is_finite(tmp_path, small_weights, scale):
    with pytest.raises(ConfigError, match="logit_scale"):
        FGCLIP.from_pretrained(model_folder(tmp_path, small_weights), logit_scale_init=scale)


def test_damaged_weight_files_are_a_sentence(tmp_path, small_weights):
    for name in ("model.safetensors", "pytorch_model.bin"):
        model_folder(tmp_path, small_weights, name=name)
        data = (tmp_path / name).read_bytes()
        for i in range(0, 6000, 97):
            (tmp_path / name).write_bytes(data[:i] + bytes([data[i] ^ 0x2A]) + data[i + 1 :])
            with contextlib.suppress(DataError):
                FGCLIP.from_pretrained(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("flock", [True, False])
def test_one_writer_also_where_the_disk_has_no_locks(tmp_path, monkeypatch, flock):
    "Lustre without flock answers ENOSYS; a lock left by a process that died there binds nobody."
    import errno, fcntl
    from fgclip_nb.core.lock import FolderLock

    def refused(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if not flock:
        monkeypatch.setattr(fcntl, "flock", refused)
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path)
        os._exit(0)  # dies with the lock
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path)
    lock.close()
    FolderLock(tmp_path).close()


@pytest.mark.parametrize(
    "name", ["memory_bank_size", "gradient_accumulation_steps", "logit_scale_init", "logits_low"]
)
@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, math.inf, 10**400, -(10**9)], ids=str)
def test_parameters_of_another_kind_are_a_sentence(tmp_path, name, value):
    import yaml
    from fgclip_nb.diagnostics.judgement import run_evidence
    from synthetic_runs import synthetic_run

    run = synthetic_run(tmp_path / "run", steps=3)
    (run.path / "params.yaml").write_text(yaml.safe_dump(run.params() | {name: value}))
    with pytest.raises(DataError, match=f"params.yaml: parameter `{name}`"):
        run_evidence(run)
