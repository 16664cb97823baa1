"""GGUF files of a causal student in llama.cpp, beside the student in torch: label probabilities of the test rows.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/gguf_exports.py runs/half-kd-0 [rows, all by default]

Needs llama-cpp-python, which no other part of the project does. Exports the run if it is not. llama.cpp gets nothing
but the file: its tokenizer cuts the texts, and prompt and answers are those in the field `distillery.inference`. Both
compute the tokens that all prompts begin with once, with one thread: torch in float32 and batches of 32, llama.cpp row
after row. Rows a second are those of processor time: other programs of the machine do not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer, too, has one thread

import llama_cpp
import torch
from scipy import special

from distillery.deploy.exports import export_folder
from distillery.deploy.gguf_file import INFERENCE_FIELD
from distillery.deploy.predictors import GGUF_FILES, WEIGHTS_FILE, read_exports
from distillery.deploy.settings import model_folder, read_settings
from distillery.deploy.torch_predictor import open_label_model


class LlamaCpp:
    """A student as llama.cpp computes it from one file."""

    def __init__(self, path: Path):
        self.model = llama_cpp.Llama(
            str(path), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
        )
        self.settings = json.loads(self.model.metadata[INFERENCE_FIELD])
        self.answers = [self.tokenize(answer, special_tokens=False) for answer in self.settings["answers"]]

    def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=special_tokens, special=True)

    def prompt(self, text: str) -> list[int]:
        parts = self.settings
        return self.tokenize(parts["before"] + text + parts["after"], parts["special_tokens"])

    def predict(self, texts: list[str]) -> np.ndarray:
        """Probabilities of the labels [n, labels]; no text may be longer than the student reads."""
        prompts = [self.prompt(text) for text in texts]
        shared = len(os.path.commonprefix(prompts))
        self.model.reset()
        self.model.eval(prompts[0][:shared])
        return np.stack([self._score(prompt, shared) for prompt in prompts])

    def _score(self, prompt: list[int], known: int) -> np.ndarray:
        scores = []
        for answer in self.answers:
            self.model.n_tokens = known  # what comes later is computed anew
            if fed := (prompt + answer[:-1])[known:]:
                self.model.eval(fed)
            known = len(prompt)
            logits = self.model.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            scores.append(special.log_softmax(logits, -1)[range(len(answer)), answer].sum())
        return special.softmax(scores)


def main(run: str, rows: int | None = None) -> None:
    export_folder(Path(run))
    folder = model_folder(Path(run))
    settings, exports = read_settings(folder), read_exports(folder, "gguf")
    inputs = Path(run).resolve().parent.parent / "data/inputs" / settings.student
    test = pd.read_parquet(inputs / "test.parquet").head(rows)
    texts, names = test["text"].tolist(), np.array(settings.task.names)
    torch.set_num_threads(1)
    student = open_label_model(folder, settings)
    start = time.process_time()
    expected = student.predict(texts)
    rate = len(texts) / (time.process_time() - start)
    accuracy = (names[expected.argmax(1)] == test["label"]).mean()
    print(f"{len(texts)} test rows, llama-cpp-python {llama_cpp.__version__}, one thread\n")
    print("| engine | MB | rows/s | same tokens | same prediction | largest difference of a probability | accuracy |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    print(f"| torch, float32 | {size:.1f} | {rate:.1f} | – | – | – | {100 * accuracy:.1f} % |")
    ids = student.encode(texts)
    for name, file in reversed(GGUF_FILES.items()):
        model = LlamaCpp(folder / "gguf" / file)
        same = np.mean([model.prompt(text) == row for text, row in zip(texts, ids, strict=True)])
        start = time.process_time()
        p = model.predict(texts)
        rate = len(texts) / (time.process_time() - start)
        cells = [f"llama.cpp, {name.removeprefix('gguf-')}", f"{exports[name]['bytes'] / 1e6:.1f}", f"{rate:.1f}"]
        cells += [f"{100 * same:.1f} %", f"{100 * (p.argmax(1) == expected.argmax(1)).mean():.1f} %"]
        cells += [f"{np.abs(p - expected).max():.2g}", f"{100 * (names[p.argmax(1)] == test['label']).mean():.1f} %"]
        print("| " + " | ".join(cells) + " |")
        if rows is None:
            scores = exports[name]
            cells = [f"torch, weights of {name.removeprefix('gguf-')}", cells[1], "–", "–"]
            cells += [f"{100 * scores['agreement']:.1f} %", f"{scores['largest_difference']:.2g}"]
            print("| " + " | ".join([*cells, f"{100 * scores['accuracy']:.1f} %"]) + " |")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
