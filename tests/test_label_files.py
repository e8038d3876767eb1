"""Class lists as people have them: every common form is read, every other one is refused by its
name, and none is replaced. The files are made here."""

import json
import random

import pytest

from fgclip_nb.core.identity import DataError
from fgclip_nb.evaluation.classification import label_set
from fgclip_nb.evaluation.label_files import file_names, read_labels

NAMES = ["tench", "great white shark", "hot dog", "7 up", "crane (bird)"]
SYNSETS = [f"n{1440764 + i:08d}" for i in range(len(NAMES))]
NUMBERED = list(enumerate(NAMES))


def lines(form, start=0):
    return "\n".join(
        form.format(i=i + start, name=name, mark=SYNSETS[i], under=name.replace(" ", "_"))
        for i, name in NUMBERED
    )


FORMS = {
    "plain.txt": lines("{name}"),
    "windows.txt": lines("{name}").replace("\n", "\r\n\r\n"),
    "bom.txt": "\ufeff" + lines("{name}"),
    "wide.txt": lines("{name}").encode("utf-16"),
    "remark.txt": "# my classes\n" + lines("{name}"),
    "quoted.txt": lines('"{name}",'),
    "classInd.txt": lines("{i} {name}", 1),
    "colon.txt": lines("{i}: {name}"),
    "dot.txt": lines("{i}. {name}", 1),
    "comma.txt": lines("{i}, {name}"),
    "behind.txt": lines("{name} {i}"),
    "headed.txt": "id name\n" + lines("{i} {name}"),
    "a_word.txt": "classes\n" + lines("{name}"),
    "tabs.txt": lines("{i}\t{name}"),
    "synset_words.txt": lines("{mark} {under}, another name"),
    "clsidx_to_labels.txt": repr({i: f"{name}, another name" for i, name in NUMBERED}),
    "obj.names": lines("{under}"),
    "one.csv": "label\n" + lines("{name}"),
    "kinetics.csv": "id,name\n" + lines("{i},{name}"),
    "audioset.csv": "index,mid,display_name\n" + lines('{i},/m/0{i}x,"{name}"'),
    "openimages.csv": lines("/m/01{i},{name}"),
    "semicolons.csv": "class;id\n" + lines("{name};{i}"),
    "other_head.csv": "nr,benennung\n" + lines("{i},{name}"),
    "simple.json": json.dumps(NAMES),
    "class_index.json": json.dumps({i: [SYNSETS[i], n.replace(" ", "_")] for i, n in NUMBERED}),
    "number_to_name.json": json.dumps(dict(NUMBERED)),
    "name_to_number.json": json.dumps({n: i for i, n in NUMBERED}),
    "synset_to_name.json": json.dumps(dict(zip(SYNSETS, NAMES))),
    "pairs.json": json.dumps([[str(i), n] for i, n in NUMBERED]),
    "objects.json": json.dumps([dict(id=i, name=n) for i, n in NUMBERED]),
    "objects.jsonl": "\n".join(json.dumps(dict(id=i, label=n)) for i, n in NUMBERED),
    "coco.json": json.dumps(
        dict(images=[], categories=[dict(id=i, name=n, supercategory="x") for i, n in NUMBERED])
    ),
    "config.json": json.dumps(dict(model_type="vit", id2label=dict(NUMBERED))),
    "label2id.json": json.dumps(dict(label2id={n: i for i, n in NUMBERED})),
    "holder.json": json.dumps(dict(version=2, classes=NAMES)),
    "prompts.json": json.dumps({n: [f"a photo of a {n}"] for n in NAMES}),
    "data.yaml": "path: .\nnc: 5\nnames:\n" + lines("  {i}: {name}"),
    "list.yml": "names: " + json.dumps(NAMES),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_label_file_is_read_in_every_common_form(tmp_path, name):
    text = FORMS[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_labels(tmp_path / name) == NAMES
    assert label_set(tmp_path / name, {"great_white_shark"}) == NAMES


REFUSED = {
    "cut.json": '["tench", "gold',
    "both.json": '{"tench": "Tinca tinca", "goldfish": "Carassius auratus"}',
    "deep.json": '[["a", "b"], ["c", "d"]]',
    "number.json": "[7",
    "nothing.json": "[]",
    "null.json": "[null, null]",
    "empty.txt": "\n\n",
    "twice.txt": "tench\ngoldfish\ntench",
    "two.csv": "a,b\nc,d\ne,f",
    "bytes.txt": b"\x80\x04\x95\x00\x00tench",
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
    "broken.yaml": "names: [a, b",
    "text.yaml": "just a text",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_file_is_refused_by_its_name(tmp_path, name):
    text = REFUSED[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=name):
        read_labels(tmp_path / name)


def test_labels_that_are_none_of_the_data_are_an_error(tmp_path):
    (tmp_path / "mine.txt").write_text("dog\ncat\n")
    with pytest.raises(DataError, match="none of the 2 labels of .*mine.txt"):
        label_set(tmp_path / "mine.txt", {"robbery", "arson"})


def test_a_spoilt_label_file_is_read_or_refused(tmp_path):
    "Pieces cut out, doubled and changed: names or a DataError, never another error."
    rng = random.Random(0)
    for _ in range(600):
        name = rng.choice(sorted(FORMS))
        text = FORMS[name]
        data = bytearray(text if isinstance(text, bytes) else text.encode())
        for _ in range(rng.randint(1, 4)):
            at, n = rng.randrange(len(data) + 1), rng.randint(0, 9)
            data[at : at + n] = bytes(rng.choice(b"[]{},:\"'\n\t 0a\xff") for _ in range(n // 2))
        (tmp_path / name).write_bytes(data)
        try:
            names = file_names(tmp_path / name)
        except DataError as e:
            assert name in str(e)
        else:
            assert all(isinstance(n, str) for n in names)
