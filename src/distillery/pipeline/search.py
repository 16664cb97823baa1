"""Search the settings of one phase of a student: ``distillery search [--write]``.

The section `search` of params.yaml names the student, the phase, and what is searched. Optuna proposes the settings of
each trial (Bergstra & Bengio 2012: random; Bergstra et al. 2011: tpe). A trial is cross-validated on a share of the
phase's gold rows, whole groups at a time; validation and test rows are not read.

The study lies in ``.cache/search/<student>-<key>.db``. The score of every fold is stored there at once: a killed search
continues at the fold where it stood. ``.cache/search/<student>.json`` lists the trials, best first; ``--write`` puts
the best settings into the phase in params.yaml. The rows come from `dvc repro inputs`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState
from ruamel.yaml import YAML
from sklearn.model_selection import GroupKFold

from distillery.config.load import load_params, validate_section
from distillery.config.schema import ModelConfig, Params, PhaseConfig, SearchConfig
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, repository_root, write_json
from distillery.models.fetch import fetch_model
from distillery.models.predictions import predict_rows
from distillery.pipeline.run_notebook import single_process
from distillery.tasks.schema import Task
from distillery.training.rows import phase_rows
from distillery.training.run import run_key, train_phase
from distillery.training.student import build_student

SAMPLERS = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}


def propose_settings(trial: optuna.trial.BaseTrial, spec: SearchConfig) -> dict[str, Any]:
    """The settings of `trial`: the rate log-uniform between its bounds (three digits), other keys one of their choices.

    A finished trial returns the settings that it was run with.
    """
    settings: dict[str, Any] = {}
    if spec.learning_rate:
        low, high = spec.learning_rate
        settings["learning_rate"] = float(f"{trial.suggest_float('learning_rate', low, high, log=True):.3g}")
    for key, values in spec.choices.items():
        # as JSON, for the database of a study holds numbers and text alone, and a loss is a mapping
        settings[key] = json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in values]))
    return settings


def sample_groups(rows: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Whole groups of `rows`, drawn until they hold `share` of the rows."""
    groups = np.random.default_rng(seed).permutation(sorted(rows["group"].unique()))
    sizes = rows["group"].value_counts()
    total = np.cumsum([sizes[group] for group in groups])
    drawn = groups[: int(np.searchsorted(total, share * len(rows))) + 1]
    return rows[rows["group"].isin(drawn)].reset_index(drop=True)


@dataclass(frozen=True)
class SearchInputs:
    """What decides a score. gold: the sampled gold rows.  experiment: the content of the student's experiment.json."""

    params: Params
    gold: pd.DataFrame
    experiment: dict[str, Any]

    @property
    def spec(self) -> SearchConfig:
        """The section `search` of params.yaml."""
        return self.params.search

    def key(self) -> str:
        """A hash of everything that decides a score, but for the keys that are searched."""
        student = self.params.students[self.spec.student].model_dump()
        searched = {*self.spec.choices, *(["learning_rate"] if self.spec.learning_rate else [])}
        phase = {key: value for key, value in student.pop("phases")[self.spec.phase - 1].items() if key not in searched}
        # `spec` holds the phases as params.yaml has them, with the keys that are searched
        model_and_task = {key: value for key, value in self.experiment.items() if key != "spec"}
        return run_key(student, phase, self.spec.model_dump(exclude={"trials"}), self.gold.to_json(), model_and_task)


def load_inputs(root: Path, params: Params) -> SearchInputs:
    """The rows that every trial is cross-validated on, and the student's model and task.

    Raises UserError when there is no section `search`, when `inputs` has not run, and when rows are too few for folds.
    """
    spec = params.search
    if spec is None:
        raise UserError("params.yaml: search: there is none; name a student, a phase and what to search")
    path = Paths(root).inputs(spec.student) / "rows.parquet"
    if not path.exists():
        raise UserError(f"{path.relative_to(root)}: not there yet; run `dvc repro inputs` first")
    rows = pd.read_parquet(path)
    in_phase = rows["split_ref"].isin(params.students[spec.student].phases[spec.phase - 1].data)
    gold = sample_groups(rows[in_phase & rows["label"].notna()], spec.share, spec.seed)
    if gold["group"].nunique() < spec.folds:
        raise UserError(
            f"params.yaml: search.share: {len(gold)} gold rows are too few for {spec.folds} folds; raise it"
        )
    return SearchInputs(params, gold, json.loads(path.with_name("experiment.json").read_text(encoding="utf-8")))


def score_fold(
    inputs: SearchInputs, settings: dict[str, Any], rows: pd.DataFrame, held_out: pd.DataFrame, checkpoints: Path
) -> float:
    """Accuracy on `held_out` of the student after its phase was run with `settings` on `rows`.

    Raises UserError when the phase needs the teacher's tokens or hidden states, or when `settings` are no valid phase.
    """
    search, experiment = inputs.spec, inputs.experiment
    spec = inputs.params.students[search.student]
    phase = validate_section(PhaseConfig, spec.phases[search.phase - 1].model_dump() | settings, "search")
    if phase.needs_token_logprobs or phase.needs_hidden_states:
        raise UserError("params.yaml: search.phase: only for losses of labels and their probabilities")
    task = Task.model_validate(experiment["task"])
    origin = ModelConfig.model_validate({key: value for key, value in experiment["model"].items() if key != "content"})
    student = build_student(spec, fetch_model(spec.model, origin), task, search.seed, origin)
    teacher_accuracy = {name: scores["accuracy"] for name, scores in experiment["teachers"].items()}
    train_phase(
        student,
        phase_rows(rows, phase, task.names, teacher_accuracy),
        phase.model_copy(update={"early_stopping": None, "validate_every": None}),
        folder=checkpoints,
        seed=search.seed,
        checkpoint_every=spec.checkpoint_every,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    predictions = predict_rows(student, held_out)
    return float((predictions["label"] == predictions["prediction"]).mean())


def open_study(database: Path) -> optuna.Study:
    """The study in `database`. A trial that a killed search left unfinished is the next to run."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{database}", study_name=database.stem, direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def run_trial(study: optuna.Study, inputs: SearchInputs, folder: Path) -> None:
    """Run the study's next trial: one score for each fold, and their mean. Settings of an earlier trial cost nothing.

    folder: for the checkpoints of a fold in training.
    """
    spec = inputs.spec
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    # a seed for each trial, so that a search that was killed proposes what an undisturbed one would
    seed = int(np.random.SeedSequence((spec.seed, len(complete))).generate_state(1)[0])
    study.sampler = SAMPLERS[spec.sampler](seed=seed)
    trial = study.ask()
    settings = propose_settings(trial, spec)
    equal = [earlier.user_attrs["folds"] for earlier in complete if propose_settings(earlier, spec) == settings]
    scores = equal[0] if equal else list(trial.user_attrs.get("folds", []))
    folds = list(GroupKFold(spec.folds).split(inputs.gold, groups=inputs.gold["group"]))
    for fold in range(len(scores), spec.folds):
        rows, held_out = (inputs.gold.iloc[positions] for positions in folds[fold])
        scores.append(score_fold(inputs, settings, rows, held_out, folder / f"trial-{len(complete)}-fold-{fold}"))
        trial.set_user_attr("folds", scores)  # a killed search continues behind this fold
    if equal:
        trial.set_user_attr("folds", scores)
    study.tell(trial, float(np.mean(scores)))
    print(f"trial {len(complete) + 1} of {spec.trials}: {settings}: accuracy {np.mean(scores):.3f}", flush=True)


def search_settings(root: Path, params: Params) -> pd.DataFrame:
    """Every trial's settings, accuracy (mean of the folds) and `folds` (accuracy of each), best first.

    Raises UserError when there is no section `search`, when inputs are missing, and when another process searches.
    """
    inputs = load_inputs(root, params)
    spec, folder = inputs.spec, Paths(root).cache / "search"
    with single_process(folder / f"search-{spec.student}.lock"):
        database = folder / f"{spec.student}-{inputs.key()}.db"
        study = open_study(database)
        while len(complete := study.get_trials(states=(TrialState.COMPLETE,))) < spec.trials:
            run_trial(study, inputs, database.with_suffix(""))
        shutil.rmtree(database.with_suffix(""), ignore_errors=True)
    records = [
        propose_settings(trial, spec) | {"accuracy": trial.value, "folds": trial.user_attrs["folds"]}
        for trial in complete[: spec.trials]
    ]
    return pd.DataFrame(records).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)


def write_settings(root: Path, params: Params, best: dict[str, Any]) -> None:
    """Put the settings `best` into their phase in params.yaml; everything else in it stays as it is."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    path = Paths(root).params
    content = yaml.load(path.read_text(encoding="utf-8"))
    content["students"][params.search.student]["phases"][params.search.phase - 1].update(best)
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def run_search(write: bool = False) -> None:
    """Search, show the trials, store them; `write` puts the best settings into params.yaml. Raises UserError."""
    root, params = repository_root(), load_params()
    trials = search_settings(root, params)
    print(trials.head(10).to_string(index=False))
    records = trials.to_dict("records")
    write_json(Paths(root).cache / "search" / f"{params.search.student}.json", records)
    best = {key: value for key, value in records[0].items() if key not in ("accuracy", "folds")}
    if write:
        write_settings(root, params, best)
    print(f"best: {best}{', now in params.yaml' if write else ''}")
