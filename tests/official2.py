"""What tests of FG-CLIP 2's losses share: the recorded model and batch, and the official terms."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from fgclip_nb.losses.contrast import hard_negative_loss, region_loss
from fgclip_nb.losses.hard_groups import hard_contrast_loss, ranking_loss
from fgclip_nb.losses.sigmoid import sigmoid_loss
from fgclip_nb.losses.spread import spread_loss
from fgclip_nb.model.fgclip2 import FGCLIP2

GOLDENS = Path(__file__).parent / "goldens_fgclip2"
PHOTOS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
WEIGHTS = dict(
    global_long=1.0,
    global_short=1.0,
    region=0.2,
    tic=0.1,
    hard_contrastive=0.3,
    hard_pair=1.5,
    hard_cmr=0.2,
)  # 0.5 (0.6 contrastive + 3 pair + 0.4 ranking)
SLOTS, GROUP = 4, 11  # boxes per image, texts per hard group


def recorded(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def recorded_batch(rank=0, world=1):
    "The inputs of one process; with two of them each has half of the images."
    x = load_file(GOLDENS / "inputs.safetensors")
    images = len(x["box_nums"]) // world
    mine = slice(rank * images, (rank + 1) * images)
    hard = [0, *(x["hard_nums"].cumsum(0) * GROUP).tolist()]
    parts = {n: x[n][mine] for n in (*PHOTOS, "text_short", "text_long", "box_nums", "hard_nums")}
    slots = slice(mine.start * SLOTS, mine.stop * SLOTS)
    parts |= {n: x[n][slots] for n in ("box_infos", "box_texts", "hard_infos")}
    return parts | dict(hard_texts=x["hard_texts"][hard[mine.start] : hard[mine.stop]])


def valid_slots(counts):
    return torch.cat([torch.arange(n) + SLOTS * i for i, n in enumerate(counts.tolist())])


def official_features(model, x):
    "Features of the recorded batch by role."
    dtype = model.logit_scale.dtype
    boxes, hard = valid_slots(x["box_nums"]), valid_slots(x["hard_nums"])
    photos = {n: x[n].to(dtype) if n == "pixel_values" else x[n] for n in PHOTOS}
    all_boxes = torch.cat([x["box_infos"][boxes], x["hard_infos"][hard]])
    pictures, regions = model.encode_images(
        **photos, boxes=all_boxes, box_image=torch.cat([boxes, hard]) // SLOTS
    )
    both = torch.cat([x["box_texts"][boxes], x["hard_texts"]])
    texts = model.encode_texts(short=x["text_short"], long=x["text_long"], box=both)
    region, hard_region = regions.split([len(boxes), len(hard)])
    region_text, hard_text = texts["box"].split([len(boxes), len(x["hard_texts"])])
    return dict(
        image=pictures,
        short=texts["short"],
        long=texts["long"],
        region=region,
        region_text=region_text,
        hard_region=hard_region,
        hard_text=hard_text,
        sizes=torch.full((len(hard),), GROUP),
    )


def official_terms(model, f, margin=0.0, box=True, hard=True, long=True):
    "Terms under the names of the recordings; those of regions among this process's rows alone."
    scale, bias, fine = model.logit_scale, model.logit_bias, model.logit_scale_finegraind
    alone = dict(duplicates="ignore", gather=False)
    terms = dict(
        global_short=sigmoid_loss(f["image"], f["short"], scale, bias, duplicates="ignore")
    )
    if long:
        terms["global_long"] = sigmoid_loss(f["image"], f["long"], scale, bias, duplicates="ignore")
    if box:
        terms["region"] = region_loss(f["region"], f["region_text"], fine, **alone)
        terms["tic"] = spread_loss(f["region_text"], gather=False)
    if hard:
        groups = (f["hard_region"], f["hard_text"], f["sizes"], model.logit_scale_hardneg)
        terms["hard_contrastive"] = hard_contrast_loss(*groups, **alone)
        terms["hard_pair"] = hard_negative_loss(*groups, gather=False)
        terms["hard_cmr"] = ranking_loss(*groups, margin, gather=False)
    return terms


def official_total(terms):
    return sum(WEIGHTS[name] * term.loss for name, term in terms.items())


def golden_model2(dtype):
    return FGCLIP2.from_pretrained(GOLDENS, dtype=dtype)
