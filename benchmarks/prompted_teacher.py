"""How fast is a prompted language model in each number format, and what does the format change?

    PYTHONPATH=src python benchmarks/prompted_teacher.py [rows] [format ...]

The model, task and solved examples of `data/answers/finance-qwen.yaml` on test rows of the finance corpus. The
beginning that all prompts share is read once. Rows/s count processor time of one thread, so that other jobs matter
little; loading and the check of methods (docs/models.md), which happen once a run, are left out. Every format is
compared with float32, or with the first one named.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import TeacherConfig
from distillery.data.prepare import prepare_source
from distillery.data.storage import read_split, write_source
from distillery.files import repository_root
from distillery.models.forward_methods import ForwardMethods
from distillery.models.label_model import LabelModel
from distillery.models.packed.token_tree import common_prefix
from distillery.tasks.schema import load_task
from distillery.teachers.asking import open_requested, read_request

REQUEST = "data/answers/finance-qwen.yaml"
FORMATS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "nf4": ("bfloat16", "nf4"),
    "int8, float32": ("float32", "int8"),
    "int8": ("bfloat16", "int8"),
}


def finance_test_rows(n: int) -> pd.DataFrame:
    """The first `n` test rows (text, label) of the finance corpus as the default experiment splits it."""
    root, source = repository_root(), load_params().data["finance"]
    with tempfile.TemporaryDirectory() as scratch:
        write_source(prepare_source("finance", source, load_task(source.task), root), Path(scratch))
        return read_split(Path(scratch), "test").head(n)


def opened(dtype: str, quantize: str) -> LabelModel:
    request = read_request(repository_root(), REQUEST)
    teacher = TeacherConfig.model_validate(request.teacher.model_dump() | {"dtype": dtype, "quantize": quantize})
    model = open_requested(repository_root(), request.model_copy(update={"teacher": teacher}))
    model._methods = ForwardMethods(length=model.max_length)  # token trees: that they are right is known of this model
    return model


def bytes_held(model: LabelModel) -> int:
    tensors = [*model.model.parameters(), *model.model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def main(rows: int, formats: list[str]) -> None:
    torch.set_num_threads(1)
    frame = finance_test_rows(rows)
    texts, labels = frame["text"].tolist(), frame["label"].tolist()
    lines, reference = [], None
    for name in formats:
        model = opened(*FORMATS[name])
        names = model.task.names
        if reference is None:
            ids = model.encode(texts)
            shared = common_prefix(ids)
            own = np.mean([len(row) for row in ids]) - shared
            print(f"{rows} rows, {model.few_shot} solved examples; {shared} tokens that all prompts begin with,")
            capability = torch.backends.cpu.get_cpu_capability()
            print(f"{own:.0f} more a row; one thread; torch {torch.__version__}, {capability}", flush=True)
        start = time.process_time()
        probabilities = model.predict(texts)
        seconds = time.process_time() - start
        reference = probabilities if reference is None else reference
        difference = np.abs(probabilities - reference).max(1)
        predictions = [names[i] for i in probabilities.argmax(1)]
        scores = metrics.mean_scores(labels, predictions, names)
        lines.append(
            {
                "format": name,
                "rows/s": rows / seconds,
                "same label": (probabilities.argmax(1) == reference.argmax(1)).mean(),
                "largest difference": difference.max(),
                "mean difference": difference.mean(),
                "accuracy": scores["accuracy"],
                "macro-F1": scores["macro_f1"],
                "GB": bytes_held(model) / 1e9,
            }
        )
        print(f"{name}: {rows / seconds:.2f} rows/s", flush=True)
        del model
        gc.collect()
    table = pd.DataFrame(lines).set_index("format")
    table.insert(1, "ratio", table["rows/s"] / table["rows/s"].iloc[0])
    print(table.round(3).to_string())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 96, sys.argv[2:] or list(FORMATS))
