"""README's recipe for UCF-Crime, step by step, on a folder of its shape: class folders, region
JSON, UCA's sentences, cache, training."""

import json, os, shutil, subprocess, sys

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")
from fgclip_nb.data import clips, splits, video
from fgclip_nb.core.folder import read_jsonl
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.data.load import load_samples, sample_path
from fgclip_nb.training.rundata import no_validation, prepare_data, retrieval_table
from fgclip_nb.training.state import training_order
from fgclip_nb.training.loop import train

SHIPPED = sample_path("video_sample").parent
PLACES = {
    "Abuse/Abuse001_x264.mp4": "car_park.mp4",
    "Robbery/Robbery002_x264.mp4": "visitors.mp4",
    "Training_Normal_Videos_Anomaly/Normal_Videos_003_x264.mp4": "visitors.mp4",
    "Testing_Normal_Videos_Anomaly/Normal_Videos_004_x264.mp4": "car_park.mp4",
    "Arrest/Arrest005_x264.mp4": "visitors.mp4",
}


def track(first, last):
    return [dict(frame=f, bbox=[0.1, 0.1, 0.6, 0.7], enabled=f < last) for f in (first, last)]


def make_ucf(root):
    "A folder as docs/ucf_crime.md describes it."
    for place, source in PLACES.items():
        (root / "Videos" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIPPED / source, root / "Videos" / place)
    regions = {
        "Abuse001_x264.mp4": {
            "global": {"Caption": "A car drives through."},
            "region": [
                {"caption": "a man hits", "keyframes": track(20, 200)},
                {"caption": "a short event", "keyframes": track(100, 101)},
            ],
        },
        "Robbery002_x264.mp4": {
            "global": {"Caption": "A man robs a visitor."},
            "region": [{"caption": "a man with a bag", "keyframes": track(700, 1300)}],
        },
        "Normal_Videos_003_x264.mp4": {
            "global": {"Caption": "Visitors come in."},
            "region": [{"caption": "people walking"}],
        },
        "Robbery137_x264.mp4": {"global": {"Caption": "Not downloaded."}, "region": []},
    }
    uca = {
        "Abuse001_x264": dict(
            duration=31.4,
            timestamps=[[0, 9.5], [9.5, 20]],
            sentences=["A car comes.", "It leaves."],
        ),
        "Normal_Videos_004_x264": dict(
            duration=31.4, timestamps=[[2, 12]], sentences=["Cars pass by."]
        ),
    }
    (root / "regions_train.json").write_text(json.dumps(regions))
    held_out = dict(
        duration=31.4,
        timestamps=[[0, 8], [8, 16], [16, 30]],
        sentences=["An officer waits.", "A man is led away.", "The hall is empty."],
    )
    (root / "UCFCrime_Train.json").write_text(json.dumps(uca))
    (root / "UCFCrime_Val.json").write_text(json.dumps({"Arrest005_x264": held_out}))
    (root / "data.txt").write_text("regions_train.json\nUCFCrime_Train.json\nUCFCrime_Val.json\n")
    (root / "Anomaly_Test.txt").write_text(
        "Testing_Normal_Videos_Anomaly/Normal_Videos_004_x264.mp4\n"
    )
    return root


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    return make_ucf(tmp_path_factory.mktemp("ucf"))


def test_videos_are_found_in_their_class_folders(ucf):
    samples, rejects = load_samples(ucf / "data.txt", ucf / "Videos")
    assert {os.path.relpath(s.media, ucf / "Videos") for s in samples} == set(PLACES)
    assert {s.label for s in samples} == {"Abuse", "Robbery", "Normal", "Arrest"}
    assert len(samples) == 9
    assert [(r.rule, r.sample) for r in rejects] == [("missing_media", "Robbery137_x264.mp4")]
    left, out = splits.leave_out(samples, splits.read_names(ucf / "Anomaly_Test.txt"))
    assert [r.rule for r in out] == ["test_medium"] and len(left) == 8


def test_spans_are_counted(ucf):
    samples = load_samples(ucf / "data.txt", ucf / "Videos")[0]
    counts = splits.not_hit(samples, lambda first, last: clips.sample_frames((first, last), 8))
    assert counts == {
        "captions": (6, 0),
        "regions": (3, 1),
    }  # the short event lies between two of eight frames
    assert splits.not_hit(samples, lambda first, last: np.arange(512))["regions"] == (
        3,
        1,
    )  # the robbery begins at frame 700


def config(ucf, out, **more):
    parameters = dict(
        data=str(ucf / "data.txt"),
        media_root=str(ucf / "Videos"),
        num_frames=8,
        batch_size=2,
        gradient_caching=1,
        memory_bank_size=4,
        memory_bank_warmup_steps=1,
        max_steps=2,
        eval_every=0,
        save_every=100,
        tracker="none",
        output=str(out),
        device="cpu",
    )
    return TrainConfig(**{**parameters, **more})


def test_half_of_a_batch_is_abnormal(ucf, tmp_path):
    cfg = config(ucf, tmp_path)
    train_samples = prepare_data(cfg).train
    order = training_order(cfg, train_samples, 1)
    for step in range(8):
        labels = [train_samples[i].label for _, i in order.indices(step)]
        assert labels.count("Normal") == 1 == len(labels) - 1, labels


def test_cache_then_training_opens_no_video(ucf, tmp_path, monkeypatch):
    where = [str(ucf / "data.txt"), str(tmp_path / "cache"), "--media-root", str(ucf / "Videos")]
    command = [
        sys.executable,
        "-m",
        "fgclip_nb.data",
        "cache",
        *where,
        "--frames",
        "16",
        "--size",
        "112",
    ]
    built = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert built.returncode == 0 and "5 clips" in built.stdout.splitlines()[-1], (
        built.stdout + built.stderr
    )
    decoded, real = [], video.decode_frames
    monkeypatch.setattr(
        "fgclip_nb.data.frame_cache.decode_frames", lambda *a: (decoded.append(a[0]), real(*a))[1]
    )
    run = train(config(ucf, tmp_path / "run", frame_cache=str(tmp_path / "cache")))
    metrics = run.metrics()
    assert run.finished and len(metrics) == 2 and np.isfinite(metrics.loss).all() and not decoded
    rules = {r["rule"] for r in read_jsonl(run.path / "rejects.jsonl")}
    assert rules == {"missing_media", "never_visible"}


@pytest.mark.ci
def test_the_recipe_has_a_best_and_a_held_out_table(ucf, tmp_path):
    cfg = config(ucf, tmp_path / "run")
    data = prepare_data(cfg)
    assert {s.label for s in data.val} == {"Arrest"} and len(data.val) == 3
    run = train(cfg)
    assert run.best()["step"] == 2 and len(retrieval_table(run)) and not no_validation(run)


@pytest.mark.ci
def test_a_run_that_holds_nothing_out_says_so(ucf, tmp_path):
    (ucf / "train_only.txt").write_text("regions_train.json\nUCFCrime_Train.json\n")
    run = train(config(ucf, tmp_path / "run", data=str(ucf / "train_only.txt")))
    assert not run.best() and not len(retrieval_table(run))
    assert "Nothing is held out" in no_validation(run)
    assert "Nothing was validated" in (run.path / "report.html").read_text()
