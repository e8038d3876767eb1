"""Weight files: what is read, what is refused and by which name, and the proof that what was read
is what the source computes.

No notebook cell: dozens of small folders on disk, a hostile pickle, stand-ins for the network."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.model.config import FGCLIPConfig
from fgclip_nb.model.towers import MAX_LOG_SCALE, SCALES
from fgclip_nb.model.loading import FINE_NAMES
from fgclip_nb.model.fgclip import FGCLIP
from fgclip_nb.text.positions import stretch_positions
from official import GOLDENS, golden_model

GOLDEN = GOLDENS / "golden_a"
WIDTHS = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128)
SMALL = dict(
    projection_dim=16,
    text_config=dict(WIDTHS, vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=99),
    vision_config=dict(WIDTHS, image_size=32, patch_size=16),
)


@pytest.fixture
def official(tmp_path):
    """A folder as the official repository publishes it: remote-code entries, and tensors that a
    test may change first."""

    def make(
        change=lambda t: t, write=lambda t, f: save_file(t, f / "model.safetensors"), **config
    ):
        folder = tmp_path / "official"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        c = json.loads((GOLDEN / "config.json").read_text())
        c.update(auto_map={"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"}, **config)
        (folder / "config.json").write_text(json.dumps(c))
        write(change(load_file(GOLDEN / "model.safetensors")), folder)
        return folder

    return make


@pytest.fixture
def clip(tmp_path):
    "A folder of transformers' CLIPModel, with its model."
    from transformers.models.clip.modeling_clip import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**SMALL))
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * 0.05) for p in model.parameters()]
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", model


def same(model, tensors):
    return all(torch.equal(model.state_dict()[k], v) for k, v in tensors.items())


# Official folders in every form


def shards(write, name):
    def save(tensors, folder):
        keys, halves = sorted(tensors), {}
        for i in range(2):
            part = {k: tensors[k] for k in keys[i::2]}
            write(part, folder / f"{name[0]}-0000{i + 1}-of-00002.{name[1]}")
            halves.update(dict.fromkeys(part, f"{name[0]}-0000{i + 1}-of-00002.{name[1]}"))
        (folder / f"{name[0]}.{name[1]}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": halves})
        )

    return save


FORMS = {
    "safetensors": lambda t, f: save_file(t, f / "model.safetensors"),
    "bin": lambda t, f: torch.save(t, f / "pytorch_model.bin"),
    "safetensors shards": shards(save_file, ("model", "safetensors")),
    "bin shards": shards(torch.save, ("pytorch_model", "bin")),
}


@pytest.mark.parametrize("form", FORMS)
def test_official_folder(official, form):
    model = FGCLIP.from_pretrained(official(write=FORMS[form]))
    assert same(model, load_file(GOLDEN / "model.safetensors"))
    assert model.load_report.counts() == dict(
        matched=115, missing=0, unexpected=0, misshaped=0, converted=0, initialised=0, ignored=0
    )
    assert model.config.text_config.eos_token_id == 511 and not model.training


def test_proof_prints_the_largest_difference(official, caplog):
    with caplog.at_level("INFO", "fgclip_nb"):
        model = FGCLIP.from_pretrained(official(), prove=True)
    assert max(model.load_report.proof.values()) < 1e-5 and set(model.load_report.proof) == {
        "image_features",
        "text_features",
    }
    assert "proof: largest difference of text_features" in caplog.text
    assert (
        "Loaded logit_scale = 2.7000 (exp=14.9)" in caplog.text
        and "logit_scale (finegrained): 2.200000 (exp=9.0250)" in caplog.text
    )


def test_a_failing_proof_is_an_error(official, monkeypatch):
    from fgclip_nb.model import loading

    right = loading._clip_features
    monkeypatch.setattr(
        loading, "_clip_features", lambda *a: {k: v + 0.01 for k, v in right(*a).items()}
    )
    with pytest.raises(DataError, match="image_features differ from the source model's by 0.01"):
        FGCLIP.from_pretrained(official(), prove=True)


NAMES = sorted(load_file(GOLDEN / "model.safetensors"))


@pytest.mark.parametrize("name", NAMES[::7] + list(FINE_NAMES))
def test_one_tensor_removed_renamed_or_reshaped_is_refused_by_name(official, name):
    def rename(t):
        t[name + "x"] = t.pop(name)
        return t

    changes = {
        "removed": lambda t: {k: v for k, v in t.items() if k != name},
        "renamed": rename,
        "reshaped": lambda t: {**t, name: t[name][None].clone()},
    }
    for kind, change in changes.items():
        folder = official(change)
        for load in (FGCLIP.from_pretrained, FGCLIP.from_clip):
            with pytest.raises(DataError, match=re.escape(name)) as e:
                load(folder)
            if kind == "renamed":
                assert name + "x" in str(e.value)
            if kind == "reshaped":
                assert "(1, " in str(e.value) or "(1,)" in str(e.value)


def test_a_layer_that_the_configuration_does_not_have_is_refused(official):
    extra = "vision_model.encoder.layers.3.layer_norm1.weight"
    folder = official(lambda t: {**t, extra: torch.ones(64)})
    with pytest.raises(DataError, match=re.escape(extra) + ".*no such layer"):
        FGCLIP.from_pretrained(folder)


def test_strangers_and_old_buffers_are_reported(official):
    more = {
        "ema.decay": torch.ones(1),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    model = FGCLIP.from_pretrained(official(lambda t: {**t, **more}))
    assert (
        model.load_report.unexpected == ["ema.decay"]
        and "text_model.embeddings.position_ids" in model.load_report.ignored
    )


def test_half_precision_becomes_float32_and_says_so(official):
    model = FGCLIP.from_pretrained(official(lambda t: {k: v.bfloat16() for k, v in t.items()}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (
        model.load_report.converted["logit_scale"] == "bfloat16 to float32"
        and len(model.load_report.converted) == 115
    )


def test_malicious_pickles_are_not_executed(official, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    folder = official(
        write=lambda t, f: torch.save({**t, "logit_scale": Evil()}, f / "pytorch_model.bin")
    )
    torch.save({"logit_scale": Evil()}, tmp_path / "ViT-B-32.pt")
    for load in (
        lambda: FGCLIP.from_pretrained(folder),
        lambda: FGCLIP.from_openai(tmp_path / "ViT-B-32.pt"),
    ):
        with pytest.raises(DataError, match="could run code"):
            load()
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda t, f: None, "no weights; looked for model.safetensors"),
        (
            lambda t, f: (f / "model.safetensors").write_bytes(
                (GOLDEN / "model.safetensors").read_bytes()[:-9]
            ),
            "not a readable safetensors",
        ),
        (lambda t, f: (f / "pytorch_model.bin").write_bytes(b"no pickle"), "pytorch_model.bin"),
        (lambda t, f: torch.save([1, 2], f / "pytorch_model.bin"), "not a dictionary of tensors"),
    ],
)
def test_broken_folders(official, write, message):
    with pytest.raises(DataError, match=message):
        FGCLIP.from_pretrained(official(write=write))


def test_broken_configurations(official, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        FGCLIP.from_pretrained(tmp_path / "not here")
    with pytest.raises(DataError, match="no config.json"):
        FGCLIP.from_pretrained(tmp_path)
    folder = official()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="not a CLIP model .model_type 'bert'"):
        FGCLIP.from_pretrained(folder)
    with pytest.raises(TypeError, match="logit_scale_inti"):
        FGCLIP.from_pretrained(folder, logit_scale_inti=1)


# From CLIP


def test_from_clip(clip):
    folder, source = clip
    model, own = FGCLIP.from_clip(folder, prove=True), source.state_dict()
    assert same(model, own) and max(model.load_report.proof.values()) < 1e-5
    assert set(model.load_report.initialised) == set(FINE_NAMES)
    table = stretch_positions(own["text_model.embeddings.position_embedding.weight"])
    assert all(torch.equal(model.state_dict()[n], table) for n in FINE_NAMES[:2])
    assert torch.equal(model.text_filip_projection.weight, own["text_projection.weight"])
    assert (
        model.logit_scale_finegraind
        == model.logit_scale_hardneg
        == own["logit_scale"].clamp(max=MAX_LOG_SCALE)
    )
    with pytest.raises(
        DataError, match="This looks like plain CLIP: load it with FGCLIP.from_clip"
    ):
        FGCLIP.from_pretrained(folder)


def test_openai_ids_are_settled(clip):
    folder, _ = clip
    for written, expected in (((0, 2, 1), (49406, 49407, 49407)), ((98, 99, 1), (98, 99, 99))):
        c = json.loads((folder / "config.json").read_text())
        c["text_config"].update(zip(("bos_token_id", "eos_token_id", "pad_token_id"), written))
        (folder / "config.json").write_text(json.dumps(c))
        t = FGCLIP.from_clip(folder).config.text_config
        assert (t.bos_token_id, t.eos_token_id, t.pad_token_id) == expected


# Temperatures


def test_trained_temperatures_and_positions_are_kept(official):
    for load in (FGCLIP.from_pretrained, FGCLIP.from_clip):
        model = load(official())
        assert [round(getattr(model, s).item(), 4) for s in SCALES] == [2.7, 2.2, 1.9]
        assert same(model, load_file(GOLDEN / "model.safetensors"))


def test_another_temperature_is_refused_or_overridden(official):
    both_values = (
        r"logit_scale is stored as 2.7000 \(exp 14.88\), "
        r"but logit_scale_init asks for 4.6052 \(exp 100.00\)"
    )
    with pytest.raises(ConfigError, match=both_values):
        FGCLIP.from_pretrained(official(), logit_scale_init=4.6052)
    model = FGCLIP.from_pretrained(official(), logit_scale_init=4.6052, override_logit_scale=True)
    assert all(abs(getattr(model, s).item() - 4.605170) < 1e-6 for s in SCALES)
    assert "stored 2.2000 replaced by 4.6052" in model.load_report.changed["logit_scale_finegraind"]


def test_scales_above_100_are_clamped_when_loaded(official):
    model = FGCLIP.from_pretrained(
        official(lambda t: {**t, "logit_scale": torch.tensor(4.7)}), override_logit_scale=False
    )
    assert (
        abs(model.logit_scale.exp().item() - 100) < 1e-3
        and "4.700000 clamped" in model.load_report.changed["logit_scale"]
    )
    FGCLIP.from_clip(
        official(lambda t: {**t, **{s: torch.tensor(4.6052) for s in SCALES}}),
        logit_scale_init=4.6052,
    )


# OpenAI's own files


def as_openai(sd):
    "transformers' names and layout -> OpenAI's."
    v, t = "vision_model.embeddings.", "text_model.embeddings."
    out = {
        "visual.proj": sd["visual_projection.weight"].T,
        "text_projection": sd["text_projection.weight"].T,
        "logit_scale": sd["logit_scale"],
        "visual.class_embedding": sd[v + "class_embedding"],
        "visual.conv1.weight": sd[v + "patch_embedding.weight"],
        "visual.positional_embedding": sd[v + "position_embedding.weight"],
        "token_embedding.weight": sd[t + "token_embedding.weight"],
        "positional_embedding": sd[t + "position_embedding.weight"],
    }
    pairs = [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ]
    parts = (
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    )
    for there, here in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(2):
            a, b = f"{there}.resblocks.{i}.", f"{here}.encoder.layers.{i}."
            pairs += [(a + x, b + y) for x, y in parts]
            for kind in ("weight", "bias"):
                out[f"{a}attn.in_proj_{kind}"] = torch.cat(
                    [sd[f"{b}self_attn.{n}_proj.{kind}"] for n in "qkv"]
                )
    out.update({f"{a}.{kind}": sd[f"{b}.{kind}"] for a, b in pairs for kind in ("weight", "bias")})
    return {k: v.clone().contiguous() for k, v in out.items()}


def counts():
    "Three numbers that OpenAI's own files have among their tensors, and nobody else's."
    numbers = dict(input_resolution=32, context_length=77, vocab_size=100)
    return {k: torch.tensor(v) for k, v in numbers.items()}


def torchscript(tensors, path):
    "An archive like OpenAI's: a module tree with code whose method would be noticed."

    class Node(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            raise RuntimeError("a method of the archive was called")

    root = Node()
    for name, t in {**tensors, **counts()}.items():
        *parents, leaf = name.split(".")
        node = root
        for p in parents:
            if p not in node._modules:
                node.add_module(p, Node())
            node = node._modules[p]
        if name in counts():
            node.register_buffer(leaf, t)
        else:
            node.register_parameter(leaf, torch.nn.Parameter(t.half(), requires_grad=False))
    torch.jit.script(root).save(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_from_openai(clip, tmp_path, form):
    _, source = clip
    tensors, path = as_openai(source.state_dict()), tmp_path / "ViT-small.pt"
    torchscript(tensors, path) if form == "archive" else torch.save(tensors | counts(), path)
    model = FGCLIP.from_openai(path, prove=True)
    expected = {
        k: v.half().float() if form == "archive" else v for k, v in source.state_dict().items()
    }
    expected["logit_scale"] = expected["logit_scale"].clamp(max=MAX_LOG_SCALE)
    assert same(model, expected) and max(model.load_report.proof.values()) < 1e-5
    assert (
        model.config.text_config.eos_token_id == 99 and model.config.vision_config.image_size == 32
    )
    how = model.load_report.converted
    key = how["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    assert key.startswith("from transformer.resblocks.1.attn.in_proj_weight, second third")
    assert how["visual_projection.weight"].startswith("from visual.proj, transposed")
    assert len(model.load_report.matched) + 5 == len(model.state_dict())


def test_openai_files_that_are_not(clip, tmp_path):
    tensors = as_openai(clip[1].state_dict())
    tensors.pop("transformer.resblocks.1.attn.in_proj_weight")
    torch.save(tensors | counts(), tmp_path / "a.pt")
    with pytest.raises(
        DataError, match="missing text_model.encoder.layers.1.self_attn.q_proj.weight"
    ):
        FGCLIP.from_openai(tmp_path / "a.pt")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(DataError, match="ResNets are not supported"):
        FGCLIP.from_openai(tmp_path / "b.pt")
    with pytest.raises(DataError, match="no such file"):
        FGCLIP.from_openai(tmp_path / "c.pt")


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bitwise(tmp_path, dtype):
    model = golden_model(dtype)
    model.save_pretrained(tmp_path, numbers={"loss": 0.123456, "steps": 10})
    back = FGCLIP.from_pretrained(tmp_path)
    assert same(back, model.state_dict()) and list(back.state_dict()) == list(model.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == set(NAMES)
    first = (tmp_path / "model.safetensors").read_bytes()
    back.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_a_temporal_head_is_saved_with_the_model(tmp_path):
    model = golden_model()
    model.add_temporal_head(layers=1)
    model.temporal.query.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    back = FGCLIP.from_pretrained(tmp_path, prove=True)
    assert (
        same(back, model.state_dict())
        and back.config.temporal_layers == 1
        and len(back.temporal.layers) == 1
    )


def test_card_holds_the_numbers(tmp_path):
    golden_model().save_pretrained(tmp_path, numbers={"loss_region": 0.123456, "steps": 10})
    assert (
        "| loss_region | 0.1235 |" in (tmp_path / "README.md").read_text()
        and "| steps | 10 |" in (tmp_path / "README.md").read_text()
    )


def test_auto_classes_and_processor(tmp_path):
    import numpy as np
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPModel
    from fgclip_nb.data.photos import normalize

    torch.manual_seed(0)
    text = dict(WIDTHS, vocab_size=49408, bos_token_id=49406, eos_token_id=49407)
    model = FGCLIP(
        FGCLIPConfig(projection_dim=8, text_config=text, vision_config=SMALL["vision_config"])
    ).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FGCLIPConfig
    auto = AutoModel.from_pretrained(tmp_path)
    assert type(auto) is FGCLIP and same(auto, model.state_dict())
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        images=photo, text=["a cat", "a black dog"], padding=True, return_tensors="pt"
    )
    assert torch.equal(
        inputs["pixel_values"][0], normalize(np.asarray(photo.resize((32, 32))).copy())
    )
    with torch.no_grad():
        ours = model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    _, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and ours.shape == (2, 8)


# The hub, with a stand-in


def test_hub_names_and_revisions(official, clip, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folders, requests = {"org/fg": official(), "org/clip": clip[0]}, []

    def download(repo, filename, revision=None, **kw):
        requests.append((repo, filename, revision))
        if repo not in folders:
            raise LocalEntryNotFoundError("offline")
        if not (folders[repo] / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folders[repo] / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(
        FGCLIP.from_pretrained("org/fg", revision="v1.0"), load_file(GOLDEN / "model.safetensors")
    )
    assert FGCLIP.from_clip("org/clip", revision="abc").load_report.source == "org/clip"
    assert ("org/fg", "model.safetensors", "v1.0") in requests and (
        "org/clip",
        "config.json",
        "abc",
    ) in requests
    torch.save(as_openai(clip[1].state_dict()) | counts(), clip[0] / "ViT.pt")
    assert (
        FGCLIP.from_openai("org/clip", filename="ViT.pt", revision="r").load_report.initialised
        and ("org/clip", "ViT.pt", "r") in requests
    )
    with pytest.raises(DataError, match="org/none: neither a folder here nor in the hub's cache"):
        FGCLIP.from_pretrained("org/none")
    with pytest.raises(DataError, match="has no file x.pt"):
        FGCLIP.from_openai("org/clip", filename="x.pt")


def test_push_to_hub_uploads_what_is_saved(monkeypatch):
    import huggingface_hub
    import transformers.utils.hub as hub

    sent, cards = {}, []

    class Api:
        def create_repo(self, repo_id, **kw):
            return type("Url", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "hf_api", lambda: Api())
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *a, **kw: huggingface_hub.ModelCard("---\n---\n")
    )

    def upload(self, folder, repo, **kw):
        sent.update({f: os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder)})

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "push_to_hub", lambda self, repo, **kw: cards.append(str(self))
    )
    golden_model().push_to_hub("me/model", numbers={"steps": 7})
    assert {"config.json", "model.safetensors"} <= set(sent) and "| steps | 7 |" in cards[0]
