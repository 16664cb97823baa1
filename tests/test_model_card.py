"""The model card's metadata and text; tests/test_training.py runs its code."""

import json

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

from distillery import metrics
from distillery.config.schema import StudentConfig
from distillery.deploy.settings import InferenceSettings
from distillery.errors import UserError
from distillery.report.model_card import render_card, write_cards
from distillery.tasks.schema import load_task
from report_project import LABELS, experiment, write_file, write_project

PHASE = {"data": ["demo/train"], "loss": {"ce": 1.0}, "epochs": 1, "learning_rate": 1e-3}
DISTILLED = {"data": ["demo/pool"], "teachers": ["big"], "loss": {"kl": 0.5, "ce": 0.5}, "steps": 4}
TEXTS = ["Sales of the unit rose.", "It fell from 3 to 2.", "no news here", "Profit is flat, and so are the sales."]


@pytest.fixture
def card(tmp_path):
    """Renders the card of a classifier; keywords change the phases, the texts and the arguments of `render_card`."""
    write_file(
        tmp_path / "tasks/demo.yaml", "kind: classification\nlabels: {up: it rises, flat: a|b, down: it falls}\n"
    )
    task = load_task("demo", tmp_path / "tasks")

    def render(phases=({**DISTILLED, "learning_rate": 1e-3}, PHASE), texts=TEXTS, **more) -> str:
        spec = StudentConfig(model="small", arch="classifier", phases=list(phases))
        label, prediction = ["up", "down", "flat", "flat"], ["up", "down", "flat", "down"]
        test = metrics.classification_report(label, prediction, np.full((4, 3), 1 / 3), LABELS)
        metadata = {"student": "kd", "seed": 7, "parameters": 17_000_000, "bytes_on_disk": 34_400_000, "test": test}
        rows = pd.DataFrame({"text": texts, "label": label, "prediction": prediction, "group": list("abcd")})
        return render_card(tmp_path, spec, task, metadata, rows, **more)

    return render


def test_metadata_of_the_hub(card):
    origin = {"dataset": "demo", "origin": "hub:owner/name@rev", "base_model": "owner/small"}
    data = ModelCard(card(**origin)).data.to_dict()
    score = {"task": {"type": "text-classification"}}
    score |= {"dataset": {"name": "demo", "type": "owner/name", "split": "test"}}
    accuracy, f1 = (
        {"type": "accuracy", "value": 0.75, "name": "accuracy"},
        {"type": "f1", "value": round((1 + 2 / 3 + 2 / 3) / 3, 4), "name": "macro-F1"},
    )
    assert data.pop("model-index") == [{"name": "kd", "results": [score | {"metrics": [accuracy, f1]}]}]
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "language": "en",
        "tags": ["knowledge-distillation"],
        "datasets": ["owner/name"],
        "base_model": "owner/small",
    }


def test_metadata_names_nothing_that_is_not_known(card):
    """No hub id, no language but English that can be seen, no teacher."""
    texts = ["Der Gewinn stieg.", "Er fiel von 3 auf 2.", "nichts Neues", "Umsatz wie im Vorjahr"]
    data = ModelCard(card(phases=[PHASE], texts=texts, origin="data/demo.csv")).data.to_dict()
    assert data["tags"] == ["fine-tuning"] and not {"language", "base_model", "datasets"} & set(data)


def test_what_a_card_holds(card):
    page = card(dataset="demo", origin="data/demo.csv", timing={"train_seconds": 125})
    on_gpu = card(timing={"train_seconds": 125, "peak_gpu_memory_mb": 812, "machine": "H100; EPYC, 2 cores"})
    assert "Training took 2 min 5 s (H100; EPYC, 2 cores). It held at most 812 MB of the GPU's memory.\n" in on_gpu
    assert "- texts of another kind, language or subject than those of demo;" in page
    assert "- what follows after the first 256 tokens of a text: it is not read;" in page
    assert (
        "A classifier for the labels up, flat, down, distilled from big. 17,000,000 parameters, 34 MB, seed 7." in page
    )
    assert "- up: it rises\n- flat: a|b\n- down: it falls\n" in page
    assert "| accuracy | 75.0 % (25.0 to 100.0) |\n" in page and "| balanced accuracy | 83.3 % |\n" in page
    assert "| down | 50.0 % | 100.0 % | 66.7 % | 66.7 % | 1 |\n" in page
    assert "Trained on demo/pool, demo/train; tested on demo/test (`data/demo.csv`)." in page
    phases = "1. 4 steps on demo/pool, teachers big (0.5 kl, 0.5 ce)\n2. 1 epoch on demo/train, labels alone (1 ce)\n"
    assert phases in page and "Training took 2 min 5 s.\n" in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {title}" for title in ("Use", "Intended use", "Out-of-scope use", "Scores", "Data", "Training", "Limits")
    ]


def test_a_card_names_the_share_of_rows_that_a_phase_chose(card):
    phase = DISTILLED | {"learning_rate": 1e-3, "select": {"by": "doubt", "share": 0.125}}
    assert "1. 4 steps on demo/pool (12.5 % of the rows, by doubt), teachers big (" in card(phases=[phase])


def test_a_card_of_series_adapters_has_no_code_that_transformers_alone_would_run(card, tmp_path):
    """Also of a student that starts from a model with such adapters: those of its folder count."""
    write_file(tmp_path / "config.json", '{"series_adapters": {"size": 4, "activation": "gelu", "layers": []}}')
    page = card()
    assert "\ndistillery predict . --input new.csv --output predicted.csv\n" in page
    assert "```python" not in page and page.count("```") == 2
    assert "library_name" not in ModelCard(page).data.to_dict()


def test_a_card_of_a_model_without_training(card):
    page = card(phases=[])
    assert "trained without a teacher" in page and "None: the model is as it was initialized." in page
    assert "Training took" not in page and "\nTested on test/test." in page


def test_cards_of_every_run(tmp_path):
    """In reports/cards and in the folder of the model, with what params knows of its base model and data."""
    spec = experiment()
    spec["models"]["small"] = {"hub": "owner/small", "revision": "abc"}
    params = write_project(tmp_path, spec)
    task = load_task("demo", tmp_path / "tasks")
    test = pd.read_parquet(tmp_path / "data/processed/demo/test.parquet")
    for name in params.students:
        write_file(tmp_path / f"data/inputs/{name}/test.parquet", test)
        for seed in params.seeds:
            run = tmp_path / f"runs/{name}-{seed}"
            rows = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
            write_file(run / "predictions.parquet", rows.assign(label=test["label"].to_numpy()))
            p = np.stack(rows["probabilities"].to_numpy())
            scores = metrics.classification_report(test["label"], rows["prediction"], p, LABELS)
            metadata = json.loads((run / "metrics.json").read_text()) | {"student": name, "seed": seed, "test": scores}
            write_file(run / "metrics.json", metadata)
    write_cards(tmp_path, params)
    for name in params.students:
        for seed in params.seeds:
            page = (tmp_path / f"runs/{name}-{seed}/model/README.md").read_text()
            assert page == (tmp_path / f"reports/cards/{name}-{seed}.md").read_text()
            assert page.endswith("\n") and f"# {name}\n" in page and f"seed {seed}." in page
            assert ModelCard(page).data.base_model == "owner/small" and f"Training took 1 min {1 + seed} s." in page
            assert "tested on demo/test (`data/demo.jsonl`)" in page
            assert all(f"\n- {label}: {meaning}\n" in page for label, meaning in task.labels.items())
    (tmp_path / "runs/other-1/metrics.json").unlink()
    with pytest.raises(UserError, match="^runs/other-1/metrics.json: no such file; `dvc repro` makes it$"):
        write_cards(tmp_path, params)


@pytest.mark.parametrize(
    "threshold, sentence",
    [
        (
            0.72,
            "On the 31.0 % of the 202 validation rows with a calibrated confidence of at least 0.720 it was right in",
        ),
        (None, "At no confidence were 90.0 % of the validation rows right."),
    ],
)
def test_the_confidence_from_which_predictions_can_be_used(card, threshold, sentence):
    abstention = {"accuracy": 0.9, "threshold": threshold, "answered": 0.31, "accuracy_low": 0.81, "rows": 202}
    task = {"kind": "classification", "labels": {"up": "", "flat": ""}}
    values = {"student": "kd", "arch": "classifier", "task": task, "text_columns": ["text"], "max_length": 64}
    settings = InferenceSettings.model_validate(values | {"temperature": 1.5, "abstention": abstention})
    page = card(settings=settings)
    assert sentence in page and "p^(1 / 1.50)" in page and "\n\n## Data" in page
    assert "## Confidence" not in card()
