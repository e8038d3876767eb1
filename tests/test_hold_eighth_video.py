"""What an eighth attack found: sound clips of a variable frame rate that were called cut off.

No cell, since it crosses many containers, encoders and courses of time with ways to lose bytes."""

import numpy as np
import pytest
from fgclip_nb.core.identity import DataError
from fgclip_nb.data.video import read_frames
from fgclip_nb.data.video_index import frame_times, video_info

FRAMES = 40
TIMES = dict(  # in 25ths of a second
    even=range(FRAMES),
    slower=[t if t < 20 else 20 + (t - 20) * 5 for t in range(FRAMES)],
    slow_end=[t if t < 35 else 35 + (t - 35) * 20 for t in range(FRAMES)],
    slow_start=[t * 20 if t < 5 else 80 + t for t in range(FRAMES)],
    still_end=[t + 250 * (t == FRAMES - 1) for t in range(FRAMES)],
    uneven=np.cumsum(np.random.default_rng(0).choice([1, 1, 1, 2, 5], FRAMES)).tolist(),
    late=[t + 500 for t in range(FRAMES)],
    one=[0],
)
B8 = {"x264-params": "bframes=8:b-adapt=0:b-pyramid=normal:scenecut=0:ref=4"}
FORMS = {  # (ending, encoder, its options, those of the container)
    "mp4": (".mp4", "libx264", {}, {}),
    "mp4, no B-frames": (".mp4", "libx264", {"bf": "0"}, {}),
    "mp4, many B-frames": (".mp4", "libx264", B8, {}),
    "mp4, H.265": (".mp4", "libx265", {"x265-params": "log-level=none"}, {}),
    "mp4, MPEG-4": (".mp4", "mpeg4", {"bf": "2"}, {}),
    "mp4, index first": (".mp4", "libx264", {}, {"movflags": "faststart"}),
    "mp4, no edit list": (".mp4", "libx264", {}, {"use_editlist": "0"}),
    "mp4, negative offsets": (".mp4", "libx264", {}, {"movflags": "negative_cts_offsets"}),
    "mp4, fragments": (".mp4", "libx264", {}, {"movflags": "frag_keyframe+empty_moov"}),
    "mov": (".mov", "libx264", {}, {}),
    "mkv": (".mkv", "libx264", {}, {}),
    "mkv, live": (".mkv", "libx264", {}, {"live": "1"}),
    "webm": (".webm", "libvpx", {}, {}),
    "ts": (".ts", "libx264", {}, {}),
}


def coded(path, times, codec="libx264", options=None, container=None):
    "A clip of noisy pictures, each a little lighter; `times`: when each is shown, in 25ths."
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    rng = np.random.default_rng(3)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.gop_size = 12
        for number, time in enumerate(times):
            picture = rng.integers(0, 60, (64, 96, 3), np.uint8) + np.uint8(number * 4)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = int(time)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def form_of(folder, form, course):
    ending, codec, options, container = FORMS[form]
    return coded(folder / f"{course}{ending}", TIMES[course], codec, options, container)


def decoded_frames(path) -> list:
    "The times of all frames as a decoder returns them (s)."
    import av

    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_clip_is_accepted_whatever_its_rate(tmp_path, form):
    for course in TIMES:
        if (form, course) == ("mp4, H.265", "one"):
            continue  # x265 gives a single frame a time of chance: not every try can be written
        clip = form_of(tmp_path, form, course)
        times = np.array(decoded_frames(clip))
        assert video_info(clip).frames == len(times) == len(TIMES[course]), course
        assert np.allclose(frame_times(clip), times - times[0], atol=2e-3), course


def from_second_group(source, target, back):
    "A copy without re-encoding from the second key frame on, `back` 25ths earlier."
    import av

    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as clip, av.open(str(target), "w", options=options) as out:
        video = clip.streams.video[0]
        stream, keys = out.add_stream_from_template(video), 0
        for packet in clip.demux(video):
            keys += packet.is_keyframe and packet.size > 0
            if packet.size and keys > 1:
                packet.pts -= int(back / 25 / video.time_base)
                packet.dts -= int(back / 25 / video.time_base)
                packet.stream = stream
                out.mux(packet)
    return target


@pytest.mark.parametrize("course", ["even", "slower", "slow_end"])
def test_a_clip_trimmed_by_its_edit_list_is_accepted(tmp_path, course):
    whole = form_of(tmp_path, "mp4", course)
    for back, frames in ((12, 28), (15, 25)):  # 15: an edit list hides three frames
        trimmed = from_second_group(whole, tmp_path / f"{back}.mp4", back)
        assert video_info(trimmed).frames == len(decoded_frames(trimmed)) == frames


def test_what_stands_behind_a_whole_clip_is_no_damage(tmp_path):
    for form in ("mp4", "mkv"):
        clip = form_of(tmp_path, form, "slow_end")
        clip.write_bytes(clip.read_bytes() + b"the maker's own words" + bytes(999))
        assert video_info(clip).frames == FRAMES


WITH_BYTES = ["mp4", "mp4, no B-frames", "mp4, index first", "mp4, no edit list", "mp4, fragments"]
WITH_BYTES += ["mov", "mkv", "webm"]


@pytest.mark.parametrize("form", WITH_BYTES)
def test_a_clip_that_lost_bytes_is_refused_whatever_its_rate(tmp_path, form):
    for course in ("even", "slow_end", "uneven"):
        clip = form_of(tmp_path, form, course)
        whole, half = clip.read_bytes(), clip.stat().st_size // 2
        ends = [whole[: int(len(whole) * share)] for share in (0.3, 0.5, 0.9, 0.98)]
        middles = [whole[:half] + whole[half + lost :] for lost in (700, len(whole) // 10)]
        for place, content in enumerate(ends + middles):
            cut = tmp_path / f"{course}_{place}{clip.suffix}"
            cut.write_bytes(content)
            with pytest.raises(DataError, match="cut off|cannot be read|damaged"):
                video_info(cut)


def test_numbers_of_a_slowing_clip_are_those_of_its_frames(tmp_path):
    import av

    clip = form_of(tmp_path, "mp4, many B-frames", "slow_end")
    with av.open(str(clip)) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    chosen = [0, 17, 36, FRAMES - 1]
    assert np.array_equal(read_frames(clip, chosen), [every[number] for number in chosen])
