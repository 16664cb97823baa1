"""Leaks, contaminated teachers and short cuts: what would make the numbers worthless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.data.near_duplicates import SIMILARITY_SLACK, nearest_texts
from distillery.data.storage import read_split
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import Check, ModelResult

ONE_ANSWER_SHARE = 0.95  # a share of one answer above this is no reading of the text


MAX_ANSWER_BIAS = 0.2  # distance of the answers' shares from the true ones


def _training_rows(root: Path, params: Params, source: str) -> dict[str, pd.DataFrame]:
    """Every set of rows that a model tested on `source` may have learned from, or been chosen on: `source/split`."""
    out = {}
    for other in [name for name in params.data if params.data[name].task == params.data[source].task]:
        for split in ("train", "pool", "validation"):
            out[f"{other}/{split}"] = read_split(root / f"data/processed/{other}", split)
        rows = root / f"data/augmented/{other}/rows.parquet"
        if other == params.augment.source and params.augment.per_row and rows.exists():
            out[f"{other}/augmented"] = pd.read_parquet(rows)
    return out


def _learners(params: Params, where: str) -> list[str]:
    """The teachers and students that learn from the rows of `where`."""
    tuned = [name for name, teacher in params.teachers.items() if teacher.finetune and teacher.finetune.on == where]
    trained = [name for name, student in params.students.items() if any(where in p.data for p in student.phases)]
    return list(dict.fromkeys([*tuned, *trained]))


def find_leaks(root: Path, params: Params, source: str, test: pd.DataFrame) -> list[Check]:
    """Test rows of `source` that stand, exactly or nearly, in rows that somebody learned from.

    The files are compared as they lie there now, not as they were when the source was prepared. Exactly: the same
    text, id or group. Nearly: at least `near_duplicate` alike, with digits masked or as written.
    """
    out, looked = [], _training_rows(root, params, source)
    for where, rows in looked.items():
        if rows.empty:
            continue
        same = test["text"].isin(rows["text"])
        if where.split("/")[0] == source:  # ids and groups are names inside one source
            same |= test["id"].isin(rows["id"]) | test["group"].isin(rows["group"])
        texts = test["text"].tolist(), rows["text"].tolist()
        closest = np.maximum(*(nearest_texts(*texts, masked)[0] for masked in (True, False)))
        near = (closest >= params.data[where.split("/")[0]].near_duplicate - SIMILARITY_SLACK) & ~same.to_numpy()
        if same.any() or near.any():
            who = _learners(params, where)
            told = [f"{int(same.sum())} the same"] * bool(same.any()) + [f"{int(near.sum())} nearly"] * bool(near.any())
            text = f"{int(same.sum() + near.sum())} of the {len(test):,} test rows of {source} are also in {where} "
            text += f"({', '.join(told)}), which {', '.join(who) if who else 'choices were made on'}"
            text += f"{' learned from' if who else ''}: every score that hangs on it is too good to be true."
            out.append(Check("leak", False, text, tuple(who)))
    if not out:
        text = f"Not one of the {len(test):,} test rows of {source} is in {', '.join(looked)}, nor is a row that is "
        out.append(Check("leak", True, text + "nearly the same with numbers masked or as written."))
    return out


def find_contamination(root: Path, params: Params, line: ModelResult, tests: dict[str, pd.DataFrame]) -> list[Check]:
    """Whether the teacher of `line` is scored, or teaches, on rows that it has learned the answers of.

    Found by its rows, by the folds that its signals name, by `evaluate.pretrained_on`, and, whatever the files say, by
    its scores: a teacher that does on test rows what it does on rows it was tuned on has seen them.
    """
    spec, test, out = params.teachers[line.key], tests[line.source], []
    known = {who: sources for who, sources in params.evaluate.pretrained_on.items() if who in (spec.model, line.key)}
    if any(line.source in sources for sources in known.values()):
        text = f"{next(iter(known))} had learned from {line.source} before it came here (evaluate.pretrained_on): "
        out.append(Check("contamination", False, f"{text}the scores of {line.name} are no test of it.", (line.name,)))
    if spec.finetune is None:
        if not out:
            text = f"{line.name} was tuned on nothing here; what it learned from before is not known here "
            text += "unless evaluate.pretrained_on says it."
            out.append(Check("contamination", True, text, (line.name,)))
        return out
    on, split = spec.finetune.on.split("/")
    gold = read_split(root / f"data/processed/{on}", split)
    seen = test["text"].isin(gold["text"]) | (test["id"].isin(gold["id"]) if on == line.source else False)
    if seen.any():
        text = f"{line.name} was tuned on {int(seen.sum())} of the {len(test):,} test rows that it is scored on."
        out.append(Check("contamination", False, text, (line.name,)))
    signals = read_result_file(root / f"data/teacher/{line.key}/signals.parquet", root)
    taught = signals[(signals["source"] == on) & (signals["split"] == split)]
    inside = int((taught["fold"] < 0).sum())
    if inside:
        text = f"What {line.name} says of {inside} of the {len(taught)} rows of {spec.finetune.on} comes from a model "
        text += "that was tuned on those very rows: students learn its memory, not its judgement."
        out.append(Check("contamination", False, text, (line.name,)))
    facts = read_result_file(root / f"data/teacher/{line.key}/metrics.json", root)
    held_out = (
        ("train", "of them where a fold left them out") if spec.finetune.folds else ("validation", "of validation")
    )
    scores = [(facts.get(part) or {}).get("accuracy") for part in ("memorised", held_out[0], "test")]
    if None in scores:
        return out
    memorised, unseen, scored = scores
    figures = f"right on {_percent(memorised)} of the rows it was tuned on, on {_percent(unseen)} {held_out[1]}, "
    figures += f"on {_percent(scored)} of the test rows"
    if memorised - unseen >= 0.1 and memorised - scored < (memorised - unseen) / 4:
        text = f"{line.name} is {figures}: it does as well there as on what it has memorised, so it has seen them."
        out.append(Check("contamination", False, text, (line.name,)))
    elif not out:
        out.append(Check("contamination", True, f"{line.name} is {figures}.", (line.name,)))
    return out


def find_shortcut(line: ModelResult, gold: pd.Series) -> Check:
    """Whether `line` has learned to give the commonest answer, or leans on one, rather than to read."""
    true, worst, bias = gold.value_counts(normalize=True), None, -1.0
    for run in line.predictions:
        excess = (pd.Series(run).value_counts() / len(run)).sub(true, fill_value=0)  # unreadable answers are none
        if excess.abs().sum() / 2 > bias:
            worst, bias = excess, float(excess.abs().sum() / 2)

    def share(label: str) -> str:
        said = worst[label] + true.get(label, 0.0)
        return f'"{label}" for {_percent(said)} of the test rows ({_percent(true.get(label, 0.0))} are)'

    over, under = worst.idxmax(), worst.idxmin()
    said = worst[over] + true.get(over, 0.0)
    text = f"{line.name} answers {share(over)}"
    if said > ONE_ANSWER_SHARE and true.get(over, 0.0) < ONE_ANSWER_SHARE - 0.05:
        return Check("shortcut", False, f"{text}: it has learned the commonest answer, not to read.", (line.name,))
    text += f" and {share(under)}" if under != over else ""
    if bias > MAX_ANSWER_BIAS:
        return Check("shortcut", False, f"{text}: it leans.", (line.name,))
    return Check("shortcut", True, f"{text}.", (line.name,))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
