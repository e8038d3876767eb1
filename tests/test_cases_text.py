"""What people have goes in: formats of one's own, texts under other keys, lists of test media, and
data that hold nothing to contrast. Every input is made here."""

import json

import pytest

from data_formats import BOX, FINEHARD
from fgclip_nb.core.identity import DataError
from fgclip_nb.core.config import TrainConfig
from fgclip_nb.data.findings import contrast_findings, rule_findings, unread_findings
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.readers import READERS, reader
from fgclip_nb.data.splits import leave_out, overlap, read_names
from fgclip_nb.training.loop import train
from fgclip_nb.training.rundata import prepare_data


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("ERROR", logger="fgclip_nb")


@pytest.fixture
def own_readers():
    "Readers that a test registers are gone after it."
    before = dict(READERS)
    yield
    READERS.clear()
    READERS.update(before)


def load(folder, document, name="data.json", lines=False):
    text = "\n".join(map(json.dumps, document)) if lines else json.dumps(document)
    (folder / name).write_text(text)
    return load_samples(folder / name, missing="keep")


def phrases(samples):
    return [r.phrase for s in samples for r in s.regions]


# ---- a format of one's own ----------------------------------------------------------------------


def test_registering_a_reader_is_all_it_takes(tmp_path, own_readers):
    @reader("mine", ("image", "says"))
    def read_mine(row, src):
        name = row.text("image")
        return src.sample(id=name, media=src.media([name], "image"), caption=row.text("says"))

    rows = [dict(image="a.jpg", says="A mug."), dict(image="b.jpg", caption="A jug."), dict(x=1)]
    samples, rejects = load(tmp_path, rows, lines=True)
    assert [s.caption for s in samples] == ["A mug.", "A jug."]
    assert "mine" in samples.formats.values()
    c = samples.counts
    assert (c["entries"], c["entries_kept"], c["entries_rejected"]) == (3, 2, 1)


def test_readers_of_values_documents_and_files(tmp_path, own_readers):
    @reader("named", ("about",), of="value")
    def read_named(row, src):
        return src.sample(id=src.key, media=src.media([src.key], "key"), caption=row.text("about"))

    samples, _ = load(tmp_path, {"a.jpg": {"about": "A mug."}, "b.jpg": {"about": "A jug."}})
    assert [(s.id, s.caption) for s in samples] == [("a.jpg", "A mug."), ("b.jpg", "A jug.")]

    @reader("album", ("album",), of="document")
    def read_album(document, src):
        for name in document["album"]:
            src.tally.entries += 1
            yield src.sample(id=name, media=src.media([name], "album"), caption="A photo.")

    samples, _ = load(tmp_path, dict(album=["a.jpg", "b.jpg"]))
    assert len(samples) == samples.counts["entries_kept"] == 2

    @reader("lines", lambda path: str(path).endswith(".lst"), of="file", suffixes=(".lst",))
    def read_lines(path, src):
        for line in open(path):
            src.tally.entries += 1
            name, text = line.strip().split("|")
            yield src.sample(id=name, media=src.media([name], "line"), caption=text)

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.lst").write_text("a.jpg|A mug.\nb.jpg|A jug.\n")
    for path in (tmp_path / "folder" / "x.lst", tmp_path / "folder"):
        samples, rejects = load_samples(path, missing="keep")
        assert [s.caption for s in samples] == ["A mug.", "A jug."] and not rejects


def test_a_reader_may_return_several_samples_and_replace_another(tmp_path, own_readers):
    def read_pair(row, src, text):
        names = row.texts("pair")
        src.tally.entries += len(names) - 1
        media = [src.media([n], "pair") for n in names]
        return [src.sample(id=n, media=m, caption=text) for n, m in zip(names, media)]

    reader("mine", ("pair",))(lambda row, src: read_pair(row, src, "first"))
    reader("mine", ("pair",))(lambda row, src: read_pair(row, src, "second"))

    samples, _ = load(tmp_path, [dict(pair=["a.jpg", "b.jpg"])])
    assert [s.caption for s in samples] == ["second"] * 2


# ---- no text is dropped without a word ----------------------------------------------------------

IMAGE = dict(id=1, file_name="a.jpg", width=100, height=80)
ANNOTATION = dict(id=1, image_id=1, category_id=10, bbox=[10, 10, 50, 40])


def coco(annotations, images=(IMAGE,), names=("person",)):
    categories = [dict(id=10 + i, name=name) for i, name in enumerate(names)]
    return dict(images=list(images), annotations=annotations, categories=categories)


def test_fgovds_official_files(tmp_path):
    sentences = [f"A mug with a {c} rim." for c in ("red", "blue", "green")]
    document = coco([dict(ANNOTATION, neg_category_ids=[11, 12])], names=sentences)
    samples, rejects = load(tmp_path, document, "1_attributes.json")
    (region,) = samples[0].regions
    assert (region.phrase, region.source) == (sentences[0], "expression") and not rejects
    assert region.levels() == {"hard": tuple(sentences[1:])}
    document["annotations"][0]["neg_category_ids"] = [11, 99]
    samples, rejects = load(tmp_path, document)
    assert rejects[0].field.endswith("neg_category_ids[1]") and not phrases(samples)


def test_a_category_that_is_a_phrase_gets_no_second_article(tmp_path):
    names = ("a white mug", "the left door", "mug", "An oven.")
    annotations = [dict(ANNOTATION, id=i, category_id=10 + i) for i in range(4)]
    samples, _ = load(tmp_path, coco(annotations, names=names))
    assert phrases(samples) == ["a white mug", "the left door", "a mug", "An oven."]


@pytest.mark.parametrize("key", ["caption", "phrase", "expression", "description"])
def test_a_text_beside_a_box_is_its_phrase(tmp_path, key):
    "As in GRiT and in Visual Genome in COCO's form, also without a category."
    bare = {k: v for k, v in ANNOTATION.items() if k != "category_id"}
    samples, rejects = load(tmp_path, coco([ANNOTATION | {key: "red mug"}, bare | {key: "a jug"}]))
    assert phrases(samples) == ["red mug", "a jug"] and not rejects


def referring(text, **more):
    return IMAGE | dict(caption=text) | more


def test_referring_expressions_in_cocos_form(tmp_path):
    images = [
        referring("woman in grey", dataset_name="refcoco", original_id=7),
        referring("man on the left", dataset_name="refcoco", original_id=7, id=2),
    ]
    annotations = [dict(ANNOTATION, image_id=i, tokens_positive=[[0, 3]]) for i in (1, 2)]
    samples, rejects = load(tmp_path, coco(annotations, images))
    assert phrases(samples) == ["woman in grey", "man on the left"] and not rejects
    assert samples[0].captions == ()


def test_phrases_that_a_caption_is_pointed_at(tmp_path):
    "MDETR's Flickr30k: the caption stays one of the image."
    image = referring("a man beside a dog", dataset_name="flickr")
    spans = [[[0, 5]], [[13, 18]]]
    annotations = [dict(ANNOTATION, tokens_positive=s) for s in spans]
    samples, _ = load(tmp_path, coco(annotations, [image]))
    assert phrases(samples) == ["a man", "a dog"]
    assert samples[0].captions == ("a man beside a dog",)


def test_captions_of_images_in_cocos_form(tmp_path):
    samples, rejects = load(tmp_path, coco([ANNOTATION], [IMAGE | dict(caption="A kitchen.")]))
    assert (phrases(samples), samples[0].captions) == (["a person"], ("A kitchen.",))
    assert not rejects


HUMAN = {"from": "human", "value": "<image>\nDescribe it."}


@pytest.mark.parametrize(
    "turns",
    [
        dict(conversations=[HUMAN, {"from": "gpt", "value": "A mug."}]),
        dict(conversations=[HUMAN, {"from": "gpt", "value": "<image>\nA mug."}]),
        dict(
            messages=[dict(role="user", content="What?"), dict(role="assistant", content="A mug.")]
        ),
    ],
)
def test_conversations(tmp_path, turns):
    samples, rejects = load(tmp_path, [dict(id="0", image="a.jpg", **turns)])
    assert samples[0].caption == "A mug." and not rejects


def test_what_a_conversation_lacks_or_has_too_much_of_is_said(tmp_path):
    answer = {"from": "gpt", "value": "A mug."}
    rows = [
        dict(image="a.jpg", conversations=[HUMAN, answer, HUMAN, {"from": "gpt", "value": "Yes."}]),
        dict(image="a.jpg", conversations=[HUMAN]),
        dict(conversations=[HUMAN, answer]),
        dict(video="a.mp4", conversations=[HUMAN, answer]),
    ]
    samples, rejects = load(tmp_path, rows)
    assert [(s.kind, s.caption) for s in samples] == [("image", "A mug."), ("video", "A mug.")]
    assert [r.rule for r in rejects] == ["unread_answers", "missing_field", "missing_field"]
    assert samples.counts["entries_rejected"] == 2


def test_grounded_captions(tmp_path):
    regions = [dict(phrase="a man", bbox=[0, 0, 50, 40]), dict(phrase="dogs", bbox=[BOX, BOX])]
    line = dict(filename="a.jpg", width=100, height=80)
    rows = [
        line | dict(grounding=dict(caption="a man and dogs", regions=regions)),
        line | dict(detection=dict(instances=[dict(bbox=[0, 0, 9, 9], label=1, category="apple")])),
    ]
    samples, rejects = load(tmp_path, rows, lines=True)
    assert phrases(samples) == ["a man", "dogs", "dogs", "an apple"] and not rejects
    c = samples.counts
    assert c["regions"] == c["regions_kept"] == 4


def renamed(old, new):
    return json.loads(json.dumps(FINEHARD).replace(f'"{old}"', f'"{new}"'))


@pytest.mark.parametrize(
    "old, new, named, meant",
    [
        ("bbox_info", "bbox_infos", "bbox_infos", "bbox_info"),
        ("bbox_info", "boxes", "boxes", "bbox_info"),
        ("f_path", "image", "bbox_info", "f_path"),
        ("caption", "text", "text", "caption"),
    ],
)
def test_a_key_under_another_name_is_named_once(tmp_path, caplog, old, new, named, meant):
    caplog.set_level("WARNING", logger="fgclip_nb")
    samples, rejects = load(tmp_path, renamed(old, new))
    (line,) = [r for r in rejects if r.field == named]
    assert "3 of 3" in line.reason and f"`{meant}`" in line.reason
    assert line.rule == "unread_content" and line.entries == line.regions == 0
    assert f"`{named}`" in caplog.text
    assert len(samples) == samples.counts["entries"] == 3


def test_a_key_inside_a_region_and_a_mere_value_are_named(tmp_path):
    rows = json.loads(json.dumps(FINEHARD))
    for row in rows:
        row["score"] = 0.5
        row["bbox_info"][0]["note"] = "taken by hand"
    _, rejects = load(tmp_path, rows)
    assert [(r.field, r.rule) for r in rejects] == [
        ("bbox_info[].note", "unread_content"),
        ("score", "unread_key"),
    ]


def test_a_key_that_some_entry_was_asked_for_is_no_unread_key(tmp_path):
    "`short_expr_negs` is read only where its flag is set."
    rows = json.loads(json.dumps(FINEHARD))
    for row in rows:
        row["bbox_info"][0]["flag_short_neg"] = 0
    assert load(tmp_path, rows)[1] == []


def test_the_split_of_an_entry_counts_before_that_of_the_file(tmp_path):
    rows = [dict(FINEHARD[0], split="val"), FINEHARD[1]]
    samples, rejects = load(tmp_path, rows, "my_train.json")
    assert [s.split for s in samples] == ["val", "train"] and not rejects
    images = [IMAGE | dict(split="test")]
    assert load(tmp_path, coco([ANNOTATION], images))[0][0].split == "test"


# ---- lists of test media ------------------------------------------------------------------------


def clips_of(folder, *names):
    rows = {n: dict(duration=9.0, timestamps=[[0, 5]], sentences=["A man walks."]) for n in names}
    return load(folder, rows)[0]


def left_out(samples, path):
    return sorted(r.sample.split("#")[0] for r in leave_out(samples, read_names(path))[1])


VIDEOS = ("Abuse028_x264", "Arrest001_x264", "Arson002_x264")
LISTS = {
    "vadclip.csv": "path,label\n/d/Abuse/Abuse028_x264__5.npy,Abuse\n/d/Arrest001_x264__0.npy,A\n",
    "rtfm.list": "G:\\f\\Abuse028_x264_i3d.npy\nG:\\f\\Arrest001_x264_i3d.npy\n",
    "official.txt": "Abuse/Abuse028_x264.mp4 Abuse 165 240 -1 -1\nArrest001_x264.mp4  0 0\n",
    "bars.txt": "name|frames|label\nAbuse028_x264|1412|1\nArrest001_x264|20|1\n",
    "second_column.csv": "id;label;video\n1;A;Abuse028_x264.mp4\n2;A;x/Arrest001_x264.mp4\n",
    "no_head.tsv": "Abuse\tAbuse028_x264.mp4\nArrest\tArrest001_x264.mp4\n",
    "short.list": "Abuse028\nArrest001\n",
    "double.txt": "f/Abuse028_x264.mp4.npy 1\nf/Arrest001_x264_rgb.npz 0\n",
    "bom.csv": "\ufeffPath,Label\nAbuse028_x264.avi,1\nArrest001_x264.avi,1\n",
    "names.json": json.dumps(["Abuse028_x264.mp4", "Arrest001_x264.mp4"]),
    "parts.json": json.dumps(dict(train=[VIDEOS[2]], test=VIDEOS[:2])),
    "objects.json": json.dumps([dict(path=f"f/{v}_i3d.npy", label=1) for v in VIDEOS[:2]]),
    "keys.json": json.dumps({v: dict(frames=9) for v in VIDEOS[:2]}),
    "data.json": json.dumps([dict(video=v, caption="A man.") for v in VIDEOS[:2]]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_test_media_is_read_in_every_form(tmp_path, name):
    samples = clips_of(tmp_path, *VIDEOS)
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8")
    assert left_out(samples, tmp_path / name) == list(VIDEOS[:2])
    names = read_names(tmp_path / name)
    listed = overlap(samples, names)["train and test list"]
    assert listed == [v.lower() for v in VIDEOS[:2]]


@pytest.mark.parametrize("text", ["Robbery1.mp4\nRobbery2.mp4\n", "Abuse028_x264_other.mp4\n"])
def test_a_list_that_means_nothing_of_the_data_is_an_error(tmp_path, text):
    samples = clips_of(tmp_path, *VIDEOS)
    (tmp_path / "mine.list").write_text(text)
    with pytest.raises(DataError, match="none of the . names of .*mine.list is in the data"):
        leave_out(samples, read_names(tmp_path / "mine.list"))
    (tmp_path / "mine.list").write_text("\n \n")
    with pytest.raises(DataError, match="mine.list: no name"):
        read_names(tmp_path / "mine.list")


def test_a_list_that_takes_nearly_everything_is_an_error(tmp_path):
    samples = clips_of(tmp_path, *VIDEOS)
    (tmp_path / "train.txt").write_text("\n".join(VIDEOS))
    with pytest.raises(DataError, match="train.txt names 3 of 3 samples"):
        leave_out(samples, read_names(tmp_path / "train.txt"))


def photos_of(folder, *names):
    return load(folder, [dict(image=n, caption=f"A photo of {n}.") for n in names])[0]


def test_where_names_repeat_the_folder_is_part_of_the_name(tmp_path):
    animals = [f"{a}/image_{i}.jpg" for a in ("cat", "dog", "emu") for i in range(4)]
    samples = photos_of(tmp_path, *animals)
    (tmp_path / "test.txt").write_text(
        "cat/image_0.jpg 0\n/home/me/dog/image_1.jpg 1\nowl/image_2.jpg"
    )
    assert left_out(samples, tmp_path / "test.txt") == ["cat/image_0.jpg", "dog/image_1.jpg"]


def test_equal_names_under_train_and_test_are_two_photos(tmp_path):
    samples = photos_of(tmp_path, *[f"train/{a}/{i}.jpg" for a in ("cat", "dog") for i in range(4)])
    (tmp_path / "test.txt").write_text("test/cat/0.jpg\ntest/dog/1.jpg\n")
    with pytest.raises(DataError, match="none of the 2 names"):
        leave_out(samples, read_names(tmp_path / "test.txt"))


def test_class_folders_of_a_list_need_not_be_those_of_the_data(tmp_path):
    samples = clips_of(tmp_path, "Abuse028_x264", "Normal_Videos_003_x264", *VIDEOS[1:])
    listing = tmp_path / "test.txt"
    listing.write_text(
        "Testing_Normal_Videos_Anomaly/Normal_Videos_003_x264.mp4\nAbuse/Abuse028.mp4"
    )
    assert left_out(samples, listing) == ["Abuse028_x264", "Normal_Videos_003_x264"]


def test_a_clip_of_another_number_is_not_meant(tmp_path):
    "`scene_1_2` is no feature file of `scene_1`."
    samples = clips_of(tmp_path, "scene_1", "scene_2", "scene_3")
    (tmp_path / "test.txt").write_text("scene_1_2.npy\nscene_3_i3d.npy\n")
    assert left_out(samples, tmp_path / "test.txt") == ["scene_3"]


# ---- nothing to contrast ------------------------------------------------------------------------


def photos(folder, n):
    from PIL import Image

    for i in range(n):
        Image.new("RGB", (100, 80), (9 * i, 90, 90)).save(folder / f"{i}.jpg")


def boxed(folder, texts):
    "A COCO file about photos: the category of each one's only box, None for a photo without any."
    photos(folder, len(texts))
    images = [dict(IMAGE, id=i, file_name=f"{i}.jpg") for i in range(len(texts))]
    names = sorted({t for t in texts if t})
    annotations = [
        dict(ANNOTATION, id=i, image_id=i, category_id=10 + names.index(t))
        for i, t in enumerate(texts)
        if t
    ]
    (folder / "coco.json").write_text(json.dumps(coco(annotations, images, names)))
    return folder / "coco.json"


def config(data, **more):
    run = dict(output=str(data.parent / "run"), device="cpu", tracker="none", eval_every=0)
    return TrainConfig.from_params(dict(data=str(data), **run) | more)


def what(findings, level="fix"):
    return " | ".join(f.what for f in findings if f.level == level)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([dict(image="a.jpg"), dict(image="b.jpg")], "without any text"),
        ([dict(image="a.jpg", caption="A."), dict(image="b.jpg", caption="B.")], "not one region"),
        ([dict(image=n, captions=["A mug."]) for n in ("a.jpg", "b.jpg")], "all with one caption"),
        (
            [
                dict(image=n, regions=[dict(bbox=BOX, caption=c)])
                for n, c in (("a.jpg", "a  scratch"), ("b.jpg", "A scratch"))
            ],
            "all with one phrase",
        ),
    ],
)
def test_nothing_to_contrast_is_to_be_fixed(tmp_path, rows, said):
    assert said in what(contrast_findings(load(tmp_path, rows)[0]))


def test_unread_keys_are_findings(tmp_path):
    _, rejects = load(tmp_path, renamed("bbox_info", "bbox_infos"))
    assert "`bbox_infos`" in what(unread_findings(rejects))
    assert rule_findings(rejects, "entries", 3) == []


@pytest.mark.parametrize("texts", [["a scratch"] * 12, [None] * 12])
def test_training_refuses_data_with_nothing_to_contrast(tmp_path, texts):
    with pytest.raises(DataError, match="nothing to contrast"):
        prepare_data(config(boxed(tmp_path, texts)))


def test_negatives_captions_and_made_negatives_are_something_to_contrast(tmp_path):
    data = boxed(tmp_path, ["dog"] * 12)
    assert len(prepare_data(config(data, make_negatives=2)).train)
    document = json.loads(data.read_text())
    for i, image in enumerate(document["images"]):
        image["caption"] = f"Photo {i} of a dog."
    data.write_text(json.dumps(document))
    assert len(prepare_data(config(data)).train)
    with pytest.raises(DataError, match="nothing to contrast"):
        prepare_data(config(data, global_weight=0.0))


def test_a_single_sample_in_each_step_has_nothing_to_contrast(tmp_path):
    rows = [dict(image=f"{i}.jpg", caption=f"Photo {i}.", split="train") for i in range(4)]
    photos(tmp_path, 4)
    load(tmp_path, rows)
    data = tmp_path / "data.json"
    with pytest.raises(DataError, match="Raise `batch_size`"):
        prepare_data(config(data, batch_size=1))
    assert len(prepare_data(config(data, batch_size=1, processes=2)).train) == 4


def captioned(folder, texts, splits):
    "The package's own file about photos, with or without a caption."
    photos(folder, len(texts))
    rows = [dict(image=f"{i}.jpg", split=s) for i, s in enumerate(splits)]
    for row, text in zip(rows, texts):
        row |= dict(short_caption=text) if text else {}
    load(folder, rows)
    return folder / "data.json"


SPARSE = ["a mug", "a jug"] + [None] * 30  # most batches of two hold no text


@pytest.mark.long
@pytest.mark.parametrize("caching", [0, 1])
def test_a_batch_without_text_is_passed_over_and_counted(tmp_path, caching):
    data = captioned(tmp_path, SPARSE, ["train"] * 32)
    run = train(config(data, batch_size=2, max_steps=3, gradient_caching=caching))
    losses = run.metrics().reindex(columns=["loss"])["loss"]
    finished = json.loads((run.path / "finished.json").read_text())
    assert finished["steps"] == len(losses) == 3 and finished["skipped"] == 0
    assert finished["textless"] == losses.isna().sum() > 0  # no loss, which is not a loss of 0
    assert (run.path / "report.html").exists()


@pytest.mark.long
def test_two_processes_agree_on_a_batch_without_text(tmp_path):
    "One of them has text and the other has none, or none has any."
    data = captioned(tmp_path, SPARSE[:12], ["train"] * 12)
    run = train(config(data, batch_size=2, max_steps=6, processes=2))
    finished = json.loads((run.path / "finished.json").read_text())
    assert finished["steps"] == 6 and 0 < finished["textless"] < 6


@pytest.mark.long
def test_a_validation_with_nothing_to_contrast_names_no_best(tmp_path, caplog):
    caplog.set_level("WARNING", logger="fgclip_nb")
    texts = [f"mug {i}" for i in range(6)] + ["a jug", None]
    data = captioned(tmp_path, texts, ["train"] * 6 + ["val"] * 2)
    run = train(config(data, batch_size=2, max_steps=3, eval_every=1, early_stop=1))
    finished = json.loads((run.path / "finished.json").read_text())
    assert finished["steps"] == 3 and finished["best"] == {}
    assert "2 held-out samples hold nothing to contrast" in caplog.text


@pytest.mark.long
def test_a_report_is_written_whatever_a_run_measured(tmp_path):
    "Zeros everywhere, no loss at all, one step, numbers that are not finite."
    from fgclip_nb.core.folder import Run
    from fgclip_nb.diagnostics.plots import plot_updates
    from fgclip_nb.diagnostics.report import conclude

    zeros = dict(loss=0.0, loss_region=0.0, grad_norm=0.0, lr=0.0)
    rows = dict(zeros=zeros, silent={}, infinite=dict(zeros, loss=float("inf")))
    for name, row in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        steps = 1 if name == "silent" else 3
        lines = [json.dumps(dict(step=i + 1, **row)) for i in range(steps)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "params.yaml").write_text("max_grad_norm: 1.0\nmax_steps: 3\n")
        assert plot_updates(folder)
        conclude(Run(folder))
        assert "could not be drawn" not in (folder / "report.html").read_text()
