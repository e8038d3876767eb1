"""A world that a two-layer model learns in a minute, and faults to plant into its training, each
with the rule that has to find it.

Used by tests/test_diagnostics.py; tests/faultbench holds the catalogues that nbs/faults.ipynb
publishes."""

import contextlib, json, time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch
import numpy as np, torch
from PIL import Image
from fgclip_nb import batches, diagnostics, training
from rebind import rebound
from fgclip_nb.diagnostics import judgement
from fgclip_nb.losses import bank as bank_room
from fgclip_nb.model import config
from fgclip_nb.core.folder import Run
from fgclip_nb.core.config import TrainConfig

COLOURS = dict(
    red=(220, 30, 30),
    green=(30, 160, 50),
    blue=(40, 60, 220),
    yellow=(235, 220, 40),
    purple=(130, 40, 150),
    orange=(245, 140, 20),
    cyan=(40, 210, 220),
    pink=(250, 150, 190),
    brown=(120, 75, 40),
    grey=(128, 128, 128),
    white=(245, 245, 245),
    black=(15, 15, 15),
)


def _photo(path, colours, rng):
    "A photo of coloured quarters with a little noise."
    a = np.zeros((64, 64, 3))
    for k, c in enumerate(colours):
        a[32 * (k // 2) : 32 * (k // 2) + 32, 32 * (k % 2) : 32 * (k % 2) + 32] = COLOURS[c]
    Image.fromarray(np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)).save(path)


def _row(name, colours, split, rng, two_words=False):
    boxes = [
        [32.0 * (k % 2), 32.0 * (k // 2), 32.0 * (k % 2) + 32, 32.0 * (k // 2) + 32]
        for k in range(4)
    ]

    def word(colour):
        if not two_words:
            return colour
        warm = ("red", "yellow", "orange", "pink", "brown", "white")
        return "warm" if colour in warm else "cold"

    def wrong_phrases(colour):
        if two_words:
            return []
        others = [c for c in COLOURS if c != colour]
        return [f"a {c} square" for c in rng.choice(others, 3, replace=False)]

    regions = [
        dict(
            bbox=boxes[k],
            caption=f"a {word(c)} square",
            negatives=wrong_phrases(c) if k == 0 else [],
        )
        for k, c in enumerate(colours)
    ]
    caption = f"{colours[0]} and {colours[1]} above {colours[2]} and {colours[3]}"
    return dict(image=name, width=64, height=64, split=split, captions=[caption], regions=regions)


def make_world(folder, photos=64, held_out=24, seed=0, two_words=False) -> Path:
    """Write photos of coloured quarters and their regions.jsonl; returns its path.

    `two_words`: all phrases are warm or cold."""
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(photos + held_out):
        drawn = list(rng.choice(list(COLOURS), 4, replace=False))
        _photo(folder / f"{i:03d}.png", drawn, rng)
        rows.append(_row(f"{i:03d}.png", drawn, "train" if i < photos else "val", rng, two_words))
    (folder / "regions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "regions.jsonl"


MICRO = config.model_sizes(64, 16, 64, 2, 64, 2, 32)
HEALTHY = dict(
    model="tiny",
    augment="none",
    batch_size=8,
    max_regions=4,
    max_steps=100,
    learning_rate=4e-3,
    lr_warmup_steps=5,
    region_weight=1.0,
    hard_weight=0.2,
    diag_every=5,
    eval_every=25,
    save_every=10_000,
    log_every=1000,
    tracker="none",
    adam_beta2=0.98,
    memory_bank_size=0,
    device="cpu",
)


# ---- ways to break a training -------------------------------------------------------------------
def around(name, wrapper):
    "Replace a function of the package by wrapper(original)."
    return rebound(name, wrapper)


def on_model(change):
    "Do something to the model right after it was built."

    def wrapper(build):
        def built(cfg, log):
            m = build(cfg, log)
            change(m)
            return m

        return built

    return around("build_model", wrapper)


def on_scales(change):
    "Do something to the three temperatures right after the model was built."
    return on_model(lambda m: [change(p) for n, p in m.named_parameters() if "logit_scale" in n])


def on_features(change):
    "Change the features that the model returns."
    return on_model(lambda m: m.register_forward_hook(lambda module, args, out: change(out) or out))


def after_update(change):
    "Do something to the state after each optimiser step."

    def wrapper(update):
        def updated(s, *args):
            norm = update(s, *args)
            with torch.no_grad():
                change(s)
            return norm

        return updated

    return around("apply_update", wrapper)


def shuffled(*keys):
    def change(out):
        for k in keys:
            if k in out:
                out[k] = out[k][torch.randperm(len(out[k]))]

    return on_features(change)


def _zero_some(out):
    if "region_features" in out:
        out["region_features"] = (
            out["region_features"] * (torch.arange(len(out["region_features"])) % 3 > 0)[:, None]
        )


def _all_equal(out):
    if "region_features" in out:
        out["region_features"] = out["region_features"][:1].expand_as(out["region_features"]) * 1.0


def _detach_texts(out):
    for k in out:
        if "text_features" in k:
            out[k] = out[k].detach()


def now_and_then_shuffled():
    "Every ninth training batch has its pairs shuffled."
    count = [0]

    def hook(module, args, out):
        count[0] += module.training
        if module.training and count[0] % 9 == 0:
            out["region_text_features"] = out["region_text_features"].roll(1, 0)
        return out

    return on_model(lambda m: m.register_forward_hook(hook))


def now_and_then_nan():
    "NaN image features in the seventh and eighth of every forty forwards."
    count = [0]

    def change(out):
        count[0] += 1
        if count[0] % 40 in (7, 8):
            out["image_features"] = out["image_features"] * float("nan")

    return on_features(change)


def blank_images():
    original = batches.Examples.__getitem__

    def read(self, item):
        example = original(self, item)
        getattr(example, "pixels", np.zeros(1))[:] = 0
        return example

    return patch.object(batches.Examples, "__getitem__", read)


def _round_weights(s):
    for n, p in s.model.named_parameters():
        if "logit_scale" not in n:
            p.copy_(p.bfloat16().float())


def _scramble_attention(m):
    "What a loader that skips the attention tensors leaves behind."
    torch.manual_seed(1)
    for n, p in m.named_parameters():
        if ".self_attn." in n or "embeddings" in n:
            torch.nn.init.normal_(p, std=0.02)


def _forget(s):
    if s.step >= 60:
        for p in s.model.parameters():
            p.add_(torch.randn_like(p) * 0.05)


def without_projections():
    def wrapper(make):
        def groups(m, weight_decay):
            left_out = {id(p) for n, p in m.named_parameters() if "projection" in n}
            return [
                dict(g, params=[p for p in g["params"] if id(p) not in left_out])
                for g in make(m, weight_decay)
            ]

        return groups

    return around("parameter_groups", wrapper)


def stale_push():
    "The bank is fed until it is full and never again."
    return around(
        "push_regions", lambda push: lambda b, f, batch: None if b.full else push(b, f, batch)
    )


def polluted_push():
    "Each forward pushes the same vector for all of its regions."

    def wrapper(push):
        def pushed(b, features, batch):
            same = {
                k: features[k][:1].expand_as(features[k]) if k.startswith("region_") else v
                for k, v in features.items()
            }
            return push(b, same, batch)

        return pushed

    return around("push_regions", wrapper)


def slow_reading():
    original = batches.Examples.__getitem__

    def read(self, item):
        time.sleep(0.02)
        return original(self, item)

    return patch.object(batches.Examples, "__getitem__", read)


# ---- the table ----------------------------------------------------------------------------------
@dataclass
class Fault:
    """Something that goes wrong: changed parameters, a way to break the code, a changed world, and
    the rule that has to find it."""

    rule: str
    told: str
    params: dict = field(default_factory=dict)
    plant: object = contextlib.nullcontext
    world: dict = field(default_factory=dict)
    pretrained: bool = False  # start from the weights of a healthy run


BANK = dict(memory_bank_size=96, memory_bank_warmup_steps=10)
FAULTS = dict(
    pairs_shuffled=Fault(
        "region_above_chance",
        "boxes and phrases are paired at random",
        plant=lambda: shuffled("region_text_features"),
    ),
    captions_shuffled=Fault(
        "global_above_chance",
        "photos and captions are paired at random",
        dict(learning_rate=1e-3),
        plant=lambda: shuffled("text_features", "long_text_features"),
    ),
    weights_disturbed=Fault(
        "learning_rate_high",
        "noise is added to all weights from step 60 on",
        plant=lambda: after_update(_forget),
    ),
    collapses=Fault(
        "learning_rate_high", "a learning rate of 0.3", dict(learning_rate=0.3, lr_warmup_steps=40)
    ),
    scale_in_bf16=Fault(
        "scale_as_asked",
        "temperatures are stored in bfloat16",
        plant=lambda: on_scales(lambda p: p.data.copy_(p.data.bfloat16())),
    ),
    scale_reset=Fault(
        "scale_as_asked",
        "4.6052 is asked for and 2.6592 loaded",
        dict(logit_scale_init=4.6052),
        lambda: on_scales(lambda p: p.data.fill_(2.6592)),
    ),
    scale_frozen=Fault(
        "scale_can_move",
        "the temperatures are frozen",
        plant=lambda: on_scales(lambda p: p.requires_grad_(False)),
    ),
    text_frozen=Fault(
        "modules_train",
        "the text tower is frozen",
        plant=lambda: on_model(lambda m: m.text_model.requires_grad_(False)),
    ),
    no_gradient=Fault(
        "modules_train", "text features are detached", plant=lambda: on_features(_detach_texts)
    ),
    not_in_optimiser=Fault(
        "modules_train", "the optimiser does not hold the projections", plant=without_projections
    ),
    rounded_away=Fault(
        "modules_train",
        "weights in bfloat16, learning rate 5e-6",
        dict(learning_rate=5e-6),
        lambda: after_update(_round_weights),
    ),
    weights_incomplete=Fault(
        "weights_loaded",
        "attention and embeddings keep their random start",
        dict(learning_rate=1e-4),
        lambda: on_model(_scramble_attention),
        pretrained=True,
    ),
    zero_vectors=Fault(
        "zero_regions",
        "a third of the regions is pooled to zero",
        plant=lambda: on_features(_zero_some),
    ),
    blank_photos=Fault("photos_blank", "all photos are blank", plant=blank_images),
    equal_regions=Fault(
        "region_embeddings_differ",
        "all regions get the vector of the first",
        plant=lambda: on_features(_all_equal),
    ),
    bank_never_on=Fault(
        "bank_comes_on",
        "the bank's counter does not tick",
        BANK,
        lambda: patch.object(bank_room.MemoryBank, "tick", lambda self, step=None: False),
    ),
    bank_not_filled=Fault(
        "bank_fills",
        "nothing is pushed",
        BANK,
        lambda: around("push_regions", lambda push: lambda *a: None),
    ),
    bank_stale=Fault(
        "bank_fresh", "the bank is fed until it is full and never again", BANK, stale_push
    ),
    bank_polluted=Fault(
        "bank_clean", "one vector per forward is pushed for all its regions", BANK, polluted_push
    ),
    duplicates_ignored=Fault(
        "duplicate_floor_reached",
        "two phrases for all, counted as negatives",
        dict(duplicates="ignore"),
        world=dict(two_words=True),
    ),
    too_noisy=Fault(
        "large_oscillation",
        "every ninth batch pairs boxes and phrases at random",
        plant=now_and_then_shuffled,
    ),
    overfits=Fault(
        "overfitting", "eight photos, long training", dict(max_steps=150), world=dict(photos=8)
    ),
    waits_for_data=Fault(
        "data_bound", "each photo takes 20 ms to read", dict(max_steps=60), slow_reading
    ),
    not_finite=Fault("finite_numbers", "NaN features in two steps", plant=now_and_then_nan),
    logits_too_wide=Fault(
        "logits_in_range", "temperature 4.6 on untrained features", dict(logit_scale_init=4.6052)
    ),
)


def run_planted(folder, fault: Fault | None = None, steps=None, seed=0) -> Run:
    "Train the small world with a fault (None = healthy) into `folder`/run."
    folder = Path(folder)
    fault = fault or Fault("", "")
    data = make_world(folder / "data", **fault.world)
    params = (
        HEALTHY
        | fault.params
        | (dict(max_steps=steps) if steps else {})
        | dict(data=str(data), output=str(folder / "run"), seed=seed)
    )
    if fault.pretrained:
        params["model"] = str(run_planted(folder / "before", steps=60).path)
    with (
        patch.dict(config.PRESETS, tiny=MICRO),
        rebound("conclude", lambda whole: lambda run: []),
        fault.plant(),
    ):
        return training.train(TrainConfig(**params))


def tripped(run) -> list:
    "Names of the rules that tripped, most telling first."
    return [v.name for v in judgement.by_cause(diagnostics.verdicts(run))]
