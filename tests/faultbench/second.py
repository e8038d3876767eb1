"""A third catalogue for the bench, written after the rules of the first two had been settled.

Its author read the parameters, the data format, the model, the losses, the batches and the loop,
and of the diagnostics only the public list of causes. Harm is the bench's figure (`HARM`), expected
of every fault here but `begins_at_centre` and `bank_one_vector`, which touch regions alone.

It is no cell: broken trainings are no example of how to train."""

import contextlib, importlib
from unittest.mock import patch
import numpy as np
import torch
from PIL import Image
from bench import Case, rebound
from world import each_row


# ---- data: functions (rows, folder, rng) -> rows ---------------------------------------------
def each_photo(fix):
    "A change of each photo: fix(array (height, width, 3) float) -> array, clipped to 0..255."

    def one(row, i, folder, rng):
        pixels = np.asarray(Image.open(folder / row["image"]).convert("RGB"), float)
        new = np.clip(fix(pixels), 0, 255).astype(np.uint8)
        Image.fromarray(new).save(folder / row["image"])

    return each_row(one)


def sepia(pixels):
    "Grey in tones of brown."
    grey = pixels @ (0.299, 0.587, 0.114)
    return grey[..., None] * (1.07, 0.86, 0.65)


def file_name_for_caption(row, i, folder, rng):
    row["captions"] = [f"IMG {i:04d} final copy"]


STOCK = ("photo", "image", "a picture from our archive", "no description available")


def stock_caption(row, i, folder, rng):
    row["captions"] = [STOCK[int(rng.integers(len(STOCK)))]]


def captions_late(rows, folder, rng):
    "Captions alone, each from the row before."
    kept = [row["captions"] for row in rows]
    for row, other in zip(rows, kept[-1:] + kept[:-1]):
        row.update(captions=other, regions=[])
    return rows


def without_regions(rows, folder, rng):
    for row in rows:
        row["regions"] = []
    return rows


def all_train(rows, folder, rng):
    return [row for row in rows if row["split"] == "train"]


def photos_in_tens(row, i, folder, rng):
    first = folder / f"{i // 10 * 10:04d}.png"
    (folder / row["image"]).write_bytes(first.read_bytes())


def mostly_empty(row, i, folder, rng):
    if rng.random() < 0.7:
        (folder / row["image"]).write_bytes(b"")


GERMAN = {
    "red": "rotes", "green": "grünes", "blue": "blaues", "yellow": "gelbes", "purple": "lila",
    "orange": "oranges", "cyan": "türkises", "pink": "rosa", "brown": "braunes", "white": "weißes",
    "square": "Quadrat", "disc": "Rund", "triangle": "Dreieck", "a": "ein", "and": "und",
}  # fmt: skip


def german_caption(row, i, folder, rng):
    row["captions"] = [" ".join(GERMAN[w] for w in c.split()) for c in row["captions"]]


def begins_at_centre(row, i, folder, rng):
    for r in row["regions"]:
        x1, y1, x2, y2 = r["bbox"]
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        r["bbox"] = [x, y, min(96, x + x2 - x1), min(96, y + y2 - y1)]


# ---- forks: contexts in which the package is broken -------------------------------------------
def plain_sgd():
    "AdamW is replaced by SGD, and nothing else is changed."

    def sgd(groups, lr, betas, fused):
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)

    return patch("torch.optim.AdamW", sgd)


def schedule(rate):
    "The rate of a step is rate(whole schedule, step, cfg, total)."
    return lambda: rebound("learning_rate_at", lambda whole: lambda *a: rate(lambda: whole(*a), *a))


def l2_in_gradient():
    "Weight decay of 0.1 is added to the gradients, which Adam then makes all of one size."

    def wrapper(whole):
        def update(s, norm, bad):
            for p in s.model.parameters():
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=0.1)
            return whole(s, norm, bad)

        return update

    return rebound("apply_update", wrapper)


@contextlib.contextmanager
def scale_twice():
    "Features are multiplied by the scale before a loss that multiplies by it."

    def wrapper(whole):
        return lambda a, b, scale, *rest, **kw: whole(a, b, 2 * scale, *rest, **kw)

    with rebound("global_loss", wrapper), rebound("region_loss", wrapper):
        yield


@contextlib.contextmanager
def unknown_words():
    "The vocabulary does not know a single word: each token becomes the same one."
    room = importlib.import_module("fgclip_nb.text.tokenizer")
    whole = room._encode_new

    def encode_new(texts):
        whole(texts)
        for text in texts:
            first, *ids, last = room._cache[text]
            room._cache[text] = (first, *[320 for _ in ids], last)

    room._cache.clear()
    with patch.object(room, "_encode_new", encode_new):
        yield
    room._cache.clear()


def std_of_255():
    "The standard deviation is given in units of 0..255, pixels and mean in units of 0..1."
    return rebound("normalize", lambda whole: lambda pixels, *a: whole(pixels, *a) / 255)


def class_token_early():
    "The class token is taken where it goes into the layers, where it has seen no photo."

    def wrapper(whole):
        def features(model, pixels, dense=None, interpolate=None):
            _, patches, grid = whole(model, pixels, dense, interpolate)
            vision = model.vision_model
            token = (
                vision.embeddings.class_embedding + vision.embeddings.position_embedding.weight[0]
            )
            token = vision.post_layernorm(vision.pre_layrnorm(token))
            return model.visual_projection(token).expand(len(pixels), -1), patches, grid

        return features

    return rebound("vision_features", wrapper)


def indices(change):
    "The (epoch, sample) of a batch are change(those that should come, number of the batch)."
    order = importlib.import_module("fgclip_nb.data.order").TrainingOrder
    whole = order.indices

    def changed(self, number, rank=0):
        return change(list(whole(self, number, rank)), number)

    return patch.object(order, "indices", changed)


def debug_subset():
    "The first 16 samples, in another order each time."
    return indices(
        lambda rows, number: [
            (rows[0][0], int(i)) for i in np.random.default_rng(number).permutation(16)
        ]
    )


def workers_alike():
    "Four loader processes with one seed deliver the same quarter each."
    return indices(lambda rows, number: rows[: len(rows) // 4] * 4)


@contextlib.contextmanager
def validated_untrained():
    "Validation looks at a copy of the model that was made before the first step."
    kept = {}

    def copied(model):
        return {k: v.clone() for k, v in model.state_dict().items()}

    def first(whole):
        def step(s, batches):
            kept.setdefault("state", copied(s.model))
            return whole(s, batches)

        return step

    def old(whole):
        def validate(s, *a, **kw):
            now = copied(s.model)
            s.model.load_state_dict(kept["state"])
            values = whole(s, *a, **kw)
            s.model.load_state_dict(now)
            return values

        return validate

    with rebound("run_step", first), rebound("validate", old):
        yield


def clamped_to_one():
    "Log scales are limited to ln 1 in place of ln 100."

    def wrapper(whole):
        def clamp(model):
            whole(model)
            with torch.no_grad():
                for name in ("logit_scale", "logit_scale_finegraind", "logit_scale_hardneg"):
                    getattr(model, name).clamp_(max=0.0)

        return clamp

    return rebound("clamp_scales_", wrapper)


def texts_cached():
    "Features of texts are computed once and kept for good, without gradient."
    kinds = dict(
        text_features="caption_ids",
        region_text_features="region_caption_ids",
        hard_text_features="hard_caption_ids",
        long_text_features="long_caption_ids",
    )
    kept = {}

    def wrapper(whole):
        @torch.no_grad()
        def textual(model, batch):
            out = {}
            for name, rows in whole(model, batch).items():
                ids = getattr(batch, kinds[name]).tolist()
                out[name] = torch.stack(
                    [kept.setdefault((name[:4] == "long", i), row) for i, row in zip(ids, rows)]
                )
            return out

        return textual

    return rebound("textual_features", wrapper)


def grey_augmentation():
    "RandomGrayscale with probability 1 in place of 0.1, in training only."

    def wrapper(whole):
        def photo(sample, d):
            pixels = whole(sample, d)
            if not d.train:
                return pixels
            grey = pixels.mean(2, keepdims=True).astype(np.uint8)
            return np.ascontiguousarray(np.broadcast_to(grey, pixels.shape))

        return photo

    return rebound("photo_for", wrapper)


def phrases_first():
    "A batch lays phrases before captions, the model takes captions first."

    def wrapper(whole):
        def fields(examples, *a):
            out = whole(examples, *a)
            n, r = len(out["caption_rows"]), sum(len(e.regions) for e in examples)
            order = torch.arange(len(out["texts"].index))
            out["texts"] = out["texts"].select(
                torch.cat([order[n : n + r], order[:n], order[n + r :]])
            )
            return out

        return fields

    return rebound("text_fields", wrapper)


def bank_one_vector():
    "The bank is given the mean of the batch in place of its rows."
    bank = importlib.import_module("fgclip_nb.losses.bank").MemoryBank
    whole = bank.push

    def push(self, regions, texts, *a, **kw):
        if len(regions):
            regions, texts = (x.mean(0, keepdim=True).expand_as(x) for x in (regions, texts))
        return whole(self, regions, texts, *a, **kw)

    return patch.object(bank, "push", push)


# ---- the catalogue -----------------------------------------------------------------------------
NOTHING_SAID = ("held_out_above_chance", "global_above_chance")
CAPTIONS = dict(region_weight=0.0, hard_weight=0.0, memory_bank_size=0)

FAULTS = dict(
    overexposed=Case(
        "pixels 0..255 were taken for 0..1 when the photos were saved, and clipped: all is white",
        ("photos_blank",),
        world=dict(change=each_photo(lambda x: x * 255)),
    ),
    sepia=Case(
        "the photos were toned in sepia, the texts name colours",
        ("photos_grey",),
        world=dict(change=each_photo(sepia)),
    ),
    file_names=Case(
        "captions are file names with a number",
        NOTHING_SAID,
        world=dict(change=each_row(file_name_for_caption)),
    ),
    stock_captions=Case(
        "captions are one of four stock texts of a web site",
        ("texts_few", "duplicate_floor_reached"),
        world=dict(change=each_row(stock_caption)),
    ),
    captions_late=Case(
        "photos with captions only, and captions were joined one row too late",
        (*NOTHING_SAID, "phrases_mispaired"),
        CAPTIONS,
        world=dict(change=captions_late),
    ),
    photos_in_tens=Case(
        "a crawler saved the first photo of each ten under all ten names, captions are right",
        ("photos_repeated",),
        world=dict(change=each_row(photos_in_tens, "train")),
    ),
    empty_files=Case(
        "seven in ten training photos are files of 0 bytes",
        ("media_missing",),
        world=dict(change=each_row(mostly_empty, "train")),
    ),
    held_out_german=Case(
        "held-out captions are German, those of training English",
        ("held_out_above_chance", "overfitting"),
        world=dict(change=each_row(german_caption, "val")),
    ),
    begins_at_centre=Case(
        "boxes are centre, then centre plus width and height",
        ("boxes_misread",),
        world=dict(change=each_row(begins_at_centre)),
    ),
    rate_1=Case(
        "learning_rate 1, lr_warmup_steps 400",
        ("learning_rate_high", "loss_diverges", "warmup_too_long"),
        dict(learning_rate=1.0, lr_warmup_steps=400),
    ),
    spread_500=Case(
        "spread_weight 500, beside which the other terms are nothing",
        ("term_unweighted", "losses_fall_together"),
        dict(spread_weight=500.0),
    ),
    sgd=Case(
        "AdamW was replaced by SGD with momentum at the same rate",
        ("learning_rate_low", "modules_train"),
        plant=plain_sgd,
    ),
    decays_each_step=Case(
        "the rate is multiplied by 0.8 each step, meant for each epoch",
        ("learning_rate_zero", "learning_rate_low"),
        plant=schedule(lambda whole, step, cfg, total: cfg.learning_rate * 0.8 ** (step - 1)),
    ),
    rate_over_256=Case(
        "the schedule divides the rate by 256, for a batch size that is not this one",
        ("learning_rate_low",),
        plant=schedule(lambda whole, *a: whole() / 256),
    ),
    l2_in_gradient=Case(
        "a weight decay of 0.1 is added to the gradients (Adam with L2, not AdamW)",
        ("decay_eats_weights",),
        plant=l2_in_gradient,
    ),
    scale_twice=Case(
        "the temperature is applied twice in the global and the region loss",
        ("loss_miscomputed", "logits_in_range"),
        plant=scale_twice,
    ),
    unknown_words=Case(
        "the vocabulary file is another one: each word becomes the same token",
        ("text_embeddings_differ", "texts_few"),
        plant=unknown_words,
    ),
    std_of_255=Case(
        "the standard deviation of pixels is given in units of 255",
        ("pixels_not_normalised",),
        plant=std_of_255,
    ),
    class_token_early=Case(
        "photo features are the class token before the layers",
        ("image_embeddings_differ",),
        plant=class_token_early,
    ),
    debug_subset=Case(
        "a subset of 16 photos was left from debugging",
        ("batches_repeat", "overfitting"),
        plant=debug_subset,
    ),
    workers_alike=Case(
        "four loader processes have one seed: each batch is 4 photos four times",
        ("batches_repeat", "duplicate_floor_reached", "few_contrasted"),
        plant=workers_alike,
    ),
    validated_untrained=Case(
        "validation looks at a copy made before training",
        ("held_out_above_chance",),
        plant=validated_untrained,
    ),
    clamped_to_one=Case(
        "after each step the scales are limited to 1 in place of 100",
        ("scale_too_low", "scale_as_asked", "scale_can_move"),
        plant=clamped_to_one,
    ),
    texts_cached=Case(
        "text features are computed once, kept, and get no gradient",
        ("modules_train",),
        plant=texts_cached,
    ),
    grey_augmentation=Case(
        "an augmentation makes all training photos grey, held-out ones keep their colours",
        ("photos_grey", "held_out_above_chance"),
        plant=grey_augmentation,
    ),
    phrases_first=Case(
        "a batch holds phrases before captions, the model takes them the other way round",
        ("phrases_mispaired", "global_above_chance", "held_out_above_chance"),
        plant=phrases_first,
    ),
    bank_one_vector=Case(
        "the bank is filled with one mean vector per batch", ("bank_clean",), plant=bank_one_vector
    ),
)

CONTROLS = dict(
    healthy=Case("as it should be"),
    cached_24=Case(
        "24 photos in chunks of 6, a bank of 128",
        params=dict(batch_size=24, gradient_caching=6, memory_bank_size=128),
    ),
    accumulated_6=Case(
        "6 photos a batch, 3 accumulated",
        params=dict(batch_size=6, gradient_accumulation_steps=3, learning_rate=2e-3),
    ),
    batch_64=Case("64 photos, 40 steps", params=dict(batch_size=64, max_steps=40)),
    scale_20=Case(
        "scales start at 20, equal captions are positives",
        params=dict(logit_scale_init=3.0, duplicates="positive"),
    ),
    captions_32=Case(
        "captions only, 32 photos",
        params=dict(CAPTIONS, batch_size=32),
        world=dict(change=without_regions),
    ),
    nothing_held_out=Case(
        "no validation and nothing held out",
        params=dict(eval_every=0, split="train", early_stop=0),
        world=dict(change=all_train),
    ),
    steps_20=Case(
        "20 steps", params=dict(max_steps=20, lr_warmup_steps=4, memory_bank_warmup_steps=5)
    ),
    sigmoid_cached=Case(
        "the sigmoid loss, cached", params=dict(losses="sigmoid", gradient_caching=8)
    ),
    all_terms=Case(
        "every loss with a weight",
        params=dict(region_weight=3.0, hard_weight=1.0, spread_weight=0.1, ranking_weight=0.2),
    ),
    crop_no_bank=Case(
        "mirrored parts, no bank, constant rate",
        params=dict(
            augment="crop", memory_bank_size=0, max_steps=120, lr_schedule="constant",
            learning_rate=1.5e-3,
        ),
    ),
    world_21=Case(
        "360 other photos, seed 21, bf16, no negatives' loss",
        params=dict(precision="bf16", hard_weight=0.0, max_steps=100),
        world=dict(seed=21, train=360, held_out=60),
    ),
)  # fmt: skip

CASES = {}  # two faults, a control, so that a part of a run holds both
_controls = iter(CONTROLS.items())
CASES.update([next(_controls)])
for _k, (_name, _case) in enumerate(FAULTS.items()):
    CASES[_name] = _case
    if _k % 2 and (_pair := next(_controls, None)):
        CASES.update([_pair])
CASES.update(_controls)
