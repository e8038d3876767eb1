"""What long runs and large data sets take: memory and seconds, in a process of their own.

No cell: minutes of numbers."""

import json
import subprocess
import sys

import pytest

from fgclip_nb.core.folder import table_of


def long_run(folder, steps):
    "A run folder of many steps: metrics as a real run writes them, diagnostics on every tenth."
    from synthetic_runs import synthetic_run

    run = synthetic_run(folder, steps=40, bank=128)
    rows = [json.loads(line) for line in open(run.path / "metrics.jsonl")]
    times = [json.loads(line) for line in open(run.path / "timing.jsonl")]
    wide = {f"measure_{k}": 0.123456789 * k for k in range(30)}
    for name, table, more in (("metrics", rows, wide), ("timing", times, {})):
        with open(run.path / f"{name}.jsonl", "w") as f:
            for step in range(1, steps + 1):
                row = table[(step - 1) % len(table)] | dict(step=step)
                f.write(json.dumps(row | (more if step % 10 == 1 else {})) + "\n")
    return run


LOOK = """
import resource, sys, time
from fgclip_nb.diagnostics.judgement import run_evidence, verdicts
from fgclip_nb.diagnostics.plots import PLOTS
import matplotlib, pandas
begun = time.process_time()
ev = run_evidence({folder!r})
assert len(ev.frame) == {steps} and verdicts(ev)
for plot in PLOTS.values():
    plot(ev).savefig({folder!r} + "/figure.png", dpi=80)
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
print(time.process_time() - begun, int(peak) // 1024)
assert "seaborn" not in sys.modules and "scipy" not in sys.modules
"""


@pytest.mark.ci
def test_diagnostics_of_a_long_run_take_seconds_and_half_a_gigabyte(tmp_path):
    run = long_run(tmp_path / "run", 200_000)
    code = LOOK.format(folder=str(run.path), steps=200_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds, mebibytes = map(float, done.stdout.split())
    print(f"{seconds:.1f} s, {mebibytes:.0f} MiB")
    assert seconds < 20 and mebibytes < 500, done.stderr


def test_figures_of_a_long_run_have_few_points(tmp_path):
    from fgclip_nb.diagnostics.judgement import run_evidence
    from fgclip_nb.diagnostics.plots import PLOTS

    ev = run_evidence(long_run(tmp_path / "run", 12_000))
    for name, plot in PLOTS.items():
        for ax in plot(ev).axes:
            longest = max([len(line.get_xdata()) for line in ax.lines], default=0)
            assert longest <= 12_000 / 2, name


def test_a_table_in_parts_is_the_table(tmp_path, monkeypatch):
    import pandas as pd
    from fgclip_nb.core import folder

    monkeypatch.setattr(folder, "PART", 7)
    kinds = dict(number=1, share=0.5, sound=True, name="a")
    rows = [{"step": k} | {n: v for n, v in kinds.items() if k % 3} for k in range(1, 60)]
    rows += [{"step": 60 + k, "late": k, "name": "b"} for k in range(20)]
    ours, plain = table_of(rows), pd.DataFrame(rows)
    assert list(ours) == list(plain) and ours.astype(object).fillna(-1).astype(str).equals(
        plain.astype(object).fillna(-1).astype(str)
    )
    assert [ours[c].dtype.kind for c in ours] == [plain[c].dtype.kind for c in plain]


def test_embedded_photos_of_an_evaluation_stay_in_their_shards(tmp_path):
    from PIL import Image
    from fgclip_nb.data.conversion import convert
    from fgclip_nb.data.photos import read_image
    from fgclip_nb.evaluation.held_out import read_evaluation_samples

    rows = [dict(image=f"{k}.png", width=9, height=9, captions=[f"photo {k}"]) for k in range(4)]
    for k, row in enumerate(rows):
        Image.new("RGB", (9, 9), (k, 0, 0)).save(tmp_path / row["image"])
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    convert(tmp_path / "d.jsonl", tmp_path / "shards", embed=True)
    samples = read_evaluation_samples(tmp_path / "shards")[0]
    assert len(samples) == 4 and not any(isinstance(s.data, bytes) for s in samples)
    assert [int(read_image(s.encoded)[0, 0, 0]) for s in samples] == [0, 1, 2, 3]
