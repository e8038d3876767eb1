"""What the official FG-CLIP code computes, written plainly from a state dict: padded texts, full
layers, one sample at a time, loops over boxes and sample points. Also the recorded outputs of the
official code (`tests/goldens`) as a batch.

No test in here; others compare the fast model with it."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fgclip_nb.batches.batch import Batch
from fgclip_nb.model.config import FGCLIPConfig
from fgclip_nb.model.fgclip import FGCLIP
from fgclip_nb.text.packing import TextBatch

GOLDENS = Path(__file__).parent / "goldens"
BOS, EOS = 510, 511  # of the goldens' reduced vocabulary


def golden(name):
    return (
        load_file(GOLDENS / name)
        if name.endswith("safetensors")
        else json.loads((GOLDENS / name).read_text())
    )


def golden_model(dtype=torch.float32):
    config = golden("golden_a/config.json")
    model = FGCLIP(
        FGCLIPConfig(**{k: config[k] for k in ("projection_dim", "text_config", "vision_config")})
    )
    model.load_state_dict(golden("golden_a/model.safetensors"))
    return model.to(dtype)


def text_batch(rows, eos=EOS):
    "Lists of ids that end with EOS -> TextBatch of the distinct ones."
    distinct = {}
    index = [distinct.setdefault(tuple(r), len(distinct)) for r in rows]
    ids = torch.full((len(distinct), max(map(len, distinct), default=0)), eos)
    for row, r in zip(ids, distinct):
        row[: len(r)] = torch.tensor(r)
    identity = torch.tensor([hash(tuple(r)) >> 1 for r in rows], dtype=torch.int64)
    return TextBatch(
        ids,
        torch.tensor([len(r) for r in distinct], dtype=torch.int64),
        torch.tensor(index, dtype=torch.int64),
        identity,
    )


def unpadded(ids, eos=EOS):
    return [row[: row.index(eos) + 1] for row in ids.tolist()]


def make_batch(pixels, short, long, boxes, box_image, phrases, groups, group_regions):
    """Photos (B,3,S,S), ids of short captions, long captions and phrases, boxes (R,4), groups of
    ids per hard region -> Batch."""

    def ints(x):
        return torch.tensor(list(x), dtype=torch.int64)

    B, R = len(pixels), len(phrases)
    texts = text_batch([*short, *phrases, *[t for g in groups for t in g]])
    return Batch(
        pixel_values=pixels,
        texts=texts,
        long_texts=text_batch(long) if long else None,
        caption_rows=ints(range(len(short))),
        long_caption_rows=ints(range(len(long))),
        boxes=boxes,
        box_image=ints(box_image),
        box_region=ints(range(R)),
        frame_clip=ints(range(B)),
        frame_times=torch.zeros(B),
        in_clip=torch.ones(B, dtype=torch.bool),
        group_sizes=ints(map(len, groups)),
        hard_regions=ints(group_regions),
        sample_ids=ints(range(B)),
        region_ids=ints(range(100, 100 + R)),
        region_clip=ints(box_image),
    )


def golden_batch(setting="stage2", dtype=torch.float32):
    """The goldens' inputs without their empty slots, and the number of boxes.

    Hard boxes are found among the boxes by their coordinates."""
    x = golden("golden_a/inputs.safetensors")
    with_boxes, with_hard = setting in ("stage2", "box_only"), setting in ("stage2", "hard_only")
    slots = (
        [(i, i * 4 + j) for i in range(3) for j in range(int(x["box_nums"][i]))]
        if with_boxes
        else []
    )
    hard = (
        [(i, i * 4 + j) for i in range(3) for j in range(int(x["hard_nums"][i]))]
        if with_hard
        else []
    )
    phrases, groups = unpadded(x["box_texts"]), unpadded(x["hard_texts"])
    places = [
        r
        for _, h in hard
        for r, (_, s) in enumerate(slots)
        if torch.equal(x["box_infos"][s], x["hard_infos"][h])
    ]
    boxes, image = x["box_infos"][[s for _, s in slots]], [i for i, _ in slots]
    if len(places) != len(hard):  # hard boxes that are not among the boxes stand behind them
        boxes, image = (
            torch.cat([boxes, x["hard_infos"][[h for _, h in hard]]]),
            image + [i for i, _ in hard],
        )
        places = range(len(slots), len(slots) + len(hard))
    rows = [phrases[s] for _, s in slots] + [groups[11 * k] for k in range(len(hard))][
        : len(image) - len(slots)
    ]
    batch = make_batch(
        x["pixel_values"].to(dtype),
        unpadded(x["text_short"]),
        unpadded(x["text_long"]),
        boxes,
        image,
        rows,
        [groups[11 * k : 11 * k + 11] for k in range(len(hard))],
        places,
    )
    return batch, len(slots)


# The official computation, from a state dict


def tower(x, sd, prefix, layers, heads, mask=None, act="quick_gelu"):
    "Tokens (B,L,W) -> list of hidden states, the input first."
    states = [x]
    for i in range(layers):
        states.append(full_layer(states[-1], sd, f"{prefix}.encoder.layers.{i}.", heads, mask, act))
    return states


def linear(x, sd, name):
    return F.linear(x, sd[name + ".weight"], sd.get(name + ".bias"))


def norm(x, sd, name):
    return F.layer_norm(x, x.shape[-1:], sd[name + ".weight"], sd[name + ".bias"], 1e-5)


def mlp(x, sd, p, act):
    h = linear(norm(x, sd, p + "layer_norm2"), sd, p + "mlp.fc1")
    return x + linear(
        h * torch.sigmoid(1.702 * h) if act == "quick_gelu" else F.gelu(h), sd, p + "mlp.fc2"
    )


def full_layer(x, sd, p, heads, mask, act):
    h, (B, L, W) = norm(x, sd, p + "layer_norm1"), x.shape
    q, k, v = (
        linear(h, sd, f"{p}self_attn.{n}_proj").view(B, L, heads, -1).transpose(1, 2) for n in "qkv"
    )
    scores = (q * (W // heads) ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return mlp(
        x
        + linear(
            (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, W), sd, p + "self_attn.out_proj"
        ),
        sd,
        p,
        act,
    )


def plain_text(sd, config, ids, path="short"):
    "One text, list of ids ending with EOS -> (D,), padded to 77 or 248 as the official code does."
    t, L, eos = config.text_config, 248 if path == "long" else 77, ids[-1]
    padded, e = torch.tensor(ids + [eos] * (L - len(ids))), "text_model.embeddings."
    keep = (torch.arange(248) < 20)[:, None].to(sd["text_projection.weight"].dtype)
    short, ori, res = (sd[f"{e}position_embedding{n}.weight"] for n in ("", "_ori", "_res"))
    x = sd[e + "token_embedding.weight"][padded] + (
        ori * keep + res * (1 - keep) if path == "long" else short
    )
    mask = torch.full((L, L), -math.inf, dtype=x.dtype).triu(1)
    x = tower(
        x[None], sd, "text_model", t.num_hidden_layers, t.num_attention_heads, mask, t.hidden_act
    )[-1]
    x = norm(x, sd, "text_model.final_layer_norm")
    return linear(
        x[0, len(ids) - 1], sd, "text_projection" if path == "short" else "text_filip_projection"
    )


def plain_image(sd, config, pixels):
    "One image (3,S,S) -> image feature (D,), dense map (D,H,W)."
    v, e = config.vision_config, "vision_model.embeddings."
    patches = F.conv2d(pixels[None], sd[e + "patch_embedding.weight"], stride=v.patch_size)
    x = (
        torch.cat([sd[e + "class_embedding"][None, None], patches.flatten(2).transpose(1, 2)], 1)
        + sd[e + "position_embedding.weight"]
    )
    x = norm(x, sd, "vision_model.pre_layrnorm")
    states = tower(
        x, sd, "vision_model", v.num_hidden_layers, v.num_attention_heads, act=v.hidden_act
    )
    p = f"vision_model.encoder.layers.{v.num_hidden_layers - 1}."
    value = linear(norm(states[-2], sd, p + "layer_norm1"), sd, p + "self_attn.v_proj")
    dense = mlp(states[-2] + linear(value, sd, p + "self_attn.out_proj"), sd, p, v.hidden_act)[
        0, 1:
    ]
    out = [
        linear(norm(y, sd, "vision_model.post_layernorm"), sd, "visual_projection")
        for y in (states[-1][0, 0], dense)
    ]
    return out[0], out[1].T.unflatten(1, patches.shape[2:])


def interpolate(f, y, x):
    "Bilinear value of a map (D,H,W) at a point, zero further than a cell outside."
    H, W = f.shape[1:]
    if y < -1 or y > H or x < -1 or x > W:
        return torch.zeros_like(f[:, 0, 0])
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
    top, bottom = (f[:, r, x0] * (1 - x + x0) + f[:, r, x1] * (x - x0) for r in (y0, y1))
    return top * (1 - y + y0) + bottom * (y - y0)


def plain_roi(f, box01):
    "One box (4,) float32 from 0 to 1 on a map (D,H,W) -> (D,), RoIAlign point by point."
    H, W = f.shape[1:]
    x1, y1, x2, y2 = box01.float() * torch.tensor([W, H, W, H]) - 0.5
    w, h = (x2 - x1).item(), (y2 - y1).item()
    nx, ny = math.ceil(w), math.ceil(h)
    if nx <= 0 or ny <= 0:
        return torch.zeros_like(f[:, 0, 0])
    points = [
        (y1.item() + (i + 0.5) * h / ny, x1.item() + (j + 0.5) * w / nx)
        for i in range(ny)
        for j in range(nx)
    ]
    return sum(interpolate(f, *p) for p in points) / len(points)


# The official losses, one process, no duplicates known


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def symmetric(a, b, scale):
    logits = scale.exp() * unit(a) @ unit(b).T
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def official_losses(f, batch, boxes):
    """Features by name -> dict of terms and the weighted total.

    The first `boxes` regions are contrasted, the others only carry hard groups."""
    terms = dict(
        global_long=symmetric(f["image_features"], f["long_text_features"], f["logit_scale"]),
        global_short=symmetric(f["image_features"], f["text_features"], f["logit_scale"]),
    )
    total = terms["global_long"] + terms["global_short"]
    if boxes:
        terms["region"] = symmetric(
            f["region_features"][:boxes],
            f["region_text_features"][:boxes],
            f["logit_scale_finegraind"],
        )
        total = total + 0.1 * terms["region"]
    if len(batch.group_sizes):
        groups = f["hard_text_features"].split(batch.group_sizes.tolist())
        rows = [
            f["logit_scale_hardneg"].exp() * unit(t) @ unit(f["region_features"][r])
            for r, t in zip(batch.hard_regions, groups)
        ]
        terms["hard"] = torch.stack([F.cross_entropy(r, torch.tensor(0)) for r in rows]).mean()
        total = total + 0.5 * terms["hard"]
    return {**terms, "total": total}
