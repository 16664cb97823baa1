"""How many operations the default run takes, stage by stage, and how many it took before they were reduced.

    PYTHONPATH=src python benchmarks/default_run.py --run FOLDER [--full 02_teach-minilm-l6 ...]

Operations are those of matrix products: 2 · m · n · k for [m, k] @ [k, n]. They depend on shapes alone, neither on the
machine nor on its load. `before` is the commit 7ba1a15 with its own code and params.yaml (the teacher tuned by adapters
in all layers), `after` the last commit that changed code, notebooks, tasks or params.yaml.

Each commit is unpacked into a temporary folder, beside the data of a finished run (`--run`, where `dvc repro` ended;
this repository when not given). There the code cells of its notebooks run one by one, the last stage first: so each
stage reads what the finished run left, not what was counted. A training step or a batch of predictions runs and is
counted until its operations follow exactly from its rows and tokens (:class:`operations.LinearCount`); the others of
its kind are then added without running. So are texts that the finished run generated, by their lengths. Whatever else
a cell computes (states of frozen layers, checks) runs and is counted. `--full` counts stages twice, the second time
with every call run, and prints the difference.

Each counted stage is a line of `default_run.csv` beside this file, under the commit of its code: a stopped benchmark
goes on. `before` needs a run whose teachers have folds; `--commits after` takes its lines as they are. At the end: the
speed of a matrix product on this machine in both precisions, and the seconds of a `dvc repro` that finds nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pandas as pd
import torch
from counted_stage import count_stage
from ruamel.yaml import YAML

from distillery.errors import UserError
from distillery.files import atomic_write, repository_root

BEFORE = "7ba1a15"
RESULTS = ("data/processed", "data/teacher", "data/augmented", "runs")  # of the finished run, that stages read
KINDS = ["training", "prediction", "generation", "other"]
COLUMNS = ["commit", "full", "stage", "part", *KINDS, "seconds"]


def last_change(root: Path) -> str:
    """The last commit that changed what decides the run."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%h", "--", "src", "notebooks", "tasks", "params.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stage_names(folder: Path) -> list[str]:
    """The stages of the experiment in `folder`, as their executed notebooks are called, the last first."""
    params = YAML(typ="safe").load((folder / "params.yaml").read_text(encoding="utf-8"))
    students = [f"04_distill-{student}-{seed}" for student in params["students"] for seed in params["seeds"]]
    teachers = [f"02_teach-{teacher}" for teacher in params["teachers"]]
    return ["05_evaluate", *students, "03_augment", *teachers, *(f"01_data-{source}" for source in params["data"])]


@contextmanager
def unpacked(root: Path, revision: str, finished: Path) -> Iterator[Path]:
    """A temporary folder with the commit `revision` of `root` and the results of the run in `finished`."""
    command = ["git", "-C", str(root), "archive", "--format=zip", revision]  # tarfile's filters are not in every 3.11
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ZipFile(BytesIO(archive)) as opened:
            opened.extractall(folder)
        for name in RESULTS:
            if not (finished / name).exists():
                raise UserError(f"--run {finished}: no {name}; give the folder of a finished run (`dvc repro`)")
            shutil.copytree(finished / name, folder / name)
        (folder / ".cache").mkdir()
        (folder / ".cache/models").symlink_to((finished / ".cache/models").resolve())
        if (finished / ".cache/dtype.json").exists():
            shutil.copy(finished / ".cache/dtype.json", folder / ".cache/dtype.json")
        environment = os.environ | {"PYTHONPATH": str(folder / "src"), "MPLBACKEND": "Agg"}
        for verb in (["strip"], ["inputs", "teachers"], ["inputs", "students"]):
            subprocess.run([sys.executable, "-m", "distillery", *verb], cwd=folder, env=environment, check=True)
        yield folder


def counted(folder: Path, stage: str, finished: Path, full: bool) -> pd.DataFrame:
    """The operations of `stage` in the unpacked `folder`, counted by the code there: a line for each cell with some."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "MPLBACKEND": "Agg"}
    command = [sys.executable, str(Path(__file__).resolve()), "--count", stage, *(["--full"] if full else [])]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "parts.json"
        command += ["--target", str(target), "--run", str(finished.resolve())]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)
        return pd.DataFrame(json.loads(target.read_text()))


def count_commit(root: Path, revision: str, settings: argparse.Namespace, table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the lines of `revision` that it lacks; each is written to the csv as soon as it is known."""
    path = Path(__file__).with_suffix(".csv")
    with unpacked(root, revision, settings.run) as folder:
        for stage in stage_names(folder):
            if settings.only and not any(stage.startswith(name) for name in settings.only):
                continue
            for full in [False, *([True] if stage in (settings.full or []) and revision != BEFORE else [])]:
                known = (table["commit"] == revision) & (table["stage"] == stage) & (table["full"] == full)
                if known.any():
                    continue
                start = time.perf_counter()
                lines = counted(folder, stage, settings.run, full).assign(commit=revision, full=full, stage=stage)
                lines = lines.assign(seconds=round(time.perf_counter() - start, 1))[COLUMNS]
                table = pd.concat([table, lines], ignore_index=True) if len(table) else lines
                with atomic_write(path) as scratch:
                    table.to_csv(scratch, index=False)
    return table


def report(table: pd.DataFrame, revisions: dict[str, str]) -> None:
    """Print the operations of the commits in `revisions` (before, after), a line for each part and stage, in TFLOP."""
    sampled = table[~table["full"].astype(bool)].assign(total=lambda lines: lines[KINDS].sum(axis=1))
    parts = sampled.assign(part=sampled["part"].fillna(""))
    totals = {key: parts[parts["commit"] == revision] for key, revision in revisions.items()}
    stages = sorted(set(parts["stage"]))
    print(f"before: {revisions['before']}, after: {revisions['after']}\n")
    print(f"{'TFLOP of matrix products':<70} {'before':>8} {'after':>8} {'ratio':>6}   after: {', '.join(KINDS)}")

    def line(title: str, before: pd.DataFrame, after: pd.DataFrame) -> None:
        old, new = (f"{lines['total'].sum() / 1e12:.2f}" if len(lines) else "-" for lines in (before, after))
        both = len(before) and after["total"].sum()
        ratio = f"{before['total'].sum() / after['total'].sum():.2f}" if both else ""
        kinds = "  ".join(f"{after[kind].sum() / 1e12:.2f}" for kind in KINDS)
        print(f"{title:<70} {old:>8} {new:>8} {ratio:>6}   {kinds}")

    for stage in stages:
        rows = {key: lines[lines["stage"] == stage] for key, lines in totals.items()}
        line(stage, **rows)
        for part in dict.fromkeys([*rows["after"]["part"], *rows["before"]["part"]]):
            if part:
                line(
                    "  " + textwrap.shorten(part, 68, placeholder=" …"),
                    **{key: lines[lines["part"] == part] for key, lines in rows.items()},
                )
    counted_twice = set.intersection(*(set(lines["stage"]) for lines in totals.values()))
    line("the stages with both", **{key: lines[lines["stage"].isin(counted_twice)] for key, lines in totals.items()})
    line("all stages of each", **totals)
    for (revision, stage), lines in table[table["full"].astype(bool)].groupby(["commit", "stage"]):
        whole = lines[KINDS].to_numpy().sum()
        estimate = sampled[(sampled["commit"] == revision) & (sampled["stage"] == stage)]["total"].sum()
        print(f"{stage}: every call counted {whole / 1e12:.6f} TFLOP, as above {estimate / 1e12:.6f}", end=" ")
        print(f"(difference {abs(whole - estimate) / whole:.1e} of it)")


def seconds() -> float:
    """A clock that other programs of a busy machine do not advance, where one thread computes."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def product_speed(dtype: torch.dtype, rounds: int = 5) -> float:
    """GFLOP/s of a product [512, 576] @ [576, 1536], SmolLM2's widest layer, the fastest of `rounds`."""
    a, b, best = torch.randn(512, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype), float("inf")
    for _ in range(rounds):
        start = seconds()
        for _ in range(20):
            a @ b
        best = min(best, (seconds() - start) / 20)
    return 2 * 512 * 576 * 1536 / best / 1e9


def unchanged_repro(root: Path, finished: Path, rounds: int = 3) -> list[float]:
    """Seconds of `dvc repro` where nothing has changed, in a temporary clone that holds the results of `finished`."""
    with unpacked(root, "HEAD", finished) as folder:
        shutil.copytree(finished / "reports", folder / "reports", dirs_exist_ok=True)
        programs = Path(sys.executable).parent  # DVC and the `python` that stages call
        dvc = str(programs / "dvc")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PYTHONPATH": str(folder / "src"), "PATH": path}
        git = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
        for command in (
            [*git, "init", "-q"],
            [*git, "add", "-A"],
            [*git, "commit", "-q", "-m", "clone"],
            [dvc, "commit", "-f"],
        ):
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        times = []
        for _ in range(rounds + 1):  # the first run notes what the others compare with
            start = time.perf_counter()
            done = subprocess.run([dvc, "repro"], cwd=folder, env=environment, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
            if b"run 0" in done.stdout:
                raise UserError("the unchanged `dvc repro` ran a notebook")
        return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=repository_root())
    parser.add_argument("--after", help="the commit that is `after`; the last change of what decides the run")
    parser.add_argument("--only", nargs="*", help="only count these stages, and print no table")
    parser.add_argument("--commits", nargs="*", default=["before", "after"], help="which of the two are counted")
    parser.add_argument("--full", nargs="*", help="stages that are counted a second time, every call")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.count:
        store = settings.run / ".cache/answers/answers.sqlite"
        parts = count_stage(Path.cwd(), settings.count, store, sampled=settings.full is None)
        settings.target.write_text(json.dumps(parts))
        return
    root, path = repository_root(), Path(__file__).with_suffix(".csv")
    revisions = {"before": BEFORE, "after": settings.after or last_change(root)}
    table = pd.read_csv(path, dtype={"commit": str}) if path.exists() else pd.DataFrame(columns=COLUMNS)
    for name in settings.commits:
        table = count_commit(root, revisions[name], settings, table)
    if settings.only:
        return
    report(table, revisions)
    speeds = ", ".join(f"{product_speed(dtype):.0f} GFLOP/s in {dtype}" for dtype in (torch.float32, torch.bfloat16))
    print(f"\nA product [512, 576] @ [576, 1536] on {torch.get_num_threads()} threads: {speeds}.".replace("torch.", ""))
    times = unchanged_repro(root, settings.run)
    print(f"`dvc repro` with nothing to do: {min(times):.1f} s, the fastest of {len(times)}.")


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
