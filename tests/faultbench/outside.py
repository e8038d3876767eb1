"""A second catalogue for the bench, written from outside: trainings broken as users break them.

Its author read the parameters, the data format, the model, the losses and the loop, and of the
diagnostics only the names of the rules. `accepted` are the rules that name the cause. A first line
that tells a symptom truly and names no cause is `near` it: SYMPTOMS for every fault, NEAR for some.

It is no cell: broken trainings are no example of how to train."""

import contextlib, dataclasses, importlib, time
from unittest.mock import patch
import numpy as np
import torch
from PIL import Image
from bench import Case, rebound
from fgclip_nb.text.tokenizer import EOS
from world import COLOURS, SIDE, draw_photo, entry

SYMPTOMS = (
    "region_above_chance",
    "global_above_chance",
    "hard_above_chance",
    "loss_at_chance",
    "loss_stuck",
    "held_out_above_chance",
    "losses_fall_together",
    "overfitting",
    "region_loss_by_step_50",
    "region_loss_by_step_200",
)


# ---- data: functions (rows, folder, rng) -> rows ---------------------------------------------
def every_region(fix):
    "A change that replaces each region by fix(region, row)."

    def change(rows, folder, rng):
        for row in rows:
            row["regions"] = [fix(r, row) for r in row["regions"]]
        return rows

    return change


def every_box(fix):
    "A change that replaces each box (x1, y1, x2, y2 in pixels) by fix(x1, y1, x2, y2)."
    return every_region(lambda r, row: dict(r, bbox=[float(v) for v in fix(*r["bbox"])]))


def every_photo(fix, share=1.0, split=None):
    "A change that replaces the picture of a share of the photos (of one split) by fix(picture)."

    def change(rows, folder, rng):
        for row in rows:
            if split in (None, row["split"]) and rng.random() < share:
                path = folder / row["image"]
                fix(Image.open(path).convert("RGB")).save(path)
        return rows

    return change


def one_after_another(*changes):
    "Several changes as one."

    def change(rows, folder, rng):
        for c in changes:
            rows = c(rows, folder, rng)
        return rows

    return change


def boxes_of_the_next(rows, folder, rng):
    "Regions keep their phrases and get the boxes of the next photo, as far as there are some."
    boxes = [[r["bbox"] for r in row["regions"]] for row in rows]
    for row, own in zip(rows, boxes[1:] + boxes[:1]):
        for k, r in enumerate(row["regions"]):
            r["bbox"] = own[k % len(own)]
    return rows


def phrases_of_the_next(rows, folder, rng):
    "Regions keep their boxes and get the phrases (and negatives) of the next photo."
    kept = [row["regions"] for row in rows]
    for row, other in zip(rows, kept[1:] + kept[:1]):
        row["regions"] = [
            dict(other[k % len(other)], bbox=r["bbox"]) for k, r in enumerate(row["regions"])
        ]
    return rows


def phrases_rotated(rows, folder, rng):
    "Within a photo each box gets the phrase of the next box."
    for row in rows:
        own = row["regions"]
        row["regions"] = [dict(own[(k + 1) % len(own)], bbox=r["bbox"]) for k, r in enumerate(own)]
    return rows


def phrases_drawn(share):
    "A share of the phrases are those of regions anywhere in the set."

    def change(rows, folder, rng):
        everywhere = [r for row in rows for r in row["regions"]]
        for row in rows:
            for k, r in enumerate(row["regions"]):
                if rng.random() < share:
                    other = everywhere[int(rng.integers(len(everywhere)))]
                    row["regions"][k] = dict(other, bbox=r["bbox"])
        return rows

    return change


def captions_shuffled(split):
    "The captions of a split are dealt anew."

    def change(rows, folder, rng):
        chosen = [row for row in rows if row["split"] == split]
        captions = [row["captions"] for row in chosen]
        for row, k in zip(chosen, rng.permutation(len(chosen))):
            row["captions"] = captions[k]
        return rows

    return change


def regions_shuffled(rows, folder, rng):
    "Captions are dealt anew in both splits, and so are the lists of phrases."
    rows = captions_shuffled("val")(captions_shuffled("train")(rows, folder, rng), folder, rng)
    return phrases_drawn(1.0)(rows, folder, rng)


def same_caption(rows, folder, rng):
    for row in rows:
        row["captions"] = ["a photo of some things"]
    return rows


def shape_only(r, row):
    "The name of the class, the shape, is the phrase; the negatives are the other classes."
    name = r["caption"].split()[-1]
    return dict(r, caption=name, negatives=[c for c in ("square", "disc", "triangle") if c != name])


def as_written(r, row):
    return dict(r, caption="a {colour} {shape}", negatives=[])


def said_otherwise(r, row):
    "Negatives that are true: the phrase with another article, which phrases have by chance too."
    articles = ["a", "the", "one", "this"]
    start = len(row["image"]) + sum(map(ord, row["image"])) + int(sum(r["bbox"]))
    own = articles[start % 4]
    rest = r["caption"].removeprefix("a ")
    wrong = [f"{a} {rest}" for a in articles if a != own]
    return dict(r, caption=f"{own} {rest}", negatives=wrong)


def listed_ten_times(rows, folder, rng):
    "24 photos stand ten times in the training part, as ten exports of one day."
    train = [r for r in rows if r["split"] == "train"][:24]
    again = [dict(r, id=f"{r['image']} export {k}") for k in range(10) for r in train]
    return again + [r for r in rows if r["split"] == "val"]


def only_train(n):
    "A training part of the first n photos."

    def change(rows, folder, rng):
        train = [r for r in rows if r["split"] == "train"][:n]
        return train + [r for r in rows if r["split"] == "val"]

    return change


def held_out_in_training(rows, folder, rng):
    "Every held-out photo also stands in the training part, four times, under its own name."
    held_out = [r for r in rows if r["split"] == "val"]
    return rows[:48] + [dict(r, split="train") for r in held_out * 4] + held_out


def held_out_resaved(rows, folder, rng):
    "The held-out photos are training photos, saved again as JPEG under other names."
    train = [r for r in rows if r["split"] == "train"]
    copies = []
    for k, row in enumerate(train[:48]):
        name = f"copy_{k:03d}.jpg"
        Image.open(folder / row["image"]).convert("RGB").save(folder / name, quality=92)
        copies.append(dict(row, image=name, split="val"))
    return train[:96] + copies


def tiny_objects(rows, folder, rng):
    "Objects of 4 to 6 pixels in photos of 96."
    new = []
    for row in rows:
        objects = []
        for k, colour in enumerate(rng.choice(list(COLOURS), 3, replace=False)):
            size, shape = int(rng.integers(4, 7)), ("square", "disc", "triangle")[k]
            x, y = (int(v) for v in rng.integers(0, SIDE - size, 2))
            objects.append((str(colour), shape, (x, y, x + size, y + size)))
        draw_photo(objects, rng).save(folder / row["image"])
        new.append(entry(row["image"], row["split"], objects, rng))
    return new


def placeholder(image):
    "What a server sends for a photo that is gone."
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8))


def swapped_channels(image):
    return Image.fromarray(np.asarray(image)[:, :, ::-1].copy())


def files_gone(share):
    "A share of the training photos is not there."

    def change(rows, folder, rng):
        for row in rows:
            if row["split"] == "train" and rng.random() < share:
                (folder / row["image"]).unlink()
        return rows

    return change


def files_cut(share):
    "A share of the training photos breaks off half-way, as an interrupted copy leaves them."

    def change(rows, folder, rng):
        for row in rows:
            if row["split"] == "train" and rng.random() < share:
                path = folder / row["image"]
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return rows

    return change


TERMS_OF_USE = (
    "this picture was supplied by an agency and may be shown in print and online for one year after"
    " the day of purchase provided that the name of the photographer stands beside it and nothing"
    " is added to it or taken from it the agency keeps all rights and may withdraw this permission"
    " at any time without giving reasons in which case all copies have to be destroyed within ten"
    " days and a written confirmation has to be sent to the office that sold the picture"
)


def after_the_terms(rows, folder, rng):
    "Every caption begins with 90 words on the terms of use."
    for row in rows:
        row["captions"] = [f"{TERMS_OF_USE} {c}" for c in row["captions"]]
    return rows


def phrases_lost(share):
    "A share of the phrases is empty."

    def change(rows, folder, rng):
        for row in rows:
            for r in row["regions"]:
                if rng.random() < share:
                    r["caption"] = ""
        return rows

    return change


def other_key(rows, folder, rng):
    return [{("region" if k == "regions" else k): v for k, v in row.items()} for row in rows]


def by_caption(rows, folder, rng):
    return sorted(rows, key=lambda row: row["captions"])


def without_regions(rows, folder, rng):
    return [dict(row, regions=[]) for row in rows]


def without_negatives(r, row):
    return dict(r, negatives=[])


def none_held_out(rows, folder, rng):
    return [dict(row, split="train") for row in rows]


def in_shares(rows, folder, rng):
    "Boxes as shares, and no size: the other way of the format."
    for row in rows:
        for r in row["regions"]:
            r["bbox"] = [v / SIDE for v in r["bbox"]]
        del row["width"], row["height"]
    return rows


def wide_photos(rows, folder, rng):
    "Photos of 144 x 96 pixels, boxes with them."
    for row in rows:
        path = folder / row["image"]
        Image.open(path).resize((144, SIDE)).save(path)
        row["width"] = 144
        for r in row["regions"]:
            x1, y1, x2, y2 = r["bbox"]
            r["bbox"] = [x1 * 1.5, y1, x2 * 1.5, y2]
    return rows


def three_captions(rows, folder, rng):
    "Three short captions that name the objects in other orders."
    for row in rows:
        parts = [r["caption"] for r in row["regions"]]
        orders = [rng.permutation(len(parts)) for _ in range(3)]
        row["captions"] = [" and ".join(parts[i] for i in order) for order in orders]
    return rows


def long_captions(rows, folder, rng):
    "A long caption of its own beside the short one."
    for row in rows:
        parts = [r["caption"] for r in row["regions"]]
        row["caption"] = f"On a dim and noisy ground one sees {', then '.join(parts)}, and no more."
    return rows


def slightly_outside(rows, folder, rng):
    "Boxes that end near the right edge of the photo leave it by a pixel."
    for row in rows:
        for r in row["regions"]:
            x1, y1, x2, y2 = r["bbox"]
            r["bbox"] = [x1, y1, SIDE + 1 if x2 >= SIDE - 4 else x2, y2]
    return rows


def other_tints(rows, folder, rng):
    "Another domain: the same things at dusk, darker and bluish."
    tint = np.array([0.55, 0.6, 0.8])
    dusk = every_photo(lambda im: Image.fromarray((np.asarray(im) * tint).astype(np.uint8)))
    return dusk(rows, folder, rng)


def saved_as_jpeg(rows, folder, rng):
    for row in rows:
        image = Image.open(folder / row["image"]).convert("RGB")
        row["image"] = row["image"].replace(".png", ".jpg")
        image.save(folder / row["image"], quality=80)
    return rows


# ---- the package, changed as a fork would: functions that return a context --------------------
def at(place, make):
    "A plant that puts make(original) in the place of the package's `place`."

    def plant():
        return patch(f"fgclip_nb.{place}", make(original_of(place)))

    return plant


def original_of(place):
    "What stands at a dotted place below the package."
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(f"fgclip_nb.{module}"), name)


def everywhere(name, make):
    "A plant that puts make(original) in the place of `name` in every room."
    return lambda: rebound(name, make)


def together(*plants):
    "Several plants as one."

    @contextlib.contextmanager
    def plant():
        with contextlib.ExitStack() as stack:
            for p in plants:
                stack.enter_context(p())
            yield

    return plant


def after_building(touch):
    "A plant that changes the model, in place, once it is built."

    def make(original):
        def build(cfg, log):
            model = original(cfg, log)
            with torch.no_grad():
                touch(model)
            return model

        return build

    return everywhere("build_model", make)


def of_class(place, name, make):
    "A plant that puts make(original) in the place of a method; `place` names its class."

    def plant():
        return patch.object(original_of(place), name, make(getattr(original_of(place), name)))

    return plant


def of_torch(name, method):
    "A plant that replaces a method of torch's AdamW."
    return lambda: patch.object(torch.optim.AdamW, name, method)


def freeze(*modules):
    "Touch: these modules of the model get no gradient."

    def touch(model):
        for name in modules:
            getattr(model, name).requires_grad_(False)

    return touch


def scales_at(value):
    def touch(model):
        for name in ("logit_scale", "logit_scale_finegraind", "logit_scale_hardneg"):
            getattr(model, name).fill_(value)

    return touch


def begun_again(model):
    "Touch: the layers of the vision tower are as before any training."
    torch.manual_seed(99)
    for p in model.vision_model.parameters():
        if p.ndim > 1:
            p.normal_(std=0.02)


def colder(loss):
    "A loss that divides by the scale in place of multiplying."
    return lambda a, b, scale, *rest, **named: loss(a, b, -scale, *rest, **named)


def negated(loss):
    "A loss with the wrong sign."

    def wrong(*args, **named):
        term = loss(*args, **named)
        return dataclasses.replace(term, loss=-term.loss, in_batch=-term.in_batch)

    return wrong


def next_label(row_losses):
    "Labels 1, 2, … in place of 0, 1, …"

    def wrong(logits, same, duplicates):
        own = logits[:, : len(logits)].roll(-1, 1).diagonal()
        return logits.logsumexp(1) - own

    return wrong


def not_unit(unit_rows):
    return lambda x: x.float()


def only_scaled(normalize):
    return lambda pixels, dtype=None: pixels.float() / 255


def not_scaled(normalize):
    return lambda pixels, dtype=None: pixels.float()


def normalised_again(normalize):
    "Mean and deviation taken off pixels whose mean and deviation were taken off."

    def wrong(pixels, dtype=None):
        once = normalize(pixels)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        return (once / 255 - mean) / std

    return wrong


def without_text_tower(parameter_groups):
    def wrong(model, weight_decay):
        text = {id(p) for p in model.text_model.parameters()}
        text |= {id(model.text_projection.weight), id(model.text_filip_projection.weight)}
        groups = parameter_groups(model, weight_decay)
        return [dict(g, params=[p for p in g["params"] if id(p) not in text]) for g in groups]

    return wrong


def decayed_by(value):
    "parameter_groups with a decay beyond what the parameter allows."
    return lambda groups: lambda model, weight_decay: groups(model, value)


def over_in(steps):
    "A schedule that takes `steps` for the length of the run, and stays at its end."

    def make(learning_rate_at):
        def wrong(step, cfg, total):
            return learning_rate_at(min(step, steps + 1), cfg, steps)

        return wrong

    return make


def first_batch(indices):
    return lambda self, number, rank=0: indices(self, 0, rank)


def unshuffled(epoch_order):
    return lambda n, seed=0, epoch=0: np.arange(n)


def some_nan(batch_features):
    "One photo in 40 of the training part gives NaN."

    def wrong(model, batch):
        out = batch_features(model, batch)
        if not model.training:
            return out
        bad = (batch.sample_ids % 40 == 0)[:, None]
        out["image_features"] = torch.where(bad, torch.nan, out["image_features"])
        return out

    return wrong


def first_text(encode_texts):
    "Every text gets the vector of the first one, as where the start mark is pooled."

    def wrong(model, short=None, long=None):
        return tuple(x[:1].expand_as(x) if len(x) else x for x in encode_texts(model, short, long))

    return wrong


def whole_numbers(box_fields):
    "Boxes (shares) rounded down to whole numbers."

    def wrong(examples):
        fields = box_fields(examples)
        return fields | dict(boxes=fields["boxes"].floor())

    return wrong


def first_picture(box_fields):
    "All boxes are pooled from the first photo of the batch: the number of the photo is forgotten."

    def wrong(examples):
        fields = box_fields(examples)
        return fields | dict(box_image=torch.zeros_like(fields["box_image"]))

    return wrong


def next_photo(pixels):
    "Photos come from a list that begins one later than that of the annotations."

    def wrong(self, sample, index):
        k = (index + 1) % len(self.samples)
        return pixels(self, self.samples[k], k)

    return wrong


def always_first(pixels):
    "The photos are kept under a name that is the same for all."
    return lambda self, sample, index: pixels(self, self.samples[0], 0)


def slow(pixels):
    "A photo takes 12 ms to arrive, each time."

    def wrong(self, sample, index):
        time.sleep(0.012)
        return pixels(self, sample, index)

    return wrong


def never(push):
    "The regions of a batch are not pushed."
    from fgclip_nb.losses.bank import Pushed

    return lambda bank, features, batch: Pushed(0, 0)


def only_at_first(push):
    "Regions are pushed until the bank is full, and not afterwards."
    from fgclip_nb.losses.bank import Pushed

    return lambda bank, *args: Pushed(0, 0) if bank.full else push(bank, *args)


def exchanged(push):
    "Texts are kept where regions belong, and regions where texts belong."

    def wrong(bank, features, batch):
        if "region_text_features" not in features:
            return push(bank, features, batch)
        r, t = features["region_features"], features["region_text_features"]
        return push(bank, features | dict(region_features=t, region_text_features=r), batch)

    return wrong


def hardly_moved(apply_update):
    "After each step the weights are an average with 0.995 of what they were, as a copy kept for."

    def wrong(s, norm, bad):
        before = [p.detach().clone() for p in s.model.parameters()]
        apply_update(s, norm, bad)
        with torch.no_grad():
            for p, old in zip(s.model.parameters(), before):
                p.copy_(0.995 * old + 0.005 * p)

    return wrong


def cut_to(n):
    "Texts cut to n tokens, both marks among them."
    return lambda tokenize: lambda texts, context_length=77: tokenize(texts, n)


def padded_to(n):
    "Texts filled up with end marks to n tokens, of which the last one is read."

    def make(tokenize):
        def wrong(texts, context_length=77):
            batch = tokenize(texts, min(n, context_length))
            rows, width = batch.input_ids.shape
            fill = batch.input_ids.new_full((rows, n - width), EOS)
            ids = torch.cat([batch.input_ids, fill], 1)
            lengths = torch.full_like(batch.lengths, n)
            return dataclasses.replace(batch, input_ids=ids, lengths=lengths, packed=None)

        return wrong

    return make


def seeded(seed):
    "Not a fault: the run has another seed."
    from fgclip_nb.core.config import TrainConfig

    after = TrainConfig.__post_init__

    def init(self):
        self.seed = seed
        after(self)

    return lambda: patch.object(TrainConfig, "__post_init__", init)


# ---- the cases -------------------------------------------------------------------------------
LOST = ("boxes_rejected", "regions_lost", "boxes_misread")
BASE = Case("a training of a hundred steps to start from", params=dict(max_steps=100))

DATA_FAULTS = {
    "divided_twice": Case(
        "boxes were divided by the size of the photo, and the rows give that size as well",
        LOST,
        world=dict(change=every_box(lambda *box: [v / SIDE for v in box])),
    ),
    "divided_twice_kept": Case(
        "the same, and min_area was set to 0 so that nothing is rejected",
        ("boxes_misread", "boxes_constant"),
        params=dict(min_area=0.0),
        world=dict(change=every_box(lambda *box: [v / SIDE for v in box])),
    ),
    "xywh_as_corners": Case(
        "boxes are x, y, width, height and are read as corners",
        LOST,
        world=dict(change=every_box(lambda a, b, c, d: [a, b, c - a, d - b])),
    ),
    "centres_as_corners": Case(
        "boxes are centre x, centre y, width, height (YOLO) and are read as corners",
        LOST,
        world=dict(change=every_box(lambda a, b, c, d: [(a + c) / 2, (b + d) / 2, c - a, d - b])),
    ),
    "rows_first": Case(
        "boxes are y1, x1, y2, x2, as TensorFlow writes them",
        ("boxes_misread",),
        world=dict(change=every_box(lambda a, b, c, d: [b, a, d, c])),
    ),
    "size_of_originals": Case(
        "photos were made smaller by a quarter, boxes and declared size were not: 128 for 96, and "
        "the declared size was mended by hand to 96",
        LOST,
        world=dict(change=every_box(lambda *box: [v * 4 / 3 for v in box])),
    ),
    "size_of_thumbnails": Case(
        "boxes were drawn on thumbnails of 60 pixels, the rows say 96",
        ("boxes_misread",),
        world=dict(change=every_box(lambda *box: [v * 60 / SIDE for v in box])),
    ),
    "upside_down": Case(
        "boxes count y from below",
        ("boxes_misread",),
        world=dict(change=every_box(lambda a, b, c, d: [a, SIDE - d, c, SIDE - b])),
    ),
    "photos_mirrored": Case(
        "the photos were mirrored to have other ones, the boxes were not",
        ("boxes_misread",),
        world=dict(change=every_photo(lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT))),
    ),
    "whole_photo": Case(
        "there was no detector: every box is the whole photo",
        ("boxes_constant",),
        world=dict(change=every_box(lambda *box: [0, 0, SIDE, SIDE])),
    ),
    "boxes_of_next_photo": Case(
        "boxes are joined one row too late",
        ("boxes_misread", "phrases_mispaired"),
        world=dict(change=boxes_of_the_next),
    ),
    "phrases_of_next_photo": Case(
        "phrases and their negatives are joined one row too late",
        ("phrases_mispaired",),
        world=dict(change=phrases_of_the_next),
    ),
    "phrases_rotated": Case(
        "in each photo the phrases are moved on by one box",
        ("phrases_mispaired",),
        world=dict(change=phrases_rotated),
    ),
    "phrases_half_wrong": Case(
        "half of the phrases belong to other regions",
        ("phrases_mispaired",),
        world=dict(change=phrases_drawn(0.5)),
    ),
    "captions_equal": Case(
        "every photo has the same caption",
        ("texts_few", "duplicate_floor_reached", "text_embeddings_differ"),
        world=dict(change=same_caption),
    ),
    "captions_shuffled": Case(
        "the captions of the training part were sorted apart from the photos; regions are right",
        ("phrases_mispaired", "global_above_chance", "losses_fall_together"),
        world=dict(change=captions_shuffled("train")),
    ),
    "all_texts_shuffled": Case(
        "captions and phrases, training and held out, belong to other photos",
        ("phrases_mispaired",),
        world=dict(change=regions_shuffled),
    ),
    "class_names": Case(
        "phrases are the names of three classes",
        ("texts_few", "duplicate_floor_reached"),
        world=dict(change=every_region(shape_only)),
    ),
    "class_names_ignored": Case(
        "phrases are the names of three classes, and equal ones are each other's negatives",
        ("texts_few", "duplicate_floor_reached"),
        params=dict(duplicates="ignore"),
        world=dict(change=every_region(shape_only)),
    ),
    "template_unfilled": Case(
        "phrases are the template that should have been filled in",
        ("texts_few", "duplicate_floor_reached", "text_embeddings_differ"),
        world=dict(change=every_region(as_written)),
    ),
    "listed_ten_times": Case(
        "24 photos stand ten times in the training part, under ten ids",
        ("photos_repeated",),
        world=dict(change=listed_ten_times),
    ),
    "leak_listed": Case(
        "every held-out photo also stands in the training part (harm: held-out is too good)",
        ("leak",),
        world=dict(change=held_out_in_training),
    ),
    "leak_resaved": Case(
        "held-out photos are training photos saved again as JPEG (harm: held-out is too good)",
        ("leak",),
        world=dict(change=held_out_resaved),
    ),
    "tiny_objects": Case(
        "objects of 4 to 6 pixels in photos of 96",
        ("boxes_rejected", "regions_lost"),
        world=dict(change=tiny_objects),
    ),
    "grey": Case(
        "the photos were saved without colours",
        ("photos_grey",),
        world=dict(change=every_photo(lambda im: im.convert("L"))),
    ),
    "black": Case(
        "six photos in ten came out black",
        ("photos_blank",),
        world=dict(change=every_photo(lambda im: Image.new("RGB", im.size), 0.6)),
    ),
    "placeholder": Case(
        "half of the photos is the picture that a server sends for what is gone",
        ("photos_repeated", "photos_blank"),
        world=dict(change=every_photo(placeholder, 0.5)),
    ),
    "files_gone": Case(
        "85 in 100 training photos are not there",
        ("media_missing",),
        world=dict(change=files_gone(0.85)),
    ),
    "files_cut": Case(
        "85 in 100 training photos break off half-way",
        ("media_missing",),
        world=dict(change=files_cut(0.85)),
    ),
    "after_the_terms": Case(
        "every caption begins with 90 words on the terms of use, what is to see comes behind",
        ("texts_cut",),
        params=dict(context_length=77),
        world=dict(change=after_the_terms),
    ),
    "held_out_mispaired": Case(
        "the captions of the held-out part were sorted apart from its photos",
        ("held_out_above_chance", "phrases_mispaired"),
        world=dict(change=captions_shuffled("val")),
    ),
    "train_bgr": Case(
        "the training photos were written with red and blue exchanged, the held-out ones not",
        ("held_out_above_chance", "overfitting"),
        world=dict(change=every_photo(swapped_channels, split="train")),
    ),
    "few_photos": Case(
        "a training part of 16 photos, seen 80 times",
        ("overfitting",),
        world=dict(change=only_train(16)),
    ),
    "negatives_true": Case(
        "the negatives say the same as the phrase, with another article",
        ("hard_above_chance",),
        params=dict(hard_weight=5.0),
        world=dict(change=every_region(said_otherwise)),
    ),
    "phrases_empty": Case(
        "nine phrases in ten are empty",
        ("regions_lost", "boxes_rejected"),
        world=dict(change=phrases_lost(0.9)),
    ),
    "regions_unread": Case(
        "the key of the regions is misspelt, so there are none",
        ("regions_lost", "boxes_rejected"),
        world=dict(change=other_key),
    ),
}

PARAMETER_FAULTS = {
    "lr_zero": Case(
        "learning_rate 0, left from a test", ("learning_rate_zero",), params=dict(learning_rate=0.0)
    ),
    "lr_of_finetuning": Case(
        "learning_rate 1e-6, the recipe for fine-tuning, from random weights",
        ("learning_rate_low",),
        params=dict(learning_rate=1e-6),
    ),
    "lr_3e-5": Case(
        "learning_rate 3e-5 for 80 steps from random weights",
        ("learning_rate_low",),
        params=dict(learning_rate=3e-5),
    ),
    "lr_0.3": Case(
        "learning_rate 0.3, as for SGD",
        ("learning_rate_high", "loss_diverges"),
        params=dict(learning_rate=0.3),
    ),
    "lr_0.05_unclipped": Case(
        "learning_rate 0.05, no warm-up, no clipping",
        ("learning_rate_high", "loss_diverges"),
        params=dict(learning_rate=0.05, lr_warmup_steps=0, max_grad_norm=0.0),
    ),
    "warmup_5000": Case(
        "lr_warmup_steps 5000, of a long run, in one of 80 steps",
        ("warmup_too_long",),
        params=dict(lr_warmup_steps=5000),
    ),
    "few_steps": Case(
        "7 steps in all, the warm-up takes 8",
        ("warmup_too_long",),
        params=dict(max_steps=7, eval_every=7),
    ),
    "clip_1e-7": Case("max_grad_norm 1e-7", ("clipped_away",), params=dict(max_grad_norm=1e-7)),
    "batch_2_accumulated": Case(
        "batch_size 2 with 8 batches accumulated, taken for a batch of 16",
        ("few_contrasted",),
        params=dict(batch_size=2, gradient_accumulation_steps=8),
    ),
    "batch_1": Case(
        "batch_size 1, memory being short", ("few_contrasted",), params=dict(batch_size=1)
    ),
    "scale_1": Case(
        "logit_scale_init 0: cosines go into the softmax as they are",
        ("scale_too_low",),
        params=dict(logit_scale_init=0.0),
    ),
    "scale_inverse": Case(
        "logit_scale_init -2.6592: the temperature's logarithm with the wrong sign",
        ("scale_too_low",),
        params=dict(logit_scale_init=-2.6592),
    ),
    "bank_never": Case(
        "the bank comes on after 5000 forwards (harm: no bank)",
        ("bank_comes_on",),
        params=dict(memory_bank_warmup_steps=5000),
    ),
    "bank_huge": Case(
        "a bank of 20000 for 240 photos (harm: never full, each region many times)",
        ("bank_oversized", "bank_fills"),
        params=dict(memory_bank_size=20_000),
    ),
    "bank_of_4": Case(
        "a bank of 4 where a batch has 48 regions (harm: it adds nothing)",
        ("bank_undersized",),
        params=dict(memory_bank_size=4),
    ),
    "region_weight_0": Case(
        "region_weight 0 with regions in the data (harm: regions untrained)",
        ("term_unweighted",),
        params=dict(region_weight=0.0),
    ),
    "global_weight_0": Case(
        "global_weight 0 with captions in the data",
        ("term_unweighted",),
        params=dict(global_weight=0.0),
    ),
    "hard_weight_1000": Case(
        "hard_weight 1000, beside which the other terms are nothing",
        ("losses_fall_together", "term_unweighted", "clipped_away", "gradient_size"),
        params=dict(hard_weight=1000.0),
    ),
    "min_area_half": Case(
        "min_area 0.5, taken for a share of something else",
        ("boxes_rejected", "regions_lost"),
        params=dict(min_area=0.5),
    ),
    "finetuned_too_fast": Case(
        "a trained run goes on with learning_rate 0.05 on the same data",
        ("learning_rate_high", "loss_diverges"),
        params=dict(learning_rate=0.05),
        before=BASE,
    ),
}

FORK_FAULTS = {
    "only_scaled": Case(
        "pixels are divided by 255 and not normalised",
        ("pixels_not_normalised",),
        plant=at("model.vision_tower.normalize", only_scaled),
    ),
    "not_scaled": Case(
        "pixels go in as 0 to 255",
        ("pixels_not_normalised",),
        plant=at("model.vision_tower.normalize", not_scaled),
    ),
    "normalised_twice": Case(
        "pixels that are normalised are divided by 255 and normalised again",
        ("pixels_not_normalised",),
        plant=at("model.vision_tower.normalize", normalised_again),
    ),
    "scale_frozen_low": Case(
        "the scales start at 2 and are not trained",
        ("scale_can_move", "scale_too_low"),
        plant=after_building(
            lambda m: (
                scales_at(0.6931)(m),
                [p.requires_grad_(False) for n, p in m.named_parameters() if "logit_scale" in n],
            )
        ),
    ),
    "scale_1000": Case(
        "the scales start at 1000 and nothing limits them",
        ("overconfident", "logits_in_range", "scale_as_asked"),
        plant=together(
            after_building(scales_at(6.9)),
            of_class("model.fgclip.FGCLIP", "clamp_scales_", lambda f: lambda self: None),
        ),
    ),
    "features_not_unit": Case(
        "the losses take features as they are, not of length one",
        ("loss_miscomputed", "logits_in_range", "overconfident"),
        plant=at("losses.contrast.unit_rows", not_unit),
    ),
    "temperature_inverted": Case(
        "the losses divide by the scale",
        ("loss_miscomputed", "scale_too_low"),
        plant=together(
            at("losses.objective.global_loss", colder), at("losses.objective.region_loss", colder)
        ),
    ),
    "labels_shifted": Case(
        "labels begin with 1",
        ("loss_miscomputed",),
        plant=at("losses.pairs.row_losses", next_label),
    ),
    "sign_flipped": Case(
        "the minus of the logarithm is forgotten in two losses",
        ("loss_miscomputed", "loss_diverges"),
        plant=together(
            at("losses.objective.global_loss", negated), at("losses.objective.region_loss", negated)
        ),
    ),
    "no_text_tower": Case(
        "the optimiser was not given the text tower",
        ("modules_train",),
        plant=everywhere("parameter_groups", without_text_tower),
    ),
    "vision_frozen": Case(
        "the vision tower is frozen from random weights",
        ("modules_train",),
        plant=after_building(freeze("vision_model")),
    ),
    "schedule_in_epochs": Case(
        "the schedule was given epochs for steps, so that its cosine ends at step 12",
        ("learning_rate_zero", "learning_rate_low"),
        plant=everywhere("learning_rate_at", over_in(12)),
    ),
    "same_batch": Case(
        "the iterator is made anew at each step, so that all see the first batch",
        ("batches_repeat",),
        plant=of_class("data.order.TrainingOrder", "indices", first_batch),
    ),
    "sorted_unshuffled": Case(
        "photos are sorted by caption and not shuffled",
        ("batches_repeat",),
        world=dict(change=by_caption),
        plant=everywhere("epoch_order", unshuffled),
    ),
    "some_nan": Case(
        "one training photo in 40 gives NaN, and its steps are skipped",
        ("steps_skipped", "finite_numbers"),
        plant=at("model.fgclip.batch_features", some_nan),
    ),
    "not_zeroed": Case(
        "gradients are never set to zero",
        ("gradient_size", "clipped_away"),
        plant=of_torch("zero_grad", lambda self, set_to_none=True: None),
    ),
    "no_step": Case(
        "the optimiser never steps",
        ("modules_train", "learning_rate_zero"),
        plant=of_torch("step", lambda self, closure=None: None),
    ),
    "averaged_weights": Case(
        "after each step the weights are replaced by their slow average",
        ("learning_rate_low", "modules_train"),
        plant=everywhere("apply_update", hardly_moved),
    ),
    "decay_30": Case(
        "weight decay 30, meant to be multiplied by something",
        ("decay_eats_weights",),
        plant=everywhere("parameter_groups", decayed_by(30.0)),
    ),
    "bank_unfilled": Case(
        "nothing is pushed into the bank (harm: no bank)",
        ("bank_fills",),
        plant=everywhere("push_regions", never),
    ),
    "bank_stale": Case(
        "the bank is filled once and then never again",
        ("bank_fresh",),
        plant=everywhere("push_regions", only_at_first),
    ),
    "bank_exchanged": Case(
        "the bank keeps texts for regions and regions for texts",
        ("bank_clean", "bank_fresh", "loss_miscomputed"),
        plant=everywhere("push_regions", exchanged),
    ),
    "first_text": Case(
        "all texts get the same vector, as where the start mark is pooled",
        ("text_embeddings_differ",),
        plant=at("model.fgclip.encode_texts", first_text),
    ),
    "cut_to_4": Case(
        "texts are cut to 4 tokens, so that phrases lose their shape and captions all but a colour",
        ("texts_cut",),
        plant=at("batches.batch.tokenize", cut_to(4)),
    ),
    "padded": Case(
        "texts are filled up to 32 tokens and read at the last one",
        ("texts_padded",),
        plant=at("batches.batch.tokenize", padded_to(32)),
    ),
    "boxes_rounded": Case(
        "boxes as shares are turned into whole numbers",
        ("zero_regions",),
        plant=at("batches.batch.box_fields", whole_numbers),
    ),
    "first_picture": Case(
        "all boxes of a batch are pooled from its first photo",
        ("boxes_misread", "phrases_mispaired"),
        plant=at("batches.batch.box_fields", first_picture),
    ),
    "photos_of_next": Case(
        "the list of photos begins one later than that of the annotations",
        ("phrases_mispaired", "boxes_misread"),
        plant=of_class("batches.loading.Examples", "_pixels", next_photo),
    ),
    "photo_always_first": Case(
        "a cache gives the first photo for all",
        ("photos_repeated", "image_embeddings_differ"),
        plant=of_class("batches.loading.Examples", "_pixels", always_first),
    ),
    "slow_disk": Case(
        "photos come from a slow disk (harm: time)",
        ("data_bound",),
        plant=of_class("batches.loading.Examples", "_pixels", slow),
    ),
    "weights_lost": Case(
        "a trained run goes on, its vision tower was not loaded",
        ("weights_loaded",),
        params=dict(learning_rate=3e-4),
        before=BASE,
        plant=after_building(begun_again),
    ),
}

CONTROLS = {
    "healthy": Case("as it should be"),
    "world_seed_3": Case("other photos", world=dict(seed=3)),
    "world_seed_8": Case("other photos", world=dict(seed=8)),
    "seed_5": Case("another seed of the run", plant=seeded(5)),
    "seed_11": Case(
        "another seed of the run, more steps", params=dict(max_steps=120), plant=seeded(11)
    ),
    "steps_160": Case("twice the steps", params=dict(max_steps=160)),
    "steps_50": Case("fewer steps", params=dict(max_steps=50)),
    "batch_8": Case("batch_size 8, more steps", params=dict(batch_size=8, max_steps=120)),
    "batch_32": Case("batch_size 32", params=dict(batch_size=32, max_steps=60)),
    "accumulated": Case(
        "12 photos a batch, 2 accumulated",
        params=dict(batch_size=12, gradient_accumulation_steps=2, max_steps=60),
    ),
    "cached": Case(
        "batch_size 32 in chunks of 8", params=dict(batch_size=32, gradient_caching=8, max_steps=60)
    ),
    "bank_off": Case("no bank", params=dict(memory_bank_size=0)),
    "bank_256": Case("a bank of 256", params=dict(memory_bank_size=256)),
    "captions_only": Case(
        "photos with captions, no regions, and the weights say so",
        params=dict(region_weight=0.0, hard_weight=0.0, memory_bank_size=0),
        world=dict(change=without_regions),
    ),
    "no_negatives": Case(
        "regions without negatives", world=dict(change=every_region(without_negatives))
    ),
    "no_validation": Case("nothing held out", world=dict(change=none_held_out)),
    "scale_10": Case("scales start at 10", params=dict(logit_scale_init=2.3026)),
    "scale_50": Case("scales start at 50", params=dict(logit_scale_init=3.912)),
    "scale_100": Case("scales start at 100", params=dict(logit_scale_init=4.6052)),
    "constant_rate": Case(
        "a constant learning rate", params=dict(lr_schedule="constant", learning_rate=2e-3)
    ),
    "rate_1e-3": Case("a lower rate, more steps", params=dict(learning_rate=1e-3, max_steps=160)),
    "equal_positive": Case("equal captions are positives", params=dict(duplicates="positive")),
    "equal_ignored": Case("equal captions are ignored", params=dict(duplicates="ignore")),
    "bf16": Case("precision bf16", params=dict(precision="bf16")),
    "checkpointing": Case("recomputed activations", params=dict(gradient_checkpointing=True)),
    "crop": Case("mirrored parts of photos", params=dict(augment="crop", max_steps=120)),
    "two_regions": Case("2 regions a photo", params=dict(max_regions=2)),
    "unclipped": Case("no clipping", params=dict(max_grad_norm=0.0)),
    "decay_0.1": Case("weight decay 0.1", params=dict(weight_decay=0.1)),
    "sigmoid": Case("the sigmoid loss", params=dict(losses="sigmoid")),
    "reference_weights": Case(
        "region_weight 0.1, hard_weight 0.5", params=dict(region_weight=0.1, hard_weight=0.5)
    ),
    "early_stop": Case(
        "stops when five validations bring nothing",
        params=dict(early_stop=5, eval_every=10, best_by="rank", max_steps=120),
    ),
    "looks_each_step": Case("a look at each step", params=dict(diag_every=1)),
    "in_shares": Case("boxes as shares, no size", world=dict(change=in_shares)),
    "wide": Case("photos that are not square", world=dict(change=wide_photos)),
    "three_captions": Case("three captions a photo", world=dict(change=three_captions)),
    "long_captions": Case("long and short captions", world=dict(change=long_captions)),
    "slightly_outside": Case(
        "boxes near the right edge leave the photo by a pixel, and are clipped",
        params=dict(out_of_range="clip"),
        world=dict(change=slightly_outside),
    ),
    "jpeg": Case("photos as JPEG", world=dict(change=saved_as_jpeg)),
    "few_gone": Case("2 in 100 photos are gone", world=dict(change=files_gone(0.02))),
    "few_wrong": Case("3 in 100 phrases are wrong", world=dict(change=phrases_drawn(0.03))),
    "few_grey": Case(
        "one photo in 20 has no colours",
        world=dict(change=every_photo(lambda im: im.convert("L"), 0.05)),
    ),
    "more_photos": Case("480 photos", params=dict(max_steps=120), world=dict(train=480)),
    "workers": Case("a loader process", params=dict(num_workers=1)),
    "finetuned": Case(
        "a trained run goes on gently", params=dict(learning_rate=3e-4, max_steps=40), before=BASE
    ),
    "new_domain": Case(
        "a trained run goes on with photos taken at dusk",
        params=dict(learning_rate=1e-3, max_steps=60),
        world=dict(change=other_tints),
        before=BASE,
    ),
    "video": Case(
        "made clips of 4 frames",
        params=dict(data="world_video:size=60", num_frames=4, batch_size=12, max_steps=60),
    ),
    "made_world": Case("the package's own made photos", params=dict(data="world:size=400")),
}

CASES = {**DATA_FAULTS, **PARAMETER_FAULTS, **FORK_FAULTS, **CONTROLS}

NEAR = {
    "divided_twice_kept": ("zero_regions", "region_embeddings_differ"),
    "rows_first": ("phrases_mispaired",),
    "size_of_thumbnails": ("phrases_mispaired",),
    "upside_down": ("phrases_mispaired",),
    "photos_mirrored": ("phrases_mispaired",),
    "whole_photo": ("region_embeddings_differ", "boxes_misread"),
    "phrases_of_next_photo": ("boxes_misread",),
    "phrases_rotated": ("boxes_misread",),
    "all_texts_shuffled": ("boxes_misread",),
    "class_names": ("text_embeddings_differ",),
    "listed_ten_times": ("texts_few",),
    "tiny_objects": ("boxes_misread",),
    "placeholder": ("image_embeddings_differ",),
    "after_the_terms": ("texts_few", "duplicate_floor_reached", "text_embeddings_differ"),
    "few_photos": ("texts_few", "photos_repeated", "batches_repeat"),
    "lr_0.3": ("finite_numbers", "image_embeddings_differ", "text_embeddings_differ"),
    "lr_0.05_unclipped": ("finite_numbers", "image_embeddings_differ", "text_embeddings_differ"),
    "finetuned_too_fast": ("finite_numbers", "image_embeddings_differ", "text_embeddings_differ"),
    "few_steps": ("learning_rate_low",),
    "clip_1e-7": ("gradient_size",),
    "min_area_half": ("boxes_misread",),
    "sorted_unshuffled": ("duplicate_floor_reached", "texts_few"),
    "not_zeroed": ("large_oscillation", "loss_diverges", "learning_rate_high"),
    "first_text": ("duplicate_floor_reached",),
    "boxes_rounded": ("boxes_misread", "boxes_constant"),
    "weights_lost": ("modules_train",),
}


def grade(case: str, leads: str) -> str:
    "right, near, wrong or silent: a rule that leads the first line of a fault."
    if leads in CASES[case].accepted:
        return "right"
    if not leads:
        return "silent"
    return "near" if leads in (*SYMPTOMS, *NEAR.get(case, ())) else "wrong"
