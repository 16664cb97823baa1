"""The model card: what a trained student is, its scores, and code that uses it with `transformers` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distillery import metrics
from distillery.config.schema import Params, StudentConfig
from distillery.data.storage import read_task
from distillery.deploy.prompt_parts import prompt_parts
from distillery.deploy.settings import SETTINGS_FILE, InferenceSettings, read_settings
from distillery.evaluation.reading import read_result_file
from distillery.files import Paths, atomic_write
from distillery.models.heads import read_config
from distillery.models.label_model import MAX_ANSWER_TOKENS
from distillery.models.load import load_tokenizer
from distillery.models.series_adapters import stored_adapters
from distillery.models.windows import Windows
from distillery.report.environment import TEMPLATES
from distillery.tasks.chosen_prompt import student_task
from distillery.tasks.schema import Task
from distillery.wording import human_duration, percent

PIPELINES = {"classifier": "text-classification", "causal": "text-generation", "seq2seq": "text2text-generation"}

ENGLISH_WORDS = {"the", "of", "and", "to", "is", "with", "from", "has", "this", "that", "for", "are"}

HUB = "hub:"  # begins a data source on the hub


def render_card(
    folder: Path,
    spec: StudentConfig,
    task: Task,
    metadata: dict[str, Any],
    predictions: pd.DataFrame,
    *,
    dataset: str = "test",
    origin: str = "",
    base_model: str | None = None,
    timing: dict[str, float] | None = None,
    settings: InferenceSettings | None = None,
) -> str:
    """The card of the model in `folder`, with metadata that the hub accepts.

    metadata: student, seed, parameters, bytes_on_disk, and in `test` the scores of :func:`score_predictions`.
    predictions: test rows (text, label, prediction, group); the first is the example. dataset: the source of the test
    rows by name, origin: by its file or `hub:owner/name`. base_model: the hub id of the model it starts from.
    timing: the content of `timing.json`: train_seconds, machine, and of a GPU peak_gpu_memory_mb.
    settings: its temperature and thresholds, where they are known.
    The intervals (95 %) are those of the report for one seed.
    """
    text = predictions["text"].iloc[0]
    teachers = dict.fromkeys(name for phase in spec.phases for name in phase.teachers)
    test, free, series = metadata["test"], task.kind == "qa", stored_adapters(folder) is not None
    card = ModelCard.from_template(
        _card_data(spec, metadata, predictions["text"], free, series, dataset, origin, base_model),
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        arch=spec.arch,
        free=free,
        series=series,
        sets=task.kind == "multilabel",
        thresholds=_thresholds(task, settings),
        **{key: metadata[key] for key in ("student", "seed", "parameters")},
        megabytes=metadata["bytes_on_disk"] / 1e6,
        labels={} if free else task.labels,
        teachers=list(teachers),
        phases=spec.phases,
        splits=list(dict.fromkeys(split_ref for phase in spec.phases for split_ref in phase.data)),
        dataset=dataset,
        origin=origin,
        training_time=human_duration(timing["train_seconds"]) if timing else None,
        machine=timing.get("machine") if timing else None,
        gpu_mb=timing.get("peak_gpu_memory_mb") if timing else None,
        dtype=metadata.get("dtype"),
        test=test,
        intervals=_intervals(predictions, task),
        example=repr(text),
        percent=percent,
        settings=settings,
        **_prompt_values(folder, spec, task),
    )
    return str(card).rstrip() + "\n"


def _card_data(
    spec: StudentConfig,
    metadata: dict[str, Any],
    texts: pd.Series,
    free: bool,
    series: bool,
    dataset: str,
    origin: str,
    base_model: str | None,
) -> ModelCardData:
    hub_id = origin.removeprefix(HUB).split("@")[0] if origin.startswith(HUB) else None
    scores = {"exact_match": "accuracy"} if free else {"accuracy": "accuracy", "f1": "macro_f1"}
    results = [
        EvalResult(
            task_type=PIPELINES[spec.arch],
            dataset_type=hub_id or dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type=metric,
            metric_name=name.replace("_f1", "-F1"),
            metric_value=round(metadata["test"][name], 4),
        )
        for metric, name in scores.items()
    ]
    return ModelCardData(
        model_name=metadata["student"],
        library_name=None if series else "transformers",
        pipeline_tag=PIPELINES[spec.arch],
        language="en" if _is_english(texts) else None,
        tags=["knowledge-distillation" if any(phase.teachers for phase in spec.phases) else "fine-tuning"],
        base_model=base_model,
        datasets=hub_id and [hub_id],
        eval_results=results,
    )


def _thresholds(task: Task, settings: InferenceSettings | None) -> dict[str, float]:
    """The probability from which each label of a set is predicted."""
    chosen = settings.thresholds if settings else None
    return dict(zip(task.names, chosen or [metrics.DEFAULT_THRESHOLD] * len(task.names), strict=True))


def _is_english(texts: pd.Series) -> bool:
    """Whether at least half of the texts hold a frequent English word."""
    return texts.map(lambda text: not ENGLISH_WORDS.isdisjoint(text.lower().split())).mean() >= 0.5


def _intervals(predictions: pd.DataFrame, task: Task) -> dict[str, tuple[float, float]]:
    columns = (predictions[column] for column in ("label", "prediction"))
    drawn = metrics.bootstrap_scores(*(column.tolist() for column in columns), task.names, predictions["group"])
    return {score: metrics.interval(samples) for score, samples in drawn.items()}


def _prompt_values(folder: Path, spec: StudentConfig, task: Task) -> dict[str, Any]:
    """The Python literals with which the card's code writes the prompt of a student, or cuts a text into windows."""
    if spec.arch == "classifier":
        values = read_config(folder).get("long_texts") if spec.long_texts else None
        if not values:
            return {"reads": spec.max_length}
        windows = Windows(**values)
        return {"windows": windows, "names": repr(task.names), "reads": windows.reach}
    parts = prompt_parts(task, load_tokenizer(folder), spec.arch, spec.prompt, spec.few_shot)
    values = {"before": repr(parts.before), "after": repr(parts.after), "max_length": spec.max_length}
    values |= {"special_tokens": parts.special_tokens, "reads": spec.max_length}
    if task.kind == "qa":
        return values | {"max_new_tokens": MAX_ANSWER_TOKENS}
    return values | {"answers": repr(parts.answers), "names": repr(task.names)}


def write_cards(root: Path, params: Params) -> None:
    """Write the card of every run to `reports/cards/<run>.md` and, as README.md, into its model folder.

    DVC ignores the copy in the model folder: it comes after the run's own outputs. Raises UserError when a run is
    missing.
    """
    for name, spec in params.students.items():
        source = params.test_source(name)
        # not that of experiment.json: a classifier trains without the meanings of its labels
        task = student_task(root, read_task(Paths(root).processed(source)), spec.prompt_of)
        test = read_result_file(Paths(root).inputs(name) / "test.parquet", root)
        for folder in (Paths(root).run(name, seed) for seed in params.seeds):
            metadata = read_result_file(folder / "metrics.json", root)
            timing = folder / "timing.json"
            rows = read_result_file(folder / "predictions.parquet", root)
            rows = rows[rows["split"] == "test"].assign(text=test["text"].to_numpy(), group=test["group"].to_numpy())
            has_settings = (folder / "model" / SETTINGS_FILE).exists()
            card = render_card(
                folder / "model",
                spec,
                task,
                metadata,
                rows,
                dataset=source,
                origin=params.data[source].origin,
                base_model=params.models[spec.model].hub,
                timing=read_result_file(timing, root) if timing.exists() else None,
                settings=read_settings(folder / "model") if has_settings else None,
            )
            for path in (Paths(root).reports / f"cards/{folder.name}.md", folder / "model" / "README.md"):
                with atomic_write(path) as scratch:
                    scratch.write_text(card, encoding="utf-8")
