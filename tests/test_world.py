"""The made world wherever data are named: training, resume, conversion, commands, cache, files.

No cell can show this, since it takes whole runs, processes and folders."""

import json

import numpy as np
import pytest

from fgclip_nb import ConfigError, TrainConfig, load_samples, train
from fgclip_nb.data import world_video as wv
from fgclip_nb.data.conversion import convert
from fgclip_nb.data.frame_cache import FrameCache, build_cache
from fgclip_nb.data.motion import EVENTS, clip_at
from fgclip_nb.data.photos import read_image
from fgclip_nb.data.scenes import pair_part, relation_part, scene_at
from fgclip_nb.data.video import read_frames
from fgclip_nb.training.rundata import prepare_data

SMALL = dict(
    batch_size=4,
    max_regions=2,
    max_steps=4,
    eval_every=0,
    device="cpu",
    tracker="none",
    augment="none",
)


def steps_of(run):
    "What was computed at each step, without the clock."
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "time" not in k} for x in lines]


def fingerprint_of(run):
    "What the manifest says of the data."
    return json.loads((run.path / "manifest.json").read_text())["data"]


@pytest.mark.long
@pytest.mark.parametrize("data", ["world:size=12", "world_video:size=10"])
def test_a_run_on_what_is_made_can_be_interrupted(data, tmp_path):
    whole = train(TrainConfig(data=data, output=str(tmp_path / "whole"), save_every=2, **SMALL))
    begun = dict(SMALL, max_steps=2)
    train(TrainConfig(data=data, output=str(tmp_path / "part"), save_every=2, **begun))
    (tmp_path / "part/finished.json").unlink(missing_ok=True)
    again = train(
        TrainConfig(
            data=data,
            output=str(tmp_path / "part"),
            allow_changed="max_steps",
            save_every=2,
            **SMALL,
        )
    )
    assert len(steps_of(whole)) == len(steps_of(again)) == 4
    assert steps_of(whole)[0] == steps_of(again)[0]
    assert fingerprint_of(again) == fingerprint_of(whole)


def test_a_word_that_the_address_does_not_know_is_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean `noise`"):
        load_samples("world:nois=0.1")
    with pytest.raises(ConfigError, match="outside its range"):
        load_samples("world_video:size=1")


@pytest.mark.long
def test_what_is_made_can_be_converted_with_and_without_its_pictures(tmp_path):
    made = load_samples("world:size=3")[0]
    for embed in (False, True):
        convert("world:size=3", tmp_path / str(embed), embed=embed)
        shards = load_samples(tmp_path / str(embed))[0]
        assert len(shards) == len(made)
        for i in (0, 2, -1):
            assert shards[i].regions == made[i].regions
            assert (read_image(shards[i].encoded) == read_image(made[i].media)).all()


def test_held_out_scenes_hold_nothing_that_was_trained():
    said = {"train": set(), "val": set(), "test": set()}
    for s in load_samples("world:size=300")[0]:
        things = scene_at(s.media).things
        said[s.split] |= {(t.colour, t.shape) for t in things}
        assert {pair_part(t.colour, t.shape) for t in things} == {s.split}
    assert not said["train"] & (said["val"] | said["test"])
    assert relation_part("star", "above", "ring") == relation_part("ring", "below", "star")


def test_a_fault_that_is_dialled_in_is_found_by_the_filter():
    data = prepare_data(TrainConfig(data="world:size=200:bad_boxes=0.3"))
    lost = sum("bad box" in r.field for r in data.rejects)
    trained = sum(len(s.regions) for s in data.train)
    assert 0.2 < lost / (lost + trained) < 0.4


def test_made_clips_are_cached_as_they_are_drawn(tmp_path):
    samples = load_samples("world_video:size=10")[0][:3]
    cache = FrameCache(tmp_path / "frames", size=112, encoding="raw")
    assert not build_cache(cache, samples, 4, say=lambda line: None)
    clip = cache.get(samples[1].media)
    assert (clip.read(clip.frames) == read_frames(samples[1].media, clip.frames, 112)).all()


def test_files_of_made_clips_say_what_the_clips_are(tmp_path, monkeypatch):
    few = (
        list(wv.world_video_samples(wv.WorldVideoOptions(size=10)))[:4]
        + [s for s in wv.world_video_samples(wv.WorldVideoOptions(size=10)) if s.split == "test"][
            :2
        ]
    )
    monkeypatch.setattr(wv, "world_video_samples", lambda options: few)
    folder = wv.write_world_video(wv.WorldVideoOptions(size=10), tmp_path / "clips")
    forms = [
        load_samples(folder / name, folder / "Videos")[0]
        for name in ("by_name.json", "listed.json", "timed.json")
    ]
    for samples in forms:
        assert [s.id for s in samples] == [s.id for s in few]
        for s, made in zip(samples, few):
            assert [r.phrase for r in s.regions] == [r.phrase for r in made.regions]
            assert [r.keyframes for r in s.regions] == [r.keyframes for r in made.regions]
            assert s.split == made.split
    off = np.abs(read_frames(forms[0][1].media, [40]).astype(int) - read_frames(few[1].media, [40]))
    assert off.mean() < 6  # H.264 halves the colours' resolution
    lines = (folder / "temporal.txt").read_text().splitlines()
    assert (
        lines[1].split()[1] in EVENTS and int(lines[1].split()[2]) == clip_at(few[5].media).span[0]
    )


def made_clip_parts(size):
    "{part: {name: (features, AnomalyVideo)}} of made clips and a model with random weights."
    import torch
    from fgclip_nb import FGCLIP, FGCLIPConfig
    from fgclip_nb.evaluation.annotations import video_name
    from fgclip_nb.evaluation.anomaly import track_annotations, video_features

    samples = load_samples(f"world_video:size={size}")[0]
    torch.manual_seed(0)
    model = FGCLIP(FGCLIPConfig.preset("tiny"))
    boxes = np.array([(x, y, x + 1, y + 1) for y in (1, 3, 5) for x in range(7)]) / 7  # the lanes
    features = video_features(model, [s.media for s in samples], every=2, boxes=boxes)
    truth = track_annotations(samples, lambda sample, region: region.id == "event")
    parts = {"train": {}, "val": {}, "test": {}}
    for s in samples:
        name = video_name(s.media)
        parts[s.split][name] = (features[name].regions, truth[name])
    return parts


@pytest.mark.ci
def test_events_are_found_over_time_and_in_no_single_frame():
    "Frame AUC on unseen combinations; half, where nothing could be known."
    from fgclip_nb.evaluation.temporal_heads import (
        fit_temporal_heads,
        motion_maps,
        segment_labels,
        single_maps,
    )

    parts = made_clip_parts(100)

    def measured(maps_of, mixed=False, **options):
        rng = np.random.default_rng(0)
        made = {}
        for part, clips in parts.items():
            made[part] = {
                n: (maps_of(f, 3, 7), segment_labels(video, len(f), 2))
                for n, (f, video) in clips.items()
            }
            if mixed and part != "test":
                every = rng.permutation(np.concatenate([y for _, y in made[part].values()]))
                rows = every.reshape(len(made[part]), -1)
                made[part] = {n: (m, y) for (n, (m, _)), y in zip(made[part].items(), rows)}
        heads = fit_temporal_heads(made["train"], made["val"], **options)
        tested = {n: maps for n, (maps, _) in made["test"].items()}
        truth = {n: video for n, (_, video) in parts["test"].items()}
        return heads.report(tested, truth, segment=2, repeats=0)["auc"]["mean"]

    assert measured(motion_maps, steps=150) > 0.9
    assert 0.35 < measured(motion_maps, mixed=True, steps=40) < 0.65
    assert 0.35 < measured(single_maps, reach=0, steps=40) < 0.65


@pytest.mark.long
def test_several_processes_draw_the_same_world(tmp_path):
    runs = [
        train(
            TrainConfig(data="world:size=12", output=str(tmp_path / str(n)), num_workers=n, **SMALL)
        )
        for n in (0, 2)
    ]
    assert steps_of(runs[0]) == steps_of(runs[1])
