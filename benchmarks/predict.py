"""`distillery predict` beside the bare model: rows a second, and memory from the first row to the last.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/predict.py runs/tiny-kd-0 [rows, 100000 by default] [engine]

The rows are those of data/corpora/finance.jsonl again and again, with a column more. The bare model has all texts in
memory, cleaned: it tokenizes them, sorts them by length over the whole table and computes batches of 32, without code
of this project: in torch, or in ONNX Runtime without the fusions that `predict` leaves out. `predict` reads a CSV file,
cleans, predicts and calibrates it, and writes a CSV file; its time includes opening the model. Both have one thread.
Time is given on the clock and of the processor: the second does not count what other programs take. The last line is
the ratio.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from distillery.data.records import normalize_text
from distillery.deploy.predict import PredictOptions, predict_file
from distillery.deploy.predictors import ONNX_FILES, SLOW_FUSIONS, open_predictor
from distillery.deploy.settings import model_folder, read_settings
from distillery.files import repository_root

BATCH = 32
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer, too, has one thread


def onnx_function(path: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
    )
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def torch_function(folder: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return compute


def predict_bare(
    compute: Callable[[np.ndarray, np.ndarray], np.ndarray], tokenizer: Tokenizer, texts: list[str]
) -> Any:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    best = np.zeros(len(rows), dtype=int)
    for start in range(0, len(rows), BATCH):
        batch = order[start : start + BATCH]
        ids = np.zeros((len(batch), len(rows[batch[-1]])), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(rows[row])], mask[i, : len(rows[row])] = rows[row], 1
        best[batch] = compute(ids, mask).argmax(-1)
    return best


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `work`, its seconds on the clock and those of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - clock, time.process_time() - processor


class MemoryLog:
    """The memory of this process every half second, in MB, while the block runs."""

    def __enter__(self) -> MemoryLog:
        self.values: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._end.wait(0.5):
            self.values.append(psutil.Process().memory_info().rss / 1e6)

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()


def main(student: str, rows: int = 100_000, engine: str = "auto") -> None:
    folder = model_folder(Path(student))
    settings = read_settings(folder)
    engine = open_predictor(folder, settings, engine, 1).engine
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = [json.loads(line)["text"] for line in lines]
    texts = [corpus[i % len(corpus)] for i in range(rows)]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.csv", Path(scratch) / "out.csv"
        with open(source, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("number", "text"), *enumerate(texts)])
        options = PredictOptions(str(source), str(target), engine=engine, threads=1)
        with MemoryLog() as memory:
            _, clock, processor = timed(lambda: predict_file(Path(student), options))
        with open(target, encoding="utf-8", newline="") as file:
            predictions = [row["prediction"] for row in csv.DictReader(file)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(settings.max_length)
    tokenizer.no_padding()
    onnx = ONNX_FILES.get(engine)
    compute = onnx_function(folder / "onnx" / onnx) if onnx else torch_function(folder)
    cleaned = [normalize_text(text) for text in texts]
    best, bare_clock, bare_processor = timed(lambda: predict_bare(compute, tokenizer, cleaned))
    same = np.mean([settings.task.names[i] == given for i, given in zip(best, predictions, strict=True)])
    fifth = max(1, len(memory.values) // 5)
    start, end = max(memory.values[:fifth]), max(memory.values[-fifth:])
    print(f"{rows:,} rows, {engine}, one thread")
    print("                    rows/s on the clock   rows/s of the processor")
    print(f"bare model          {rows / bare_clock:19.0f}   {rows / bare_processor:23.0f}")
    print(f"distillery predict  {rows / clock:19.0f}   {rows / processor:23.0f}")
    print(f"same predictions    {100 * same:.2f} %")
    print(f"memory              {start:.0f} MB at most in the first fifth of the time, {end:.0f} MB in the last")
    print(
        f"ratio               {bare_clock / clock:.3f} on the clock, {bare_processor / processor:.3f} of processor time"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0], *map(int, arguments[1:2]), *arguments[2:])
