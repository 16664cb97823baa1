"""Texts that are nearly the same: similarity of character n-grams, and clusters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

MAX_SIMILARITIES = 1 << 23  # similarities held in memory at a time (32 MiB)
SIMILARITY_SLACK = 1e-5  # float32 puts identical texts a little below 1


def mask_digits(text: str) -> str:
    """`text` with every number replaced by 0: "EUR 1,204.5 mn" and "EUR 87 mn" become the same."""
    return re.sub(r"\d+(?:[.,]\d+)*", "0", text)


def ngram_vectors(texts: Sequence[str], masked: bool) -> csr_array:
    """Unit vectors [n, vocabulary] of 4-character counts within word boundaries, case folded.

    No inverse document frequency: the similarity of two texts must not depend on the other texts of the source.
    """
    counter = CountVectorizer(analyzer="char_wb", ngram_range=(4, 4), dtype=np.float32)
    return csr_array(normalize(counter.fit_transform(mask_digits(t) if masked else t for t in texts)))


def similarity_blocks(left: csr_array, right: csr_array) -> Iterator[tuple[int, np.ndarray]]:
    """Successive blocks of `left`: the first row of each, and the cosine similarities [rows, n of right] of its rows.

    A block holds at most `MAX_SIMILARITIES` numbers, or one row.
    """
    step = max(1, MAX_SIMILARITIES // max(1, right.shape[0]))
    transposed = right.T.tocsr()
    for start in range(0, left.shape[0], step):
        yield start, (left[start : start + step] @ transposed).toarray()


def nearest_texts(left: Sequence[str], right: Sequence[str], masked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """For each text of `left`: the highest similarity, in [0, 1], to a text of `right`, and the index of that text.

    The similarity is the cosine of 4-character counts; with `masked` all numbers count as equal.
    Where `right` is empty, the similarity is 0 and the index -1.
    """
    highest, nearest = np.zeros(len(left)), np.full(len(left), -1)
    if len(left) and len(right):
        vectors = ngram_vectors([*left, *right], masked)
        for start, block in similarity_blocks(vectors[: len(left)], vectors[len(left) :]):
            nearest[start : start + len(block)] = block.argmax(axis=1)
            highest[start : start + len(block)] = block.max(axis=1)
    return np.minimum(highest, 1.0), nearest


def near_duplicate_pairs(
    texts: Sequence[str], threshold: float, masked: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs i < j of `texts` with a similarity of at least `threshold`, in batches (i, j, similarity)."""
    vectors = ngram_vectors(texts, masked)
    for start, block in similarity_blocks(vectors, vectors):
        i, j = np.nonzero(block >= threshold - SIMILARITY_SLACK)
        similarity = np.minimum(block[i, j], 1.0)
        i = i + start
        yield i[i < j], j[i < j], similarity[i < j]


def merge_components(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """`component` (one number per row) after the components of each pair of rows `i`, `j` have been merged."""
    size = int(component.max()) + 1 if len(component) else 0
    graph = coo_array((np.ones(len(i), dtype=np.int8), (component[i], component[j])), shape=(size, size))
    return connected_components(graph, directed=False)[1][component]


def cluster_near_duplicates(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Cluster number per text: a chain of pairs with a similarity of at least `threshold` joins the texts of a cluster.

    Pairs count with digits masked and as written: long numbers in common can make two texts more similar than their
    words do.
    """
    component = np.arange(len(texts))
    for masked in (True, False):
        for i, j, _ in near_duplicate_pairs(texts, threshold, masked):
            component = merge_components(component, i, j)
    return component


def name_groups(rows: pd.DataFrame, cluster: np.ndarray, duplicate_groups: list[tuple[int, str]]) -> list[str]:
    """One group name per row, the same for all rows that a group of the file or a near-duplicate cluster joins.

    duplicate_groups: (row, group) of dropped duplicates; the row belongs to that group too.
    The name is that of the first group of the file in it, or the id of its first row when there is none.
    """
    memberships = [*((i, group) for i, group in enumerate(rows["group"]) if group is not None), *duplicate_groups]
    first_row: dict[str, int] = {}
    pairs = [(i, first_row.setdefault(group, i)) for i, group in memberships]
    component = merge_components(cluster, np.array([i for i, _ in pairs], int), np.array([j for _, j in pairs], int))
    names: dict[int, str] = {}
    for i, group in memberships:
        names.setdefault(component[i], group)
    used = set(first_row)
    for i, name in enumerate(rows["id"]):
        if component[i] not in names:
            while name in used:  # a group of the file may have the name of another row's id
                name += "+"
            used.add(name)
            names[component[i]] = name
    return [names[c] for c in component]
