"""What a cell cannot check: whole evaluations over excerpts of the public benchmarks, other
programs' models and features, ranks one pair at a time, the notebook under papermill."""

import dataclasses, json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.evaluation.scores import retrieval
from fgclip_nb.evaluation.encoder import Encoder
from fgclip_nb.evaluation.captions import caption_retrieval
from fgclip_nb.evaluation.label_files import read_labels
from fgclip_nb.evaluation.tasks import TASKS
from fgclip_nb.evaluation.features import CachedFeatures, load_model, save_features
from fgclip_nb.evaluation.results import evaluate, load_evaluation, rows, save_evaluation
from fgclip_nb.evaluation.comparison import compare_evaluations
from fgclip_nb.data.samples import Region, Sample
from fgclip_nb.data.load import load_samples, sample_path

HERE = Path(__file__).resolve().parent
DATA, SHARED = HERE / "data_eval", HERE.parent.parent / "shared" / "data"
ALL = (
    "short_retrieval",
    "long_retrieval",
    "region_classification",
    "hard_negatives",
    "caption_negatives",
)


@pytest.fixture(scope="module")
def model():
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return FGCLIP(FGCLIPConfig.preset("tiny")).eval()


@pytest.fixture(scope="module")
def photos():
    return [s for s in load_samples("sample")[0] if s.split == "val"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    "A media root with val2017 that holds the shipped photos only."
    root = tmp_path_factory.mktemp("coco")
    shutil.copytree(sample_path().parent / "images", root / "val2017")
    return root


class Fake:
    """An encoder of made-up features: a vector per text, photo and region.

    Drawn by its name (noise) or taken from the right text (oracle)."""

    def __init__(self, samples, oracle, seed=0):
        self.unreadable, self.cut, self.oracle, self.seed = [], set(), oracle, seed
        self.right = {s.media: (s.captions or (s.caption,))[0] for s in samples}
        self.phrase = {
            (s.media, tuple(np.float32(r.box))): r.phrase
            for s in samples
            for r in s.regions
            if r.box
        }

    def vector(self, name):
        from fgclip_nb.core.identity import stable_id

        return (
            np.random.default_rng([stable_id(str(name)), self.seed])
            .normal(size=64)
            .astype(np.float32)
        )

    def texts(self, texts, long=False, phrase=False):
        return np.stack([self.vector(t) for t in texts])

    def images(self, items):
        paths = [getattr(x, "media", x) for x in items]
        found = [
            self.vector(self.right[str(p)]) if self.oracle else self.vector(("photo", Path(p).name))
            for p in paths
        ]
        return np.stack(found), np.arange(len(found))

    def regions(self, paths, boxes):
        keys = [
            (i, str(getattr(p, "media", p)), tuple(np.float32(b)))
            for i, (p, bs) in enumerate(zip(paths, boxes))
            for b in bs
        ]
        found = [
            self.vector(self.phrase[k[1:]]) if self.oracle else self.vector(k[1:]) for k in keys
        ]
        return np.stack(found), np.array([k[0] for k in keys]), np.arange(len(keys))

    def describe(self):
        return {}

    def why_lost(self, item):
        return "photo missing"


def save_sealed(model, folder):
    "A model's folder with the checksums that make it a checkpoint of a run."
    from fgclip_nb.training.checkpoints import _seal

    model.save_pretrained(folder)
    _seal(folder, dict(step=7))


def single_caption(samples):
    "One caption a photo and the class name alone as phrase: an oracle can know the right vector."

    def name(region):
        names = read_labels("coco80")
        return next((c for c in names if region.phrase.endswith(c)), region.phrase)

    out = []
    for s in samples:
        if not s.captions:
            continue
        regions = [
            dataclasses.replace(r, phrase=name(r)) if r.source == "category" else r
            for r in s.regions
        ]
        negatives = tuple(n._replace(caption=s.captions[0]) for n in s.caption_negatives)
        out.append(
            dataclasses.replace(
                s,
                captions=s.captions[:1],
                caption=s.captions[0],
                regions=regions,
                caption_negatives=negatives,
            )
        )
    return out


def test_an_oracle_scores_everything(photos):
    samples = single_caption(photos)
    for r in (
        evaluate(Fake(samples, True), samples, ALL, templates=["{}"], permutations=50)
        .table()
        .itertuples()
    ):
        assert r.value == 1, (r.task, r.list, r.metric)


def test_an_oracle_classifies_everything(photos):
    names = read_labels("coco80")
    samples = [
        dataclasses.replace(s, label=names[i % 30], captions=(names[i % 30],))
        for i, s in enumerate(photos)
    ]
    table = evaluate(
        Fake(samples, True), samples, ["classification"], templates=["{}"], permutations=50
    ).table()
    assert (table.value == 1).all() and table.scored.tolist() == [len(photos)] * 4


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_classification_agrees_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, coverage_error, top_k_accuracy_score
    from fgclip_nb.evaluation.ranking import cosines, unit
    from fgclip_nb.evaluation.scores import summarise
    from fgclip_nb.evaluation.classification import classify, first_answer, per_class

    rng = np.random.default_rng(0)
    features, classes, target = (
        rng.normal(size=(300, 6)),
        rng.normal(size=(12, 6)),
        rng.integers(0, 11, 300),
    )  # class 11 has no items
    ranked = classify(features, classes, target, permutations=0)
    scores, table = cosines(unit(features), unit(classes)), summarise(ranked, 10)
    for k in (1, 5):
        assert table[f"acc{k}"] == pytest.approx(
            top_k_accuracy_score(target, scores, k=k, labels=range(12)), abs=1e-12
        )
    recall = per_class(ranked, list(map(str, range(12))))["mean_per_class_recall"]
    assert recall == pytest.approx(balanced_accuracy_score(target, scores.argmax(1)), abs=1e-12)
    assert (first_answer(ranked) == scores.argmax(1)).all()
    few, names = (
        np.round(rng.normal(size=(300, 3))),
        np.round(rng.normal(size=(12, 3))),
    )  # few distinct rows: many equal scores
    places = classify(few, names, target, permutations=0)
    theirs = coverage_error(np.eye(12)[target], cosines(unit(few), unit(names)))
    assert places.ranks.mean() == pytest.approx(theirs, abs=1e-12), "ties count against"


def test_wrong_lines_of_an_annotation_are_told_with_the_scores(model, coco, tmp_path):
    lines = (DATA / "fgovd/h_attributes_llava.jsonl").read_text().splitlines()
    bad = [
        "{not json",
        json.dumps({"img_path": "a.jpg"}),
        json.dumps(json.loads(lines[0]) | {"bbox": [1, 2, 3]}),
        json.dumps(json.loads(lines[0]) | {"width": None}),
    ]
    (tmp_path / "h_attributes.jsonl").write_text("\n".join([*lines, *bad]))
    result = evaluate(
        model, tmp_path / "h_attributes.jsonl", ["hard_negatives"], media_root=coco, permutations=20
    )
    assert result.results["hard_negatives"]["hard"]["asked"] == len(lines)
    assert [r["entry"] for r in result.rejects] == [f"line {len(lines) + i}" for i in (1, 2, 3, 4)]
    assert load_evaluation(save_evaluation(result, tmp_path / "out")).rejects == result.rejects


def test_gaussian_features_score_chance_on_every_task(photos):
    samples, outside, total = single_caption(photos), 0, 0
    for seed in range(6):
        table = evaluate(
            Fake(samples, False, seed), samples, ALL, templates=["{}"], permutations=200
        ).table()
        table = table[table.above_chance.notna()]
        outside, total = outside + table.above_chance.astype(bool).sum(), total + len(table)
    labelled = [
        dataclasses.replace(s, label=read_labels("coco80")[i % 7]) for i, s in enumerate(samples)
    ]
    for seed in range(20):
        table = evaluate(
            Fake(samples, False, seed),
            labelled,
            ["classification"],
            templates=["{}"],
            permutations=200,
        ).table()
        above = table.above_chance.dropna()
        outside, total = outside + above.astype(bool).sum(), total + len(above)
    assert total > 200 and outside / total < 0.06, (
        f"{outside} of {total} scores of noise stand above the 97.5 % limit"
    )


def test_denominators_keep_what_is_missing(model, coco):
    result = evaluate(model, DATA / "fgovd", ["hard_negatives"], media_root=coco, permutations=20)
    tables = result.results["hard_negatives"]
    assert list(tables) == ["hard", "medium", "easy", "trivial"]
    for table in tables.values():
        assert table["lost"] == {"photo missing": 2} and table["asked"] == table["queries"] + 2
        assert 0 < table["photos_missing"] < table["photos"]
        assert (
            table["texts"] > table["distinct_texts"] > 0
            and -1 <= table["nearest_wrong_text_cosine"] <= 1
        )
    assert "no such file" in result.unreadable[0]["reason"]
    shown = result.table().groupby("list", sort=False).first()[["scored", "asked"]].values.tolist()
    assert shown == [[t["queries"], t["asked"]] for t in tables.values()]


def test_levels_of_the_shipped_sample_are_those_of_its_regions(model, photos):
    tables = evaluate(model, photos, ["hard_negatives"], permutations=20).results["hard_negatives"]
    counts = {
        level: sum(level in r.levels() for s in photos for r in s.regions) for level in tables
    }
    assert (
        counts
        == {level: t["asked"] for level, t in tables.items()}
        == dict(hard=22, medium=21, easy=10, trivial=22, pattern=2)
    )
    assert not any(t["right_among_wrong"] for t in tables.values())


def test_a_right_sentence_among_the_wrong_ones_is_counted(model, photos):
    regions = [Region("a red bowl", box=(0, 0, 1, 1), negatives=("A red  bowl", "a blue bowl"))]
    sample = dataclasses.replace(photos[0], regions=regions)
    [table] = (
        evaluate(model, [sample], ["hard_negatives"], permutations=20)
        .results["hard_negatives"]
        .values()
    )
    assert table["right_among_wrong"] == 1 and table["acc1"] == 0, (
        "equal texts tie, and a tie counts against the model"
    )


def test_sugarcrepe_files(model, coco, tmp_path):
    tables = evaluate(
        model, DATA / "sugar_crepe", ["caption_negatives"], coco / "val2017", permutations=20
    ).results["caption_negatives"]
    assert len(tables) == 8 and tables["all"]["asked"] == sum(
        t["asked"] for k, t in tables.items() if k != "all"
    )
    assert (
        tables["all"]["lost"] == {"photo missing": 7}
        and tables["swap_obj"]["chance"]["acc1"] == 0.5
    )
    (tmp_path / "bad.json").write_text('{"0": {"filename": "a.jpg", "caption": "a"}}')
    samples, [reject] = load_samples(tmp_path / "bad.json", coco)
    assert not samples and reject.field == "negative_caption" and reject.reason == "missing"


def test_region_features_lie_on_the_models_own_grid(model, photos):
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def __getattr__(self, name):
            return (
                super().__getattr__(name)
                if name in ("inner", "config")
                else getattr(super().__getattr__("inner"), name)
            )

        def get_image_box_roi_features(self, pixels, box_info):
            seen.extend(box_info)
            return model.get_image_box_roi_features(pixels, box_info)

    encoder = Encoder(Spy())
    features, photo, region = encoder.regions([photos[0].media], [np.array([[0.25, 0.5, 1, 1]])])
    assert (
        encoder.grid == 112 // 16
        and torch.equal(seen[0], torch.tensor([[1.75, 3.5, 7, 7]]))
        and features.shape == (1, 64)
    )
    dense = encoder.dense(photos[0].media)
    cell = encoder.regions([photos[0].media], [np.array([[3 / 7, 2 / 7, 4 / 7, 3 / 7]])])[0][0]
    assert dense.shape == (7, 7, 64) and np.abs(cell - dense[2, 3]).max() < 1e-4, (
        "a box of one cell pools that cell"
    )


def test_what_the_data_does_not_ask_for_has_no_row(model, photos):
    bare = [dataclasses.replace(s, regions=[], caption_negatives=()) for s in photos[:4]]
    result = evaluate(
        model,
        bare,
        ["short_retrieval", "region_classification", "hard_negatives", "caption_negatives"],
        permutations=20,
    )
    assert (
        set(result.table().task) == {"short_retrieval"}
        and result.results["region_classification"]["labels"]["asked"] == 0
    )
    assert result.mistakes("region_classification", "labels").empty
    gone = [dataclasses.replace(s, media="/nowhere.jpg") for s in photos[:4]]
    table = evaluate(model, gone, ["hard_negatives"], permutations=20).table()
    assert (table.scored == 0).all() and (table.asked > 0).all(), (
        "what is asked and cannot be scored keeps its row"
    )
    assert table.value.isna().all()


def test_broken_files_are_named_and_left_out(model, photos, tmp_path):
    shutil.copy(photos[0].media, tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes(Path(photos[1].media).read_bytes()[:2000])
    samples = [
        Sample(n, str(tmp_path / f"{n}.jpg"), captions=(f"photo {n}",))
        for n in ("whole", "cut", "absent")
    ]
    measured = caption_retrieval(model, samples, permutations=20)
    assert (
        measured["lost"] == {"photo unreadable": 1, "photo missing": 1}
        and measured["i2t"]["queries"] == 1
    )
    with pytest.raises(DataError, match="no readable photo"):
        caption_retrieval(model, samples[1:])


def test_shards_with_embedded_photos_need_no_files(model, photos, tmp_path):
    pytest.importorskip("datasets")
    from fgclip_nb.evaluation.pictures import plot_mistakes, plot_neighbours, plot_similarity
    from fgclip_nb.data.conversion import convert

    shutil.copytree(sample_path().parent / "images", tmp_path / "root/images")
    convert(sample_path(), tmp_path / "shards", tmp_path / "root", embed=True)
    shutil.rmtree(tmp_path / "root")
    embedded = [s for s in load_samples(tmp_path / "shards")[0] if s.split == "val"]
    assert len(embedded) == len(photos) and not any(Path(s.media).exists() for s in embedded)
    here, there = (
        evaluate(model, data, ALL, templates="photo", permutations=20)
        for data in (photos, embedded)
    )
    assert not there.unreadable and rows(here.results) == rows(there.results)
    assert (
        len(plot_mistakes(there.mistakes("hard_negatives", "hard", 2), samples=embedded).axes) == 2
    )
    plot_similarity(model, embedded[0], ["a bowl"]), plot_neighbours(model, embedded, ["a bowl"])
    cached = save_features(model, embedded, tmp_path / "features")
    assert rows(
        evaluate(cached, embedded, ["long_retrieval", "hard_negatives"], permutations=20).results
    ) == rows(
        evaluate(model, photos, ["long_retrieval", "hard_negatives"], permutations=20).results
    )


def test_cached_features_of_clips_and_their_regions(model, tmp_path):
    pytest.importorskip("av")
    clips = [s for s in load_samples("video_sample")[0] if s.split == "val"]
    encoder, tasks = Encoder(model, frames=4), ["long_retrieval", "hard_negatives"]
    folder = save_features(encoder, clips, tmp_path / "features")
    direct, cached = (evaluate(m, clips, tasks, permutations=20) for m in (encoder, folder))
    assert (
        rows(direct.results) == rows(cached.results)
        and cached.results["hard_negatives"]["given"]["queries"] > 10
    )
    assert len(set(json.loads((folder / "image_names.json").read_text()))) == len(clips), (
        "parts of one video are told apart by their seconds"
    )


def test_clips_are_the_mean_of_their_frames_and_regions_of_theirs(model):
    pytest.importorskip("av")
    from fgclip_nb.data.photos import normalize
    from fgclip_nb.data.inputs import clip_inputs

    clips = load_samples("video_sample")[0]
    encoder = Encoder(model, frames=6)
    features, rows_ = encoder.images(clips[:2])
    inputs = clip_inputs(clips[0], 6, 112)
    with torch.inference_mode():
        frames = model.get_image_features(normalize(torch.from_numpy(inputs.frames)))
    assert rows_.tolist() == [0, 1] and np.allclose(features[0], frames.mean(0).numpy(), atol=1e-5)
    with_regions = next(s for s in clips if s.regions)
    region_features, regions = encoder.clip_regions(with_regions, lambda r: True)
    inputs = clip_inputs(with_regions, 6, 112)
    shown = np.flatnonzero(inputs.visible[0])
    boxes = [torch.from_numpy(inputs.boxes[0][[t]] * 7) for t in shown]
    with torch.inference_mode():
        own = model.get_image_box_roi_features(
            normalize(torch.from_numpy(inputs.frames[shown])), boxes
        )
    assert len(region_features) == len(regions) == len(inputs.regions) and np.allclose(
        region_features[0], own.mean(0).numpy(), atol=1e-5
    )
    table = evaluate(encoder, clips[:4], ["long_retrieval"], permutations=20).results[
        "long_retrieval"
    ]["i2t"]
    assert table["queries"] == 4 and table["candidates"] == 4


def test_evaluation_changes_nothing_in_the_model(model, photos):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (caption_retrieval(model, photos[:8], permutations=20) for _ in range(2))
    assert first == second and model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()


def test_batches_do_not_change_scores(model, photos):
    a, b = (
        evaluate(
            model, photos[:10], ["short_retrieval", "hard_negatives"], permutations=20, batch_size=n
        )
        for n in (3, 64)
    )
    assert (compare_evaluations(a, b).difference == 0).all()


def test_a_transformers_clip_model_scores_photos_and_captions(photos, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    torch.manual_seed(0)
    words = dict(
        tower, vocab_size=49408, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407
    )
    clip = CLIPModel(
        CLIPConfig(
            projection_dim=32,
            text_config=words,
            vision_config=dict(tower, image_size=64, patch_size=16),
        )
    ).eval()
    direct = evaluate(
        clip, photos, ["short_retrieval", "long_retrieval", "caption_negatives"], permutations=20
    )
    assert direct.manifest["context_length"] == {"short": 77, "long": 77}
    clip.save_pretrained(tmp_path / "clip")
    ours = load_model(tmp_path / "clip")
    through = evaluate(
        ours,
        photos,
        ["short_retrieval", "long_retrieval", "caption_negatives", "hard_negatives"],
        permutations=20,
    )
    assert through.manifest["context_length"] == {"short": 77, "long": 77}, (
        "plain CLIP was never trained beyond 77 tokens"
    )
    assert (compare_evaluations(direct, through).difference.abs() < 0.02).all()
    assert through.results["hard_negatives"]["hard"]["queries"] > 10


TOWER = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128)
WORDS = dict(TOWER, vocab_size=49408, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
SIZES = dict(
    projection_dim=32, text_config=WORDS, vision_config=dict(TOWER, image_size=64, patch_size=16)
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photos):
    "Every kind of weights that somebody may have; the same FG-CLIP or the same CLIP each time."
    from official import GOLDENS
    from safetensors.torch import save_file
    from test_loading import as_openai, counts, torchscript
    from transformers import CLIPConfig, CLIPModel
    from fgclip_nb.model.config import FGCLIPConfig
    from fgclip_nb.model.fgclip import FGCLIP

    at = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    fine, clip = FGCLIP(FGCLIPConfig(**SIZES)).eval(), CLIPModel(CLIPConfig(**SIZES)).eval()
    save_sealed(fine, at / "run/checkpoints/step_00000007")
    clip.save_pretrained(at / "clip")
    (at / "official").mkdir()
    config = json.loads((GOLDENS / "golden_a/config.json").read_text()) | json.loads(
        CLIPConfig(**SIZES).to_json_string()
    )
    config.update(
        model_type="clip",
        architectures=["FGCLIPModel"],
        auto_map={"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"},
    )
    (at / "official/config.json").write_text(json.dumps(config))
    save_file(
        {k: v.clone() for k, v in fine.state_dict().items()}, at / "official/model.safetensors"
    )
    torch.save(as_openai(clip.state_dict()) | counts(), at / "state_dict.pt")
    torchscript(as_openai(clip.state_dict()), at / "archive.pt")
    save_features(fine, photos[:8], at / "features")
    return at, fine, clip


FINE = ("run", "run/checkpoints/step_00000007", "official", "features", "hub/fine")
PLAIN = ("clip", "state_dict.pt", "archive.pt", "hub/clip")  # global tasks only


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("source", FINE + PLAIN)
def test_every_kind_of_weights_through_evaluate(sources, photos, source, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    at, fine, clip = sources

    def download(repo, filename, **kw):  # a stand-in for the network
        path = at / {"hub/fine": "official", "hub/clip": "clip"}[repo] / filename
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tasks = ["short_retrieval", "long_retrieval", "caption_negatives"] + ["hard_negatives"] * (
        source in FINE
    )
    direct = evaluate(fine if source in FINE else clip, photos[:8], tasks, permutations=20)
    through = evaluate(
        source if "hub" in source else at / source, photos[:8], tasks, permutations=20
    )
    if source == "archive.pt":
        assert (compare_evaluations(direct, through).difference.abs() < 0.1).all(), (
            "its weights are halves"
        )
    else:
        assert rows(direct.results) == rows(through.results)
    assert through.manifest["model"] == str(source if "hub" in source else at / source)
    if source not in ("features", "archive.pt") and source in FINE:
        assert through.manifest["weights"] == direct.manifest["weights"]
    if source != "features":
        assert through.manifest["context_length"]["long"] == (248 if source in FINE else 77)


def test_plain_clip_has_no_regions_of_its_own(sources, photos):
    with pytest.raises(ConfigError, match="CLIPModel has no dense features.*FGCLIP.from_clip"):
        evaluate(sources[2], photos[:2], ["hard_negatives"])


def test_what_is_no_model_is_said(tmp_path):
    for source, said in (
        (tmp_path, "config.json"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "a.txt", "a.txt"),
    ):
        if source.suffix:
            source.write_text("no weights")
        with pytest.raises(DataError, match=said):
            load_model(source)


def test_checkpoint_folders_and_run_folders(model, photos, tmp_path):
    save_sealed(model, tmp_path / "run/checkpoints/step_00000007")
    for source in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000007"):
        again = load_model(source)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (
        evaluate(tmp_path / "run", photos[:4], "short_retrieval", permutations=20).manifest[
            "context_length"
        ]["long"]
        == 248
    )


def test_what_a_run_was_trained_on_is_known(model, photos, coco, tmp_path):
    from fgclip_nb.evaluation.held_out import seen_in_training
    from fgclip_nb.evaluation.comparison import evaluation_notes
    from fgclip_nb.data.load import load_samples as load

    (tmp_path / "run/checkpoints/step_00000007").mkdir(parents=True)
    (tmp_path / "run/params.yaml").write_text("data: sample\n")
    fgovd = load(DATA / "fgovd", coco, missing="keep")[0]
    train = {Path(s.media).name for s in load("sample")[0] if s.split == "train"}
    for source in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000007"):
        assert not seen_in_training(source, photos), "the held-out part"
        assert (
            {s.id for s in seen_in_training(source, fgovd)}
            == {s.id for s in fgovd if Path(s.media).name in train}
            != set()
        )
    assert not seen_in_training(tmp_path, fgovd) and not seen_in_training(
        "openai/clip-vit-base-patch32", fgovd
    )
    (tmp_path / "run/params.yaml").write_text("data: video_sample\n")
    clips = load("video_sample")[0]
    assert {s.split for s in seen_in_training(tmp_path / "run", clips)} == {"train"}, (
        "other seconds of one video are another matter"
    )
    e = evaluate(model, photos[:4], ["short_retrieval"], permutations=20)
    e.manifest["seen_in_training"] = 3
    assert "trained on 3 of the 4 samples" in evaluation_notes({"a": e, "b": e})[0]


def test_presets_say_that_their_weights_are_random(caplog):
    import logging

    logging.getLogger("fgclip_nb").propagate = True
    with caplog.at_level("WARNING", "fgclip_nb"):
        load_model("tiny")
    assert "RANDOM WEIGHTS" in caplog.text


def test_cached_features_from_elsewhere(photos, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "image_features.npy", rng.normal(size=(len(photos), 16)))
    (tmp_path / "image_names.txt").write_text("\n".join(Path(s.media).name for s in photos))
    texts = list(dict.fromkeys(c for s in photos for c in s.captions))
    np.save(tmp_path / "text_features.npy", rng.normal(size=(len(texts), 16)).astype(np.float16))
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    result = evaluate(tmp_path, photos, ["short_retrieval"], permutations=20)
    assert (
        result.results["short_retrieval"]["i2t"]["queries"] == 43
        and "image_features.npy" in result.manifest["feature_files"]
    )
    with pytest.raises(DataError, match="has no feature"):
        evaluate(tmp_path, photos, ["hard_negatives"])
    np.save(tmp_path / "image_features.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="image_features.npy"):
        CachedFeatures(tmp_path)
    np.save(tmp_path / "image_features.npy", rng.normal(size=(len(photos), 16)))
    (tmp_path / "image_names.txt").write_text(
        "\n".join(f"{i}/same.jpg" for i in range(len(photos)))
    )
    with pytest.raises(DataError, match="same.jpg stands among the image names twice"):
        CachedFeatures(tmp_path)
    (tmp_path / "image_names.txt").write_text("only one")
    with pytest.raises(DataError, match="1 names"):
        CachedFeatures(tmp_path)
    for broken in (b"", b"no array", b"PK\x03\x04", b"\x93NUMPY\x01\x00"):
        (tmp_path / "image_features.npy").write_bytes(broken)
        with pytest.raises(DataError, match="image_features.npy"):
            CachedFeatures(tmp_path)
    with pytest.raises(DataError, match="neither"):
        CachedFeatures(tmp_path / "..")


def test_saved_results_are_read_back_and_have_the_keys_others_read(model, photos, tmp_path):
    result = evaluate(model, photos, ALL, templates="photo", permutations=20)
    out = save_evaluation(result, tmp_path / "out", "sample")
    assert rows(load_evaluation(out).results) == rows(
        json.loads(json.dumps(result.results, default=float))
    )
    files = {p.name: json.loads(p.read_text()) for p in (out / "clip_benchmark").iterdir()}
    assert all(
        set(f) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
        for f in files.values()
    )
    assert set(files["region_classification.json"]["metrics"]) == {
        "acc1",
        "acc5",
        "mean_per_class_recall",
    }
    names = {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)}
    assert set(files["short_retrieval.json"]["metrics"]) == names
    assert (
        not compare_evaluations(out, result).decided.any()
        and "NaN" not in (out / "evaluation.json").read_text()
    )


def test_evaluations_are_found_and_laid_side_by_side(model, photos, tmp_path):
    from fgclip_nb.evaluation.comparison import (
        ENOUGH_PHOTOS,
        evaluation_notes,
        load_evaluations,
        plot_paired,
        plot_side_by_side,
        side_by_side,
    )

    tasks, few = ["short_retrieval", "caption_negatives"], photos[:8]
    a, b = (
        evaluate(model, few, tasks, permutations=20, name=f"org/{n}", image_size=size)
        for n, size in (("a", 112), ("b", 64))
    )
    for e, place in (
        (a, "first/evaluation"),
        (b, "first/evaluation/baseline"),
        (a, "second/evaluation"),
    ):
        save_evaluation(e, tmp_path / place)
    evaluations = load_evaluations(tmp_path / "first", f"{tmp_path}/sec*")
    assert list(evaluations) == ["first", "second", "baseline b"] and not load_evaluations(
        tmp_path / "nowhere*"
    )
    table = side_by_side(evaluations)
    assert (
        list(table.columns) == ["items", "chance", "first", "second", "baseline b"]
        and (table["first"] == table["second"]).all()
    )
    assert ("caption_negatives", "all", "mean_rank") not in table.index and (
        "short_retrieval",
        "i2t",
        "mean_rank",
    ) in table.index
    assert evaluation_notes(evaluations) == [
        "baseline b and first: another image size, a property of the models."
    ]
    other = evaluate(model, photos[:9], tasks, permutations=20, ties="official")
    assert "other samples, another tie rule" in evaluation_notes(evaluations | {"other": other})[0]
    paired = compare_evaluations(evaluations["first"], evaluations["baseline b"])
    assert (
        len(few) < ENOUGH_PHOTOS
        and not paired.decided.any()
        and set(paired.photos) <= set(range(1, 9))
    )
    plot_side_by_side(evaluations), plot_paired(paired)


def test_wrong_questions_are_refused(model, photos):
    with pytest.raises(ConfigError, match="short_retrieval"):
        evaluate(model, photos, ["retrieval"])
    with pytest.raises(ConfigError, match="tie"):
        evaluate(model, photos, ["short_retrieval"], tie="x")
    with pytest.raises(ConfigError, match="ties"):
        evaluate(model, photos[:4], ["short_retrieval"], ties="x")
    with pytest.raises(DataError, match="splits there"):
        evaluate(model, photos, ["short_retrieval"], split="test")
    with pytest.raises(DataError, match="share no item"):
        compare_evaluations(
            *(
                evaluate(model, p, ["short_retrieval"], permutations=20)
                for p in (photos[:4], photos[4:8])
            )
        )
    with pytest.raises(DataError, match="columns"):
        retrieval(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(DataError, match="does not|do not"):
        retrieval(np.ones((2, 3)), np.ones((3, 3)))


def test_batched_ranks_equal_those_of_one_pair_at_a_time(model):
    from fgclip_nb.evaluation.tasks import Settings
    from fgclip_nb.data.photos import normalize, read_image
    from fgclip_nb.text.packing import tokenize

    def hard(sample):
        "Regions with hard negatives, and with these alone."
        regions = [r for r in sample.regions if r.negatives_level == "hard"]
        return [dataclasses.replace(r, other_negatives=()) for r in regions]

    samples = [
        dataclasses.replace(s, regions=hard(s)) for s in load_samples("sample")[0] if hard(s)
    ]
    pairs = [(s, r) for s in samples for r in s.regions][:10]

    def score(sample, region, text):
        "One pair, as the official scripts do it: one picture, one box, one caption padded to 77."
        pixels = normalize(torch.from_numpy(read_image(sample.media, 112)[None]))
        ids = tokenize([text]).input_ids
        ids = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]), value=49407)
        box = [torch.tensor([region.box], dtype=torch.float32) * 7]
        return float(
            torch.cosine_similarity(
                model.get_image_box_roi_features(pixels, box), model.get_text_features(ids)
            )
        )

    with torch.inference_mode():
        slow = [score(s, r, r.phrase) > max(score(s, r, n) for n in r.negatives) for s, r in pairs]
    scored = TASKS["hard_negatives"](Encoder(model), samples, Settings(permutations=0)).ranked[
        "hard"
    ]
    place = dict(zip(scored.ids, scored.ranks))
    assert [place[r.id] == 1 for _, r in pairs] == slow


@pytest.mark.ci
def test_notebook_runs_under_papermill(tmp_path):
    pytest.importorskip("papermill")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "nbs/evaluate.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "output",
        str(tmp_path / "out"),
        "-p",
        "templates",
        "photo",
        "-p",
        "annotations",
        str(DATA / "ucf_annotation.txt"),
        "-p",
        "scores",
        str(tmp_path / "scores.json"),
        "-p",
        "frame_counts",
        str(DATA / "ucf_frames.csv"),
    ]
    (tmp_path / "scores.json").write_text(
        json.dumps(
            {"Abuse028_x264.mp4": [0.1] * 10 + [0.9] * 3 + [0.1] * 75, "Abuse030_x264": [0.2] * 96}
        )
    )
    done = subprocess.run(
        command, cwd=HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    assert (
        results["anomaly"]["frames"]["videos"] == 2
        and results["short_retrieval"]["i2t"]["queries"] == 43
    )
    failed = subprocess.run(
        command + ["-p", "modle", "x"],
        cwd=HERE.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert failed.returncode != 0 and "did you mean `model`" in failed.stderr


@pytest.mark.ci
@pytest.mark.skipif(not SHARED.is_dir(), reason="the full FG-OVD files are not in this checkout")
def test_the_whole_fgovd_text_side_with_the_photos_at_hand(model, coco):
    tables = evaluate(
        model, SHARED / "fgovd", ["hard_negatives"], media_root=coco, permutations=20
    ).results["hard_negatives"]
    assert [tables[k]["asked"] for k in ("hard", "medium", "easy", "trivial")] == [
        3545,
        2968,
        1299,
        3545,
    ]
    assert (
        all(t["queries"] + t["lost"]["photo missing"] == t["asked"] for t in tables.values())
        and tables["hard"]["queries"] > 20
    )
    assert [tables[k]["right_among_wrong"] for k in ("hard", "medium", "easy", "trivial")] == [
        0,
        4,
        0,
        0,
    ]


def test_own_data_without_a_split_is_scored_by_what_the_run_held_out(model, photos, tmp_path):
    import dataclasses
    from fgclip_nb.data.roles import split_samples, write_roles
    from fgclip_nb.data.load import load_samples as load
    from fgclip_nb.evaluation.held_out import read_evaluation_samples, seen_in_training

    own = [dataclasses.replace(s, split="") for s in load("sample")[0]]
    train, val = split_samples(own)
    (tmp_path / "params.yaml").write_text("data: my.json\n")
    write_roles(tmp_path, train, val)
    scored, _, part = read_evaluation_samples(own, split="auto", model=tmp_path)
    assert {s.id for s in scored} == {s.id for s in val} and not seen_in_training(tmp_path, scored)
    assert part.startswith(f"the {len(val)} of {len(own)} samples that this run held out")
    namesake = tmp_path / Path(own[0].media).name
    namesake.write_bytes(b"another photo of that name")
    other = dataclasses.replace(own[0], media=str(namesake), id="other")
    assert not seen_in_training(tmp_path, [other]), "equal names are not equal photos"
