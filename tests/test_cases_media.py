"""Whole data sets as people have them, from their files to the pixels: Label Studio's clock, turned
photos and clips, equal file names, names in other forms. Needs files, so it is no cell."""

import json
import logging
import os
import unicodedata
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fgclip_nb.core.identity import ConfigError
from fgclip_nb.data.filters import filter_regions
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.samples import boxes_at
from fgclip_nb.data.video import read_frames

av = pytest.importorskip("av")


def put(path, value):
    "`value` as JSON in a new file."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def photo(path, color="gray", size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def square_at(second, size=(64, 48)):
    "Grey picture with a white square of 8 pixels that moves 4 pixels a second from the left."
    picture = np.full((size[1], size[0], 3), 30, np.uint8)
    x = round(4 * second)
    picture[20:28, x : x + 8] = 255
    return picture


def clip(path, milliseconds, rotation=0, size=(64, 48)):
    "A clip of `square_at` with a frame at each of these times."
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for t in milliseconds:
            frame = av.VideoFrame.from_ndarray(square_at(t / 1000, size), format="rgb24")
            frame.pts, frame.time_base = int(t), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def steady(rate, seconds=10):
    return [round(1000 * i / rate) for i in range(rate * seconds)]


# ---- Label Studio's clock (A)


def studio_track(rate, seconds, **changed):
    "The value of a videorectangle around the moving square, at `rate` frames per second from 1."
    count = round(rate * seconds)

    def keyframe(frame, enabled):
        percent = 100 * 4 * (frame - 1) / rate / 64
        box = dict(x=percent, y=100 * 20 / 48, width=12.5, height=100 * 8 / 48)
        return dict(box, frame=frame, enabled=enabled, rotation=0, time=frame / rate)

    sequence = [keyframe(1, True), keyframe(count // 2, True), keyframe(count, False)]
    fields = dict(framesCount=count, duration=seconds, labels=["a square"], sequence=sequence)
    return fields | changed


def studio_task(value, video="/data/upload/3/1f0c2a99-cam.mp4"):
    result = dict(id="r", type="videorectangle", value=value)
    return dict(data=dict(video=video), annotations=[dict(result=[result])])


def worst_distance(folder, export):
    "How far (share of the width) a read box lies from the square, over the whole clip."
    samples, rejects = load_samples(put(folder / "export.json", export))
    assert rejects == [] and filter_regions(samples)[1] == []
    path, worst = samples[0].media, 0.0
    frames = np.arange(0, len(load_times(path)) - 2, 7)
    boxes, visible = boxes_at(samples[0].regions[0].keyframes, frames)
    assert visible.all()
    for picture, box in zip(read_frames(path, frames), boxes):
        left = np.flatnonzero(picture[24].mean(-1) > 128)[0] / picture.shape[1]
        worst = max(worst, abs(left - box[0]))
    return worst


def load_times(path):
    from fgclip_nb.data.video_index import frame_times

    return frame_times(path)


@pytest.mark.parametrize("own,theirs", [(30, 24), (10, 24), (25, 25), (12, 30)])
def test_label_studios_frames_are_mapped_by_time(tmp_path, own, theirs):
    clip(tmp_path / "cam.mp4", steady(own))
    assert worst_distance(tmp_path, [studio_task(studio_track(theirs, 10))]) < 0.02


def test_label_studios_frames_in_a_clip_of_uneven_rate(tmp_path):
    times = [*range(0, 5000, 100), *range(5000, 10000, 25)]
    clip(tmp_path / "cam.mp4", times)
    assert worst_distance(tmp_path, [studio_task(studio_track(24, 10))]) < 0.02


@pytest.mark.parametrize("lost", ["duration", "framesCount", "time"])
def test_label_studio_without_one_of_its_clocks(tmp_path, lost):
    clip(tmp_path / "cam.mp4", steady(30))
    value = studio_track(24, 10)
    value.pop(lost, None)
    for keyframe in value["sequence"]:
        keyframe.pop(lost, None)
    assert worst_distance(tmp_path, [studio_task(value)]) < 0.02


def test_json_min_is_read_like_json(tmp_path):
    clip(tmp_path / "cam.mp4", steady(30))
    task = dict(id=1, video="/data/upload/3/1f0c2a99-cam.mp4", annotator=1, annotation_id=4)
    assert worst_distance(tmp_path, [dict(task, box=[studio_track(24, 10)], lead_time=3.5)]) < 0.02


def test_a_track_of_another_file_is_rejected_with_the_rate(tmp_path):
    clip(tmp_path / "cam.mp4", steady(30, 3))
    task = studio_task(studio_track(24, 10))
    samples, rejects = load_samples(put(tmp_path / "export.json", [task]))
    assert samples[0].regions == [] and [r.rule for r in rejects] == ["beyond_end"]
    assert "24.00 frames per second" in rejects[0].reason and rejects[0].entry == "[0]"


def studio_photo(angle, **more):
    value = dict(x=50, y=25, width=25, height=25, rotation=angle, rectanglelabels=["a bar"])
    result = dict(id="r", type="rectanglelabels", value=value, **more)
    return dict(
        data=dict(image="/data/upload/1/aabbccdd-bar.png"), annotations=[dict(result=[result])]
    )


@pytest.mark.parametrize("angle", [0, 30, 90, 180, 200, 345])
def test_a_turned_rectangle_is_the_box_around_it(tmp_path, angle):
    size, corners = np.array([200, 80]), [(0, 0), (50, 0), (50, 20), (0, 20)]
    radians = np.deg2rad(angle)
    turn = np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
    points = np.array([turn @ c for c in corners]) + (100, 20)
    photo(tmp_path / "bar.png", size=tuple(map(int, size)))
    task = studio_photo(angle, original_width=200, original_height=80)
    flat = dict(image=task["data"]["image"], label=[])
    result = task["annotations"][0]["result"][0]
    flat["label"].append(result["value"] | dict(original_width=200, original_height=80))
    for export in ([task], [dict(flat, annotation_id=1, lead_time=2.0)]):
        samples, rejects = load_samples(put(tmp_path / "export.json", export))
        want = np.concatenate([points.min(0) / size, points.max(0) / size])
        assert rejects == [] and samples[0].regions[0].box == pytest.approx(want)
        assert (samples[0].kind, samples[0].regions[0].phrase) == ("image", "a bar")


def test_a_turned_rectangle_without_a_size_is_rejected(tmp_path):
    photo(tmp_path / "bar.png")
    samples, rejects = load_samples(put(tmp_path / "export.json", [studio_photo(30)]))
    assert samples[0].regions == [] and "needs the width and height" in rejects[0].reason


def test_other_shapes_are_rejected_by_name(tmp_path):
    photo(tmp_path / "bar.png")
    task = studio_photo(0)
    outline = dict(id="p", type="polygonlabels", value=dict(points=[[1, 2]], polygonlabels=["x"]))
    task["annotations"][0]["result"].append(outline)
    samples, rejects = load_samples(put(tmp_path / "export.json", [task]))
    assert len(samples[0].regions) == 1 and "polygonlabels" in rejects[0].reason


# ---- identity is the media path (E)


def coco(names, category, box=(4, 4, 20, 20), size=(64, 48)):
    images = [dict(id=i, file_name=n, width=size[0], height=size[1]) for i, n in enumerate(names)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=box) for i in range(len(names))]
    return dict(images=images, annotations=boxes, categories=[dict(id=1, name=category)])


def exports(folder, parts, write):
    "An export for each part with three photos of the same names."
    for part, category in parts.items():
        for i in range(3):
            photo(folder / part / f"frame_{i:06d}.png")
        put(
            folder / part / "_annotations.json",
            write([f"frame_{i:06d}.png" for i in range(3)], category),
        )
    return folder


def phrases_by_folder(samples):
    return sorted(
        (os.path.basename(os.path.dirname(s.media)), *(r.phrase for r in s.regions))
        for s in samples
    )


def test_equal_names_in_two_coco_exports_are_two_photos(tmp_path):
    folder = exports(tmp_path / "export", dict(train="car", valid="dog"), coco)
    samples, rejects = load_samples(folder)
    want = [("train", "a car")] * 3 + [("valid", "a dog")] * 3
    assert rejects == [] and phrases_by_folder(samples) == want
    assert len({s.id for s in samples}) == 6 and samples.counts["samples"] == 6
    assert {os.path.basename(os.path.dirname(s.media)): s.split for s in samples} == dict(
        train="train", valid="val"
    )


def fgovd(names, category):
    return [
        dict(
            img_path=n,
            pos_expression=f"a {category}",
            neg_expression=["a cat"],
            bbox=[4, 4, 20, 20],
            width=64,
            height=48,
        )
        for n in names
    ]


def test_equal_names_in_folders_of_other_formats(tmp_path):
    def own(names, category):
        return [
            dict(image=n, regions=[dict(caption=f"a {category}", bbox=[0, 0, 1, 1])]) for n in names
        ]

    for i, write in enumerate((own, fgovd)):
        folder = exports(tmp_path / str(i), dict(task_1="car", task_2="dog"), write)
        samples, rejects = load_samples(folder)
        assert (
            rejects == [] and len({s.id for s in samples}) == len({s.media for s in samples}) == 6
        )


def test_two_files_about_one_photo_meet_however_they_spell_it(tmp_path):
    photo(tmp_path / "photos/a.png")
    put(tmp_path / "boxes.json", coco(["photos/a.png"], "car"))
    put(tmp_path / "photos/more.json", coco(["./a.png"], "dog"))
    captions = dict(
        images=[dict(id=0, file_name="photos//a.png")],
        annotations=[dict(image_id=0, caption="A car.")],
    )
    put(tmp_path / "captions.json", captions)
    samples, rejects = load_samples(tmp_path)
    assert rejects == [] and len(samples) == 1 and samples[0].captions == ("A car.",)
    assert sorted(r.phrase for r in samples[0].regions) == ["a car", "a dog"]


def test_two_files_may_declare_one_photo_at_two_scales(tmp_path):
    photo(tmp_path / "a.png")
    put(tmp_path / "a1.json", coco(["a.png"], "car"))
    put(tmp_path / "a2.json", coco(["a.png"], "dog", (8, 8, 40, 40), (128, 96)))
    samples, rejects = load_samples(tmp_path)
    assert rejects == [] and len({r.box for r in samples[0].regions}) == 1
    put(tmp_path / "a2.json", coco(["a.png"], "dog", (8, 8, 40, 40), (96, 128)))
    samples, rejects = load_samples(tmp_path)
    assert [r.phrase for r in samples[0].regions] == ["a car"]
    assert "96 x 128" in rejects[0].reason and "64 x 48" in rejects[0].reason


def test_a_photo_of_two_splits_is_not_merged(tmp_path):
    photo(tmp_path / "a.png")
    for part in ("train", "val"):
        put(tmp_path / f"{part}.json", coco(["a.png"], "car"))
    samples, _ = load_samples(tmp_path)
    assert sorted(s.split for s in samples) == ["train", "val"]


# ---- names and ids in another form (J)


def lvis():
    "Two photos of LVIS, whose names stand in coco_url alone; text ids in the boxes."
    urls = ("train2017/000000000009.jpg", "val2017/000000000025.jpg")
    size = dict(width=64, height=48)
    images = [
        dict(size, id=i, coco_url=f"http://images.cocodataset.org/{u}") for i, u in enumerate(urls)
    ]
    boxes = [dict(image_id=str(i), category_id=str(i), bbox=[4, 4, 20, 20]) for i in range(2)]
    names = [dict(id=0, name="alarm_clock"), dict(id=1, name="bow_(decorative_ribbons)")]
    return dict(images=images, annotations=boxes, categories=names)


@pytest.mark.parametrize("folder", ["{}", "images/{}"])
def test_lvis_without_file_names(tmp_path, folder):
    for name in ("train2017/000000000009.jpg", "val2017/000000000025.jpg"):
        photo(tmp_path / "root" / name)
    samples, rejects = load_samples(put(tmp_path / "lvis.json", lvis()), tmp_path / "root")
    assert rejects == [] and [os.path.isfile(s.media) for s in samples] == [True, True]
    assert [r.phrase for s in samples for r in s.regions] == ["an alarm clock", "a bow"]


def test_lvis_photos_in_the_root_itself(tmp_path):
    photo(tmp_path / "000000000009.jpg")
    samples, rejects = load_samples(put(tmp_path / "lvis.json", lvis()), missing="reject")
    assert len(samples) == 1 and [r.rule for r in rejects] == ["missing_media"]


@pytest.mark.parametrize("of_images,of_boxes", [("img-{}", "img-{}"), ("{}", 0), (0, "00000{}")])
def test_ids_as_text(tmp_path, of_images, of_boxes):
    photo(tmp_path / "a.png")
    data = coco(["a.png"], "car")

    def named(form):
        return form.format(0) if isinstance(form, str) else form

    data["images"][0]["id"] = named(of_images)
    data["annotations"][0]["image_id"] = named(of_boxes)
    samples, rejects = load_samples(put(tmp_path / "coco.json", data))
    assert rejects == [] and len(samples[0].regions) == 1


ADDRESSES = [
    "s3://bucket/videos/cam.mp4",
    "gs://bucket/cam.mp4",
    "https://host/a/cam.mp4?X-Amz-Signature=5f&x=1",
    "http://localhost:8080/data/upload/1/0a1b2c3d-cam.mp4",
    "/data/upload/1/0a1b2c3d-cam.mp4",
    "/data/local-files/?d=videos/cam.mp4",
    "file:///home/someone/videos/cam.mp4",
    "C:\\Users\\someone\\cam.mp4",
    "azure-blob://store/videos/cam.mp4",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_downloaded_file_is_found_by_its_address(tmp_path, address):
    clip(tmp_path / "cam.mp4", steady(10, 2))
    export = [studio_task(studio_track(24, 2), address)]
    samples, rejects = load_samples(put(tmp_path / "export.json", export))
    assert rejects == [] and samples[0].media == str(tmp_path / "cam.mp4")
    own = [dict(video=address, regions=[dict(caption="a square")])]
    if not address.startswith("/data/"):  # only Label Studio writes those
        samples, rejects = load_samples(put(tmp_path / "export.json", own))
        assert rejects == [] and samples[0].media == str(tmp_path / "cam.mp4")


def test_an_address_keeps_its_folders_where_they_exist(tmp_path):
    for part in ("day1", "day2"):
        photo(tmp_path / part / "a.png")
    data = coco([f"s3://bucket/day{i}/a.png" for i in (1, 2)], "car")
    samples, rejects = load_samples(put(tmp_path / "coco.json", data))
    assert rejects == [] and [s.media for s in samples] == [
        str(tmp_path / f"day{i}/a.png") for i in (1, 2)
    ]


def test_an_address_whose_file_is_nowhere_is_rejected_with_the_remedy(tmp_path):
    data = coco(["http://host/a.png"], "car")
    samples, rejects = load_samples(put(tmp_path / "coco.json", data), missing="keep")
    assert samples == [] and "download it first" in rejects[0].reason
    secret = photo(tmp_path / "secret.png")
    data = coco(["http://host/../secret.png", "%2e%2e/secret.png"], "car")
    samples, _ = load_samples(put(tmp_path / "root/coco.json", data), missing="keep")
    assert str(secret) not in [s.media for s in samples]


@pytest.mark.parametrize(
    "name,file",
    [
        ("my%20photo%231.png", "my photo#1.png"),
        ("train\\a.png", "train/a.png"),
        ("caf\u00e9.png", unicodedata.normalize("NFD", "caf\u00e9.png")),
        ("a%20b.png", "a%20b.png"),
    ],
)
def test_other_spellings_of_a_name(tmp_path, name, file):
    photo(tmp_path / file)
    samples, rejects = load_samples(put(tmp_path / "coco.json", coco([name], "car")))
    assert rejects == [] and samples[0].media == str(tmp_path / file)


# ---- splits (6)


def names_of(split):
    return [dict(image=f"{i}.png", caption=f"Photo {i}.", **split(i)) for i in range(4)]


def test_a_files_name_is_a_hint_that_is_told_and_overridden(tmp_path, caplog):
    for i in range(4):
        photo(tmp_path / f"{i}.png")
    path = put(tmp_path / "my_test.json", names_of(lambda i: {}))
    with caplog.at_level(logging.INFO, "fgclip_nb"):
        assert {s.split for s in load_samples(path)[0]} == {"test"}
    assert "split test: 4 samples of" in caplog.text and "my_test.json" in caplog.text
    for split, want in (("train", "train"), ("none", "")):
        assert {s.split for s in load_samples(path, split=split)[0]} == {want}
    with pytest.raises(ConfigError, match="auto, none, train, val, test"):
        load_samples(path, split="training")


def test_a_split_in_an_entry_counts_in_every_format(tmp_path):
    for i in range(4):
        photo(tmp_path / f"{i}.png")
    splits = ("train", "Validation", "testA", "train")
    want = ["train", "val", "test", "train"]
    own = names_of(lambda i: dict(split=splits[i]))
    finehard = [dict(f_path=f"{i}.png", caption="x", split=splits[i]) for i in range(4)]
    one = fgovd(["0.png", "1.png", "2.png", "3.png"], "car")
    one = [dict(row, split=split) for row, split in zip(one, splits)]
    boxes = coco([f"{i}.png" for i in range(4)], "car")
    for image, split in zip(boxes["images"], splits):
        image["split"] = split
    studio = [dict(studio_photo(0), data=dict(image=f"{i}.png", split=splits[i])) for i in range(4)]
    for data in (own, finehard, one, boxes, studio):
        samples, rejects = load_samples(put(tmp_path / "my_test.json", data))
        assert [s.split for s in samples] == want and rejects == []
