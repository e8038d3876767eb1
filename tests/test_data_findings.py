"""Findings about whole data sets that no cell of one room can show: what a report says of files as
people have them, and that a mended copy is clean."""

import json, shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from data_formats import media_root, write
from fgclip_nb.core.folder import asset
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.mending import mend, write_mended
from fgclip_nb.data.overview import all_findings, look_at, test_media as media_of_test

LIMITS = SimpleNamespace(min_area=0.005, out_of_range="reject", context_length=248)
PHOTOS = sorted(asset("sample", "images").glob("*.jpg"))[:6]


def row(name, k=0, **more):
    box = dict(bbox=[0.1, 0.1, 0.6, 0.6 + 0.01 * k], caption=f"a thing {k}")
    return dict(image=name, caption=f"A photo of thing {k} in the room.", regions=[box]) | more


def found(folder, rows, test_rows=(), text=None, **how):
    "(findings, Looked) of rows written to a file beside some photos."
    data = folder / "data.jsonl"
    data.write_text(text if text is not None else "\n".join(map(json.dumps, rows)))
    samples, rejects = load_samples(data)
    looked = look_at(samples, rejects, LIMITS)
    tested = ()
    if test_rows:
        (folder / "held.jsonl").write_text("\n".join(map(json.dumps, test_rows)))
        tested = media_of_test(str(folder / "held.jsonl"))
    return all_findings(looked, LIMITS, 14, test_samples=tested), looked


@pytest.fixture
def folder(tmp_path):
    for k, photo in enumerate(PHOTOS):
        shutil.copy(photo, tmp_path / f"{k}.jpg")
    return tmp_path


def one(findings, text):
    matching = [f for f in findings if text in f.what]
    assert len(matching) == 1, [f.what for f in findings]
    return matching[0]


def saved_again(path, out):
    with Image.open(path) as image:
        small = image.convert("RGB").resize((image.width // 2, image.height // 2))
    small.save(out, quality=70)


def test_the_same_photo_under_two_names_is_named(folder):
    saved_again(folder / "0.jpg", folder / "copy.jpg")
    rows = [row(f"{k}.jpg", k) for k in range(5)] + [row("copy.jpg", 7)]
    findings, _ = found(folder, rows)
    same = one(findings, "under several names")
    assert "0.jpg" in same.what and "copy.jpg" in same.what and same.level == "look"
    assert not [f for f in findings if f.level == "fix"]


def test_a_held_out_photo_under_another_name_must_be_fixed(folder):
    saved_again(folder / "0.jpg", folder / "copy.jpg")
    rows = [row(f"{k}.jpg", k, split="train") for k in range(5)]
    findings, _ = found(folder, [*rows, row("copy.jpg", 7, split="test")])
    assert findings[0].level == "fix" and "copy.jpg" in findings[0].what


def test_a_test_photo_in_training_is_found_by_content(folder):
    saved_again(folder / "2.jpg", folder / "theirs.jpg")
    findings, _ = found(folder, [row(f"{k}.jpg", k) for k in range(5)], [row("theirs.jpg", 9)])
    leak = one(findings, "photos of the test set in training")
    assert leak.level == "fix" and "theirs.jpg" in leak.what and "2.jpg" in leak.what


def test_the_same_entry_twice_is_named_by_its_place(folder):
    rows = [row(f"{k}.jpg", k) for k in range(5)]
    findings, _ = found(folder, [*rows, rows[3]])
    twice = one(findings, "entries that stand there twice")
    assert "data.jsonl line 4 = data.jsonl line 6" in twice.what and twice.count == 1


def test_one_missing_photo_is_one_row_with_its_name(folder):
    findings, _ = found(folder, [row(f"{k}.jpg", k) for k in range(5)] + [row("gone.jpg", 9)])
    missing = [f for f in findings if "missing_media" in f.what]
    assert len(missing) == 1 and "gone.jpg" in missing[0].what and missing[0].count == 1


def test_broken_json_comes_first(folder):
    rows = [row(f"{k}.jpg", k) for k in range(5)]
    for r in rows[:4]:
        r["regions"][0]["bbox"] = [0.5, 0.5, 0.5, 0.9]
    text = "[" + ",".join(map(json.dumps, rows)) + ', {"image": "5.j'
    findings, _ = found(folder, None, text=text)
    assert "broken_json" in findings[0].what and findings[0].urgent
    assert findings[0].share < findings[1].share


def test_a_mended_copy_has_nothing_left_to_mend(folder):
    rows = [row(f"{k}.jpg", k, split="train") for k in range(4)]
    rows[1]["regions"][0]["bbox"] = [0.5, 0.5, 0.5, 0.9]
    rows[2]["regions"][0]["negatives"] = ["A thing 2", "a jug", "a jug"]
    rows += [row("0.jpg", 0, split="test"), rows[3], row("gone.jpg", 8)]
    text = "\n".join([*map(json.dumps, rows), "{cut"])
    _, looked = found(folder, None, text=text)
    mended, lines = mend(looked.readable, looked.rejects + looked.unreadable)
    write_mended(mended, lines, folder / "mended.jsonl", str(folder))
    told = (folder / "mended.jsonl.changes.txt").read_text().splitlines()
    assert told == lines and len(lines) == 6
    samples, rejects = load_samples(folder / "mended.jsonl")
    again = look_at(samples, rejects, LIMITS)
    assert not again.everything and mend(again.readable)[1] == []
    findings = all_findings(again, LIMITS, 14)
    assert not [f.what for f in findings if f.level == "fix"]
    assert [r.negatives for s in samples for r in s.regions if r.negatives] == [("a jug",)]


def test_a_set_of_every_format_can_be_mended(tmp_path):
    from data_formats import FINEHARD

    media_root(tmp_path / "photos")
    write(tmp_path / "fine.json", FINEHARD)
    samples, rejects = load_samples(tmp_path / "fine.json", tmp_path / "photos")
    mended, lines = mend(samples, rejects)
    out = tmp_path / "mended.jsonl"
    write_mended(mended, lines, out, str(tmp_path / "photos"))
    back, _ = load_samples(out, tmp_path / "photos")
    said = [[(r.phrase, r.long_phrase, r.box, r.negatives) for r in s.regions] for s in samples]
    assert [
        [(r.phrase, r.long_phrase, r.box, r.negatives) for r in s.regions] for s in back
    ] == said
    assert [s.captions for s in back] == [s.captions for s in samples]


@pytest.mark.long
def test_a_plot_that_fails_costs_neither_report_nor_end(tmp_path, monkeypatch):
    from fgclip_nb.diagnostics import report as room
    from synthetic_runs import synthetic_run

    run = synthetic_run(tmp_path / "run")
    (run.path / "tensorboard").mkdir(exist_ok=True)

    def no_plot(ev):
        raise RuntimeError("no <font> to draw with")

    monkeypatch.setattr(room, "PLOTS", dict(room.PLOTS, losses=no_plot, own=no_plot))
    assert room.conclude(run)
    page = (run.path / "report.html").read_text()
    assert "could not be drawn" in page and "&lt;font&gt;" in page and "<h2>Parameters" in page


def test_a_grey_photo_is_no_duplicate_of_another(folder):
    for name in ("grey.jpg", "black.jpg"):
        Image.new("RGB", (64, 64), name[:-4]).save(folder / name)
    findings, _ = found(folder, [row("grey.jpg", 1), row("black.jpg", 2), row("0.jpg", 3)])
    assert not [f for f in findings if "several names" in f.what]
