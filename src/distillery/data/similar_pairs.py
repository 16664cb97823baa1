"""All pairs of sparse unit vectors whose cosine similarity reaches a threshold, without comparing all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

from distillery.data.pair_candidates import (
    ROUNDING,
    Candidates,
    PairFilter,
    candidates_by_minhash,
    candidates_by_prefix,
    pairs_of_runs,
    within_runs,
)

SIMILARITY_SLACK = 1e-5  # float32 puts identical texts a little below 1
MAX_EXACT = 100_000  # different vectors; of more, MinHash finds the pairs
MAX_SAME = 1000  # rows with the same vector of which all pairs are listed; a million have too many
MAX_VERIFIED = 100_000  # pairs compared in full at a time

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows i, rows j, similarities


def similar_pairs(vectors: csr_array, threshold: float, left: np.ndarray | None = None) -> Iterator[Pairs]:
    """All pairs i < j of rows with a dot product of at least `threshold`, each once, in batches (i, j, similarity).

    vectors: unit rows [n, features], no value below 0, indices sorted. threshold: in (0, 1]. left: which rows [n] each
    pair must have one of; None: all rows.

    The pairs of up to `MAX_EXACT` different vectors are exact. Of more, :func:`candidates_by_minhash` leaves out some
    near the threshold; no pair is wrong. Of more than `MAX_SAME` rows with the same vector, the further ones are paired
    with the first alone.
    """
    left = np.ones(vectors.shape[0], dtype=bool) if left is None else left
    code = _same_vector(vectors)
    by_code = np.argsort(code, kind="stable")  # rows with the same vector stand together
    sizes = np.bincount(code)
    starts, listed = np.cumsum(sizes) - sizes, np.minimum(sizes, MAX_SAME)
    for i, j in _same_vector_pairs(starts, sizes):
        yield from _with_similarity(vectors, by_code[i], by_code[j], threshold, left)
    unique = vectors[by_code[starts]]
    any_left = np.zeros(len(sizes), dtype=bool)
    np.logical_or.at(any_left, code, left)
    for a, b in _candidates(unique, threshold, any_left):
        for start in range(0, len(a), MAX_VERIFIED):
            part = slice(start, start + MAX_VERIFIED)
            close = _similarities(unique, a[part], b[part]) >= threshold - SIMILARITY_SLACK
            a_close, b_close = a[part][close], b[part][close]
            for i, j in pairs_of_runs(starts[a_close], listed[a_close], starts[b_close], listed[b_close]):
                yield from _with_similarity(vectors, by_code[i], by_code[j], threshold, left)


def _same_vector_pairs(starts: np.ndarray, sizes: np.ndarray) -> Candidates:
    """All pairs of positions in one run each, of the first `MAX_SAME`; and each further position with the first."""
    listed, several = np.minimum(sizes, MAX_SAME), sizes > 1
    runs = starts[several], listed[several]
    yield from pairs_of_runs(*runs, *runs, ordered=True)
    further = np.repeat(starts + listed, sizes - listed) + within_runs(sizes - listed)
    yield np.repeat(starts, sizes - listed), further


def _candidates(unique: csr_array, threshold: float, left: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    bound = threshold - SIMILARITY_SLACK - ROUNDING
    pair_filter = PairFilter(unique, bound)
    if unique.shape[0] <= MAX_EXACT:
        return candidates_by_prefix(unique, bound, left, pair_filter)
    return candidates_by_minhash(unique, threshold, left, pair_filter)


def _same_vector(vectors: csr_array) -> np.ndarray:
    """A number per row, the same for rows with the same vector: by a hash of 64 bits of features and values."""
    weight = np.random.default_rng(0).integers(2**64, size=vectors.shape[1], dtype=np.uint64)
    key = np.zeros(vectors.shape[0], dtype=np.uint64)
    filled = np.flatnonzero(np.diff(vectors.indptr))
    for rows in np.array_split(filled, 1 + len(filled) // 50_000):
        part = vectors[rows]
        terms = weight[part.indices] * (part.data.view(np.uint32) | np.uint64(1))
        key[rows] = np.add.reduceat(terms, part.indptr[:-1]) if len(rows) else 0
    return np.unique(key, return_inverse=True)[1]


def _similarities(vectors: csr_array, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The dot product of each pair, added in the order of the features as in a product of matrices."""
    return vectors[i].multiply(vectors[j]).tocsr() @ np.ones(vectors.shape[1], dtype=np.float32)


def _with_similarity(
    vectors: csr_array, i: np.ndarray, j: np.ndarray, threshold: float, left: np.ndarray
) -> Iterator[Pairs]:
    """The pairs as rows i < j with one of `left`, and their similarities, at most 1."""
    keep = left[i] | left[j]
    i, j = np.minimum(i, j)[keep], np.maximum(i, j)[keep]
    for start in range(0, len(i), MAX_VERIFIED):
        part = slice(start, start + MAX_VERIFIED)
        similarity = _similarities(vectors, i[part], j[part])
        keep = similarity >= threshold - SIMILARITY_SLACK
        yield i[part][keep], j[part][keep], np.minimum(similarity[keep], 1.0)
