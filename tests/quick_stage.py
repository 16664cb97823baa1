"""Stands in for `distillery/pipeline/run_notebook.py` where only the graph counts: writes what a notebook would write.

Every output is a function of what the stage reads, as with the real notebooks, and of nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq

from distillery.config.load import load_params
from distillery.config.schema import SPLITS
from distillery.files import repository_root
from distillery.tasks.schema import load_task

params, ROOT = load_params(), repository_root()


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def score(text: str) -> float:
    return int(text[:4], 16) / 0xFFFF


def get(path: str) -> list[dict]:
    return pq.read_table(ROOT / path).to_pylist()


def put(path: str, value: object) -> None:
    """Rows as parquet, a text as it is, anything else as JSON."""
    file = ROOT / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(value), file)
    else:
        file.write_text(value if isinstance(value, str) else json.dumps(value, indent=2), encoding="utf-8")


def signals_of(learned: str, rows: list[dict], **more: str) -> list[dict]:
    """A signal for each row, which hangs on `learned` and the row's id."""
    return [
        {"id": row["id"], "label": "neutral", "probabilities": [score(key(learned, i, row["id"])) for i in range(3)]}
        | more
        for row in rows
    ]


def model_of(teacher: str) -> str:
    return (ROOT / f"data/teacher/{teacher}/model/weights").read_text()


def data(source: str) -> None:
    spec = params.data[source]
    lines = (ROOT / spec.source).read_text(encoding="utf-8").splitlines()[: spec.limit]
    for i, split in enumerate(SPLITS):
        keys = [k for k in ("id", "text", "label", "group") if (split, k) != ("pool", "label")]
        put(
            f"data/processed/{source}/{split}.parquet", [{k: json.loads(line)[k] for k in keys} for line in lines[i::4]]
        )
    put(f"data/processed/{source}/task.json", load_task(spec.task).model_dump())


def teach(teacher: str) -> None:
    folder = f"data/teacher/{teacher}"
    learned = key((ROOT / f"build/teachers/{teacher}.json").read_text())
    signals = []
    for source, split in itertools.product(params.teacher_sources(teacher), SPLITS):
        signals += signals_of(learned, get(f"data/processed/{source}/{split}.parquet"), source=source, split=split)
    put(f"{folder}/model/weights", learned)
    put(f"{folder}/signals.parquet", signals)
    put(f"{folder}/metrics.json", {"validation": {"accuracy": score(learned), "macro_f1": 0.5}})


def augment() -> None:
    source = params.augment.source
    style = key(params.augment.model_dump(), model_of(params.augment.teacher))
    rows = get(f"data/processed/{source}/train.parquet")
    rows = [row | {"id": row["id"] + "#0", "text": row["text"] + style, "source_id": row["id"]} for row in rows]
    signals = []
    for teacher in [teacher for teacher in params.teachers if source in params.teacher_sources(teacher)]:
        signals += signals_of(model_of(teacher) + style, rows, teacher=teacher, source=source, split="augmented")
    put(f"data/augmented/{source}/rows.parquet", rows)
    put(f"data/augmented/{source}/signals.parquet", signals)


def distill(student: str, seed: str) -> None:
    files = sorted((ROOT / f"data/inputs/{student}").iterdir())
    learned, run = key(seed, *(file.read_bytes() for file in files)), f"runs/{student}-{seed}"
    put(f"{run}/model/weights", learned)
    put(f"{run}/history.csv", f"phase,step,loss\n1,1,{score(learned)}\n")
    put(f"{run}/metrics.json", {"test": {"accuracy": score(learned)}})


def evaluate() -> None:
    scores = {s: json.loads((ROOT / f"runs/{s}-{params.seeds[0]}/metrics.json").read_text()) for s in params.students}
    accuracy = {student: metrics["test"]["accuracy"] for student, metrics in scores.items()}
    board = "model,accuracy\n" + "".join(f"{student},{value}\n" for student, value in accuracy.items())
    history = "model,seed,phase,step,loss\n" + "".join(
        f"{s},0,1,{i},{v}\n" for s, v in accuracy.items() for i in (1, 2)
    )
    put("reports/leaderboard.csv", board)
    put("reports/metrics.json", {"accuracy": accuracy})
    values = "".join(f"{s},student,accuracy,{v},{v},{v}\n" for s, v in accuracy.items())
    put("reports/plots/scores.csv", "model,role,score,value,low,high\n" + values)
    put("reports/plots/reliability.csv", "model,confidence,accuracy,rows\ntiny-kd,0.5,0.4,20\ntiny-kd,0.8,0.7,30\n")
    put("reports/plots/history.csv", history)
    put("reports/plots/predictions.csv", "label,prediction\nneutral,neutral\npositive,neutral\n")
    put("reports/figures/leaderboard.svg", "<svg/>")
    put("reports/index.html", key(params.model_dump()))
    put("reports/timing.json", {})
    for run in (f"{s}-{seed}" for s in params.students for seed in params.seeds):
        put(f"reports/cards/{run}.md", run)
        put(f"runs/{run}/model/README.md", key(params.model_dump()))  # into an output of another stage


def run_stage(notebook: str, given: list[list[str]]) -> None:
    values = [value for _, value in given]
    {"01": data, "02": teach, "03": augment, "04": distill, "05": evaluate}[notebook[:2]](*values)
    executed = (ROOT / f"build/notebooks/{notebook}.ipynb").read_text(encoding="utf-8")
    put(f"reports/notebooks/{'-'.join([notebook, *values])}.ipynb", executed)
