"""What a fourth attack found: clips that lost frames without a word, parameters that count twice,
logs that swallow their rows, damaged folders of `datasets`."""

import numpy as np
import pytest
from fgclip_nb.core.identity import DataError
from fgclip_nb.data.video_index import clip_index, video_info
from fgclip_nb.data.video import read_frames

FRAMES = 40


def coded(path, codec="libx264", times=range(FRAMES), group=10, options=None, container=None):
    "A clip of even grey pictures, 6 lighter each; `times`: when each is shown, in 25ths."
    import av

    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.gop_size = 64, 48, group
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number, time in enumerate(times):
            picture = np.full((48, 64, 3), number * 6, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


KINDS = {"a.mp4": "libx264", "a.mkv": "libx264", "a.ts": "libx264", "a.avi": "mpeg4"}
KINDS |= {"a.webm": "libvpx", "a.flv": "flv", "a.mpg": "mpeg2video"}


def outcome(path, whole) -> str:
    "What became of a damaged clip: refused, told, the same, or (silent) another number of frames."
    try:
        info = video_info(path)
        if info.doubt:
            return "told"
        return "same" if abs(info.frames - whole) < 1 else "silent"
    except DataError:
        return "refused"


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_clip_does_not_lose_frames_in_silence(tmp_path, name):
    import av

    if KINDS[name] not in av.codecs_available:
        pytest.skip(f"this PyAV has no {KINDS[name]}")
    clip = coded(tmp_path / name, KINDS[name])
    assert (video_info(clip).frames, video_info(clip).doubt) == (FRAMES, "")
    good, rng, seen = clip.read_bytes(), np.random.default_rng(5), []
    for trial in range(60):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        path = tmp_path / f"{trial}_{name}"
        path.write_bytes(damaged)
        seen.append(outcome(path, FRAMES))
    assert "silent" not in seen, seen
    assert {"refused", "told"} & set(seen) and "same" in seen


def without_its_first_key_frame(path, target):
    "A copy of a TS or MKV clip that begins behind its first key frame."
    import av

    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and packet.pts != source.streams.video[0].start_time:
                packet.stream = stream
                out.mux(packet)
    return target


@pytest.mark.parametrize("ending", ["ts", "mkv"])
def test_a_lost_beginning_is_refused_with_its_length(tmp_path, ending):
    clip = coded(tmp_path / f"a.{ending}", options={"bf": "0"})
    cut = without_its_first_key_frame(clip, tmp_path / f"cut.{ending}")
    with pytest.raises(DataError, match=f"cut.{ending}.*first 9 of 39 frames cannot be decoded"):
        video_info(cut)


def cut_at_an_open_group(tmp_path):
    "A clip that begins with a key frame whose leading frames lean on what was cut away."
    import av

    params = "keyint=20:bframes=3:open-gop=1:scenecut=0:b-adapt=0"
    whole = coded(tmp_path / "open.ts", group=20, options={"x264-params": params})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.ts"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        keys = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe and packet.size > 0
            if packet.size and keys > 1:
                packet.stream = stream
                out.mux(packet)
    return tmp_path / "cut.ts"


def test_an_honest_cut_at_an_open_group_is_read_and_told(tmp_path):
    import av

    clip = cut_at_an_open_group(tmp_path)
    with av.open(str(clip)) as container:
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    info = video_info(clip)
    assert "before its first key frame cannot be decoded" in info.doubt
    assert info.frames <= len(shown)
    assert np.array_equal(read_frames(clip, [0, info.frames - 1]), [shown[-info.frames], shown[-1]])


def test_a_dropped_frame_is_told_and_a_long_pause_refused(tmp_path):
    from fgclip_nb.data.filters import check_media
    from fgclip_nb.data.samples import Sample

    uneven = np.cumsum(np.random.default_rng(0).integers(1, 6, FRAMES)).tolist()
    assert video_info(coded(tmp_path / "uneven.mkv", times=uneven)).doubt == ""
    dropped = coded(tmp_path / "dropped.mkv", times=[t + (t > 17) for t in range(FRAMES)])
    assert "1 frames seem to be missing, the first behind frame 17" in video_info(dropped).doubt
    kept, rejects = check_media([Sample("a", str(dropped), kind="video")])
    assert len(kept) == 1 and not rejects
    assert [c.rule for c in kept.changes] == ["doubtful_frames"]
    pause = coded(tmp_path / "pause.mkv", times=[t + 10**7 * (t > 19) for t in range(FRAMES)])
    with pytest.raises(DataError, match="a pause of 400,000 s between frames 19 and 20"):
        video_info(pause)
    lapse = coded(tmp_path / "lapse.mkv", times=[t * 10**5 for t in range(4)])
    assert video_info(lapse).frames == 4  # a frame an hour is slow, and no pause


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_picture_named_as_a_clip_is_called_one(tmp_path, kind):
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.mp4", kind)
    with pytest.raises(DataError, match=rf"photo.mp4.*it is a still picture \({kind}\)"):
        clip_index(tmp_path / "photo.mp4")


def test_a_gif_that_was_cut_off_is_refused(tmp_path):
    clip = coded(tmp_path / "a.gif", "gif")
    assert video_info(clip).frames == FRAMES
    (tmp_path / "cut.gif").write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match="cut.gif.*cut off"):
        video_info(tmp_path / "cut.gif")


def test_h264_in_avi_keeps_its_rate(tmp_path):
    clip = coded(tmp_path / "a.avi", options={"bf": "3"})
    assert video_info(clip).fps == pytest.approx(25, rel=0.02)
