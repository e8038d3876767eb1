"""The development set: faults and controls that the rules were made with.

What it gives is no proof of the rules; a set written without reading them is."""

import numpy as np, torch
from PIL import Image
import planted
from bench import Case
from rebind import rebound


# ---- worlds ---------------------------------------------------------------------------------
def boxes(change):
    "A world whose boxes are changed: change(box, row, rng) -> box."

    def broken(rows, folder, rng):
        for row in rows:
            for region in row["regions"]:
                region["bbox"] = change(region["bbox"], row, rng)
        return rows

    return dict(change=broken)


def all_rows(change):
    def broken(rows, folder, rng):
        for row in rows:
            change(row, rng)
        return rows

    return dict(change=broken)


def divided_twice(box, row, rng):
    return [v / 96 for v in box]


def as_xywh(box, row, rng):
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def exchanged(box, row, rng):
    x1, y1, x2, y2 = box
    return [y1, x1, y2, x2]


def half_size(box, row, rng):
    return [v / 2 for v in box]


def one_box(box, row, rng):
    return [20, 20, 60, 60]


def whole(box, row, rng):
    return [0, 0, 96, 96]


def pixels_as_shares(row, rng):
    "Declared as one pixel wide, so that pixels are read as shares."
    row["width"] = row["height"] = 1


def rotated_phrases(row, rng):
    phrases = [r["caption"] for r in row["regions"]]
    for r, phrase in zip(row["regions"], phrases[1:] + phrases[:1]):
        r["caption"], r["negatives"] = phrase, []


def class_names(row, rng):
    names = dict(square="shape one", disc="shape two", triangle="shape three")
    for r in row["regions"]:
        r["caption"], r["negatives"] = names[r["caption"].split()[-1]], []


def mispaired(rows, folder, rng):
    "Captions of all rows, training and held out, dealt anew."
    order = rng.permutation(len(rows))
    captions = [rows[i]["captions"] for i in order]
    for row, caption in zip(rows, captions):
        row["captions"] = caption
    return rows


def mispaired_train(rows, folder, rng):
    train = [r for r in rows if r["split"] == "train"]
    captions = [train[i]["captions"] for i in rng.permutation(len(train))]
    for row, caption in zip(train, captions):
        row["captions"] = caption
    return rows


def repainted(paint, share=1.0):
    "All photos (or a share) go through paint(array) -> array."

    def broken(rows, folder, rng):
        for row in rows:
            if rng.random() < share:
                a = paint(np.asarray(Image.open(folder / row["image"])))
                Image.fromarray(a.astype(np.uint8)).save(folder / row["image"])
        return rows

    return dict(change=broken)


def grey(a):
    return np.repeat(a.mean(2, keepdims=True), 3, 2)


def missing(rows, folder, rng):
    for row in rows[::3]:
        (folder / row["image"]).unlink()
    return rows


def leaking(rows, folder, rng):
    "The held-out photos stand among the training ones, stored anew."
    held_out = [r for r in rows if r["split"] == "val"]
    for k, row in enumerate(held_out):
        name = f"copy{k}.jpg"
        Image.open(folder / row["image"]).save(folder / name, quality=92)
        rows.append(dict(row, image=name, split="train"))
    return rows


def duplicated(rows, folder, rng):
    "Twenty photos, twelve times each."
    train = [r for r in rows if r["split"] == "train"][:20]
    rest = [r for r in rows if r["split"] == "val"]
    out = []
    for k in range(12):
        for row in train:
            name = f"c{k}_{row['image']}"
            (folder / name).write_bytes((folder / row["image"]).read_bytes())
            out.append(dict(row, image=name))
    return out + rest


def long_texts(row, rng):
    preface = "this is a photo from our collection of made pictures, taken in the year " * 6
    row["captions"] = [preface + row["captions"][0]]


def captions_only(row, rng):
    row["regions"] = []


def small_things(row, rng):
    for r in row["regions"]:
        x1, y1, x2, y2 = r["bbox"]
        r["bbox"] = [x1, y1, x1 + 6, y1 + 6]


# ---- forks ----------------------------------------------------------------------------------
def one_bad_photo():
    "One photo's features are NaN whenever it is in the batch."
    bad = []

    def wrapper(step):
        def forward_backward(s, batch):
            from fgclip_nb.core.identity import stable_id

            bad[:] = [stable_id(s.data.train[7].id)]
            if not hasattr(s.model, "_poisoned"):
                s.model._poisoned = True

                def hook(module, args, out):
                    batch = args[0]
                    rows = torch.isin(batch.sample_ids, torch.tensor(bad))
                    out["image_features"] = torch.where(
                        rows[:, None], torch.nan, out["image_features"]
                    )
                    return out

                s.model.register_forward_hook(hook)
            return step(s, batch)

        return forward_backward

    return rebound("forward_backward", wrapper)


def same_order():
    def wrapper(whole):
        def training_order(cfg, samples, processes):
            made = whole(cfg, samples, processes)
            first = made.indices
            made.indices = lambda k, rank=0: [
                (k // made.per_epoch, i) for _, i in first(k % made.per_epoch, rank)
            ]
            return made

        return training_order

    return rebound("training_order", wrapper)


def same_batch():
    def wrapper(whole):
        def training_order(cfg, samples, processes):
            made = whole(cfg, samples, processes)
            first = made.indices
            made.indices = lambda k, rank=0: first(0, rank)
            return made

        return training_order

    return rebound("training_order", wrapper)


def not_normalised():
    return rebound("unit_rows", lambda whole: lambda x: x.float())


def inverse_temperature():
    def wrapper(whole):
        def row_losses(logits, same, duplicates):
            return whole(logits / 14.285**2, same, duplicates)

        return row_losses

    return rebound("row_losses", wrapper)


def wrong_labels():
    def wrapper(whole):
        def row_losses(logits, same, duplicates):
            return whole(logits.roll(1, 1), None, duplicates)

        return row_losses

    return rebound("row_losses", wrapper)


def half_the_parameters():
    def wrapper(make):
        def groups(m, weight_decay):
            return make(m.vision_model, weight_decay)

        return groups

    return rebound("parameter_groups", wrapper)


def no_normalisation():
    def wrapper(whole):
        def normalize(pixels, dtype=None):
            out = whole(pixels, dtype)
            if not hasattr(out, "new_tensor"):
                return out
            return pixels.float() / 255 / 255

        return normalize

    return rebound("normalize", wrapper)


def frozen_vision():
    return planted.on_model(lambda m: m.vision_model.requires_grad_(False))


def weights_skipped():
    "A loader that leaves attention and embeddings as they were."
    return planted.on_model(planted._scramble_attention)


HEALTHY = Case("nothing")
FAULTS = dict(
    divided_twice=Case("boxes divided twice", ("boxes_rejected",), world=boxes(divided_twice)),
    pixels_as_shares=Case(
        "pixels given as shares", ("boxes_rejected",), world=all_rows(pixels_as_shares)
    ),
    xywh=Case("xywh read as corners", ("boxes_misread", "boxes_rejected"), world=boxes(as_xywh)),
    yx=Case("y and x exchanged", ("boxes_misread",), world=boxes(exchanged)),
    half_size=Case("boxes of another picture size", ("boxes_misread",), world=boxes(half_size)),
    one_box=Case("one box for all", ("boxes_constant",), world=boxes(one_box)),
    whole_photo=Case("the whole photo for all", ("boxes_constant",), world=boxes(whole)),
    rotated=Case(
        "phrases one further in each photo",
        ("phrases_mispaired", "region_above_chance"),
        world=all_rows(rotated_phrases),
    ),
    class_names=Case("three class names for all", ("texts_few",), world=all_rows(class_names)),
    mispaired=Case(
        "captions dealt anew",
        ("held_out_above_chance", "global_above_chance"),
        world=dict(change=mispaired),
    ),
    mispaired_long=Case(
        "captions of the training photos dealt anew, long enough to learn them by heart",
        ("held_out_above_chance", "global_above_chance"),
        dict(max_steps=200, batch_size=32),
        world=dict(change=mispaired_train),
    ),
    black=Case("black photos", ("photos_blank",), world=repainted(lambda a: a * 0)),
    grey=Case("grey photos", ("photos_grey",), world=repainted(grey)),
    missing=Case("every third photo is missing", ("media_missing",), world=dict(change=missing)),
    leak=Case("held-out photos are trained on", ("leak",), world=dict(change=leaking)),
    duplicates=Case(
        "twenty photos twelve times", ("photos_repeated",), world=dict(change=duplicated)
    ),
    cut=Case("captions longer than 77 tokens", ("texts_cut",), world=all_rows(long_texts)),
    small=Case("boxes under min_area", ("boxes_rejected",), world=all_rows(small_things)),
    lr_zero=Case("learning rate 0", ("learning_rate_zero",), dict(learning_rate=0.0)),
    lr_high=Case("learning rate x 100", ("learning_rate_high",), dict(learning_rate=0.3)),
    lr_low=Case("learning rate x 0.01", ("learning_rate_low",), dict(learning_rate=3e-5)),
    lr_lower=Case("learning rate 1e-6", ("learning_rate_low",), dict(learning_rate=1e-6)),
    warmup=Case("warm-up of 5000 steps", ("warmup_too_long",), dict(lr_warmup_steps=5000)),
    no_region=Case("region weight 0", ("term_unweighted",), dict(region_weight=0.0)),
    no_global=Case("global weight 0", ("term_unweighted",), dict(global_weight=0.0)),
    all_region=Case("region weight 1000", ("term_unweighted",), dict(region_weight=1000.0)),
    big_bank=Case("bank larger than the data", ("bank_oversized",), dict(memory_bank_size=20000)),
    bank_late=Case("bank after the run", ("bank_comes_on",), dict(memory_bank_warmup_steps=5000)),
    bank_tiny=Case("bank of 4", ("bank_undersized",), dict(memory_bank_size=4)),
    clipped=Case("clipped to 1e-4", ("clipped_away",), dict(max_grad_norm=1e-4)),
    two=Case(
        "two samples contrasted",
        ("few_contrasted",),
        dict(batch_size=2, gradient_accumulation_steps=8),
    ),
    scale_low=Case("temperature 0.07 stored", ("scale_too_low",), dict(logit_scale_init=0.07)),
    scale_negative=Case(
        "temperature -2.66 stored", ("scale_too_low",), dict(logit_scale_init=-2.66)
    ),
    scale_hundred=Case(
        "temperature 100 from random weights", ("logits_in_range",), dict(logit_scale_init=4.6052)
    ),
    decay=Case(
        "weight decay 1",
        ("decay_eats_weights",),
        dict(weight_decay=1.0, max_steps=160, learning_rate=1e-2),
    ),
    frozen_vision=Case("vision tower frozen", ("modules_train",), plant=frozen_vision),
    bf16_scale=Case(
        "temperatures in bf16",
        ("scale_as_asked",),
        plant=lambda: planted.on_scales(lambda p: p.data.copy_(p.data.bfloat16())),
    ),
    scale_frozen=Case(
        "temperatures frozen",
        ("scale_can_move",),
        plant=lambda: planted.on_scales(lambda p: p.requires_grad_(False)),
    ),
    bad_photo=Case("one photo gives NaN", ("finite_numbers",), plant=one_bad_photo),
    half_optimiser=Case(
        "optimiser holds the vision tower only", ("modules_train",), plant=half_the_parameters
    ),
    not_normalised=Case("features not normalised", ("loss_miscomputed",), plant=not_normalised),
    inverse=Case("divided by the temperature", ("loss_miscomputed",), plant=inverse_temperature),
    labels=Case("labels one off", ("loss_miscomputed", "global_above_chance"), plant=wrong_labels),
    pixels=Case("pixels divided by 255 twice", ("pixels_not_normalised",), plant=no_normalisation),
    unshuffled=Case("never shuffled", ("batches_repeat",), plant=same_order),
    same_batch=Case("one batch again and again", ("batches_repeat",), plant=same_batch),
    weights_lost=Case(
        "attention and embeddings keep their random start",
        ("weights_loaded",),
        dict(learning_rate=3e-4),
        plant=weights_skipped,
        before=HEALTHY,
    ),
    overfit=Case(
        "twelve photos, long",
        ("overfitting", "held_out_above_chance"),
        dict(max_steps=200, batch_size=12),
        world=dict(train=12),
    ),
)
CONTROLS = dict(
    healthy=HEALTHY,
    healthy_seed=Case("another world", world=dict(seed=3)),
    batch_4=Case("batch 4 x 4", params=dict(batch_size=4, gradient_accumulation_steps=4)),
    batch_8=Case("batch 8", params=dict(batch_size=8)),
    batch_32=Case("batch 32", params=dict(batch_size=32)),
    no_bank=Case("no bank", params=dict(memory_bank_size=0)),
    bank_256=Case("bank 256", params=dict(memory_bank_size=256)),
    captions_only=Case("captions only", world=all_rows(captions_only)),
    no_validation=Case("no validation", params=dict(eval_every=0), world=dict(held_out=0)),
    few_held_out=Case("five held out", world=dict(held_out=5)),
    few_steps=Case(
        "twelve steps", params=dict(max_steps=12, lr_warmup_steps=3, memory_bank_warmup_steps=4)
    ),
    scale_4=Case("temperature 4.0", params=dict(logit_scale_init=4.0)),
    scale_2=Case("temperature 2.0", params=dict(logit_scale_init=2.0)),
    caching=Case("gradient caching", params=dict(gradient_caching=4)),
    crop=Case("augmented", params=dict(augment="crop")),
    bf16=Case("bf16 autocast", params=dict(precision="bf16")),
    long_run=Case("200 steps", params=dict(max_steps=200)),
    region_weight=Case("region weight 10", params=dict(region_weight=10.0)),
    positive=Case("equal captions positive", params=dict(duplicates="positive")),
    slow=Case("learning rate 1e-3", params=dict(learning_rate=1e-3)),
    video=Case(
        "the shipped clips",
        params=dict(
            data="video_sample", batch_size=4, max_steps=60, learning_rate=1e-3, memory_bank_size=16
        ),
    ),
    fine_tune=Case(
        "fine-tuned on another world",
        params=dict(learning_rate=1e-3),
        world=dict(seed=9),
        before=HEALTHY,
    ),
)
CASES = FAULTS | CONTROLS
