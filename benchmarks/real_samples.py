"""Common sense and word problems on samples of public benchmarks, beside the floor that the options alone give.

    PYTHONPATH=src python benchmarks/real_samples.py FOLDER [--domain commonsense | math] [--rows N] [--steps N] \
        [--without STUDENT]

FOLDER holds `winogrande/test.json` and `socialiqa/test.json` (the public validation rows as prompts, of LLM-Adapters)
and `aqua-rat/dev.json` and `aqua-rat/test.json`. They are read where they lie and are no part of this repository. The
experiments stand beside this file, in `real_samples/`: Qwen2.5-Coder-1.5B, prompted, teaches the 0.5B. The floor is a
student of as many steps that learns, and is scored, on the options without their question: on the same rows, so that
the differences are paired. Training on rows of these benchmarks is no way to compare with published scores: the split
is this script's own.

Runs in `.cache/recipes/real-samples-<domain>`; a stopped run goes on. Prints the scores and the differences.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.data.splitting import split_groups
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, read_yaml, repository_root
from distillery.metrics.significance import paired_difference
from distillery.pipeline.recipe import prepare_folder, run_recipe

DOMAINS = ("commonsense", "math")
SHARES = {"train": 0.5, "validation": 0.1, "test": 0.4}
FLOOR = "options"  # what the names of the sources without questions, and of their students, end with
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


def split_rows(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """About `limit` of `rows` at most, whole random groups, each row with its `split`; the same for the same rows."""
    table = pd.DataFrame(rows)
    groups = np.random.default_rng(0).permutation(table["group"].unique())
    sizes = table["group"].value_counts()[groups]
    table = table[table["group"].isin(groups[sizes.cumsum() - sizes < (limit or len(rows))])]
    labels = table["answer"].astype(str)
    splits = split_groups(table["group"], labels, sorted(labels.unique()), SHARES, seed=0)
    return table.assign(split=splits).to_dict("records")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """`rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_samples(domain: str, data: Path, root: Path, folder: Path, limit: int | None = None) -> None:
    """The files that the experiment of `domain` reads, under `folder`; those of the floor have no question.

    limit: about so many rows a file at most, but all word problems of the test.
    """
    if domain == "commonsense":
        # twins of Winogrande differ in one word behind their beginning; questions of Social IQA share their situation
        samples = {
            "winogrande": adapter_rows(data / "winogrande/test.json", re.compile(r"^(?:\S+\s+){1,6}")),
            "siqa": adapter_rows(data / "socialiqa/test.json", re.compile(r"^.*[.!?](?=\s)")),
        }
        files = {name: split_rows(list(rows), limit) for name, rows in samples.items()}
    else:
        own = list(corpus_rows(root / "data/corpora/math.jsonl"))
        files = {
            "aqua-train": [*aqua_rows(data / "aqua-rat/dev.json"), *own][:limit],
            "aqua-test": list(aqua_rows(data / "aqua-rat/test.json")),
        }
    for name, rows in files.items():
        benchmark, dash, part = name.partition("-")
        write_rows(folder / f"{name}.jsonl", rows)
        write_rows(folder / f"{benchmark}-{FLOOR}{dash}{part}.jsonl", [row | {"text": NO_QUESTION} for row in rows])


def experiment(domain: str, root: Path, steps: int | None, without: str | None = None) -> dict[str, Any]:
    """The params of `domain`, with the models of recipes/qwen-gkd.yaml; at most `steps` a phase.

    without: the name of a student to leave out. Raises UserError when there is none.
    """
    raw = read_yaml(Path(__file__).with_suffix("") / f"{domain}.yaml")
    models = read_yaml(root / "recipes/qwen-gkd.yaml")["models"]
    raw["models"] = {name: models[name] for name in ("qwen-1.5b", "qwen-0.5b")}
    if without and raw["students"].pop(without, None) is None:
        raise UserError(f"--without: no student `{without}` in {domain}; there are: {', '.join(raw['students'])}")
    for spec in raw["students"].values() if steps else ():
        spec["phases"] = [phase | {"steps": min(steps, phase["steps"])} for phase in spec["phases"]]
    return raw


def test_predictions(folder: Path, params: dict[str, Any]) -> dict[tuple[str, str], pd.DataFrame]:
    """By model and source, the test rows: id, label, prediction."""
    tables = {}
    for name, spec in params["students"].items():
        source = spec["phases"][-1]["data"][0].partition("/")[0]
        table = pd.read_parquet(folder / f"runs/{name}-0/predictions.parquet")
        tables[name, source] = table[table["split"] == "test"][["id", "label", "prediction"]]
    for name, spec in params["teachers"].items():
        signals = pd.read_parquet(folder / f"data/teacher/{name}/signals.parquet")
        for source in spec["data"]:
            rows = signals[(signals["source"] == source) & (signals["split"] == "test")]
            labels = pd.read_parquet(folder / f"data/processed/{source}/test.parquet")[["id", "label"]]
            tables[name, source] = labels.merge(rows[["id", "label"]].rename(columns={"label": "prediction"}), on="id")
    return tables


def print_scores(folder: Path, params: dict[str, Any]) -> None:
    """Accuracy, share of the commonest answer and, on the same rows, the gain over the floor and over the control."""
    tables = test_predictions(folder, params)
    floors = {source: name for name, source in tables if source.endswith(FLOOR) and name not in params["teachers"]}
    gold = {source: name for name, source in tables if name.startswith("gold")}
    print(f"{'source':19} {'model':16} rows  accuracy  commonest answer")
    for (name, source), table in sorted(tables.items(), key=lambda item: (item[0][1], item[0][0])):
        accuracy = (table["label"] == table["prediction"]).mean()
        commonest = table["prediction"].value_counts(normalize=True).iloc[0]
        gains = ""
        for other in (floors.get(f"{source}-{FLOOR}"), gold.get(source)):
            if other and other != name:
                gains += "  " + gain_text(folder, source, table, other, tables)
        print(f"{source:19} {name:16} {len(table):4}  {accuracy:8.1%}  {commonest:16.1%}{gains}")


def gain_text(
    folder: Path, source: str, table: pd.DataFrame, other: str, tables: dict[tuple[str, str], pd.DataFrame]
) -> str:
    """The gain in accuracy of the predictions `table` over the student `other`, in points with its interval."""
    others = next(rows for (name, _), rows in tables.items() if name == other)
    # the same options may have another order there, so it is compared which rows are right
    right, right_there = (
        one.set_index("id").eval("label == prediction").map({True: "right", False: "wrong"}) for one in (table, others)
    )
    ids = right.index.intersection(right_there.index, sort=False)
    groups = pd.read_parquet(folder / f"data/processed/{source}/test.parquet").set_index("id")["group"]
    predictions = (right[ids], right_there[ids])
    gain = paired_difference(["right"] * len(ids), *predictions, ["right", "wrong"], groups[ids])["accuracy"]
    mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) over {other} on {len(ids)} rows"


def run(domain: str, data: Path, limit: int | None, steps: int | None, without: str | None) -> None:
    """Run the experiment of `domain` and print its scores."""
    root = repository_root()
    folder = Paths(root).cache / "recipes" / f"real-samples-{domain}"
    write_samples(domain, data, root, folder / "data/samples", limit)
    params = experiment(domain, root, steps, without)
    prepare_folder(root, params, folder, f"real-samples-{domain}")
    if status := run_recipe(folder, stages=["distill"]):  # its evaluation is printed below
        sys.exit(status)
    print(f"\n{domain}, differences in points of accuracy with 95 % intervals, one seed:\n")
    print_scores(folder, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the samples")
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--rows", type=int, help="at most so many rows of each source")
    parser.add_argument("--steps", type=int, help="at most so many optimizer steps a phase")
    parser.add_argument("--without", help="a student to leave out, such as `large`")
    settings = parser.parse_args()
    for domain in [settings.domain] if settings.domain else DOMAINS:
        run(domain, settings.data, settings.rows, settings.steps, settings.without)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
