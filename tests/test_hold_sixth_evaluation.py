"""What an evaluation is made of: which video, which features, which folder, and what is left out.

Whole folders, videos of one name and what a hand does to files between two calls are no cell."""

import json
import logging
import shutil

import numpy as np
import pytest

from fgclip_nb.core.identity import DataError
from fgclip_nb.data.samples import Keyframe, Region, Sample
from fgclip_nb.evaluation.annotations import read_anomaly_annotations
from fgclip_nb.evaluation.anomaly import anomaly_scores, track_annotations, video_features
from fgclip_nb.evaluation.config import EvaluateConfig, anomaly_input
from fgclip_nb.evaluation.frames import frame_auc

SCENES = {"Normal": ["a dark room"], "Event": ["a bright room"]}


@pytest.fixture(scope="module")
def tiny():
    import torch
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    torch.manual_seed(0)
    return FGCLIP(FGCLIPConfig.preset("tiny"))


def clip(path, tone, frames=24):
    "A short video of one tone."
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(frames):
            picture = np.full((48, 64, 3), (tone + 5 * k) % 255, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.fixture
def told():
    "Lines of the package's log."
    lines = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    log, handler = logging.getLogger("fgclip_nb"), Kept()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_cache_knows_videos_by_their_content(tiny, tmp_path, told):
    "Another set with the same names, a replaced video: encoded anew, and told."
    first, second = clip(tmp_path / "A/v1.mp4", 10), clip(tmp_path / "B/v1.mp4", 120, 40)
    cache = tmp_path / "cache"
    truth = {p: video_features(tiny, [p], every=8)["v1"] for p in (first, second)}
    for path in (first, second, first):
        kept = video_features(tiny, [path], every=8, cache=cache)["v1"]
        assert kept.frames == truth[path].frames and np.allclose(
            kept.whole, truth[path].whole, atol=1e-5
        )
    assert sum("another video of that name" in line for line in told) == 1
    assert "1 videos read from it, 0 encoded" in told[-1]
    shutil.copy(second, first)
    assert video_features(tiny, [first], every=8, cache=cache)["v1"].frames == 40
    notes = [json.loads(p.read_text()) for p in cache.glob("v1.*.json")]
    assert len(notes) == 2 and all(
        {"video", "fingerprint", "every", "weights"} <= n.keys() for n in notes
    )
    both = video_features(tiny, [clip(tmp_path / "C/v1.mp4", 60), second], every=8, cache=cache)
    assert {n: f.frames for n, f in both.items()} == {"C/v1": 24, "B/v1": 40}


def test_a_cache_of_nobody_knows_what(tiny, tmp_path, told):
    movie = clip(tmp_path / "v1.mp4", 10)
    (tmp_path / "foreign").mkdir()
    np.save(tmp_path / "foreign/v1.npy", np.ones((3, 11, 64), np.float32))
    with pytest.raises(DataError, match="nobody knows of which videos"):
        video_features(tiny, [movie], every=8, cache=tmp_path / "foreign")
    truth = video_features(tiny, [movie], every=8, cache=tmp_path / "cache")["v1"]
    [file] = (tmp_path / "cache").glob("*.npy")
    file.with_suffix(".json").unlink()  # without its note it is nobody's
    shutil.copy(tmp_path / "foreign/v1.npy", file)
    again = video_features(tiny, [movie], every=8, cache=tmp_path / "cache")["v1"]
    assert np.allclose(again.whole, truth.whole, atol=1e-5)
    assert any("of nobody knows which" in line for line in told)


@pytest.mark.parametrize(
    "content",
    [
        np.ones((2, 3, 5), np.float32),
        np.ones(7, np.float32),
        np.array([["a"]]),
        np.array([None]),
        np.full((3, 11, 64), np.nan, np.float32),
        np.ones((3, 11, 64), np.int64),
        np.ones((3, 11, 64), np.float32),
        None,
    ],
    ids=["shape", "flat", "text", "object", "nan", "whole numbers", "other numbers", "torn"],
)
def test_a_wrong_array_in_a_cache(tiny, tmp_path, content):
    movie = clip(tmp_path / "v1.mp4", 10)
    video_features(tiny, [movie], every=8, cache=tmp_path / "cache")
    [file] = (tmp_path / "cache").glob("*.npy")
    if content is None:
        file.write_bytes(file.read_bytes()[:200])
    else:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(DataError, match="v1.*npy: .*delete it, and its features are made anew"):
        anomaly_scores(tiny, [movie], SCENES, every=8, cache=tmp_path / "cache")


def boxed(media, label, first, last):
    "A sample of a video with one track."
    track = tuple(Keyframe(f, (0.1, 0.1, 0.5, 0.5)) for f in (first, last))
    return Sample(media, media, kind="video", label=label, regions=[Region("it", keyframes=track)])


def test_two_videos_of_one_name(tiny, tmp_path, told):
    "All that are found are scored, each by the line of its own folder; a bare line is a reject."
    for place, tone in (("x/v1", 10), ("y/v1", 90), ("y/v2", 40)):
        clip(tmp_path / f"videos/{place}.mp4", tone)
    lines = "x/v1.mp4 Abuse 3 9 -1 -1\ny/v1.mp4 Normal -1 -1 -1 -1\nv2 Normal -1 -1 -1 -1\n"
    (tmp_path / "a.txt").write_text(lines)
    cfg = EvaluateConfig(
        videos=str(tmp_path / "videos"), annotations=str(tmp_path / "a.txt"), every=8
    )
    scores, annotation, frames = anomaly_input(cfg, tiny, [])
    figures = frame_auc(scores, annotation, frames, repeats=0)
    assert (figures["videos"], figures["anomalous_videos"], figures["rejects"]) == (3, 1, [])
    (tmp_path / "a.txt").write_text(lines.replace("x/v1", "v1").replace("y/v1.mp4", "w"))
    figures = frame_auc(scores, tmp_path / "a.txt", frames, repeats=0)
    assert figures["videos"] == 1 and len(figures["rejects"]) == 1
    assert "fits 2 videos" in figures["rejects"][0]["reason"]
    assert any("left out: 1" in line and "fits 2 videos" in line for line in told)


def test_tracks_of_two_videos_of_one_name(tmp_path):
    samples = [boxed("x/v1.mp4", "Abuse", 0, 9), boxed("y/v1.mp4", "Arson", 40, 60)]
    events = track_annotations(samples)
    assert {n: (v.classes, v.spans) for n, v in events.items()} == {
        "x/v1": (("Abuse",), ((0, 9),)),
        "y/v1": (("Arson",), ((40, 60),)),
    }
    oracle = {
        n: [any(a <= f <= b for a, b in v.spans) for f in range(80)] for n, v in events.items()
    }
    figures = frame_auc(oracle, events, repeats=0)
    assert figures["auc"] == 1 and set(figures["per_class"]) == {"Abuse", "Arson"}
    swapped = {f"/data/{n}.mp4": oracle[n] for n in reversed(oracle)}
    assert frame_auc(swapped, events, repeats=0)["auc"] == 1
    with pytest.raises(DataError, match="fits 2 videos"):
        frame_auc(swapped, {"v1": events["x/v1"]}, repeats=0)
    one = boxed("x/v1.mp4", "Abuse", 0, 9), boxed("x/v1.mp4", "Arson", 40, 60)
    assert track_annotations(one)["v1"].classes == ("Abuse", "Arson")


def test_a_line_takes_no_scores_of_a_namesake(told):
    from fgclip_nb.evaluation.annotations import AnomalyVideo, match_scores

    notes = {n: AnomalyVideo(n, (), ()) for n in ("x/v1", "y/v1")}
    matched, rejects, missing, _ = match_scores({"d/y/v1.npy": [0.5] * 9}, notes)
    assert [m.video.name for m in matched] == ["y/v1"] and missing == ["x/v1"] and not rejects
    matched, rejects, *_ = match_scores({"d/z/v1.npy": [0.5] * 9}, notes)
    assert not matched and len(rejects) == 2 and "fit the one video" in rejects[0].reason
    matched, *_ = match_scores({"d/z/v1": [0.5] * 9}, {"x/v1": notes["x/v1"]})
    assert len(matched) == 1 and any("their folders differ" in line for line in told)


def test_lines_that_are_left_out_are_told(tmp_path, told):
    fit = "Abuse1 Abuse 10 20 -1 -1\nNormal1 Normal -1 -1 -1 -1\n"
    scores = {"Abuse1": [0.1] * 30, "Normal1": [0.2] * 30, "Abuse2": [0.3] * 30}
    for wrong in (
        "Abuse2 Abuse 20 10",
        "Abuse2 Abuse nan inf",
        "Abuse2 Abuse -1e308 9",
        "a" * 10**6 + " Abuse 1 2",
    ):
        (tmp_path / "a.txt").write_text(fit + wrong + "\n")
        told.clear()
        figures = frame_auc(scores, tmp_path / "a.txt", repeats=0)
        assert figures["videos"] == 2 and len(figures["rejects"]) == 1
        assert any("left out: 1, e.g. line 3" in line for line in told)
        assert max(map(len, told)) < 1000 and len(json.dumps(figures)) < 5000
    _, rejects = read_anomaly_annotations(tmp_path / "a.txt")
    assert "1,000,000 letters" in rejects[0].reason
