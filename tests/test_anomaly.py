"""What a cell cannot check: frame figures over excerpts of UCF-Crime's own files and over all of
them, XD-Violence lists, scores read from files, videos on disk."""

import inspect, json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.evaluation.annotations import (
    match_scores,
    read_anomaly_annotations,
    read_frame_counts,
    read_scores,
    video_name,
)
from fgclip_nb.evaluation.frames import frame_auc
from fgclip_nb.evaluation.heads import fit_heads
from fgclip_nb.evaluation.anomaly import (
    anomaly_scores,
    read_prompts,
    track_annotations,
    video_features,
)
from fgclip_nb.data.samples import boxes_at
from fgclip_nb.data.load import load_samples

HERE = Path(__file__).resolve().parent
ANNOTATION, FRAMES = HERE / "data_eval/ucf_annotation.txt", HERE / "data_eval/ucf_frames.csv"
UCF = HERE.parent.parent / "shared/data/ucf_crime"


def labels_of(videos, frames):
    "Per-frame labels, written out frame by frame."
    return {
        n: np.array([any(a <= f <= b for a, b in v.spans) for f in range(frames[n])], dtype=float)
        for n, v in videos.items()
    }


@pytest.fixture(scope="module")
def ucf():
    videos, rejects = read_anomaly_annotations(ANNOTATION)
    assert len(videos) == 11 and not rejects
    return labels_of(videos, read_frame_counts(FRAMES))


@pytest.mark.parametrize("suffix", ["", ".mp4", ".npy"])
def test_an_oracle_scores_one(ucf, suffix):
    measured = frame_auc(
        {f"Testing/{n}{suffix}": v for n, v in ucf.items()}, ANNOTATION, frames=FRAMES
    )
    assert (
        measured["auc"] == measured["ap"] == measured["auc_anomalous"] == 1
        and measured["false_alarm_rate"] == 0
    )
    assert not measured["missing"] and not measured["rejects"]
    assert all(c["auc"] == c["auc_within"] == 1 for c in measured["per_class"].values())
    assert set(measured["per_class"]) == {"Abuse", "Arrest", "Arson", "Fighting", "Shooting"}
    assert measured["frames"] == sum(map(len, ucf.values())) and measured[
        "anomalous_frames"
    ] == sum(v.sum() for v in ucf.values())
    assert measured["annotated_frames_cut"] == (1267 + 1 - 1264) + (3103 + 1 - 3088)


@pytest.mark.parametrize("kind", ["noise", "ties", "constant"])
def test_figures_are_scikit_learns(ucf, kind):
    rng = np.random.default_rng(0)

    def made(labels):
        if kind == "noise":
            return rng.random(len(labels))
        if kind == "ties":
            return np.round(rng.random(len(labels)) + labels, 1)
        return np.full(len(labels), 0.3)

    scores = {n: made(v) for n, v in ucf.items()}
    found = frame_auc(scores, ANNOTATION, frames=FRAMES)
    y, s = (np.concatenate([d[n] for n in sorted(ucf)]) for d in (ucf, scores))
    assert found["auc"] == roc_auc_score(y, s) and found["ap"] == average_precision_score(y, s)
    if kind == "constant":
        assert found["auc"] == 0.5 and found["ap"] == pytest.approx(y.mean())
    if kind == "noise":
        assert found["interval"]["auc"][0] < 0.5 < found["interval"]["auc"][1]
    for name, c in found["per_class"].items():
        own = [n for n in sorted(ucf) if n.startswith((name, "Normal"))]
        y, s = (np.concatenate([d[n] for n in own]) for d in (ucf, scores))
        assert c["auc"] == pytest.approx(roc_auc_score(y, s), abs=1e-12)


def test_segments_are_repeated_to_the_frame_count(ucf):
    rng, counts = np.random.default_rng(1), read_frame_counts(FRAMES)
    segments = {n: rng.random(-(-counts[n] // 16)) for n in ucf}
    spread, repeated = (
        frame_auc(segments, ANNOTATION, frames=FRAMES, segment=s, repeats=0) for s in (None, 16)
    )
    by_hand = {n: np.repeat(v, 16)[: counts[n]] for n, v in segments.items()}
    assert repeated["auc"] == frame_auc(by_hand, ANNOTATION, repeats=0)["auc"]
    assert spread["frames"] == repeated["frames"] == sum(counts.values())
    assert spread["auc"] == repeated["auc"], "all counts are multiples of 16"


def test_videos_without_scores_are_named_not_called_normal(ucf):
    found = frame_auc(
        {n: v for n, v in ucf.items() if n != "Arson011_x264"} | {"Elsewhere001": [0.1, 0.2]},
        ANNOTATION,
        frames=FRAMES,
        repeats=0,
    )
    assert (
        found["missing"] == ["Arson011_x264"]
        and found["unannotated"] == ["Elsewhere001"]
        and found["videos"] == 10
    )


def test_single_frames_and_one_sided_sets(tmp_path):
    (tmp_path / "a.txt").write_text("A001 Abuse 0 0 -1 -1\nN001 Normal -1 -1 -1 -1\n")
    both = frame_auc({"A001": [0.9], "N001": [0.1]}, tmp_path / "a.txt")
    assert (
        both["auc"] == 1
        and both["frames"] == 2
        and both["auc_anomalous"] is None
        and both["per_class"]["Abuse"]["auc_within"] is None
    )
    assert frame_auc({"A001": [0.9]}, tmp_path / "a.txt")["false_alarm_rate"] is None
    assert "NaN" not in json.dumps(both)


def test_xd_violence_lists(tmp_path):
    lines = [
        "v=S-7rRLrxnVQ__#1_label_B4-0-0 2 4",
        "Bad.Boys.1995__#01-11-55_00_label_G-B2-B6 0 1 5 7",
        "A.Beautiful.Mind.2001__#00-25-20_label_A",
        "v=x__#1_label_B1-0-0",
    ]
    (tmp_path / "annotations.txt").write_text("\n".join(lines))
    videos, rejects = read_anomaly_annotations(tmp_path / "annotations.txt")
    assert (
        videos["Bad.Boys.1995__#01-11-55_00_label_G-B2-B6"].classes == ("G", "B2", "B6")
        and len(videos) == 3
    )
    assert "B1 without an anomalous span" in rejects[0].reason and rejects[0].entry == "line 4"
    truth = labels_of(videos, dict.fromkeys(videos, 9))
    found = frame_auc(
        {f"{n}.mp4": v for n, v in truth.items()}, tmp_path / "annotations.txt", repeats=0
    )
    assert (
        found["auc"] == 1
        and found["per_class"]["B2"]["videos"] == 1
        and found["normal_videos"] == 1
    )


def test_every_wrong_line_is_a_reject_with_its_reason(tmp_path):
    good = ANNOTATION.read_text().splitlines()
    bad = {
        "A Abuse 9 3 -1 -1": "ends before",
        "B Abuse 3": "pair off",
        "C Abuse one 3": "no frame number",
        "D Abuse -1 -1 -1 -1": "without an anomalous span",
        "E Normal 3 4 -1 -1": "normal video with",
        "F Abuse -5 4": "negative",
        "G": "no class",
        good[0]: "twice",
        "H Abuse": "cut off",
        "I Abuse 3 -1": "negative",
    }
    (tmp_path / "a.txt").write_text("\n".join([*good, *bad]))
    videos, rejects = read_anomaly_annotations(tmp_path / "a.txt")
    assert len(videos) == len(good) and len(rejects) == len(bad)
    for reject, (line, reason) in zip(rejects, bad.items()):
        assert reason in reject.reason and reject.value.split() == line.split(), reject


def test_scores_are_checked(tmp_path):
    for scores, said in (
        ({"a": [0.1, float("nan")]}, "entry 1 is NaN"),
        ({"a": []}, "non-empty"),
        ({"a": [[1, 2]]}, "flat"),
        ({"a": [1], "x/a.mp4": [1]}, "twice"),
    ):
        with pytest.raises(DataError, match=said):
            read_scores(scores)
    np.save(tmp_path / "v1.npy", np.array([0.5, 0.25]))
    assert read_scores(tmp_path)["v1"].tolist() == [0.5, 0.25]
    np.save(tmp_path / "v2.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="v2.npy"):
        read_scores(tmp_path)
    with pytest.raises(DataError, match="none of the scored"):
        frame_auc({"nobody": [0.1]}, ANNOTATION)
    with pytest.raises(ConfigError, match="smoothing"):
        frame_auc({"Abuse028_x264": np.zeros(1408)}, ANNOTATION, smoothing=0)
    (tmp_path / "n.csv").write_text("video,n_frames\nAbuse028_x264,many\n")
    with pytest.raises(DataError, match="line 2"):
        read_frame_counts(tmp_path / "n.csv")
    with pytest.raises(DataError, match="Normal"):
        read_prompts({"Abuse": ["x"]})
    assert video_name("a\\b/Bad.Boys.1995__#01.MP4") == "Bad.Boys.1995__#01"


def test_smoothing_helps_noisy_scores_of_long_events(ucf):
    rng = np.random.default_rng(2)
    noisy = {n: v + 2 * rng.normal(size=len(v)) for n, v in ucf.items()}
    plain, smoothed = (frame_auc(noisy, ANNOTATION, smoothing=w, repeats=0)["auc"] for w in (1, 25))
    assert smoothed > plain + 0.1


def test_heads_choose_on_validation_and_report_every_seed(tmp_path):
    taken = set(inspect.signature(fit_heads).parameters)
    assert not {"test", "test_features", "annotation_file"} & taken, (
        "no way for a test score to reach a choice"
    )
    rng = np.random.default_rng(3)
    bags = {
        f"v{i}": (
            rng.normal(size=(20, 8)) + (i % 2) * np.eye(8)[0] * 4 * (np.arange(20) > 14)[:, None],
            bool(i % 2),
        )
        for i in range(24)
    }
    train, val = {k: bags[k] for k in list(bags)[:16]}, {k: bags[k] for k in list(bags)[16:]}
    heads, again = (fit_heads(train, val, seeds=(5, 6, 7), steps=60) for _ in range(2))
    test = {
        "t0.mp4": rng.normal(size=(20, 8)),
        "t1": rng.normal(size=(20, 8)) + np.eye(8)[0] * 4 * (np.arange(20) > 14)[:, None],
    }
    (tmp_path / "a.txt").write_text("t0 Normal -1 -1 -1 -1\nt1 Abuse 240 319 -1 -1\n")
    report, second = (
        h.report(test, tmp_path / "a.txt", frames={"t0": 320, "t1": 320}, repeats=0)
        for h in (heads, again)
    )
    assert report == second and report["seeds"] == [5, 6, 7]
    assert report["auc"]["mean"] == pytest.approx(np.mean(report["auc"]["values"]))
    assert report["auc"]["mean"] > 0.8
    for fit in heads.fits:
        assert fit["val_auc"] == max(h["val_auc"] for h in fit["history"])
    with pytest.raises(DataError, match="used for training or selection"):
        heads.report({"v3.mp4": bags["v3"][0]}, tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="three"):
        fit_heads(train, val, seeds=(1, 2))
    with pytest.raises(DataError, match="one class"):
        fit_heads(train, {k: v for k, v in val.items() if v[1]})


def test_zero_shot_scores_of_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    import torch
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    torch.manual_seed(0)
    with av.open(str(tmp_path / "Abuse028_x264.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for i in range(40):
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.full((64, 64, 3), 6 * i, np.uint8), format="rgb24")
            ):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    scores, frames = anomaly_scores(
        FGCLIP(FGCLIPConfig.preset("tiny")), [tmp_path / "Abuse028_x264.mp4"]
    )
    assert frames == {"Abuse028_x264": 40} and scores["Abuse028_x264"].shape == (3,)
    assert (0 < scores["Abuse028_x264"]).all() and (scores["Abuse028_x264"] < 1).all()
    found, rejects, *_ = match_scores(scores, ANNOTATION, frames)
    assert not found and "starts after the last of 40 frames" in rejects[0].reason


@pytest.fixture(scope="module")
def tiny():
    import torch
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    torch.manual_seed(0)
    return FGCLIP(FGCLIPConfig.preset("tiny"))


def somebody(sample, region):
    return bool({"man", "woman"} & set(region.phrase.split()))


def test_tracks_say_when_the_event_is_in_the_picture():
    clips = load_samples("video_sample")[0]
    events = track_annotations(clips, somebody)
    assert not events["car_park"].spans and events["visitors"].classes == ("event",)
    for s in clips:
        for r in s.regions:
            if s.media.endswith("visitors.mp4") and somebody(s, r):
                frames = np.arange(1394)
                inside = np.array(
                    [any(a <= f <= b for a, b in events["visitors"].spans) for f in frames]
                )
                assert not (boxes_at(r.keyframes, frames)[1] & ~inside).any(), r.id
    assert not any(v.spans for v in track_annotations(clips).values()), (
        "all of them are labelled Normal"
    )
    oracle = {
        n: [any(a <= f <= b for a, b in v.spans) for f in range(400 if n == "car_park" else 1394)]
        for n, v in events.items()
    }
    assert frame_auc(oracle, events)["auc"] == 1


def test_features_of_videos_are_kept_and_belong_to_their_weights(tiny, tmp_path, monkeypatch):
    import torch
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    movies = sorted({s.media for s in load_samples("video_sample")[0]})
    fresh = video_features(tiny, movies, every=100)
    first = video_features(tiny, movies, every=100, cache=tmp_path / "cache")
    monkeypatch.setattr(
        "fgclip_nb.evaluation.anomaly._encode_video", lambda *a: pytest.fail("encoded again")
    )
    again = video_features(tiny, movies, every=100, cache=tmp_path / "cache")
    for n in ("car_park", "visitors"):
        assert fresh[n].frames == again[n].frames and again[n].regions.shape == (
            len(again[n].whole),
            10,
            tiny.config.projection_dim,
        )
        assert again[n].bag().shape == (len(again[n].whole), 2 * tiny.config.projection_dim)
        assert np.allclose(fresh[n].whole, again[n].whole, atol=1e-6) and np.allclose(
            first[n].regions, again[n].regions, atol=1e-6
        )
    with pytest.raises(DataError, match="another every"):
        video_features(tiny, movies, every=50, cache=tmp_path / "cache")
    torch.manual_seed(1)
    other = FGCLIP(FGCLIPConfig.preset("tiny"))
    with pytest.raises(DataError, match="another weights"):
        video_features(other, movies, every=100, cache=tmp_path / "cache")


def test_the_shipped_clips_end_to_end(tiny, tmp_path):
    clips = load_samples("video_sample")[0]
    movies, events = sorted({s.media for s in clips}), track_annotations(clips, somebody)
    scenes = {"Normal": ["an empty room", "an empty car park"], "Visitor": ["a person at a table"]}
    by_weight = {}
    for weight in (0, 0.5, 1):
        scores, frames = anomaly_scores(
            tiny, movies, scenes, every=25, region_weight=weight, cache=tmp_path / "cache"
        )
        assert frames == {"car_park": 377, "visitors": 1394}
        by_weight[weight] = frame_auc(scores, events, frames, smoothing=3, repeats=50)
        assert (
            by_weight[weight]["frames"] == 1771
            and by_weight[weight]["videos"] == 2
            and not by_weight[weight]["rejects"]
        )
    assert len({f["auc"] for f in by_weight.values()}) == 3, (
        "whole frames and regions say different things"
    )


@pytest.mark.skipif(
    not UCF.is_dir(), reason="the full UCF-Crime annotation is not in this checkout"
)
def test_all_of_ucf_crime():
    annotation, counts = (
        UCF / "Temporal_Anomaly_Annotation.txt",
        UCF / "ucf_test_frames_derived.csv",
    )
    videos, rejects = read_anomaly_annotations(annotation)
    assert len(videos) == 290 and not rejects and sum(not v.spans for v in videos.values()) == 150
    frames, truth = read_frame_counts(counts), {}
    for name, video in videos.items():
        truth[name] = np.zeros(frames[name])
        for first, last in video.spans:
            truth[name][first : last + 1] = 1
    found = frame_auc(truth, annotation, counts, repeats=0)
    assert (
        found["auc"] == 1
        and found["videos"] == 290
        and found["frames"] == 1110144
        and len(found["per_class"]) == 13
    )
    rng = np.random.default_rng(0)
    noise = frame_auc({n: rng.random(-(-f // 16)) for n, f in frames.items()}, annotation, counts)
    assert noise["interval"]["auc"][0] < 0.5 < noise["interval"]["auc"][1]
