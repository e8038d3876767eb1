"""Whole files in many containers and codecs against a full decode: a matrix, and damage, that
would drown the notebook."""

from fractions import Fraction

import numpy as np
import pytest

from fgclip_nb.core.identity import DataError
from fgclip_nb.data.video import read_counted, read_frames
from fgclip_nb.data.video_index import frame_times, video_info

av = pytest.importorskip("av")
av.logging.set_level(av.logging.PANIC)
FRAMES = 90


def numbered(i):
    "128 x 64 picture that carries `i` as twelve squares."
    picture = np.full((64, 128, 3), 90, np.uint8)
    picture[32:, :, 0] = i * 7 % 200
    for bit in range(12):
        picture[4:28, 4 + bit * 10 : 12 + bit * 10] = 255 * (i >> bit & 1)
    return picture


def number_in(picture):
    return sum(
        1 << bit for bit in range(12) if picture[10:22, 6 + bit * 10 : 10 + bit * 10].mean() > 128
    )


def encode(
    path,
    codec="libx264",
    options=None,
    pts=None,
    base=Fraction(1, 1000),
    pix="yuv420p",
    frames=FRAMES,
    rotation=0,
    container_options=None,
):
    "A clip of numbered pictures; `pts` in units of `base`, every 40 ms unless given."
    pts = [round(i / 25 / base) for i in range(frames)] if pts is None else pts
    with av.open(str(path), "w", options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 64, pix
        stream.time_base = stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        for i, t in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = int(t), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def decode_all(path):
    with av.open(str(path)) as clip:
        return np.stack(
            [f.to_ndarray(format="rgb24") for f in clip.decode(clip.streams.best("video"))]
        )


TICK = Fraction(1, 25)
UNEVEN = np.cumsum(np.random.default_rng(0).integers(3, 200, FRAMES)).tolist()
X264 = {"g": "20", "bf": "3"}
CLIPS = {
    "mp4 with B-frames": ("a.mp4", dict(options=X264)),
    "mp4, one group": ("a.mp4", dict(options={"g": "500"})),
    "mp4, key frames only": ("a.mp4", dict(options={"g": "1"})),
    "mp4, uneven rate": ("a.mp4", dict(options=X264, pts=UNEVEN)),
    "mp4, edit list hides a second": (
        "a.mp4",
        dict(options=X264, pts=[i * 40 - 1000 for i in range(FRAMES)]),
    ),
    "mp4, starts late": ("a.mp4", dict(options=X264, pts=[i * 40 + 7000 for i in range(FRAMES)])),
    "mp4, fragmented": (
        "a.mp4",
        dict(options=X264, container_options={"movflags": "frag_keyframe+empty_moov"}),
    ),
    "mp4, pyramid and open groups": (
        "a.mp4",
        dict(options={"x264-params": "keyint=20:bframes=5:b-pyramid=normal:open-gop=1:scenecut=0"}),
    ),
    "mkv": ("a.mkv", dict(options=X264)),
    "mkv, uneven rate": ("a.mkv", dict(options=X264, pts=UNEVEN)),
    "mkv, open groups": (
        "a.mkv",
        dict(options={"x264-params": "keyint=20:bframes=3:open-gop=1:scenecut=0"}),
    ),
    "mpeg-ts": ("a.ts", dict(options=X264)),
    "mpeg-ts, open groups": (
        "a.ts",
        dict(options={"x264-params": "keyint=20:bframes=3:open-gop=1:scenecut=0"}),
    ),
    "intra refresh": (
        "a.mp4",
        dict(options={"x264-params": "keyint=20:intra-refresh=1:bframes=0"}),
    ),
    "H.264 in avi": ("a.avi", dict(options=X264)),
    "MPEG-4 in avi": ("a.avi", dict(codec="mpeg4", options={"g": "12", "bf": "2"}, base=TICK)),
    "motion JPEG": ("a.avi", dict(codec="mjpeg", pix="yuvj420p", base=TICK)),
    "HEVC": ("a.mp4", dict(codec="libx265", options={"x265-params": "keyint=20:log-level=none"})),
    "HEVC, open groups": (
        "a.mkv",
        dict(codec="libx265", options={"x265-params": "keyint=20:open-gop=1:log-level=none"}),
    ),
    "VP9": (
        "a.webm",
        dict(codec="libvpx-vp9", options={"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    ),
    "MPEG-2": ("a.ts", dict(codec="mpeg2video", options={"g": "12", "bf": "2"}, base=TICK)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_equal_a_full_decode(name, tmp_path):
    file, options = CLIPS[name]
    if options.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this PyAV has no {options['codec']}")
    clip = encode(tmp_path / file, **options)
    everything = decode_all(clip)
    info = video_info(clip)
    assert info.frames == len(everything) == len(frame_times(clip))
    numbers = [number_in(p) for p in everything]
    assert numbers == list(
        range(numbers[0], numbers[0] + len(numbers))
    )  # the full decode itself is in order
    rng = np.random.default_rng(0)
    picks = [[0], [info.frames - 1], rng.integers(0, info.frames, 7).tolist(), range(info.frames)]
    for pick in picks + [[i] for i in range(0, info.frames, 9)]:
        got, decoded = read_counted(clip, pick)
        assert np.array_equal(got, everything[list(pick)]), (
            name,
            list(pick),
            [number_in(p) for p in got],
        )
        assert decoded <= 2 * info.frames + 40


def test_only_the_needed_groups_are_decoded(tmp_path):
    clip = encode(tmp_path / "a.mp4", options={"g": "10", "bf": "0", "refs": "1"})
    assert read_counted(clip, [0])[1] == 1
    assert read_counted(clip, [13])[1] == 4  # 10, 11, 12, 13
    assert read_counted(clip, [13, 55])[1] == 10
    assert read_counted(clip, [80, 80, 80])[1] == 1


def test_a_phone_held_upright(tmp_path):
    clip = encode(tmp_path / "a.mp4", options=X264, rotation=90)
    upright = np.rot90(decode_all(clip), 1, axes=(1, 2))
    info = video_info(clip)
    assert (info.width, info.height) == (64, 128)
    assert np.array_equal(read_frames(clip, [4, 2]), upright[[4, 2]])
    assert read_frames(clip, [4, 2], size=32).shape == (2, 32, 32, 3)


def cut(source, target, share):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def test_files_cut_off(tmp_path):
    late = encode(tmp_path / "late.mp4", options=X264)
    early = encode(
        tmp_path / "early.mp4", options=X264, container_options={"movflags": "faststart"}
    )
    mkv = encode(tmp_path / "a.mkv", options=X264)
    for share in (0.1, 0.5, 0.9):
        for source in (late, early, mkv):
            broken = cut(source, tmp_path / f"cut_{share}_{source.name}", share)
            if source is mkv and share == 0.9:
                continue  # less than a second is missing
            with pytest.raises(DataError, match=broken.name):
                video_info(broken)


def test_damage_is_refused_or_harmless(tmp_path):
    "Bytes flipped in the pictures: a frame is either refused or equal to what it was."
    clip = encode(tmp_path / "a.mp4", options=X264, container_options={"movflags": "faststart"})
    everything, data = decode_all(clip), bytearray(clip.read_bytes())
    start, rng, refused = data.find(b"mdat") + 800, np.random.default_rng(1), 0
    for trial in range(12):
        broken = bytearray(data)
        for i in rng.integers(start, len(data), 3):
            broken[i] ^= 0xFF
        path = tmp_path / f"damaged_{trial}.mp4"
        path.write_bytes(broken)
        for number in (19, 50, 88):
            try:
                same = np.array_equal(read_frames(path, [number])[0], everything[number])
                assert same or number_in(read_frames(path, [number])[0]) == number
            except DataError as e:
                assert path.name in str(e)
                refused += 1
    assert refused > 5


def test_not_a_clip(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    reasons = {
        "empty.mp4": "empty",
        "text.mp4": "cannot be read",
        "sound.mp4": "no video stream",
        "absent.mp4": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"{name}.*{reason}"):
            video_info(tmp_path / name)


def test_unknown_codec(tmp_path):
    clip = encode(tmp_path / "a.mp4", options=X264)
    clip.write_bytes(clip.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(DataError, match="a.mp4"):
        read_frames(clip, [0])


def test_too_large(tmp_path, monkeypatch):
    clip = encode(tmp_path / "a.mp4", options=X264)
    monkeypatch.setattr("fgclip_nb.data.video.MAX_CLIP_BYTES", 100_000)
    with pytest.raises(DataError, match="a.mp4: 9 frames would take"):
        read_frames(clip, range(9))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    video_info.__globals__["index_of_file"].cache_clear()
    with pytest.raises(DataError, match="128 x 64 pixels"):
        read_frames(clip, [0])


def test_a_file_that_changes_is_read_anew(tmp_path):
    clip = encode(tmp_path / "a.mp4", options=X264)
    assert video_info(clip).frames == FRAMES
    encode(clip, options=X264, frames=31)
    assert video_info(clip).frames == 31
