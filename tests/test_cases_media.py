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

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.data.conversion import convert
from fgclip_nb.data.filters import check_media, filter_regions
from fgclip_nb.data.frame_cache import FrameCache, build_cache, cache_share
from fgclip_nb.data.inputs import clip_inputs
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.photos import read_image
from fgclip_nb.data.samples import boxes_at
from fgclip_nb.data.splits import leave_out, overlap, read_names
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


# ---- the declared size and the file's (B)


def spotted(path, orientation, box=(40, 10, 60, 20), size=(80, 40)):
    "A black photo with EXIF `orientation`; a red spot fills `box`, pixels of the stored picture."
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(path, exif=exif)
    return path


def redness(sample):
    "How red the picture that training reads is inside the sample's only box, 0-1."
    pixels = read_image(sample.media)
    h, w = pixels.shape[:2]
    x1, y1, x2, y2 = sample.regions[0].box
    inside = pixels[round(y1 * h) : round(y2 * h), round(x1 * w) : round(x2 * w)]
    return (inside[..., 0] == 255).mean()


def checked(folder, data, name="coco.json"):
    "(samples as training gets them, everything that was said about them)."
    samples, rejects = load_samples(put(folder / name, data), folder)
    kept, more = check_media(samples)
    kept, dropped = filter_regions(kept)
    return kept, [*rejects, *more, *dropped, *kept.changes]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("scale", [1, 3])
def test_boxes_on_the_stored_picture_turn_with_it(tmp_path, orientation, scale):
    spotted(tmp_path / "a.png", orientation)
    box, size = np.multiply((40, 10, 20, 10), scale).tolist(), (80 * scale, 40 * scale)
    samples, said = checked(tmp_path, coco(["a.png"], "cup", box, size))
    assert redness(samples[0]) == 1 and (samples[0].width, samples[0].height) == (40, 80)
    assert [r.rule for r in said] == ["turned"] and said[0].entry == "images[0]"
    assert f"{size[0]} x {size[1]}" in said[0].reason and "40 x 80" in said[0].reason


def test_boxes_on_the_upright_picture_stay(tmp_path):
    spotted(tmp_path / "a.png", 6)
    samples, said = checked(tmp_path, coco(["a.png"], "cup", (20, 40, 10, 20), (40, 80)))
    assert said == [] and redness(samples[0]) == 1


def test_the_same_picture_at_another_scale_is_read_by_shares(tmp_path):
    spotted(tmp_path / "a.png", 1)
    samples, said = checked(tmp_path, coco(["a.png"], "cup", (20, 5, 10, 5), (40, 20)))
    assert said == [] and redness(samples[0]) == 1


@pytest.mark.parametrize("size", [(40, 80), (80, 60), (100, 40)])
def test_another_shape_is_rejected_with_both_sizes(tmp_path, size):
    spotted(tmp_path / "a.png", 1)
    boxes = coco(["a.png"], "cup", (1, 1, 20, 20), size)
    boxes["annotations"].append(dict(image_id=0, caption="A cup."))
    samples, said = checked(tmp_path, boxes)
    assert samples[0].regions == [] and samples[0].captions == ("A cup.",)
    assert [(r.rule, r.regions, r.entries) for r in said] == [("other_size", 1, 0)]
    assert f"{size[0]} x {size[1]}" in said[0].reason and "80 x 40" in said[0].reason


@pytest.mark.parametrize("orientation,size", [(3, (80, 40)), (2, (80, 40)), (6, (40, 40))])
def test_a_turn_that_sizes_cannot_tell_is_said(tmp_path, orientation, size):
    spotted(tmp_path / "a.png", orientation, (1, 1, 30, 30), size)
    samples, said = checked(tmp_path, coco(["a.png"], "cup", (1, 1, 29, 29), size))
    assert len(samples[0].regions) == 1 and [r.rule for r in said] == ["perhaps_turned"]


def test_other_formats_declare_sizes_too(tmp_path):
    spotted(tmp_path / "a.png", 6)
    size, share = dict(width=80, height=40), [0.5, 0.25, 0.75, 0.5]
    own = [dict(size, image="a.png", regions=[dict(caption="a cup", bbox=[40, 10, 60, 20])])]
    one = dict(
        size, img_path="a.png", pos_expression="a cup", neg_expression=[], bbox=[40, 10, 20, 10]
    )
    fine = [dict(size, f_path="a.png", bbox_info=[dict(short_expr="a cup", bbox=share)])]
    studio = studio_photo(0, original_width=80, original_height=40)
    studio["data"]["image"] = "a.png"
    place = dict(x=50, y=25, width=25, height=25)
    studio["annotations"][0]["result"][0]["value"].update(place)
    for data in (own, [one], fine, [studio]):
        samples, said = checked(tmp_path, data)
        assert [r.rule for r in said] == ["turned"] and redness(samples[0]) == 1


def test_a_clip_held_upright(tmp_path):
    clip(tmp_path / "a.mp4", steady(10, 2), rotation=90)
    track = [dict(frame=0, bbox=[0, 20, 8, 28]), dict(frame=19, bbox=[8, 20, 16, 28])]
    row = dict(video="a.mp4", regions=[dict(caption="a square", keyframes=track)])
    samples, said = checked(tmp_path, [dict(row, width=64, height=48)])
    assert [r.rule for r in said] == ["turned"]
    pixels, (box,) = (
        read_frames(samples[0].media, [0])[0],
        boxes_at(samples[0].regions[0].keyframes, [0])[0],
    )
    h, w = pixels.shape[:2]
    x1, y1, x2, y2 = np.round(box * (w, h, w, h)).astype(int)
    assert (w, h) == (48, 64) and pixels[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].mean() > 200
    samples, said = checked(tmp_path, [dict(row, width=64, height=64)])
    assert "64 x 64" in said[0].reason and "48 x 64" in said[0].reason


def test_shards_hold_the_turned_boxes(tmp_path):
    spotted(tmp_path / "a.png", 8)
    path = put(tmp_path / "coco.json", coco(["a.png"], "cup", (40, 10, 20, 10), (80, 40)))
    for embed in (False, True):
        convert(path, tmp_path / f"shards{embed}", embed=embed)
        assert redness(load_samples(tmp_path / f"shards{embed}")[0][0]) == 1


# ---- lists of test media with folders (E)


def test_a_test_list_with_folders_names_exactly_its_photos(tmp_path):
    names = [f"{c}/image_{i:04d}.jpg" for c in ("accordion", "anchor") for i in (1, 2)]
    rows = [dict(f_path=n, caption=n) for n in names]
    samples, _ = load_samples(put(tmp_path / "train.json", rows), tmp_path, missing="keep")
    (tmp_path / "test.txt").write_text("accordion/image_0001.jpg 0\nants/image_0002.jpg 1\n")
    put(tmp_path / "test.json", rows[:1])
    for file in ("test.txt", "test.json"):
        listed = read_names(tmp_path / file)
        assert [r.sample for r in leave_out(samples, listed)[1]] == names[:1]
        assert overlap(samples, listed)["train and test list"] == ["accordion/image_0001"]
    assert len(leave_out(samples, {"image_0002"})[1]) == 2  # a list without folders


@pytest.mark.parametrize("folder", ["", "Abuse/", "videos/Abuse/"])
@pytest.mark.parametrize("listed", ["", "Abuse/", "Anomaly-Videos/Abuse/"])
def test_ucf_crime_lists_work_with_any_folder_or_none(tmp_path, folder, listed):
    rows = [dict(video=f"{folder}Abuse001_x264.mp4"), dict(video=f"{folder}Abuse002_x264.mp4")]
    samples, _ = load_samples(put(tmp_path / "train.json", rows), tmp_path, missing="keep")
    (tmp_path / "test.txt").write_text(f"{listed}Abuse001_x264.mp4\n")
    assert len(leave_out(samples, read_names(tmp_path / "test.txt"))[0]) == 1


def test_flat_data_meet_a_list_with_folders(tmp_path):
    rows = [dict(image=n) for n in ("a.jpg", "b.jpg")]
    samples, _ = load_samples(put(tmp_path / "train.json", rows), tmp_path, missing="keep")
    assert [s.id for s in leave_out(samples, {"val/a.jpg"})[0]] == ["b.jpg"]


def test_equal_names_in_two_splits_are_no_leak(tmp_path):
    folder = exports(tmp_path / "export", dict(train="car", valid="dog"), coco)
    assert overlap(load_samples(folder)[0]) == dict.fromkeys(
        ("train and held out", "train and held out, at other times", "train and test list"), []
    )


# ---- the end of a clip, and a cache that lacks clips (6)


def spoken(folder, *spans):
    "Clips of 2 s, one per span, each with a right sentence and then one about the span."
    rows = []
    for i, span in enumerate(spans):
        clip(folder / f"{i}.mp4", steady(10, 2)[: 20 - i])  # the cache knows clips by content
        for when in ((0.0, 1.0), span):
            rows.append(dict(video=f"{i}.mp4", span=when, caption=f"Clip {i} at {when[0]} s."))
    return put(folder / "clips.json", rows)


def test_a_sentence_beyond_the_end_is_rejected_alike_everywhere(tmp_path):
    path = spoken(tmp_path, (1.0, 2.0), (2.5, 3.0))
    samples, rejects = load_samples(path)
    kept, more = check_media(samples)
    assert rejects == [] and len(kept) == 3
    assert [(r.rule, r.file, r.entry, r.field) for r in more] == [
        ("beyond_end", str(path), "[3]", "span")
    ]
    lines, cache = [], FrameCache(tmp_path / "cache", 32)
    assert [reason for _, reason in build_cache(cache, samples, 4, say=lines.append)] == [
        str(more[0])
    ]
    assert "2 clips" in lines[-1] and all(cache.get(s.media) for s in samples)
    with pytest.raises(DataError, match="1.mp4: span .* holds no frame"):
        clip_inputs(samples[3], 4, 32)


def test_a_cache_says_how_many_clips_it_holds(tmp_path):
    samples, _ = load_samples(spoken(tmp_path, (1.0, 2.0), (1.0, 2.0), (1.0, 2.0)))
    cache, paths = FrameCache(tmp_path / "cache", 32), [s.media for s in samples]
    build_cache(cache, samples[:4], 4, say=lambda line: None)
    assert cache_share(cache, paths).startswith("2 of 3 clips from the cache")
    assert "2.mp4" in cache_share(cache, paths) and cache_share(cache, paths[:4])[:6] == "2 of 2"


def test_training_says_how_many_clips_the_cache_holds(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    path = spoken(tmp_path, (1.0, 2.0), (2.5, 3.0), (1.0, 2.0))
    samples, cache = load_samples(path)[0], FrameCache(tmp_path / "cache", 32)
    build_cache(cache, samples[:2], 4, say=lambda line: None)
    sizes = dict(max_steps=2, batch_size=2, num_frames=4, image_size=32, processes=1)
    cfg = TrainConfig(
        data=str(path),
        output=str(tmp_path / "run"),
        frame_cache=str(cache.folder),
        split="train",
        **sizes,
    )
    train(cfg)
    log = (tmp_path / "run/training.log").read_text()
    assert "frames: 1 of 3 clips from the cache" in log and "rejected: beyond_end 1" in log
    (reject,) = map(json.loads, (tmp_path / "run/rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["entry"], reject["rule"]) == (str(path), "[3]", "beyond_end")
