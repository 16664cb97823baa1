"""Which settings should a phase be run with? ``distillery search [--write]`` tries random ones.

They come from `search:` in params.yaml.
Each set is cross-validated on a share of the phase's gold rows, whole groups at a time; validation and test rows are
not touched. Every fold's score is kept when it is known, so that a killed search goes on where it stood. The best set
is written to ``.cache/search/<student>.json`` and, with ``--write``, into the phase in params.yaml, where it is read.
It needs what `dvc repro inputs` writes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML
from sklearn.model_selection import GroupKFold

from distillery.config.load import load_params, validate_section
from distillery.config.schema import ModelConfig, Params, PhaseConfig, SearchConfig
from distillery.errors import UserError
from distillery.files import atomic_write, repository_root
from distillery.models.fetch import fetch_model
from distillery.models.predictions import predict_rows
from distillery.tasks.schema import Task
from distillery.training.rows import phase_rows
from distillery.training.run import run_key, train_phase
from distillery.training.student import build_student


def draw_settings(spec: SearchConfig) -> list[dict[str, Any]]:
    """The settings to try: rates log-uniform between their bounds, everything else one of those listed."""
    rng = np.random.default_rng(spec.seed)
    out = []
    for _ in range(spec.trials):
        chosen: dict[str, Any] = {}
        if spec.learning_rate:
            low, high = np.log(spec.learning_rate)
            chosen["learning_rate"] = float(f"{np.exp(rng.uniform(low, high)):.3g}")
        for key, values in spec.choices.items():
            chosen[key] = values[int(rng.integers(len(values)))]
        out.append(chosen)
    return out


def sample_groups(rows: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Whole groups of `rows`, drawn until they hold `share` of the rows."""
    groups = np.random.default_rng(seed).permutation(sorted(rows["group"].unique()))
    sizes = rows["group"].value_counts()
    taken = np.cumsum([sizes[g] for g in groups])
    return rows[rows["group"].isin(groups[: int(np.searchsorted(taken, share * len(rows))) + 1])].reset_index(drop=True)


def run_trial(
    root: Path, params: Params, chosen: dict[str, Any], rows: pd.DataFrame, held_out: pd.DataFrame, key: str
) -> float:
    """Accuracy on `held_out` of the student after its phase was run with the settings `chosen` on `rows`."""
    spec, inputs = params.students[params.search.student], root / "data" / "inputs" / params.search.student
    told = json.loads((inputs / "experiment.json").read_text(encoding="utf-8"))
    phase = validate_section(PhaseConfig, spec.phases[params.search.phase - 1].model_dump() | chosen, "search")
    if phase.needs_token_logprobs or phase.needs_hidden_states:
        raise UserError("params.yaml: search.phase: only for losses of labels and their probabilities")
    task = Task.model_validate(told["task"])
    origin = ModelConfig.model_validate({k: v for k, v in told["model"].items() if k != "content"})
    student = build_student(spec, fetch_model(spec.model, origin), task, params.search.seed, origin.trust_remote_code)
    scores = {name: found["accuracy"] for name, found in told["teachers"].items()}
    folder = root / ".cache" / "search" / key
    train_phase(
        student,
        phase_rows(rows, phase, task.names, scores),
        phase.model_copy(update={"early_stopping": None}),
        folder=folder,
        seed=params.search.seed,
        checkpoint_every=spec.checkpoint_every,
    )
    shutil.rmtree(folder, ignore_errors=True)
    said = predict_rows(student, held_out)
    return float((said["label"] == said["prediction"]).mean())


def search_settings(root: Path, params: Params) -> pd.DataFrame:
    """Every set with its folds' accuracies and their mean, best first. Raises UserError when inputs are missing."""
    spec = params.search
    if spec is None:
        raise UserError("params.yaml: search: there is none; name a student, a phase and what to choose from")
    path = root / "data" / "inputs" / spec.student / "rows.parquet"
    if not path.exists():
        raise UserError(f"{path.relative_to(root)}: not there yet; run `dvc repro inputs` first")
    rows, decides = pd.read_parquet(path), path.with_name("experiment.json").read_text(encoding="utf-8")
    gold = rows[
        rows["split_ref"].isin(params.students[spec.student].phases[spec.phase - 1].data) & rows["label"].notna()
    ]
    gold = sample_groups(gold, spec.share, spec.seed)
    if gold["group"].nunique() < spec.folds:
        raise UserError(
            f"params.yaml: search.share: {len(gold)} gold rows are too few for {spec.folds} folds; raise it"
        )
    parts = list(GroupKFold(spec.folds).split(gold, groups=gold["group"]))
    tried = []
    for i, chosen in enumerate(draw_settings(spec)):
        scores = []
        for k, (train, held_out) in enumerate(parts):
            student = params.students[spec.student].model_dump()
            phase = student.pop("phases")[spec.phase - 1] | chosen
            key = run_key(student, phase, spec.seed, spec.folds, k, gold.to_json(), decides)
            kept = root / ".cache" / "search" / f"{key}.json"
            if not kept.exists():
                score = run_trial(root, params, chosen, gold.iloc[train], gold.iloc[held_out], key)
                with atomic_write(kept) as scratch:
                    scratch.write_text(json.dumps({"accuracy": score}))
            scores.append(json.loads(kept.read_text())["accuracy"])
        print(f"set {i + 1} of {spec.trials}: {chosen}: accuracy {np.mean(scores):.3f}", flush=True)
        tried.append(chosen | {"accuracy": float(np.mean(scores)), "folds": scores})
    return pd.DataFrame(tried).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)


def write_settings(root: Path, params: Params, best: dict[str, Any]) -> None:
    """Put the settings `best` into their phase in params.yaml; everything else in it stays as it is."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    path = root / "params.yaml"
    content = yaml.load(path.read_text(encoding="utf-8"))
    content["students"][params.search.student]["phases"][params.search.phase - 1].update(best)
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def run_search(write: bool = False) -> None:
    """Search, show what was tried, keep the best; `write` puts it into params.yaml. Raises UserError."""
    root, params = repository_root(), load_params()
    tried = search_settings(root, params)
    print(tried.head(10).to_string(index=False))
    best = {key: tried.iloc[0][key] for key in tried if key not in ("accuracy", "folds")}
    best = {key: value.item() if isinstance(value, np.generic) else value for key, value in best.items()}
    with atomic_write(root / ".cache" / "search" / f"{params.search.student}.json") as path:
        path.write_text(tried.to_json(orient="records", indent=2), encoding="utf-8")
    if write:
        write_settings(root, params, best)
    print(f"best: {best}{', now in params.yaml' if write else ''}")
