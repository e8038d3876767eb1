"""Made-up metrics of healthy and broken runs, to try rules and plots on."""

import json, math
from pathlib import Path
from types import SimpleNamespace
from fgclip_nb.core.folder import Run, write_atomic
from fgclip_nb.diagnostics.numbers import jsonable
from fgclip_nb.diagnostics.measures import MODULES, PAIRS, QUANTILES

WORLD = dict(
    steps=200,
    regions=12,
    accumulation=1,
    warmup=50,
    bank=0,
    bank_off=False,
    at_chance=False,
    pace=25.0,
    noise=0.08,
    scale=2.6592,
    scale_stuck=False,
    lr=1e-3,
    zeros=0.0,
    rank=6.0,
    dead="",
    changed=1.0,
    waiting=0.05,
    finished=True,
)


def world(**changes) -> SimpleNamespace:
    """The settings of a made-up run; `changes` replace entries of `WORLD`.

    regions: per forward; warmup: forwards until the bank comes on; bank: its size; pace: steps
    until 63 % are learnt; noise: of the region loss, nats; zeros: share of zero regions; rank: of
    the embeddings; dead: a module that never moves; changed: share of elements that change;
    waiting: share of a step spent waiting for data."""
    return SimpleNamespace(**(WORLD | changes))


def knowledge(step: int, p) -> float:
    "How much is known at a step, 0–1; always 0 in a world that stays at chance."
    return 0.0 if p.at_chance else 1 - math.exp(-step / p.pace)


def bank_entries(step: int, p) -> int:
    "How many entries the bank holds at a step."
    if p.bank_off:
        return 0
    return int(min(max(step * p.accumulation - p.warmup + 1, 0) * p.regions, p.bank))


def synthetic_losses(step: int, p, rng) -> dict:
    "Losses, chance levels, candidates, top-1 accuracy and cosines of a made-up step."
    know = knowledge(step, p)
    n = p.regions
    held = bank_entries(step, p)
    noise = rng.normal(0, p.noise)
    level, whole = math.log(n), math.log(n + held)
    return dict(
        loss_global=2.08 * (1 - 0.8 * know) + 0.05 * rng.normal(),
        chance_global=2.08,
        candidates_global=8,
        loss_region_in_batch=max(level * (1 - 0.85 * know) + noise, 0.01),
        chance_region_in_batch=level,
        loss_region=max(whole * (1 - 0.75 * know) + noise, 0.01),
        chance_region=whole,
        candidates_region=n + held,
        top1_global=0.125 + 0.8 * know,
        top1_region=1 / (n + held) + 0.8 * know,
        positive_cosine_region=0.02 + 0.5 * know,
        hardest_negative_cosine_region=0.1 + 0.1 * know,
    )


def synthetic_step(step: int, p, rng) -> dict:
    "The columns of one made-up step; `p`: a `world`, `rng`: a numpy generator."
    held = bank_entries(step, p)
    row = dict(
        step=step,
        forwards=step * p.accumulation,
        epoch=step / 20,
        regions=p.regions * p.accumulation,
    )
    row |= synthetic_losses(step, p, rng)
    row |= dict(
        logit_scale=p.scale + 1e-5 * step,
        logit_scale_finegraind=p.scale + (0 if p.scale_stuck else 1e-5 * step),
        lr=p.lr,
        grad_norm=1.0,
        skipped=False,
    )
    if p.bank:
        row |= dict(
            bank_enabled=held > 0, bank_ptr=held % p.bank, bank_len=held, bank_full=held == p.bank
        )
    return row | dict(loss=row["loss_global"] + 0.1 * row["loss_region"])


def synthetic_similarities(step: int, p, rng) -> dict:
    "Percentiles of cosines and logits of a made-up diagnostic step; logits = cosines x exp(scale)."
    know = knowledge(step, p)
    columns = {}
    mean, std = 0.1 * know, 0.02 + 0.15 * know
    for pair in PAIRS:
        cosines = dict(zip(QUANTILES, sorted(rng.normal(mean, std, 7)))) | dict(mean=mean, std=std)
        for k, v in cosines.items():
            columns |= {f"cosine_{pair}_{k}": v, f"logits_{pair}_{k}": v * math.exp(p.scale)}
    return columns


def synthetic_modules(p) -> dict:
    "What each module did in a made-up diagnostic step; the dead one has a gradient and no update."
    columns = {}
    for m in MODULES:
        columns |= {
            f"grad_norm/{m}": 0.5,
            f"update_norm/{m}": 0.0 if m == p.dead else 0.05,
            f"changed_share/{m}": p.changed,
            f"trainable_share/{m}": 1.0,
        }
    return columns


def synthetic_diagnostics(step: int, p, rng) -> dict:
    "The additional columns of a made-up diagnostic step."
    columns = synthetic_similarities(step, p, rng)
    columns |= dict(
        norm_image_mean=8.0,
        norm_text_mean=9.0,
        norm_region_mean=7.0,
        zero_share_region=p.zeros,
        effective_rank_image=p.rank,
        effective_rank_region=p.rank,
        equal_share_image=0.0,
        equal_share_region=0.0,
        rows_image=8.0,
        rows_region=float(p.regions),
    )
    columns |= synthetic_modules(p)
    if p.bank:
        age = p.bank / p.regions
        columns |= dict(
            bank_age_mean=age / 2, bank_age_max=age, bank_zero_share=0.0, bank_equal_share=0.0
        )
    return columns


def _json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _metric_rows(p, rng) -> list:
    rows = []
    for step in range(1, p.steps + 1):
        row = synthetic_step(step, p, rng)
        if step == 1 or step % 10 == 0:
            row |= synthetic_diagnostics(step, p, rng)
        rows.append(jsonable({k: float(v) for k, v in row.items()} | {"step": step}))
    return rows


def synthetic_run(path, seed=0, params=None, **changes) -> Run:
    """Write a run folder with made-up, lawful numbers.

    `changes` replace entries of `WORLD`, `params` those of the folder's params.yaml."""
    import numpy as np, yaml

    path = Path(path)
    p = world(**changes)
    path.mkdir(parents=True, exist_ok=True)
    rows = _metric_rows(p, np.random.default_rng(seed))
    write_atomic(path / "metrics.jsonl", _json_lines(rows))
    clock = dict(step_time_s=0.1, data_time_s=0.1 * p.waiting, samples_per_s=80.0)
    write_atomic(path / "timing.jsonl", _json_lines(dict(step=r["step"], **clock) for r in rows))
    known = dict(
        logit_scale_init=2.6592,
        memory_bank_size=p.bank,
        memory_bank_warmup_steps=p.warmup,
        gradient_accumulation_steps=p.accumulation,
        max_steps=p.steps,
        duplicates="mask",
        seed=seed,
        learning_rate=p.lr,
    )
    write_atomic(path / "params.yaml", yaml.safe_dump(known | (params or {}), sort_keys=False))
    if p.finished:
        write_atomic(path / "finished.json", json.dumps(dict(steps=p.steps)))
    return Run(path)
