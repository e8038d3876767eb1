"""Wrong sentences from outside: read in every form, checked one by one, merged and told. Whole
data files through `prepare_data`, so it is no cell."""

import json
import random

import pytest
from PIL import Image

from fgclip_nb.core.config import TrainConfig
from fgclip_nb.core.identity import DataError
from fgclip_nb.data.outside_negatives import load_negatives, merge_negatives
from fgclip_nb.data.samples import Region, Sample
from fgclip_nb.training.rundata import prepare_data


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger="fgclip_nb")


MUG = ["a blue mug", "A RED MUG!", "the blue mug", "a red jug", "", "a red cup"]
FORMS = {
    "dict.json": json.dumps({"a red mug": MUG}),
    "numbered.json": json.dumps({"a red mug": dict(enumerate(MUG))}),
    "list.json": json.dumps([dict(phrase="The red mug.", negatives=MUG)]),
    "lines.jsonl": "\n".join(json.dumps(dict(caption="a red mug", negatives=[t])) for t in MUG),
    "finehard.json": json.dumps([dict(short_expr="a red mug", short_expr_negs=MUG)]),
}


def photo(*regions):
    return Sample("1", "/1.jpg", regions=list(regions))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    own = Region("a red mug", negatives=("a red plate",), id="r")
    (sample,), rejects = merge_negatives([photo(own)], tmp_path / name, n=3)
    assert sample.regions[0].negatives == ("a red plate", "a blue mug", "a red jug")
    rules = [r.rule for r in rejects]
    twice = "negative_twice"
    assert rules == ["negative_is_positive", twice, "empty_caption", "too_many_negatives"] or (
        name == "lines.jsonl" and sorted(rules)[-2] == twice
    )
    assert all(r.file == str(tmp_path / name) and "negatives[" in r.field for r in rejects)


def test_too_few_are_told_and_a_function_is_asked_for_each_phrase():
    regions = [Region("a dog", id="a"), Region("a cat", id="b", long_phrase="A cat on a mat")]
    wrong = {"a dog": ["a wolf"], "a cat": ["the cat on the mat", "a lynx"]}
    (sample,), rejects = merge_negatives([photo(*regions)], wrong.get, n=2)
    assert [r.negatives for r in sample.regions] == [("a wolf",), ("a lynx",)]
    assert [r.rule for r in rejects] == ["few_negatives", "negative_is_positive", "few_negatives"]
    assert "1 wrong sentences instead of 2" in rejects[0].reason


@pytest.mark.parametrize("text", ['["a"]', "[1]", '{"a": 7}', '{"a": ["b"]', "nonsense", ""])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "llm.json").write_text(text)
    with pytest.raises(DataError, match="llm.json"):
        load_negatives(tmp_path / "llm.json")


def test_training_takes_them_and_refuses_those_of_other_data(tmp_path):
    rows = []
    for i, phrase in enumerate(["a red mug", "a dog", "a cat"]):
        Image.new("RGB", (64, 48), (60 * i, 90, 90)).save(tmp_path / f"{i}.jpg")
        box = dict(bbox=[0.1, 0.1, 0.9, 0.9], caption=phrase)
        rows.append(dict(image=f"{i}.jpg", split="train", regions=[box]))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "llm.json").write_text(json.dumps({"a red mug": MUG, "a ship": ["a boat"]}))
    params = dict(data=str(tmp_path / "data.json"), outside_negatives=str(tmp_path / "llm.json"))
    data = prepare_data(TrainConfig.from_params(params))
    assert [len(r.negatives) for s in data.train for r in s.regions] == [3, 0, 0]
    assert "negative_is_positive" in {r.rule for r in data.rejects}
    (tmp_path / "llm.json").write_text(json.dumps({"a ship": ["a boat"]}))
    with pytest.raises(DataError, match="none of the 1 phrases of .*llm.json"):
        prepare_data(TrainConfig.from_params(params))


def test_a_damaged_file_is_read_or_refused(tmp_path):
    rng, sound = random.Random(0), list(FORMS.values())
    for _ in range(300):
        data = bytearray(rng.choice(sound).encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 5)] = rng.choice((b"", b"]", b"{", b"7", b"\xff", b'"'))
        (tmp_path / "x.json").write_bytes(data)
        try:
            merge_negatives([photo(Region("a red mug"))], tmp_path / "x.json")
        except DataError as e:
            assert "x.json" in str(e)
