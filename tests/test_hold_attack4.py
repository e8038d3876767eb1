"""What a fourth attack found: clips that lost frames without a word, parameters that count twice,
logs that swallow their rows, damaged folders of `datasets`."""

import numpy as np
import pytest
from fgclip_nb.core.identity import ConfigError, DataError
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


@pytest.mark.parametrize("data", ["world:noise=0.5:noise=0.1", "world_video:size=9:size=8"])
def test_an_option_given_twice_is_refused(data):
    from fgclip_nb.data.load import load_samples

    with pytest.raises(ConfigError, match="is given twice"):
        load_samples(data)


def test_columns_that_nobody_reads_are_told(capsys):
    from fgclip_nb.data.load import load_samples

    for wrong in ("==,==", "image=a,image=b", "image==a"):
        with pytest.raises(ConfigError, match="columns"):
            load_samples("sample", columns=wrong)
    load_samples("sample", columns="image=img")
    assert "`columns` = 'image=img' is not used" in capsys.readouterr().out


def test_a_frame_cache_that_was_never_filled_is_told(tmp_path, capsys):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.rundata import chosen_samples

    for folder in ("/nowhere", str(tmp_path)):
        chosen_samples(TrainConfig(frame_cache=folder))
        assert f"`frame_cache` = '{folder}' holds no cached frames" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="`frame_cache` = '/dev/null' is no folder"):
        chosen_samples(TrainConfig(frame_cache="/dev/null"))


def lines_of_log(form) -> list:
    return [form(k, 1 / k) for k in range(1, 30)]


def test_an_open_quote_costs_its_own_row_and_is_told(tmp_path, capsys):
    from fgclip_nb.diagnostics.judgement import evidence

    lines = ["step,loss,note", *lines_of_log(lambda k, x: f'{k},{x},"a ""b"", c"')]
    lines[9] = '9,0.5,"never closed'
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert len(evidence(tmp_path / "a.csv").frame) == 28
    assert "line 10 has a quote that is not closed" in capsys.readouterr().out


def test_torn_records_are_told(tmp_path, capsys):
    from fgclip_nb.diagnostics.judgement import evidence

    lines = lines_of_log(lambda k, x: f'{{"step": {k}, "loss": {x}}}')
    lines[8], lines[9] = lines[8][:9], "half a line"
    lines[-1] = lines[-1][:7]  # the last may be torn: the run is still writing
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(evidence(tmp_path / "a.jsonl").frame) == 26
    assert "line 9 is no record; 2 such lines are left out" in capsys.readouterr().out


def test_an_event_file_that_breaks_off_is_told(tmp_path, capsys):
    from fgclip_nb.diagnostics.board import Board
    from fgclip_nb.diagnostics.judgement import evidence

    board = Board(tmp_path / "events")
    for step in range(1, 30):
        board.scalars(dict(step=step, loss=1 / step))
    board.close()
    (file,) = (tmp_path / "events").iterdir()
    evidence(file)
    assert "breaks off" not in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert 5 < len(evidence(file).frame) < 29
    assert "breaks off at byte" in capsys.readouterr().out


@pytest.mark.ci
def test_a_row_that_holds_a_whole_group_is_not_unpacked(tmp_path):
    "One row of 17 million texts of a kilobyte, of which there are eight: 16 GiB as plain texts."
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fgclip_nb.data.load import load_samples

    many = 17_000_000
    texts = pa.array([letter * 1000 for letter in "abcdefgh"])
    which = pa.array(np.random.default_rng(0).integers(0, 8, many, dtype=np.int32))
    values = pa.DictionaryArray.from_arrays(which, texts)
    rows = pa.ListArray.from_arrays(pa.array([0] + [many] * 40, pa.int32()), values)
    names = pa.array([f"{k}.jpg" for k in range(40)])
    table = pa.table(dict(image=names, caption=names, captions=rows))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10**9, store_schema=False)
    before = pa.default_memory_pool().max_memory()
    rejects = load_samples(tmp_path / "a.parquet", missing="keep")[1]
    assert rejects[0].rule == "too_large"
    assert pa.default_memory_pool().max_memory() < before + (1 << 30)


@pytest.mark.parametrize("segment", [10**12, -1])
def test_a_strange_segment_is_a_sentence(segment):
    from fgclip_nb.evaluation.annotations import to_frames

    with pytest.raises(ConfigError, match="segment"):
        to_frames(np.ones(4), segment=segment)


@pytest.mark.parametrize("window", [10**10, -1])
def test_a_strange_smoothing_is_a_sentence(window):
    from fgclip_nb.evaluation.annotations import smooth

    with pytest.raises(ConfigError, match="smoothing"):
        smooth(np.arange(4.0), window)


@pytest.mark.ci
def test_a_flipped_bit_of_a_folder_of_datasets_is_told(tmp_path):
    "Offsets that lead out of the file ended the process; the others were raw errors."
    import os
    import shutil
    import datasets
    from fgclip_nb.data.stream import open_stream

    folder = tmp_path / "set"
    rows = [dict(image=f"{k}.jpg", caption=f"a photo of thing {k} here") for k in range(12)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    file = next(folder.glob("*.arrow"))
    good, seen = file.read_bytes(), []
    for place in range(8, len(good), max(1, len(good) // 60)):
        damaged = good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :]
        file.unlink()
        file.write_bytes(damaged)
        shutil.rmtree(folder / ".fgclip_nb", ignore_errors=True)
        child = os.fork()
        if not child:
            try:
                open_stream(str(folder), processes=1)[0][:]
                os._exit(0)
            except DataError as e:
                os._exit(1 if str(folder) in str(e) else 3)
            except BaseException:
                os._exit(2)
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert set(seen) <= {0, 1} and 1 in seen, seen
