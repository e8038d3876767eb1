"""The model against recorded outputs of the official code, in both precisions, and against plain
re-implementations at other sizes.

No notebook cell: the recordings are files, and the comparison covers every parameter."""

import pytest
import torch

from fgclip_nb.model.config import FGCLIPConfig
from fgclip_nb.model.towers import SCALES
from fgclip_nb.model.fgclip import FGCLIP
from fgclip_nb.model.roi import roi_align_1x1, roi_weights
from fgclip_nb.text.packing import tokenize
from fgclip_nb.text.positions import stretch_positions
from official import (
    golden,
    golden_batch,
    golden_model,
    make_batch,
    official_losses,
    plain_image,
    plain_roi,
    plain_text,
    unpadded,
)

SETTINGS = ("stage1", "box_only", "hard_only", "stage2")
PRECISION = {torch.float32: ("f32", 2e-5), torch.float64: ("f64", 1e-9)}
both = pytest.mark.parametrize("dtype", PRECISION)


def close(a, b, atol):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= atol, (
        f"largest difference {(a - b).abs().max():.3g}, allowed {atol:.3g}"
    )


def features(model, x, rois):
    "The official methods on the goldens' inputs."
    pixels, text = x["pixel_values"].to(model.logit_scale.dtype), model.get_text_features
    yield "image_features", model.get_image_features(pixels)
    yield "image_dense_features", model.get_image_dense_features(pixels)
    for kind in ("box", "hard"):
        yield f"text_features_{kind}", text(x[f"{kind}_texts"])
        yield (
            f"image_box_roi_features_{kind}",
            model.get_image_box_roi_features(pixels, box_info=rois[f"roi_boxes_{kind}"]),
        )
    yield "text_features_short", text(x["text_short"], walk_short_pos=True)
    yield "text_features_long", text(x["text_long"], walk_short_pos=False)
    yield "text_features_short_use_bbox", text(x["text_short"], walk_short_pos=False, use_bbox=True)


@both
def test_features(dtype):
    name, atol = PRECISION[dtype]
    expected, x = (
        golden(f"golden_a/outputs_{name}.safetensors"),
        golden("golden_a/inputs.safetensors"),
    )
    for key, value in features(golden_model(dtype), x, golden("golden_a/outputs_f32.safetensors")):
        close(
            value, expected[key], 2e-6 if "roi" in key and name == "f64" else atol
        )  # boxes are formed in float32 in both


def test_boxes_as_a_list_of_tensors():
    model, x, rois = (
        golden_model(),
        golden("golden_a/inputs.safetensors"),
        golden("golden_a/outputs_f32.safetensors")["roi_boxes_box"],
    )
    a = model.get_image_box_roi_features(x["pixel_values"], box_info=rois)
    b = model.get_image_box_roi_features(
        x["pixel_values"], box_info=[rois[4 * i : 4 * i + 4, 1:] for i in range(3)]
    )
    assert torch.equal(a, b)


def run(setting, dtype):
    "Losses and gradients of a setting."
    model = golden_model(dtype)
    batch, boxes = golden_batch(setting, dtype)
    terms = official_losses(model(batch), batch, boxes)
    terms["total"].backward()
    return model, terms


def check_gradients(grads, expected, rtol=1e-4):
    for name, g in expected.items():
        ours = grads[name]
        limit = 1e-6 if name.endswith("k_proj.bias") else rtol * g.norm() + 1e-9
        assert (ours - g).norm() <= limit, f"{name}: {(ours - g).norm():.3g} against {g.norm():.3g}"


@both
@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_and_gradient_norms(setting, dtype):
    kind = {torch.float32: "float32", torch.float64: "float64"}[dtype]
    model, terms = run(setting, dtype)
    for name, value in golden("golden_a/losses.json")[kind][setting].items():
        assert abs(terms[name].item() - value) <= 5e-6, name
    norms = golden("golden_a/grad_norms.json")
    norms = norms[kind][setting] if kind in norms else norms[setting]
    for name, p in model.named_parameters():
        ours = 0.0 if p.grad is None else p.grad.norm().item()
        assert abs(ours - (norms[name] or 0)) <= (
            1e-6 if name.endswith("k_proj.bias") else 1e-4 * (norms[name] or 0) + 1e-9
        ), name


@both
def test_every_gradient(dtype):
    model, _ = run("stage2", dtype)
    expected = golden("golden_a/grads_stage2.safetensors")
    check_gradients(
        {n: p.grad.double() for n, p in model.named_parameters()},
        {n: g.double() for n, g in expected.items()},
    )


@both
def test_six_steps_of_adamw(dtype):
    kind = {torch.float32: "float32", torch.float64: "float64"}[dtype]
    recorded, groups = (
        golden("golden_a/trajectory.json")[kind],
        golden("golden_a/param_groups.json")["default"],
    )
    model, (batch, boxes) = golden_model(dtype), golden_batch("stage2", dtype)
    named = dict(model.named_parameters())
    opt = torch.optim.AdamW(
        [
            dict(params=[named[n] for n in g["names"]], weight_decay=g["weight_decay"])
            for g in groups
        ],
        lr=1e-3,
    )
    for step in recorded["trajectory"]:
        opt.zero_grad()
        loss = official_losses(model(batch), batch, boxes)["total"]
        loss.backward()
        assert abs(loss.item() - step["loss"]) <= 2e-5
        for name, value in zip(SCALES, step["logit_scales"]):
            assert abs(named[name].item() - value) <= 1e-5
        opt.step()


def test_losses_of_the_package_agree():
    from fgclip_nb.losses.objective import compute_losses

    model, (batch, _) = golden_model(torch.float64), golden_batch("stage2", torch.float64)
    terms, recorded = (
        compute_losses(model(batch), batch, duplicates="ignore"),
        golden("golden_a/losses.json")["float64"]["stage2"],
    )
    for name in ("global_long", "global_short", "region", "hard"):
        assert abs(terms[f"loss_{name}"].loss.item() - recorded[name]) <= 5e-6, name


@pytest.mark.parametrize("case", golden("golden_roi/meta.json")["cases"])
def test_region_pooling(case):
    t = {
        k.split(".", 1)[1]: v
        for k, v in golden("golden_roi/roi_align.safetensors").items()
        if k.startswith(case + ".")
    }
    order = torch.argsort(t["batch_index"], stable=True)
    boxes = [t["rois"][t["batch_index"] == i, 1:] for i in range(len(t["features"]))]
    close(
        roi_weights(t["rois"][:, 1:], *t["features"].shape[-2:], dtype=torch.float64),
        t["weights_ref64"],
        1e-14,
    )
    for dtype, kind, atol in (
        (torch.float64, "ref64", 1e-13),
        (torch.float32, "torchvision32", 2e-6),
    ):
        f = t["features"].to(dtype).requires_grad_()
        out = roi_align_1x1(f, boxes)
        out.backward(t["cotangent"][order].to(dtype))
        close(out.detach(), t[f"out_{kind}"][order], atol)
        close(f.grad, t[f"grad_features_{kind}"], atol)


def test_stretched_positions_exactly():
    g = golden("golden_pos/position_interp.safetensors")
    assert torch.equal(stretch_positions(g["old"]), g["new_float32"])
    assert torch.equal(stretch_positions(g["old"].double()), g["new_float64"])


SIZES = [
    ("ViT-B/32", 151_793_411, 403),
    ("ViT-B/16", 150_136_835, 403),
    ("ViT-L/14@336", 428_914_947, 595),
]


@pytest.mark.parametrize("name, count, keys", SIZES)
def test_parameter_counts(name, count, keys):
    with torch.device("meta"):
        model = FGCLIP(FGCLIPConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == count and len(model.state_dict()) == keys
    assert set(golden("golden_a/model.safetensors")) <= set(model.state_dict())


# Other geometries, real token ids


def widths(width, layers, heads, mlp, **kw):
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        **kw,
    )


GEOMETRY = {
    "wide text, 3 x 3": dict(
        projection_dim=24,
        text_config=widths(96, 2, 3, 192),
        vision_config=widths(32, 2, 2, 96, image_size=42, patch_size=14),
    ),
    "one layer, gelu, 8 x 8": dict(
        projection_dim=48,
        text_config=widths(32, 1, 1, 64, hidden_act="gelu", eos_token_id=2),
        vision_config=widths(64, 1, 4, 64, hidden_act="gelu", image_size=64, patch_size=8),
    ),
}
CAPTIONS = [
    "A light grey plastic pipe.",
    "a photo of two dogs, one of them asleep, on a red sofa",
    "",
    "A man in a blue jacket " * 12,
]


def geometry(name):
    torch.manual_seed(1)
    model = FGCLIP(FGCLIPConfig(**GEOMETRY[name])).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def real_ids(limit):
    t = tokenize(CAPTIONS, limit)
    return [t.input_ids[i, : t.lengths[i]].tolist() for i in t.index]


@pytest.mark.parametrize("name", GEOMETRY)
def test_other_geometries_with_real_texts(name):
    model = geometry(name)
    sd, config, size = (
        dict(model.named_parameters()),
        model.config,
        model.config.vision_config.image_size,
    )
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.4, 0.4, 0.45, 0.47]])
    short, long = real_ids(77), real_ids(248)
    batch = make_batch(pixels, short[:2], long[2:], boxes, [1, 0, 1], short[1:4], [short[:3]], [2])
    out, maps = model(batch), [plain_image(sd, config, p) for p in pixels]
    texts = [plain_text(sd, config, t) for t in short]
    expected = dict(
        image_features=[m[0] for m in maps],
        text_features=texts[:2],
        region_text_features=texts[1:4],
        hard_text_features=texts[:3],
        long_text_features=[plain_text(sd, config, t, "long") for t in long[2:]],
        region_features=[plain_roi(maps[i][1], b) for i, b in zip([1, 0, 1], boxes)],
    )
    expected = {k: torch.stack(v) for k, v in expected.items()}
    for k, v in expected.items():
        close(out[k], v, 2e-6 if k == "region_features" else 1e-9)
    w = {k: torch.randn_like(v) for k, v in expected.items()}
    params = [p for n, p in sd.items() if n not in SCALES]
    ours, theirs = (
        torch.autograd.grad(sum((f[k] * w[k]).sum() for k in w), params, allow_unused=True)
        for f in (out, expected)
    )
    for g, e in zip(ours, theirs):
        assert (g - e).norm() <= 1e-6 * e.norm() + 1e-9


@pytest.mark.parametrize("name", GEOMETRY)
def test_equals_transformers_clip_and_its_position_interpolation(name):
    from transformers.models.clip.modeling_clip import CLIPModel, CLIPConfig

    model = geometry(name).eval()
    clip = (
        CLIPModel(
            CLIPConfig(**{k: v for k, v in model.config.to_dict().items() if k in GEOMETRY[name]})
        )
        .double()
        .eval()
    )
    clip.load_state_dict({k: v for k, v in model.state_dict().items() if k in clip.state_dict()})
    size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    with torch.no_grad():
        for height, width in ((size, size), (size + 2 * patch, size - patch)):
            pixels = torch.randn(2, 3, height, width, dtype=torch.float64)
            close(
                model.get_image_features(pixels),
                clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output,
                1e-10,
            )
        ids = tokenize(CAPTIONS).input_ids
        close(model.get_text_features(ids), clip.get_text_features(ids).pooler_output, 1e-10)


# Precision, memory, faults


def test_bfloat16_autocast_and_weights():
    model, (batch, _) = golden_model(), golden_batch()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(batch)
    half = golden_model(torch.bfloat16)(batch)
    for name, e in exact.items():
        for ours in (cast[name], half[name]):
            assert (ours.float() - e).norm() <= 0.03 * e.norm(), name
    sum(v.float().pow(2).sum() for v in cast.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for on in (False, True):
        model, (batch, boxes) = (
            golden_model(torch.float64).train(),
            golden_batch(dtype=torch.float64),
        )
        model.gradient_checkpointing = on
        official_losses(model(batch), batch, boxes)["total"].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


EMPTY = [
    [0.3, 0.3, 0.3, 0.8],
    [0.5, 0.5, 0.5, 0.5],
    [1.5, 1.5, 1.9, 1.8],
    [0.8, 0.2, 0.2, 0.8],
    [float("nan")] * 4,
]


@pytest.mark.parametrize("box", EMPTY)
def test_boxes_without_area_are_zeros_and_harmless(box):
    model, x = golden_model(), golden("golden_a/inputs.safetensors")
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.6], box])
    _, regions = model.encode_images(x["pixel_values"], boxes, torch.tensor([0, 0]))
    assert regions[1].abs().max() == 0
    regions.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("length", [2, 5, 76, 77, 78, 130, 248])
def test_long_path_takes_any_width(length):
    model, ids = (
        golden_model(torch.float64),
        golden("golden_a/inputs.safetensors")["text_long"][:1].clone(),
    )
    ids[0, length - 1 :] = 511
    a, b = (
        model.get_text_features(ids[:, :length], walk_short_pos=False),
        model.get_text_features(ids, walk_short_pos=False),
    )
    close(a, b, 1e-12)
    close(
        a[0],
        plain_text(dict(model.named_parameters()), model.config, unpadded(ids)[0], "long"),
        1e-9,
    )
    if length > 77:
        with pytest.raises(ValueError, match="short path, which has 77"):
            model.get_text_features(ids[:, :length])
