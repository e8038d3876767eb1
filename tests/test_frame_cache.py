"""The frame cache under real kills and concurrent writers: processes, which no cell can show."""

import os, random, signal, subprocess, sys, time

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")
from fgclip_nb.core.identity import DataError
from fgclip_nb.data.video import read_frames
from fgclip_nb.data.video_index import video_info
from fgclip_nb.data.frame_cache import FrameCache, build_cache, cache_clip, needed_frames
from fgclip_nb.data.load import load_samples, sample_path

SIZE, FRAMES = 32, 24
BUILD = [sys.executable, "-m", "fgclip_nb.data", "cache", "video_sample"]


def build(folder, frames=FRAMES, encoding="raw"):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        BUILD + [str(folder), "--size", str(SIZE), "--frames", str(frames), "--encoding", encoding],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def clips():
    return [
        str(sample_path("video_sample").parent / name) for name in ("car_park.mp4", "visitors.mp4")
    ]


@pytest.fixture(scope="module")
def truth():
    "Every frame of both clips, decoded in one go."
    return {path: read_frames(path, range(video_info(path).frames), SIZE) for path in clips()}


def check(folder, truth):
    "Whatever is in the folder is right; returns how many clips are there."
    cache, there = FrameCache(folder, SIZE, "raw"), 0
    for path, frames in truth.items():
        clip = cache.get(path)
        if clip is not None:
            assert np.array_equal(clip.read(clip.frames), frames[clip.frames])
            there += 1
    return there


def test_kills_at_random_moments_leave_no_wrong_frame(tmp_path, truth):
    rng, killed, torn = random.Random(0), 0, 0
    for trial in range(7):
        process = build(
            tmp_path / "cache", frames=FRAMES + 8 * trial
        )  # each run asks for more, so each has something to write
        process.stdout.readline()  # the imports are over
        deadline = time.monotonic() + 5
        while (
            not list((tmp_path / "cache").glob(".*.tmp"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        torn += bool(list((tmp_path / "cache").glob(".*.tmp")))
        check(tmp_path / "cache", truth)
    print(f"{killed} of 7 killed, {torn} in the middle of a file")
    assert killed >= 3 and torn >= 1, "the kills came at the wrong time to prove anything"
    last = build(tmp_path / "cache", frames=FRAMES)
    out = last.communicate(timeout=60)[0]
    assert last.returncode == 0 and check(tmp_path / "cache", truth) == 2, out
    assert not list((tmp_path / "cache").glob(".*.tmp")), "what killed builders left is swept"


def test_two_builders_at_once(tmp_path, truth):
    both = [build(tmp_path / "cache", frames=f) for f in (16, 24)]
    outputs = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert check(tmp_path / "cache", truth) == 2 and not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_second_run_decodes_nothing(tmp_path):
    samples, cache, lines = load_samples("video_sample")[0], FrameCache(tmp_path, SIZE), []
    build_cache(cache, samples, 8, say=lines.append)
    assert (
        all("decoded" in line for line in lines[:2]) and "2 clips" in lines[2] and "MiB" in lines[2]
    )
    changed = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.arrow")}
    again = []
    build_cache(cache, samples, 8, say=again.append)
    assert all("already there" in line for line in again[:2])
    assert changed == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.arrow")}


def test_every_sample_finds_its_frames(tmp_path):
    samples = load_samples("video_sample")[0]
    needed = needed_frames(samples, 8)
    assert sum(len(v) for v in needed.values()) == 8 * len(samples)
    everything = needed_frames(samples, 0)
    assert [len(everything[p]) for p in clips()] == [377, 1394]


def test_unreadable_clips_are_rejected_and_the_rest_is_cached(tmp_path):
    samples = load_samples("video_sample")[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no clip")
    samples[3].media = str(broken)
    lines = []
    rejects = build_cache(FrameCache(tmp_path / "cache", SIZE), samples, 4, say=lines.append)
    assert [path for path, _ in rejects] == [str(broken)] and "broken.mp4" in rejects[0][1]
    assert "2 clips" in lines[-1] and "1 rejected" in lines[-1]


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    cache, path = FrameCache(tmp_path, SIZE, "raw"), clips()[0]
    cache_clip(cache, path, [1, 2])
    before = cache.file(path).read_bytes()

    def fail(*args):
        raise DataError("decoder gave up")

    monkeypatch.setattr("fgclip_nb.data.frame_cache._encode", fail)
    with pytest.raises(DataError, match="gave up"):
        cache_clip(cache, path, [1, 2, 3])
    assert cache.file(path).read_bytes() == before and list(tmp_path.iterdir()) == [
        cache.file(path)
    ]


def test_geometry_and_encoding_are_part_of_the_key(tmp_path):
    path = clips()[0]
    files = {
        FrameCache(tmp_path, s, e, q).file(path).name
        for s in (32, 64)
        for e in ("raw", "jpeg")
        for q in (90, 95)
    }
    assert len(files) == 6  # raw knows no quality
