"""What a sixth attack found about models: folders read with another vocabulary, other pixels, or
random weights than their own, and nobody told. Each folder here is made by transformers itself."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel, CLIPConfig, CLIPModel
from transformers import CLIPImageProcessor

from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.evaluation.encoder import Encoder
from fgclip_nb.evaluation.features import load_model
from fgclip_nb.model.fgclip import FGCLIP
from fgclip_nb.model.opening import open_model, preset_model
from fgclip_nb.model.siglip_loading import known_pieces
from fgclip_nb.text.pieces import Pieces
from fgclip_nb.text.tokenizer import get_tokenizer
from test_loading import as_openai

HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def small(rows=49408, **text):
    "transformers' CLIPModel with towers of 32 and 64."
    torch.manual_seed(0)
    tower = dict(intermediate_size=64, num_hidden_layers=2, hidden_act="gelu")
    marks = dict(bos_token_id=rows - 2, eos_token_id=rows - 1, pad_token_id=rows - 1)
    config = CLIPConfig(
        projection_dim=32,
        text_config=dict(tower, hidden_size=64, num_attention_heads=1, vocab_size=rows)
        | marks
        | text,
        vision_config=dict(
            tower, hidden_size=64, num_attention_heads=1, image_size=32, patch_size=16
        ),
    )
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    small().save_pretrained(folder)
    return folder


@pytest.fixture
def clip(plain, tmp_path):
    "A folder of CLIP's weights alone, and what writes a JSON file of it anew."
    folder = tmp_path / "clip"
    shutil.copytree(plain, folder, copy_function=os.link)

    def write(name, **entries):
        path = folder / name
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(stored | entries))

    return folder, write


# ---- what a folder is ---------------------------------------------------------------------------

FOREIGN = "metaclip_2 altclip clipseg owlvit xclip blip vision-text-dual-encoder clip_text_model"


@pytest.mark.parametrize("kind", [*FOREIGN.split(), "siglip2_vision_model", "chinese_clip", 7])
@pytest.mark.parametrize("load", [open_model, FGCLIP.from_clip, FGCLIP.from_pretrained])
def test_another_kind_of_model_is_refused_by_name(clip, kind, load):
    folder, write = clip
    write("config.json", model_type=kind)
    with pytest.raises(DataError, match=f"not a CLIP model .model_type .?{kind}.?.. Read here are"):
        load(folder)


def test_another_kind_of_tower_is_refused_by_name(clip):
    folder, write = clip
    write("config.json", text_config=dict(model_type="xlm-roberta"))
    with pytest.raises(DataError, match="text_config has model_type 'xlm-roberta'"):
        open_model(folder)


# ---- which vocabulary ---------------------------------------------------------------------------


def as_slow(folder):
    "vocab.json and merges.txt, as versions of transformers before 5 wrote them beside."
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in stored["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def old_forms(folder, write):
    "One folder after another, as several versions of transformers save it."
    yield "weights alone"
    get_tokenizer().save_pretrained(folder)
    yield "transformers 5"
    as_slow(folder)
    write("tokenizer_config.json", tokenizer_class="CLIPTokenizer", do_lower_case=True)
    write("special_tokens_map.json", eos_token="<|endoftext|>")
    yield "transformers 4"
    (folder / "tokenizer.json").unlink()
    yield "transformers 3"


def test_plain_clip_goes_on_with_and_without_its_tokenizer_files(clip, caplog):
    folder, write = clip
    first = None
    caplog.set_level(logging.INFO, "fgclip_nb")
    for form in old_forms(folder, write):
        model = load_model(folder)
        said = model.load_report.inputs
        assert ("texts" if form == "weights alone" else "tokenizer") in said, form
        features = Encoder(model).texts(["a red bowl", "a blue dog"])
        first = features if first is None else first
        np.testing.assert_array_equal(features, first)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def reversed_numbers(stored):
    names = [*stored["model"]["vocab"]]
    stored["model"]["vocab"] = dict(zip(names, [*range(49405, -1, -1), 49406, 49407]))


def keeps_capitals(stored):
    stored["normalizer"] = None


@pytest.mark.parametrize(
    "spoil, said", [(reversed_numbers, "is number"), (keeps_capitals, "reads")]
)
def test_a_tokenizer_that_gives_other_numbers_is_refused(clip, spoil, said):
    folder, write = clip
    get_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    spoil(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match=f"tokenizer.json: .*{said}"):
        open_model(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_the_files_of_a_slow_tokenizer_are_compared_too(clip, name):
    folder, write = clip
    get_tokenizer().save_pretrained(folder)
    as_slow(folder)
    (folder / "tokenizer.json").unlink()
    text = (folder / name).read_text()
    last = "zz</w>" if name == "vocab.json" else "\n"
    (folder / name).write_text(text.replace("!", last, 1) if "vocab" in name else text[:9000])
    with pytest.raises(DataError, match=name):
        open_model(folder)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", '{"tokenizer_class": "XLMRobertaTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend"}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{"),
        ("vocab.txt", "[PAD]\n"),
        ("sentencepiece.bpe.model", "x"),
    ],
)
def test_files_of_another_or_a_broken_tokenizer_are_refused_by_name(clip, name, content):
    folder, _ = clip
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        open_model(folder)


@pytest.mark.parametrize("rows", [1000, 60_000])
def test_rows_for_another_vocabulary_are_refused_with_both_sizes(tmp_path, rows):
    small(rows).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"{rows:,} rows, CLIP's vocabulary numbers 49,408"):
        open_model(tmp_path)
    fed_with_numbers = FGCLIP.from_clip(tmp_path)
    if rows < 49408:
        with pytest.raises(DataError, match="1,000 rows"):
            Encoder(fed_with_numbers).texts(["a dog"])


def test_tokens_that_a_fine_tuning_added_are_no_obstacle(tmp_path):
    small(49410, eos_token_id=49407, bos_token_id=49406).save_pretrained(tmp_path / "grown")
    tokenizer = get_tokenizer()
    tokenizer.add_tokens(["<mine>", "<yours>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    model = open_model(tmp_path / "grown")
    model.save_pretrained(tmp_path / "again")
    assert open_model(tmp_path / "again").config.text_config.vocab_size == 49410


def test_another_end_mark_is_refused(clip):
    folder, write = clip
    stored = json.loads((folder / "config.json").read_text())["text_config"]
    write("config.json", text_config=stored | dict(eos_token_id=3))
    with pytest.raises(DataError, match="eos_token_id is 3"):
        open_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
def test_a_tokenizer_file_without_end_is_not_read(clip, name):
    folder, _ = clip
    (folder / name).touch()
    os.truncate(folder / name, 1500 << 20)
    with pytest.raises(DataError, match=f"{name}.*1,572,864,000 bytes"):
        open_model(folder)


# ---- FG-CLIP 2 ----------------------------------------------------------------------------------


@pytest.fixture
def second(tmp_path):
    preset_model("fgclip2-tiny").save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def test_pieces_beyond_the_models_rows_are_refused_when_it_is_opened(second):
    path = second / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    assert isinstance(vocabulary, dict)
    name = next(n for n in vocabulary if n.strip("▁").isalpha())
    vocabulary[name] = 5000
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match="up to number 5,000, the model 632"):
        open_model(second)


def test_an_endless_vocabulary_of_pieces_is_not_read(second):
    (second / "tokenizer.json").unlink()
    (second / "tokenizer.json").touch()
    os.truncate(second / "tokenizer.json", 1500 << 20)
    with pytest.raises(DataError, match="1,572,864,000 bytes"):
        Pieces(second)


def test_another_vocabulary_of_the_released_size_is_told(caplog):
    model = preset_model("fgclip2-tiny")
    model.config.text_config.vocab_size = 256_000
    model.pieces_from = (None, None)
    model.pieces_from = (Pieces().name, None)
    with caplog.at_level(logging.WARNING, "fgclip_nb"):
        known_pieces(model)
    assert "known texts have other numbers" in caplog.text


@pytest.mark.parametrize(
    "entries, said",
    [
        (dict(image_mean=[0.1] * 3, image_std=[0.9] * 3), "with 0.5 and 0.5"),
        (dict(do_normalize=False), "with 0.5 and 0.5"),
        (dict(patch_size=32), "patch_size is 32"),
        (dict(do_rescale=False), "divided by 255"),
    ],
)
def test_pixels_that_patches_cannot_have_are_refused(second, entries, said):
    path = second / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(DataError, match=said):
        open_model(second)


# ---- photos -------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    "file, scale",
    [
        ("processor_config.json", HALF),
        ("preprocessor_config.json", dict(do_normalize=False)),
        ("preprocessor_config.json", dict(image_mean=0.2)),
        ("preprocessor_config.json", dict(image_std=[0.3, 0.2, 0.1])),
    ],
)
def test_mean_and_deviation_of_a_folder_are_used_and_saved(clip, photo, tmp_path, scale, file):
    folder, write = clip
    CLIPImageProcessor(size=dict(height=32, width=32), do_center_crop=False).save_pretrained(folder)
    stored = json.loads((folder / "preprocessor_config.json").read_text()) | scale
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    theirs = CLIPImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).get_image_features(**theirs).pooler_output[0]
    if file == "processor_config.json":
        (folder / "preprocessor_config.json").unlink()
        write(file, image_processor=stored)
    model = open_model(folder)
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None]
    with torch.no_grad():
        trained = model.get_image_features(pixels)[0]
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "bare", processor=False)
    again = [open_model(tmp_path / name) for name in ("ours", "bare")]
    found = [Encoder(m).images([photo])[0][0] for m in (model, *again)]
    for features in (trained, *map(torch.from_numpy, found)):
        assert float((features - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert str(model.config.image_mean) in (tmp_path / "ours/README.md").read_text()
    write_back = json.loads((tmp_path / "ours/processor_config.json").read_text())
    assert write_back["image_processor"]["image_std"] == model.config.image_std


def test_the_usual_photo_settings_are_silent_and_leave_no_trace(clip, caplog):
    folder, _ = clip
    CLIPImageProcessor(
        size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)
    ).save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "fgclip_nb"):
        model = open_model(folder)
    assert not caplog.text and "image_mean" not in model.config.to_json_string()


@pytest.mark.parametrize(
    "entries, field",
    [
        (dict(resample=2), "resample"),
        (dict(do_resize=False), "do_resize"),
        (dict(size=dict(shortest_edge=64)), "size"),
        (dict(crop_size=64, do_center_crop=True), "size"),
    ],
)
def test_what_is_not_done_as_the_folder_says_is_told(clip, caplog, entries, field):
    folder, write = clip
    write("preprocessor_config.json", image_processor_type="CLIPImageProcessor", **entries)
    with caplog.at_level(logging.WARNING, "fgclip_nb"):
        report = open_model(folder).load_report
    assert f"preprocessor_config.json: {field} is" in caplog.text and "here" in caplog.text
    assert [n for n in report.inputs if n.endswith(f"preprocessor_config.json: {field}")]


@pytest.mark.parametrize(
    "entries",
    [
        dict(image_mean="x"),
        dict(image_std=[0, 1, 1]),
        dict(image_mean=[1, 2]),
        dict(rescale_factor=1),
        dict(do_rescale=False),
        dict(image_processor_type="ViTImageProcessor"),
    ],
)
def test_photo_settings_that_cannot_be_met_are_refused(clip, entries):
    folder, write = clip
    write("preprocessor_config.json", **entries)
    with pytest.raises(DataError, match="preprocessor_config.json: "):
        open_model(folder)


def test_two_files_that_contradict_each_other_are_refused(clip):
    folder, write = clip
    write("preprocessor_config.json", **HALF)
    model = open_model(folder)
    model.save_pretrained(folder.parent / "ours")
    CLIPImageProcessor().save_pretrained(folder.parent / "ours")
    (folder.parent / "ours/processor_config.json").unlink()
    with pytest.raises(DataError, match="one of both files is of another model"):
        open_model(folder.parent / "ours")


# ---- open_clip ----------------------------------------------------------------------------------


@pytest.fixture
def open_clip(tmp_path):
    "Makes a folder of open_clip with entries of its two parts and of the photos."

    def make(vision=None, text=None, shown=None, whole=None, rows=49408):
        folder = tmp_path / "open_clip"
        folder.mkdir(exist_ok=True)
        tensors = as_openai(small(rows).state_dict())
        save_file(tensors, folder / "open_clip_model.safetensors")
        sizes = dict(layers=2, width=64)
        parts = dict(
            vision_cfg=sizes | dict(image_size=32, patch_size=16) | (vision or {}),
            text_cfg=sizes | dict(heads=1, vocab_size=rows) | (text or {}),
        )
        entries = dict(model_cfg=dict(embed_dim=32, **parts, **(whole or {})))
        entries["preprocess_cfg"] = shown or {}
        (folder / "open_clip_config.json").write_text(json.dumps(entries))
        return folder

    return make


TEXT, VISION = "text", "vision"


@pytest.mark.parametrize(
    "part, entry",
    [
        (TEXT, dict(hf_tokenizer_name="facebook/xlm-v-base")),
        (TEXT, dict(tokenizer_kwargs=dict(strip_sep_token=True))),
        (TEXT, dict(tokenizer_mode="canonicalize")),
        (TEXT, dict(context_length=32)),
        (TEXT, dict(pool_type="last")),
        (TEXT, dict(pool_type="first")),
        (TEXT, dict(pool_type="eos", eos_id=3)),
        (TEXT, dict(act_kwargs=dict(approximate="tanh"))),
        (TEXT, dict(norm_kwargs=dict(eps=1e-2))),
        (TEXT, dict(heads=0)),
        (VISION, dict(pool_type="avg")),
        (VISION, dict(act_kwargs=dict(approximate="tanh"))),
        (VISION, dict(norm_kwargs=dict(eps="x"))),
        (VISION, dict(norm_kwargs=[1])),
        (VISION, dict(head_width="64")),
        (VISION, dict(head_width=None, qk_norm=True)),
        ("whole", dict(multimodal_cfg=dict(width=64))),
    ],
)
def test_what_open_clip_has_and_this_class_has_not_is_refused_by_name(open_clip, part, entry):
    folder = open_clip(**{part: entry})
    with pytest.raises((DataError, ConfigError), match=[*entry][-1]):
        open_model(folder)


def test_the_usual_entries_of_open_clip_are_no_obstacle(open_clip):
    folder = open_clip(
        vision=dict(
            pool_type="tok", pos_embed_type="learnable", timm_pool="avg", patch_dropout=0.5
        ),
        text=dict(pool_type="argmax", eos_id=2, hf_tokenizer_name="openai/clip-vit-base-patch32"),
    )
    assert open_model(folder).load_report.missing == []


def test_mean_and_deviation_of_open_clip_are_used(open_clip, caplog):
    shown = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], size=84)
    with caplog.at_level(logging.WARNING, "fgclip_nb"):
        model = open_model(open_clip(shown=shown | dict(interpolation="bilinear")))
    assert (model.config.image_mean, model.config.image_std) == (shown["mean"], shown["std"])
    for field in ("preprocess_cfg.interpolation", "size"):
        assert f"open_clip_config.json: {field} is" in caplog.text
    told = open_clip(shown=shown) / "open_clip_model.safetensors"
    assert FGCLIP.from_open_clip(told, name="ViT-B-16").config.image_std == shown["std"]


def test_rows_and_tokenizer_files_of_an_open_clip_folder(open_clip):
    with pytest.raises(DataError, match="60,000 rows"):
        open_model(open_clip(rows=60_000))
    folder = open_clip()
    (folder / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(DataError, match="vocab.txt"):
        open_model(folder)


# ---- Chinese-CLIP -------------------------------------------------------------------------------

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


@pytest.fixture
def chinese(tmp_path):
    torch.manual_seed(0)
    tower = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = ChineseCLIPConfig(
        text_config=dict(tower, hidden_size=32, vocab_size=200),
        vision_config=dict(tower, hidden_size=64, image_size=32, patch_size=16),
        projection_dim=32,
    )
    ChineseCLIPModel(config).save_pretrained(tmp_path)
    lines = [*MARKS, *LETTERS, *(f"##{c}" for c in LETTERS)]
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return tmp_path


def test_a_whole_folder_of_chinese_clip_is_scored_with_its_own_pixels(chinese, photo):
    encoder = Encoder(load_model(chinese))
    a, b = encoder.texts(["a red bowl", "a blue dog"])
    assert np.abs(a - b).max() > 1e-3
    plain = encoder.images([photo])[0]
    (chinese / "preprocessor_config.json").write_text(json.dumps(HALF))
    assert np.abs(Encoder(load_model(chinese)).images([photo])[0] - plain).max() > 1e-3


@pytest.mark.parametrize("part", ["text_", "layers.1", "logit_scale", "projection"])
def test_missing_tensors_of_chinese_clip_are_refused_by_name(chinese, part):
    path = chinese / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if part not in n}
    save_file(kept, path, metadata=dict(format="pt"))
    with pytest.raises(DataError, match=f"missing .*{part}"):
        load_model(chinese)


def test_damaged_and_misshaped_tensors_of_chinese_clip_are_refused(chinese):
    path = chinese / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("visual_projection"))
    whole = tensors[name]
    for tensor, said in ((whole * torch.nan, "NaN or infinite"), (whole[:5].clone(), "has shape")):
        save_file(tensors | {name: tensor}, path, metadata=dict(format="pt"))
        with pytest.raises(DataError, match=f"{name}.*{said}"):
            load_model(chinese)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot read it"):
        load_model(chinese)


@pytest.mark.parametrize(
    "files, said",
    [
        ({"vocab.txt": None, "tokenizer_config.json": None}, "no tokenizer.json and no vocab.txt"),
        ({"vocab.txt": None}, "no tokenizer.json and no vocab.txt"),
        ({"vocab.txt": ""}, "vocab.txt"),
        ({"vocab.txt": "\n".join(MARKS)}, "knows none of"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not valid JSON"),
        ({"tokenizer.json": "{}"}, "not a readable tokenizer|knows none of|numbers up to"),
        ({"vocab.txt": "\n".join([*MARKS, *map(str, range(500)), *LETTERS])}, "has 200 rows"),
    ],
)
def test_a_tokenizer_of_chinese_clip_that_lacks_or_breaks(chinese, files, said):
    for name, content in files.items():
        (chinese / name).unlink(missing_ok=True)
        if content is not None:
            (chinese / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_model(chinese)
