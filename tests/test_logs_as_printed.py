"""Fifteen logs in the forms in which trainers print them, each with a disease or none; what is
right was written down before they were first read. They are files, which a cell does not hold."""

import json, math, random, struct
import pytest
from fgclip_nb import diagnostics as dx

RNG = random.Random(5)
NOTHING = "rules could be judged: nothing seen in those"


def fall(i, n, start, end):
    return end + (start - end) * math.exp(-4 * i / n) + RNG.gauss(0, 0.02)


def flat(level, noise=0.004):
    return level + RNG.gauss(0, noise)


def turning(i, turn, low):
    "A loss that falls until row `turn` and then climbs."
    return fall(i, 60, 4.1, low) if i < turn else low + 0.3 + 0.13 * (i - turn)


def open_clip_line(i, per_epoch, samples, loss, lr, scale):
    return (
        f"2024-05-01,10:00:{i % 60:02d} | INFO | Train Epoch: {i // per_epoch} "
        f"[{(i % per_epoch) * samples:>8}/1024000 (5%)] Data (t): 0.120 Batch (t): 0.831, 616.1/s, "
        f"154.0/s/gpu LR: {lr:.6f} Logit Scale: {scale:.3f} Contrastive_loss: {loss:#.5g} "
        f"({loss:#.5g}) Loss: {loss:#.5g} ({loss:#.5g})"
    )


def open_clip_healthy(path):
    head = [f"2024-05-01,10:00:00 | INFO |   {k}" for k in ("batch_size: 128", "world_size: 4")]
    rows = [
        open_clip_line(i, 20, 51200, fall(i, 80, math.log(512), 1.9), 5e-4, 14 + i / 4)
        for i in range(80)
    ]
    path.write_text("\n".join(head + rows))


def open_clip_without_rate(path):
    head = [f"2024-05-01,10:00:00 | INFO |   {k}" for k in ("batch_size: 256", "world_size: 1")]
    rows = [open_clip_line(i, 40, 25600, flat(math.log(256)), 0.0, 14.286) for i in range(40)]
    path.write_text("\n".join(head + rows))


def hf_prints_overfit(path):
    lines = []
    for epoch in range(10):
        for i in range(epoch * 5, epoch * 5 + 5):
            loss = round(fall(i, 50, 4.2, 0.1), 4)
            lines.append(str(dict(loss=loss, grad_norm=2.1, learning_rate=2e-5, epoch=i / 5)))
        held = 3.0 - 0.5 * epoch if epoch < 3 else 1.9 + 0.25 * (epoch - 2)
        lines.append(str(dict(eval_loss=held, eval_runtime=12.3, epoch=epoch + 1.0)))
    path.write_bytes("\r\n".join(lines).encode())


def hf_state_nan(path):
    history = []
    for step in range(10, 510, 10):
        loss = fall(step, 500, 3.4, 1.0) if step < 300 else (math.nan if step == 300 else 0.0)
        norm = math.nan if step >= 300 else 1.3
        history.append(dict(step=step, loss=loss, grad_norm=norm, learning_rate=5e-5))
    (path / "checkpoint-500").mkdir(parents=True)
    state = dict(best_metric=None, global_step=500, log_history=history, train_batch_size=32)
    (path / "checkpoint-500" / "trainer_state.json").write_text(json.dumps(state))


def deepspeed_overflow(path):
    lines = []
    for i in range(60):
        at = f"[2024-03-01 11:00:{i:02d},123] [INFO]"
        lines.append(
            f"{at} [loss_scaler.py:190:update_scale] [deepspeed] OVERFLOW! Rank 0 Skipping step. "
            f"Attempted loss scale: {2 ** (31 - min(i, 30))}, reducing to {2 ** (30 - min(i, 30))}"
        )
        lines.append(
            f"{at} [logging.py:96:log_dist] [Rank 0] step={i + 1}, skipped={i + 1}, lr=[1e-05]"
        )
        lines.append(f"{{'loss': {flat(3.9):.4f}, 'learning_rate': 1e-05, 'epoch': {i / 60:.2f}}}")
    path.write_text("\n".join(lines))


def lightning_diverges(path):
    lines = ["epoch,step,train/loss_step,train/loss_epoch,lr-AdamW,val/loss"]
    for i in range(60):
        loss = turning(i, 35, 1.5)
        lines.append(f"{i // 10},{i * 50 + 49},{loss:.4f},,0.003,")
        if i % 10 == 9:
            lines.append(f"{i // 10},{i * 50 + 49},,{loss:.4f},,{loss + 0.1:.4f}")
    (path / "version_3").mkdir(parents=True)
    (path / "version_3" / "metrics.csv").write_text("\n".join(lines))


def wandb_export_at_chance(path):
    names = ("Step", "a-3 - train/loss", "a-3 - train/loss__MIN", "a-3 - train/learning_rate")
    lines = [",".join(f'"{n}"' for n in names)]
    for i in range(60):
        loss = flat(math.log(64))
        lines.append(f'"{i * 10}","{loss}","{loss}","0.0001"')
    path.write_text("\n".join(lines))


def tqdm_in_utf16(path):
    bars = [
        f"Epoch {e + 1}/4: {4 * (i + 1):3d}%|{'█' * (i // 3)}{' ' * (9 - i // 3)}| {i + 1}/25 "
        f"[00:{i:02d}<00:{25 - i:02d},  1.02it/s, loss={fall(e * 25 + i, 100, 3.5, 0.9):.4f}]"
        for e in range(4)
        for i in range(25)
    ]
    path.write_bytes("\r".join(bars).encode("utf-16"))


def chinese_clip_diverges(path):
    head = "2024-10-10,14:21:08 | INFO | Rank 0 |"
    rows = [
        f"{head} Global Steps: {i * 10 + 10}/600 | Train Epoch: {i // 20 + 1} "
        f"[{(i % 20) * 640}/12800 ({5 * (i % 20)}%)] | Loss: {turning(i, 30, 1.2):.6f} | "
        "Image2Text Acc: 31.25 | Data Time: 0.043s | Batch Time: 0.702s | LR: 0.000049 | "
        "logit_scale: 4.604 | Global Batch Size: 64"
        for i in range(60)
    ]
    path.write_bytes("\n".join([f"{head} 开始训练", *rows]).encode("gb18030"))


def json_lines_with_a_mark(path):
    rows = [dict(lr=1e-4, loss=fall(i, 60, 3.0, 0.8), iter=50 * i + 50) for i in range(60)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())


def coloured_and_stuck(path):
    rows = [
        f"\x1b[34m[{i:02d}:00]\x1b[0m \x1b[1mINFO\x1b[0m     iter {i * 20}/2000 \x1b[36mloss\x1b[0m"
        f"=\x1b[33m{flat(5.317, 0.006):.3f}\x1b[0m lr=\x1b[33m5.0e-05\x1b[0m gnorm=0.002"
        for i in range(1, 60)
    ]
    path.write_text("\n".join(rows))


def stored_scale_in_bf16(path):
    rows = [
        f"step: {i * 10}, loss: {fall(i, 60, 3.5, 1.1):.4f}, lr: 1.0e-06, logit_scale: 4.59375"
        for i in range(1, 61)
    ]
    path.write_text("\n".join(rows))


def multiplier_over_the_clamp(path):
    rows = [
        f"Epoch: [0][{i * 10}/600]\tTime 0.3\tLoss {fall(i, 60, 4.8, 1.0):.3f} (4.2)\tscale "
        f"{20 + i * 5:.2f}\tlr 5.0e-04"
        for i in range(60)
    ]
    path.write_text("\n".join(rows))


def keras_folders_overfit(path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for part, every in (("train", 10), ("validation", 60)):
        writer = EventFileWriter(str(path / "logs" / "20240501-1" / part))
        for step in range(every, 610, every):
            loss = fall(step, 600, 3.8, 0.2)
            if part == "validation" and step > 200:
                loss = 1.6 + step / 400
            tensor = TensorProto(dtype=1, tensor_content=struct.pack("<f", loss))
            value = Summary.Value(tag="epoch_loss", tensor=tensor, metadata=about)
            writer.add_event(Event(step=step, summary=Summary(value=[value])))
        writer.close()


def a_table_of_text(path):
    rows = [
        f"{i * 100:>6} | train loss {fall(i, 60, 4.0, 1.0):6.3f} | val loss "
        f"{fall(i, 60, 4.0, 1.1):6.3f} | lr 1.00e-04 | 152.3 img/s"
        for i in range(1, 60)
    ]
    path.write_text("\n".join(rows))


RIGHT = [
    (open_clip_healthy, "a.log", NOTHING),
    (open_clip_without_rate, "a.log", "learning_rate_zero"),
    (hf_prints_overfit, "a.txt", "overfitting: the held-out loss"),
    (hf_state_nan, "out", "finite_numbers: NaN or infinity from step 300"),
    (deepspeed_overflow, "a.log", "overflow: 60 of 60"),
    (lightning_diverges, "lightning_logs", "loss_diverges"),
    (wandb_export_at_chance, "export.csv", "loss_at_chance"),
    (tqdm_in_utf16, "a.log", NOTHING),
    (chinese_clip_diverges, "a.log", "loss_diverges"),
    (json_lines_with_a_mark, "scalars.json", NOTHING),
    (coloured_and_stuck, "a.log", "loss_stuck"),
    (stored_scale_in_bf16, "a.log", "4.6052 rounded to bfloat16"),
    (multiplier_over_the_clamp, "a.log", "over the clamp"),
    (keras_folders_overfit, "events", "overfitting: the held-out loss"),
    (a_table_of_text, "a.log", NOTHING),
]


@pytest.mark.parametrize("write, name, says", RIGHT, ids=[w.__name__ for w, *_ in RIGHT])
def test_the_first_line(tmp_path, write, name, says):
    RNG.seed(5)
    write(tmp_path / name)
    assert says in dx.headline(dx.verdicts(tmp_path / name))
