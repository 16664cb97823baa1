"""A finished experiment with invented runs whose correct scores are known, for tests of evaluation and report."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import Params
from distillery.data.prepare import prepare_source
from distillery.data.storage import read_split, write_source
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.evaluation.robustness import measure_robustness
from distillery.evaluation.slices import slice_scores
from distillery.evaluation.speed import Measurements
from distillery.report.page import write_report
from distillery.tasks.schema import load_task
from distillery.teachers.label_review import find_label_errors, find_rows_to_label, write_review

LABELS = ["up", "flat", "down"]
TASK = "kind: classification\nlabels: {up: it rises, flat: it stays, down: it falls}\n"
TASK += "perturbations: {names: {invented: [Veltora], tickers: '\\$[A-Z]+'}}\n"
WORDS = [
    a + b
    for a in ("pro", "ship", "order", "paper", "loan", "steel", "grain", "copper", "bank", "rail", "tax", "crude")
    for b in ("fit", "ment", "yard", "ing", "ers", "line", "hold", "works", "man", "age")
]
ACCURACY = {"tiny-kd": 0.75, "tiny-gold": 0.55, "other": 0.7, "big": 0.9, "untrained": 0.33}
SPEEDS = {"tiny-kd": 500.0, "tiny-gold": 500.0, "other": 100.0, "big": 40.0}


def experiment(**changes) -> dict:
    """A params.yaml as a dict: a distilled student, its control, and a second student without one."""
    phase = {"data": ["demo/train"], "loss": {"ce": 1.0}, "steps": 4, "learning_rate": 1e-3}
    distilled = phase | {"teachers": ["big"], "loss": {"kl": 1.0}}
    student = {"model": "small", "arch": "classifier", "init": {"layers": [0, 2]}}
    return {
        "seeds": [0, 1],
        "data": {
            "demo": {
                "source": "data/demo.jsonl",
                "task": "demo",
                "split": {"train": 0.2, "pool": 0.2, "validation": 0.1, "test": 0.5},
            }
        },
        "models": {"small": {"folder": "models/small"}, "large": {"folder": "models/large"}},
        "teachers": {"big": {"kind": "lm", "model": "large"}},
        "augment": {"source": "demo", "teacher": "big", "per_row": 1},
        "students": {
            "tiny-kd": student | {"phases": [distilled, phase], "control": "tiny-gold"},
            "tiny-gold": student | {"phases": [phase]},
            "other": student | {"phases": [distilled], "init": {"layers": "all"}},
        },
        "evaluate": {"headline": "tiny-kd", "bootstrap": 300, "throughput_rows": 8},
    } | changes


def write_file(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, pd.DataFrame):
        value.to_parquet(path)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def prediction_table(rng, rows: pd.DataFrame, accuracy: float, labels: list[str], **columns) -> pd.DataFrame:
    """Predictions of about this accuracy, with probabilities whose largest is that of the prediction."""
    codes, k = metrics.encode_labels(rows["label"], labels), len(labels)
    codes = np.where(rng.random(len(rows)) < accuracy, codes, (codes + rng.integers(1, k, len(rows))) % k)
    p = rng.dirichlet([1] * k, len(rows))
    p = 0.4 * p + 0.6 * np.eye(k)[codes]
    table = {"id": rows["id"], "prediction": [labels[c] for c in codes], "probabilities": list(p.astype(np.float32))}
    return pd.DataFrame(table).assign(**columns)


def invented_corpus(rng) -> list[dict]:
    corpus = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": str(rng.choice(LABELS)), "rationale": "so"}
        for i in range(600)
    ]
    for row in corpus[::2]:
        row["text"] += " $" + "".join(rng.choice(list("ABCDEFGH"), 4))  # a ticker: a name that can be changed
    return corpus


def write_project(
    root, spec: dict | None = None, accuracy: dict | None = None, corpus: list[dict] | None = None, task: str = TASK
) -> Params:
    """Write a finished experiment to `root`: real splits, invented runs."""
    spec, accuracy = spec or experiment(), ACCURACY | (accuracy or {})
    rng = np.random.default_rng(0)
    corpus = invented_corpus(rng) if corpus is None else corpus
    write_file(root / "dvc.yaml", "")
    write_file(root / "tasks/demo.yaml", task)
    write_file(root / "params.yaml", json.dumps(spec))  # JSON is YAML
    write_file(root / "data/demo.jsonl", "".join(json.dumps(row) + "\n" for row in corpus))
    params = load_params(root / "params.yaml")
    labels = load_task("demo", root / "tasks")
    write_source(prepare_source("demo", params.data["demo"], labels, root), root / "data/processed/demo")
    held_out = {split: read_split(root / "data/processed/demo", split) for split in ("validation", "test")}

    def predict(share: float, **columns) -> pd.DataFrame:
        tables = [prediction_table(rng, rows, share, labels.names, split=s, **columns) for s, rows in held_out.items()]
        return pd.concat(tables)

    for teacher in params.teachers:
        signals = predict(accuracy[teacher], source="demo", fold=-1, rationale=None)
        signals = signals.rename(columns={"prediction": "label"}).reset_index(drop=True)
        signals.loc[len(signals) - 1, "rationale"] = "teacher's words"  # of a test row
        folder = root / f"data/teacher/{teacher}"
        write_file(folder / "signals.parquet", signals)
        rows = pd.concat(rows.assign(source="demo", split=split) for split, rows in held_out.items())
        write_review(folder, *(find(rows, signals, labels) for find in (find_label_errors, find_rows_to_label)))
        write_file(folder / "metrics.json", {"parameters": 134_500_000, "bytes_on_disk": 269_000_000})
    write_file(
        root / "data/augmented/demo/counts.json", {"candidates": 49, "reasons": {"kept": 40, "label changed": 9}}
    )
    for name in params.students:
        for seed in params.seeds:
            run = root / f"runs/{name}-{seed}"
            write_file(run / "predictions.parquet", predict(accuracy[name]))
            phases = [predict(accuracy["untrained"], phase=0), predict(accuracy[name], phase=1)]
            write_file(run / "phases.parquet", pd.concat(phases))
            metadata = {"parameters": 17_000_000, "trainable_parameters": 16_000_000, "bytes_on_disk": 34_000_000}
            write_file(run / "metrics.json", metadata)
            write_file(run / "timing.json", {"train_seconds": 61.0 + seed, "peak_memory_mb": 900 + seed})
            history = pd.DataFrame({"phase": [1, 1, 2, 2], "step": [1, 2, 1, 2], "loss": [1.0, 0.8, 0.6, 0.5]})
            write_file(run / "history.csv", history.to_csv(index=False))
    return params


def invented_measurements(results, speeds=SPEEDS) -> Measurements:
    """Invented timings, and the robustness of a model that predicts by whether the text holds "ship"."""
    timing = {
        name: {"sentences_per_second": speed, "latency_p50_ms": 900 / speed, "latency_p95_ms": 2000 / speed}
        for name, speed in speeds.items()
    }

    def predict(rows):
        return np.eye(3)[[int("ship" in text) for text in rows["text"]]]

    return Measurements(timing, *measure_robustness(results, {"tiny-kd": predict, "big": predict}))


def evaluate(root, params, speeds=None, report=False):
    """The results, and the leaderboard indexed by model. report: whether to write the report too."""
    results = gather_results(root, params)
    measured = invented_measurements(results, speeds) if speeds else Measurements()
    board = leaderboard(results, measured.timing)
    if report:
        write_report(root, results, board, measured, slice_scores(results))
    return results, board.set_index("model")


def finished_project(root):
    """Root, params, results and leaderboard of the default experiment."""
    params = write_project(root)
    return root, params, *evaluate(root, params, SPEEDS, report=True)


def qa_project(root, answers: int = 1, **columns) -> Params:
    """A project whose rows are questions with so many accepted answers; `columns` go into every prediction table."""
    rng = np.random.default_rng(0)
    corpus = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": [f"answer {i}", f"{i}"][:answers]}
        for i in range(200)
    ]
    for row in corpus:
        row["label"] = row["label"] if answers > 1 else row["label"][0]
    params = write_project(root, experiment(seeds=[0]), corpus=corpus, task="kind: qa\n")
    if columns:
        for path in [*root.glob("runs/*/predictions.parquet"), *root.glob("data/teacher/*/signals.parquet")]:
            rows = pd.read_parquet(path)
            rows["answer"] = [f"<{path.parent.name} answers {i}>" for i in rows["id"]]
            rows.assign(**columns).to_parquet(path)
    return params
