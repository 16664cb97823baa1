"""Log-probabilities of tokens from an endpoint, kept for the students that it teaches.

`data/teacher/<teacher>/tokens.parquet` has a row for each completion: source, split, id, `part` (`generated`, `answer`
or `rationale`) and `tokens`, JSON as :func:`distillery.teachers.api.responses.read_completion` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_tokenizer
from distillery.models.token_strings import REPLACEMENT, TokenStrings
from distillery.tasks.schema import Task
from distillery.teachers.base import open_teacher
from distillery.teachers.signals import KEYS

if TYPE_CHECKING:  # the API client is not needed by teachers of other kinds
    from distillery.teachers.api.teacher import ApiTeacher, GivenTokens

TRAINED_SPLITS = ("train", "pool")
COLUMNS = [*KEYS, "part", "tokens"]


def collect_tokens(
    root: Path,
    name: str,
    params: Params,
    task: Task,
    rows: pd.DataFrame,
    signals: pd.DataFrame,
    prompting: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """The log-probabilities of tokens that the endpoint `name` gives for `rows` (train and pool), a completion a row.

    rows: as :func:`distillery.teachers.base.gather_rows` returns them. signals: the labels and rationales that it gave
    for them. prompting: see :func:`open_teacher`. A row without a label has no tokens.
    Raises UserError as :meth:`Endpoint.query` does, and when the server has another vocabulary than `tokenizer`.
    """
    teacher = cast("ApiTeacher", open_teacher(root, name, params, task, prompting=prompting))
    merged = rows[[*KEYS, "text", "group", "label"]].rename(columns={"label": "gold"})
    merged = merged.merge(signals[[*KEYS, "label", "rationale", "contradicts"]], on=KEYS, how="left", validate="1:1")
    if params.teachers[name].api.scores_given_tokens:
        return _score_given(params, name, task, teacher, merged)
    answers = teacher.own_tokens(merged)  # of all rows, as they were labelled: so none is requested again
    wanted = merged["split"].isin(TRAINED_SPLITS) & merged["label"].notna()
    table = merged.assign(part="generated", tokens=[answer and json.dumps(answer) for answer in answers])
    return table[wanted & table["tokens"].notna()][COLUMNS].reset_index(drop=True)


def _score_given(params: Params, name: str, task: Task, teacher: ApiTeacher, rows: pd.DataFrame) -> pd.DataFrame:
    """The scores of each row's label (the gold one, in the pool the teacher's) and of its rationale."""
    from distillery.teachers.api.teacher import GivenTokens

    spec, origin = params.teachers[name], params.models[params.teachers[name].api.tokenizer]
    tokenizer = load_tokenizer(fetch_model(spec.api.tokenizer, origin), origin.trust_remote_code)
    # without weights: it only writes prompts and completions
    writer = LabelModel(cast("Any", None), tokenizer, task, "causal", few_shot=spec.few_shot)
    rows = rows[rows["split"].isin(TRAINED_SPLITS)].reset_index(drop=True)
    labels = rows["label"].where(rows["split"] == "pool", rows["gold"])
    parts, given = [], []
    for i in np.flatnonzero(labels.notna()):
        row, text = rows.loc[i], rows["text"][i]
        agrees = isinstance(row["rationale"], str) and not row["contradicts"]
        completions = writer.row_completions(task.names.index(labels[i]), row["rationale"] if agrees else None)
        solved = (
            None
            if teacher.examples is None
            else teacher.examples.at(teacher.examples.choose([text], [row["group"]])[0])
        )
        prompt = writer.prompt_for(text, spec.few_shot if solved is None else solved)
        for part, (tokens, skip) in zip(("answer", "rationale"), completions, strict=False):
            before = [*tokenizer(prompt, add_special_tokens=False)["input_ids"], *tokens[:skip]]
            texts = prompt + tokenizer.decode(tokens[:skip]), tokenizer.decode(tokens[skip:])
            given.append(GivenTokens(row["id"], before, tokens[skip:], *texts))
            parts.append((*(row[key] for key in KEYS), part))
    check = vocabulary_check(name, spec.api.tokenizer, tokenizer)
    tokens = []
    for one, answer in zip(given, teacher.score_tokens(given), strict=True):
        if scored := answer.metadata.get("tokens"):
            check(one, answer.metadata.get("decoded") or [])
        tokens.append(scored and json.dumps(scored))
    table = pd.DataFrame(parts, columns=[*KEYS, "part"]).assign(tokens=tokens)
    return table[table["tokens"].notna()].reset_index(drop=True)


def vocabulary_check(name: str, model: str, tokenizer: Any) -> Callable[[GivenTokens, Sequence[str | None]], None]:
    """A function that raises UserError when an endpoint writes the tokens that it was given in other words.

    name: of the teacher. model: whose `tokenizer` gave the tokens.
    """
    strings = TokenStrings(tokenizer)

    def check(given: GivenTokens, decoded: Sequence[str | None]) -> None:
        for token_id, text in zip(given.completion, decoded, strict=False):
            known = text is None or REPLACEMENT in text or strings.find(text) == token_id
            if not known and text.strip() != tokenizer.decode([token_id]).strip():
                raise UserError(
                    f"params.yaml: teachers.{name}.api.tokenizer: the endpoint has another vocabulary than `{model}`: "
                    f"it reads token {token_id}, {tokenizer.decode([token_id])!r}, as {text!r}"
                )

    return check
