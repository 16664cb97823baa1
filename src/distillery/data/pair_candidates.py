"""Pairs of sparse unit vectors that may be similar: all of them by their rarest features, or most by MinHash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

ROUNDING = 1e-4  # by which a bound may be wrong in float32: no pair may be lost by it
BLOCKS = 32  # of rows; the columns of a block are chosen once
MAX_CANDIDATES = 10_000_000  # products or pairs held in memory at a time (120 MB)
CUTS = 31  # places at which the energy of a prefix is known
BITS = 256  # of a bitmap, which holds the features of a row
HASHES = 240
MAX_COUNT = 4  # of a feature in a row, in a set
RECALL = 0.999  # of pairs at the threshold, by MinHash
MAX_ENTRIES = 100_000  # features hashed at a time, so that they stay in the cache of a processor

Candidates = Iterator[tuple[np.ndarray, np.ndarray]]


class PairFilter:
    """Rules out pairs of `vectors` that cannot reach `bound`, by their numbers of features and by bitmaps.

    The features that a row does not share have an energy of at most 1 - bound², by the inequality of Cauchy and
    Schwarz, and each at least that of the smallest value of the row. So a row has at most `unshared` of them.
    Source: Sandes, Teodoro and Melo 2020, "Bitmap filter: speeding up exact set similarity joins".
    """

    def __init__(self, vectors: csr_array, bound: float):
        self.n_features = np.diff(vectors.indptr)
        smallest, filled = np.ones(len(self.n_features)), self.n_features > 0
        smallest[filled] = np.minimum.reduceat(vectors.data, vectors.indptr[:-1][filled])
        self.unshared = (1 - bound * abs(bound)) / np.square(smallest) + ROUNDING
        self.needed = self.n_features - self.unshared  # features that the other row must have
        bit = np.random.default_rng(0).integers(BITS, size=vectors.shape[1])
        self.bitmaps = np.zeros((vectors.shape[0], BITS // 64), dtype=np.uint64)
        for rows in np.array_split(np.arange(vectors.shape[0]), 1 + vectors.shape[0] // 50_000):
            part = vectors[rows]
            present = np.zeros((len(rows), BITS), dtype=bool)
            present[np.repeat(np.arange(len(rows)), np.diff(part.indptr)), bit[part.indices]] = True
            self.bitmaps[rows] = np.packbits(present, axis=1).view(np.uint64)

    def keep(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Which of the pairs may reach the bound."""
        left, right = self.bitmaps[i], self.bitmaps[j]
        only_left = np.bitwise_count(left & ~right).sum(axis=1, dtype=np.int32)
        only_right = np.bitwise_count(right & ~left).sum(axis=1, dtype=np.int32)
        return (only_left <= self.unshared[i]) & (only_right <= self.unshared[j])


def candidates_by_prefix(vectors: csr_array, bound: float, left: np.ndarray, pair_filter: PairFilter) -> Candidates:
    """Pairs (i, j) that may have a dot product of at least `bound`, each once; no other pair has it.

    left: rows [n] of which each pair must have one.

    The features of a row are ordered from the rarest to the most frequent. Its prefix ends where the norm of the rest
    is below the bound. Two rows that share no feature of their prefixes stay below it, by the inequality of Cauchy and
    Schwarz. Source: Bayardo et al. 2007, "Scaling up all pairs similarity search"; Anastasiu and Karypis 2014, "L2AP".
    """
    order = np.argsort(pair_filter.n_features, kind="stable")  # rows of about as many features are compared
    prefixes, last = _prefixes(vectors, order, bound)
    rest, last_cut = _rest_norms(prefixes, last)
    n_features, needed, is_left = pair_filter.n_features[order], pair_filter.needed[order], left[order]
    lefts = np.flatnonzero(is_left)
    for rows in np.array_split(lefts, max(1, min(BLOCKS, len(lefts) // 1024))):
        if not len(rows):
            continue
        fits = (needed <= n_features[rows].max()) & (n_features >= needed[rows].min())
        fits[: rows[0]] &= ~is_left[: rows[0]]  # pairs of two rows of `left` came with the other row
        columns = np.flatnonzero(fits).astype(np.int32)
        transposed = prefixes[columns].T.tocsr()
        for part in _by_candidates(prefixes, rows, transposed):
            shared = prefixes[part] @ transposed
            i, j, product = np.repeat(part, np.diff(shared.indptr)), columns[shared.indices], shared.data
            cut = np.minimum(last_cut[i], last_cut[j])
            keep = product + rest[i, cut] * rest[j, cut] >= bound
            i, j = i[keep], j[keep]
            keep = (j > i) | ~is_left[j]
            i, j = order[i[keep]], order[j[keep]]
            keep = pair_filter.keep(i, j)
            yield i[keep], j[keep]


def _prefixes(vectors: csr_array, order: np.ndarray, bound: float) -> tuple[csr_array, np.ndarray]:
    """The rarest features of every row of `order` [n, features by rank], and the rank up to which they are complete."""
    n_rows = np.bincount(vectors.indices, minlength=vectors.shape[1])
    rank = np.empty(len(n_rows), dtype=np.int32)
    rank[np.argsort(n_rows, kind="stable")] = np.arange(len(n_rows), dtype=np.int32)
    parts, last = [], []
    for some in np.array_split(order, 1 + len(order) // 50_000):
        rows = vectors[some]
        rows = csr_array((rows.data, rank[rows.indices], rows.indptr), shape=rows.shape)
        rows.sort_indices()
        lengths = np.diff(rows.indptr)
        before = np.concatenate([[0.0], np.cumsum(np.square(rows.data, dtype=np.float64))])
        before = before[:-1] - np.repeat(before[rows.indptr[:-1]], lengths)
        keep = 1 - before >= bound * abs(bound)
        counts = np.bincount(np.repeat(np.arange(len(some)), lengths)[keep], minlength=len(some))
        parts.append((rows.data[keep], rows.indices[keep], counts))
        padded = np.concatenate([[0], parts[-1][1]])
        last.append(np.where(counts == lengths, vectors.shape[1], padded[np.cumsum(counts)]))
    data, indices, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32 if len(data) < 2**31 else np.int64)
    return csr_array((data, indices, indptr), shape=vectors.shape), np.concatenate(last)


def _rest_norms(prefixes: csr_array, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The norm of each row beyond each cut [n, 1 + CUTS], and the last cut inside its prefix [n].

    A cut is a rank; cut 0 lies before all features. Two rows have at most the product of these norms in common beyond
    a cut; the product of the prefixes holds what they have in common up to a cut inside both.
    """
    cuts = np.unique(np.quantile(last, np.linspace(0, 1, CUTS), method="lower")) if len(last) else np.zeros(1, int)
    row = np.repeat(np.arange(prefixes.shape[0]), np.diff(prefixes.indptr))
    width = len(cuts) + 1
    place = row * (width + 1) + np.searchsorted(cuts, prefixes.indices) + 1  # beside the first cut that includes it
    energy = np.bincount(place, np.square(prefixes.data, dtype=np.float64), prefixes.shape[0] * (width + 1))
    energy = energy.reshape(-1, width + 1)[:, :width].cumsum(axis=1)
    return np.sqrt(np.maximum(0, 1 - energy)).astype(np.float32), np.searchsorted(cuts, last, side="right")


def _by_candidates(prefixes: csr_array, rows: np.ndarray, transposed: csr_array) -> Iterator[np.ndarray]:
    """`rows` in parts whose products with `transposed` have at most `MAX_CANDIDATES` terms, or of one row."""
    part = prefixes[rows]
    terms = np.concatenate([[0], np.cumsum(np.diff(transposed.indptr)[part.indices], dtype=np.int64)])[part.indptr]
    start = 0
    while start < len(rows):
        end = max(start + 1, int(np.searchsorted(terms, terms[start] + MAX_CANDIDATES, side="right")) - 1)
        yield rows[start:end]
        start = end


def rows_per_band(threshold: float) -> int:
    """Hashes of a band: the most with which two rows at `threshold` agree in one of the bands with `RECALL`.

    threshold: cosine similarity. Two sets with it have at least its square as Jaccard similarity; rows that repeat
    features can have less, so its cube is taken. Source: Broder 1997; Leskovec, Rajaraman and Ullman, "Mining
    of massive datasets", section 3.4.
    """
    agree = max(0.0, threshold) ** 3
    return max([r for r in range(1, 17) if 1 - (1 - agree**r) ** (HASHES // r) >= RECALL], default=1)


def candidates_by_minhash(
    vectors: csr_array, threshold: float, left: np.ndarray, pair_filter: PairFilter
) -> Candidates:
    """Nearly all pairs (i, j) that may have a similarity of at least `threshold`, each once.

    Rows are compared that agree in all MinHash values of a band. left: rows [n] of which each pair must have one.
    """
    rng = np.random.default_rng(0)
    n, r = vectors.shape[0], rows_per_band(threshold)
    filled, (elements, indptr) = np.flatnonzero(pair_filter.n_features), _elements(vectors)
    pairs = np.zeros(0, dtype=np.int64)
    for _ in range(HASHES // r):
        hashes = rng.integers(2**32, size=(r, MAX_COUNT * vectors.shape[1]), dtype=np.uint32)
        key = _band_keys(elements, indptr, filled, hashes)
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=~key[order[:1]]))
        new = [pairs]
        for i, j in pairs_in_runs(np.diff(starts, append=len(order))):
            i, j = filled[order[i]], filled[order[j]]
            keep = left[i] | left[j]
            i, j = i[keep], j[keep]
            keep = pair_filter.keep(i, j)
            new.append(np.minimum(i[keep], j[keep]) * n + np.maximum(i[keep], j[keep]))
        pairs = np.unique(np.concatenate(new))
    for some in np.array_split(pairs, 1 + len(pairs) // MAX_CANDIDATES):
        yield some // n, some % n


def _elements(vectors: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The elements of the rows as sets, and where those of each row begin [n + 1].

    A feature that a row has twice is two elements, up to `MAX_COUNT`: rows that repeat features would have a low
    Jaccard similarity otherwise, however similar they are. A count is the value in units of the smallest of the row.
    """
    lengths = np.diff(vectors.indptr)
    smallest = np.ones(len(lengths), dtype=np.float32)
    smallest[lengths > 0] = np.minimum.reduceat(vectors.data, vectors.indptr[:-1][lengths > 0])
    counts = np.minimum(np.rint(vectors.data / np.repeat(smallest, lengths)), MAX_COUNT).astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    elements = np.repeat(vectors.indices * MAX_COUNT, counts)
    elements += np.arange(len(elements), dtype=elements.dtype) - np.repeat(ends[:-1], counts).astype(elements.dtype)
    return elements, ends[vectors.indptr]


def _band_keys(elements: np.ndarray, indptr: np.ndarray, filled: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """A number for all MinHash values of a band [filled rows]. hashes: a random value of each element [r, elements]."""
    key = np.zeros(len(filled), dtype=np.uint64)
    for rows in np.array_split(np.arange(len(filled)), 1 + len(elements) // MAX_ENTRIES):
        starts = indptr[filled[rows]]
        if not len(rows):
            continue
        entries = elements[starts[0] : indptr[filled[rows[-1]] + 1]]
        for values in hashes:
            minimum = np.minimum.reduceat(values[entries], starts - starts[0])
            key[rows] = key[rows] * np.uint64(0x9E3779B97F4A7C15) + minimum
    return key


def pairs_in_runs(sizes: np.ndarray) -> Candidates:
    """All pairs (i, j), i < j, of positions in one run each, in batches. sizes: of the runs, one after the other."""
    start = np.cumsum(sizes) - sizes
    several = sizes > 1
    yield from pairs_of_runs(start[several], sizes[several], start[several], sizes[several], ordered=True)


def within_runs(sizes: np.ndarray) -> np.ndarray:
    """The place of each position inside its run, from 0. sizes: of the runs, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def pairs_of_runs(
    start_i: np.ndarray, size_i: np.ndarray, start_j: np.ndarray, size_j: np.ndarray, ordered: bool = False
) -> Candidates:
    """All pairs of a position in a run and one in its partner, in batches; with `ordered` only those with i < j."""
    ends = np.cumsum(size_i.astype(np.int64) * size_j)
    for first in range(0, int(ends[-1]) if len(ends) else 0, MAX_CANDIDATES):
        place = np.arange(first, min(first + MAX_CANDIDATES, int(ends[-1])))
        run = np.searchsorted(ends, place, side="right")
        place -= (ends - size_i.astype(np.int64) * size_j)[run]
        i, j = start_i[run] + place // size_j[run], start_j[run] + place % size_j[run]
        keep = i < j if ordered else slice(None)
        yield i[keep], j[keep]
