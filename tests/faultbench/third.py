"""A catalogue of trainings as everyday users make them, broken and healthy.

Its author thought of people who gather photos, draw boxes with a tool, join spreadsheets, copy
parameters from a recipe, fine-tune what they have, or change a line of a copy of the package. He
read the parameters, the data formats, the model, the losses, the batches and the loop, and of the
diagnostics only the public list of causes. Before it was sealed most cases were run for two
steps (`drive_lost` for 14) to see that they do what they say; no verdict was looked at. Harm is the
bench's figure (`HARM`); it is about captions, so the faults of `BOXES`, and those whose `told` says
that they touch regions, may hardly show in it.

It is no cell: broken trainings are no example of how to train."""

import contextlib, dataclasses, importlib, re
from unittest.mock import patch
import numpy as np
import torch
from PIL import Image
from bench import Case, rebound
from world import SIDE


# ---- rows and photos: functions (rows, folder, rng) -> rows ----------------------------------
def every_row(fix, split=None, share=1.0):
    "A change that calls fix(row, folder, rng) on a share of the rows (of one split)."

    def change(rows, folder, rng):
        for row in rows:
            if split in (None, row["split"]) and rng.random() < share:
                fix(row, folder, rng)
        return rows

    return change


def pixels_of(row, folder) -> np.ndarray:
    return np.asarray(Image.open(folder / row["image"]).convert("RGB"), float)


def save_pixels(row, folder, pixels):
    new = np.clip(pixels, 0, 255).astype(np.uint8)
    Image.fromarray(new).save(folder / row["image"])


def every_photo(fix, split=None, share=1.0):
    "A change of photos: fix(array (height, width, 3) float, rng) -> array."

    def one(row, folder, rng):
        save_pixels(row, folder, fix(pixels_of(row, folder), rng))

    return every_row(one, split, share)


def every_box(fix):
    "A change of all boxes: fix([x1, y1, x2, y2] in pixels) -> four numbers."

    def one(row, folder, rng):
        for region in row["regions"]:
            region["bbox"] = fix(region["bbox"])

    return every_row(one)


def every_text(fix, split=None):
    "A change of all captions, phrases and hard negatives: fix(text) -> text."

    def one(row, folder, rng):
        row["captions"] = [fix(c) for c in row["captions"]]
        for region in row["regions"]:
            region["caption"] = fix(region["caption"])
            region["negatives"] = [fix(n) for n in region["negatives"]]

    return every_row(one, split)


def every_caption(write, split=None, share=1.0):
    "A change of captions: write(row, rng) -> the new one."

    def one(row, folder, rng):
        row["captions"] = [write(row, rng)]

    return every_row(one, split, share)


def of_split(rows, split) -> list:
    return [row for row in rows if row["split"] == split]


# ---- boxes -----------------------------------------------------------------------------------
def to_thousandths(box):
    return [round(1000 * v / SIDE) for v in box]


def halved(box):
    return [v / 2 for v in box]


def whole_photo(box):
    return [0, 0, SIDE, SIDE]


def boxes_of_next_photo(rows, folder, rng):
    "Each region has a box of the photo after its own, as when two tables are joined by row."
    kept = [[r["bbox"] for r in row["regions"]] for row in rows]
    for row, boxes in zip(rows, kept[1:] + kept[:1]):
        for k, region in enumerate(row["regions"]):
            region["bbox"] = boxes[k % len(boxes)]
    return rows


def boxes_left_to_right(row, folder, rng):
    "The boxes sorted by their left edge, the phrases as they were typed."
    boxes = sorted(r["bbox"] for r in row["regions"])
    for region, box in zip(row["regions"], boxes):
        region["bbox"] = box


def as_shares(row, *unused):
    "Boxes of a row as shares of its sides, and no size."
    for region in row["regions"]:
        region["bbox"] = [v / SIDE for v in region["bbox"]]
    del row["width"], row["height"]


def pillarboxed(row, folder, rng):
    "The photo in the middle of a wide black canvas; the boxes are shares of the old photo."
    pixels = pixels_of(row, folder)
    canvas = np.zeros((SIDE, 2 * SIDE, 3))
    canvas[:, SIDE // 2 : SIDE // 2 + SIDE] = pixels
    save_pixels(row, folder, canvas)
    as_shares(row)


# ---- photos ----------------------------------------------------------------------------------
def mirrored(pixels, rng):
    return pixels[:, ::-1]


def grey(pixels, rng):
    return np.repeat(pixels @ (0.299, 0.587, 0.114), 3).reshape(pixels.shape)


def underexposed(pixels, rng):
    return 0.03 * pixels


def channels_exchanged(pixels, rng):
    return pixels[..., ::-1]


def placeholder(pixels, rng):
    "The picture that a host sends for a hot-linked photo: a crossed-out frame."
    out = np.full_like(pixels, 225.0)
    steps = np.arange(8, SIDE - 8)
    for thick in range(4):
        out[steps, np.clip(steps + thick, 0, SIDE - 1)] = 150
        out[steps, np.clip(SIDE - 1 - steps + thick, 0, SIDE - 1)] = 150
    return out


def numbered_without_zeros(rows, folder, rng):
    "Files 0.png, 1.png, …: listed as strings, while the annotations are in order of number."
    for i, row in enumerate(rows):
        (folder / row["image"]).rename(folder / f"{i}.png")
    for row, name in zip(rows, sorted(f"{i}.png" for i in range(len(rows)))):
        row["image"] = name
    return rows


def leak(rows, folder, rng):
    "Held-out photos are training photos, saved anew under other names as JPEG."
    for row, source in zip(of_split(rows, "val"), of_split(rows, "train")):
        name = f"export_{row['image'][:-4]}.jpg"
        Image.open(folder / source["image"]).convert("RGB").save(folder / name, quality=95)
        row.update(image=name, captions=source["captions"], regions=source["regions"])
    return rows


def burst_shots(rows, folder, rng):
    "Twelve scenes of twenty shots each, which differ by the noise of the camera alone."
    train = of_split(rows, "train")
    for k, row in enumerate(train):
        scene = train[k % 12]
        if row is not scene:
            shot = pixels_of(scene, folder) + rng.normal(0, 4, (SIDE, SIDE, 3))
            save_pixels(row, folder, shot)
            row.update(captions=scene["captions"], regions=scene["regions"])
    return rows


def photo_gone(row, folder, rng):
    (folder / row["image"]).unlink()


def half_downloaded(row, folder, rng):
    path = folder / row["image"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lens_cap(rows, folder, rng):
    "Six training photos of one single colour."
    for row in of_split(rows, "train")[5:180:30]:
        save_pixels(row, folder, np.full((SIDE, SIDE, 3), 12.0))
    return rows


# ---- captions --------------------------------------------------------------------------------
def pasted_in_part(rows, folder, rng):
    "60 % of the training captions are in other rows, as after pasting into a filtered table."
    train = of_split(rows, "train")
    cells = [train[i] for i in rng.permutation(len(train))[: len(train) * 6 // 10]]
    kept = [row["captions"] for row in cells]
    for row, captions in zip(cells, kept[1:] + kept[:1]):
        row["captions"] = captions
    return rows


def held_out_one_late(rows, folder, rng):
    "Held-out captions alone, each from the row before."
    val = of_split(rows, "val")
    kept = [row["captions"] for row in val]
    for row, captions in zip(val, kept[-1:] + kept[:-1]):
        row["captions"] = captions
    return rows


def question_marks(row, rng):
    "A Chinese caption saved in a code page that does not have its letters."
    return "?" * (5 * len(row["regions"]))


def time_stamp(row, rng):
    day, hour, minute, second = (int(rng.integers(1, n)) for n in (29, 24, 60, 60))
    return f"2024-05-{day:02d} {hour:02d}:{minute:02d}:{second:02d}"


def folder_name(row, rng):
    return f"toys / {row['regions'][0]['caption'].split()[-1]}s"


def first_colour(row, rng):
    return f"a picture with something {row['regions'][0]['caption'].split()[1]}"


REFUSALS = (
    "I'm sorry, but I can't describe this image.",
    "I'm unable to view images directly.",
    "As an AI model I cannot see the picture.",
)


def refusal(row, rng):
    return REFUSALS[int(rng.integers(len(REFUSALS)))]


LICENCE = (
    "All rights reserved. This photograph is licensed for editorial use only and may not be "
    "reproduced, distributed, displayed or altered in any form without the prior written "
    "permission of the photographer and of the agency; the credit line has to stand next to the "
    "picture in letters of at least eight points, and every sale to third parties, every use in "
    "advertising and every storage in a public archive needs a contract of its own. Description: "
)


def after_the_licence(row, rng):
    return LICENCE + row["captions"][0]


GERMAN = dict(
    red="rot",
    green="grün",
    blue="blau",
    yellow="gelb",
    purple="lila",
    orange="orangefarben",
    cyan="türkis",
    pink="rosa",
    brown="braun",
    white="weiß",
    square="Quadrat",
    disc="Scheibe",
    triangle="Dreieck",
    a="ein",
)
GERMAN["and"] = "und"


def in_german(text):
    return re.sub(r"\w+", lambda m: GERMAN.get(m[0], m[0]), text)


def unseen_colours(rows, folder, rng):
    "Whatever has pink or cyan in it is held out, and nothing else."
    rare = [any(c in row["captions"][0] for c in ("pink", "cyan")) for row in rows]
    held_out = [row for row, r in zip(rows, rare) if r][:48]
    train = [row for row, r in zip(rows, rare) if not r]
    for part, name in ((held_out, "val"), (train, "train")):
        for row in part:
            row["split"] = name
    return train + held_out


def negatives_exchanged(row, folder, rng):
    "The columns of the right phrase and of the first wrong one are exchanged."
    for region in row["regions"]:
        right, wrong = region["caption"], region["negatives"][0]
        region.update(caption=wrong, negatives=[right, *region["negatives"][1:]])


def by_first_phrase(rows, folder, rng):
    return sorted(rows, key=lambda row: row["regions"][0]["caption"])


# ---- a careless change of the package: contexts ----------------------------------------------
def room(name: str):
    return importlib.import_module(f"fgclip_nb.{name}")


def planted(name, wrapper):
    "A plant: the function `name` of the package is wrapper(original) everywhere."
    return lambda: rebound(name, wrapper)


@contextlib.contextmanager
def several(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def after_update(change):
    "A plant: change(name, weights before, weights, cfg), in place, after each optimiser step."

    def wrapper(apply_update):
        def changed(s, norm, bad):
            before = {n: p.detach().clone() for n, p in s.model.named_parameters()}
            apply_update(s, norm, bad)
            with torch.no_grad():
                for name, p in s.model.named_parameters():
                    change(before[name], p, s.cfg)

        return changed

    return planted("apply_update", wrapper)


def moved_by_average(before, p, cfg):
    "The running average of the weights, meant for evaluation, is what is trained on."
    p.copy_(0.998 * before + 0.002 * p)


def rounded(before, p, cfg):
    p.copy_(p.bfloat16().float())


def decayed_again(before, p, cfg):
    "The decay is not multiplied by the learning rate."
    if p.ndim > 1:
        p.mul_(1 - cfg.weight_decay)


def without_layers(parameter_groups):
    "Parameters chosen by name: those of the layers do not match."

    def groups(model, weight_decay):
        inside = {id(p) for n, p in model.named_parameters() if ".layers." in n}
        made = parameter_groups(model, weight_decay)
        return [g | dict(params=[p for p in g["params"] if id(p) not in inside]) for g in made]

    return groups


def vision_detached(visual_features):
    def features(model, batch):
        return {k: v.detach() for k, v in visual_features(model, batch).items()}

    return features


def vision_layers_fresh(build_model):
    "Names of the vision layers do not fit the file's, and nobody is told (strict=False)."

    def built(cfg, log):
        model = build_model(cfg, log)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.vision_model.encoder.layers.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.02)
        return model

    return built


def scale_taken_for_its_log(build_model):
    "The factor 14.3 is stored where its logarithm belongs, and clamped."

    def built(cfg, log):
        model = build_model(cfg, log)
        with torch.no_grad():
            for name in room("model.towers").SCALES:
                getattr(model, name).fill_(float(np.exp(cfg.logit_scale_init)))
        model.clamp_scales_()
        return model

    return built


def gradients_kept():
    return patch.object(torch.optim.AdamW, "zero_grad", lambda self, set_to_none=True: None)


def file_order(epoch_order):
    return lambda n, seed=0, epoch=0: np.arange(n)


def texts_left_sorted(textual_features):
    "Captions are sorted by length for speed, and not put back in order."

    def features(model, batch):
        out = textual_features(model, batch)
        lengths = batch.texts.lengths[batch.texts.index][: batch.n_captions]
        if "text_features" in out:
            out["text_features"] = out["text_features"][lengths.argsort(stable=True)]
        return out

    return features


def not_normalised():
    return patch.object(room("losses.contrast"), "unit_rows", lambda x: x.float())


def divided_by_scale():
    "Cosines are divided by the factor instead of multiplied."
    objective = room("losses.objective")

    def inverse(loss):
        return lambda a, b, scale, *rest, **named: loss(a, b, -scale, *rest, **named)

    names = ("global_loss", "region_loss")
    return several(*(patch.object(objective, n, inverse(getattr(objective, n))) for n in names))


def right_text_last(drawn_region):
    "A group of hard negatives ends with the right text, where the loss expects the first."

    def drawn(*args, **named):
        region = drawn_region(*args, **named)
        if region.negatives:
            first, *rest = region.negatives
            region.negatives, region.positive = (*rest, region.positive), first
        return region

    return drawn


def divided_twice():
    tower = room("model.vision_tower")
    normalize = tower.normalize

    def twice(pixels, dtype=None):
        black = normalize(torch.zeros_like(pixels), dtype)
        return (normalize(pixels, dtype) - black) / 255 + black

    return patch.object(tower, "normalize", twice)


def own_contrast():
    "Every photo is brought to mean 0 and deviation 1, whatever its deviation."

    def standardised(pixels, dtype=None):
        x = pixels.float()
        axes = (-3, -2, -1)
        return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True, correction=0)

    return patch.object(room("model.vision_tower"), "normalize", standardised)


def first_token(project_texts):
    "The state of the opening mark stands for the text, not that of the closing one."

    def opening(p):
        if p is None or not len(p.ends):
            return p
        return dataclasses.replace(
            p, ends=torch.zeros_like(p.ends), row_lengths=torch.ones_like(p.row_lengths)
        )

    return lambda model, short, long: project_texts(model, opening(short), opening(long))


def boxes_changed(change):
    "A plant: change(boxes in cells) before they are pooled."

    def plant():
        tower = room("model.vision_tower")
        pool = tower.pool_regions

        def pooled(model, patches, boxes, *rest, **named):
            return pool(model, patches, change(boxes), *rest, **named)

        return patch.object(tower, "pool_regions", pooled)

    return plant


def columns_for_rows(boxes):
    return boxes[:, [1, 0, 3, 2]]


def as_pixels(boxes):
    return boxes * 8


def schedule_per_sample(learning_rate_at):
    "The schedule takes a step for each sample."

    def rate(step, cfg, total):
        return learning_rate_at(min(step * cfg.batch_size, total + 1), cfg, total)

    return rate


def region_subtracted(total_loss):
    def total(terms, cfg):
        whole = total_loss(terms, cfg)
        region = terms.get("loss_region")
        return whole if region is None else whole - 2 * cfg.region_weight * region.loss

    return total


def pointer_stands(write_rows):
    "The pointer of the bank stays, so each batch overwrites the one before."

    def write(ring, rows):
        at = ring["pointer"].clone()
        kept = write_rows(ring, rows)
        ring["pointer"].copy_(at)
        ring["filled"].fill_(kept)
        return kept

    return write


def written_until_full(write_rows):
    def write(ring, rows):
        return 0 if int(ring["filled"]) == len(ring["born"]) else write_rows(ring, rows)

    return write


def six_tokens():
    batch = room("batches.batch")
    tokenize = batch.tokenize
    return patch.object(batch, "tokenize", lambda texts, n=77: tokenize(texts, min(n, 6)))


def drive_lost():
    "After 150 photos the network drive no longer answers."
    DataError = room("core.identity").DataError

    def wrapper(photo_for):
        reads = []

        def read(sample, drawing):
            reads.append(sample.media)
            if len(reads) > 150:
                raise DataError(f"{sample.media}: Input/output error")
            return photo_for(sample, drawing)

        return read

    return rebound("photo_for", wrapper)


def large_scaler(make_scaler):
    def made(precision, device):
        return torch.amp.GradScaler("cpu", init_scale=2.0**90) if precision == "fp16" else None

    return made


def tiny_parts(random_part):
    return lambda pixels, rng, least=0.35: random_part(pixels, rng, 0.01)


# ---- healthy changes -------------------------------------------------------------------------
def without(*keys):
    def one(row, folder, rng):
        for key in keys:
            row.pop(key, None)

    return every_row(one)


def no_negatives(row, folder, rng):
    for region in row["regions"]:
        del region["negatives"]


def twice_as_large(row, folder, rng):
    image = Image.open(folder / row["image"])
    image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC).save(folder / row["image"])
    row.update(width=2 * SIDE, height=2 * SIDE)
    for region in row["regions"]:
        region["bbox"] = [2 * v for v in region["bbox"]]


def as_jpeg(row, folder, rng):
    name = row["image"].replace(".png", ".jpg")
    Image.open(folder / row["image"]).save(folder / name, quality=90)
    row["image"] = name


def three_captions(row, folder, rng):
    text = row["captions"][0]
    row["captions"] = [text, f"a photo of {text}", f"{text} on a dark ground"]


def in_capitals(text):
    return text.upper()


def finehard(rows, folder, rng):
    "The rows in FineHARD's form; one in ten is held out by its name."
    return [
        dict(
            f_path=row["image"],
            caption=f"The picture shows {row['captions'][0]} on a dark ground.",
            short_caption=row["captions"][0],
            bbox_info=[
                dict(
                    bbox=[v / SIDE for v in r["bbox"]],
                    short_expr=r["caption"],
                    flag_short_neg=1,
                    short_expr_negs={str(k): n for k, n in enumerate(r["negatives"])},
                )
                for r in row["regions"]
            ],
        )
        for row in rows
    ]


def brighter(pixels, rng):
    return 0.75 * pixels + 60


def other_paint(pixels, rng):
    "The same photos under warm light."
    return pixels * (1.0, 0.85, 0.7)


def world_of(change, **more):
    return dict(change=change, **more)


START = Case("trained in the made world")
LONGER = dict(max_steps=160, lr_warmup_steps=16)

BOXES = dict(
    boxes_thousandths=Case(
        "boxes from 0 to 1000, as a language model writes them, beside sizes in pixels",
        ("boxes_rejected", "boxes_misread", "regions_lost"),
        world=world_of(every_box(to_thousandths)),
    ),
    boxes_half_scale=Case(
        "boxes drawn on a display at half size",
        ("boxes_misread", "phrases_mispaired"),
        world=world_of(every_box(halved)),
    ),
    half_mirrored=Case(
        "half of the training photos mirrored on disk to have more, their boxes not",
        ("boxes_misread", "phrases_mispaired"),
        world=world_of(every_photo(mirrored, "train", 0.5)),
    ),
    boxes_of_next_photo=Case(
        "each photo has the boxes of the next one, its phrases are its own",
        ("phrases_mispaired", "boxes_misread", "region_above_chance"),
        world=world_of(boxes_of_next_photo),
    ),
    boxes_left_to_right=Case(
        "the tool sorts boxes from left to right, phrases stay in the order they were typed",
        ("phrases_mispaired",),
        world=world_of(every_row(boxes_left_to_right)),
    ),
    boxes_whole=Case(
        "labels of whole photos turned into boxes of the whole photo",
        ("boxes_constant",),
        world=world_of(every_box(whole_photo)),
    ),
    pillarboxed=Case(
        "photos put on a wide black canvas after the boxes were drawn; boxes are shares",
        ("boxes_misread", "phrases_mispaired"),
        world=world_of(every_row(pillarboxed)),
    ),
    min_area_in_percent=Case(
        "`min_area` 0.2, meant as 0.2 %: most regions are refused",
        ("boxes_rejected", "regions_lost"),
        params=dict(min_area=0.2),
    ),
)
PHOTOS = dict(
    numeric_order=Case(
        "files sorted as strings (1, 10, 100, 2) beside annotations sorted by number",
        ("loss_at_chance", "global_above_chance", "region_above_chance", "held_out_above_chance"),
        world=world_of(numbered_without_zeros),
    ),
    placeholders=Case(
        "60 % of the training photos are the host's picture for hot-linked ones",
        ("photos_repeated", "photos_blank"),
        world=world_of(every_photo(placeholder, "train", 0.6)),
    ),
    grey_scans=Case(
        "photos scanned in grey, with captions that name colours",
        ("photos_grey",),
        world=world_of(every_photo(grey)),
    ),
    underexposed=Case(
        "photos at 3 % of their brightness: nearly black",
        ("photos_blank", "pixels_not_normalised", "image_embeddings_differ"),
        world=world_of(every_photo(underexposed)),
    ),
    train_in_bgr=Case(
        "training photos saved with red and blue exchanged, held-out ones not; no public rule is "
        "about this, the nearest say that nothing carries over",
        ("held_out_above_chance", "overfitting"),
        world=world_of(every_photo(channels_exchanged, "train")),
    ),
    leak_renamed=Case(
        "held-out photos are training photos saved anew as JPEG; held-out figures get better",
        ("leak",),
        world=world_of(leak),
    ),
    burst_shots=Case(
        "twelve scenes of twenty shots each",
        ("photos_repeated", "overfitting", "texts_few"),
        world=world_of(burst_shots),
    ),
    photos_moved=Case(
        "60 % of the training photos were moved away",
        ("media_missing",),
        world=world_of(every_row(photo_gone, "train", 0.6)),
    ),
    half_downloads=Case(
        "45 % of the training photos are broken-off downloads",
        ("media_missing",),
        world=world_of(every_row(half_downloaded, "train", 0.45)),
    ),
)
TEXTS = dict(
    captions_pasted=Case(
        "60 % of the training captions pasted into other rows",
        ("global_above_chance", "held_out_above_chance", "losses_fall_together"),
        world=world_of(pasted_in_part),
    ),
    question_marks=Case(
        "Chinese captions saved as question marks",
        ("texts_few", "global_above_chance"),
        world=world_of(every_caption(question_marks)),
    ),
    licence_first=Case(
        "captions that begin with a hundred words of licence, so their content is cut off",
        ("texts_cut", "text_embeddings_differ"),
        world=world_of(every_caption(after_the_licence)),
    ),
    time_stamps=Case(
        "the column of time stamps taken for captions",
        ("global_above_chance", "held_out_above_chance", "overfitting"),
        world=world_of(every_caption(time_stamp)),
    ),
    folder_names=Case(
        "captions are the names of three folders",
        ("texts_few",),
        world=world_of(every_caption(folder_name)),
    ),
    refusals=Case(
        "70 % of the training captions are refusals of the model that wrote them",
        ("texts_few", "global_above_chance", "duplicate_floor_reached"),
        world=world_of(every_caption(refusal, "train", 0.7)),
    ),
    negatives_exchanged=Case(
        "the columns of right and wrong phrases exchanged; of regions alone",
        ("region_above_chance", "hard_above_chance", "phrases_mispaired"),
        world=world_of(every_row(negatives_exchanged)),
    ),
    held_out_join=Case(
        "captions of held-out photos joined one row late, training in order",
        ("held_out_above_chance", "overfitting"),
        world=world_of(held_out_one_late),
    ),
    split_by_colour=Case(
        "held out is all that shows pink or cyan, which training never has; no public rule is "
        "about this, the nearest say that little carries over",
        ("held_out_above_chance", "overfitting"),
        world=world_of(unseen_colours, train=480),
    ),
    held_out_in_german=Case(
        "training texts in English, held-out ones in German",
        ("held_out_above_chance", "overfitting"),
        world=world_of(every_text(in_german, "val")),
    ),
    equal_as_negatives=Case(
        "captions name one colour (ten texts), and `duplicates` is ignore",
        ("duplicate_floor_reached", "texts_few"),
        world=world_of(every_caption(first_colour)),
        params=dict(duplicates="ignore"),
    ),
)
PARAMS = dict(
    rate_far_too_high=Case(
        "a learning rate of 0.3, as for SGD",
        ("learning_rate_high", "loss_diverges"),
        params=dict(learning_rate=0.3),
    ),
    recipe_of_real_weights=Case(
        "the recipe for fine-tuning real weights on random ones",
        ("learning_rate_low",),
        params=dict(learning_rate=1e-6, adam_beta2=0.999, region_weight=0.1),
    ),
    warm_up_of_clip=Case(
        "CLIP's 2,000 steps of warm-up in a run of 80",
        ("warmup_too_long", "learning_rate_low"),
        params=dict(lr_warmup_steps=2000),
    ),
    two_at_a_time=Case(
        "batches of 2, accumulated 8 times, as if that made 16",
        ("few_contrasted",),
        params=dict(batch_size=2, gradient_accumulation_steps=8),
    ),
    temperature_for_log=Case(
        "the temperature 0.07 given where the log of its inverse belongs",
        ("scale_too_low",),
        params=dict(logit_scale_init=0.07),
    ),
    regions_forced=Case(
        "a region weight of 1,000 to bring the region loss down",
        ("term_unweighted",),
        params=dict(region_weight=1000.0),
    ),
    clipped_to_nothing=Case(
        "gradients clipped to a norm of 1e-7",
        ("clipped_away", "learning_rate_low"),
        params=dict(max_grad_norm=1e-7),
    ),
    bank_of_thousands=Case(
        "a bank of 8,192 for 180 regions; of regions alone",
        ("bank_oversized",),
        params=dict(memory_bank_size=8192, memory_bank_warmup_steps=0),
        world=dict(train=60),
    ),
    bias_above_zero=Case(
        "the sigmoid loss with a bias of +10, the sign lost",
        ("bias_fits",),
        params=dict(losses="sigmoid", logit_bias_init=10.0),
    ),
    impatient=Case(
        "validates at each step of a long warm-up and stops at the first that is no better; no "
        "public rule is about patience",
        ("warmup_too_long", "learning_rate_low", "held_out_above_chance", "global_above_chance"),
        params=dict(eval_every=1, early_stop=1, best_by="rank", lr_warmup_steps=60),
    ),
    tuned_on_a_dozen=Case(
        "a trained run fine-tuned on twelve photos at the full learning rate",
        ("overfitting", "held_out_above_chance"),
        params=dict(max_steps=120),
        world=dict(train=12),
        before=START,
    ),
    tuned_too_fast=Case(
        "a trained run fine-tuned at a rate of 0.1 without warm-up, which undoes it",
        ("learning_rate_high", "loss_diverges", "held_out_above_chance"),
        params=dict(learning_rate=0.1, lr_warmup_steps=0),
        before=START,
    ),
)
FORKS = dict(
    drive_lost=Case(
        "the drive with the photos goes away after 150 of them, which ends the run",
        ("media_missing",),
        plant=drive_lost,
    ),
    scaler_starts_high=Case(
        "half precision with a loss scaler that starts at 2^90",
        ("steps_skipped", "finite_numbers"),
        params=dict(precision="fp16"),
        plant=planted("make_scaler", large_scaler),
    ),
    decay_without_rate=Case(
        "weight decay 0.1 that is not multiplied by the learning rate",
        ("decay_eats_weights",),
        params=dict(weight_decay=0.1),
        plant=after_update(decayed_again),
    ),
    layers_left_out=Case(
        "the optimiser is given parameters by name, and the layers are not among them",
        ("modules_train",),
        plant=planted("parameter_groups", without_layers),
    ),
    vision_detached=Case(
        "picture features are detached",
        ("modules_train",),
        plant=planted("visual_features", vision_detached),
    ),
    vision_not_loaded=Case(
        "fine-tuning a trained run whose vision layers are not loaded, for their names",
        ("weights_loaded",),
        params=dict(learning_rate=1e-3),
        plant=planted("build_model", vision_layers_fresh),
        before=START,
    ),
    scale_for_its_log=Case(
        "temperatures asked for as 2.6592 are stored as 14.3 and clamped",
        ("scale_as_asked", "logits_in_range"),
        params=dict(logit_scale_init=2.6592),
        plant=planted("build_model", scale_taken_for_its_log),
    ),
    gradients_kept=Case(
        "gradients are never set to zero, and not clipped",
        ("gradient_size", "loss_diverges", "large_oscillation"),
        params=dict(max_grad_norm=0.0),
        plant=gradients_kept,
    ),
    sorted_and_unshuffled=Case(
        "data sorted by phrase and read in the order of the file",
        ("batches_repeat",),
        world=world_of(by_first_phrase),
        plant=planted("epoch_order", file_order),
    ),
    texts_left_sorted=Case(
        "captions of a batch sorted by length and not put back",
        ("global_above_chance", "loss_miscomputed", "held_out_above_chance"),
        plant=planted("textual_features", texts_left_sorted),
    ),
    not_normalised=Case(
        "the losses take features of any length", ("loss_miscomputed",), plant=not_normalised
    ),
    divided_by_scale=Case(
        "cosines are divided by the factor that should multiply them",
        ("loss_miscomputed", "scale_too_low", "loss_stuck"),
        plant=divided_by_scale,
    ),
    right_text_last=Case(
        "groups of hard negatives end with the right text; of regions above all",
        ("hard_above_chance", "loss_miscomputed"),
        params=dict(hard_weight=2.0),
        plant=planted("drawn_region", right_text_last),
    ),
    divided_twice=Case(
        "pixels divided by 255 twice", ("pixels_not_normalised",), plant=divided_twice
    ),
    own_contrast=Case(
        "photos brought to deviation 1, six of them have none",
        ("finite_numbers",),
        world=world_of(lens_cap),
        plant=own_contrast,
    ),
    first_token=Case(
        "the opening mark is read in place of the closing one: all texts are one",
        ("text_embeddings_differ",),
        plant=planted("project_texts", first_token),
    ),
    columns_for_rows=Case(
        "boxes pooled with rows and columns exchanged",
        ("boxes_misread", "phrases_mispaired"),
        plant=boxes_changed(columns_for_rows),
    ),
    boxes_in_pixels=Case(
        "boxes pooled in pixels on a grid of cells: most lie outside; of regions alone",
        ("zero_regions",),
        plant=boxes_changed(as_pixels),
    ),
    schedule_per_sample=Case(
        "the schedule takes a step for each sample and ends after five steps",
        ("learning_rate_zero",),
        plant=planted("learning_rate_at", schedule_per_sample),
    ),
    region_subtracted=Case(
        "the region loss is subtracted",
        ("region_loss_rise", "region_above_chance", "loss_miscomputed"),
        plant=planted("total_loss", region_subtracted),
    ),
    average_trained_on=Case(
        "the running average of the weights is trained on: steps are 500 times too small",
        ("learning_rate_low", "modules_train"),
        plant=after_update(moved_by_average),
    ),
    weights_in_bf16=Case(
        "weights stored in bfloat16 at a learning rate of 1e-4",
        ("modules_train", "scale_can_move", "learning_rate_low"),
        params=dict(learning_rate=1e-4),
        plant=after_update(rounded),
    ),
    pointer_stands=Case(
        "the pointer of a bank of 512 does not move; of regions alone",
        ("bank_fills",),
        params=dict(memory_bank_size=512),
        plant=planted("write_rows", pointer_stands),
    ),
    bank_never_renewed=Case(
        "the bank is written until it is full, and never after; of regions alone",
        ("bank_fresh",),
        plant=planted("write_rows", written_until_full),
    ),
    six_tokens=Case(
        "texts cut to six tokens: a caption is its first object", ("texts_cut",), plant=six_tokens
    ),
    crops_of_a_corner=Case(
        "crops from a hundredth of the photo on, with the caption of the whole; no public rule is "
        "about this, the nearest say that the global loss does not learn",
        ("global_above_chance", "losses_fall_together", "held_out_above_chance"),
        params=dict(augment="crop"),
        plant=planted("random_part", tiny_parts),
    ),
)

CONTROLS = dict(
    healthy=Case("nothing changed"),
    batch_of_8=Case("batches of 8", params=dict(batch_size=8) | LONGER),
    batch_of_48=Case("batches of 48", params=dict(batch_size=48)),
    bank_off=Case("no bank", params=dict(memory_bank_size=0)),
    bank_at_once=Case("the bank on from the start", params=dict(memory_bank_warmup_steps=0)),
    captions_only=Case("photos with captions and no region", world=world_of(without("regions"))),
    regions_only=Case("photos with regions and no caption", world=world_of(without("captions"))),
    nothing_held_out=Case("no validation", world=dict(held_out=0)),
    validated_at_the_end=Case("one validation, at the end", params=dict(eval_every=0)),
    fifty_steps=Case("fifty steps", params=dict(max_steps=50, lr_warmup_steps=5)),
    long_and_large=Case(
        "240 steps on 720 photos", params=dict(max_steps=240), world=dict(train=720)
    ),
    rate_of_1e_3=Case("a learning rate of 1e-3", params=dict(learning_rate=1e-3) | LONGER),
    rate_of_5e_3=Case("a learning rate of 5e-3", params=dict(learning_rate=5e-3)),
    constant_rate=Case("a constant learning rate", params=dict(lr_schedule="constant")),
    cached=Case(
        "32 photos in chunks of 8 with the exact gradient",
        params=dict(batch_size=32, gradient_caching=8),
    ),
    accumulated=Case(
        "two batches of 16 a step", params=dict(gradient_accumulation_steps=2, max_steps=70)
    ),
    in_bf16=Case("bfloat16 by autocast", params=dict(precision="bf16")),
    tuned_gently=Case(
        "a trained run fine-tuned at a tenth of the rate",
        params=dict(learning_rate=3e-4),
        before=START,
    ),
    tuned_on_warm_light=Case(
        "a trained run fine-tuned on photos under warm light",
        params=dict(learning_rate=1e-3),
        world=world_of(every_photo(other_paint)),
        before=START,
    ),
    tuned_with_larger_photos=Case(
        "a trained run fine-tuned at 96 pixels",
        params=dict(learning_rate=1e-3, image_size=96),
        before=START,
    ),
    other_photos=Case("other photos of the same world", world=dict(seed=11)),
    bright_photos=Case("bright photos", world=world_of(every_photo(brighter))),
    large_photos=Case("photos of twice the size", world=world_of(every_row(twice_as_large))),
    jpeg_photos=Case("photos as JPEG", world=world_of(every_row(as_jpeg))),
    boxes_as_shares=Case("boxes as shares of the photo", world=world_of(every_row(as_shares))),
    finehard=Case("data in FineHARD's form", world=world_of(finehard)),
    three_captions=Case(
        "three captions to a photo", world=world_of(every_row(three_captions)), params=LONGER
    ),
    german=Case("all texts in German", world=world_of(every_text(in_german))),
    capitals=Case("all texts in capitals", world=world_of(every_text(in_capitals))),
    no_negatives=Case(
        "no hard negatives", params=dict(hard_weight=0.0), world=world_of(every_row(no_negatives))
    ),
    one_region=Case("one region of each photo a step", params=dict(max_regions=1)),
    equals_count_as_right=Case("equal texts count as right", params=dict(duplicates="positive")),
    sigmoid=Case("the sigmoid loss", params=dict(losses="sigmoid") | LONGER),
    scale_of_20=Case("temperatures that start at 20", params=dict(logit_scale_init=3.0)),
    further_terms=Case(
        "with the further terms of FG-CLIP 2",
        params=dict(spread_weight=0.1, hard_contrast_weight=0.3, ranking_weight=0.2),
    ),
    slow_second_moment=Case(
        "the reference's beta2 and more decay", params=dict(adam_beta2=0.999, weight_decay=0.05)
    ),
    not_clipped=Case("gradients not clipped", params=dict(max_grad_norm=0.0)),
    one_worker=Case("a loader process", params=dict(num_workers=1)),
    recomputed=Case("activations computed again", params=dict(gradient_checkpointing=True)),
    cropped=Case(
        "the package's own crops", params=dict(augment="crop") | LONGER, world=dict(train=480)
    ),
    patient=Case("early stop with patience", params=dict(eval_every=10, early_stop=4) | LONGER),
)

CASES = BOXES | PHOTOS | TEXTS | PARAMS | FORKS | CONTROLS
