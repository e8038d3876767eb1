"""What a seventh attack found: keypoints taken for outlines, runs that forget whom they trained on,
a machine without git, a caption that says CLIP's end mark."""

import contextlib
import json
import shutil

import pytest

import micro
from fgclip_nb.core.identity import ConfigError


def pose_set(folder, shape, line):
    from PIL import Image

    for part in ("images/train", "labels/train"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(folder / "images/train/1.jpg")
    (folder / "labels/train/1.txt").write_text(line + "\n")
    about = f"train: images/train\nnames: [tiger]\nkpt_shape: {shape}\n"
    (folder / "data.yaml").write_text(about)
    return folder / "data.yaml"


@pytest.mark.parametrize(
    "shape, points",
    [("[2, 2]", "0.1 0.1 0.9 0.9"), ("[2, 3]", "0.1 0.1 2 0.9 0.9 0"), ("[2, 2]", "")],
)
def test_the_box_of_a_pose_is_its_box(tmp_path, shape, points):
    from fgclip_nb.data.load import load_samples

    samples, rejects = load_samples(pose_set(tmp_path, shape, f"0 0.5 0.5 0.2 0.4 {points}"))
    (region,) = samples[0].regions
    assert region.box == pytest.approx((0.4, 0.3, 0.6, 0.7)) and not rejects


@pytest.mark.parametrize("shape, said", [("[3, 2]", "kpt_shape"), ("17", "number of points")])
def test_a_pose_of_another_shape_is_a_reject(tmp_path, shape, said):
    from fgclip_nb.data.load import load_samples

    _, rejects = load_samples(pose_set(tmp_path, shape, "0 0.5 0.5 0.2 0.4 0.1 0.1 0.9 0.9"))
    assert len(rejects) == 1 and said in rejects[0].reason


def test_no_git_is_no_fault(tmp_path, monkeypatch):
    from fgclip_nb.core.identity import code_identity

    monkeypatch.setenv("PATH", str(tmp_path))
    code = code_identity()
    assert (code["commit"], code["diff"]) == ("", "") and code["package"]


@pytest.mark.parametrize("said", ["a cat<|endoftext|>", "a <|endoftext|> b", "<|endoftext|>"])
def test_a_text_ends_where_it_says_so(said):
    "CLIP and transformers take the feature at the first end mark."
    from fgclip_nb.text.packing import tokenize
    from fgclip_nb.text.tokenizer import EOS

    batch = tokenize([said, "a dog"])
    ids = batch.input_ids[batch.index[0], : batch.lengths[batch.index[0]]].tolist()
    assert ids.index(EOS) == len(ids) - 1
    assert ids == tokenize(said.partition("<|endoftext|>")[0]).input_ids[0].tolist()
    assert batch.whole[0] > len(ids), "the diagnostics can tell that it was cut"


# Whom a run from shards or a stream trained on


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from fgclip_nb.data.__main__ import main

    folder = tmp_path_factory.mktemp("shards")
    params = micro.micro_world(folder, photos=40, held_out=6)
    assert main(["convert", params["data"], str(folder / "shards")]) in (None, 0)
    return folder, dict(params, data=str(folder / "shards"))


def run_of(params, folder, **more):
    "A run folder as training leaves it at its start."
    import yaml

    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.data.roles import write_roles
    from fgclip_nb.training.rundata import prepare_data

    cfg = TrainConfig(**params | more, output=str(folder))
    data = prepare_data(cfg)
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(cfg.as_dict()))
    write_roles(folder, data.train, data.val)
    return data


@contextlib.contextmanager
def elsewhere(folder, place):
    "While inside, a folder lies in another place."
    folder.rename(place)
    try:
        yield
    finally:
        place.rename(folder)


def test_a_run_from_shards_keeps_whom_it_trained_on(shards, tmp_path):
    from fgclip_nb.evaluation.held_out import read_evaluation_samples, seen_in_training

    folder, params = shards
    data = run_of(params, tmp_path / "run")
    shutil.copytree(folder / "shards", tmp_path / "away")
    with elsewhere(folder / "shards", folder / "gone"):
        scored, _, part = read_evaluation_samples(
            str(tmp_path / "away"), None, "auto", str(tmp_path / "run")
        )
    assert {s.id for s in scored} == set(data.val.column("id")) and "held out" in part
    assert not seen_in_training(str(tmp_path / "run"), scored)


@pytest.mark.parametrize("listed", [True, False])
def test_what_a_run_left_out_is_not_what_it_trained_on(shards, tmp_path, listed):
    from fgclip_nb.evaluation.held_out import read_evaluation_samples

    folder, params = shards
    lines = [json.loads(line) for line in open(folder / "data/regions.jsonl")]
    key = next(k for k in lines[0] if str(lines[0][k]).endswith(".png"))
    names = [row[key] for row in lines[:10]]
    (tmp_path / "test.txt").write_text("".join(f"{name}\n" for name in names))
    data = run_of(params, tmp_path / "run", test_data=str(tmp_path / "test.txt"))
    assert len(data.train) + len(data.val) == 36
    if not listed:  # by an older version
        (tmp_path / "run/split.parquet").unlink()
    own = folder / "data" / f"test_{listed}.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in lines[:10]))
    scored, _, part = read_evaluation_samples(str(own), None, "auto", str(tmp_path / "run"))
    assert len(scored) == 10, part


def test_a_run_that_left_no_list_and_lost_its_data_says_so(shards, tmp_path, capsys):
    from fgclip_nb.evaluation.held_out import read_evaluation_samples

    folder, params = shards
    run_of(params, tmp_path / "run")
    (tmp_path / "run/split.parquet").unlink()
    with elsewhere(folder / "shards", folder / "gone"):
        scored, _, part = read_evaluation_samples(
            str(folder / "gone"), None, "auto", str(tmp_path / "run")
        )
    assert len(scored) == 46 and "whether the run trained on them is not known" in part
    assert "what this run trained on is not known" in capsys.readouterr().out


def test_a_damaged_list_of_roles_names_its_file(tmp_path):
    from fgclip_nb.core.identity import DataError
    from fgclip_nb.data.roles import kept_roles

    (tmp_path / "split.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="split.parquet: not readable"):
        kept_roles(tmp_path)


@pytest.mark.parametrize("split", ["train", "test", "none"])
def test_parts_of_shards_are_settled_when_they_are_made(shards, split):
    from fgclip_nb.data.load import load_samples

    with pytest.raises(ConfigError, match=f"convert again with --split {split}"):
        load_samples(shards[1]["data"], split=split)


@pytest.mark.parametrize("what", ["images", "categories", "the same twice"])
def test_an_id_that_two_entries_have_is_a_reject(tmp_path, what):
    from PIL import Image

    from fgclip_nb.data.load import load_samples

    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60)).save(tmp_path / name)
    images = [dict(id=k, file_name=f"{n}.png", width=80, height=60) for k, n in enumerate("ab")]
    categories = [dict(id=1, name="cat"), dict(id=2, name="dog")]
    box = dict(bbox=[1, 1, 20, 20])
    annotations = [dict(id=k, image_id=k, category_id=k + 1, **box) for k in (0, 1)]
    images += [dict(images[1], id=0)] * (what == "images") + images * (what == "the same twice")
    categories += [dict(id=1, name="horse")] * (what == "categories")
    content = dict(images=images, categories=categories, annotations=annotations)
    (tmp_path / "a.json").write_text(json.dumps(content))
    samples, rejects = load_samples(tmp_path / "a.json")
    kept = sorted((s.id, r.phrase) for s in samples for r in s.regions)
    rules = {r.rule for r in rejects}
    if what == "the same twice":
        assert kept == [("a.png", "a cat"), ("b.png", "a dog")] and not rules
    else:
        assert kept == [("b.png", "a dog")] and "duplicate_key" in rules


def test_cells_of_a_sweep_never_share_a_folder():
    from fgclip_nb.runs.sweeps import named_cells, parse_grid

    long = "x" * 120
    models = ["m/a", "m-a", f"{long}/a", f"{long}-a"]
    named = named_cells(dict(model=models, seed=[0, 1]))
    assert len(named) == 8 and not any("/" in name for name in named)
    assert named == named_cells(dict(model=models, seed=[0, 1]))
    with pytest.raises(ConfigError, match="`seed` is given twice"):
        parse_grid([("seed", "0"), ("seed", "1")])


def test_an_output_that_is_a_file_is_said_to_be_one(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.preparation import open_folder

    (tmp_path / "taken").write_text("mine")
    for output in ("taken", "taken/run"):
        with pytest.raises(ConfigError, match="there is a file"):
            open_folder(TrainConfig(output=str(tmp_path / output)), is_main=True)
    assert (tmp_path / "taken").read_text() == "mine"


def test_two_entries_about_one_photo_are_one_photo():
    import numpy as np

    from fgclip_nb.data.samples import Sample
    from fgclip_nb.evaluation.captions import caption_retrieval

    class Perfect:
        cut = set()

        def why_lost(self, sample):
            return "lost"

        def images(self, samples):
            return np.eye(12)[[int(s.media) for s in samples]], np.arange(len(samples))

        def texts(self, texts, long=False):
            return np.eye(12)[[int(t.split()[1]) for t in texts]]

    samples = [
        Sample(f"{i} {k}", str(i), caption=f"long {i} {k}", short_caption=f"thing {i} side {k}")
        for i in range(12)
        for k in range(2)
    ]
    for long in (False, True):
        found = caption_retrieval(Perfect(), samples, long=long, permutations=10)
        assert found["r1"] == 1.0 and found["mean_rank"] == 1.0


def test_photos_saved_anew_under_their_names_are_told(tmp_path, capsys):
    import dataclasses

    from fgclip_nb.data.samples import Sample
    from fgclip_nb.data.roles import write_roles
    from fgclip_nb.evaluation.held_out import held_out

    (tmp_path / "params.yaml").write_text("data: mine.json\n")
    here, there = tmp_path / "a.jpg", tmp_path / "small/a.jpg"
    there.parent.mkdir()
    here.write_bytes(b"a photo"), there.write_bytes(b"small")
    trained = Sample("1", str(here))
    write_roles(tmp_path, [trained], [])
    again = dataclasses.replace(trained, media=str(there))
    scored, part = held_out([again], str(tmp_path))
    assert scored == [again] and "1 of them bear names that this run trained on" in part
    assert "scored: everything there is; 1 of them" in capsys.readouterr().out
    other = dataclasses.replace(trained, media=str(tmp_path / "b.jpg"))
    assert held_out([other], str(tmp_path))[1] == "everything there is"
