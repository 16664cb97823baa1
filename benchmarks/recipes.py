"""Every published system at small scale, one after the other: does it run to its end, how long, how much memory?

    PYTHONPATH=src python benchmarks/recipes.py [recipe or recipe:scale ...]

Without names: each recipe that has a scale `small`. Runs what `make recipe NAME=... SCALE=small` runs, from nothing but
fetched models: earlier results of that recipe are deleted first. Memory is the most that its processes held together
(proportional set size). Writes `benchmarks/recipes.csv` after each: one row for every published figure, beside this
run's with its interval; rows of recipes that were not named stay.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import psutil

from distillery import models, params, recipe

TABLE = "benchmarks/recipes.csv"


def watched(command: list[str], **how: object) -> tuple[int, float, float]:
    """Exit status, seconds and peak memory in GB of a command and all the processes that it starts."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, **how)
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
        time.sleep(0.5)
    return process.wait(), time.perf_counter() - start, peak / 1e9


def main(names: list[str]) -> None:
    root = params.root()
    found = sorted(path.stem for path in (root / "recipes").glob("*.yaml"))
    names = names or [f"{name}:small" for name in found if "scale" in params.read_yaml(root / f"recipes/{name}.yaml")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    for asked in names:
        name, _, scale = asked.partition(":")
        folder = root / ".cache" / "recipes" / (f"{name}-{scale}" if scale else name)
        shutil.rmtree(folder, ignore_errors=True)
        experiment = recipe.experiment(root, name, scale or None)
        for model, spec in experiment["models"].items():  # fetching is no part of it
            models.fetch(model, params.validate(params.Model, spec, f"recipes/{name}.yaml"))
        command = [sys.executable, "-m", "distillery.recipe", name, *(["--scale", scale] if scale else [])]
        print(f"{asked} ...", flush=True)
        log = root / ".cache" / "recipes" / f"{name}-{scale}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            status, seconds, memory = watched(command, cwd=root, stdout=file, stderr=subprocess.STDOUT)
        line = {"recipe": name, "scale": scale, "seconds": round(seconds), "memory_gb": round(memory, 2)}
        line |= {"exit": status, "cores": os.cpu_count(), "commit": commit.strip()}
        rows = pd.DataFrame([{}])
        if status == 0 and (folder / recipe.TABLE).exists():
            rows = pd.read_csv(folder / recipe.TABLE)
        said = params.load(folder / "params.yaml").recipe
        rows = rows.assign(**line, differences=json.dumps(said.differences if said else [], ensure_ascii=False))
        before = pd.read_csv(root / TABLE) if (root / TABLE).exists() else pd.DataFrame(columns=["recipe", "scale"])
        before = before[(before["recipe"] != name) | (before["scale"].fillna("") != scale)]
        parts = [part for part in (before, rows) if len(part)]
        table = pd.concat(parts, ignore_index=True).sort_values(["recipe", "scale"], kind="stable")
        columns = ["recipe", "scale", "seconds", "memory_gb", "exit", "model", "score", "published", "this run", "low"]
        with params.atomic(root / TABLE) as path:
            table.reindex(columns=[*columns, "high", "note", "differences", "cores", "commit"]).to_csv(
                path, index=False
            )
        print(f"{asked}: exit {status}, {seconds:.0f} s, {memory:.2f} GB", flush=True)
        shown = [column for column in ("model", "score", "published", "this run", "low", "high") if column in rows]
        print(rows[shown].round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except params.UserError as mistake:
        sys.exit(f"error: {mistake}")
