"""Seconds and memory that 01_data takes on many rows, and how many near-duplicates are found.

    python benchmarks/large.py [--rows 10000 100000] [--notebook]

The rows are synthetic: chains of words in which each follows the one before it somewhere in the corpora of the project.
One row in ten is a copy of another row with a word or a number changed. The reference is the product of all pairs in
blocks, which was used before, at up to 10,000 rows; and the exact join at up to 100,000. With `--notebook` each size is
also prepared by 01_data from a JSONL file, in a process of its own, and its pairs are compared with all pairs of a
sample of rows. On a machine with other work, seconds in all are more than those of the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from distillery.config.load import load_params
from distillery.config.schema import SourceConfig
from distillery.data import similar_pairs
from distillery.data.near_duplicates import ngram_vectors, similarity_blocks
from distillery.data.prepare import PreparedSource
from distillery.data.similar_pairs import SIMILARITY_SLACK
from distillery.files import repository_root

THRESHOLD = 0.85
MAX_ALL_PAIRS, MAX_EXACT = 10_000, 100_000
SAMPLE = 2000  # rows of which all pairs are computed to measure what 01_data has found
SHARES = {"train": 0.2, "pool": 0.5, "validation": 0.1, "test": 0.2}
LABELS = ("positive", "negative", "neutral")


def corpus_texts(root: Path) -> list[str]:
    """The texts and questions of all corpora."""
    lines = [line for file in sorted((root / "data/corpora").glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    records = [json.loads(line) for line in lines]
    return [text for record in records if isinstance(text := record.get("text") or record.get("question"), str)]


def synthetic_rows(texts: list[str], n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """`n` texts of 8 to 21 words; and the planted pairs [n / 10, 2], a copy and its original."""
    rng = np.random.default_rng(seed)
    followers: dict[str, list[str]] = {}
    for text in texts:
        words = text.split()
        for word, follower in zip(words, words[1:], strict=False):
            followers.setdefault(word, []).append(follower)
    vocabulary, starts = list(followers), [text.split()[0] for text in texts]
    rows = []
    while len(rows) < n - n // 10:
        draws = rng.random(rng.integers(8, 22))
        words = [starts[int(draws[0] * len(starts))]]
        for draw in draws[1:]:
            candidates = followers.get(words[-1]) or vocabulary
            words.append(candidates[int(draw * len(candidates))])
        rows.append(" ".join(words))
    originals = rng.choice(len(rows), n // 10, replace=False)
    planted = np.stack([originals, np.arange(len(rows), n)], axis=1)
    for original in originals:
        words = rows[original].split()
        place = int(rng.integers(len(words)))
        numbers = [k for k, word in enumerate(words) if word.isdigit()]
        words[numbers[0] if numbers else place] = str(rng.integers(10_000)) if numbers else "also"
        rows.append(" ".join(words))
    return rows, planted


def all_pairs(vectors: object) -> set[tuple[int, int]]:
    """The pairs by the product of all rows in dense blocks."""
    pairs = set()
    for start, block in similarity_blocks(vectors, vectors):
        i, j = np.nonzero(block >= THRESHOLD - SIMILARITY_SLACK)
        i = i + start
        pairs |= set(zip(i[i < j].tolist(), j[i < j].tolist(), strict=True))
    return pairs


def join(vectors: object, max_exact: int) -> set[tuple[int, int]]:
    """The pairs by the join that up to `max_exact` different rows are compared with."""
    similar_pairs.MAX_EXACT = max_exact
    batches = similar_pairs.similar_pairs(vectors, THRESHOLD)
    return {pair for i, j, _ in batches for pair in zip(i.tolist(), j.tolist(), strict=True)}


def timed(function: Callable, *arguments: object) -> tuple[float, object]:
    """Seconds of one processor that `function` takes, and its result: other work on the machine does not count."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def compare_joins(rows: list[str], planted: np.ndarray) -> None:
    """Print seconds of each way, digits masked, and its share of the exact and of the planted pairs."""
    seconds, vectors = timed(ngram_vectors, rows, True)
    print(f"  vectors {seconds:.1f} s, {vectors.nnz / len(rows):.0f} n-grams a row, {vectors.shape[1]:,} in all")
    ways = {"all pairs": (all_pairs, ())} if len(rows) <= MAX_ALL_PAIRS else {}
    ways |= {"exact join": (join, (len(rows),))} if len(rows) <= MAX_EXACT else {}
    ways |= {"MinHash": (join, (0,))}
    similar = [(i, j) for i, j in planted.tolist() if vectors[[i]].multiply(vectors[[j]]).sum() >= THRESHOLD]
    reference, first_seconds = None, None
    for name, (function, arguments) in ways.items():
        seconds, pairs = timed(function, vectors, *arguments)
        reference, first_seconds = reference or pairs, first_seconds or seconds
        recall = [len(pairs & reference) / len(reference), len(pairs.intersection(similar)) / len(similar)]
        speed = f"{seconds:7.2f} s, {first_seconds / seconds:5.1f} times as fast as the first way"
        shares = f"{100 * recall[0]:.2f} % of its pairs, {100 * recall[1]:.2f} % of {len(similar):,} planted ones"
        print(f"  {name:10} {speed}; {len(pairs):,} pairs, {shares}", flush=True)


def pair_codes(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """A number for each pair of rows, in either order. n: of all rows."""
    return np.minimum(i, j).astype(np.int64) * n + np.maximum(i, j)


def peak_gib() -> float:
    """The peak memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prepare(folder: Path) -> None:
    """Run the cells of 01_data on `folder`/rows.jsonl in this process, and print seconds and peak memory."""
    root = repository_root()
    cells = json.loads((root / "notebooks/01_data.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code[0] = "source = 'large'"
    start, cpu = time.perf_counter(), time.process_time()
    matplotlib.use("agg")
    spec = {"source": "rows.jsonl", "task": "finance-sentiment", "split": SHARES}
    params = load_params().model_copy(update={"data": {"large": SourceConfig.model_validate(spec)}})
    scope: dict[str, Any] = {"ROOT": folder, "PARAMS": params}
    for cell in code:
        cell = cell.replace("root, params = repository_root(), load_params()", "root, params = ROOT, PARAMS")
        cell_start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(cell, "01_data", "exec"), scope)
        if (seconds := time.process_time() - cell_start) > 5:
            last_line = cell.strip().splitlines()[-1][:70]
            print(f"    {seconds:6.1f} s, peak {peak_gib():.2f} GiB  {last_line}", flush=True)
    seconds, of_processor = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"  01_data    {of_processor:.1f} s of one processor, {seconds:.1f} s in all, peak memory {peak_gib():.2f} GiB"
    )
    measure_recall(scope["prepared"], np.load(folder / "planted.npy"))


def measure_recall(prepared: PreparedSource, planted: np.ndarray) -> None:
    """Print the share of the pairs of `SAMPLE` rows, found by comparing them with all rows, that 01_data has found."""
    vectors, clusters = prepared.near.vectors[True], prepared.cluster
    n, known = vectors.shape[0], np.sort(pair_codes(*prepared.near.pairs[True][:2], vectors.shape[0]))
    sample = np.sort(np.random.default_rng(2).choice(n, min(n, SAMPLE), replace=False))
    exact = []
    for start, block in similarity_blocks(vectors[sample], vectors):
        i, j = np.nonzero(block >= THRESHOLD - SIMILARITY_SLACK)
        exact.append(pair_codes(sample[start + i], j, n))
    pairs = np.unique(np.concatenate(exact))
    pairs = pairs[pairs // n != pairs % n]
    share = np.isin(pairs, known).mean()
    print(f"  {100 * share:.2f} % of the {len(pairs):,} pairs at {THRESHOLD} of {len(sample):,} rows are in the audit")
    ids = prepared.rows["id"].str.slice(1).astype(int).to_numpy()
    place = np.full(ids.max() + 1, -1)
    place[ids] = np.arange(len(ids))
    present = planted[(place[planted] >= 0).all(axis=1)]
    together = (clusters[place[present[:, 0]]] == clusters[place[present[:, 1]]]).mean()
    print(f"  {100 * together:.2f} % of {len(present):,} copies are in the cluster of their original, below .85 or not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--notebook", action="store_true")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    root = repository_root()
    texts = corpus_texts(root)
    for n in arguments.rows:
        rows, planted = synthetic_rows(texts, n, seed=0)
        print(f"{n:,} rows", flush=True)
        if n <= MAX_EXACT:
            compare_joins(rows, planted)
        if arguments.notebook:
            with tempfile.TemporaryDirectory() as folder:
                labels = np.random.default_rng(1).choice(LABELS, n)
                records = ({"id": f"s{k}", "text": text, "label": labels[k]} for k, text in enumerate(rows))
                with (Path(folder) / "rows.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                np.save(Path(folder) / "planted.npy", planted)
                command = [sys.executable, __file__, "--prepare", folder]
                print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
