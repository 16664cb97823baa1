"""A `max_length` that a model does not read gives one line, when params are checked or when the model is loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import kinds
import tiny
from distillery.config.schema import ModelConfig, StudentConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models.positions import max_positions, max_positions_in
from distillery.pipeline.model_checks import check_models
from distillery.tasks.schema import load_task
from distillery.training.student import build_student
from distillery.training.teacher_models import load_teacher_model
from experiments import changed, load, prepare

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
KINDS = [(arch, kind) for arch, names in kinds.ARCHS.items() for kind in names]
AUTOS = {
    "classifier": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
COMPUTED = {"llama", "qwen2", "mistral", "gemma", "phi", "gpt_neox", "bloom", "t5"}  # positions without a table


@pytest.fixture(scope="module")
def tokenizers():
    return {words: tiny.word_tokenizer(tiny.texts(), words) for words in set(kinds.WORDS.values())}


@pytest.mark.parametrize("arch, kind", KINDS)
def test_a_model_reads_as_many_tokens_as_it_has_positions(arch, kind, tokenizers, tmp_path):
    model = kinds.build(kind, tokenizers[kinds.WORDS[arch]], AUTOS[arch], tmp_path)
    limit = max_positions(model)
    assert limit == max_positions_in(tmp_path) and (limit is None) == (kind in COMPUTED)

    reader = model.get_encoder() if arch == "seq2seq" else model

    def read(n: int) -> None:
        with torch.no_grad():
            reader(input_ids=torch.full((1, n), 7))

    read(limit or 700)
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            read(limit + 1)


def test_a_max_length_that_a_model_does_not_read_is_named_when_params_are_checked(tokenizers, tmp_path, monkeypatch):
    repo = prepare(tmp_path)
    monkeypatch.chdir(repo)
    for kind, limit in (("bert", 514), ("roberta", 512)):
        for max_length, line in (
            (limit, None),
            (limit + 1, f"{limit + 1} tokens are too many: the model reads {limit} at most"),
        ):
            params = load(repo, changed("students.kd.max_length", max_length))
            kinds.build(kind, tokenizers["bert"], transformers.AutoModel, repo / "models/encoder")
            if line is None:
                check_models(params)
                continue
            with pytest.raises(UserError, match=f"^params.yaml: students.kd.max_length: {line}$"):
                check_models(params)
    config = json.loads((repo / "models/encoder/config.json").read_text())
    (repo / "models/encoder/config.json").write_text(json.dumps(config | {"model_type": "its-own"}))
    check_models(params)  # nothing is known of it before it is loaded
    (repo / "models/encoder/config.json").write_text("{")
    with pytest.raises(UserError, match="^params.yaml: models.encoder: its config.json is not valid JSON: Expecting"):
        check_models(params)


@pytest.mark.parametrize("arch, kind, answer", [("classifier", "roberta", 0), ("causal", "gpt2", 2)])
def test_a_max_length_that_a_model_does_not_read_is_named_when_it_is_loaded(arch, kind, answer, tokenizers, tmp_path):
    auto = transformers.AutoModel if arch == "classifier" else AUTOS[arch]
    limit = max_positions(kinds.build(kind, tokenizers[kinds.WORDS[arch]], auto, tmp_path))
    settings = {"model": "small", "arch": arch, "phases": [], "prompt": "plain"}
    long = " ".join(tiny.texts()[:200])
    spec = StudentConfig(**settings, max_length=limit - answer)
    student = build_student(spec, tmp_path, TASK, seed=0)
    assert student.predict([long]).shape == (1, 3)  # the longest text that it may get
    beside = f", beside the {answer} of an answer" if answer else ""
    with pytest.raises(UserError) as caught:
        build_student(spec.model_copy(update={"max_length": 1024}), tmp_path, TASK, seed=0)
    assert str(caught.value) == (
        "params.yaml: max_length of a student of `small`: 1024 tokens are too many: the model reads "
        f"{limit - answer} at most{beside}"
    )


def test_a_teacher_of_few_positions_cuts_its_texts(tokenizers, tmp_path):
    kinds.build("bert", tokenizers["bert"], transformers.AutoModel, tmp_path, max_position_embeddings=40)
    finetune = {"on": "finance/train", "steps": 1, "learning_rate": 0.1}
    spec = TeacherConfig(kind="classifier", model="small", finetune=finetune)
    teacher = load_teacher_model("small", spec, ModelConfig(folder=str(tmp_path)), TASK)
    assert teacher.max_length == 40 and teacher.predict([" ".join(tiny.texts()[:20])]).shape == (1, 3)
