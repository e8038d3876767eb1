"""The run notebooks that are no front door, under papermill with small numbers: they must not rot.

Whole notebooks are no cell."""

import pytest

from test_front_door import papermill, pictures, said


@pytest.mark.long
def test_benchmark(tmp_path):
    "Agreement first, then times, growth and what surrounds the step."
    small = dict(model="tiny", batch=2, boxes=2, hard=1, repeats=1, compared=2)
    small |= dict(growth_model="tiny", largest=32, training_steps=7, device="cpu")
    done, cells = papermill("benchmark.ipynb", tmp_path / "o.ipynb", **small)  # it starts train
    assert done.returncode == 0, done.stderr[-3000:]
    assert "plain" in said(cells) and "fast" in said(cells) and pictures(cells) >= 1


@pytest.mark.long
def test_video_benchmark(tmp_path):
    small = dict(repeats=1, clips=3, epochs=1, num_frames=8, batch_size=2, gradient_caching=1)
    small |= dict(model="tiny", step_frames=1)
    done, cells = papermill("video_benchmark.ipynb", tmp_path / "o.ipynb", tmp_path, **small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Extrapolated" in said(cells) and pictures(cells) >= 1


@pytest.mark.long
def test_ablation(tmp_path):
    small = dict(steps=6, seeds="[0, 1]", output=tmp_path / "runs")
    done, cells = papermill("ablation.ipynb", tmp_path / "o.ipynb", **small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Accumulating 4 × 4" in said(cells) and "Hard negatives help" in said(cells)
    assert pictures(cells) >= 3 and (tmp_path / "runs.jsonl.gz").exists()


@pytest.mark.long
def test_world_video(tmp_path):
    small = dict(size=20, every=8, steps=4)
    done, cells = papermill("world_video.ipynb", tmp_path / "o.ipynb", **small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Where nothing could be known" in said(cells) and pictures(cells) >= 3
