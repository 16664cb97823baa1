"""The model card: what a finished student is, how good, and code that uses it with `transformers` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from distillery import metrics
from distillery.config.schema import Params, PhaseConfig, StudentConfig
from distillery.files import atomic_write
from distillery.models.label_model import MAX_ANSWER_TOKENS, tokenize_labels
from distillery.models.load import load_tokenizer
from distillery.tasks.prompts import chat_turns, render_answer, render_prompt
from distillery.tasks.schema import Task

CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
---
# {student}

{what} {job}, distilled from {teachers}. {parameters:,} parameters, {megabytes:.0f} MB, seed {seed}.

## Use

```python
{snippet}
```

## How good it is

On {rows} test rows that it never saw; intervals (95 %) draw rows of one group together:

| score | value |
|---|---|
{scores}
{per_label}
## How it learned

{phases}

Other texts than those of its test rows may come out otherwise; nothing here says how it treats groups of people.
"""


PER_LABEL = """
| label | precision | sensitivity | specificity | F1 | rows |
|---|--:|--:|--:|--:|--:|
{rows}
"""


CARD_SCORES = {
    "mcc": "Matthews correlation",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
}


CLASSIFIER_SNIPPET = """from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify({example!r}))"""


ANSWER_SNIPPET = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".", dtype=torch.float32).eval()


def classify(text, before={before!r}, after={after!r}, answers={answers!r}):
    prompt = tokenizer(before + text + after, add_special_tokens={special})["input_ids"]
    scores = []
    for answer in answers:  # the log-probability of every answer after the prompt
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = {logits}
        scores.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())
    return dict(zip({labels!r}, torch.stack(scores).softmax(-1).tolist()))


print(classify({example!r}))"""


ANSWER_LOGITS = {  # of the answer's tokens, one by one
    "causal": "model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]",
    "seq2seq": "model(torch.tensor([prompt]), labels=torch.tensor([tokens])).logits[0]",
}


CARD_KINDS = {  # arch -> pipeline tag, class of transformers, in words
    "classifier": ("text-classification", "AutoModelForSequenceClassification", "A classifier"),
    "causal": ("text-generation", "AutoModelForCausalLM", "A causal language model"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM", "An encoder-decoder"),
}


def _describe_phase(phase: PhaseConfig) -> str:
    """One phase in words."""
    length = f"{phase.steps} steps" if phase.steps else f"{phase.epochs:g} epochs"
    source = f"taught by {', '.join(phase.teachers)}" if phase.teachers else "by gold labels alone"
    terms = ", ".join(f"{weight:g} {term}" for term, weight in phase.loss.items())
    return f"{length} on {', '.join(phase.data)}, {source} ({terms})"


WRITER_SNIPPET = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".").eval()


def answer(text, before={before!r}, after={after!r}):
    prompt = tokenizer(before + text + after, add_special_tokens={special}, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens={most}, do_sample=False)[0, {start}:]
    return tokenizer.decode(made, skip_special_tokens=True).strip()


print(answer({example!r}))"""


def render_card(folder: Path, spec: StudentConfig, task: Task, about: dict[str, Any], said: pd.DataFrame) -> str:
    """The card of the model in `folder`: what it is, how good, and code that uses it with `transformers` alone.

    said: test rows (text, label, prediction, group); the first is the example. about["test"]: their scores. The
    intervals are those of the report for one seed.
    """
    example = said["text"].iloc[0]
    snippet = CLASSIFIER_SNIPPET.format(example=example)
    pipeline, auto, what = CARD_KINDS[spec.arch]
    if spec.arch != "classifier":
        mark = "\x00"
        tokenizer = load_tokenizer(folder)
        rendered = render_prompt(chat_turns(task, mark, spec.few_shot), tokenizer, spec.prompt)
        before, _, after = rendered.partition(mark)
    if task.kind == "qa":
        causal = spec.arch == "causal"
        snippet = WRITER_SNIPPET.format(
            auto=auto,
            before=before,
            after=after,
            special=spec.prompt == "plain" or not causal,
            most=MAX_ANSWER_TOKENS,
            start='prompt["input_ids"].shape[1]' if causal else 1,
            example=example,
        )
    elif spec.arch != "classifier":
        answers = [render_answer(task, name, spec.prompt) for name in task.names]
        if all(ids[-1] == tokenizer.eos_token_id for ids in tokenize_labels(tokenizer, answers)):
            answers = [answer + tokenizer.eos_token for answer in answers]
        snippet = ANSWER_SNIPPET.format(
            before=before,
            after=after,
            answers=answers,
            labels=task.names,
            special=spec.prompt == "plain" or spec.arch == "seq2seq",
            example=example,
            auto=auto,
            logits=ANSWER_LOGITS[spec.arch],
        )
    teachers = dict.fromkeys(name for phase in spec.phases for name in phase.teachers)
    test = about["test"]
    drawn = metrics.bootstrap_scores(said["label"].tolist(), said["prediction"].tolist(), task.names, said["group"])
    free = task.kind == "qa"  # written answers are right or wrong: labels and certainty say nothing
    lines = []
    for name, samples in drawn.items():
        low, high = metrics.interval(samples)
        title = "exact match" if free else name.replace("_f1", "-F1")
        if not free or name == "accuracy":
            lines.append(f"| {title} | {100 * test[name]:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |")
    more = ("token_f1", "token_precision", "token_recall") if free else ("balanced_accuracy", "commonest_answer")
    lines += [f"| {name.replace('_', ' ')} | {100 * test[name]:.1f} % |" for name in more]
    lines += [] if free else [f"| {title} | {test[name]:.3f} |" for name, title in CARD_SCORES.items()]
    per_label = [
        f"| {label} | {' | '.join(f'{100 * row[k]:.1f} %' for k in ('precision', 'recall', 'specificity', 'f1'))} "
        f"| {row['support']} |"
        for label, row in test["labels"].items()
    ]
    phases = [f"{i}. {_describe_phase(phase)}" for i, phase in enumerate(spec.phases, 1)]
    return CARD.format(
        pipeline=pipeline,
        student=about["student"],
        what=what,
        job="that writes answers to questions" if free else f"for the labels {', '.join(task.names)}",
        teachers=", ".join(teachers) or "nobody: it learned from gold labels alone",
        parameters=about["parameters"],
        megabytes=about["bytes_on_disk"] / 1e6,
        scores="\n".join(lines),
        per_label="" if free else PER_LABEL.format(rows="\n".join(per_label)),
        phases="\n".join(phases) or "Not at all: it is as it was built.",
        rows=test["rows"],
        seed=about["seed"],
        snippet=snippet,
    )


def write_cards(root: Path, params: Params) -> None:
    """Write the card of every run to `reports/cards/<run>.md` and, as README.md, into its model folder.

    DVC ignores the copy in the model folder: it comes after the run's own outputs. Raises UserError when a run is
    missing.
    """
    for name, spec in params.students.items():
        inputs = root / f"data/inputs/{name}"
        task = Task.model_validate(json.loads((inputs / "experiment.json").read_text(encoding="utf-8"))["task"])
        test = pd.read_parquet(inputs / "test.parquet")
        for run in (f"{name}-{seed}" for seed in params.seeds):
            folder = root / "runs" / run
            about = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            said = pd.read_parquet(folder / "predictions.parquet")
            said = said[said["split"] == "test"].assign(text=test["text"].to_numpy(), group=test["group"].to_numpy())
            card = render_card(folder / "model", spec, task, about, said)
            for path in (root / f"reports/cards/{run}.md", folder / "model" / "README.md"):
                with atomic_write(path) as scratch:
                    scratch.write_text(card, encoding="utf-8")
