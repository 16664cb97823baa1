"""What a language model makes of texts when it rewords them: how much can be used, and does the meaning stay?

    PYTHONPATH=src python benchmarks/paraphrases.py [data/answers/finance-qwen-gold.jsonl] [data/corpora/finance.jsonl]

The first file has the paraphrases that `distillery answers` keeps, the second their texts. Printed is how many pass
each filter of `augment.keep`, how many keep numbers and directions, how far the model's label distribution moves from
text to paraphrase, and ten samples.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from distillery.config.schema import ParaphraseFilter
from distillery.data.readers import read_rows
from distillery.files import repository_root
from distillery.tasks.schema import Task, load_task
from distillery.teachers.directions import directions, numbers
from distillery.teachers.paraphrases import rejection_reason

SAMPLES, SEED = 10, 0


def paraphrase_table(answers: pd.DataFrame, texts: dict[str, str], task: Task) -> pd.DataFrame:
    """A row for each paraphrase: source_text, text, reason (`kept`, or why not), whether numbers and directions are
    those of its text, variation (total variation of the model's label distributions), same_label.

    answers: id, paraphrase, probabilities {label: p} of texts and paraphrases. texts: by id.
    """
    own = {row["id"]: list(row["probabilities"].values()) for row in answers.to_dict("records")}
    directions_of, lines = task.perturbations.directions, []
    for row in answers[answers["paraphrase"].notna()].to_dict("records"):
        source_id, text = row["id"].rpartition("#")[0], row["paraphrase"]
        source, before, after = texts[source_id], np.array(own[source_id]), np.array(own[row["id"]])
        same_label = before.argmax() == after.argmax()
        reason = rejection_reason(source, text, keep=ParaphraseFilter(), perturbations=task.perturbations)
        lines.append(
            {
                "source_text": source,
                "text": text,
                "reason": "label changed" if reason == "kept" and not same_label else reason,
                "numbers": numbers(source) == numbers(text),
                "directions": directions(source, directions_of) == directions(text, directions_of),
                "variation": float(np.abs(before - after).sum() / 2),
                "same_label": bool(same_label),
            }
        )
    return pd.DataFrame(lines)


def main(
    answer_file: str = "data/answers/finance-qwen-gold.jsonl", text_file: str = "data/corpora/finance.jsonl"
) -> None:
    root = repository_root()
    answers = pd.DataFrame(read_rows(answer_file, root).rows)
    texts = {str(row["id"]): str(row["text"]) for row in read_rows(text_file, root).rows}
    table = paraphrase_table(answers, texts, load_task("finance-sentiment"))
    print(f"{answer_file}: {len(table)} paraphrases")
    print(table["reason"].value_counts().to_string())
    for name, part in (("all", table), ("kept", table[table["reason"] == "kept"])):
        shares = part[["numbers", "directions", "same_label"]].mean()
        print(f"\n{name}: numbers kept {shares['numbers']:.1%}, directions kept {shares['directions']:.1%}")
        print(f"same label {shares['same_label']:.1%}, mean total variation {part['variation'].mean():.3f}")
    print(f"\n{min(SAMPLES, len(table))} samples, drawn at random:")
    for row in table.iloc[np.random.default_rng(SEED).permutation(len(table))[:SAMPLES]].to_dict("records"):
        print(f"[{row['reason']}] {row['source_text']} -> {row['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
