"""Data in the forms that tools write them, where they were once taken for something else: what
stands beside a data file, entries that meet, splits, clips that end, and names under other keys.
Every input is made here."""

import json
import pickle

import pytest
from PIL import Image

from fgclip_nb.core.identity import DataError
from fgclip_nb.data.conversion import convert
from fgclip_nb.data.filters import check_media
from fgclip_nb.data.findings import repeat_findings, unread_findings
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.world_video import world_video_options, world_video_samples


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("ERROR", logger="fgclip_nb")


def photo(path, size=(100, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def coco(names, category="car", **image):
    images = [dict(id=i, file_name=name, **image) for i, name in enumerate(names)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[10, 8, 40, 32]) for i in range(len(names))]
    return dict(images=images, annotations=boxes, categories=[dict(id=1, name=category)])


def phrases(samples):
    return sorted(r.phrase for s in samples for r in s.regions)


def test_the_file_that_others_look_things_up_in_is_no_data(tmp_path):
    write(tmp_path / "refs" / "instances.json", coco(["a.jpg"], width=100, height=80))
    photo(tmp_path / "im" / "a.jpg")
    refs = [
        dict(
            ref_id=0, ann_id=0, image_id=0, split="train", sentences=[dict(raw="left", sent="left")]
        )
    ]
    (tmp_path / "refs" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    samples, rejects = load_samples(tmp_path / "refs", tmp_path / "im")
    assert (phrases(samples), rejects) == (["left"], [])
    # alone it is a COCO file like any other
    (tmp_path / "refs" / "refs(unc).p").unlink()
    assert phrases(load_samples(tmp_path / "refs", tmp_path / "im")[0]) == ["a car"]


def test_image_data_of_visual_genome_is_no_data(tmp_path):
    photo(tmp_path / "VG_100K" / "1.jpg")
    write(
        tmp_path / "image_data.json",
        [dict(image_id=1, width=100, height=80, url="h/VG_100K/1.jpg")],
    )
    region = dict(region_id=1, image_id=1, phrase="a clock", x=0, y=0, width=50, height=40)
    write(tmp_path / "region_descriptions.json", [dict(id=1, regions=[region])])
    samples, rejects = load_samples(tmp_path)
    assert (phrases(samples), rejects) == (["a clock"], [])


@pytest.mark.parametrize("root", [True, False])
def test_media_lie_beside_their_metadata_whatever_the_root(tmp_path, root):
    for part in ("train", "test"):
        photo(tmp_path / part / "a.jpg")
        write(tmp_path / part / "metadata.csv", f"file_name,text\na.jpg,said of {part}\n")
    samples, rejects = load_samples(tmp_path, tmp_path if root else None)
    assert rejects == [] and len({s.media for s in samples}) == len({s.id for s in samples}) == 2
    assert all(s.short_caption == f"said of {s.split}" for s in samples)


def test_converted_json_keeps_equal_names_apart(tmp_path):
    for part, category in (("one", "car"), ("two", "dog")):
        photo(tmp_path / part / "0.jpg")
        write(tmp_path / part / "c.json", coco(["0.jpg"], category, width=100, height=80))
    convert(tmp_path, tmp_path / "all.jsonl")
    samples, rejects = load_samples(tmp_path / "all.jsonl")
    told = {s.media.rsplit("/", 2)[1]: phrases([s]) for s in samples}
    assert (told, rejects) == ({"one": ["a car"], "two": ["a dog"]}, [])


def test_two_files_about_one_photo_meet(tmp_path):
    photo(tmp_path / "im" / "1.jpg")
    box = dict(bbox=[0, 0, 0.5, 0.5], short_expr="a cup")
    write(tmp_path / "d" / "a.json", [dict(f_path="1.jpg", caption="A table.")])
    write(tmp_path / "d" / "b.json", [dict(f_path="./x/../1.jpg", bbox_info=[box])])
    (tmp_path / "im" / "x").mkdir()
    (sample,), _ = load_samples(tmp_path / "d", tmp_path / "im")
    assert (sample.caption, phrases([sample]), sample.entries) == ("A table.", ["a cup"], 2)
    # two long captions: nothing is dropped, and the report names it
    write(tmp_path / "d" / "b.json", [dict(f_path="1.jpg", caption="A chair.")])
    samples, _ = load_samples(tmp_path / "d", tmp_path / "im")
    shared = [f for f in repeat_findings(samples) if "share their photo" in f.what]
    assert len(samples) == 2 and shared[0].count == 2


def test_rows_of_a_table_about_one_photo_meet(tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "c.csv", "image,caption\n" + "".join(f"1.jpg,said {k}\n" for k in range(5)))
    (sample,), _ = load_samples(tmp_path / "c.csv")
    assert len(sample.captions) == 5


def test_a_list_under_caption_is_alternatives(tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "a.json", [dict(image="1.jpg", caption=["two dogs", "dogs play"])])
    (sample,), rejects = load_samples(tmp_path / "a.json")
    assert (sample.captions, rejects) == (("two dogs", "dogs play"), [])


def test_a_split_that_is_none_is_told(tmp_path):
    names = ("train", "valid", "dev", "eval", "testdev", "fold1", "fold1")
    rows = [dict(f_path=f"{i}.jpg", caption="x", split=s) for i, s in enumerate(names)]
    samples, rejects = load_samples(write(tmp_path / "a.json", rows), missing="keep")
    assert [s.split for s in samples][:5] == ["train", "val", "val", "val", "test"]
    assert [(r.rule, r.value) for r in rejects] == [("unread_split", "'fold1'")]
    assert [f.level for f in unread_findings(rejects)] == ["fix"]


def test_the_key_that_was_meant_is_named_where_a_box_is_lost(tmp_path):
    boxes = [dict(box=[0, 0, 1, 1], short_expr="a cup"), dict(bbox=[0, 0, 1, 1], expr="a mug")]
    rows = [dict(f_path="a.jpg", bbox_info=boxes)]
    _, rejects = load_samples(write(tmp_path / "a.json", rows), missing="keep")
    assert "`box`" in rejects[0].reason and "`expr`" in rejects[1].reason


def test_an_object_of_no_known_form_says_where_its_entries_may_be(tmp_path):
    whole = dict(version="1.0", data=[dict(file="1.jpg", text="a cat")])
    _, rejects = load_samples(write(tmp_path / "a.json", whole))
    assert len(rejects) == 1 and "`data` holds the entries" in rejects[0].reason


def test_coco_without_sizes_asks_the_photo(tmp_path):
    photo(tmp_path / "a.jpg", (100, 80))
    samples, rejects = load_samples(write(tmp_path / "c.json", coco(["a.jpg"])))
    assert (samples[0].regions[0].box, rejects) == ((0.1, 0.1, 0.5, 0.5), [])


def test_categories_that_are_numbers_must_be_fixed(tmp_path):
    write(tmp_path / "c.json", coco(["a.jpg"], "0", width=100, height=80))
    samples, _ = load_samples(tmp_path / "c.json", missing="keep")
    assert [f.level for f in repeat_findings(samples) if "no letter" in f.what and f.count] == [
        "fix"
    ]


def test_label_studio_says_that_several_people_annotated(tmp_path):
    value = dict(x=0, y=0, width=50, height=50, rectanglelabels=["cup"])
    drawn = dict(
        id="a", type="rectanglelabels", original_width=100, original_height=80, value=value
    )
    task = dict(data=dict(image="a.jpg"), annotations=[dict(result=[drawn]), dict(result=[drawn])])
    samples, rejects = load_samples(write(tmp_path / "e.json", [task]), missing="keep")
    assert (len(samples[0].regions), [r.rule for r in rejects]) == (2, ["unread_authors"])


@pytest.mark.parametrize("names", ["classes.txt", "obj.names"])
def test_yolo_without_a_data_yaml(tmp_path, names):
    photo(tmp_path / "obj_train_data" / "a.jpg")
    write(tmp_path / "obj_train_data" / "a.txt", "1 0.5 0.5 0.5 0.5\n")
    with pytest.raises(DataError, match="classes.txt"):
        load_samples(tmp_path)
    write(tmp_path / names, "cat\ndog\n")
    (sample,), _ = load_samples(tmp_path)
    assert (phrases([sample]), sample.split) == (["a dog"], "train")


def test_a_table_of_the_hub_with_pictures(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    photo(tmp_path / "a.jpg")
    pixels = (tmp_path / "a.jpg").read_bytes()
    table = dict(img=[dict(bytes=pixels, path="a.jpg")] * 2, text=["a cat", "a dog"])
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    samples, rejects = load_samples(tmp_path / "t.parquet", columns="image=img, caption=text")
    assert ([s.caption for s in samples], rejects) == (["a cat", "a dog"], [])
    assert samples[1].data == pixels
    samples, _ = load_samples(tmp_path / "t.parquet")  # `text` is a known name
    assert [s.short_caption for s in samples] == ["a cat", "a dog"]


def test_a_track_behind_the_end_of_its_clip_is_rejected(tmp_path):
    clip = next(iter(world_video_samples(world_video_options("world_video"))))
    track = [dict(frame=f, bbox=[0, 0, 0.5, 0.5]) for f in (5_000, 5_010)]
    region = dict(caption="a ball", keyframes=track)
    samples, _ = load_samples(write(tmp_path / "e.jsonl", dict(video="a.mp4", regions=[region])))
    samples[0].media, samples[0].kind = clip.media, "video"
    kept, rejects = check_media(samples)
    assert (len(kept), kept[0].regions) == (1, [])
    assert [(r.rule, r.regions) for r in rejects] == [("beyond_end", 1)]
