"""Texts that are nearly the same: similarity of character n-grams, and clusters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from distillery.data.similar_pairs import Pairs, similar_pairs

MAX_SIMILARITIES = 1 << 23  # similarities held in memory at a time (32 MiB)
MAX_COMPARISONS = 1 << 26  # similarities computed for a distribution; of more, those of a sample of rows are
SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class NearDuplicates:
    """The texts of a source as vectors, and the pairs of near-duplicates, by whether digits are masked.

    vectors: [n, n-grams] unit vectors. shots: those of the few-shot examples. pairs: rows i < j and their similarities,
    which are at least `threshold`.
    """

    vectors: dict[bool, csr_array]
    shots: dict[bool, csr_array]
    pairs: dict[bool, Pairs]
    threshold: float


def mask_digits(text: str) -> str:
    """`text` with every number replaced by 0: "EUR 1,204.5 mn" and "EUR 87 mn" become the same."""
    return re.sub(r"\d+(?:[.,]\d+)*", "0", text)


def ngram_vectors(texts: Sequence[str], masked: bool) -> csr_array:
    """Unit vectors [n, vocabulary] of 4-character counts within word boundaries, case folded.

    No inverse document frequency: the similarity of two texts must not depend on the other texts of the source.
    """
    counter = CountVectorizer(analyzer="char_wb", ngram_range=(4, 4), dtype=np.float32)
    counts = counter.fit_transform(mask_digits(t) if masked else t for t in texts)
    return csr_array(normalize(counts, copy=False))


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
    vectors = ngram_vectors([*left, *right], masked) if len(left) and len(right) else csr_array((0, 0))
    if not vectors.nnz:
        return np.zeros(len(left)), np.full(len(left), -1)
    return nearest_vectors(vectors[: len(left)], vectors[len(left) :])


def nearest_vectors(left: csr_array, right: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `left`: the highest dot product, at most 1, with a row of `right`, and the index of that row.

    Where `right` is empty, they are 0 and -1.
    """
    highest, nearest = np.zeros(left.shape[0]), np.full(left.shape[0], -1)
    for start, block in similarity_blocks(left, right) if right.shape[0] else ():
        nearest[start : start + len(block)] = block.argmax(axis=1)
        highest[start : start + len(block)] = block.max(axis=1)
    return np.minimum(highest, 1.0), nearest


def find_near_duplicates(texts: Sequence[str], threshold: float, shots: Sequence[str] = ()) -> NearDuplicates:
    """The pairs of near-duplicates among `texts`, with digits masked and as written; and the vectors of `shots`."""
    vectors, shot_vectors = {}, {}
    for masked in (True, False):
        both = ngram_vectors([*texts, *shots], masked)
        vectors[masked], shot_vectors[masked] = both[: len(texts)], both[len(texts) :]
        del both  # of a million rows, each copy has half a gigabyte
    i, j, similarity = _join_pairs(similar_pairs(vectors[True], threshold))
    # Two texts without numbers to mask are as similar as written as they are masked.
    with_numbers = np.array([mask_digits(text) != text for text in texts], dtype=bool)
    same = ~(with_numbers[i] | with_numbers[j])
    without_numbers = i[same], j[same], similarity[same]
    as_written = _join_pairs([without_numbers, *similar_pairs(vectors[False], threshold, with_numbers)])
    return NearDuplicates(vectors, shot_vectors, {True: (i, j, similarity), False: as_written}, threshold)


def _join_pairs(batches: Iterable[Pairs]) -> Pairs:
    """All pairs, by i and then by j."""
    nothing = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    columns = zip(nothing, *((i.astype(np.int32), j.astype(np.int32), s) for i, j, s in batches), strict=True)
    i, j, similarity = (np.concatenate(column) for column in columns)
    order = np.lexsort((j, i))
    return i[order], j[order], similarity[order]


def has_near_duplicate(texts: Sequence[str], others: Sequence[str], threshold: float) -> np.ndarray:
    """Which of `texts` have a near-duplicate in `others`, with digits masked or as written."""
    near = np.zeros(len(texts), dtype=bool)
    for masked in (True, False) if len(texts) and len(others) else ():
        forms = [list(dict.fromkeys(mask_digits(t) if masked else t for t in some)) for some in (texts, others)]
        is_text = np.arange(len(forms[0]) + len(forms[1])) < len(forms[0])
        near_forms = set()
        for i, j, _ in similar_pairs(ngram_vectors(forms[0] + forms[1], masked), threshold, is_text):
            near_forms.update(forms[0][n] for n in i[~is_text[j]])
        near |= [(mask_digits(text) if masked else text) in near_forms for text in texts]
    return near


def rows_to_compare(rows: np.ndarray, n_others: int) -> np.ndarray:
    """`rows` if each can be compared with `n_others` rows, else a random sample of them, in ascending order."""
    if len(rows) * n_others <= MAX_COMPARISONS or len(rows) <= SAMPLED_ROWS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, SAMPLED_ROWS, replace=False))


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
    return cluster_pairs(find_near_duplicates(texts, threshold), len(texts))


def cluster_pairs(near: NearDuplicates, n: int) -> np.ndarray:
    """Cluster number of each of the `n` texts whose near-duplicates are `near`."""
    component = np.arange(n)
    for i, j, _ in near.pairs.values():
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
