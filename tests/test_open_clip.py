"""Weights that are not OpenAI's own: open_clip's checkpoints and configurations, Long-CLIP's 248
positions. The features expected are those of transformers' CLIPModel that the files were made of,
whose activation and heads the loader is not told. No notebook cell: files of other makers."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.model.fgclip import FGCLIP
from test_loading import as_openai

EXPECTED = 1e-4  # of the largest value; GELU for QuickGELU is ten times that


def source_model(act="gelu", heads=2, width=128, positions=77, eps=1e-5):
    "transformers' CLIPModel with weights large enough that the activation shows."
    torch.manual_seed(0)

    def tower(width, heads, **kw):
        sizes = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2)
        return dict(sizes, num_attention_heads=heads, hidden_act=act, layer_norm_eps=eps, **kw)

    marks = dict(bos_token_id=98, eos_token_id=99, pad_token_id=99)
    config = CLIPConfig(
        projection_dim=32,
        vision_config=tower(width, heads, image_size=32, patch_size=16, projection_dim=32),
        text_config=tower(
            64, 1, vocab_size=100, max_position_embeddings=positions, projection_dim=32, **marks
        ),
    )
    model = CLIPModel(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.mul_(4)
    return model


def differences(ours, source):
    "Largest differences of image and text features, in shares of the largest value."
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=g)
    ids = torch.randint(0, 98, (3, 77), generator=g)
    ids[:, 0], ids[:, 20:] = 98, 99
    with torch.no_grad():
        pairs = (
            (ours.get_image_features(pixels), source.get_image_features(pixels).pooler_output),
            (ours.get_text_features(ids), source.get_text_features(ids).pooler_output),
        )
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


def open_clip_config(act, head_width, width=128, **vision):
    vision = dict(image_size=32, layers=2, width=width, patch_size=16, **vision)
    if head_width != 64:
        vision["head_width"] = head_width
    text = dict(context_length=77, vocab_size=100, width=64, heads=1, layers=2)
    model = dict(embed_dim=32, vision_cfg=vision, text_cfg=text)
    if act == "quick_gelu":
        model["quick_gelu"] = True
    return dict(model_cfg=model, preprocess_cfg=dict(mean=[0.48, 0.46, 0.41]))


@pytest.mark.parametrize("act, head_width", [("gelu", 64), ("quick_gelu", 64), ("gelu", 32)])
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_with_its_configuration(tmp_path, act, head_width, file):
    source = source_model(act, 128 // head_width)
    tensors = as_openai(source.state_dict())
    save = save_file if file.endswith("safetensors") else torch.save
    save(tensors, tmp_path / file)
    config = open_clip_config(act, head_width)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = FGCLIP.from_open_clip(tmp_path, prove=True)
    assert max(differences(model, source)) < EXPECTED
    assert max(model.load_report.proof.values()) < EXPECTED
    assert act in model.load_report.converted["activation, heads"]
    model.save_pretrained(tmp_path / "ours", processor=False)
    again = FGCLIP.from_pretrained(tmp_path / "ours")
    assert max(differences(again, source)) < EXPECTED


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_training_checkpoint_of_open_clip(tmp_path, wrapper):
    source = source_model("gelu")
    tensors = {wrapper + n: t for n, t in as_openai(source.state_dict()).items()}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = folder / "epoch_1.pt"
    torch.save(dict(epoch=1, name="run", state_dict=tensors, optimizer={}), path)
    unknown = f"prefix `{wrapper}` taken off.: activation and width of heads are unknown"
    with pytest.raises(DataError, match=unknown):
        FGCLIP.from_openai(path)
    (tmp_path / "params.txt").write_text("force_quick_gelu: False\nmodel: ViT-B-16\n")
    for load in (FGCLIP.from_openai, FGCLIP.from_open_clip):
        model = load(path, prove=True)
        assert max(differences(model, source)) < EXPECTED
        assert f"`{wrapper}` taken off" in model.load_report.converted["all names"]


def test_what_is_told_counts_and_matters(tmp_path):
    source, path = source_model("gelu", heads=4), tmp_path / "weights.pt"
    torch.save(as_openai(source.state_dict()), path)
    right = FGCLIP.from_open_clip(path, hidden_act="gelu", head_width=32, prove=True)
    assert max(differences(right, source)) < EXPECTED
    for wrong in (
        dict(hidden_act="quick_gelu", head_width=32),
        dict(hidden_act="gelu", head_width=64),
        dict(name="ViT-B-32"),
    ):
        assert max(differences(FGCLIP.from_open_clip(path, **wrong), source)) > 5 * EXPECTED
    for less in ({}, dict(hidden_act="gelu"), dict(head_width=64)):
        with pytest.raises(DataError, match="activation and width of heads are unknown"):
            FGCLIP.from_open_clip(path, **less)
    with pytest.raises(ConfigError, match="not known here"):
        FGCLIP.from_open_clip(path, name="RN50")


@pytest.mark.parametrize(
    "part, entry",
    [
        ("vision_cfg", dict(timm_model_name="vit_base_patch16_siglip_224")),
        ("vision_cfg", dict(attentional_pool=True)),
        ("text_cfg", dict(hf_model_name="xlm-roberta-base")),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(tmp_path, part, entry):
    save_file(as_openai(source_model().state_dict()), tmp_path / "open_clip_model.safetensors")
    config = open_clip_config("gelu", 64)
    config["model_cfg"][part] |= entry
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=next(iter(entry))):
        FGCLIP.from_open_clip(tmp_path)


@pytest.mark.parametrize("act, eps", [("quick_gelu", 1e-5), ("gelu", 1e-6)])
def test_metaclip_and_dfn_in_transformers_form(tmp_path, act, eps):
    source = source_model(act, heads=4, eps=eps)
    source.save_pretrained(tmp_path)
    model = FGCLIP.from_clip(tmp_path, prove=True)
    assert max(differences(model, source)) < EXPECTED
    assert model.config.vision_config.layer_norm_eps == eps


@pytest.mark.parametrize("form", ["transformers", "two tables", "one table"])
def test_long_clip_keeps_its_248_positions(tmp_path, form):
    source = source_model("quick_gelu", positions=248)
    if form == "transformers":
        source.save_pretrained(tmp_path)
        model = FGCLIP.from_clip(tmp_path, prove=True)
    else:
        tensors = as_openai(source.state_dict())
        if form == "two tables":
            table = tensors["positional_embedding"]
            tensors["positional_embedding_res"] = table.clone()
            tensors["positional_embedding_res"][:20] = 7.0  # not read
            table[20:] = 7.0
        torch.save(tensors, tmp_path / "longclip.pt")
        told = dict(hidden_act="quick_gelu", head_width=64)
        model = FGCLIP.from_open_clip(tmp_path / "longclip.pt", **told, prove=True)
    assert max(differences(model, source)) < EXPECTED
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 98, (2, 248), generator=g)
    ids[:, 0], ids[:, 247] = 98, 99
    with torch.no_grad():
        theirs = source.get_text_features(ids).pooler_output
        ours = model.get_text_features(ids, walk_short_pos=False)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < EXPECTED
    assert "Long-CLIP" in str(model.load_report.converted)


def test_the_log_says_where_activation_and_heads_come_from(tmp_path, caplog):
    save_file(as_openai(source_model().state_dict()), tmp_path / "open_clip_model.safetensors")
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps(open_clip_config("gelu", 64)))
    with caplog.at_level(logging.INFO, "fgclip_nb"):
        FGCLIP.from_open_clip(tmp_path)
    assert any("gelu" in r.message and config.name in r.message for r in caplog.records)
