"""A teacher behind an endpoint in the tokens of a student: the likeliest tokens that it returned, and the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import PhaseConfig
from distillery.errors import UserError
from distillery.files import atomic_write
from distillery.models.label_model import Completion, LabelModel
from distillery.models.token_strings import TokenStrings
from distillery.training.completions import row_completions
from distillery.training.kept_tokens import id_type
from distillery.training.processes import first_process_first
from distillery.training.rows import TrainingRows
from distillery.training.teacher_outputs import TeacherOutputs, teacher_outputs_key

MAX_LOST_MASS = 0.1  # of the probability, on tokens that the student lacks: above it the vocabularies are two
MAX_LOST_ROWS = 0.5  # whose own tokens the student lacks
LOWEST_LOGPROB = -6e4  # float16 goes down to -65,504

RowKey = tuple[str, str]  # split_ref and id


@dataclass
class MappedTokens:
    """A completion in the tokens of a student.

    ids: [m]. alternatives: [m], log-probabilities by id. lost: [m], the probability that the endpoint returned for
    tokens that the student lacks.
    """

    ids: list[int]
    alternatives: list[dict[int, float]]
    lost: list[float]


def map_tokens(tokens: Sequence[Sequence[Any]], strings: TokenStrings) -> MappedTokens | None:
    """`tokens` [m] of [token, logprob, alternatives] in the vocabulary `strings`; None where it lacks one of them.

    Alternatives that are one token of the student add up.
    """
    mapped = MappedTokens([], [], [])
    for token, _, alternatives in tokens:
        if not token and len(mapped.ids) + 1 == len(tokens):
            break  # an end token that the server leaves empty
        token_id = strings.find(token)
        if token_id is None:
            return None
        logprobs: dict[int, float] = {}
        lost = 0.0
        for other, logprob in alternatives:
            other_id = token_id if other == token else strings.find(other)
            if other_id is None:
                lost += math.exp(logprob)
            else:
                logprobs[other_id] = float(np.logaddexp(logprobs.get(other_id, -math.inf), logprob))
        mapped.ids.append(token_id)
        mapped.alternatives.append(logprobs)
        mapped.lost.append(lost)
    return mapped


@dataclass
class ServedTeacher:
    """The teacher `name`, whose token log-probabilities the stage `teach` has stored in the file `path`.

    identity: everything that decides them. generates: whether they are those of its own answers, or of given tokens.
    """

    name: str
    path: Path
    identity: Any
    cache_dir: Path
    generates: bool
    _mapped: list[Any] = field(default_factory=list)  # the last tokenizer, and the completions in its tokens

    def mapped(self, student: LabelModel) -> dict[RowKey, dict[str, MappedTokens]]:
        """The completions by row and part, in the tokens of `student`.

        Raises UserError when the file is not there, or the vocabularies are not one.
        """
        if not self._mapped or self._mapped[0] is not student.tokenizer:
            self._mapped = [student.tokenizer, self._map(TokenStrings(student.tokenizer))]
        return self._mapped[1]

    def _map(self, strings: TokenStrings) -> dict[RowKey, dict[str, MappedTokens]]:
        if not self.path.exists():
            raise UserError(f"{self.path}: not there yet; run `dvc repro` first")
        frame, rows, lacking = pd.read_parquet(self.path), {}, {}
        for source, split, row_id, part, tokens in frame.itertuples(index=False):
            row_key = (f"{source}/{split}", row_id)
            steps = json.loads(tokens)
            mapped = map_tokens(steps, strings)
            if mapped is None:
                lacking[row_key] = next(token for token, *_ in steps if strings.find(token) is None)
            elif mapped.ids:
                rows.setdefault(row_key, {})[part] = mapped
        for row_key in lacking:
            rows.pop(row_key, None)
        self._report(rows, lacking)
        return rows

    def _report(self, rows: dict[RowKey, dict[str, MappedTokens]], lacking: dict[RowKey, str]) -> None:
        """Print what the student's vocabulary lacks. Raises UserError when that is too much."""
        lost = [share for parts in rows.values() for mapped in parts.values() for share in mapped.lost]
        mean = float(np.mean(lost)) if lost else 0.0
        example = next(iter(lacking.items()), None)
        words = f", such as {example[1]!r} of row `{example[0][1]}`" if example else ""
        n_rows = len(rows) + len(lacking)
        text = f"teachers.{self.name}: {len(lacking)} of {n_rows} rows have tokens that the student's vocabulary "
        text += f"lacks{words}; elsewhere {100 * mean:.2f} % of the probability is on such tokens"
        if not rows or mean > MAX_LOST_MASS or len(lacking) > MAX_LOST_ROWS * n_rows:
            raise UserError(f"{text}: use a student of the teacher's family, or `space: labels`")
        print(f"{text}, and counts as the rest", flush=True)


def rows_with_tokens(
    frame: pd.DataFrame, phase: PhaseConfig, teachers: dict[str, Any], student: LabelModel
) -> pd.DataFrame:
    """`frame` (split_ref, id, …) without the rows of `phase` for which a served teacher of it has no tokens."""
    for name in phase.teachers if phase.needs_token_logprobs else []:
        if isinstance(teacher := teachers.get(name), ServedTeacher):
            known = teacher.mapped(student)
            has_tokens = [key in known for key in zip(frame["split_ref"], frame["id"], strict=True)]
            outside = ~frame["split_ref"].isin(phase.data)
            frame = frame[np.array(has_tokens) | outside].reset_index(drop=True)
    return frame


def served_outputs(
    teacher: ServedTeacher, rows: TrainingRows, student: LabelModel, top_k: int
) -> tuple[TeacherOutputs, list[Completion] | None]:
    """What `teacher` has for `rows` in the form of a local teacher's outputs, and its own answers to them, if it has.

    Raises UserError when it scored other tokens than those of a row's label or rationale.
    """
    mapped = teacher.mapped(student)
    if teacher.generates:
        chosen = [[mapped[key]["generated"]] for key in rows.ids]
    else:
        chosen = [
            _parts_of_row(teacher.name, key, mapped[key], completions)
            for key, completions in zip(rows.ids, row_completions(student, rows), strict=True)
        ]
    key = teacher_outputs_key(teacher.identity, rows.ids, [[one.ids for one in row] for row in chosen], top_k)
    folder = teacher.cache_dir / key
    with first_process_first():
        if not (folder / "done.json").exists():
            with atomic_write(folder) as scratch:
                scratch.mkdir(parents=True)
                for name, array in top_k_arrays(chosen, top_k).items():
                    np.save(scratch / f"{name}.npy", array)
                (scratch / "done.json").write_text(json.dumps({"rows": len(rows), "top_k": top_k}))
    own = [(row[0].ids, 0) for row in chosen] if teacher.generates else None
    return TeacherOutputs(folder), own


def _parts_of_row(
    name: str, key: RowKey, parts: dict[str, MappedTokens], completions: Sequence[Completion]
) -> list[MappedTokens]:
    """The scores of the `completions` of the row `key`: its label, then its rationale if it has one."""
    chosen = []
    for part, completion in zip(("answer", "rationale"), completions, strict=False):
        tokens = completion[0][completion[1] :]
        if part not in parts or parts[part].ids != tokens:
            raise UserError(
                f"teachers.{name}: row `{key[1]}` of {key[0]}: the endpoint scored another {part} than the student "
                f"learns, in other tokens or with another text; it needs a student of its family with `prompt: chat`"
            )
        chosen.append(parts[part])
    return chosen


def top_k_arrays(rows: Sequence[Sequence[MappedTokens]], top_k: int) -> dict[str, np.ndarray]:
    """The arrays of :class:`TeacherOutputs` for `rows` of completions, with the `top_k` likeliest tokens at each token.

    Where fewer are known, the rest of the places repeat a token with probability 0. The tail is what 1 lacks.
    """
    lengths = [[len(one.ids) for one in row] for row in rows]
    steps = [step for row in rows for one in row for step in one.alternatives]
    values = np.full((len(steps), top_k), LOWEST_LOGPROB, dtype=np.float16)
    size = 1 + max((token for step in steps for token in step), default=0)
    indices, tail = np.zeros((len(steps), top_k), dtype=id_type(size)), np.zeros(len(steps), dtype=np.float32)
    for i, step in enumerate(steps):
        best = sorted(step.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        indices[i] = best[0][0]
        indices[i, : len(best)] = [token for token, _ in best]
        values[i, : len(best)] = [max(logprob, LOWEST_LOGPROB) for _, logprob in best]
        rest = 1 - math.fsum(math.exp(logprob) for _, logprob in best)
        tail[i] = max(math.log(rest), LOWEST_LOGPROB) if rest > 0 else LOWEST_LOGPROB
    return {
        "token_offsets": np.cumsum([0, *map(sum, lengths)]),
        "completion_lengths": np.array([length for row in lengths for length in row]),
        "token_logprobs": values,
        "token_indices": indices,
        "tail_logprobs": tail,
    }
