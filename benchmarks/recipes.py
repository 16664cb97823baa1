"""Every published system at small scale, one after the other: does it run to its end, how long, how much memory?

    PYTHONPATH=src python benchmarks/recipes.py [recipe or recipe:scale ...]

Without names: each recipe that has a scale `small`. Runs what `make recipe NAME=... SCALE=small` runs, from nothing but
fetched models: earlier results of that recipe are deleted first. Memory is the most that its processes held together
(proportional set size). Writes `benchmarks/recipes.csv` after each: one row for every published figure, beside this
run's with its interval, and one for every other trained model; rows of recipes that were not named stay. The table
in `recipes/README.md` is made from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
from domains import write_figure
from keep import commit

from distillery.config.load import validate_section
from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import atomic_write, read_yaml, repository_root
from distillery.models.fetch import fetch_model
from distillery.pipeline.recipe import PUBLISHED_TABLE, load_recipe

TABLE, PAGE = "benchmarks/recipes.csv", "recipes/README.md"
START, END = "<!-- runs -->", "<!-- /runs -->"
COLUMNS = (
    *("recipe", "scale", "seconds", "memory_gb", "exit", "model", "score", "published", "this run", "low", "high"),
    *("split", "note", "differences", "threads", "commit"),
)


def watched(command: list[str], **options: object) -> tuple[int, float, float]:
    """Exit status, seconds and peak memory in GB of a command and all the processes that it starts."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, **options)
    while process.poll() is None:
        held = 0
        try:
            for one in (top := psutil.Process(process.pid), *top.children(recursive=True)):
                try:
                    held += one.memory_full_info().pss
                except psutil.Error:
                    continue  # it has just ended
        except psutil.Error:
            break
        peak = max(peak, held)
        time.sleep(2)  # the kernel walks through all pages for one look
    return process.wait(), time.perf_counter() - start, peak / 1e9


def figures(rows: pd.DataFrame, column: str) -> str:
    """`model score figure (interval)` of each model's first score that has one in `column`; speed comes last."""
    cells, slow = [], rows["score"].str.contains("second|latency", na=False)
    for row in pd.concat([rows[~slow], rows[slow]]).dropna(subset=[column]).drop_duplicates("model").to_dict("records"):
        text = f"{row[column]:.3f}"
        if column == "this run" and pd.notna(row["low"]):
            text += f" ({row['low']:.3f} to {row['high']:.3f})"
        cells.append(f"{row['model']} {row['score'].replace('_', ' ')} {text}")
    return "<br>".join(cells) or "none"


def markdown(table: pd.DataFrame) -> str:
    """One line a recipe and scale."""
    lines = ["| recipe | seconds | GB | published | here | what is different |", "|---|--:|--:|---|---|---|"]
    for (name, scale), rows in table.groupby(["recipe", "scale"], sort=False):
        first = rows.iloc[0]
        cells = [
            f"{name}, {scale}" if scale else name,
            f"{first['seconds']:.0f}",
            "" if pd.isna(first["memory_gb"]) else f"{first['memory_gb']:.2f}",
        ]
        cells += [figures(rows, "published"), figures(rows, "this run"), "; ".join(json.loads(first["differences"]))]
        lines.append(f"| {' | '.join(cells if first['exit'] == 0 else [*cells[:3], '', 'failed', ''])} |")
    return "\n".join(lines)


def compared_scores(folder: Path) -> pd.DataFrame:
    """The source's figures beside the run's, then the accuracy of the other trained models."""
    table = (
        pd.read_csv(folder / PUBLISHED_TABLE) if (folder / PUBLISHED_TABLE).exists() else pd.DataFrame({"model": []})
    )
    board = pd.read_csv(folder / "reports" / "leaderboard.csv")
    board = board[board["role"].isin(["teacher", "student", "control"]) & ~board["model"].isin(table["model"])]
    board = board.rename(columns={"accuracy": "this run", "accuracy_low": "low", "accuracy_high": "high"})
    others = board[["model", "this run", "low", "high"]].assign(score="accuracy")
    return pd.concat([part for part in (table, others) if len(part)], ignore_index=True)


def keep(root: Path, rows: pd.DataFrame) -> None:
    """Put the rows of one recipe and scale into the table, in place of those it had, and renew the page."""
    (measured,) = set(zip(rows["recipe"], rows["scale"], strict=True))
    if (root / TABLE).exists():
        before = pd.read_csv(root / TABLE, dtype={"scale": str, "commit": str}).fillna({"scale": ""})
        others = [key != measured for key in zip(before["recipe"], before["scale"], strict=True)]
        rows = pd.concat([part for part in (before[others], rows) if len(part)], ignore_index=True)
    table = rows.reindex(columns=list(COLUMNS)).sort_values(["recipe", "scale"], kind="stable", ignore_index=True)
    with atomic_write(root / TABLE) as path:
        table.to_csv(path, index=False)
    page = (root / PAGE).read_text(encoding="utf-8")
    page = re.sub(rf"({START}\n).*?({END})", lambda m: f"{m[1]}{markdown(table)}\n{m[2]}", page, flags=re.S)
    with atomic_write(root / PAGE) as path:
        path.write_text(page, encoding="utf-8")
    write_figure(root)


def main(names: list[str]) -> None:
    root = repository_root()
    recipes = sorted(path.stem for path in (root / "recipes").glob("*.yaml"))
    names = names or [f"{name}:small" for name in recipes if "scale" in read_yaml(root / f"recipes/{name}.yaml")]
    code = commit(root)
    for key in names:
        name, _, scale = key.partition(":")
        folder = root / ".cache" / "recipes" / (f"{name}-{scale}" if scale else name)
        shutil.rmtree(folder, ignore_errors=True)
        experiment = load_recipe(root, name, scale or None)
        for model, spec in experiment["models"].items():  # fetching is no part of it
            fetch_model(model, validate_section(ModelConfig, spec, f"recipes/{name}.yaml"))
        print(f"{key} ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "distillery", "recipe", name, *(["--scale", scale] if scale else [])]
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            status, seconds, memory = watched(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        facts = {"recipe": name, "scale": scale, "seconds": round(seconds), "memory_gb": round(memory, 2)}
        facts |= {"exit": status, "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))}
        scales = read_yaml(root / f"recipes/{name}.yaml").get("scale", {})
        section = (scales[scale] if scale else experiment).get("recipe", {}).get("differences", {})
        differences = [text for text in section.values() if text]
        facts |= {"differences": json.dumps(differences, ensure_ascii=False), "commit": code}
        rows = compared_scores(folder).assign(**facts) if status == 0 else pd.DataFrame([facts])
        keep(root, rows)
        print(f"{key}: exit {status}, {seconds:.0f} s, {memory:.2f} GB", flush=True)
        print(rows.reindex(columns=list(COLUMNS[5:11])).round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
