"""Captions that thousands of photos share: numbers of one pair at a time, at a bounded cost.

A cell shows one case; these look at many random ones, and count what is looked at."""

import tracemalloc

import numpy as np
import pytest

from fgclip_nb.evaluation import ranking
from fgclip_nb.evaluation.ranking import TIE_RULES, cosines, links, unit


def plain_places(scores, right, ties):
    "Per query (rank, right answers, best wrong candidate, its lead), one pair at a time."
    for row, own in zip(scores, right):
        wrong = [(s, -k) for k, s in enumerate(row) if k not in own]
        best = max((row[k] for k in own), default=None)
        if best is None:
            yield 0, 0, None, None
            continue
        high = sum(s > best or (s == best and ties == "against") for s, _ in wrong)
        first = max(wrong, default=None)
        lead = None if first is None else first[0] - best
        yield 1 + high, len(own), None if first is None else -first[1], lead


def plain_links(owner, text_image, text_ids, taken):
    "Which texts are right for each photo that has the texts of photo taken[i]."
    said = {}
    for key, sentence in zip(text_image, text_ids):
        said.setdefault(key, set()).add(sentence)
    return [
        {t for t, sentence in enumerate(text_ids) if sentence in said.get(owner[j], ())}
        for j in taken
    ]


def turned(right, n):
    "Which photos are right for each of n texts."
    return [{i for i, texts in enumerate(right) if t in texts} for t in range(n)]


def plain_both(scores, ids, taken, ties):
    "`plain_places` of photos and of texts, where photo i has the texts of photo taken[i]."
    right = plain_links(*ids, taken)
    places = plain_places(scores, right, ties)
    return list(places), list(plain_places(scores.T, turned(right, scores.shape[1]), ties))


def random_case(seed):
    """Features of photos and texts with ties, and who belongs to whom (ids as `links` takes them).

    Sentences shared or not, with equal features or not; photos without a text, several photos of
    one id."""
    rng = np.random.default_rng(seed)
    n, m, d = rng.integers(2, 40), rng.integers(1, 30), rng.integers(1, 4)
    photos, texts = (rng.normal(size=(k, d)).round(rng.integers(0, 3)) for k in (n, m))
    text_ids = rng.integers(0, rng.integers(1, m + 1), m)
    if seed % 3 == 0:
        texts = texts[text_ids]
    if seed % 8 == 0:
        photos[:] = 1
    image_ids = rng.integers(0, n, n) if seed % 4 == 0 else rng.permutation(n)
    return unit(photos), unit(texts), (image_ids, image_ids[rng.integers(0, n, m)], text_ids)


@pytest.mark.parametrize("ties", TIE_RULES)
def test_ranks_and_permuted_ranks_are_those_of_one_pair_at_a_time(ties):
    for seed in range(80):
        photos, texts, ids = random_case(seed)
        n, scores = len(photos), cosines(photos, texts)
        both = ranking.rank_links(photos, texts, links(n, len(texts), *ids), (1, 3), 9, seed, ties)
        for found, places in zip(both, plain_both(scores, ids, range(n), ties)):
            for k, (rank, right, wrong, lead) in enumerate(places):
                assert (found.ranks[k], found.right[k]) == (rank, right), (seed, k)
                if wrong is not None:
                    assert (found.wrong[k], found.margin[k]) == (wrong, lead), (seed, k)
        draws = np.argsort(np.random.default_rng(seed).random((9, n)), axis=1)
        for number, taken in enumerate(draws):
            for found, places in zip(both, plain_both(scores, ids, taken, ties)):
                ranks = np.array([place[0] for place in places])
                hits = [((ranks > 0) & (ranks <= k)).sum() for k in (1, 3)]
                assert found.null[number].tolist() == [*hits, ranks.sum()], (seed, number)


def looked_at(monkeypatch, photos, texts, **ids):
    "How many counts a retrieval of these photos and texts looks through."
    sizes = []

    def count(counts, *arguments, plain=ranking.best_rank):
        sizes.append(counts.size)
        return plain(counts, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ranking, "best_rank", count)
        ranking.rank_links(photos, texts, links(len(photos), len(texts), **ids), permutations=50)
    return sum(sizes)


def test_captions_of_many_photos_cost_what_distinct_ones_do(monkeypatch):
    rng, n = np.random.default_rng(0), 1200
    photos, texts = unit(rng.normal(size=(n, 8))), unit(rng.normal(size=(n, 8)))
    four = np.arange(n) % 4
    distinct = looked_at(monkeypatch, photos, texts)
    assert looked_at(monkeypatch, photos, texts, text_ids=four) < 2 * distinct
    assert looked_at(monkeypatch, photos, texts, image_ids=four, text_image=four) < 2 * distinct
    alike = np.ones_like(photos)
    assert looked_at(monkeypatch, alike, texts, text_ids=four) < 2 * distinct
    assert looked_at(monkeypatch, photos, texts[four], text_ids=four) < distinct / 4


@pytest.mark.parametrize("who", ["text_ids", "image_ids"])
def test_links_hold_no_table_of_all_pairs(who):
    n = 4000  # a row of right answers per query would take 32 MB each way
    four = np.arange(n) % 4
    ids = {"text_ids": four} if who == "text_ids" else {"image_ids": four, "text_image": four}
    tracemalloc.start()
    try:
        links(n, n, **ids)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
