"""Common sense and word problems on samples of public benchmarks, beside the floor that the options alone give.

    PYTHONPATH=src python benchmarks/real_samples.py FOLDER [--domain commonsense | math] [--rows N] [--steps N]

FOLDER holds `winogrande/test.json` and `socialiqa/test.json` (the public validation rows as prompts, of LLM-Adapters)
and `aqua-rat/dev.json` and `aqua-rat/test.json`. They are read where they lie and are no part of this repository. The
experiments stand beside this file, in `real_samples/`: Qwen2.5-Coder-1.5B, prompted, teaches the 0.5B, and a student
of as many steps reads the options without their question. Training on rows of these benchmarks is no way to compare
with published scores: the split is this script's own.

Runs in `.cache/recipes/real-samples-<domain>`; a stopped run goes on. Prints the leaderboard's lines.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from distillery.errors import UserError
from distillery.files import Paths, atomic_write, read_yaml, repository_root
from distillery.pipeline.recipe import merge_overlay, prepare_folder, run_recipe

DOMAINS = ("commonsense", "math")
QUESTION = re.compile(r"^Please choose the correct answer to [^:]*: (.*?)\s+(?:Option|Answer)1: ", re.DOTALL)
OPTION = re.compile(r"(?:Option|Answer)(\d): (.*?)(?=\s+(?:Option|Answer)\d: |\s+Answer format: )", re.DOTALL)
NO_QUESTION = "(no question)"  # in place of the text, for the floor


def adapter_rows(path: Path, group: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """Rows of a file of LLM-Adapters: text, options, answer from 1, and the group that `group` finds in the text.

    Raises UserError for a row of another form.
    """
    for number, record in enumerate(json.loads(path.read_text(encoding="utf-8")), 1):
        prompt, answer = record["instruction"], re.search(r"(\d)\s*$", record["output"])
        question = QUESTION.search(prompt)
        options = [text for _, text in OPTION.findall(prompt)]
        if not question or len(options) < 2 or not answer:
            raise UserError(f"{path}, row {number}: not a question with options, but {prompt!r:.80}")
        text = question[1]
        match = group.search(text)
        key = match[0] if match else text
        yield {"id": f"r{number}", "text": text, "options": options, "answer": int(answer[1]), "group": key}


def aqua_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of AQuA-RAT: text, options and the letter of the right one."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        row = {"text": record["question"], "options": record["options"], "answer": record["correct"]}
        yield {"id": f"{path.stem}{number}", **row, "group": record["question"]}


def corpus_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The word problems of this project, in the form of AQuA-RAT."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        options = [f"{chr(65 + k)}){option}" for k, option in enumerate(record["options"])]
        row = {"text": record["question"], "options": options, "answer": chr(65 + record["answer"])}
        yield {"id": record["id"], **row, "group": record["question"]}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """`rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_samples(domain: str, data: Path, root: Path, folder: Path) -> None:
    """The files that the experiment of `domain` reads, under `folder`; those with `-options` have no question."""
    if domain == "commonsense":
        # twins of Winogrande differ in one word behind their beginning; questions of Social IQA share their situation
        files = {
            "winogrande": adapter_rows(data / "winogrande/test.json", re.compile(r"^(?:\S+\s+){1,6}")),
            "siqa": adapter_rows(data / "socialiqa/test.json", re.compile(r"^.*[.!?](?=\s)")),
        }
    else:
        own = corpus_rows(root / "data/corpora/math.jsonl")
        files = {
            "aqua-train": [*aqua_rows(data / "aqua-rat/dev.json"), *own],
            "aqua-test": aqua_rows(data / "aqua-rat/test.json"),
        }
    for name, rows in files.items():
        rows, (benchmark, dash, part) = list(rows), name.partition("-")
        write_rows(folder / f"{name}.jsonl", rows)
        write_rows(folder / f"{benchmark}-options{dash}{part}.jsonl", [row | {"text": NO_QUESTION} for row in rows])


def experiment(domain: str, root: Path, rows: int | None, steps: int | None) -> dict[str, Any]:
    """The params of `domain`, with the models of recipes/qwen-gkd.yaml; `rows` a source and `steps` a phase at most."""
    raw = read_yaml(Path(__file__).with_suffix("") / f"{domain}.yaml")
    models = read_yaml(root / "recipes/qwen-gkd.yaml")["models"]
    raw["models"] = {name: models[name] for name in ("qwen-1.5b", "qwen-0.5b")}
    if rows:
        raw = merge_overlay(raw, {"data": {name: {"limit": rows} for name in raw["data"]}})
    for spec in raw["students"].values() if steps else ():
        spec["phases"] = [phase | {"steps": min(steps, phase["steps"])} for phase in spec["phases"]]
    return raw


def run(domain: str, data: Path, rows: int | None, steps: int | None) -> None:
    """Run the experiment of `domain` and print its leaderboard."""
    root = repository_root()
    folder = Paths(root).cache / "recipes" / f"real-samples-{domain}"
    write_samples(domain, data, root, folder / "data/samples")
    prepare_folder(root, experiment(domain, root, rows, steps), folder, f"real-samples-{domain}")
    if status := run_recipe(folder):
        sys.exit(status)
    board = pd.read_csv(folder / "reports/leaderboard.csv")
    print(f"{domain}:")
    for _, line in board.iterrows():
        scores = f"{line['accuracy']:6.1%} ({line['accuracy_low']:.1%} to {line['accuracy_high']:.1%})"
        gain = ""
        if isinstance(line.get("versus"), str):
            low, mean, high = (100 * line[f"difference{end}"] for end in ("_low", "", "_high"))
            gain = f"   {mean:+.1f} points ({low:+.1f} to {high:+.1f}) over {line['versus']}: {line['verdict']}"
        commonest = f"   commonest answer {line['commonest_answer']:.1%}"
        print(f"  {line['source']:14} {line['model']:26} {scores}{commonest}{gain}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the samples")
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--rows", type=int, help="at most so many rows of each source")
    parser.add_argument("--steps", type=int, help="at most so many optimizer steps a phase")
    settings = parser.parse_args()
    for domain in [settings.domain] if settings.domain else DOMAINS:
        run(domain, settings.data, settings.rows, settings.steps)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
