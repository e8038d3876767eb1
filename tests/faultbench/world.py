"""A made world of coloured shapes: about 300 photos with boxes, phrases, captions and hard
negatives in the package's own JSON, on which a healthy training of a hundred steps generalises.

It is no cell: it exists to be broken by tests/faultbench/cases.py."""

import json
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw

COLOURS = dict(
    red=(214, 40, 40),
    green=(40, 150, 60),
    blue=(45, 70, 215),
    yellow=(232, 214, 50),
    purple=(128, 50, 150),
    orange=(240, 140, 40),
    cyan=(60, 200, 215),
    pink=(245, 150, 190),
    brown=(115, 75, 45),
    white=(240, 240, 240),
)
SHAPES = ("square", "disc", "triangle")
SIDE = 96  # pixels of a photo


def draw_shape(draw, shape, box, colour):
    "One shape in its box (x1, y1, x2, y2), pixels."
    x1, y1, x2, y2 = box
    if shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "disc":
        draw.ellipse(box, fill=colour)
    else:
        draw.polygon([((x1 + x2) // 2, y1), (x2, y2), (x1, y2)], fill=colour)


def draw_photo(objects, rng, side=SIDE) -> Image.Image:
    "A photo of objects (colour, shape, box) on a dim, noisy ground."
    ground = rng.integers(60, 110, 3)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in ground))
    draw = ImageDraw.Draw(image)
    for colour, shape, box in objects:
        draw_shape(draw, shape, box, COLOURS[colour])
    noisy = np.asarray(image, float) + rng.normal(0, 9, (side, side, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def draw_objects(rng, most=4, side=SIDE) -> list:
    "Two to `most` objects (colour, shape, box), each in a quarter of its own."
    half = side // 2
    quarters = rng.permutation(4)[: int(rng.integers(2, most + 1))]
    colours = rng.choice(list(COLOURS), len(quarters), replace=False)
    objects = []
    for quarter, colour in zip(quarters, colours):
        size = int(rng.integers(half * 6 // 10, half))
        x = half * (quarter % 2) + int(rng.integers(0, half - size + 1))
        y = half * (quarter // 2) + int(rng.integers(0, half - size + 1))
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        objects.append((str(colour), shape, (int(x), int(y), int(x) + size, int(y) + size)))
    return objects


def phrase_of(colour, shape) -> str:
    return f"a {colour} {shape}"


def entry(name, split, objects, rng, side=SIDE) -> dict:
    "The row of a photo in the package's own JSON; boxes in pixels, xyxy."
    regions = []
    for colour, shape, box in objects:
        others = rng.choice([c for c in COLOURS if c != colour], 3, replace=False)
        wrong = [phrase_of(c, shape) for c in others]
        regions.append(dict(bbox=list(box), caption=phrase_of(colour, shape), negatives=wrong))
    caption = " and ".join(phrase_of(colour, shape) for colour, shape, _ in objects)
    return dict(
        image=name, width=side, height=side, split=split, captions=[caption], regions=regions
    )


def make_world(folder, train=240, held_out=48, seed=0, change=None) -> Path:
    """Write photos and regions.jsonl below `folder`; returns the path of the latter.

    change: a function (rows, folder, rng) -> rows that breaks the world as it is written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(train + held_out):
        objects = draw_objects(rng)
        name = f"{i:04d}.png"
        draw_photo(objects, rng).save(folder / name)
        rows.append(entry(name, "train" if i < train else "val", objects, rng))
    if change:
        rows = change(rows, folder, np.random.default_rng(seed + 1))
    path = folder / "regions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def each_row(fix, split=None):
    "A change that calls fix(row, number, folder, rng) on each row (of one split)."

    def change(rows, folder, rng):
        for i, row in enumerate(rows):
            if split in (None, row["split"]):
                fix(row, i, folder, rng)
        return rows

    return change
