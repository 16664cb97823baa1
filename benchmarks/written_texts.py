"""What does a language model write from a task file alone: how much of it can be used, and how alike are the texts?

    PYTHONPATH=src python benchmarks/written_texts.py [data/texts/finance-qwen.json] [data/corpora/finance.jsonl]

The first file is the origin that `distillery texts` writes, with the texts beside it; the second has real texts of the
same task. Printed are how many texts each filter left, by label, and why the others went; how many n-grams differ, and
in as many real texts; how near the nearest real text of each is; and ten samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.data.near_duplicates import has_near_duplicate, nearest_texts
from distillery.data.readers import read_rows
from distillery.files import repository_root
from distillery.teachers.text_requests import TextRequest

SAMPLES, SEED = 10, 0
ORDERS = (1, 2, 3)


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words in `texts`, over all of them (Li et al. 2016, section 5.3: distinct-n)."""
    words = [text.casefold().split() for text in texts]
    ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(1, len(ngrams))


def funnel_table(funnel: dict[str, dict[str, int]]) -> pd.DataFrame:
    """The texts that each stage left, by label, and the share of the unique texts whose label the model confirms."""
    table = pd.DataFrame(funnel).T
    share = table.loc["agreed"] / table.loc["unique"].where(table.loc["unique"] > 0)
    return pd.concat([table.astype(str), share.map("{:.1%}".format).to_frame("agreed / unique").T])


def likeness_table(written: Sequence[str], real: Sequence[str]) -> pd.DataFrame:
    """Words and distinct n-grams of `written` and of as many texts of `real`."""
    n = min(len(written), len(real))
    rng, lines = np.random.default_rng(SEED), {}
    for name, texts in (("written", written), ("real", real)):
        sample = [texts[i] for i in rng.permutation(len(texts))[:n]]
        words = [len(text.split()) for text in sample]
        lines[name] = {"texts": n, "words, mean": np.mean(words), "words, 95 %": np.percentile(words, 95)}
        lines[name] |= {f"distinct-{order}": distinct_ngrams(sample, order) for order in ORDERS}
    return pd.DataFrame(lines).T


def main(origin_file: str = "data/texts/finance-qwen.json", real_file: str = "data/corpora/finance.jsonl") -> None:
    root = repository_root()
    origin = json.loads((root / origin_file).read_text(encoding="utf-8"))
    rows = pd.DataFrame(read_rows(Path(origin_file).with_suffix(".jsonl").as_posix(), root).rows)
    real = [str(row["text"]) for row in read_rows(real_file, root).rows]
    print(f"{origin_file}: {origin['machine']}, commit {origin['commit'][:7]}, {origin['date']}\n")
    print(funnel_table(origin["funnel"]).to_string())
    print("\nwhy texts went:")
    for reason, part in sorted(origin["rejected"].items(), key=lambda item: -item[1]["texts"]):
        first = part["first"]
        print(f"{part['texts']:5d} {reason}, such as [{first['label']}, {first['topic']}] {first['answer']}")
    texts = rows["text"].tolist()
    print(f"\n{likeness_table(texts, real).to_string(float_format='{:.3f}'.format)}")
    similarity, _ = nearest_texts(texts, real)
    threshold = origin["request"].get("near_duplicate", TextRequest.model_fields["near_duplicate"].default)
    near = int(has_near_duplicate(texts, real, threshold).sum())
    print(f"\nsimilarity to the nearest real text: median {np.median(similarity):.2f}, highest {similarity.max():.2f}")
    print(f"near-duplicates of a real text, from {threshold:g}: {near} of {len(texts)}")
    print(f"\n{min(SAMPLES, len(rows))} samples, drawn at random:")
    for row in rows.iloc[np.random.default_rng(SEED).permutation(len(rows))[:SAMPLES]].to_dict("records"):
        print(f"[{row['label']} {row['probabilities'][row['label']]:.2f}, {row['topic']}] {row['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
