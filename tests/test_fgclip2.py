"""FG-CLIP 2 against recorded outputs of the official code, in both precisions, and two planted
mistakes that have to be noticed. No notebook cell: the recordings are files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.model import published
from fgclip_nb.model.__main__ import main as compare
from fgclip_nb.model.fgclip2 import FGCLIP2
from fgclip_nb.data.patches import (
    cut_patches,
    own_budget,
    patch_batch,
    patch_grid,
    photo_budgets,
    resize_photo,
)
from fgclip_nb.model.patch_positions import resize_positions
from fgclip_nb.text.pieces import Pieces
from fgclip_nb.model.siglip import FINE_SCALES, FGCLIP2Config, origin_of
from fgclip_nb.text.positions import stretch_positions

GOLDENS = Path(__file__).parent / "goldens_fgclip2"
PRECISION = {torch.float32: ("f32", 3e-5), torch.float64: ("f64", 1e-10)}
both = pytest.mark.parametrize("dtype", PRECISION)


def tensors(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def facts(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def golden_model(dtype=torch.float32):
    return FGCLIP2.from_pretrained(GOLDENS, dtype=dtype).requires_grad_(False)


def patches(dtype):
    x = tensors("inputs")
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    return {n: x[n].to(dtype) if n == "pixel_values" else x[n] for n in names}


def features(model):
    "The official methods on the recorded inputs: name of the recording, value, rows that count."
    x, dtype = tensors("inputs"), model.logit_scale.dtype
    photos, text, regions = patches(dtype), model.get_text_features, facts("regions")
    real = photos["pixel_attention_mask"].bool()
    yield "image_features", model.get_image_features(**photos), ...
    yield "image_dense_features", model.get_image_dense_feature(**photos), real
    for kind in ("box", "hard"):
        rows = x[f"roi_boxes_{kind}"]
        some = (rows[:, 3] > rows[:, 1]) & (rows[:, 4] > rows[:, 2])
        pooled = model.get_image_box_roi_features(**photos, box_info=rows)
        assert pooled[~some].eq(0).all(), "zeros, where the official code has NaN"
        yield f"image_box_roi_features_{kind}", pooled, some
        yield f"text_box_of_{kind}_texts", text(x[f"{kind}_texts"], walk_type="box"), ...
    yield (
        "image_region_features",
        torch.cat(model.get_image_region_features(**photos, **regions)),
        ...,
    )
    yield "text_short_of_text_short", text(x["text_short"]), ...
    yield "text_box_of_text_short", text(x["text_short"], walk_type="BOX"), ...
    yield "text_long_of_text_long", text(x["text_long"], walk_type="long"), ...
    hidden = x["text_short"].ne(0)
    yield "text_short_with_attention_mask", text(x["text_short"], hidden), ...
    yield "text_short_cut_to_24", text(x["text_short"][:, :24]), ...
    for walk, ids in (("short", "text_short"), ("box", "text_short"), ("long", "text_long")):
        out = model(input_ids=x[ids], walk_type=walk, **photos)
        yield f"logits_per_image_{walk}", out.logits_per_image, ...


def differences(model):
    "Recording -> largest difference to it."
    name, _ = PRECISION[model.logit_scale.dtype]
    recorded = tensors(f"outputs_{name}")
    return {
        key: (value[rows] - recorded[key][rows]).abs().max().item()
        for key, value, rows in features(model)
    }


# ---- features -----------------------------------------------------------------------------------


@both
def test_features_are_the_official_ones(dtype):
    _, atol = PRECISION[dtype]
    logits = 10 if dtype is torch.float32 else 1  # scaled by exp(logit_scale)
    for key, difference in differences(golden_model(dtype)).items():
        allowed = atol * (logits if key.startswith("logits") else 1)
        assert difference <= allowed, f"{key}: {difference:.3g}, allowed {allowed:.3g}"


@both
def test_a_photo_does_not_depend_on_its_batch_nor_on_padding(dtype):
    model, x = golden_model(dtype), patches(dtype)
    together, dense = model.get_image_features(**x, need_densefeature=True)
    _, atol = PRECISION[dtype]
    for i, (rows, columns) in enumerate(x["spatial_shapes"].tolist()):
        n = rows * columns
        alone = dict(
            pixel_values=x["pixel_values"][i : i + 1, :n],
            pixel_attention_mask=None,
            spatial_shapes=x["spatial_shapes"][i : i + 1],
        )
        one, its_dense = model.get_image_features(**alone, need_densefeature=True)
        assert (one[0] - together[i]).abs().max() <= atol
        assert (its_dense[0] - dense[i, :n]).abs().max() <= atol


def test_regions_work_in_half_precision_and_keep_order():
    model, x = golden_model(torch.bfloat16), patches(torch.bfloat16)
    regions = facts("regions")
    rows = model.get_image_region_features(**x, **regions)
    assert [len(r) for r in rows] == [len(r) for r in regions["region_infos"]]
    expected = tensors("outputs_f64")["image_region_features"]
    cosine = torch.cosine_similarity(torch.cat(rows).double(), expected)
    assert cosine.min() > 0.995
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    model, x, boxes = (
        golden_model(),
        patches(torch.float32),
        tensors("inputs")["roi_boxes_box"][:16],
    )
    whole = model.get_image_box_roi_features(**x, box_info=boxes)
    assert model.get_image_box_roi_features(**x, box_info=boxes[shuffled]).equal(whole[shuffled])


def test_lengths_and_walks_that_do_not_exist_are_refused():
    model, x = golden_model(), tensors("inputs")
    for ids, walk in (("text_long", "short"), ("text_long", "box"), ("text_short", "long")):
        with pytest.raises(ValueError, match="pieces on the"):
            model.get_text_features(x[ids], walk_type=walk)
    with pytest.raises(ValueError, match="walk_type"):
        model.get_text_features(x["text_short"], walk_type="middle")


def test_short_rows_and_masks_are_warned_of(caplog):
    model, ids = golden_model(), tensors("inputs")["text_short"]
    caplog.clear()  # what loading said, where this test is the first to ask for the model
    model.get_text_features(ids)
    model.get_text_features(ids, torch.ones_like(ids))
    assert not caplog.records
    model.get_text_features(ids[:, :24])
    model.get_text_features(ids, ids.ne(0))
    assert "trained with all padded to 64" in caplog.records[0].message
    assert "attention_mask hides padding" in caplog.records[1].message


# ---- planted mistakes ---------------------------------------------------------------------------


def keep_len_off_by_one(model):
    model.config.text_config.keep_len += 1


def exact_gelu(model):
    for module in model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = nn.GELU()


def head_first(model):
    for name in ("longtext_head", "boxtext_head"):
        setattr(model, name, nn.Sequential(model.text_model.head, getattr(model, name)))


def norms_of_clip(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


MISTAKES = {
    "keep_len 21": keep_len_off_by_one,
    "exact (erf) GELU": exact_gelu,
    "head_first": head_first,
    "LayerNorm eps 1e-5 everywhere": norms_of_clip,
}
RECORDINGS = dict(
    image="image_features",
    dense="image_dense_features",
    text_short="text_short_of_text_short",
    text_box="text_box_of_text_short",
    text_long="text_long_of_text_long",
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_changes_what_it_changes_officially(mistake):
    model = golden_model(torch.float64)
    MISTAKES[mistake](model)
    seen, recorded = differences(model), facts("mutations")[mistake]
    for short, name in RECORDINGS.items():
        if short in recorded:
            assert seen[name] > 1e-6
            assert seen[name] == pytest.approx(recorded[short], rel=0.05)
        else:
            assert seen[name] < 1e-10


# ---- photos -------------------------------------------------------------------------------------


def test_sizes_of_photos():
    for row in facts("image_sizes")["patch16"]:
        height, width = row["size_hw"]
        assert own_budget(height, width) == row["bucket"]
        for budget, grid in row["grid"].items():
            assert list(patch_grid(height, width, int(budget))) == grid, row
    for height, width, patch, budget, *grid in facts("image_sizes")["other"]:
        assert list(patch_grid(height, width, budget, patch)) == grid


def test_pixels_bit_for_bit():
    x = tensors("image_pixels")
    for name, resized in x.items():
        number, what = name.split(".")
        if not what.startswith("resized_"):
            continue
        photo, budget = x[f"{number}.image"].numpy(), int(what.split("_")[1])
        grid = patch_grid(*photo.shape[:2], budget)
        assert np.array_equal(resize_photo(photo, grid, 16), resized.numpy()), name
    values = patch_batch([x["1.image"]], budget=16)["pixel_values"][0, :4]
    assert values.equal(x["1.pixel_values_16"])


def test_budgets_of_a_batch():
    recorded = facts("image_batch")
    photos = [np.zeros((*size, 3), np.uint8) for size in recorded["sizes_hw"]]
    official = patch_batch(photos, budget="batch")
    assert official["spatial_shapes"].tolist() == recorded["batch_grids"]
    assert official["pixel_values"].shape[1] == recorded["batch_max"]
    own = patch_batch(photos)
    assert own["spatial_shapes"].tolist() == recorded["alone_grids"]
    assert own["pixel_values"].shape[1] == max(h * w for h, w in recorded["alone_grids"])
    for budget in (0, True, 2.5, "all"):
        with pytest.raises(ConfigError):
            photo_budgets(recorded["sizes_hw"], budget)


def test_kinds_of_photos_give_the_same(tmp_path):
    pixels = tensors("image_pixels")["3.image"].numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    kinds = [pixels, torch.from_numpy(pixels), Image.fromarray(pixels), tmp_path / "photo.png"]
    values = patch_batch(kinds, budget=30)["pixel_values"]
    assert all(v.equal(values[0]) for v in values)


def test_a_patch_is_row_column_channel():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(cut_patches(pixels, 2)[3].reshape(2, 2, 3), pixels[2:, 2:])


# ---- positions ----------------------------------------------------------------------------------


def test_positions():
    x = tensors("positions")
    for name, recorded in x.items():
        if not name.startswith("vision_") or name == "vision_table":
            continue
        _, grid, precision = name.split("_")
        table = x["vision_table"].to(recorded.dtype)
        ours = resize_positions(table, tuple(int(n) for n in grid.split("x")))
        assert (ours - recorded).abs().max() <= (1e-12 if precision == "f64" else 1e-5), name
    one_column = resize_positions(x["vision_table"], (9, 1))
    assert (one_column - x["official_cpu_bug_9x1_f32"]).abs().max() > 0.1, "their fault, not ours"
    long = stretch_positions(x["text_old"].double())
    assert (long - x["text_new_f64"]).abs().max() <= 1e-12
    assert long.shape == (196, 8)


# ---- texts --------------------------------------------------------------------------------------


def test_numbers_of_pieces():
    recorded = facts("tokenizer_ids")["ids_64"]
    pieces = Pieces()
    assert pieces(recorded, lower=False).tolist() == list(recorded.values())
    lowered = {text: recorded[text.lower()] for text in recorded if text.lower() in recorded}
    assert len(lowered) > 3 and pieces(lowered).tolist() == list(lowered.values())


def test_a_long_text_is_cut_before_its_end_mark():
    recorded = facts("tokenizer_ids")["long_196"]
    text = "a wooden table with a bowl of green apples on it. " * 20
    row = Pieces()([text], 196)[0]
    assert row.tolist() == recorded and row[-1] == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(padding={"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0}),
        dict(post_processor=None),
        dict(truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    ],
)
def test_what_a_tokenizer_file_says_of_padding_and_marks_does_not_matter(tmp_path, change):
    stored = json.loads(Path(Pieces().name, "tokenizer.json").read_text())
    for name, value in change.items():
        extra = dict(pad_type_id=0, pad_token="<pad>", pad_to_multiple_of=None)
        more = extra if name == "padding" else dict(direction="Right")
        stored[name] = value and dict(more, **value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert Pieces(tmp_path)(["two dogs on a sofa"]).equal(Pieces()(["two dogs on a sofa"]))


def test_another_vocabulary_is_refused(tmp_path):
    stored = json.loads(Path(Pieces().name, "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["<pad>"], vocabulary["<eos>"] = 1, 0
    stored["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="the marks are"):
        Pieces(tmp_path)


# ---- loading and saving -------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    "A folder as the authors publish it: no scales of training, bfloat16, remote-code entries."
    weights = {n: t for n, t in tensors("model").items() if n not in FINE_SCALES}
    save_file({n: t.bfloat16() for n, t in weights.items()}, tmp_path / "model.safetensors")
    entries = facts("config")
    entries["auto_map"] = {"AutoModel": "modeling_fgclip2.Fgclip2Model"}
    entries["architectures"] = ["Fgclip2Model"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "modeling_fgclip2.py").write_text("raise SystemExit('remote code was run')")
    return tmp_path


def test_a_released_folder_loads_and_is_accounted_for(released):
    model = FGCLIP2.from_pretrained(released, prove=True)
    report = model.load_report
    assert not report.missing + report.unexpected and not report.misshaped
    assert len(report.matched) == len(model.state_dict()) - 2 == 121
    assert set(report.initialised) == set(FINE_SCALES)
    assert set(report.converted.values()) == {"bfloat16 to float32"}
    assert max(report.proof.values()) < 1e-4
    expected = {n: t.bfloat16().float() for n, t in tensors("model").items()}
    state = model.state_dict()
    assert all(state[n].equal(expected[n]) for n in report.matched)
    assert model.logit_scale.shape == model.logit_bias.shape == (1,)


def test_stored_scales_of_training_are_kept():
    model, stored = golden_model(), tensors("model")
    assert not model.load_report.initialised
    assert all(getattr(model, n).equal(stored[n]) for n in FINE_SCALES)


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    model = golden_model()
    model.save_pretrained(tmp_path, pieces=Pieces())
    saved, stored = load_file(tmp_path / "model.safetensors"), tensors("model")
    assert set(saved) == set(stored) and all(saved[n].equal(t) for n, t in stored.items())
    back = FGCLIP2.from_pretrained(tmp_path)
    for part in ("text_config", "vision_config"):
        assert getattr(back.config, part).to_dict() == getattr(model.config, part).to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Fgclip2Model"]
    assert len(Pieces(tmp_path)) == 632


def test_a_missing_tensor_is_named(released):
    weights = load_file(released / "model.safetensors")
    del weights["dense_feature_head.attention.in_proj_bias"]
    save_file(weights, released / "model.safetensors")
    with pytest.raises(DataError, match="missing dense_feature_head.attention.in_proj_bias"):
        FGCLIP2.from_pretrained(released)


def test_another_vocabulary_in_config_is_named(released):
    entries = facts("config")
    del entries["text_config"]["vocab_size"]
    (released / "config.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="token_embedding.weight has shape .320, 32. in the file"):
        FGCLIP2.from_pretrained(released)


@pytest.mark.parametrize("kind", ["clip", "fgclip", "siglip", "siglip2", "bert"])
def test_other_kinds_of_models_are_refused_by_name(tmp_path, kind):
    shutil.copy(GOLDENS / "config.json", tmp_path)
    entries = dict(facts("config"), model_type=kind)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    plain = {n: t for n, t in tensors("model").items() if not origin_of(n)}
    save_file(plain, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="siglip" if "siglip" in kind else kind):
        FGCLIP2.from_pretrained(tmp_path)
    if kind != "siglip2":
        return
    started = FGCLIP2.from_siglip(tmp_path, prove=True)
    state = started.state_dict()
    assert {n for n in started.load_report.initialised} == {n for n in state if origin_of(n)}
    for name in started.load_report.initialised:
        if "position_embedding" not in name:
            assert state[name].equal(state[origin_of(name)])


def test_from_scratch_a_seed_gives_a_model():
    def drawn(seed):
        torch.manual_seed(seed)
        return FGCLIP2(FGCLIP2Config.preset("tiny")).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(t.equal(again[n]) and t.isfinite().all() for n, t in first.items())
    assert not first["text_model.head.weight"].equal(other["text_model.head.weight"])


def test_transformers_finds_the_model_without_remote_code(released):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    assert type(AutoConfig.from_pretrained(released)) is FGCLIP2Config
    assert type(AutoModel.from_pretrained(released)) is FGCLIP2
    assert type(AutoModelForCausalLM.from_pretrained(released)) is FGCLIP2


def test_the_processor_of_a_saved_or_official_folder_is_ours(tmp_path, released):
    "Capitals and shapes as the model reads them, under either folder's files."
    from transformers import AutoModel, AutoProcessor

    FGCLIP2(FGCLIP2Config.preset("tiny")).save_pretrained(tmp_path / "ours")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "ours" / file, released)
    photo = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    for folder in (tmp_path / "ours", released):
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        texts = ["Two Dogs on a sofa", "a CAT"]
        inputs = processor(images=Image.fromarray(photo), text=texts, return_tensors="pt")
        assert inputs["input_ids"].equal(Pieces()(texts)) and "attention_mask" not in inputs
        for name, tensor in model.patch_batch([photo]).items():
            assert inputs[name].equal(tensor), name
    assert processor(text=texts, max_length=196)["input_ids"].equal(Pieces()(texts, 196))
    with pytest.raises(ValueError, match="cut and padded to 64 pieces, or 196"):
        processor(text=texts, padding=True)


def test_a_loaded_model_is_saved_with_its_vocabulary(tmp_path, caplog):
    FGCLIP2(FGCLIP2Config.preset("tiny")).save_pretrained(tmp_path / "first")
    FGCLIP2.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert Pieces(tmp_path / "second").name == str(tmp_path / "second")
    golden_model().save_pretrained(tmp_path / "third")  # came without one
    assert not (tmp_path / "third/tokenizer.json").exists()
    assert "saved without tokenizer.json: " in caplog.text


def test_published_figures_are_compared(tmp_path, capsys, monkeypatch):
    "Other weights are told to differ, by how much; the ones that are meant agree."
    FGCLIP2(FGCLIP2Config.preset("tiny")).save_pretrained(tmp_path / "model")
    photo, captions = tmp_path / "photo.png", tmp_path / "captions.py"
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(photo)
    texts = {name: [f"{name} {i}" for i in range(6)] for name in published.LOGITS}
    captions.write_text("".join(f"{name} = {rows}\n" for name, rows in texts.items()))
    words = [str(tmp_path / "model"), str(photo)]

    assert compare([*words, "--captions", str(captions)]) == 1
    said = [x for x in capsys.readouterr().out.splitlines() if " matched, " not in x]  # the log
    assert len(said) == 28 and said[-1].startswith("differs: ") and "7.1313" in said[1]
    assert compare(words) == 1 and "for the captions add --captions" in capsys.readouterr().out

    found = published.published_figures(FGCLIP2.from_pretrained(words[0]), photo, texts)
    logits = [x.found for x in found]
    meant = {
        name: (walk, logits[6 * i : 6 * i + 6])
        for i, (name, (walk, _)) in enumerate(published.LOGITS.items())
    }
    monkeypatch.setattr(published, "LOGITS", meant)
    monkeypatch.setattr(published, "SHARES", logits[24:])
    assert compare([*words, "--captions", str(captions)]) == 0
    assert "all 26 figures agree" in capsys.readouterr().out

    Image.new("RGB", (64, 48)).save(photo)
    assert compare(words) == 2 and "64 x 48 pixels; COCO's" in capsys.readouterr().err


def test_other_sizes_and_which_positions_are_read(tmp_path):
    "40 and 100 positions, 16 kept, patches of 5 pixels on a table of 5 x 5."
    tower = dict(hidden_size=40, intermediate_size=72, num_attention_heads=5, num_hidden_layers=3)
    text = dict(tower, vocab_size=632, max_position_embeddings=40, longtext_len=100, keep_len=16)
    config = FGCLIP2Config(
        text_config=text, vision_config=dict(tower, num_patches=25, patch_size=5)
    )
    torch.manual_seed(0)
    FGCLIP2(config).save_pretrained(tmp_path)
    model, pieces = FGCLIP2.from_pretrained(tmp_path, prove=True), Pieces()
    assert model.config.text_config.keep_len == 16
    photos = model.patch_batch([np.zeros((17, 60, 3), np.uint8)], budget=30)
    assert model.get_image_features(**photos).shape == (1, 40)
    assert photos["pixel_values"].shape[2] == 75
    model.get_text_features(pieces(["two dogs"], 100), walk_type="long").sum().backward()
    table = model.text_model.embeddings
    for part, rows in (("ori", slice(0, 16)), ("res", slice(16, 100))):
        grad = getattr(table, f"position_embedding_{part}").weight.grad
        assert grad[rows].ne(0).any(1).all()
        assert grad.ne(0).any(1).sum() == rows.stop - rows.start
    assert table.position_embedding.weight.grad is None
