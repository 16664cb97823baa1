"""The head of a classifier: kept for a task of the same labels, whatever their order and names, else drawn anew."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import kinds
import tiny
from distillery.config.schema import ModelConfig, StudentConfig, TeacherConfig
from distillery.errors import UserError
from distillery.label_sets import LabelSets
from distillery.models.heads import read_head
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model
from distillery.pipeline.model_checks import check_models
from distillery.tasks.schema import Task
from distillery.training.student import build_student
from distillery.training.teacher_models import load_teacher_model
from experiments import DELETE, changed, load, prepare

LABELS = ["positive", "neutral", "negative"]
FINBERT = ["Positive", " NEGATIVE", "Neu tral"]  # another order, other capitals and spaces
NUMBERED = {"LABEL_0": "positive", "LABEL_1": "negative", "LABEL_2": "neutral"}
HEADS = [*kinds.ARCHS["classifier"], "llama", "gpt2", "opt", "bloom", "t5", "bart"]  # all can bring one


@pytest.fixture(scope="module")
def tokenizers():
    return {words: tiny.word_tokenizer(tiny.texts(), words) for words in ("bert", "llama", "t5")}


def classifier(kind, tokenizers, folder, names):
    arch = next(arch for arch, of_arch in kinds.ARCHS.items() if kind in of_arch)
    auto = transformers.AutoModelForSequenceClassification
    return kinds.build(kind, tokenizers[kinds.WORDS[arch]], auto, folder, id2label=dict(enumerate(names)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 1]])).logits[0]


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_for_the_same_labels_is_put_in_their_order(kind, tokenizers, tmp_path):
    own = logits(classifier(kind, tokenizers, tmp_path / "named", FINBERT))
    mapped = load_model(tmp_path / "named", "classifier", labels=LABELS)
    assert torch.allclose(logits(mapped), own[[0, 2, 1]], atol=1e-5) and own.std() > 0.01
    assert list(mapped.config.id2label.values()) == LABELS
    classifier(kind, tokenizers, tmp_path / "numbered", NUMBERED)
    mapped = load_model(tmp_path / "numbered", "classifier", labels=LABELS, label_map=NUMBERED)
    assert torch.allclose(logits(mapped), own[[0, 2, 1]], atol=1e-5)


def head_spread(model) -> float:
    """The standard deviation of the weights of the layer that gives the labels."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 3]
    return layers[-1].weight.std().item()


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_for_other_labels_is_drawn_from_the_seed(kind, tokenizers, tmp_path):
    own = classifier(kind, tokenizers, tmp_path / "numbered", NUMBERED)
    models = [load_model(tmp_path / "numbered", "classifier", labels=LABELS, seed=seed) for seed in (3, 3, 4)]
    first, same, other = map(logits, models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert sorted(first.tolist()) != sorted(logits(own).tolist())
    new = transformers.AutoModelForSequenceClassification.from_config(own.config)
    assert 0.7 < head_spread(models[0]) / head_spread(new) < 1.4  # of a new layer, not of the old one


def folder_with(path, names):
    path.mkdir(exist_ok=True)
    head = {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(names or []))}
    (path / "config.json").write_text(json.dumps(head if names else {"architectures": ["BertModel"]}))
    return path


def test_the_order_of_a_head(tmp_path):
    for names, label_map, order in [
        (LABELS, None, [0, 1, 2]),
        (FINBERT, None, [0, 2, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None, None),
        (["positive", "negative"], None, None),
        (["positive", "Positive", "negative"], None, None),
        (["positive", "neutral", "negative", "mixed"], None, None),
        (None, None, None),
        (list(NUMBERED), NUMBERED, [0, 2, 1]),
        (LABELS, {"positive": "negative", "neutral": "neutral", "negative": "positive"}, [2, 1, 0]),
    ]:
        head = read_head(folder_with(tmp_path, names), LABELS, label_map)
        assert head.order == order and head.names == names, names
        assert head.origin == ("drawn" if order is None else "own")
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    assert read_head(tmp_path, ["a", "b"], {"LABEL_0": "b", "LABEL_1": "a"}).order == [1, 0]  # the names are implied


def test_a_map_of_labels_that_does_not_fit_is_named(tmp_path):
    for names, label_map, message in [
        (NUMBERED, NUMBERED | {"LABEL_1": "positive"}, "`labels` must give each label of the task once: positive, "),
        (
            NUMBERED,
            {"A": "positive", "B": "neutral", "C": "negative"},
            "each label of the model's head once: LABEL_0, ",
        ),
        (None, NUMBERED, "and the model has none"),
    ]:
        folder = folder_with(tmp_path / "finbert", names and list(names))
        with pytest.raises(ValueError, match=message):
            read_head(folder, LABELS, label_map)
        with pytest.raises(UserError, match=f"^finbert: cannot be loaded as classifier: .*{message}"):
            load_model(folder, "classifier", labels=LABELS, label_map=label_map)


CHECKED = [  # labels of the model's head, keys to change, the line
    (["b", "A"], {"teachers.encoder.finetune": DELETE}, None),
    (None, {}, None),  # drawn anew, and tuned
    (["x", "y"], {}, None),
    (["x", "y"], {"models.encoder.labels": {"x": "b", "y": "a"}, "teachers.encoder.finetune": DELETE}, None),
    (
        None,
        {"teachers.encoder.finetune": DELETE},
        "teachers.encoder: its model has no head for the labels a, b: it has none; give `finetune`",
    ),
    (
        ["x", "y"],
        {"teachers.encoder.finetune": DELETE},
        "teachers.encoder: its model has no head for the labels a, b: its labels are x, y; name them under "
        "models.encoder.labels, or give `finetune`",
    ),
    (
        ["x", "y"],
        {"models.encoder.labels": {"x": "a", "z": "b"}},
        "models.encoder: `labels` must name each label of the model's head once: x, y",
    ),
    (
        ["x", "y"],
        {"models.encoder.labels": {"x": "a", "y": "a"}},
        "models.encoder: `labels` must give each label of the task once: a, b",
    ),
]


@pytest.mark.parametrize("names, changes, line", CHECKED)
def test_heads_are_checked_with_params(names, changes, line, tmp_path, monkeypatch):
    repo = prepare(tmp_path)
    monkeypatch.chdir(repo)
    raw = changed("seeds", [0])
    for key, value in changes.items():
        section, name, field = key.split(".")
        raw[section][name] = {k: v for k, v in raw[section][name].items() if k != field} | (
            {} if value is DELETE else {field: value}
        )
    params = load(repo, raw)
    if "task once" not in str(line):
        check_models(params)  # the model may not be on this machine yet
    (repo / "models").mkdir()
    folder_with(repo / "models/encoder", names)
    if line is None:
        return check_models(params)
    with pytest.raises(UserError) as caught:
        check_models(params)
    assert str(caught.value) == f"params.yaml: {line}"


def test_an_untuned_teacher_without_a_head_for_its_labels_is_refused_when_it_is_loaded(tokenizers, tmp_path):
    classifier("bert", tokenizers, tmp_path / "numbered", NUMBERED)
    spec = TeacherConfig(kind="classifier", model="numbered")
    origin = ModelConfig(folder=str(tmp_path / "numbered"))
    task = Task(kind="classification", labels=dict.fromkeys(LABELS, ""))
    with pytest.raises(UserError, match="^params.yaml: teachers.finbert: its model has no head for the labels positiv"):
        load_teacher_model("finbert", spec, origin, task)
    named = origin.model_copy(update={"labels": NUMBERED})
    own = load_teacher_model("finbert", spec, named, task).predict(["profit rose", "loss"])
    student = StudentConfig(model="numbered", arch="classifier", phases=[])
    started = build_student(student, tmp_path / "numbered", task, 0, named).predict(["profit rose", "loss"])
    assert np.abs(started - own).max() < 1e-6


def test_a_head_for_one_label_is_no_head_for_label_sets(tokenizers, tmp_path):
    """Its logits make one distribution; the sigmoid of each would be a probability of nothing."""
    sets = LabelSets(LABELS)
    own = classifier("bert", tokenizers, tmp_path / "one", LABELS)
    assert read_head(tmp_path / "one", LABELS).origin == "own" and read_head(tmp_path / "one", sets).origin == "drawn"
    drawn = load_model(tmp_path / "one", "classifier", labels=sets)
    assert head_spread(drawn) < head_spread(own) / 2  # the weights of `own` were multiplied
    assert drawn.config.problem_type == "multi_label_classification"
    drawn.save_pretrained(tmp_path / "many")
    assert read_head(tmp_path / "many", sets).origin == "own"
    assert (
        read_head(tmp_path / "one", sets, dict(zip(LABELS, LABELS, strict=True))).origin == "own"
    )  # by the user's word
    with pytest.raises(UserError, match="its labels are positive, neutral, negative, one for each text; name them"):
        read_head(tmp_path / "one", sets).require("t", "m", sets)


def test_probabilities_of_label_sets_are_those_of_transformers(tokenizers, tmp_path):
    """Each is the sigmoid of its logit: what `pipeline` gives for the folder, in which the config says so."""
    task = Task(kind="multilabel", labels=dict.fromkeys(LABELS, ""))
    classifier("bert", tokenizers, tmp_path / "bert", LABELS)
    model = load_model(tmp_path / "bert", "classifier", labels=task.names)
    tokenizer = tokenizers["bert"]
    model.save_pretrained(tmp_path / "sets")
    tokenizer.save_pretrained(tmp_path / "sets")
    texts = ["Profit rose.", "The company will cut jobs in Finland"]
    probabilities = LabelModel(model, tokenizer, task, "classifier").predict(texts)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "sets"), top_k=None)
    for row, scores in zip(probabilities, pipeline(texts), strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        assert row.tolist() == pytest.approx([by_label[label] for label in LABELS], abs=1e-6)
    assert np.abs(probabilities.sum(1) - 1).max() > 0.01
    with pytest.raises(UserError, match="a `multilabel` task needs a classifier: causal writes one label"):
        LabelModel(model, tokenizer, task, "causal")
