"""The exports of a student beside itself: agreement, accuracy, size and rows a second of one processor core.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/exports.py runs/tiny-kd-0 [rounds, 5 by default]

Exports the run if it is not, and scores all test rows. Then the engines take turns on these rows, each with one thread
and in batches of 32 sorted by length; the fastest round counts. Rows a second are those of processor time: other
programs of the machine do not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pandas as pd

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer, too, has one thread

from distillery.deploy.exports import export_folder
from distillery.deploy.predictors import ONNX_FILES, WEIGHTS_FILE, open_predictor, read_exports
from distillery.deploy.settings import model_folder, read_settings


def main(run: str, rounds: int = 5) -> None:
    export_folder(Path(run))
    folder = model_folder(Path(run))
    settings, exports = read_settings(folder), read_exports(folder)
    inputs = Path(run).resolve().parent.parent / "data/inputs" / settings.student
    texts = pd.read_parquet(inputs / "test.parquet")["text"].tolist()
    predictors = {name: open_predictor(folder, settings, name, 1) for name in ("torch", *ONNX_FILES)}
    seconds = dict.fromkeys(predictors, float("inf"))
    for _ in range(rounds):
        for name, predictor in predictors.items():
            start = time.process_time()
            predictor.predict(texts)
            seconds[name] = min(seconds[name], time.process_time() - start)
    accuracy = json.loads((Path(run) / "metrics.json").read_text())["test"]["accuracy"]
    print("| engine | MB | rows/s | agreement | largest difference of a probability | accuracy | difference, points |")
    print("|---|--:|--:|--:|--:|--:|---|")
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    print(f"| torch float32 | {size:.1f} | {len(texts) / seconds['torch']:.0f} | – | – | {100 * accuracy:.1f} % | – |")
    for name in reversed(ONNX_FILES):
        scores = exports[name]
        low, mean, high = (100 * scores[f"difference{end}"] for end in ("_low", "", "_high"))
        cells = [name, f"{scores['bytes'] / 1e6:.1f}", f"{len(texts) / seconds[name]:.0f}"]
        cells += [f"{100 * scores['agreement']:.1f} %", f"{scores['largest_difference']:.1g}"]
        cells += [f"{100 * scores['accuracy']:.1f} %", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
