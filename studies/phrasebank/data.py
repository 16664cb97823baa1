"""The rows of the study: PhraseBank's files, unlabelled texts, and the split of one seed."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import SourceConfig
from distillery.data.cleaning import normalize_text
from distillery.data.near_duplicates import cluster_near_duplicates, nearest_texts
from distillery.data.prepare import prepare_source
from distillery.data.readers import read_rows
from distillery.data.similar_pairs import SIMILARITY_SLACK
from distillery.errors import UserError
from distillery.tasks.schema import Task, load_task
from studies.phrasebank.settings import StudySettings

ROOT = Path(__file__).resolve().parents[2]
SUBSETS = ("50agree", "allagree")
FILES = {  # the first file that exists is read
    "50agree": ("derived/Sentences_50Agree.repaired.utf8.txt", "Sentences_50Agree.txt"),
    "allagree": ("Sentences_AllAgree.txt",),
}
NEAR_DUPLICATE = SourceConfig.model_fields["near_duplicate"].default
MIN_HEADLINE_WORDS = 5
CUT = re.compile(r"(?: ,| ;| and| but| while| from| to| in| as| with| of)(?= )")
MIN_PART = 15  # characters of each part of a spliced sentence


@cache
def sentiment_task() -> Task:
    """The task of PhraseBank: sentiment of finance sentences."""
    return load_task("finance-sentiment", ROOT / "tasks")


def decode(content: bytes, fallback: str) -> str:
    """`content` as text: UTF-8 if it is that, else the encoding `fallback`."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode(fallback, errors="replace")


def read_sentences(path: Path) -> list[tuple[str, str]]:
    """(sentence, label) of every line of a PhraseBank file, in UTF-8 or latin-1.

    Raises UserError naming the line when one is not `sentence@label`.
    """
    labels, rows = sorted(sentiment_task().names), []
    for number, line in enumerate(decode(path.read_bytes(), "latin-1").split("\n"), 1):
        if line.strip():
            sentence, _, label = line.strip().rpartition("@")
            if not normalize_text(sentence) or label not in labels:
                raise UserError(f"{path.name}, line {number}: must be `sentence@label` with one of {', '.join(labels)}")
            rows.append((normalize_text(sentence), label))
    return rows


def read_phrasebank(folder: Path) -> pd.DataFrame:
    """Every row of 50-agree in file order: text, label, group (near-duplicates share one), and `allagree`, whether the
    row is in all-agree, too. Rows are matched by their ASCII characters: copies of 50-agree have lost other letters.

    Raises UserError when a file is missing or malformed, or a row of all-agree is not in 50-agree.
    """
    rows, paths = {}, {}
    for subset, names in FILES.items():
        present = [folder / name for name in names if (folder / name).is_file()]
        if not present:
            raise UserError(f"{folder}: no {' or '.join(names)} there; `data` must be the folder of PhraseBank's files")
        paths[subset], rows[subset] = present[0], read_sentences(present[0])
    keys = {subset: [(re.sub(r"[^!-~]", "", text), label) for text, label in rows[subset]] for subset in SUBSETS}
    unmatched = set(keys["allagree"]) - set(keys["50agree"])
    if unmatched:
        number = min(map(keys["allagree"].index, unmatched)) + 1
        raise UserError(f"{paths['allagree'].name}, sentence {number}: not in {paths['50agree'].name}")
    frame = pd.DataFrame(rows["50agree"], columns=["text", "label"])
    unanimous = set(keys["allagree"])
    return frame.assign(
        group=cluster_near_duplicates(frame["text"].tolist(), NEAR_DUPLICATE),
        allagree=[key in unanimous for key in keys["50agree"]],
    )


def read_headlines(folder: Path) -> list[str]:
    """The distinct texts in the columns `Headlines` and `Description` of a folder's .csv files, in UTF-8 or cp1252.

    Texts of fewer than `MIN_HEADLINE_WORDS` words are left out. Raises UserError when none is left.
    """
    texts: dict[str, None] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in csv.DictReader(io.StringIO(decode(path.read_bytes(), "cp1252"), newline="")):
            for column in ("Headlines", "Description"):
                # some rows begin with the name of a section, on a line of its own
                texts[normalize_text((row.get(column) or "").split("\n")[-1])] = None
    long = [text for text in texts if len(text.split()) >= MIN_HEADLINE_WORDS]
    if not long:
        raise UserError(f"{folder}: no .csv with a column `Headlines` there; `headlines` must be such a folder")
    return long


def read_corpus(name: str = "corpora/finance") -> pd.DataFrame:
    """The rows of a file in data/, by default this project's finance corpus: text, label."""
    return pd.DataFrame(read_rows(f"data/{name}.jsonl", ROOT).rows)[["text", "label"]]


def is_far(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Which of `texts` are near-duplicates of none of `others`, digits masked [n]."""
    return nearest_texts(list(texts), list(others))[0] < NEAR_DUPLICATE - SIMILARITY_SLACK


def splice(texts: Sequence[str], per_text: int, seed: int) -> list[str]:
    """New sentences for a teacher to label, about `per_text` for each of `texts`.

    Each is a text up to one of its commas, conjunctions or prepositions, then what follows the same word in another
    text. They are of the benchmark's kind, and often state what no sentence of it does.
    """
    rng = np.random.default_rng(seed)
    beginnings: list[tuple[str, str]] = []
    ends: dict[str, list[str]] = {}
    for text in texts:
        cuts = [match for match in CUT.finditer(text) if MIN_PART < match.end() < len(text) - MIN_PART]
        if cuts:
            cut = cuts[rng.integers(len(cuts))]
            beginnings.append((text[: cut.end()], cut[0]))
            ends.setdefault(cut[0], []).append(text[cut.end() :])
    spliced = [begin + ends[word][rng.integers(len(ends[word]))] for _ in range(per_text) for begin, word in beginnings]
    originals = set(texts)
    return list(dict.fromkeys(text for text in spliced if text not in originals))


def split_phrasebank(phrasebank: pd.DataFrame, settings: StudySettings, seed: int) -> pd.DataFrame:
    """The rows of :func:`read_phrasebank` without duplicates, split by groups: split_ref, id, text, label, group,
    allagree. Prints how many pairs of near-duplicates lie across splits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "50agree.jsonl"
        records = phrasebank[["text", "label", "allagree"]]
        records.to_json(path, orient="records", lines=True, force_ascii=False)
        spec = SourceConfig(source=path.name, task="finance-sentiment", split=settings.split, seed=seed)
        prepared = prepare_source("50agree", spec, sentiment_task(), path.parent)
    pairs = prepared.audit["across_splits"]["digits_masked"]["pairs_above"]
    print(f"seed {seed}: {len(prepared.rows)} rows, {pairs} pairs of near-duplicates across splits", flush=True)
    rows = prepared.rows.assign(split_ref=[f"50agree/{split}" for split in prepared.split])
    return rows[["split_ref", "id", "text", "label", "group", "allagree"]]


def study_rows(phrasebank: pd.DataFrame, headlines: Sequence[str], settings: StudySettings, seed: int) -> pd.DataFrame:
    """The rows of one seed: those of :func:`split_phrasebank`, then the pools, which have no label.

    Pool texts that are near-duplicates of a validation or test sentence are left out.
    """
    rows = split_phrasebank(phrasebank, settings, seed)
    train = rows["text"][rows["split_ref"] == "50agree/train"].tolist()
    held_out = rows["text"][rows["split_ref"].isin(["50agree/validation", "50agree/test"])].tolist()
    pools = {
        "finance": read_corpus()["text"].tolist() if settings.pools.finance else [],
        "written": read_corpus("texts/finance-qwen")["text"].tolist() if settings.pools.written else [],
        "spliced": splice(train, settings.pools.spliced, seed),
        "headlines": list(headlines) if settings.pools.headlines else [],
    }
    for pool, candidates in pools.items():
        texts = np.array(candidates, dtype=object)[is_far(candidates, held_out)]
        if pool == "headlines":
            nearest = np.argsort(-nearest_texts(list(texts), train)[0], kind="stable")
            texts = texts[np.sort(nearest[: settings.pools.headlines])]
        ids = [f"{pool}-{i:06d}" for i in range(len(texts))]
        unlabelled = {"split_ref": f"{pool}/pool", "id": ids, "text": texts, "label": None, "group": None}
        rows = pd.concat([rows, pd.DataFrame(unlabelled | {"allagree": False})], ignore_index=True)
    return rows.astype({"allagree": bool})
