"""The join that finds near-duplicates without comparing all pairs, against the product of all pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.config.schema import SourceConfig
from distillery.data import near_duplicates, pair_candidates, prepare, similar_pairs
from distillery.data.near_duplicates import (
    cluster_near_duplicates,
    find_near_duplicates,
    has_near_duplicate,
    nearest_texts,
    ngram_vectors,
    similarity_blocks,
)
from distillery.data.pair_candidates import rows_per_band
from distillery.data.prepare import prepare_source
from distillery.data.similar_pairs import SIMILARITY_SLACK
from distillery.notebook.data import nearest_similarities
from distillery.tasks.schema import Task

ROOT = Path(__file__).parent.parent


def all_pairs(texts, threshold, masked=True, left=None):
    """Pairs and similarities of the whole product; and whether one is too near the threshold to be decided."""
    vectors = ngram_vectors(texts, masked)
    whole = np.concatenate([block for _, block in similarity_blocks(vectors, vectors)])
    i, j = np.nonzero(np.triu(whole >= threshold - SIMILARITY_SLACK, 1))
    keep = slice(None) if left is None else left[i] | left[j]
    close = np.abs(whole - (threshold - SIMILARITY_SLACK)).min() < 1e-6
    return dict(zip(zip(i[keep].tolist(), j[keep].tolist(), strict=True), whole[i, j][keep], strict=True)), close


def as_dict(batches):
    """(i, j) -> similarity; a pair that comes twice fails."""
    pairs = [(int(i), int(j), s) for batch in batches for i, j, s in zip(*batch, strict=True)]
    assert len({(i, j) for i, j, _ in pairs}) == len(pairs)
    return {(i, j): s for i, j, s in pairs}


def pairs_of(texts, threshold, masked=True):
    """(i, j) -> similarity of the pairs that the join finds."""
    return as_dict(similar_pairs.similar_pairs(ngram_vectors(texts, masked), threshold))


def corpus_texts(n_copies=2):
    """Texts of the corpora, and copies of them with a few words changed."""
    rng = np.random.default_rng(0)
    lines = (ROOT / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    texts = [json.loads(line)["text"] for line in lines]
    for _ in range(n_copies):
        for text in texts[:100]:
            words = text.split()
            for _ in range(rng.integers(1, 4)):
                words[rng.integers(len(words))] = rng.choice(["alpha", "12", "of", words[0]])
            texts.append(" ".join(words))
    return texts


@pytest.fixture(scope="module")
def texts():
    return corpus_texts()


@settings(max_examples=60)
@given(
    st.lists(st.text("ab 1", min_size=1).filter(str.strip), min_size=1, max_size=14),
    st.floats(0.05, 1),
    st.integers(0, 99),
)
def test_the_join_finds_what_the_product_of_all_pairs_finds(lines, threshold, seed):
    """Repeated n-grams, texts of one n-gram, the same text twice, any threshold, and pairs with one row of some."""
    left = np.random.default_rng(seed).random(len(lines)) < 0.5
    for rows in (None, left):
        expected, close = all_pairs(lines, threshold, left=rows)
        got = as_dict(similar_pairs.similar_pairs(ngram_vectors(lines, True), threshold, rows))
        if not close:  # else float32 may fall on either side
            assert set(got) == set(expected)


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.85, 1])
def test_the_join_of_real_texts_is_exact_in_any_parts(texts, threshold, monkeypatch):
    expected, close = all_pairs(texts, threshold)
    assert not close and (len(expected) > 100 or threshold == 1)
    monkeypatch.setattr(pair_candidates, "MAX_CANDIDATES", 3000)
    monkeypatch.setattr(similar_pairs, "MAX_VERIFIED", 50)
    got = pairs_of(texts, threshold)
    assert set(got) == set(expected)
    assert all(got[pair] == pytest.approx(similarity, abs=SIMILARITY_SLACK) for pair, similarity in expected.items())


def test_numbers_as_written_make_pairs_of_their_own(texts):
    """Only texts with numbers are compared again as written; the pairs are those of all texts."""
    near = find_near_duplicates(texts, 0.85)
    for masked in (True, False):
        expected, _ = all_pairs(texts, 0.85, masked)
        assert set(zip(near.pairs[masked][0].tolist(), near.pairs[masked][1].tolist(), strict=True)) == set(expected)


def test_near_duplicates_between_two_lists(texts):
    left, right = texts[::3], [text for n, text in enumerate(texts) if n % 3]
    highest = np.maximum(*(nearest_texts(left, right, masked)[0] for masked in (True, False)))
    assert list(has_near_duplicate(left, right, 0.85)) == list(highest >= 0.85 - SIMILARITY_SLACK)
    assert not has_near_duplicate(left, [], 0.85).any()
    assert len(has_near_duplicate([], right, 0.85)) == 0


def test_minhash_finds_nearly_all_pairs_and_no_wrong_one(texts, monkeypatch):
    expected, _ = all_pairs(texts, 0.85)
    monkeypatch.setattr(similar_pairs, "MAX_EXACT", 0)
    got = pairs_of(texts, 0.85)
    assert set(got) <= set(expected)
    assert len(got) >= 0.99 * len(expected)


def test_the_bands_by_hand():
    # Rows at a Jaccard similarity of .85³ = .614 agree in one of 60 bands of 4 hashes with 1 - (1 - .614⁴)⁶⁰ = .9999,
    # and in one of 48 bands of 5 with 1 - (1 - .614⁵)⁴⁸ = .9876.
    assert rows_per_band(0.85) == 4
    assert rows_per_band(1) == 16
    assert rows_per_band(0.1) == 1


def test_many_copies_of_one_text_are_pairs_too():
    texts = ["Order 1 was shipped"] * 3 + ["Order 22 was shipped", "nothing like it"]
    masked = pairs_of(texts, 0.85)
    assert set(masked) == {(i, j) for i in range(4) for j in range(i + 1, 4)}
    assert {(0, 1), (0, 2), (1, 2)} <= set(pairs_of(texts, 0.99, masked=False))


def test_of_very_many_equal_rows_not_all_pairs_are_listed(monkeypatch):
    """They stay one cluster, and each is seen beside others; a million would have more pairs than memory holds."""
    texts = [f"Order {n} was shipped" for n in range(40)] + ["Order 7 was shipped now", "nothing like it"]
    whole, words = cluster_near_duplicates(texts, 0.8), ["Order 5 was shipped", "Order 6 was returned to sender"]
    pairs = len(pairs_of(texts, 0.8))
    near = has_near_duplicate(words, texts, 0.8), has_near_duplicate(texts, words, 0.8)
    monkeypatch.setattr(similar_pairs, "MAX_SAME", 4)
    few = pairs_of(texts, 0.8)
    assert pairs == 40 * 39 / 2 + 40
    assert len(few) == 4 * 3 / 2 + 36 + 4
    assert list(cluster_near_duplicates(texts, 0.8)) == list(whole)
    assert list(has_near_duplicate(words, texts, 0.8)) == list(near[0]) == [True, False]
    assert list(has_near_duplicate(texts, words, 0.8)) == list(near[1]) == [True] * 41 + [False]


def test_of_too_many_rows_a_sample_is_compared(texts, monkeypatch):
    rows = np.arange(5000)
    assert list(near_duplicates.rows_to_compare(rows, 10)) == list(rows)
    monkeypatch.setattr(near_duplicates, "MAX_COMPARISONS", 10)
    sample = near_duplicates.rows_to_compare(rows, 10)
    assert len(sample) == len(set(sample)) == near_duplicates.SAMPLED_ROWS
    assert list(sample) == sorted(sample)


def test_a_source_with_too_many_rows_names_the_sample(tmp_path, monkeypatch):
    """The limits lowered to a few rows: MinHash, a sample of held-out rows, and pairs across splits all the same."""
    rng = np.random.default_rng(0)
    part = ["train"] * 40 + ["pool"] * 10 + ["validation"] * 10 + ["test"] * 30
    words = rng.choice(list("abcdefgh"), (90, 9, 5))
    rows = [
        {"text": " ".join(map("".join, words[n])), "label": ["up", "down"][n % 2], "part": part[n]} for n in range(90)
    ]
    rows[0]["text"] = rows[60]["text"] + " x"  # of train and test
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = SourceConfig.model_validate({"source": "a.jsonl", "task": "t", "split_column": "part"})
    task = Task.model_validate({"kind": "classification", "labels": {"up": "it rises", "down": "it falls"}})
    whole = prepare_source("s", spec, task, tmp_path)
    monkeypatch.setattr(similar_pairs, "MAX_EXACT", 20)
    monkeypatch.setattr(prepare, "MAX_EXACT", 20)
    monkeypatch.setattr(near_duplicates, "MAX_COMPARISONS", 100)
    monkeypatch.setattr(near_duplicates, "SAMPLED_ROWS", 7)
    sampled = prepare_source("s", spec, task, tmp_path)
    assert list(sampled.cluster) == list(whole.cluster) and list(sampled.split) == list(whole.split)
    for masked in ("digits_masked", "as_written"):
        few, all_rows = sampled.audit["across_splits"][masked], whole.audit["across_splits"][masked]
        assert few["pairs_above_by_splits"] == all_rows["pairs_above_by_splits"] == {"train-test": 1}
        assert few["worst"][0] == all_rows["worst"][0]  # in the sample or not
        assert few["nearest"]["highest"] == all_rows["nearest"]["highest"]
        assert few["nearest"]["rows_compared"] == 7 and "rows_compared" not in all_rows["nearest"]
    assert "MinHash" in sampled.audit["decisions"][-1] and "MinHash" not in str(whole.audit["decisions"])
    nearest = nearest_similarities(sampled.near, sampled.split, 0)
    assert {len(values) for values in nearest.values()} == {7}
