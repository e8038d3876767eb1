"""Filters on whole data sets, hard negatives at scale, and what the report counts on real
benchmark files."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data_formats import DOCUMENTS, FINEHARD, media_root, write
from fgclip_nb.data import filters as filters_room, findings, hard_negatives, splits
from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.core.identity import folded
from fgclip_nb.data.filters import check_media, filter_regions
from fgclip_nb.data.hard_negatives import add_negatives, load_class_sentences
from fgclip_nb.data.samples import Keyframe, Region, Sample
from fgclip_nb.data.media import UCF_CLASSES
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.conversion import convert

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="the benchmark files are not beside this checkout"
)


def sample(*regions, kind="image", **kw):
    return Sample("s", "/x", kind, regions=list(regions), **kw)


def test_what_came_in_stays_as_it_was():
    s = sample(Region("a", box=(-0.1, 0, 0.5, 0.5)), Region("b", box=(0.5, 0.5, 0.5, 0.9)))
    kept, rejects = filter_regions([s], out_of_range="clip")
    assert (
        len(s.regions) == 2
        and s.regions[0].box == (-0.1, 0, 0.5, 0.5)
        and kept[0].regions[0].box == (0, 0, 0.5, 0.5)
    )
    assert [r.rule for r in rejects] == ["no_area"] and [
        (c.rule, c.regions) for c in kept.changes
    ] == [("out_of_range", 0)]


def test_a_track_is_judged_as_a_whole():
    good, flat, outside, tiny = (
        (0, 0, 0.5, 0.5),
        (0.2, 0.2, 0.2, 0.9),
        (0.8, 0, 1.3, 1),
        (0, 0, 0.02, 0.02),
    )

    def rule(*boxes, **kw):
        "What the filter rejects of one track, by rule."
        keyframes = tuple(Keyframe(10 * i, b) for i, b in enumerate(boxes))
        clip = sample(Region("x", keyframes=keyframes), kind="video")
        return Counter(r.rule for r in filter_regions([clip], **kw)[1])

    assert (
        rule(good, flat) == {"no_area": 1}
        and rule(good, outside) == {"out_of_range": 1}
        and rule(tiny, tiny) == {"min_area": 1}
    )
    assert rule(good, tiny) == {} and rule(good, outside, out_of_range="clip") == {}
    off = sample(
        Region(
            "x", keyframes=(Keyframe(0, good), Keyframe(5, good, False), Keyframe(9, flat, False))
        ),
        kind="video",
    )
    assert (
        filter_regions([off])[1] == []
    )  # the last keyframe ends nothing: it is visible nowhere, and its box does not count


def test_sums_on_every_format(tmp_path):
    root = media_root(tmp_path / "media")
    for name, document in DOCUMENTS.items():
        write(tmp_path / f"{name}.json", document)
    samples, rejects = load_samples(tmp_path, root)
    kept, dropped = filter_regions(samples, min_area=0.2)
    assert (
        rejects == []
        and dropped
        and sum(len(s.regions) for s in samples) == sum(len(s.regions) for s in kept) + len(dropped)
    )
    assert len(samples) == len(kept)


def test_wrong_limits():
    with pytest.raises(ConfigError, match="out_of_range"):
        filter_regions([], out_of_range="drop")
    with pytest.raises(ConfigError, match="min_area"):
        filter_regions([], min_area=2)


def test_media_are_opened_once_and_counted(tmp_path, monkeypatch):
    root = media_root(tmp_path / "media")
    (root / "b.jpg").write_bytes(b"no photo")
    samples, _ = load_samples(write(tmp_path / "d.json", FINEHARD + FINEHARD), root)
    opened, real = [], filters_room.read_image
    monkeypatch.setattr(filters_room, "read_image", lambda p, *size: (opened.append(p), real(p))[1])
    kept, rejects = check_media(samples)
    assert (
        len(opened) == 3
        and len(kept) == 4
        and [(r.rule, r.entries, r.regions) for r in rejects] == [("unreadable_media", 1, 2)] * 2
    )


def test_shards_filter_like_lists(tmp_path):
    convert("sample", tmp_path / "shards")
    shards = load_samples(tmp_path / "shards")[0]
    a, ra = filter_regions(check_media(shards)[0], min_area=0.02)
    b, rb = filter_regions(load_samples("sample")[0], min_area=0.02)
    assert list(a) == list(b) and ra == rb and a.subset(range(5))[2:] == b[2:5]


# ---- hard negatives


@pytest.fixture(scope="module")
def made():
    samples, _ = filter_regions(load_samples("sample")[0])
    bare = [
        Sample(
            s.id,
            s.media,
            captions=s.captions,
            regions=[Region(r.phrase, box=r.box, id=r.id) for r in s.regions],
        )
        for s in samples
    ]
    return bare, add_negatives(bare, seed=3)


def test_negatives_are_wrong_and_all_different(made):
    for s in made[1]:
        phrases = {folded(r.phrase) for r in s.regions} | {folded(c) for c in s.captions}
        for r in s.regions:
            negatives = {folded(n) for n in r.negatives}
            assert not negatives & phrases and len(negatives) == len(r.negatives) <= 10


def test_style_does_not_give_the_answer_away(made):
    for s in made[1]:
        for r in s.regions:
            for n in r.negatives:
                assert (
                    n.endswith(".") == r.phrase.endswith(".")
                    and n[0].isupper() == r.phrase[0].isupper()
                    and "  " not in n
                )
    for model in ("A RED MUG.", "Red mug", "a red mug"):
        for n in add_negatives([sample(Region(model))])[0].regions[0].negatives:
            assert n.isupper() == model.isupper() and n[0].isupper() == model[0].isupper()


def test_articles_and_plurals_fit(made):
    texts = [n for s in made[1] for r in s.regions for n in r.negatives]
    for t in [
        *texts,
        *add_negatives([sample(Region("An elephant and two old dogs"))], n=200)[0]
        .regions[0]
        .negatives,
    ]:
        words = t.lower().replace(".", "").split()
        for a, b in zip(words, words[1:]):
            if a in ("a", "an"):
                assert (a == "an") == (b[0] in "aeiou" and not b.startswith(("uni", "use"))), t
        assert not ("two" in t and t.endswith(" dog"))


def test_negatives_depend_on_seed_and_region_only(made):
    bare, done = made
    assert add_negatives(bare, seed=3) == done and add_negatives(bare[::-1], seed=3)[::-1] == done
    assert add_negatives(bare[5:6], seed=3)[0] == done[5]
    assert add_negatives(bare, seed=4) != done


def test_own_negatives_stay():
    assert add_negatives([sample(Region("a red mug", negatives=("mine",)))])[0].regions[
        0
    ].negatives == ("mine",)


def test_class_sentences(tmp_path):
    classes = {
        "Abuse": ["A man hits a dog."],
        "Arson": ["A house burns.", "Somebody lights a fire."],
        "Normal": ["People walk by."],
    }
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    region = Region("a man strikes a dog")
    completed = add_negatives(
        [sample(region, label="Abuse")],
        n=3,
        class_sentences=load_class_sentences(tmp_path / "classes.json"),
    )
    assert set(completed[0].regions[0].negatives) == {
        "a house burns",
        "somebody lights a fire",
        "people walk by",
    }
    for bad in ("[]", '{"a": "b"}', '{"a": [1]}', '{"a": {"captions": "b"}}', "x"):
        (tmp_path / "classes.json").write_text(bad)
        with pytest.raises(DataError, match="class sentences"):
            load_class_sentences(tmp_path / "classes.json")


def test_shipped_class_sentences_give_every_region_wrong_ones():
    """A region of each class: first its class's own four, then what describes other classes; never
    what describes its own."""

    def lower(texts):
        return {t.rstrip(".").lower() for t in texts}

    shipped = load_class_sentences("ucf_crime")
    assert set(UCF_CLASSES) <= set(shipped) and len(UCF_CLASSES) == 14
    for label in UCF_CLASSES:
        bare = sample(Region("something happens here"), label=label)
        negatives = add_negatives([bare], n=12, class_sentences=shipped)[0].regions[0].negatives
        assert len(negatives) == 12
        assert lower(negatives[:4]) == lower(shipped[label]["negatives"])
        assert not lower(negatives) & lower(shipped[label]["captions"])


def test_word_lists_are_sound():
    words = hard_negatives.shipped_words()
    groups = Counter((w.group, w.plural) for w in words)
    assert len(words) > 300 and min(groups.values()) >= 1
    replaced = hard_negatives.Swapper(words)
    for w in words:  # no word is put in for its own synonym
        for match in replaced.matches(w.text):
            concepts = {x.concept for x in words if x.text in replaced.replacements(match, w.text)}
            assert replaced.words[match[0].lower()].concept not in concepts


# ---- what the report says about real files


@needs_shared
@pytest.mark.parametrize(
    "name, regions, few, positive, repeated",
    [
        ("h", 3545, 37, 0, 1780),
        ("m", 2968, 0, 4, 1411),
        ("e", 1299, 0, 0, 516),
        ("shuffle", 3545, 37, 0, 1780),
    ],
)
def test_fgovd(name, regions, few, positive, repeated):
    file = next((SHARED / "fgovd").glob(f"{name}_*"))
    samples, rejects = load_samples(file)
    counts = findings.negative_counts(samples)
    assert rejects == [] and sum(counts.values()) == regions
    assert (
        sum(k for n, k in counts.items() if n < 10) == few
        and findings.usual_negatives(samples) == 10
    )
    assert sum(map(findings.repeated_phrases, samples)) == repeated
    _, dropped = filter_regions(samples)
    assert filters_room.count_rules(dropped).get("positive_among_negatives", 0) == positive
    if name == "h":
        assert sum(r.rule == "min_area" for r in dropped) == 565 and 0.5 < repeated / regions < 0.51


@needs_shared
def test_uca_and_the_test_list():
    samples, _ = load_samples(SHARED / "ucf_crime")
    assert len(samples) == 23542 and len({s.media for s in samples}) == 1854
    shared = splits.overlap(samples, splits.read_names(SHARED / "ucf_crime/Anomaly_Test.txt"))
    assert len(shared["train and test list"]) == 214 and shared["train and held out"] == []
    left, out = splits.leave_out(samples, splits.read_names(SHARED / "ucf_crime/Anomaly_Test.txt"))
    assert len({r.value for r in out if "_x264" in r.value}) >= 214 and len(left) + len(out) == len(
        samples
    )
    assert (
        splits.overlap(left, splits.read_names(SHARED / "ucf_crime/Anomaly_Test.txt"))[
            "train and test list"
        ]
        == []
    )


def test_findings_are_ordered():
    made = [("know", "c", 9, 10), ("look", "b", 1, 10), ("fix", "a", 1, 100), ("fix", "x", 0, 5)]
    f = findings.sort_findings([findings.Finding(*m, "") for m in made])
    assert [x.what for x in f] == ["a", "b", "c"] and "1.0 %" in str(f[0])
