"""The doors for other people's files: each format read whole from a folder as people have it, its
faults named by field, and thousands of damaged files that must be read or rejected, never crash.
Needs files, so it is no cell."""

import json
import pickle
import random
from pathlib import Path

import pytest
from PIL import Image

from fgclip_nb.core.identity import DataError
from fgclip_nb.data.conversion import convert
from fgclip_nb.data.load import load_samples

SIZE = (100, 50)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger="fgclip_nb")


def put(folder, **files):
    "Files by path with `__` for a slash and `_` for the dot before the suffix."
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def photos(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (40 * i, 90, 90)).save(folder / name)


def table(folder):
    photos(folder, "a.jpg", "sub/b.jpg")
    text = "filepath\ttitle\tsplit\na.jpg\ta mug, red\ttrain\nsub/b.jpg\ta jug\tvalidation\n"
    put(folder, **{"data.tsv": text})
    return folder / "data.tsv"


def boxes_in_a_table(folder):
    photos(folder, "a.jpg")
    head = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    rows = "a.jpg,100,50,mug,10,5,50,25\na.jpg,100,50,traffic light,0,0,10,10\n"
    put(folder, **{"boxes.csv": head + rows})
    return folder / "boxes.csv"


def image_folder(folder):
    photos(folder, "0001.png", "0002.png")
    objects = dict(bbox=[[10, 5, 40, 20]], categories=["mug"])
    rows = [
        dict(file_name="0001.png", text="a mug", objects=objects),
        dict(file_name="0002.png", text="a jug"),
    ]
    put(folder, **{"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    return folder / "metadata.jsonl"


def image_folder_csv(folder):
    photos(folder, "0001.png", "0002.png")
    put(folder, **{"metadata.csv": "file_name,text\n0001.png,a mug\n0002.png,a jug\n"})
    return folder


REF = dict(
    ref_id=0,
    ann_id=5,
    image_id=7,
    split="testA",
    category_id=1,
    file_name="a_5.jpg",
    sent_ids=[0, 1],
    sentences=[
        dict(raw="The grey woman", sent="grey woman", sent_id=0, tokens=["grey"]),
        dict(raw="left one", sent="left one", sent_id=1, tokens=["left"]),
    ],
)


def refcoco(folder, pickled=True):
    photos(folder, "a.jpg")
    image = dict(id=7, file_name="a.jpg", width=100, height=50)
    about = dict(images=[image], annotations=[dict(id=5, image_id=7, bbox=[10, 5, 40, 20])])
    put(folder, **{"instances.json": about})
    if pickled:
        put(folder, **{"refs(unc).p": pickle.dumps([REF], protocol=2)})
        return folder / "refs(unc).p"
    put(folder, **{"refs.json": [REF]})
    return folder / "refs.json"


def flickr(folder):
    photos(folder, "1.jpg")
    box = "<bndbox><xmin>10</xmin><ymin>5</ymin><xmax>50</xmax><ymax>25</ymax></bndbox>"
    size = "<size><width>100</width><height>50</height><depth>3</depth></size>"
    thing = f"<object><name>9</name>{box}</object>"
    xml = f"<annotation><filename>1.jpg</filename>{size}{thing}</annotation>"
    text = "[/EN#9/people A man] reads .\n[/EN#9/people The reader] sits .\n"
    put(folder, **{"Annotations/1.xml": xml, "Sentences/1.txt": text, "test.txt": "1\n"})
    return folder / "Annotations"


def genome(folder):
    photos(folder, "VG_100K_2/1.jpg")
    region = dict(
        region_id=3, image_id=1, x=10, y=5, width=40, height=20, phrase="a man on a bench"
    )
    sizes = [dict(image_id=1, width=100, height=50, url="https://a.org/VG_100K_2/1.jpg")]
    put(
        folder,
        **{"region_descriptions.json": [dict(id=1, regions=[region])], "image_data.json": sizes},
    )
    return folder / "region_descriptions.json"


def genome_objects(folder):
    genome(folder)
    thing = dict(object_id=1, x=10, y=5, w=40, h=20, names=["bench"], synsets=["bench.n.01"])
    put(folder, **{"objects.json": [dict(image_id=1, objects=[thing])]})
    return folder / "objects.json"


def lvis(folder):
    photos(folder, "train2017/000000000009.jpg")
    image = dict(
        id=9,
        coco_url="http://images.cocodataset.org/train2017/000000000009.jpg",
        width=100,
        height=50,
        neg_category_ids=[2],
        not_exhaustive_category_ids=[],
    )
    annotation = dict(
        id=1, image_id=9, category_id=1, bbox=[10, 5, 40, 20], area=9, segmentation=[]
    )
    names = [
        dict(id=1, name="alarm_clock", synset="x", frequency="f"),
        dict(id=2, name="bow_(weapon)"),
    ]
    put(folder, **{"lvis.json": dict(images=[image], annotations=[annotation], categories=names)})
    return folder / "lvis.json"


GRIT = dict(
    key="000010003",
    caption="a man on a wooden bench",
    url="https://a.org/b.jpg",
    width=100,
    height=50,
    noun_chunks=[[0, 5, 0.1, 0.1, 0.5, 0.5, 0.8], [9, 23, 0.1, 0.1, 0.9, 0.9, 0.7]],
    ref_exps=[[0, 23, 0.1, 0.1, 0.5, 0.5, 0.8]],
)


def grit(folder):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    photos(folder, "00001/000010003.jpg")
    rows = pyarrow.Table.from_pylist([GRIT])
    pyarrow.parquet.write_table(rows, folder / "coyo_0_snappy.parquet", compression="none")
    return folder / "coyo_0_snappy.parquet"


def grit_json(folder):
    photos(folder, "00001/000010003.jpg")
    put(folder, **{"000010003.json": GRIT})
    return folder / "000010003.json"


def cvat_images(folder):
    photos(folder, "a.jpg", "b.jpg")
    say = '<attribute name="caption">a red mug</attribute>'
    xml = f"""<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>
<meta><task><name>kitchen</name><size>2</size></task></meta>
<image id="0" name="a.jpg" width="100" height="50" subset="Train"><box label="mug" occluded="0"
xtl="10" ytl="5" xbr="50" ybr="25" z_order="0">{say}</box></image>
<image id="1" name="b.jpg" width="100" height="50"><tag label="kitchen"/></image></annotations>"""
    put(folder, **{"annotations.xml": xml})
    return folder / "annotations.xml"


def cvat_video(folder):
    put(folder, **{"cam.mp4": b"no clip, it is not opened"})
    box = '<box frame="{}" keyframe="1" outside="{}" xtl="10" ytl="5" xbr="50" ybr="25"/>'.format
    xml = f"""<annotations><meta><task><name>cam</name><original_size><width>100</width>
<height>50</height></original_size><source>cam.mp4</source></task></meta>
<track id="0" label="person">{box(2, 0)}{box(4, 0)}{box(6, 1)}</track></annotations>"""
    put(folder, **{"annotations.xml": xml})
    return folder / "annotations.xml"


def yolo(folder):
    photos(folder, "images/train/1.jpg", "images/val/2.jpg")
    data = "path: ../datasets/mine\ntrain: images/train\nval: images/val\n"
    data += "names:\n  0: person\n  1: mug\n"
    labels = "1 0.3 0.3 0.4 0.4\n"
    put(
        folder,
        **{"data.yaml": data, "labels/train/1.txt": labels, "labels/val/2.txt": "0 .5 .5 1 1\n"},
    )
    return folder / "data.yaml"


# door -> (what makes it, captions, phrases, splits)
DOORS = {
    "table": (table, ["a mug, red", "a jug"], [], ["train", "val"]),
    "boxes in a table": (boxes_in_a_table, [""], ["a mug", "a traffic light"], [""]),
    "image folder": (image_folder, ["a mug", "a jug"], ["a mug"], ["", ""]),
    "image folder, csv": (image_folder_csv, ["a mug", "a jug"], [], ["", ""]),
    "refcoco": (refcoco, [""], ["The grey woman", "left one"], ["test"]),
    "refcoco, json": (lambda f: refcoco(f, False), [""], ["The grey woman", "left one"], ["test"]),
    "flickr": (flickr, ["A man reads."], ["A man", "The reader"], ["test"]),
    "genome": (genome, [""], ["a man on a bench"], [""]),
    "genome, objects": (genome_objects, [""], ["a bench"], [""]),
    "lvis": (lvis, [""], ["an alarm clock"], ["train"]),
    "grit": (grit, [GRIT["caption"]], ["a man", "a wooden bench", GRIT["caption"]], [""]),
    "grit, json": (
        grit_json,
        [GRIT["caption"]],
        ["a man", "a wooden bench", GRIT["caption"]],
        [""],
    ),
    "cvat": (cvat_images, ["", ""], ["a red mug"], ["train", ""]),
    "cvat, video": (cvat_video, [""], ["a person"], [""]),
    "yolo": (yolo, ["", ""], ["a mug", "a person"], ["train", "val"]),
}


def balanced(samples):
    c = samples.counts
    for what in ("entries", "regions"):
        assert c[what] == c[f"{what}_kept"] + c[f"{what}_rejected"], (what, c)


@pytest.mark.parametrize("name", DOORS)
def test_a_door_reads_its_files_whole(tmp_path, name):
    make, captions, phrases, splits = DOORS[name]
    path = make(tmp_path)
    samples, rejects = load_samples(path, tmp_path)
    assert [str(r) for r in rejects if r.rule != "unread_key"] == []
    assert [s.short_caption for s in samples] == captions
    assert [r.phrase for s in samples for r in s.regions] == phrases
    assert [s.split for s in samples] == splits or name == "lvis"
    assert all(Path(s.media).is_file() for s in samples)
    balanced(samples)
    first = next((r.box for s in samples for r in s.regions if r.box), None)
    if first:
        assert first == pytest.approx((0.1, 0.1, 0.5, 0.5))


def essence(samples):
    "What must survive a conversion."
    return [
        (s.id, s.kind, s.media, s.caption, s.short_caption, s.captions, s.split, s.label)
        + ([(r.phrase, r.box, r.keyframes, r.negatives, r.source) for r in s.regions],)
        for s in samples
    ]


@pytest.mark.parametrize("name", DOORS)
def test_a_door_can_be_converted(tmp_path, name):
    path = DOORS[name][0](tmp_path / "data")
    samples, _ = load_samples(path, tmp_path / "data")
    convert(path, tmp_path / "shards", tmp_path / "data")
    assert essence(load_samples(tmp_path / "shards")[0]) == essence(samples)
    convert(path, tmp_path / "own.jsonl", tmp_path / "data")
    again, rejects = load_samples(tmp_path / "own.jsonl", tmp_path / "data")
    assert rejects == [] and len(again) == len(samples)
    for a, b in zip(samples, again):
        fields = ("id", "kind", "media", "caption", "captions", "split", "label", "span")
        assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
        assert [(r.phrase, r.source) for r in a.regions] == [
            (r.phrase, r.source) for r in b.regions
        ]
        for r, t in zip(a.regions, b.regions):
            assert (r.box or ()) == pytest.approx(t.box or ())
            assert [(k.frame, k.enabled) for k in r.keyframes] == [
                (k.frame, k.enabled) for k in t.keyframes
            ]


# ---- what is refused ----------------------------------------------------------------------------


def rejected(path, root=None):
    samples, rejects = load_samples(path, root, missing="keep")
    balanced(samples)
    return [(r.field, r.reason) for r in rejects if not r.rule.startswith("unread_")]


def test_xml_with_entities_is_refused(tmp_path):
    path = cvat_images(tmp_path)
    text = path.read_text().split("?>")[1]
    for doctype in ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>', "<!DOCTYPE a>"):
        path.write_text(doctype + text)
        ((_, reason),) = rejected(path)
        assert "DOCTYPE" in reason


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    path = refcoco(tmp_path)

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    path.write_bytes(pickle.dumps([Harm()]))
    ((field, reason),) = rejected(path)
    assert field == "file" and "asks for" in reason and not (tmp_path / "harmed").exists()


def test_paths_that_lead_out_of_the_root_are_rejected(tmp_path):
    inside = tmp_path / "root"
    path = yolo(inside)
    photos(tmp_path, "outside.jpg")
    put(inside, **{"data.yaml": "train: list.txt\nnames: [a]\n", "list.txt": "../outside.jpg\n"})
    assert "leads out of the media root" in rejected(path)[0][1]
    put(inside, **{"t.csv": "filepath,title\n../outside.jpg,a\n"})
    assert "leads out of the media root" in rejected(inside / "t.csv")[0][1]
    xml = cvat_images(inside)
    xml.write_text(xml.read_text().replace("a.jpg", "../outside.jpg"))
    assert "leads out of the media root" in rejected(xml)[0][1]


def test_an_address_is_not_fetched(tmp_path):
    put(tmp_path, **{"t.csv": "filepath,title\nhttp://127.0.0.1:9/a.jpg,a mug\n"})
    assert "an address, not a file" in rejected(tmp_path / "t.csv")[0][1]


def test_a_table_without_known_columns_says_which(tmp_path):
    put(tmp_path, **{"t.csv": "nr,loss\n1,2\n"})
    ((field, reason),) = rejected(tmp_path / "t.csv")
    assert field == "columns" and "filepath" in reason and "title" in reason


def test_a_folder_of_json_may_hold_other_tables(tmp_path):
    put(
        tmp_path, **{"results.csv": "step,loss\n1,2\n", "settings.yaml": "lr: 1\n", "x.xml": "<a/>"}
    )
    put(tmp_path, **{"d.json": [dict(image="a.jpg", caption="A mug.")]})
    samples, rejects = load_samples(tmp_path, missing="keep")
    assert len(samples) == 1 and rejects == []


def test_cvats_shapes_that_are_no_boxes_and_attributes_are_named(tmp_path):
    path = cvat_images(tmp_path)
    shape = '<polygon label="mug" points="1,2;3,4;5,6"/>'
    shape += '<box label="x" xtl="a" ytl="0" xbr="1" ybr="1"/>'
    say = '<attribute name="remark">looks rather old</attribute>'
    path.write_text(
        path.read_text()
        .replace("</image>", shape + "</image>", 1)
        .replace("</box>", say + "</box>", 1)
    )
    samples, rejects = load_samples(path)
    reasons = " | ".join(f"{r.field}: {r.reason}" for r in rejects)
    assert "polygon[1]: no box" in reasons and "box[2].xtl: not a number" in reasons
    assert "`remark` is not read" in reasons
    balanced(samples)


# ---- damaged files ------------------------------------------------------------------------------

PIECES = (b"", b"0", b"-1", b"1e999", b"nan", b"null", b"{}", b"[]", b'"', b"<", b">", b",", b"\n")
PIECES += (b"\xff\xfe", b"\0", b"../", b"&x;", "ü".encode(), b"9" * 40, b"\t", b"]", b"}")


def damaged(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice((0, 1, 2, 9, 60))
        data[at : at + n] = rng.choice(PIECES)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


DATA = (".tsv", ".csv", ".jsonl", ".json", ".p", ".xml", ".txt", ".parquet", ".yaml")


@pytest.mark.parametrize("name", DOORS)
def test_a_damaged_file_is_read_or_rejected(tmp_path, name):
    path, rng = DOORS[name][0](tmp_path), random.Random(name)
    files = [p for p in sorted(tmp_path.rglob("*")) if p.suffix in DATA]
    sound = {p: p.read_bytes() for p in files}
    for _ in range(60):
        spoilt = rng.choice(files)
        spoilt.write_bytes(damaged(sound[spoilt], rng))
        try:
            samples, rejects = load_samples(path, tmp_path, missing="keep")
        except DataError as e:  # nothing in the folder looks like data any more
            assert "holds no" in str(e)
        else:
            balanced(samples)
            assert all(r.reason and r.file for r in rejects)
        spoilt.write_bytes(sound[spoilt])
