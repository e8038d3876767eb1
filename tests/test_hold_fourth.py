"""What a fourth attack found: inputs read as something else, or dropped without a word."""

import gzip
import json
import os
import time
from types import SimpleNamespace

import micro
import numpy as np
import pytest
import torch
from PIL import Image
from rebind import rebind

from fgclip_nb.core.folder import Run
from fgclip_nb.core.identity import stable_id
from fgclip_nb.data.audit import phrase_facts
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.samples import Region, Sample
from fgclip_nb.diagnostics.inputs import own_boxes, own_texts
from fgclip_nb.diagnostics.judgement import headline, verdicts
from fgclip_nb.evaluation.annotations import read_anomaly_annotations


def yolo(folder, labels=True, **description):
    "A data.yaml with one photo to train on and one to validate on."
    for part in ("train", "val"):
        (folder / f"images/{part}").mkdir(parents=True)
        (folder / f"labels/{part}").mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(folder / f"images/{part}/1.jpg")
        if labels:
            (folder / f"labels/{part}/1.txt").write_text("0 .5 .5 .5 .5\n")
    said = dict(train="images/train", val="images/val", names="[person]") | description
    (folder / "data.yaml").write_text("".join(f"{k}: {v}\n" for k, v in said.items()))
    return folder / "data.yaml"


def dangling(path):
    os.symlink("gone.txt", path)


@pytest.mark.parametrize("make", [dangling, os.mkfifo, os.mkdir])
def test_labels_that_are_there_and_cannot_be_read_are_a_reject(tmp_path, make):
    path = yolo(tmp_path, labels=False)
    make(tmp_path / "labels/train/1.txt")
    (tmp_path / "labels/val/1.txt").write_text("0 .5 .5 .5 .5\n")
    samples, rejects = load_samples(path)
    assert [s.id for s in samples] == ["images/val/1.jpg"]
    assert [r.field for r in rejects] == ["labels"]


@pytest.mark.parametrize("names", ["[on, off]", "{0: null}", "[010]", "[{x: 1}]"])
def test_a_name_that_yaml_reads_as_no_text_is_told(tmp_path, names):
    samples, rejects = load_samples(yolo(tmp_path, names=names))
    assert not samples and "write it in quotes" in rejects[0].reason


@pytest.mark.parametrize("train", ["empty", "[7]", "list.txt"])
def test_a_part_without_a_photo_is_counted(tmp_path, train):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n")
    samples, rejects = load_samples(yolo(tmp_path, train=train))
    assert len(samples) == 1 and len(rejects) == 1


@pytest.mark.parametrize(
    "line",
    ["step {} loss {} lr 1e-4", "step {}: loss={}, lr=1e-4", "{{'step': {}, 'loss': {}, 'lr': 1}}"],
)
@pytest.mark.parametrize("first", [0, 50])
def test_a_log_of_nan_is_told(tmp_path, line, first):
    log = tmp_path / "run.log"
    log.write_text("\n".join(line.format(i, 3.0 if i < first else "nan") for i in range(100)))
    assert headline(verdicts(log)).startswith("finite_numbers")


def test_records_that_are_none_are_no_traceback(tmp_path):
    state = tmp_path / "trainer_state.json"
    state.write_text('{"log_history": null}')
    with pytest.raises(ValueError, match="not a list of records"):
        verdicts(state)
    state.write_text('{"log_history": [5, null, {"loss": 1.0, "step": 1}], "global_step": "x"}')
    assert verdicts(state)
    log = tmp_path / "run.log"
    log.write_text("\n".join(f"step {10**400 + i} loss 1.0" for i in range(40)))
    assert verdicts(log)


def test_a_gzipped_log_is_read_and_a_pipe_is_called_one(tmp_path):
    text = "\n".join(f"step {i} loss {'nan' if i > 9 else 3.0} lr 1e-4" for i in range(99))
    for name in ("run.log.gz", "run.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert headline(verdicts(tmp_path / "run.log.gz")).startswith("finite_numbers")
    table = "step,loss\n" + "\n".join(f"{i},nan" for i in range(99))
    (tmp_path / "run.csv.gz").write_bytes(gzip.compress(table.encode()))
    assert headline(verdicts(tmp_path / "run.csv.gz")).startswith("finite_numbers")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="a pipe or device"):
        load_samples(tmp_path / "pipe.json")


def test_empty_captions_are_left_out_and_told(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    box = dict(bbox=[0, 0, 0.5, 0.5], caption="a dog")
    rows = [
        dict(image="a.jpg", captions=said, regions=[box], short_caption="")
        for said in ([""], ["", "a dog runs"], [], ["a cat"])
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples, rejects = load_samples(path)
    assert [s.captions for s in samples] == [(), ("a dog runs",), (), ("a cat",)]
    assert [r.rule for r in rejects] == ["empty_text"] * 2


def photos_go():
    "In a child: the photos are removed when the last step is done."

    def first(look_back):
        def looked(s, held_out):
            for sample in [*s.data.train, *held_out]:
                os.unlink(sample.media)
            return look_back(s, held_out)

        return looked

    rebind("look_back", first)


@pytest.mark.ci
def test_a_run_whose_photos_go_at_its_end_has_its_verdicts(tmp_path):
    params = micro.micro_world(tmp_path) | dict(output=str(tmp_path / "run"), max_steps=4)
    assert micro.run(params, change=photos_go) == 0
    assert (tmp_path / "run/report.html").exists() and Run(tmp_path / "run").finished
    assert "could not be asked" in (tmp_path / "run/training.log").read_text()


@pytest.mark.parametrize("first", [0, 10])
@pytest.mark.parametrize("value", ["nan", None])
def test_a_run_folder_of_nan_is_told(tmp_path, first, value):
    rows = [dict(step=n, loss=3.0 if n < first else value, skipped=0) for n in range(1, 41)]
    (tmp_path / "params.yaml").write_text("data: sample\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert headline(verdicts(tmp_path)).startswith("finite_numbers")


def test_counts_that_are_none_are_no_traceback(tmp_path):
    rows = [dict(step=n, loss=3.0, skipped=float("inf")) for n in range(1, 41)]
    (tmp_path / "params.yaml").write_text("data: sample\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert verdicts(tmp_path)


def test_a_name_with_half_a_letter_is_a_reject(tmp_path):
    rows = [dict(image="\ud800.jpg", captions=["a cat"])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples, rejects = load_samples(tmp_path / "d.jsonl")
    assert not samples and len(rejects) == 1


def test_annotations_with_a_byte_order_mark_name_their_first_video(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffAbuse001_x264.mp4 Abuse 10 20 -1 -1\n")
    videos, rejects = read_anomaly_annotations(tmp_path / "a.txt")
    assert list(videos) == ["Abuse001_x264"] and not rejects


def test_one_photo_with_ten_thousand_boxes_is_looked_at_in_moments():
    boxes = np.random.default_rng(0).random((10_000, 4)).round(3)
    regions = [Region(f"thing number {n}", box=tuple(map(float, b))) for n, b in enumerate(boxes)]
    sample = Sample("a", "a.jpg", regions=regions)
    many = torch.zeros(10_000, dtype=torch.int64)
    batch = SimpleNamespace(
        boxes=torch.tensor(boxes), box_region=torch.arange(10_000), box_image=many
    )
    batch.frame_clip, batch.region_clip, batch.caption_rows = many[:1], many, many[:0]
    batch.caption_ids = many[:0]
    batch.region_caption_ids = torch.tensor([stable_id(r.phrase) for r in regions])
    begun = time.process_time()
    assert own_boxes(batch, [sample]) == {"own_boxes": 1.0}
    assert own_texts(batch, [sample]) == {"own_phrases": 1.0}
    assert time.process_time() - begun < 20  # was minutes


def test_one_photo_with_many_phrases_cuts_no_texts():
    few = [Sample(f"s{n}", "", regions=[Region("a red mug")] * 2) for n in range(20)]
    many = Sample("m", "", regions=[Region(f"a mug number {n} on the table") for n in range(9999)])
    facts = phrase_facts([*few, many])
    assert facts["n"] == 10_039 and facts["tokens"] < phrase_facts([many])["tokens"] - 1
