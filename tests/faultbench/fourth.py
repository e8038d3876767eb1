"""A fourth catalogue for the bench: faults spread evenly over data, parameters, surroundings and
forks, things that lie between them (evaluation, resuming, precision, order, several terms), clips.

Its author read the README, the floors up to the losses and the training floor, and of the
diagnostics only the public list of causes. Each fault was tried for a few steps, nine cases (six
of them healthy) to their end, looking at losses and ranks; no verdict was seen before the
predictions were sealed. Harm is the bench's figure (`HARM`); it shows little in the cases that
touch regions or the memory bank alone.

It is no cell: broken trainings are no example of how to train."""

import contextlib, copy, dataclasses, importlib
from unittest.mock import patch
import numpy as np
import torch
from PIL import Image, ImageDraw
from bench import Case, rebound
from world import each_row

made = importlib.import_module("world")


# ---- data: functions (rows, folder, rng) -> rows ---------------------------------------------
def each_region(fix):
    "A change that calls fix(region, row, rng) on each region."

    def change(rows, folder, rng):
        for row in rows:
            for region in row["regions"]:
                fix(region, row, rng)
        return rows

    return change


def each_photo(fix, share=1.0):
    "A change of a share of the photos: fix(PIL image, rng) -> PIL image."

    def one(row, i, folder, rng):
        if rng.random() < share:
            path = folder / row["image"]
            fix(Image.open(path).convert("RGB"), rng).save(path)

    return each_row(one)


def pixelwise(fix):
    "A function of a PIL image from one of an array (height, width, 3) float."

    def whole(image, rng):
        pixels = np.clip(fix(np.asarray(image, float)), 0, 255)
        return Image.fromarray(pixels.astype(np.uint8))

    return whole


def several(*changes):
    "One change after the other."

    def change(rows, folder, rng):
        for one in changes:
            rows = one(rows, folder, rng)
        return rows

    return change


def of_preview(region, row, rng):
    "The box as drawn on a preview of half the size."
    region["bbox"] = [v // 2 for v in region["bbox"]]


def as_point(region, row, rng):
    "Half of the things were clicked at, not framed."
    if rng.random() < 0.55:
        x1, y1, x2, y2 = region["bbox"]
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
        region["bbox"] = [x, y, x + 1, y + 1]


def whole_photo(region, row, rng):
    region["bbox"] = [0, 0, row["width"], row["height"]]


def centre_and_size(region, row, rng):
    "x, y of the middle, then width and height, as YOLO writes them."
    x1, y1, x2, y2 = region["bbox"]
    region["bbox"] = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def true_negatives(region, row, rng):
    "Hard negatives from a paraphrasing tool: they are true."
    thing = region["caption"].removeprefix("a ")
    region["negatives"] = [f"one {thing}", f"the {thing}", f"some {thing}"]


def sorted_phrases(row, i, folder, rng):
    "The phrases of a photo in the order of the alphabet, its boxes as they were."
    texts = [(r["caption"], r["negatives"]) for r in row["regions"]]
    for region, (phrase, wrong) in zip(row["regions"], sorted(texts)):
        region["caption"], region["negatives"] = phrase, wrong


def line_lost(rows, folder, rng):
    "A line of the caption table was lost on the way: from there on captions are the next photo's."
    kept = [row["captions"] for row in rows]
    for i in range(len(rows) // 3, len(rows)):
        rows[i]["captions"] = kept[(i + 1) % len(rows)]
    return rows


def joined_on_the_day(rows, folder, rng):
    "Captions joined on the date: each photo carries those of all six of its day."
    kept = [row["captions"][0] for row in rows]
    for i, row in enumerate(rows):
        day = i // 6 * 6
        row["captions"] = list(rng.permutation(kept[day : day + 6]))
    return rows


def album_caption(rows, folder, rng):
    "One caption for an album of twelve photos."
    for i, row in enumerate(rows):
        row["captions"] = rows[i // 12 * 12]["captions"]
    return rows


BOILERPLATE = (
    "all rights reserved by the archive of the city, no part may be shown without asking, "
)


def licence_first(row, i, folder, rng):
    row["captions"] = [BOILERPLATE * 5 + row["captions"][0]]


def six_first(row, i, folder, rng):
    "A column of the data base that holds six letters."
    row["captions"] = [text[:6] for text in row["captions"]]
    for region in row["regions"]:
        region["caption"], region["negatives"] = region["caption"][:6], []


CHINESE = dict(
    zip(
        (*made.COLOURS, *made.SHAPES, "and", "a"),
        "红色 绿色 蓝色 黄色 紫色 橙色 青色 粉色 棕色 白色 方块 圆盘 三角 和 一个".split(),
    )
)


def in_chinese(row, i, folder, rng):
    "Training texts in Chinese; the held-out ones stay English."

    def told(text):
        return "".join(CHINESE[word] for word in text.split())

    row["captions"] = [told(text) for text in row["captions"]]
    for region in row["regions"]:
        region["caption"] = told(region["caption"])
        region["negatives"] = [told(text) for text in region["negatives"]]


def shapes_alone(row, i, folder, rng):
    "Class names in the place of captions and phrases."
    for region in row["regions"]:
        region["caption"], region["negatives"] = region["caption"].split()[-1], []
    row["captions"] = [row["regions"][0]["caption"]]


def held_out_next_frame(rows, folder, rng):
    "Held-out photos are the next frames of training ones: shifted by a pixel, noisy."
    train = [row for row in rows if row["split"] == "train"]
    for row, source in zip([r for r in rows if r["split"] == "val"], train[::3]):
        pixels = np.roll(np.asarray(Image.open(folder / source["image"]), float), 1, axis=1)
        noisy = np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / row["image"])
        row.update(captions=source["captions"], regions=copy.deepcopy(source["regions"]))
    return rows


def oversampled(rows, folder, rng):
    "Twenty photos, copied under new names to balance the classes."
    train = [row for row in rows if row["split"] == "train"]
    for i, row in enumerate(train[20:]):
        source = train[i % 20]
        (folder / row["image"]).write_bytes((folder / source["image"]).read_bytes())
        row.update(captions=source["captions"], regions=copy.deepcopy(source["regions"]))
    return rows


def placeholder(image, rng):
    "What the server sends where the photo is gone: a grey card with a cross."
    card = Image.new("RGB", image.size, (225, 225, 225))
    draw = ImageDraw.Draw(card)
    draw.line((30, 30, 66, 66), fill=(150, 150, 150), width=4)
    draw.line((66, 30, 30, 66), fill=(150, 150, 150), width=4)
    return card


def night_camera(pixels):
    "Infrared: grey, a little green."
    grey = pixels @ (0.299, 0.587, 0.114)
    return grey[..., None] * (0.96, 1.02, 0.97)


def cut_off(pixels):
    "A JPEG that was copied in part: what did not arrive is grey."
    pixels[len(pixels) // 4 :] = 128
    return pixels


def half_gone(row, i, folder, rng):
    if i % 5 < 3:
        (folder / row["image"]).unlink()


def three_black(row, i, folder, rng):
    if i in (40, 110, 170):
        Image.new("RGB", (made.SIDE, made.SIDE)).save(folder / row["image"])


def sorted_rows(rows, folder, rng):
    return sorted(rows, key=lambda row: row["captions"][0])


def said_late(row, i, folder, rng):
    "A long caption that begins alike everywhere and says what it has to say late."
    row["caption"] = f"this photo was taken in our studio and it shows {row['captions'][0]}"


def sides_exchanged(row, i, folder, rng):
    "Photos laid on their side by an export, boxes as they were."
    path = folder / row["image"]
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


# ---- changes that leave a data set healthy ---------------------------------------------------
def without_regions(row, i, folder, rng):
    row["regions"] = []


def without_captions(row, i, folder, rng):
    row["captions"] = []


def without_negatives(region, row, rng):
    region["negatives"] = []


def by_hand(region, row, rng):
    "A box as a person draws it: each edge off by up to two pixels."
    x1, y1, x2, y2 = (int(v) + int(rng.integers(-2, 3)) for v in region["bbox"])
    region["bbox"] = [max(x1, 0), max(y1, 0), min(x2, row["width"]), min(y2, row["height"])]


def written_by_people(row, i, folder, rng):
    "Capitals and a full stop here and there."
    row["captions"] = [text.capitalize() + "." * (i % 2) for text in row["captions"]]


def two_captions(row, i, folder, rng):
    parts = row["captions"][0].split(" and ")
    row["captions"] = [" and ".join(parts), " beside ".join(parts[::-1])]


def long_caption(row, i, folder, rng):
    row["caption"] = f"{row['captions'][0]}, all of them on one plain ground."


def some_tested(row, i, folder, rng):
    if i % 12 == 0 and row["split"] == "train":
        row["split"] = "test"


def few_repeated(rows, folder, rng):
    "Twelve photos stand twice in the training part."
    for row, source in zip(rows[100:112], rows[:12]):
        (folder / row["image"]).write_bytes((folder / source["image"]).read_bytes())
        row.update(captions=source["captions"], regions=copy.deepcopy(source["regions"]))
    return rows


def larger_photos(row, i, folder, rng):
    "Photos of 168 x 120 pixels, boxes with them."
    path, (w, h) = folder / row["image"], (168, 120)
    Image.open(path).resize((w, h)).save(path)
    for region in row["regions"]:
        sides = (w / row["width"], h / row["height"]) * 2
        region["bbox"] = [v * s for v, s in zip(region["bbox"], sides)]
    row.update(width=w, height=h)


# ---- forks: contexts in which the package is broken --------------------------------------------
def room(name):
    return importlib.import_module(f"fgclip_nb.{name}")


def pixels_by_photo():
    "Each photo is made to mean 0 and deviation 1 by itself; a black one divides by zero."

    def own(pixels, dtype=None):
        x = pixels.float()
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return (x - mean) / std

    return patch("fgclip_nb.model.vision_tower.normalize", own)


def divided_twice():
    "Pixels divided by 255 once more."
    normalize = room("data.photos").normalize

    def small(pixels, dtype=None):
        white = normalize(torch.full_like(pixels[:1, :, :1, :1], 255))
        black = normalize(torch.zeros_like(pixels[:1, :, :1, :1]))
        return black + (normalize(pixels) - black) / 255 + 0 * white

    return patch("fgclip_nb.model.vision_tower.normalize", small)


def read_at_the_start():
    "The vector of a text is taken at its opening mark, not at its closing one."
    batch = room("text.packing").TextBatch
    pack = batch.pack

    def opening(self):
        p = pack(self)
        ends, lengths = torch.zeros_like(p.ends), torch.ones_like(p.row_lengths)
        return dataclasses.replace(p, ends=ends, row_lengths=lengths)

    return patch.object(batch, "pack", opening)


def divided_by_scale():
    "Logits divided by the temperature that was to multiply them."
    whole = room("losses.contrast").contrast

    def divided(p, dropped=0):
        return whole(dataclasses.replace(p, scale=1 / p.scale), dropped)

    return patch("fgclip_nb.losses.contrast.contrast", divided)


def boxes_not_in_cells():
    "Boxes pooled as shares of the picture where cells of the grid are meant."
    constants = room("data.photos").constants

    def ones(values, like):
        return constants([1.0 for _ in values], like)

    return patch("fgclip_nb.model.vision_tower.constants", ones)


def captions_equal_by_article():
    "A caption is known by its first word: all are equal, and masked."
    fields = room("batches.batch").text_fields

    def article(examples, context_length, form=None):
        made = fields(examples, context_length, form)
        ids = made["texts"].caption_ids
        return made | dict(texts=dataclasses.replace(made["texts"], caption_ids=0 * ids + 1))

    return patch("fgclip_nb.batches.batch.text_fields", article)


def right_one_last():
    "The right sentence of a hard group stands last, where the loss takes the first."
    fields = room("batches.batch").text_fields

    def last(examples, context_length, form=None):
        turned = []
        for e in examples:
            regions = [
                dataclasses.replace(
                    r, positive=r.negatives[0], negatives=(*r.negatives[1:], r.positive)
                )
                if r.negatives
                else r
                for r in e.regions
            ]
            turned.append(dataclasses.replace(e, regions=regions))
        return fields(turned, context_length, form)

    return patch("fgclip_nb.batches.batch.text_fields", last)


def contrasted_by_chunk():
    "A large batch in chunks of two, each contrasted by itself: that is accumulation."

    def by_chunk(model, chunks, loss_fn, autocast=None):
        chunks, seen = list(chunks), []
        for chunk in chunks:
            features = model(chunk)
            share, (total, terms, _) = loss_fn(features, chunk)
            (share / len(chunks)).backward()
            seen.append(features)
        rows = {k: x for k, x in seen[0].items() if not x.ndim}
        for k in [k for k, x in seen[0].items() if x.ndim]:
            rows[k] = torch.cat([f[k] for f in seen if k in f]).detach()
        return share, (total, terms, rows)

    return patch("fgclip_nb.training.step.gradient_cached_backward", by_chunk)


def optimiser_of_a_copy():
    "The optimiser is given the parameters of the model as it was before it was copied."
    groups = room("training.build").parameter_groups

    def of_copy(model, weight_decay):
        return groups(copy.deepcopy(model), weight_decay)

    return patch("fgclip_nb.training.state.parameter_groups", of_copy)


def uphill():
    "The optimiser goes up the gradient: `maximize` came along with its arguments."
    groups = room("training.build").parameter_groups

    def climbing(model, weight_decay):
        return [group | dict(maximize=True) for group in groups(model, weight_decay)]

    return patch("fgclip_nb.training.state.parameter_groups", climbing)


def frozen(part):
    "A plant that freezes a module of the model, by its name."

    def plant():
        build = room("training.build").build_model

        def with_frozen(cfg, log):
            model = build(cfg, log)
            getattr(model, part).requires_grad_(False)
            return model

        return patch("fgclip_nb.training.state.build_model", with_frozen)

    return plant


def gradients_kept():
    "Nobody sets the gradients back to zero."

    def keep(self, set_to_none=True):
        return None

    return patch.object(torch.optim.AdamW, "zero_grad", keep)


def cosine_of_an_epoch():
    "The learning rate falls to zero within the first epoch and stays there."

    def short(rate):
        def of_epoch(step, cfg, total):
            return rate(min(step, 16), cfg, 15)

        return of_epoch

    return rebound("learning_rate_at", short)


def decay_by_itself():
    "Weight decay that is not multiplied by the learning rate: 8 % a step."

    def eaten(step):
        def one(s, batches):
            launched = step(s, batches)
            with torch.no_grad():
                for p in s.model.parameters():
                    if p.ndim > 1:
                        p.mul_(0.92)
            return launched

        return one

    return rebound("run_step", eaten)


def kept_in_bf16():
    "Weights and temperatures are stored in bfloat16."

    def rounded(step):
        def one(s, batches):
            launched = step(s, batches)
            with torch.no_grad():
                for p in s.model.parameters():
                    p.copy_(p.bfloat16().float())
            return launched

        return one

    return rebound("run_step", rounded)


def always_overflows():
    "A loss scale that begins too high and is hardly lowered."

    def high(scaler):
        def of_device(precision, device):
            kind = torch.device(device).type
            return torch.amp.GradScaler(kind, init_scale=2.0**126, backoff_factor=0.99)

        return of_device

    return rebound("make_scaler", high)


def pinned_at_hundred():
    "The temperatures are held at 100, where trained models end."

    def pin(self):
        with torch.no_grad():
            for name in ("logit_scale", "logit_scale_finegraind", "logit_scale_hardneg"):
                getattr(self, name).fill_(4.6051702)

    return patch.object(room("model.fgclip").FGCLIP, "clamp_scales_", pin)


def bank_without_names():
    "Entries of the bank do not know which phrase they are."
    bank = room("losses.bank").MemoryBank
    push = bank.push

    def nameless(self, r, t, captions, samples, regions=None, **kw):
        return push(self, r, t, None, None, None, **kw)

    return patch.object(bank, "push", nameless)


def bank_from_the_start():
    "Each forward writes from slot 0 on, and only what it wrote counts."
    write = room("losses.bank").write_rows

    def again(ring, rows):
        ring["pointer"].zero_()
        ring["filled"].zero_()
        return write(ring, rows)

    return patch("fgclip_nb.losses.bank.write_rows", again)


def bank_written_once():
    "A bank that is full is never written again."
    bank, pushed = room("losses.bank").MemoryBank, room("losses.bank").Pushed
    push = bank.push

    def once(self, *args, **kw):
        return pushed(0, 0) if self.full else push(self, *args, **kw)

    return patch.object(bank, "push", once)


def colours_jittered():
    "Training photos with their colours exchanged at random, as for a model without texts."

    def jitter(example):
        def one(sample, d, rng, pixels=None):
            if d.train and pixels is not None:
                pixels = np.ascontiguousarray(pixels[..., rng.permutation(3)])
            return example(sample, d, rng, pixels)

        return one

    return rebound("image_example", jitter)


def mirrored_without_boxes():
    "Training photos mirrored half of the time, their boxes not."

    def mirror(example):
        def one(sample, d, rng, pixels=None):
            if d.train and pixels is not None and rng.random() < 0.5:
                pixels = np.ascontiguousarray(pixels[:, ::-1])
            return example(sample, d, rng, pixels)

        return one

    return rebound("image_example", mirror)


def validated_in_bgr():
    "The loader of the validation reads blue first."

    def blue_first(photo):
        def one(sample, d):
            pixels = photo(sample, d)
            return pixels if d.train else np.ascontiguousarray(pixels[..., ::-1])

        return one

    return rebound("photo_for", blue_first)


@contextlib.contextmanager
def slow_average():
    "Validated is a moving average of the weights, which has hardly left its random start."
    kept = {}

    def averaging(step):
        def one(s, batches):
            if not kept:
                kept.update({n: p.detach().clone() for n, p in s.model.named_parameters()})
            launched = step(s, batches)
            for n, p in s.model.named_parameters():
                kept[n].lerp_(p.detach(), 0.001)
            return launched

        return one

    def of_average(validate):
        def one(s, examples, *args):
            trained = {n: p.detach().clone() for n, p in s.model.named_parameters()}
            s.model.load_state_dict(kept, strict=False)
            columns = validate(s, examples, *args)
            s.model.load_state_dict(trained, strict=False)
            return columns

        return one

    with rebound("run_step", averaging), rebound("validate", of_average):
        yield


@contextlib.contextmanager
def photos_vanish():
    "The scratch disk is cleaned: after a few steps nine photos in ten are gone."
    loading, error = room("batches.loading"), room("core.identity").DataError
    asked = []

    def until(photo):
        def one(sample, d):
            asked.append(sample.id)
            if d.train and len(asked) > 160 and int(sample.id[:4]) % 10:
                raise error(f"{sample.media}: no such file")
            return photo(sample, d)

        return one

    with patch.object(loading.Examples, "cache_bytes", 0), rebound("photo_for", until):
        yield


def preempted():
    "The job is stopped every four steps and begins the data from the front each time."
    order = room("data.order").TrainingOrder
    indices = order.indices

    def from_the_front(self, number, rank=0):
        return indices(self, number % 4, rank)

    return patch.object(order, "indices", from_the_front)


def not_shuffled():
    def straight(n, seed=0, epoch=0):
        return np.arange(n)

    return patch("fgclip_nb.data.order.epoch_order", straight)


def half_loaded():
    "A loader that does not insist: the vision tower keeps its random start."
    opened = room("model.opening").open_model

    def lenient(*args, **kw):
        model = opened(*args, **kw)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.vision_model.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.05)
        return model

    return patch("fgclip_nb.training.build.open_model", lenient)


def one_frame():
    "A decoder that returns the first frame of a clip whatever is asked for."
    opened = room("data.memory_cache").open_clip

    class First:
        def __init__(self, clip):
            self.clip = clip

        def __getattr__(self, name):
            return getattr(self.clip, name)

        def read(self, numbers):
            return np.repeat(self.clip.read(np.asarray([0])), len(numbers), axis=0)

    return patch("fgclip_nb.data.inputs.open_clip", lambda *a: First(opened(*a)))


def tracks_upside_down():
    "Tracks of an annotator whose y grows upwards."
    track = room("data.world_video")._track

    def flipped(path, span=None):
        def turned(box):
            x1, y1, x2, y2 = box
            return (x1, 1 - y2, x2, 1 - y1)

        return tuple(dataclasses.replace(k, bbox=turned(k.bbox)) for k in track(path, span))

    return patch("fgclip_nb.data.world_video._track", flipped)


def stopped_and_resumed():
    "Healthy: the run is stopped at half its steps, and goes on from its checkpoint."
    restore = room("training.resuming").restore
    new_state = room("training.state").new_state

    def twice(loop):
        def one(s, *examples):
            s.total_steps //= 2
            loop(s, *examples)
            fresh = new_state(s.cfg, s.data, s.accelerator, s.path, s.log, s.recorder)
            restore(fresh)
            loop(fresh, *examples)
            s.step, s.best, s.model = fresh.step, fresh.best, fresh.model

        return one

    return rebound("train_loop", twice)


# ---- the catalogue ----------------------------------------------------------------------------
def data(told, accepted, change, **params):
    return Case(told, accepted, params, dict(change=change))


VIDEO = dict(data="world_video:size=60", num_frames=6, batch_size=10, max_steps=60)

DATA = dict(
    preview_boxes=data(
        "boxes in pixels of a preview of half the size", ("boxes_misread",), each_region(of_preview)
    ),
    centre_boxes=data(
        "boxes as middle and size (YOLO's form) where corners are read",
        ("boxes_misread", "boxes_rejected", "regions_lost"),
        each_region(centre_and_size),
    ),
    clicked_points=data(
        "55 % of the things were clicked at: their boxes are a pixel wide",
        ("regions_lost", "boxes_rejected"),
        each_region(as_point),
    ),
    default_boxes=data(
        "all boxes are the whole photo, the tool's default",
        ("boxes_constant",),
        each_region(whole_photo),
    ),
    photos_on_side=data(
        "photos turned by a quarter in an export, boxes not",
        ("boxes_misread", "phrases_mispaired"),
        each_row(sides_exchanged),
    ),
    sorted_phrases=data(
        "phrases of a photo sorted by the alphabet, boxes not",
        ("phrases_mispaired",),
        each_row(sorted_phrases),
    ),
    true_negatives=data(
        "hard negatives are paraphrases, and true",
        ("hard_above_chance",),
        each_region(true_negatives),
        hard_weight=1.0,
    ),
    line_lost=data(
        "captions shifted by one photo behind a lost line, a third into the table",
        ("global_above_chance", "held_out_above_chance", "losses_fall_together"),
        line_lost,
    ),
    joined_on_day=data(
        "each photo carries the captions of six photos of its day",
        ("global_above_chance", "held_out_above_chance", "losses_fall_together"),
        joined_on_the_day,
    ),
    album_captions=data(
        "one caption for each album of twelve photos",
        ("texts_few", "global_above_chance", "held_out_above_chance"),
        album_caption,
    ),
    licence_first=data(
        "captions begin with 80 tokens of licence, and are cut",
        ("texts_cut", "text_embeddings_differ", "duplicate_floor_reached"),
        each_row(licence_first),
    ),
    six_letters=data(
        "captions and phrases cut to six letters by a data base",
        ("texts_few", "texts_cut"),
        each_row(six_first),
    ),
    chinese_training=data(
        "training texts are Chinese, held-out ones English",
        ("held_out_above_chance", "overfitting"),
        each_row(in_chinese, "train"),
    ),
    classes_as_negatives=data(
        "class names as captions and phrases, equal ones counted as negatives",
        ("texts_few", "duplicate_floor_reached"),
        each_row(shapes_alone),
        duplicates="ignore",
    ),
    next_frames=data(
        "held-out photos are the next frames of training ones",
        ("leak", "photos_repeated"),
        held_out_next_frame,
    ),
    oversampled=data(
        "twenty training photos copied under new names", ("photos_repeated",), oversampled
    ),
    placeholder=data(
        "half of the photos are the server's card for a photo that is gone",
        ("photos_repeated", "photos_blank"),
        each_photo(placeholder, 0.5),
    ),
    night_camera=data(
        "four photos in five are of an infrared camera, colours are named",
        ("photos_grey",),
        each_photo(pixelwise(night_camera), 0.8),
    ),
)

PARAMETERS = dict(
    finetuning_rate=Case(
        "the learning rate of a fine-tuning, from scratch",
        ("learning_rate_low",),
        dict(learning_rate=2e-6, adam_beta2=0.999, lr_warmup_steps=0),
    ),
    warmup_of_paper=Case(
        "a warm-up of 2,000 steps", ("warmup_too_long",), dict(lr_warmup_steps=2000)
    ),
    sgd_rate=Case(
        "the learning rate of plain SGD, no clipping, no warm-up",
        ("learning_rate_high", "loss_diverges"),
        dict(learning_rate=0.1, lr_warmup_steps=0, max_grad_norm=0.0),
    ),
    clipped_to_eps=Case(
        "the largest norm of a gradient is set to Adam's eps",
        ("clipped_away", "learning_rate_low"),
        dict(max_grad_norm=1e-8),
    ),
    temperature_as_is=Case(
        "0.07, the temperature, given as the stored log scale",
        ("scale_too_low",),
        dict(logit_scale_init=0.07, learning_rate=1e-3),
    ),
    pairs_accumulated=Case(
        "two photos a forward, accumulated eight times, no bank",
        ("few_contrasted",),
        dict(batch_size=2, gradient_accumulation_steps=8, memory_bank_size=0),
    ),
    regions_weigh_all=Case(
        "the region loss weighs a thousand times the others",
        ("term_unweighted",),
        dict(region_weight=1000.0, global_weight=0.5),
    ),
    captions_weigh_nothing=Case(
        "captions weigh nothing, and held-out captions are the score",
        ("term_unweighted",),
        dict(global_weight=0.0, best_by="rank"),
    ),
    area_in_percent=Case(
        "the smallest area of a box given as 20 for per cent: 0.2",
        ("boxes_rejected", "regions_lost"),
        dict(min_area=0.2),
    ),
    bank_of_paper=Case(
        "a bank for a set a thousand times as large",
        ("bank_oversized", "bank_fresh"),
        dict(memory_bank_size=20_000, memory_bank_warmup_steps=0),
        dict(train=96),
    ),
    bank_in_epochs=Case(
        "a bank that comes on after the run",
        ("bank_comes_on",),
        dict(memory_bank_warmup_steps=5000),
    ),
    sigmoid_bias=Case(
        "the bias of the sigmoid loss with the wrong sign",
        ("bias_fits",),
        dict(losses="sigmoid", logit_bias_init=10.0),
    ),
    one_patch=Case(
        "photos of eight pixels, one patch: all boxes of a photo see the same",
        ("region_above_chance", "region_embeddings_differ", "phrases_mispaired", "boxes_constant"),
        dict(image_size=8),
    ),
    stopped_in_warmup=Case(
        "no patience, and a validation every two steps of a long warm-up",
        ("warmup_too_long", "learning_rate_low"),
        dict(lr_warmup_steps=60, eval_every=2, early_stop=1, best_by="rank"),
    ),
    small_set_long=Case(
        "twenty photos, 300 steps",
        ("overfitting",),
        dict(batch_size=10, max_steps=300),
        dict(train=20),
    ),
    context_of_six=Case(
        "long captions cut to six tokens, before they say anything",
        ("texts_cut", "text_embeddings_differ", "duplicate_floor_reached"),
        dict(context_length=6),
        dict(change=each_row(said_late)),
    ),
    tuned_too_fast=Case(
        "a trained model fine-tuned on another world at 0.03",
        ("learning_rate_high", "loss_diverges"),
        dict(learning_rate=0.03, lr_warmup_steps=0),
        dict(seed=9),
        before=Case("trained before"),
    ),
    scale_hot=Case(
        "the temperature of trained models, clipping off, a large learning rate",
        ("logits_in_range", "learning_rate_high", "overconfident"),
        dict(logit_scale_init=4.6052, learning_rate=8e-3, max_grad_norm=0.0),
    ),
)

SURROUNDINGS = dict(
    three_fifths_missing=data(
        "a copy of the photos that broke off: three in five are missing",
        ("media_missing",),
        each_row(half_gone, "train"),
    ),
    photos_cut_off=data(
        "photos copied in part, the lower three quarters are grey",
        ("photos_blank", "region_above_chance", "phrases_mispaired"),
        each_photo(pixelwise(cut_off), 0.9),
    ),
    photos_vanish=Case(
        "nine photos in ten vanish from the disk while it trains",
        ("media_missing",),
        dict(max_reject_share=1.0),
        plant=photos_vanish,
    ),
    preempted=Case(
        "stopped every four steps; the data begin from the front each time",
        ("batches_repeat", "overfitting"),
        plant=preempted,
    ),
    sorted_unshuffled=Case(
        "sorted by caption and never shuffled",
        ("batches_repeat",),
        world=dict(change=sorted_rows),
        plant=not_shuffled,
    ),
    loss_scale=Case(
        "half precision with a loss scale that overflows at each step",
        ("steps_skipped", "finite_numbers"),
        dict(precision="fp16"),
        plant=always_overflows,
    ),
    stored_in_bf16=Case(
        "weights and temperatures stored in bfloat16, small steps",
        ("modules_train", "scale_can_move", "scale_as_asked"),
        dict(learning_rate=1e-4, lr_schedule="constant"),
        plant=kept_in_bf16,
    ),
    half_loaded=Case(
        "of a trained model the vision tower is not loaded, and fine-tuned carefully",
        ("weights_loaded",),
        dict(learning_rate=1e-4),
        before=Case("trained before"),
        plant=half_loaded,
    ),
    black_photos=Case(
        "three black photos, and pixels divided by their own deviation",
        ("finite_numbers",),
        world=dict(change=each_row(three_black)),
        plant=pixels_by_photo,
    ),
)

FORKS = dict(
    divided_twice=Case(
        "pixels divided by 255 twice",
        ("pixels_not_normalised", "image_embeddings_differ"),
        plant=divided_twice,
    ),
    read_at_start=Case(
        "texts read at their opening mark", ("text_embeddings_differ",), plant=read_at_the_start
    ),
    divided_by_scale=Case(
        "logits divided by the temperature",
        ("loss_miscomputed", "scale_too_low"),
        plant=divided_by_scale,
    ),
    boxes_not_in_cells=Case(
        "boxes 0 to 1 pooled as if they were in cells",
        ("region_above_chance", "region_embeddings_differ", "boxes_misread", "phrases_mispaired"),
        plant=boxes_not_in_cells,
    ),
    all_captions_equal=Case(
        "all texts have one identity and are masked",
        ("gradient_size", "loss_stuck", "few_contrasted", "texts_few"),
        plant=captions_equal_by_article,
    ),
    right_one_last=Case(
        "the right sentence of a hard group stands where a wrong one is meant",
        ("hard_above_chance", "loss_miscomputed"),
        dict(hard_weight=2.0),
        plant=right_one_last,
    ),
    contrasted_by_chunk=Case(
        "a cached batch contrasted chunk by chunk, two at a time",
        ("few_contrasted", "loss_miscomputed"),
        dict(gradient_caching=2, memory_bank_size=0),
        plant=contrasted_by_chunk,
    ),
    optimiser_of_a_copy=Case(
        "the optimiser moves a copy of the model",
        ("modules_train", "loss_stuck"),
        plant=optimiser_of_a_copy,
    ),
    uphill=Case(
        "the optimiser goes up the gradient",
        ("loss_diverges", "loss_stuck", "region_loss_rise", "global_loss_rise"),
        plant=uphill,
    ),
    frozen_texts=Case(
        "the text tower is frozen at its random start",
        ("modules_train",),
        plant=frozen("text_model"),
    ),
    gradients_kept=Case(
        "gradients are never set back to zero",
        ("gradient_size", "loss_diverges", "learning_rate_high", "large_oscillation"),
        plant=gradients_kept,
    ),
    cosine_of_an_epoch=Case(
        "the learning rate is 0 from the second epoch on",
        ("learning_rate_zero",),
        plant=cosine_of_an_epoch,
    ),
    decay_by_itself=Case(
        "weight decay of 8 % a step, whatever the learning rate",
        ("decay_eats_weights",),
        plant=decay_by_itself,
    ),
    pinned_at_hundred=Case(
        "temperatures held at 100 in each step",
        ("scale_can_move", "scale_as_asked", "logits_in_range"),
        plant=pinned_at_hundred,
    ),
    bank_without_names=Case(
        "the bank forgets which phrases its entries are",
        ("duplicate_floor_reached", "region_loss_rise"),
        plant=bank_without_names,
    ),
    bank_from_the_start=Case(
        "the bank holds the last forward only",
        ("bank_fills",),
        dict(memory_bank_size=512),
        plant=bank_from_the_start,
    ),
    bank_written_once=Case(
        "the bank keeps its first entries for good",
        ("bank_fresh",),
        dict(max_steps=120),
        plant=bank_written_once,
    ),
    colours_jittered=Case(
        "colours of training photos exchanged at random",
        ("photos_grey", "global_above_chance", "region_above_chance", "held_out_above_chance"),
        plant=colours_jittered,
    ),
    mirrored_without_boxes=Case(
        "training photos mirrored half of the time, boxes not",
        ("boxes_misread", "phrases_mispaired"),
        plant=mirrored_without_boxes,
    ),
    validated_in_bgr=Case(
        "held-out photos are read blue first, training ones red first",
        ("held_out_above_chance", "overfitting"),
        plant=validated_in_bgr,
    ),
    slow_average=Case(
        "validated is an average of weights that is still random",
        ("held_out_above_chance",),
        plant=slow_average,
    ),
)

CLIPS = dict(
    clip_one_frame=Case(
        "clips: the decoder returns the first frame every time",
        ("photos_blank", "photos_repeated", "boxes_misread", "region_above_chance"),
        VIDEO,
        plant=one_frame,
    ),
    clip_upside_down=Case(
        "clips: tracks whose y grows upwards",
        ("boxes_misread", "phrases_mispaired", "region_above_chance"),
        VIDEO,
        plant=tracks_upside_down,
    ),
    clip_single=Case(
        "clips: one frame each, so that most tracks are never seen",
        ("regions_lost", "boxes_rejected"),
        VIDEO | dict(num_frames=1),
    ),
)


def healthy(told, params=None, change=None, plant=contextlib.nullcontext, before=None, **world):
    return Case(f"healthy: {told}", (), params or {}, world | dict(change=change), plant, before)


CONTROLS = dict(
    healthy=healthy("nothing changed"),
    batch_8=healthy("batches of 8", dict(batch_size=8, learning_rate=2e-3, max_steps=120)),
    batch_32=healthy("batches of 32", dict(batch_size=32), train=400),
    bank_off=healthy("no bank", dict(memory_bank_size=0)),
    bank_of_200=healthy("a bank of 200", dict(memory_bank_size=200, memory_bank_warmup_steps=10)),
    captions_only=healthy("no regions", None, each_row(without_regions)),
    regions_only=healthy("no captions", None, each_row(without_captions)),
    no_validation=healthy("nothing held out", None, held_out=0),
    brief=healthy("45 steps", dict(max_steps=45, lr_warmup_steps=4)),
    long=healthy("240 steps", dict(max_steps=240, learning_rate=2e-3), train=500),
    slower_rate=healthy("a third of the rate", dict(learning_rate=1e-3, max_steps=160)),
    faster_rate=healthy("a rate of 4e-3", dict(learning_rate=4e-3, lr_warmup_steps=16)),
    cached=healthy("chunks of four", dict(gradient_caching=4)),
    accumulated=healthy("two batches a step", dict(gradient_accumulation_steps=2, max_steps=60)),
    in_bf16=healthy("bfloat16", dict(precision="bf16")),
    checkpointed=healthy("activations recomputed", dict(gradient_checkpointing=True)),
    tuned=healthy(
        "fine-tuned on another world",
        dict(learning_rate=1e-3),
        before=Case("trained before"),
        seed=7,
    ),
    tuned_in_dim_light=healthy(
        "fine-tuned on darker photos",
        dict(learning_rate=1e-3, max_steps=60),
        each_photo(pixelwise(lambda x: 0.6 * x)),
        before=Case("trained before"),
        seed=8,
    ),
    resumed=healthy(
        "stopped and resumed",
        dict(lr_schedule="constant", learning_rate=2e-3),
        plant=stopped_and_resumed,
    ),
    small_world=healthy("160 photos", dict(max_steps=50), train=160, held_out=30),
    large_world=healthy("700 photos", dict(max_steps=120), train=700, held_out=100),
    dim_light=healthy("darker photos", None, each_photo(pixelwise(lambda x: 0.75 * x))),
    some_grey=healthy("8 % of the photos grey", None, each_photo(pixelwise(night_camera), 0.08)),
    sigmoid=healthy("the sigmoid loss", dict(losses="sigmoid")),
    constant_rate=healthy("a constant rate", dict(lr_schedule="constant", learning_rate=2e-3)),
    negatives_off=healthy("no hard negatives", None, each_region(without_negatives)),
    another_seed=healthy("another world", None, seed=5),
    positives=healthy("equal captions count as right", dict(duplicates="positive")),
    cropped=healthy("cropped photos", dict(augment="crop", max_steps=160)),
    scale_20=healthy("a temperature of 20", dict(logit_scale_init=3.0)),
    more_decay=healthy("more weight decay", dict(weight_decay=0.1)),
    slow_moments=healthy("beta2 of 0.999", dict(adam_beta2=0.999)),
    two_workers=healthy("two loader processes", dict(num_workers=2)),
    two_regions=healthy("two regions a photo", dict(max_regions=2)),
    further_terms=healthy(
        "the further terms of FG-CLIP 2",
        dict(spread_weight=0.1, hard_contrast_weight=0.3, ranking_weight=0.2),
    ),
    by_hand=healthy("boxes a little off", None, each_region(by_hand)),
    by_people=healthy("capitals and full stops", None, each_row(written_by_people)),
    two_captions=healthy("two captions a photo", None, each_row(two_captions)),
    long_captions=healthy("long captions too", None, each_row(long_caption)),
    some_tested=healthy("a test part left alone", None, each_row(some_tested)),
    few_repeated=healthy("twelve photos twice", None, few_repeated),
    larger_photos=healthy("photos of another shape", None, each_row(larger_photos)),
    unclipped=healthy("no clipping", dict(max_grad_norm=0.0, learning_rate=2e-3)),
    clips=healthy("clips", VIDEO | dict(max_steps=80)),
)

CASES = DATA | PARAMETERS | SURROUNDINGS | FORKS | CLIPS | CONTROLS
