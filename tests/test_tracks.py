"""When a region of a clip is visible, and where: one definition in reader, filter, clip, batch and
picture, held against one written apart.

Random tracks by seed, so that every mixture of enabled and disabled keyframes occurs; no cell could
show so many."""

import numpy as np
import pytest

pytest.importorskip("av")
from fgclip_nb.batches.examples import Drawing, clip_example
from fgclip_nb.batches.batch import collate
from fgclip_nb.batches.loading import _picture_of
from fgclip_nb.data.filters import filter_regions
from fgclip_nb.data.video_index import frame_times
from fgclip_nb.data.clips import coverage, region_presence, sample_frames
from fgclip_nb.data.inputs import clip_inputs
from fgclip_nb.data.samples import Keyframe, Region, Sample, boxes_at
from fgclip_nb.data.load import sample_path

CLIP = sample_path("video_sample").parent / "car_park.mp4"
LAST = 376  # of the car park


def box(rng):
    x, y = rng.uniform(0, 0.5, 2)
    return (x, y, x + rng.uniform(0.1, 0.5), y + rng.uniform(0.1, 0.5))


def random_track(rng, last=LAST, most=7):
    frames = np.sort(rng.choice(last + 1, int(rng.integers(1, most)), replace=False))
    return tuple(Keyframe(int(f), box(rng), bool(rng.random() < 0.6)) for f in frames)


def plain(track, frame):
    """The box of a track at a frame, or None: an enabled keyframe reaches to the next one, whatever
    it is; after a disabled one, nothing."""
    for before, k, after in zip((None, *track), track, (*track[1:], None)):
        if frame == k.frame:
            return k.bbox if k.enabled or before is not None and before.enabled else None
        if k.enabled and after is not None and k.frame < frame < after.frame:
            share = (frame - k.frame) / (after.frame - k.frame)
            return tuple(a + share * (b - a) for a, b in zip(k.bbox, after.bbox))
    return None


@pytest.mark.parametrize("seed", range(60))
def test_boxes_of_random_tracks(seed):
    rng = np.random.default_rng(seed)
    track = random_track(rng, last=int(rng.choice([6, 40, LAST])))
    frames = np.arange(-3, track[-1].frame + 4)
    boxes, visible = boxes_at(track, frames)
    for frame, got, seen in zip(frames, boxes, visible):
        right = plain(track, frame)
        assert seen == (right is not None) and got == pytest.approx(right or (0, 0, 0, 0)), (
            track,
            frame,
        )
    region = Region("x", keyframes=track)
    assert region_presence(region, 0, LAST).tolist() == [
        f for f in range(LAST + 1) if plain(track, f)
    ]


@pytest.mark.parametrize(
    "states, spans",
    [
        ("+", [(0, 0)]),
        ("-", []),
        ("+ -", [(0, 4)]),
        ("+ +", [(0, 4)]),
        ("- +", [(4, 4)]),
        ("- -", []),
        ("+ - -", [(0, 4)]),
        ("- + -", [(4, 8)]),
        ("+ - + -", [(0, 4), (8, 12)]),
        ("+ + - + +", [(0, 8), (12, 16)]),
        ("+ - +", [(0, 4), (8, 8)]),
    ],
)
def test_every_order_of_keyframes(states, spans):
    """Keyframes at frames 0, 4, 8, …: + enabled, - disabled; visible are `spans`, both ends
    included, and nothing else."""
    track = [Keyframe(4 * i, (0, 0, 1, 1), state == "+") for i, state in enumerate(states.split())]
    frames = range(-2, 4 * len(track) + 2)
    assert boxes_at(track, frames)[1].tolist() == [
        any(a <= f <= b for a, b in spans) for f in frames
    ]


def random_sample(rng):
    spans = [(int(a), int(b)) for a, b in np.sort(rng.integers(0, LAST + 1, (2, 2)))]
    regions = [Region(f"region {i}", keyframes=random_track(rng), id=str(i)) for i in range(5)]
    regions += [Region(f"span {s}", span=s, id=str(s)) for s in spans] + [
        Region("everything", id="e")
    ]
    return Sample("s", str(CLIP), "video", regions=regions)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("source", ["boxes", "span"])
def test_clip_filter_batch_and_picture_agree(seed, source):
    rng = np.random.default_rng(seed)
    sample = random_sample(rng)
    got = clip_inputs(
        sample, num_frames=9, size=16, region_source=source, rng=np.random.default_rng(seed)
    )

    def plain_box(region, frame):
        if region.keyframes:
            return plain(region.keyframes, frame)
        inside = not region.span or region.span[0] <= frame <= region.span[1]
        return (0, 0, 1, 1) if inside else None

    right = {r.id: [plain_box(r, f) for f in got.numbers] for r in sample.regions}
    shown = {i for i, boxes in right.items() if any(boxes)}
    # the masks and boxes of the clip
    assert {r.id for r in got.regions} == shown and len(got.rejects) == len(sample.regions) - len(
        shown
    )
    for region, boxes, visible in zip(got.regions, got.boxes, got.visible):
        assert (
            visible.tolist() == [b is not None for b in right[region.id]]
            and not boxes[~visible].any()
        )
        wanted = (
            right[region.id]
            if source == "boxes"
            else [b and (0, 0, 1, 1) for b in right[region.id]]
        )
        assert np.allclose(boxes[visible], [b for b in wanted if b], atol=1e-6)
    # the filter, given the frames of this clip
    kept, rejects = filter_regions([sample], frames=lambda s: got.numbers)
    assert {r.id for r in kept[0].regions} == shown and {r.rule for r in rejects} <= {
        "never_visible"
    }
    # what the evenly spread frames hit
    spread = got.numbers[got.in_clip]
    hit = [
        any(plain(r.keyframes, f) for f in spread)
        if r.keyframes
        else any(not r.span or r.span[0] <= f <= r.span[1] for f in spread)
        for r in sample.regions
    ]
    assert got.coverage == pytest.approx(np.mean(hit))
    # the tensors of a step
    example = clip_example(
        sample,
        Drawing(16, most=99, num_frames=9, region_source=source),
        np.random.default_rng(seed),
    )
    batch = collate([example])
    region_rows, frame_rows = np.nonzero(got.visible)
    assert np.allclose(batch.boxes, got.boxes[got.visible])
    assert (
        batch.box_image.tolist() == frame_rows.tolist()
        and batch.box_region.tolist() == region_rows.tolist()
    )


def test_a_picture_shows_only_what_is_visible_in_it():
    rng = np.random.default_rng(7)
    for _ in range(4):
        sample = random_sample(rng)
        sample.regions = [r for r in sample.regions if r.keyframes]
        drawn = _picture_of(sample)[1]
        frames = [
            f
            for f in range(LAST + 1)
            if {tuple(np.round(b, 6)) for _, b in drawn}
            == {
                tuple(np.round(plain(r.keyframes, f), 6))
                for r in sample.regions
                if plain(r.keyframes, f)
            }
        ]
        assert frames and (
            drawn
            or not any(plain(r.keyframes, k.frame) for r in sample.regions for k in r.keyframes)
        )


def test_a_lone_keyframe_needs_its_own_frame():
    """Ten spread frames miss a track of one keyframe; with its own span's frames it is found on
    exactly that one."""
    lone = Region("a lone keyframe", keyframes=(Keyframe(100, (0, 0, 0.5, 0.5)),))
    sample = Sample("s", str(CLIP), "video", regions=[lone])
    assert 100 not in sample_frames(LAST + 1, 10)
    missed, hit = (
        clip_inputs(sample, 10, 16, region_source=source) for source in ("boxes", "span")
    )
    assert (len(missed.regions), missed.rejects[0].rule, missed.coverage) == (0, "never_visible", 0)
    assert (
        hit.numbers[hit.visible[0]].tolist() == [100]
        and hit.coverage == 0
        and not hit.in_clip[hit.numbers == 100].any()
    )


def test_late_spans_are_hit_where_the_first_frames_see_none():
    """Regions at frames 816 and 1912 of a clip: 256 frames over the whole of it find both, its
    first 512 frames neither."""
    spans = [(816, 900), (1912, 1990)]
    assert coverage(spans, sample_frames(2000, 256)) == 1 and coverage(spans, range(512)) == 0
    for seed in range(20):
        assert coverage(spans, sample_frames(2000, 256, np.random.default_rng(seed))) == 1


def test_a_normal_clip_is_seen_whole_within_its_own_span():
    "No blank picture: real frames of the span asked for, the whole of each, in all of them."
    normal = Sample(
        "n",
        str(CLIP),
        "video",
        label="Normal",
        span=(2.0, 6.0),
        regions=[Region("an ordinary scene")],
    )
    for source in ("boxes", "span"):
        got = clip_inputs(normal, 8, 16, region_source=source)
        assert (
            got.visible.all()
            and (got.boxes == [0, 0, 1, 1]).all()
            and got.coverage == 1
            and not got.rejects
        )
        assert (
            got.frames.std(axis=(1, 2, 3)).min() > 5
            and 0 <= got.times.min()
            and got.times.max() <= 1
        )
        seconds = frame_times(CLIP)[got.numbers]
        assert 2 <= seconds.min() < 2.5 and 5.5 < seconds.max() < 6
        assert filter_regions([normal], frames=lambda s, got=got: got.numbers)[1] == []
