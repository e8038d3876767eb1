"""Logs of other trainers: the first line names the disease, a healthy log is not accused."""

import json, math, random, struct
import pytest
from fgclip_nb.core.config import TrainConfig
from fgclip_nb import diagnostics as dx
from fgclip_nb.diagnostics import __main__, expectations, judgement
from synthetic_runs import synthetic_run
from fgclip_nb.diagnostics.board import Board
from fgclip_nb.diagnostics.rules import RULES

DISEASES = dict(
    healthy="",
    at_chance="at chance",
    diverges="diverges",
    nan="NaN",
    lr_zero="learning rate",
    lr_gone="learning rate",
    overfits="overfitting",
)


def curve(disease: str, n=60, seed=0) -> list:
    "Rows of a made-up run with batch 64: step, loss, lr, grad_norm, and val_loss every sixth row."
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        known = i / n
        loss = math.log(64) * (1 - 0.8 * known)
        if disease in ("at_chance", "lr_zero", "lr_gone"):
            loss = math.log(64)
        if disease == "diverges" and known > 0.5:
            loss = 2.5 + 8 * (known - 0.5)
        lr = 1e-4 * (1 + math.cos(math.pi * known)) / 2
        lr = dict(lr_zero=0.0, lr_gone=1e-4 * 0.5**i).get(disease, lr)
        loss = math.nan if disease == "nan" and known > 0.6 else loss + rng.gauss(0, 0.01)
        row = dict(step=10 * (i + 1), loss=loss, lr=lr, grad_norm=1.0 + 0.1 * rng.random())
        if i % 6 == 5:
            climb = 7 * known**2 if disease == "overfits" else 0.1
            row["val_loss"] = loss + climb
        rows.append(row)
    return rows


def hf_console(rows, path):
    lines = []
    for r in rows:
        pairs = dict(loss=r["loss"], grad_norm=r["grad_norm"], learning_rate=r["lr"], epoch=0.1)
        lines.append(str({k: round(v, 10) for k, v in pairs.items()}))
        if "val_loss" in r:
            lines.append(str(dict(eval_loss=r["val_loss"], eval_runtime=3.1, epoch=0.1)))
    lines.append(str(dict(train_runtime=495.8, train_loss=2.5, epoch=5.0)))
    (path / "out.log").write_text("\n".join(lines))
    return path / "out.log"


def hf_folder(rows, path):
    history = []
    for r in rows:
        history.append(
            dict(step=r["step"], loss=r["loss"], learning_rate=r["lr"], grad_norm=r["grad_norm"])
        )
        if "val_loss" in r:
            history.append(dict(step=r["step"], eval_loss=r["val_loss"], eval_runtime=1.0))
    history.append(dict(step=rows[-1]["step"], train_loss=99.0, train_runtime=4.0))
    for number, part in ((300, history[:20]), (600, history)):
        state = path / "out" / f"checkpoint-{number}" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps(dict(log_history=part)))
    return path / "out"


def open_clip(rows, path):
    lines = ["2025-03-02,10:11:09 | INFO |   batch_size: 64"]
    for r in rows:
        lines.append(
            f"2025-03-02,10:11:01 | INFO | Train Epoch: 0 [{r['step'] * 64:>7}/64000 (1%)] Data "
            f"(t): "
            f"0.012 Batch (t): 0.207, 309.1/s, 309.1/s/gpu LR: {r['lr']:.6f} Logit Scale: 14.286 "
            f"Contrastive_loss: {r['loss']:.4f} (3.0) Loss: {r['loss']:.4f} (3.0000)"
        )
        if "val_loss" in r:
            lines.append(
                f"2025-03-02,10:15:59 | INFO | Eval Epoch: 3 image_to_text_R@1: 0.0020\t"
                f"clip_val_loss: {r['val_loss']:.4f}\tepoch: 3.0000"
            )
    (path / "out.log").write_text("\n".join(lines))
    return path / "out.log"


def chinese_clip(rows, path):
    head = "2024-10-10,14:21:08 | INFO | Rank 0 |"
    lines = []
    for r in rows:
        lines.append(
            f"{head} Global Steps: {r['step']}/600 | Train Epoch: 1 [1024/4096 (25%)] | Loss: "
            f"{r['loss']:.6f} | Image2Text Acc: 1.83 | LR: {r['lr']:.9f} | logit_scale: 4.604 | "
            "Global Batch Size: 64"
        )
        if "val_loss" in r:
            lines.append(
                f"{head} Validation Result (epoch 1 @ {r['step']} steps) | Valid Loss: "
                f"{r['val_loss']:.6f} | logit_scale: 4.6 | Valid Batch Size: 64"
            )
    (path / "out.log").write_bytes("\n".join(["训练开始", *lines]).encode("gb18030"))
    return path / "out.log"


def tqdm_bars(rows, path):
    bars = []
    for i, r in enumerate(rows):
        held = f", val_loss={r['val_loss']:.3f}" if "val_loss" in r else ""
        bars.append(
            f"Epoch {i // 20}:  5%|▌    | {i % 20 + 1}/20 [00:01<01:58,  1.35it/s, "
            f"loss={r['loss']:.3f}, lr={r['lr']:.3g}{held}]"
        )
    (path / "out.log").write_bytes("\r".join(bars).encode("utf-16"))
    return path / "out.log"


def lightning(rows, path):
    lines = ["epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss"]
    for r in rows:
        lines.append(f"0,{r['lr']:.9f},{r['step'] - 1},,{r['loss']:.5f},")
        if "val_loss" in r:
            lines += [f"0,,{r['step'] - 1},,,{r['val_loss']:.5f}", f"0,,{r['step'] - 1},9.9,,"]
    table = path / "lightning_logs" / "version_0" / "metrics.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    return path / "lightning_logs"


def wandb_csv(rows, path):
    lines = [
        '"Step","sun-7 - train/loss","sun-7 - train/loss__MIN","sun-7 - '
        'train/learning_rate","sun-7 - eval/loss"'
    ]
    for r in rows:
        held = r.get("val_loss", "")
        lines.append(f'"{r["step"]}","{r["loss"]}","0.0","{r["lr"]}","{held}"')
    (path / "wandb_export.csv").write_text("\n".join(lines))
    return path / "wandb_export.csv"


def json_lines(rows, path):
    named = [dict(iter=r["step"], loss=r["loss"], lr=r["lr"]) for r in rows]
    named += [dict(iter=r["step"], val_loss=r["val_loss"]) for r in rows if "val_loss" in r]
    (path / "scalars.json").write_text("\n".join(map(json.dumps, named)) + '\n{"iter": 61')
    return path / "scalars.json"


def tensorboard(rows, path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(path / "runs" / "May07_host"))
    for r in rows:
        pairs = {"train/loss": r["loss"], "train/lr": r["lr"], "train/batch_time": 0.2}
        pairs |= {"train/samples_per_second": 318.0, "train/scale": 14.286}
        pairs |= {"val/loss": r["val_loss"]} if "val_loss" in r else {}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in pairs.items()]
        writer.add_event(Event(step=r["step"], summary=Summary(value=values)))
    writer.close()
    return path


def prose(rows, path):
    lines = []
    for r in rows:
        held = f" | val loss: {r['val_loss']:.3f}" if "val_loss" in r else ""
        lines.append(
            f"\x1b[32m[12:00:01]\x1b[0m step {r['step']}/600 | train loss: {r['loss']:.4f} | "
            f"lr: {r['lr']:.3e} | grad norm: {r['grad_norm']:.2f}{held}"
        )
    (path / "train.log").write_bytes("\r\n".join(lines).encode())
    return path / "train.log"


DIALECTS = [hf_console, hf_folder, open_clip, chinese_clip, tqdm_bars, lightning, wandb_csv]
DIALECTS += [json_lines, tensorboard, prose]


@pytest.mark.parametrize("disease", DISEASES)
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda f: f.__name__)
def test_the_first_line_names_the_disease(tmp_path, dialect, disease):
    judged = dx.verdicts(dialect(curve(disease), tmp_path))
    first = dx.headline(judged)
    if disease == "healthy":
        assert not [v for v in judged if v.tripped], first
        assert f"of {len(RULES)} rules could be judged: nothing seen in those" in first
    else:
        assert DISEASES[disease] in first, first


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda f: f.__name__)
def test_every_dialect_gives_the_same_numbers(tmp_path, dialect):
    rows = curve("overfits")
    ev = judgement.evidence(dialect(rows, tmp_path))
    loss, held = ev.series("loss"), ev.series("val_loss")
    assert len(loss) == 60 and len(held) == 10
    assert loss.iloc[-1] == pytest.approx(rows[-1]["loss"], abs=2e-3)  # no summary's mean
    assert held.iloc[-1] == pytest.approx(rows[-1]["val_loss"], abs=2e-3)


def skipped(count: int) -> str:
    lines = []
    for i in range(100):
        if i < count:
            lines.append(
                "[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 2, reducing to 1"
            )
        norm = "nan" if i < count else "1.5"
        lines.append(f"{{'loss': {5 - i / 40:.3f}, 'grad_norm': {norm}, 'learning_rate': 1e-05}}")
    return "\n".join(lines)


def test_a_few_overflows_are_how_a_scale_is_found_and_many_are_a_disease(tmp_path):
    for count, says in ((4, "could be judged"), (90, "overflow: 90 of 100")):
        (tmp_path / "ds.log").write_text(skipped(count))
        assert says in dx.headline(dx.verdicts(tmp_path / "ds.log"))


@pytest.mark.parametrize("printed, stored", [(14.286, 2.659), (100.0, 4.605), (2.659, 2.659)])
def test_a_multiplier_is_told_from_a_stored_temperature(tmp_path, printed, stored):
    lines = [f"step {s} loss {3 - s / 100} logit_scale: {printed}" for s in range(1, 40)]
    (tmp_path / "a.log").write_text("\n".join(lines))
    ev = judgement.evidence(tmp_path / "a.log")
    assert ev.series("logit_scale").iloc[0] == pytest.approx(stored, abs=1e-3)
    assert ev.facts["loaded_scale"] == pytest.approx(stored, abs=1e-3)


def test_scalars_kept_as_tensors(tmp_path):
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.compat.proto.event_pb2 import Event

    writer = EventFileWriter(str(tmp_path / "a" / "b"))
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for r in curve("nan"):
        value = TensorProto(dtype=1, tensor_content=struct.pack("<f", r["loss"]))
        summary = Summary(value=[Summary.Value(tag="loss", tensor=value, metadata=about)])
        writer.add_event(Event(step=r["step"], summary=summary))
    writer.close()
    assert "NaN" in dx.headline(dx.verdicts(tmp_path))


def test_what_a_rule_lacks_is_listed(tmp_path):
    text = __main__.verdict_text(prose(curve("healthy"), tmp_path))
    assert "not judged, and what they lack" in text
    assert "bank_fills: bank_enabled, bank_len" in text and "No fault found" not in text


def test_one_run_one_answer(tmp_path):
    run = synthetic_run(tmp_path / "run", bank=128, bank_off=True)
    (run.path / "training.log").write_text("[LOSS] Step 1 total=2.0 region=1.0\n")
    board = Board(run.path / "tensorboard")
    board.scalars(dict(step=1, loss=2.0))
    board.close()
    first = dx.headline(dx.verdicts(run))
    for part in ("metrics.jsonl", "training.log", "tensorboard"):
        assert dx.headline(dx.verdicts(run.path / part)) == first


def test_a_log_tells_the_overfitting_of_its_own_validations(tmp_path):
    lines = []
    for step in range(1, 101):
        lines.append(
            f"[LOSS] Step {step} total=2.0 global=1.0 region={2.4 - step / 50:.3f} candidates=12"
        )
        if step % 20 == 0:
            lines.append(f"[VAL] Step {step} score=1.0 region={2 + step / 40:.3f} (chance 2.48)")
    (tmp_path / "a.log").write_text("\n".join(lines))
    assert dx.headline(dx.verdicts(tmp_path / "a.log")).startswith(
        "overfitting: the held-out region"
    )


def test_failures_lead_and_targets_in_nats_come_last():
    def verdict(name, result):
        return dx.Verdict(name, None, "", result, "because")

    judged = [
        verdict("region_loss_by_step_50", "fail"),
        verdict("region_loss_rise", "not comparable"),
        verdict("losses_fall_together", "fail"),
        verdict("region_above_chance", "fail"),
    ]
    assert [v.name for v in judgement.by_cause(judged)] == [
        "region_above_chance",
        "losses_fall_together",
        "region_loss_rise",
        "region_loss_by_step_50",
    ]


def test_no_logarithm_of_less_than_one_region():
    counts = dict(samples=59, regions_per_sample=0.059, hard_candidates=0)
    rows = expectations.expect(TrainConfig(batch_size=16, memory_bank_size=0), counts).rows
    ((_, level, why),) = [row for row in rows if row[0] == "region chance level, in batch"]
    assert level == 0 and "ln" not in why
