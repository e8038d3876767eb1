"""What an eighth independent attack found, kept from coming back.

Whole data sets, evaluations and commands as users have them, not one function at a time."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from PIL import Image

from fgclip_nb import (
    CachedFeatures,
    Run,
    Sample,
    Region,
    TrainConfig,
    compare_evaluations,
    evaluate,
    frame_auc,
    load_model,
    load_samples,
    prepare_data,
    read_image,
)
from fgclip_nb.evaluation.classification import class_features
from fgclip_nb.evaluation.encoder import Encoder
from fgclip_nb.evaluation.held_out import read_evaluation_samples, seen_in_training, some_of
from fgclip_nb.data.roles import write_roles
from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.runs.reproduction import reproduce
from fgclip_nb.training.loop import train
from fgclip_nb.evaluation.annotations import AnomalyVideo
from fgclip_nb.evaluation.ranking import cosines, unit
from fgclip_nb.runs.__main__ import main
from fgclip_nb.runs.comparison import compare_runs
import micro
from synthetic_runs import synthetic_run


def test_violent_videos_alone_are_annotated_in_xd_violence(tmp_path, told):
    rng = np.random.default_rng(0)
    scores, lines, labels = {}, [], []
    for k in range(6):
        scores[f"v{k}__#1_label_B1-0-0"] = rng.random(40)
        lines.append(f"v{k}__#1_label_B1-0-0.mp4 10 19")
        labels.append(np.isin(np.arange(40), np.arange(10, 20)))
    for k in range(4):
        scores[f"n{k}__#1_label_A"] = rng.random(40)
        labels.append(np.zeros(40, bool))
    (tmp_path / "annotations.txt").write_text("\n".join(lines))
    figures = frame_auc(scores | {"w__#1_label_B2-0-0": [0.5]}, tmp_path / "annotations.txt")
    expected = roc_auc_score(np.concatenate(labels), np.concatenate(list(scores.values())))
    assert figures["auc"] == pytest.approx(expected)
    assert (figures["normal_videos"], figures["anomalous_videos"]) == (4, 6)
    assert figures["unannotated"] == ["w__#1_label_B2-0-0"]
    assert "4 scored videos without a line are normal by their names" in "\n".join(told)
    assert "1 of 11 scored videos are not annotated and do not count" in "\n".join(told)


def test_a_table_as_excel_saves_it_abroad(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    rows = ["sep=;", "image;label;x1;y1;x2;y2", "a.png;tiger;0,25;0,5;0,5;1,0"]
    (tmp_path / "boxes.csv").write_text("\r\n".join(rows), encoding="utf-8-sig")
    samples, rejects = load_samples(tmp_path / "boxes.csv")
    (region,) = samples[0].regions
    assert (region.box, region.phrase, rejects) == ((0.25, 0.5, 0.5, 1.0), "a tiger", [])


@pytest.mark.parametrize(
    "text", ["image,label,x1,y1,x2,y2\na.png,3,1,1,9,9\n", "image,caption\na.png,nan\n"]
)
def test_what_is_no_text_is_not_learnt(tmp_path, text):
    "The number of a class, and pandas' mark for a value that is missing."
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text(text)
    samples, rejects = load_samples(tmp_path / "data.csv")
    assert not any(s.regions or s.captions for s in samples)
    assert len(rejects) == 1 and rejects[0].reason


def test_runs_of_one_name_stay_two(tmp_path, capsys):
    for day, scale in (("monday", 2.6592), ("tuesday", 4.6052)):
        params = dict(logit_scale_init=scale)
        synthetic_run(tmp_path / day / "train", steps=30, scale=scale, params=params)
    assert main(["compare", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "monday/train" in told and "tuesday/train" in told
    assert list(compare_runs(tmp_path).differing.columns) == ["monday/train", "tuesday/train"]


def pairs(folder, rows, name="a.json"):
    "Samples of rows of the package's own format, with a grey photo each."
    for row in rows:
        Image.new("RGB", (32, 24)).save(folder / row["image"])
    (folder / name).write_text(json.dumps(rows))
    samples, rejects = load_samples(folder / name, media_root=str(folder))
    assert not rejects
    return samples


def cached(folder, **arrays):
    "`CachedFeatures` of arrays (npy) and lists (JSON)."
    folder.mkdir()
    for name, values in arrays.items():
        if isinstance(values, list):
            (folder / f"{name}.json").write_text(json.dumps(values))
        else:
            np.save(folder / f"{name}.npy", values.astype(np.float32))
    return CachedFeatures(folder)


def test_rows_of_one_photo_are_compared_each_with_itself(tmp_path):
    "A row per region: regions of one photo in several rows have equal ids."
    rows = [
        {
            "image": f"p{i}.png",
            "regions": [
                {
                    "caption": f"thing {i} {k}",
                    "bbox": [0.1 * k, 0.1, 0.1 * k + 0.4, 0.6],
                    "negatives": [f"other {i} {k}"],
                }
            ],
        }
        for i in range(12)
        for k in range(4)
    ]
    samples = pairs(tmp_path, rows)
    regions = [r for s in samples for r in s.regions]
    texts = [t for r in regions for t in (r.phrase, *r.negatives)]
    vectors = np.random.default_rng(0).normal(size=(len(texts), 8))
    by_text = dict(zip(texts, vectors))

    def scored(name, right):
        known = [
            by_text[r.phrase if int(r.phrase[-1]) in right else r.negatives[0]] for r in regions
        ]
        features = cached(
            tmp_path / name,
            region_features=np.array(known),
            region_boxes=np.array([r.box for r in regions]),
            region_names=[Path(s.media).name for s in samples],
            text_features=vectors,
            texts=texts,
        )
        return evaluate(features, samples, tasks=["hard_negatives"])

    first, second = scored("first", {0, 1}), scored("second", {0, 1, 2})
    table = compare_evaluations(first, second)
    row = table[table.metric == "acc1"].iloc[0]
    assert (row["first"], row["second"], row["items"]) == (0.5, 0.75, 48)


@pytest.mark.parametrize("captions", [1, 3])
def test_a_photo_less_shifts_no_caption(tmp_path, captions):
    rows = [
        {"image": f"p{i}.png", "captions": [f"caption {i} {k}" for k in range(n)]}
        for i, n in enumerate([captions] + [3] * 11)
    ]
    samples = pairs(tmp_path, rows)
    texts = [c for s in samples for c in s.captions]
    numbers = [tuple(map(int, t.split()[1:])) for t in texts]
    vectors = np.array([np.eye(12)[i if k else (i + 1) % 12] for i, k in numbers])

    def scored(name, there):
        names = [rows[i]["image"] for i in there]
        features = dict(image_features=np.eye(12)[there], image_names=names)
        features |= dict(text_features=vectors, texts=texts)
        return evaluate(cached(tmp_path / name, **features), samples, tasks=["short_retrieval"])

    table = compare_evaluations(scored("all", [*range(12)]), scored("less", [*range(1, 12)]))
    row = table[(table["list"] == "t2i") & (table.metric == "r1")].iloc[0]
    assert (row["items"], row["only_second"]) == (33, 0)
    assert row["first"] == row["second"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_one_score_for_every_two_frames_is_no_score_per_frame(every):
    rng = np.random.default_rng(every)
    videos, scores, frames = {}, {}, {}
    for k in range(8):
        n = 101 + 2 * k
        labels = np.zeros(n, bool)
        labels[40:70] = k < 4
        name = f"v{k}"
        videos[name] = AnomalyVideo(name, ("Abuse",) * (k < 4), ((40, 69),) * (k < 4))
        noise = rng.random(n) / 10
        scores[name] = (labels + noise)[::every]
        frames[name] = n
    for segment in (None, every):
        told = frame_auc(scores, videos, frames, segment=segment, repeats=0)
        assert told["frames"] == sum(frames.values()) and told["auc"] > 0.9


def test_orthogonal_vectors_tie_on_every_processor():
    rng = np.random.default_rng(0)
    a, b = (unit(np.round(rng.normal(size=(n, 3)))) for n in (40, 200))
    one_by_one = [[np.float32(round(sum(x * y), 12)) for y in b] for x in a]
    assert (cosines(a, b) == np.array(one_by_one)).all()


def coco_of_turned_photos(folder, orientations=(1, 5, 6, 8)):
    "Photos with a red thing, each with its EXIF note, and COCO boxes drawn on the stored pictures."
    images, annotations = [], []
    for k, orientation in enumerate(orientations):
        stored = np.zeros((60, 100, 3), np.uint8)
        stored[5:25, 60:90] = (250, 10, 10)
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(stored).save(folder / f"{k}.png", exif=exif)
        images.append(dict(id=k, file_name=f"{k}.png", width=100, height=60))
        box = dict(bbox=[60, 5, 30, 20], image_id=k, id=k + 1, category_id=k, area=600, iscrowd=0)
        annotations.append(box)
    categories = [dict(id=k, name=f"car {k}") for k in range(len(orientations))]
    whole = dict(images=images, annotations=annotations, categories=categories)
    (folder / "instances.json").write_text(json.dumps(whole))
    return folder / "instances.json"


def test_an_evaluation_asks_about_the_boxes_that_training_saw(tmp_path):
    data = coco_of_turned_photos(tmp_path)
    trained = prepare_data(TrainConfig(data=str(data), media_root=str(tmp_path)))
    seen = {s.media: [r.box for r in s.regions] for s in (*trained.train, *trained.val)}
    for given in (str(data), load_samples(data, media_root=str(tmp_path))[0]):
        samples, rejects, _ = read_evaluation_samples(given, str(tmp_path))
        assert {s.media: [r.box for r in s.regions] for s in samples} == seen and not rejects
    for s in samples:
        picture = read_image(s.media)
        shares = np.array(s.regions[0].box) * np.tile(picture.shape[1::-1], 2)
        x1, y1, x2, y2 = shares.round().astype(int)
        assert (picture[y1:y2, x1:x2, 0] > 200).all()


def test_photos_of_another_size_are_no_questions(tmp_path):
    data = coco_of_turned_photos(tmp_path, (1, 1))
    whole = json.loads(data.read_text())
    whole["images"][0] |= dict(width=60, height=100)
    data.write_text(json.dumps(whole))
    samples, rejects, _ = read_evaluation_samples(str(data), str(tmp_path))
    assert [len(s.regions) for s in samples] == [0, 1]
    assert [r.rule for r in rejects] == ["other_size"]


@pytest.mark.parametrize("ties", ["against", "official"])
def test_boxes_that_show_nothing_are_not_scored(tmp_path, ties):
    "Boxes in pixels and boxes turned over have features of zeros, which tie with every text."
    boxes = ((10, 20, 30, 24), (0.9, 0.9, 0.1, 0.1), (0.5, 0.5, 0.5, 0.9), (0.1, 0.1, 0.9, 0.9))
    image = str(tmp_path / "a.png")
    Image.new("RGB", (64, 48)).save(image)
    regions = [Region(f"thing {k}", box=b, negatives=("no", "not")) for k, b in enumerate(boxes)]
    samples = [Sample(id="a", media=image, regions=regions)]
    told = evaluate("tiny", samples, tasks=["hard_negatives"], ties=ties, permutations=20)
    table = told.results["hard_negatives"]["given"]
    assert (table["queries"], table["asked"], sum(table["lost"].values())) == (1, 4, 3)


def test_a_table_is_evaluated_by_the_columns_it_was_trained_with(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = io.BytesIO()
    Image.new("RGB", (32, 24)).save(png, "PNG")
    photo = dict(bytes=png.getvalue(), path="a.png")
    rows = dict(foto=[photo] * 3, beschreibung=["a cat", "a dog", "a cow"])
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    columns = "image=foto, short_caption=beschreibung"
    (tmp_path / "run").mkdir()
    params = f"data: {tmp_path / 't.parquet'}\ncolumns: '{columns}'\n"
    (tmp_path / "run/params.yaml").write_text(params)
    for how in (dict(model=str(tmp_path / "run")), dict(columns=columns)):
        samples, rejects, _ = read_evaluation_samples(str(tmp_path / "t.parquet"), **how)
        assert sorted(s.short_caption for s in samples) == ["a cat", "a cow", "a dog"]


def test_phrases_of_regions_are_read_by_the_head_that_regions_train(tmp_path):
    torch.manual_seed(0)
    model = load_model("fgclip2-tiny")
    encoder = Encoder(model)
    before = class_features(encoder, ["cat", "dog"], ["a {}"], phrase=True)
    plain = class_features(encoder, ["cat", "dog"], ["a {}"])
    samples = [s for s in load_samples("sample")[0] if s.regions][:4]
    asked = dict(tasks=["region_phrases"], permutations=20)
    scores = evaluate(model, samples, **asked).items["region_phrases"]["phrases"]
    with torch.no_grad():
        model.boxtext_head.weight.normal_()
    other = Encoder(model)
    assert not np.allclose(class_features(other, ["cat", "dog"], ["a {}"], phrase=True), before)
    assert np.allclose(class_features(other, ["cat", "dog"], ["a {}"]), plain)
    again = evaluate(model, samples, **asked).items["region_phrases"]["phrases"]
    assert (scores.ranks != again.ranks).any()


def test_test_media_are_left_out_however_their_names_are_composed(tmp_path):
    names = ["caf\u00e9.png", "\u00fcber.png", *(f"p{k}.png" for k in range(12))]
    rows = [{"image": name, "caption": f"photo of {name}"} for name in names]
    pairs(tmp_path, rows)
    listed = [unicodedata.normalize("NFD", name) for name in names[:3]]
    (tmp_path / "test.txt").write_text("\n".join(listed))
    cfg = TrainConfig(
        data=str(tmp_path / "a.json"),
        media_root=str(tmp_path),
        test_data=str(tmp_path / "test.txt"),
    )
    data = prepare_data(cfg)
    assert {Path(s.media).name for s in (*data.train, *data.val)} == set(names[3:])


@pytest.mark.ci
def test_the_scale_of_fp16_is_no_fault_of_the_run(tmp_path):
    world = micro.micro_world(tmp_path)
    params = dict(world, precision="fp16", max_steps=24, output=str(tmp_path / "run"))
    assert micro.run(params) == 0
    run = Run(tmp_path / "run")
    assert run.metrics()["overflows"].sum() > 0
    told = {v["name"]: v["result"] for v in run.verdicts()}
    assert told["finite_numbers"] == told["steps_skipped"] == "pass"


def noise(seed):
    "The bytes of a picture that no other seed has."
    kept = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(kept, "PNG")
    return kept.getvalue()


def rows_in_parquet(folder, paths, pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [dict(bytes=p, path=path) for p, path in zip(pictures, paths)]
    rows = dict(image=pictures, caption=[f"picture number {k}" for k in range(len(paths))])
    pq.write_table(pa.table(rows), folder / "t.parquet")
    return folder / "t.parquet"


def rows_in_tar(folder, paths, pictures):
    with tarfile.open(folder / "t.tar", "w") as tar:
        for k, (path, picture) in enumerate(zip(paths, pictures)):
            about = json.dumps(dict(url=path, caption=f"picture number {k}")).encode()
            for suffix, content in (("png", picture), ("json", about)):
                member = tarfile.TarInfo(f"{k:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "t.tar"


@pytest.mark.parametrize("written", [rows_in_parquet, rows_in_tar])
def test_names_beside_pictures_are_no_identities(tmp_path, written):
    "`datasets` keeps the last part of a path alone, and of a URL many photos may have one."
    scores = []
    for name, paths in (("equal", ["image.png"] * 8), ("own", [f"{k}.png" for k in range(8)])):
        (tmp_path / name).mkdir()
        data = written(tmp_path / name, paths, map(noise, range(8)))
        samples = load_samples(data)[0]
        assert len({s.id for s in samples}) == len({s.media for s in samples}) == 8
        told = evaluate("tiny", str(data), tasks=["short_retrieval"], permutations=20)
        scores.append(told.results["short_retrieval"]["i2t"])
    assert scores[0]["queries"] == scores[1]["queries"] == 8
    assert scores[0]["chance"] == scores[1]["chance"] and scores[0]["r1"] == scores[1]["r1"]


def test_a_stream_is_not_held_in_memory_and_equal_pictures_are_one(tmp_path):
    data = rows_in_parquet(tmp_path, ["a.png", "b.png", "c.png"], map(noise, (1, 2, 1)))
    samples, rejects, _ = read_evaluation_samples(str(data))
    assert not any(isinstance(s.data, bytes) for s in samples) and not rejects
    assert samples[0].media == samples[2].media != samples[1].media
    assert samples[1].encoded == noise(2)
    some = some_of(load_samples(data)[0], 2)
    assert [s.encoded for s in some] == [noise(1), noise(1)]


def test_places_in_galleries_of_other_sizes_are_not_compared(tmp_path, told):
    rows = [{"image": f"p{i}.png", "captions": [f"caption {i}"]} for i in range(24)]
    samples = pairs(tmp_path, rows)
    few, all_of_them = (
        evaluate("tiny", part, tasks=["short_retrieval"], permutations=20)
        for part in (samples[:12], samples)
    )
    table = compare_evaluations(few, all_of_them)
    assert not table.decided.any()
    assert "ranked among 12 candidates in the first and 24 in the second" in "\n".join(told)


def test_a_folder_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("hello")
    cfg = TrainConfig(output=str(tmp_path), device="cpu", max_steps=1)
    with pytest.raises(ConfigError, match="metrics.jsonl and no params.yaml"):
        train(cfg)
    assert (tmp_path / "metrics.jsonl").read_text() == "hello"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_cannot_bring_code_that_is_executed(tmp_path, monkeypatch):
    run = tmp_path / "theirs"
    run.mkdir()
    (run / "params.yaml").write_text("extensions: theirs.evil\n")
    (run / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="it is not executed unasked"):
        reproduce(run)
    assert not (tmp_path / "ran").exists()


def test_corners_where_sizes_belong_are_told_before_training(tmp_path, told):
    rng = np.random.default_rng(0)
    start, size = rng.integers(0, 50, (30, 2)), rng.integers(10, 50, (30, 2))
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    boxes = np.hstack([start, start + size]).tolist()
    objects = dict(bbox=boxes, category=[f"thing {k}" for k in range(30)])
    row = dict(file_name="a.png", width=100, height=100, objects=objects)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    read_evaluation_samples(str(tmp_path / "metadata.jsonl"))
    assert "all 30 fit into it as two corners" in "\n".join(told)


@pytest.mark.ci
def test_a_run_does_not_become_shorter(tmp_path):
    world = micro.micro_world(tmp_path)
    params = dict(world, lr_schedule="constant", output=str(tmp_path / "run"))
    assert micro.run(dict(params, max_steps=6)) == 0
    before = (tmp_path / "run/params.yaml").read_bytes()
    assert micro.run(dict(params, max_steps=4)) == 2
    assert (tmp_path / "run/params.yaml").read_bytes() == before and Run(tmp_path / "run").finished
    said = "".join(p.read_text() for p in tmp_path.glob("run.*.txt"))
    assert "has 6 steps already, and 4 are asked for" in said


def test_keys_of_tars_are_those_of_many(tmp_path):
    "A new set whose keys begin at 00000 again, as every set of img2dataset's, is a new set."
    for name, first in (("train", 0), ("test", 100)):
        (tmp_path / name).mkdir()
        rows_in_tar(tmp_path / name, [""] * 30, map(noise, range(first, first + 30)))
    params = dict(data=str(tmp_path / "train/t.tar"), split="auto")
    data = prepare_data(TrainConfig(**params))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/params.yaml").write_text(json.dumps(params))
    write_roles(tmp_path / "run", data.train, data.val)
    run = str(tmp_path / "run")
    scored, _, part = read_evaluation_samples(str(tmp_path / "test/t.tar"), None, "auto", run)
    assert len(scored) == 30 and "bear names that this run trained on" in part
    assert not seen_in_training(run, scored)
    scored, _, part = read_evaluation_samples(params["data"], None, "auto", run)
    assert len(scored) == len(data.val) and "held out" in part
    both = TrainConfig(**params, test_data=str(tmp_path / "test/t.tar"))
    assert len(prepare_data(both).train) == len(data.train)
    own = TrainConfig(**params, test_data=params["data"])
    with pytest.raises(DataError, match="nearly all|every|all of"):
        prepare_data(own)


def test_a_box_without_a_class_is_none(tmp_path):
    objects = [
        dict(bbox=[0.1, 0.1, 0.5, 0.5], category=""),
        dict(bbox=[0, 0, 1, 1], category="cup"),
    ]
    rows = [{"image": "a.png", "objects": objects}]
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.csv").write_text("image,label,x1,y1,x2,y2\na.png,,1,1,9,9\na.png,nan,1,1,9,9\n")
    samples, rejects = load_samples(tmp_path / "a.json")
    assert [r.phrase for r in samples[0].regions] == ["a cup"] and len(rejects) == 1
    samples, rejects = load_samples(tmp_path / "b.csv")
    assert not any(s.regions for s in samples) and len(rejects) == 2
