"""The shipped clips and their annotation as files: sizes, counts, licences, and boxes that sit
where something moves."""

import json

import numpy as np
import pytest

pytest.importorskip("av")
from fgclip_nb.batches.examples import Drawing
from fgclip_nb.batches.loading import Examples
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.data.video import read_frames
from fgclip_nb.data.video_index import frame_times, video_info
from fgclip_nb.data.clips import region_presence, span_frames
from fgclip_nb.data.inputs import clip_inputs
from fgclip_nb.data.samples import boxes_at
from fgclip_nb.data.load import load_samples, sample_path
from fgclip_nb.training.rundata import clip_frames, prepare_data
from fgclip_nb.training.state import training_order

FOLDER = sample_path("video_sample").parent
ROWS = [json.loads(line) for line in (FOLDER / "regions.jsonl").read_text().splitlines()]
SAMPLES, REJECTS = load_samples("video_sample")
STATIC = {
    "a white line painted on the asphalt",
    "a round white table with nobody near it",
    "a dark panel in a black frame on the wall",
    "a slanted concrete pillar",
}


def test_files():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 3_000_000
    credits = (FOLDER / "CREDITS.md").read_text()
    assert "Creative Commons" in credits and all(f.name in credits for f in FOLDER.glob("*.mp4"))
    assert [video_info(FOLDER / name).frames for name in ("car_park.mp4", "visitors.mp4")] == [
        377,
        1394,
    ]


def test_it_loads_by_name_without_a_reject():
    assert len(SAMPLES) == len(ROWS) == 23 and not REJECTS
    assert {s.kind for s in SAMPLES} == {"video"} and {s.split for s in SAMPLES} == {"train", "val"}
    assert sum(len(s.regions) for s in SAMPLES) == 65


def test_tracks():
    tracks = {r["id"] for row in ROWS for r in row["regions"]}
    phrases = {r["caption"] for row in ROWS for r in row["regions"]}
    assert len(tracks) == len(phrases) == 22
    for row in ROWS:
        for region in row["regions"]:
            frames = [k["frame"] for k in region["keyframes"]]
            assert frames == sorted(set(frames)) and len(frames) >= 2
            assert all(0 <= v <= 1 for k in region["keyframes"] for v in k["bbox"])
            assert all(
                k["bbox"][0] < k["bbox"][2] and k["bbox"][1] < k["bbox"][3]
                for k in region["keyframes"]
            )
            assert (
                len(set(region["negatives"])) == 4 and region["caption"] not in region["negatives"]
            )
    ends = [r["keyframes"][-1]["enabled"] for row in ROWS for r in row["regions"]]
    assert ends.count(False) >= 16 and ends.count(True) >= 16


def test_segments_tile_the_clips_in_five_to_ten_seconds():
    for name in ("car_park", "visitors"):
        times = frame_times(FOLDER / f"{name}.mp4")
        spans = [span_frames(times, s.span) for s in SAMPLES if s.id.startswith(name)]
        assert spans[0][0] == 0 and spans[-1][1] == len(times) - 1
        assert all(a[1] + 1 == b[0] for a, b in zip(spans, spans[1:]))
    assert all(5 <= s.span[1] - s.span[0] <= 10 for s in SAMPLES)
    assert len({s.caption for s in SAMPLES}) == len({s.short_caption for s in SAMPLES}) == 23


def test_every_track_stays_within_its_segment():
    for s in SAMPLES:
        first, last = span_frames(frame_times(s.media), s.span)
        for r in s.regions:
            assert first <= r.keyframes[0].frame and r.keyframes[-1].frame <= last
            assert len(region_presence(r, first, last)) >= 4


def test_every_region_is_seen_by_sixteen_frames():
    seen = [clip_inputs(s, num_frames=16, size=32) for s in SAMPLES]
    missed = [reject for c in seen for reject in c.rejects]
    assert len(missed) <= 1 and np.nanmean([c.coverage for c in seen]) > 0.95, missed
    assert (
        len({r.phrase for s, c in zip(SAMPLES, seen) if s.split == "train" for r in c.regions})
        >= 16
    )


def test_every_step_of_the_default_run_contrasts_six_captions():
    """Regions as training draws them, with jitter, batch for batch over 160 steps: never fewer than
    6 distinct phrases or captions."""
    cfg = TrainConfig(data="video_sample")
    data = prepare_data(cfg).train
    examples = Examples(data, Drawing(16, cfg.max_regions, num_frames=clip_frames(cfg)), cfg.seed)
    order = training_order(cfg, data, 1)
    for step in range(160):
        drawn = [examples[where] for where in order.indices(step)]
        assert (
            len({r.phrase for e in drawn for r in e.regions}) >= 6
            and len({e.caption for e in drawn}) >= 6
        )


@pytest.mark.parametrize("name", ["car_park", "visitors"])
def test_boxes_sit_on_what_moves(name):
    """Pixels that differ from the empty scene lie in moving tracks' boxes far more often than
    chance would have it."""
    samples = [s for s in SAMPLES if s.id.startswith(name)]
    path = samples[0].media
    numbers = np.arange(0, video_info(path).frames, 3)
    pictures = read_frames(path, numbers).astype(np.int16)
    scene = np.median(pictures[::4] if name == "car_park" else pictures[numbers < 55], axis=0)
    inside, share = [], []
    for number, picture in zip(numbers, pictures):
        brightness = np.median(picture - scene)  # the camera adapts its exposure when a car comes
        moving = np.abs(picture - scene - brightness).max(-1) > 60
        boxes = [
            b[0]
            for s in samples
            for r in s.regions
            if r.phrase not in STATIC
            for b, v in [boxes_at(r.keyframes, [number])]
            if v[0]
        ]
        if moving.sum() < 600 or not boxes:
            continue
        covered = np.zeros_like(moving)
        for x1, y1, x2, y2 in boxes:
            covered[
                int(y1 * 180) : int(np.ceil(y2 * 180)), int(x1 * 320) : int(np.ceil(x2 * 320))
            ] = True
        inside.append((moving & covered).sum() / moving.sum())
        share.append(covered.mean())
    assert len(inside) > 20 and np.mean(inside) > 0.9 and np.mean(share) < 0.3, (
        np.mean(inside),
        np.mean(share),
    )
