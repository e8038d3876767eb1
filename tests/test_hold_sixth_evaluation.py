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
    np.save(tmp_path / "videos/x/v1.npy", np.ones(3))  # somebody's features are no video
    lines = "x/v1.mp4 Abuse 3 9 -1 -1\ny/v1.mp4 Normal -1 -1 -1 -1\nv2 Normal -1 -1 -1 -1\n"
    (tmp_path / "a.txt").write_text(lines)
    cfg = EvaluateConfig(
        videos=str(tmp_path / "videos"), annotations=str(tmp_path / "a.txt"), every=8
    )
    scores, annotation, frames, every = anomaly_input(cfg, tiny, [])
    figures = frame_auc(scores, annotation, frames, every, repeats=0)
    assert (figures["videos"], figures["anomalous_videos"], figures["rejects"]) == (3, 1, [])
    (tmp_path / "a.txt").write_text(lines.replace("x/v1", "v1").replace("y/v1.mp4", "w"))
    figures = frame_auc(scores, tmp_path / "a.txt", frames, every, repeats=0)
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


def toy_evaluation(**manifest):
    "An `Evaluation` of one list, without a model."
    from fgclip_nb.evaluation.results import Evaluation
    from fgclip_nb.evaluation.scores import Ranked, summarise

    ids, one = [f"p{i}" for i in range(6)], np.ones(6, dtype=np.int64)
    ranked = Ranked(ids, ids, one, 4 * one, one)
    results = {"classification": {"labels": summarise(ranked, 20)}}
    return Evaluation(results, {"classification": {"labels": ranked}}, {"model": "m", **manifest})


def all_files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file()}


def test_a_folder_holds_one_evaluation(tmp_path, told):
    "Other data, weights or parameters go beside it; the same again leaves nothing of the earlier."
    from fgclip_nb.evaluation.comparison import load_evaluations
    from fgclip_nb.evaluation.results import load_evaluation, save_evaluation

    first = toy_evaluation(weights="a", samples_id=1)
    base = toy_evaluation(weights="b", samples_id=1)
    place = tmp_path / "run/evaluation"
    compared = dict(baseline=base, paired=first.table())
    assert save_evaluation(first, place, **compared) == place
    before = {name: (place / name).read_bytes() for name in all_files(place)}
    assert {"paired.csv", "baseline/evaluation.json"} <= before.keys()
    others = [dict(weights="a", samples_id=2), dict(weights="c", samples_id=1)]
    others += [dict(weights="a", samples_id=1, parameters={"split": "all"})]
    for n, manifest in enumerate(others, 2):
        other = save_evaluation(toy_evaluation(**manifest), place)
        assert other.name == f"evaluation-{n}" and "paired.csv" not in all_files(other)
        assert f"this one goes to {other}" in told[-1]
    assert before == {name: (place / name).read_bytes() for name in all_files(place)}
    (place / "clip_benchmark/hard_negatives_hard.json").write_text("{}")
    (place / "notes.txt").write_text("mine")
    again = toy_evaluation(weights="a", samples_id=1, code={"commit": "later"})
    assert save_evaluation(again, f"{place}/", baseline=base) == place
    assert all_files(place) == before.keys() - {"paired.csv"} | {"notes.txt"}
    assert load_evaluation(place).manifest["code"] == {"commit": "later"}
    names = list(load_evaluations(tmp_path / "run"))
    assert names[:2] == ["run", "run (evaluation-2)"] and len(names) == 5


def test_a_full_disk_leaves_the_old_evaluation(tmp_path, monkeypatch):
    from fgclip_nb.evaluation import results

    kept = results.save_evaluation(toy_evaluation(weights="a"), tmp_path / "e")
    before = {name: (kept / name).read_bytes() for name in all_files(kept)}
    real = results.write_atomic

    def full(path, data):
        if path.name == "items.csv":
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(results, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        results.save_evaluation(toy_evaluation(weights="a", code=1), tmp_path / "e")
    assert before == {name: (kept / name).read_bytes() for name in all_files(kept)}
    assert not (kept / ".writing").exists()


def test_two_evaluations_at_once(tmp_path):
    "Each lies whole in a folder of its own, whichever comes first."
    from concurrent.futures import ThreadPoolExecutor
    from fgclip_nb.evaluation.results import load_evaluation, save_evaluation

    evaluations = [toy_evaluation(weights=w) for w in "abab"]
    with ThreadPoolExecutor(4) as pool:
        where = list(pool.map(lambda e: save_evaluation(e, tmp_path / "e"), evaluations))
    assert where[0] == where[2] != where[1] == where[3]
    for e, place in zip(evaluations, where):
        assert load_evaluation(place).manifest == e.manifest


def test_what_was_asked_is_told_apart(tmp_path):
    from fgclip_nb.evaluation.config import anomaly_sources, asked_parameters

    same = [EvaluateConfig(batch_size=n, output=str(n)) for n in (2, 4)]
    assert asked_parameters(same[0]) == asked_parameters(same[1])
    assert asked_parameters(EvaluateConfig(seed=1)) != asked_parameters(EvaluateConfig())
    movie, note = clip(tmp_path / "v/v1.mp4", 10), tmp_path / "a.txt"
    note.write_text("v1 Normal -1 -1\n")
    cfg = EvaluateConfig(videos=str(tmp_path / "v"), annotations=str(note))
    seen = [anomaly_sources(cfg, [])]
    clip(movie, 90, 30)
    seen.append(anomaly_sources(cfg, []))
    note.write_text("v1 Abuse 1 2\n")
    seen.append(anomaly_sources(cfg, []))
    assert seen[0]["videos"] != seen[1]["videos"] == seen[2]["videos"]
    assert seen[1]["annotations"] != seen[2]["annotations"]


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "cpu:x", "xla"])
def test_a_device_that_is_none(name):
    from fgclip_nb.core.identity import ConfigError
    from fgclip_nb.evaluation.config import torch_device

    with pytest.raises(ConfigError, match="parameter `device` = .*use cpu or cuda"):
        torch_device(name)


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    "A run folder with three checkpoints of a tiny model."
    import torch
    from fgclip_nb.core.identity import sha256_file
    from fgclip_nb.model.opening import preset_model

    run = tmp_path_factory.mktemp("run")
    (run / "params.yaml").write_text("data: sample\n")
    torch.manual_seed(0)
    for step in (1, 2, 3):
        saved = run / f"checkpoints/step_{step:08d}"
        preset_model("tiny").save_pretrained(saved)
        sums = {p.name: sha256_file(p) for p in saved.iterdir()}
        (saved / "state.json").write_text(json.dumps(dict(step=step, files=sums)))
    return run


@pytest.mark.parametrize("moment", ["looked at", "chosen"])
@pytest.mark.parametrize("who", ["evaluation", "training", "recipe"])
def test_a_run_that_prunes_what_is_read(checkpointed, tmp_path, told, who, moment):
    from rebind import rebound
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.evaluation.features import load_model
    from fgclip_nb.training.build import build_model, recipe_by_name

    run, gone = tmp_path / "run", []
    shutil.copytree(checkpointed, run)

    def looked_at(real):
        def pruned(path):
            if not gone:
                gone.append(shutil.rmtree(path.parent))
            return real(path)

        return pruned

    def chosen(real):
        def pruned(path):
            folder = real(path)
            if not gone:
                gone.append(shutil.rmtree(folder))
            return folder

        return pruned

    call = {
        "evaluation": lambda: load_model(run),
        "training": lambda: build_model(TrainConfig(model=str(run)), logging.getLogger("x")),
        "recipe": lambda: recipe_by_name(TrainConfig(model=str(run))),
    }[who]
    with rebound(
        *(("sha256_file", looked_at) if moment == "looked at" else ("model_folder", chosen))
    ):
        assert call() is not None
    assert gone and any("step_00000002 is taken" in line for line in told)


def test_a_run_without_a_checkpoint(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.evaluation.features import load_model
    from fgclip_nb.training.build import build_model

    (tmp_path / "params.yaml").write_text("data: sample\n")
    with pytest.raises(DataError, match="this run has no checkpoint yet"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="this run has no checkpoint yet"):
        build_model(TrainConfig(model=str(tmp_path)), logging.getLogger("x"))


BAG = np.random.default_rng(0).normal(size=(20, 8, 5))
WRONG = {
    "another width": np.ones((8, 4)),
    "text": np.array([["a"]]),
    "objects": np.array([[None]]),
    "three axes": np.ones((8, 5, 2)),
    "no features": np.ones((8, 0)),
    "ragged": [[1, 2], [3]],
    "a number": 5,
    "too large": np.full((8, 5), 1e300),
    "complex": np.ones((8, 5), complex),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("place", ["train", "val", "pair", "test"])
def test_features_that_no_head_reads(wrong, place):
    from fgclip_nb.evaluation.heads import fit_heads

    train, val = (
        {f"{part}{i}": (bag, "Abuse" if i % 2 else "Normal") for i, bag in enumerate(BAG)}
        for part in "tv"
    )
    if place == "test":
        heads = fit_heads(train, val, steps=1)
        with pytest.raises(DataError, match="features of w: "):
            heads.scores({"w": wrong})
        return
    (train if place == "train" else val)["w"] = wrong if place == "pair" else (wrong, "Normal")
    with pytest.raises(DataError, match="^(features of )?w: "):
        fit_heads(train, val, steps=1)


@pytest.mark.parametrize("wrong", [np.ones((2, 9, 3, 2)), np.ones((2, 9, 2)), [[["a"]]], 5])
def test_maps_that_no_temporal_head_reads(wrong):
    from fgclip_nb.evaluation.temporal_heads import fit_temporal_heads, motion_maps

    told = np.arange(9) > 4
    train, val = ({n: (np.ones((2, 9, 2, 2)), told)} for n in "ab")
    with pytest.raises(DataError, match="features of w: "):
        fit_temporal_heads(train | {"w": (wrong, told)}, val, steps=1)
    with pytest.raises(DataError, match="labels of w: expected .9,."):
        fit_temporal_heads(train, val | {"w": (np.ones((2, 9, 2, 2)), told[:4])}, steps=1)
    with pytest.raises(DataError, match="features of a clip: expected"):
        motion_maps(wrong if np.ndim(wrong) < 4 else [["a"]], 2, 2)


def test_features_of_other_photos(tmp_path):
    "A folder in which no name fits says so, with a name of each side."
    from fgclip_nb.evaluation.results import evaluate

    np.save(tmp_path / "image_features.npy", np.eye(3, dtype=np.float32))
    (tmp_path / "image_names.txt").write_text("q0.jpg\nq1.jpg\nq2.jpg")
    with pytest.raises(DataError, match=r"none of its 3 names .*'q0.jpg'; asked for: '\S+\.jpg'"):
        evaluate(tmp_path, "sample", ["short_retrieval"], permutations=20)


@pytest.mark.parametrize("span", [[1, 1], [-1e308, 2], [-0.5, 2], [3, 2]])
def test_seconds_that_hold_no_frame(tmp_path, span):
    "A timed sentence or an entry of such a span is a reject, counted, with its reason."
    from fgclip_nb.data.load import load_samples

    clip(tmp_path / "v1.mp4", 10)
    uca = {"v1": {"duration": 5, "timestamps": [span, [0, 0.5]], "sentences": ["a", "b"]}}
    both = (("a", span), ("b", None))
    own = [{"video": "v1.mp4", "captions": [t], "span": pair} for t, pair in both]
    times = [
        dict(video="v1.mp4", global_caption=t, box_infos=[], region_captions=[], timestamps=pair)
        for t, pair in both
    ]
    for name, rows in (("uca", uca), ("own", own), ("times", times)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        samples, rejects = load_samples(tmp_path / f"{name}.json", tmp_path)
        assert [s.captions for s in samples] == [("b",)] and len(rejects) == 1, name
        assert any(w in rejects[0].reason for w in ("starts before 0", "ends where", "ends before"))


@pytest.mark.long
def test_the_notebook_twice_on_one_run(checkpointed, tmp_path):
    "Two evaluations of one run: two folders, the second told; nothing of the first is touched."
    from test_front_door import papermill, said

    run = tmp_path / "run"
    shutil.copytree(checkpointed, run)
    (run / "params.yaml").unlink()  # its data are another question here
    for place, tone in (("x/v1", 10), ("y/v1", 90), ("y/v2", 40)):
        clip(tmp_path / f"videos/{place}.mp4", tone)
    lines = "x/v1 Abuse 3 9\ny/v1 Normal -1 -1\nv2 Abuse 20 10\n"
    (tmp_path / "a.txt").write_text(lines)
    small = dict(model=run, permutations=20, captions=1)
    first = dict(tasks="short_retrieval", baseline="tiny")
    done, _ = papermill("evaluate.ipynb", tmp_path / "1.ipynb", **small, **first)
    assert done.returncode == 0, done.stderr[-3000:]
    before = {
        name: (run / "evaluation" / name).read_bytes() for name in all_files(run / "evaluation")
    }
    assert {"paired.csv", "baseline/items.csv"} <= before.keys()
    second = dict(tasks="", annotations=tmp_path / "a.txt", videos=tmp_path / "videos", every=8)
    second |= dict(feature_cache=tmp_path / "cache")
    done, cells = papermill("evaluate.ipynb", tmp_path / "2.ipynb", **small, **second)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "holds another evaluation" in said(cells) and "left out: 1" in said(cells)
    assert "2 videos are scored" in said(cells)
    assert before == {
        n: (run / "evaluation" / n).read_bytes() for n in all_files(run / "evaluation")
    }
    results = json.loads((run / "evaluation-2/evaluation.json").read_text())["results"]
    assert results["anomaly"]["frames"]["videos"] == 2
    assert not (run / "evaluation-2/paired.csv").exists()
    bad = dict(device="nonsense", tasks="short_retrieval")
    done, _ = papermill("evaluate.ipynb", tmp_path / "3.ipynb", **small, **bad)
    assert done.returncode and "torch has no such device here" in done.stderr
