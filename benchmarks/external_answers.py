"""Answers that other language models gave elsewhere, read in as teachers: what became of them, and how good they are.

    PYTHONPATH=src python benchmarks/external_answers.py FOLDER GOLD

FOLDER holds CSV files with the columns `original_sent` and `text_output` (label and explanation in one text), named
after the model that answered; GOLD is a file of `sentence@label` lines. An answer that repeats the one before it, about
another sentence, was left there by a failed call: it is dropped. What cannot be read as one label is no label. Gold
labels only score here. Accuracy is that of the answers that could be read, and of all that were given; intervals by
bootstrap over sentences.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.load import validate_section
from distillery.config.schema import AnswerFilesConfig
from distillery.data.cleaning import normalize_text
from distillery.tasks.schema import load_task
from distillery.teachers.file import read_answer_files

COLUMNS = {"text": "original_sent", "answer": "text_output"}


def gold_of(path: Path) -> dict[str, str]:
    lines = path.read_bytes().decode("latin-1").splitlines()
    return {normalize_text(text): label.strip() for text, _, label in (line.rpartition("@") for line in lines) if text}


def main(folder: str, gold_file: str) -> None:
    task, gold = load_task("finance-sentiment"), gold_of(Path(gold_file))
    lines = []
    for model in sorted({file.name.split("_")[0] for file in Path(folder).glob("*.csv")}):
        files = sorted(str(file) for file in Path(folder).glob(f"{model}_*.csv"))
        spec = validate_section(AnswerFilesConfig, {"files": files, "columns": COLUMNS}, "params.yaml")
        answers = read_answer_files(spec, task, Path())
        status = answers["status"].value_counts()
        given = answers[answers["status"] != "repeats the answer before"]
        known = given[given["key"].isin(gold)]
        truth = known["key"].map(gold).tolist()
        drawn = metrics.bootstrap_scores(truth, known["label"].tolist(), task.names, known["key"].tolist())
        low, high = metrics.interval(drawn["accuracy"])
        right = known["label"].to_numpy(object) == np.array(truth, dtype=object)
        read = known["label"].notna().to_numpy()
        lines.append(
            {
                "model": model,
                "answers": len(answers),
                "sentences": answers["key"].nunique(),
                "repeats dropped": status.get("repeats the answer before", 0),
                "unreadable": status.get("cannot be read", 0),
                "kept": status.get("kept", 0),
                "with a reason": int((given["explanation"].str.len() > 0)[given["label"].notna()].sum()),
                "accuracy of read": right[read].mean() if read.any() else np.nan,
                "accuracy of all": right.mean(),
                "low": low,
                "high": high,
            }
        )
    print(pd.DataFrame(lines).set_index("model").round(4).T.to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
