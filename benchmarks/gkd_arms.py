"""Does GKD over the vocabulary beat SFT on gold labels and the other controls, with as much tuning for each?

    PYTHONPATH=src python benchmarks/gkd_arms.py [--size small] [--trials 6] [--seeds 3] [--arms ARM]

Students of `recipes/qwen-gkd.yaml`: the 0.5B with adapters in its last 8 layers, taught by the prompted 1.5B. Every arm
takes the same number of optimizer steps of 8 rows. It has 6 settings (`arms.py`); each is tried once, on half of the
training rows for as many steps, and scored on the validation rows. The best one (accuracy, then macro-F1) is trained
with every seed on all training rows, and compared with SFT on gold on the test rows: paired, over groups and seeds.

The teacher scores each label after each text of the pool once, and writes reasons for some of them; both are kept in
`.cache/gkd_arms/`. Its label probabilities are those of `data/answers/`. Each finished trial or run is a line of
`gkd_arms.csv` beside this file, under a key of everything that decides it: a stopped benchmark goes on, and a changed
setting is run anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from arms import ARMS, CONTROL, TEACHER, Phases, Setting
from keep import commit
from kept_teacher import KeptTeacher
from operations import count_operations

from distillery import metrics
from distillery.config.load import validate_section
from distillery.config.schema import ModelConfig, SourceConfig, StudentConfig, TeacherConfig
from distillery.data.prepare import prepare_source
from distillery.errors import UserError
from distillery.files import atomic_write, repository_root, write_json
from distillery.fingerprint import code_digest
from distillery.models.fetch import fetch_model
from distillery.models.packed.frozen_layers import SharedStates
from distillery.models.precision import resolve_dtype
from distillery.models.predictions import predict_rows, score_predictions
from distillery.pipeline.recipe import load_recipe
from distillery.tasks.parsing import first_sentence
from distillery.tasks.schema import Task, load_task
from distillery.teachers.calibration import LabelPrior
from distillery.teachers.rationales import contradicts, rationale_prompts
from distillery.training.keys import result_key
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import phase_rows
from distillery.training.run import run_key, train_phase
from distillery.training.student import build_student

STUDENT = "sft-gold"  # of the recipe: its model and its adapters are those of every arm
RECIPE, ANSWERS = "recipes/qwen-gkd.yaml", "data/answers/finance-qwen.jsonl"
SIZES = {
    "quick": {"limit": 40, "steps": 4, "reasons": 2},
    "small": {"limit": 500, "steps": 150, "reasons": 24},  # as the recipe's scale `small`
    "medium": {"limit": 800, "steps": 150, "reasons": 24},  # 260 test rows in place of 162
    "full": {"limit": None, "steps": 300, "reasons": 300},
}
TRIAL_SHARE = 0.5  # of the training rows
COLUMNS = ["key", "size", "kind", "arm", "setting", "seed", "steps", "accuracy", "macro_f1", "seconds", "operations"]
COLUMNS += ["predictions", "threads", "commit"]


@dataclass
class Setup:
    """What all runs share. student: its section without phases. rows: to learn from, with the teacher's signals.

    record: everything but phases, seed and rows that decides a run. shared: states of the student's frozen layers, by
    arm, number of the phase and of its rows.
    """

    task: Task
    student: dict[str, Any]
    origin: ModelConfig
    model_folder: Path
    rows: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    teachers: dict[str, OpenableTeacher]
    record: dict[str, Any]
    shared: dict[Any, SharedStates] = field(default_factory=dict)

    @property
    def trial_rows(self) -> pd.DataFrame:
        """:data:`TRIAL_SHARE` of the rows of each split."""
        drawn = self.rows.groupby("split_ref", sort=False).sample(frac=TRIAL_SHARE, random_state=0)
        return drawn.sort_index().reset_index(drop=True)


def kept_probabilities(path: Path, task: Task) -> dict[str, list[float]]:
    """Row id -> the teacher's probabilities in the order of the task's labels."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["id"]: [line["probabilities"][name] for name in task.names] for line in lines}


def reasons_of(teacher: KeptTeacher, rows: pd.DataFrame, file: Path, count: int, max_new_tokens: int) -> list[Any]:
    """[n]: the teacher's reason for the label of some of `rows` (text, teacher_label), else None; kept in `file`.

    `count` rows are drawn; a reason that names another label is left out.
    """
    drawn = sorted(np.random.default_rng(0).permutation(len(rows))[:count].tolist())
    if not file.exists():
        prompts = rationale_prompts(
            teacher.task, *(rows[key].iloc[drawn].tolist() for key in ("text", "teacher_label"))
        )
        answers = teacher.model_at_work.generate(prompts, max_new_tokens=max_new_tokens)
        write_json(file, [first_sentence(answer) for answer in answers])
        print(f"teacher: {len(answers)} reasons written", flush=True)
    reasons = dict(zip(drawn, json.loads(file.read_text(encoding="utf-8")), strict=True))
    labels = rows["teacher_label"].tolist()
    return [
        reason if reason and not contradicts(teacher.task, reason, labels[i]) else None
        for i, reason in ((i, reasons.get(i)) for i in range(len(rows)))
    ]


def teacher_rows(root: Path, recipe: dict[str, Any], answers: str = ANSWERS) -> tuple[Task, dict[str, pd.DataFrame]]:
    """The task of `recipe` and the rows of each `source/split` with the teacher's calibrated probabilities.

    answers: the file of its probabilities. They are divided by their mean over the pool, whose gold labels are hidden.
    """
    source = validate_section(SourceConfig, recipe["data"]["finance"], RECIPE)
    task = load_task(source.task, root / "tasks")
    prepared = prepare_source("finance", source, task, root)
    rows = prepared.rows.assign(split_ref=[f"finance/{split}" for split in prepared.split], rationale=None)
    probabilities = kept_probabilities(root / answers, task)
    prior = np.mean([probabilities[row_id] for row_id in rows["id"][rows["split_ref"] == "finance/pool"]], 0)
    predicted = LabelPrior(prior).apply(np.array([probabilities[row_id] for row_id in rows["id"]]))
    rows[f"probabilities_{TEACHER}"] = list(predicted)
    rows["teacher_label"] = [task.names[i] for i in predicted.argmax(-1)]
    splits = {ref: part.reset_index(drop=True) for ref, part in rows.groupby("split_ref")}
    return task, splits | {"finance/pool": splits["finance/pool"].assign(label=None)}


def build_setup(
    recipe: dict[str, Any], task: Task, splits: dict[str, pd.DataFrame], folder: Path, reasons: int
) -> Setup:
    """Teacher and student of `recipe`, with the teacher's signals in `folder`; those that are missing are computed.

    splits: see :func:`teacher_rows`. reasons: rows of the pool for which the teacher writes one.
    """
    spec = validate_section(TeacherConfig, recipe["teachers"][TEACHER], RECIPE)
    student = {k: v for k, v in recipe["students"][STUDENT].items() if k not in ("phases", "control")}
    origin, teacher_origin = (
        validate_section(ModelConfig, recipe["models"][name], RECIPE) for name in (student["model"], spec.model)
    )
    identity = {"spec": spec.model_dump(), "model": teacher_origin.model_dump(), "task": task.model_dump()}
    folder = folder / result_key(code_digest("models", "tasks"), identity)
    pool = splits["finance/pool"]
    teacher = KeptTeacher(TEACHER, spec, teacher_origin, task, folder / "tokens")
    teacher.keep_labels(pool["text"].tolist())
    file = folder / f"reasons-{result_key('', pool['id'].tolist(), pool['teacher_label'].tolist(), reasons)}.json"
    pool = pool.assign(rationale=reasons_of(teacher, pool, file, reasons, spec.max_new_tokens))
    opened = OpenableTeacher(lambda _: teacher, identity, teacher.model.config.num_hidden_layers, folder / "outputs")
    return Setup(
        task,
        student,
        origin,
        fetch_model(student["model"], origin),
        rows=pd.concat([splits["finance/train"], pool], ignore_index=True),
        validation=splits["finance/validation"],
        test=splits["finance/test"],
        teachers={TEACHER: opened},
        record={
            "student": student,
            "model": origin.model_dump(),
            "teacher": identity,
            "dtype": resolve_dtype(student.get("dtype", "float32"), "training"),
        },
    )


def train_and_score(
    setup: Setup, phases: Phases, rows: pd.DataFrame, held_out: pd.DataFrame, seed: int, arm: str
) -> dict[str, Any]:
    """Train the student through `phases` and score it on the rows `held_out`."""
    start = time.perf_counter()
    spec = StudentConfig.model_validate(setup.student | {"phases": phases})
    student = build_student(spec, setup.model_folder, setup.task, seed, setup.origin)
    with redirect_stdout(sys.stderr), count_operations() as counter:  # not between the table's lines
        for k, phase in enumerate(spec.phases, 1):
            learned = phase_rows(rows, phase, setup.task.names)
            # not for other rows: those would be computed in other batches, and differ in the last bits
            shared = setup.shared.setdefault((arm, k, len(learned)), SharedStates())
            with tempfile.TemporaryDirectory() as folder:
                train_phase(
                    student,
                    learned,
                    phase,
                    folder=Path(folder),
                    seed=1000 * seed + k,
                    title=f"{arm}, phase {k}",
                    checkpoint_every=phase.most_steps,
                    teachers=setup.teachers,
                    shared=shared,
                )
    predictions = predict_rows(student, held_out)
    scores = score_predictions(predictions, setup.task.names)
    names = list(map(setup.task.names.index, predictions["prediction"]))
    return {
        "steps": sum(phase.most_steps for phase in spec.phases),
        "accuracy": round(scores["accuracy"], 4),
        "macro_f1": round(scores["macro_f1"], 4),
        "seconds": round(time.perf_counter() - start, 1),
        "operations": f"{counter.get_total_flops():.4g}",
        "predictions": json.dumps(names, separators=(",", ":")),
    }


def run(setup: Setup, size: str, kind: str, arm: str, setting: Setting, seed: int, steps: int, table: Path) -> dict:
    """The line of a trial (`kind`: trial, scored on validation rows) or run (on test rows); computed if it is new."""
    rows, held_out = (setup.trial_rows, setup.validation) if kind == "trial" else (setup.rows, setup.test)
    phases = ARMS[arm].phases(setting, steps)
    lines = pd.read_csv(table, dtype={"key": str}) if table.exists() else pd.DataFrame(columns=COLUMNS)
    key = run_key(setup.record, phases, seed, rows.to_csv(), held_out.to_csv())
    known = lines[lines["key"] == key]
    if known.empty:
        record = train_and_score(setup, phases, rows, held_out, seed, arm)
        facts = {"key": key, "size": size, "kind": kind, "arm": arm, "setting": json.dumps(setting), "seed": seed}
        facts |= {"threads": torch.get_num_threads(), "commit": commit(repository_root())}
        known = pd.DataFrame([facts | record], columns=COLUMNS)
        with atomic_write(table) as scratch:
            pd.concat([lines, known] if len(lines) else [known], ignore_index=True).to_csv(scratch, index=False)
    (line,) = known.to_dict("records")
    scores = f"accuracy {line['accuracy']:.3f}, macro-F1 {line['macro_f1']:.3f}"
    cost = f"{line['seconds']:.0f} s, {float(line['operations']):.2e} operations"
    print(f"{kind:>5}, {arm}, seed {seed}, {json.dumps(setting)}: {scores}; {cost}", flush=True)
    return line


def run_arm(setup: Setup, arm: str, size: str, steps: int, trials: int, seeds: int, table: Path) -> list[dict]:
    """The lines of the final runs of `arm`, with the best of its first `trials` settings."""
    tried = [run(setup, size, "trial", arm, setting, 0, steps, table) for setting in ARMS[arm].settings[:trials]]
    best = max(range(trials), key=lambda i: (tried[i]["accuracy"], tried[i]["macro_f1"], -i))
    setting = ARMS[arm].settings[best]
    lines = [run(setup, size, "run", arm, setting, seed, steps, table) for seed in range(seeds)]
    setup.shared.clear()
    return lines


def verdict(difference: dict[str, float]) -> str:
    """What the 95 % interval of a paired difference allows to claim."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "not distinguishable"


def report(lines: pd.DataFrame, test: pd.DataFrame, names: list[str]) -> None:
    """Print the scores of every arm on the `test` rows (label, group, teacher_label), and its difference from SFT."""
    right = (test["teacher_label"] == test["label"]).mean()
    print(f"\n{len(test)} test rows; the teacher's labels are right on {right:.1%} of them")
    predictions = {
        arm: np.array(names, dtype=object)[np.array([json.loads(text) for text in part["predictions"]])]
        for arm, part in lines.sort_values("seed").groupby("arm", sort=False)
    }
    control = predictions.get(CONTROL)
    for arm, predicted in predictions.items():
        part, means = lines[lines["arm"] == arm], metrics.mean_scores(test["label"], predicted, names)
        drawn = metrics.bootstrap_scores(test["label"], predicted, names, test["group"])
        print(f"\n{arm}: {part['setting'].iloc[0]}, {len(predicted)} seeds, {part['steps'].iloc[0]} steps")
        for score, mean in means.items():
            low, high = metrics.interval(drawn[score])
            print(f"  {score:<9} {mean:.1%} ({low:.1%} to {high:.1%})", end="")
            if arm == CONTROL or control is None:
                print()
                continue
            gap = metrics.paired_difference(test["label"], predicted, control, names, test["group"])[score]
            points = [100 * gap[key] for key in ("mean", "low", "high")]
            print("; minus {}: {:+.1f} points ({:+.1f} to {:+.1f}), {}".format(CONTROL, *points, verdict(gap)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="rows, steps and reasons")
    parser.add_argument("--trials", type=int, choices=range(1, 7), default=6, help="settings that are tried for an arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--report-only", action="store_true", help="print the runs that the table has, train nothing")
    chosen = parser.parse_args(arguments)
    root, size, table = repository_root(), SIZES[chosen.size], Path(__file__).with_suffix(".csv")
    recipe = load_recipe(root, "qwen-gkd", "small")
    recipe["data"]["finance"]["limit"] = size["limit"]
    task, splits = teacher_rows(root, recipe)
    if chosen.report_only:
        lines = pd.read_csv(table)
        lines = lines[(lines["size"] == chosen.size) & (lines["kind"] == "run") & lines["arm"].isin(chosen.arms)]
        lines = lines.drop_duplicates(["arm", "seed"], keep="last")
    else:
        setup = build_setup(recipe, task, splits, root / ".cache" / "gkd_arms", size["reasons"])
        shared = (chosen.size, size["steps"], chosen.trials, chosen.seeds, table)
        lines = pd.DataFrame([line for arm in chosen.arms for line in run_arm(setup, arm, *shared)])
    report(lines, splits["finance/test"], task.names)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
