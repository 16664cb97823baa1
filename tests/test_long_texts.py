"""Texts longer than a model reads: windows, a teacher's `max_length`, and how many texts are cut."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from distillery.config.schema import LongTextsConfig, ModelConfig, StudentConfig, TeacherConfig
from distillery.data.audit import rows_longer_than
from distillery.errors import UserError
from distillery.models.cut_texts import count_cut_texts
from distillery.models.load import load_tokenizer
from distillery.models.save import save_model
from distillery.models.windows import Windows, build_windows
from distillery.pipeline.model_checks import check_models
from distillery.training.student import build_student, load_student
from distillery.training.teacher_models import load_teacher_model
from experiments import changed, load, prepare
from test_training import LABELS, SHORT, TASK, learner, phase, toy, trained

LONG = {"windows": 8, "stride": 10}


@pytest.mark.parametrize("stride", [1, 4, 6])
def test_windows_hold_every_token_in_order_and_no_more_than_needed(stride):
    windows = Windows(8, stride, 5, "mean", before=1, after=1)
    for n in range(windows.reach - 1):
        body = list(range(10, 10 + n))
        parts = windows.split([1, *body, 2])
        assert len(parts) == 1 + max(0, math.ceil((n - 6) / stride)) <= 5
        assert all(part[0] == 1 and part[-1] == 2 and len(part) <= 8 for part in parts)
        assert sorted({token for part in parts for token in part[1:-1]}) == body
        assert all(part[1:-1] == body[k * stride : k * stride + 6] for k, part in enumerate(parts))
    assert windows.split([1, 2]) == [[1, 2]]


def test_special_tokens_are_those_of_the_tokenizer(tiny_models):
    for kind, before, after in (("bert", 1, 1), ("t5", 0, 1), ("llama", 0, 0)):
        tokenizer = load_tokenizer(tiny_models / f"tiny-{kind}")
        windows = build_windows("x", LongTextsConfig(), tokenizer, 32)
        assert (windows.before, windows.after) == (before, after)
        assert windows.stride == (32 - before - after) // 2
    with pytest.raises(UserError, match="^x.long_texts.stride: 33 is too large: a window holds 32 tokens of a text$"):
        build_windows("x", LongTextsConfig(stride=33), tokenizer, 32)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_the_prediction_is_that_of_the_pooled_logits_of_the_windows(tiny_models, pool):
    student = learner(
        tiny_models, "classifier", scale=4, max_length=16, long_texts={**LONG, "windows": 3, "pool": pool}
    )
    texts = ["profit rose", " ".join(tiny.texts()[0].split()[:14]), " ".join(tiny.texts()[:6])]
    predicted = student.predict(texts)
    start, end = student.tokenizer("")["input_ids"]
    for text, row in zip(texts, predicted, strict=True):
        body, logits = student.tokenizer(text, add_special_tokens=False)["input_ids"][: 14 + 2 * 10], []
        for k in range(3):
            if k == 0 or len(body) > 14 + (k - 1) * 10:
                part = torch.tensor([[start, *body[10 * k : 10 * k + 14], end]])
                with torch.no_grad():
                    logits.append(student.model.eval()(input_ids=part).logits[0])
        pooled = torch.stack(logits).mean(0) if pool == "mean" else torch.stack(logits).max(0).values
        np.testing.assert_allclose(row, pooled.softmax(-1), atol=1e-6)
    assert len(logits) == 3  # of the last text, the rest of which is cut


def late_labels(n: int, seed: int) -> pd.DataFrame:
    """Rows of :func:`toy` behind 16 words that say nothing of the label."""
    words = np.random.default_rng(seed).choice(["in", "the", "quarter", "of", "year", "company", "group"], (n, 16))
    rows = toy(n, seed)
    return rows.assign(text=[" ".join(head) + " " + text for head, text in zip(words, rows["text"], strict=True)])


def test_a_label_at_the_end_of_a_text_is_learned_with_windows_and_not_without(tiny_models, tmp_path):
    rows, fresh, accuracy = late_labels(48, 0), late_labels(30, 1), {}
    texts, spec = fresh["text"].tolist(), phase({"ce": 1.0}, steps=100, batch_size=8, learning_rate=3e-3, warmup=0.1)
    for pool in ("none", "mean", "max"):
        long_texts = None if pool == "none" else {"windows": 4, "stride": 7, "pool": pool}
        settings = {"max_length": 16, "long_texts": long_texts}
        student = learner(tiny_models, "classifier", SHORT, scale=4, **settings)
        trained(student, rows, spec, tmp_path / pool)
        predicted = student.predict(texts)
        accuracy[pool] = (np.array(LABELS)[predicted.argmax(1)] == fresh["label"]).mean()
        counts = count_cut_texts(student, texts)
        assert counts == {"rows": 30, "cut": 0 if long_texts else 30, "tokens": 37 if long_texts else 16}
    assert accuracy["mean"] > 0.9 and accuracy["max"] > 0.9 and accuracy["none"] < 0.6

    # `student` has windows; it predicts alike when it is loaded again
    save_model(student.model, student.tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert Windows(**config["long_texts"]) == student.windows
    spec = StudentConfig(model="m", arch="classifier", phases=[], **settings)
    loaded = load_student(spec, tmp_path / "model", SHORT)
    assert loaded.windows == student.windows
    np.testing.assert_array_equal(loaded.predict(texts), predicted)
    # a student that starts from it and cuts its texts does not keep its windows
    cutting = build_student(spec.model_copy(update={"long_texts": None}), tmp_path / "model", SHORT, 0)
    assert cutting.windows is None and not hasattr(cutting.model.config, "long_texts")


def test_a_teacher_reads_as_many_tokens_as_params_say(tiny_models):
    origin = ModelConfig(folder=str(tiny_models / "tiny-bert"))
    finetune = {"on": "toy/train", "steps": 1, "learning_rate": 0.1}

    def teacher(**settings):
        spec = TeacherConfig(kind="classifier", model="small", finetune=finetune, **settings)
        return load_teacher_model("small", spec, origin, TASK)

    long = " ".join(tiny.texts()[:100])
    assert teacher().max_length == 256 and len(teacher(max_length=400).encode([long])[0]) == 400
    windowed = teacher(max_length=64, long_texts={"windows": 4})
    assert windowed.windows == Windows(64, 31, 4, "mean", 1, 1)
    assert len(windowed.encode([long])[0]) == 64 + 3 * 31 and windowed.predict([long]).shape == (1, 3)
    line = "^params.yaml: teachers.small.max_length: 513 tokens are too many: the model reads 512 at most$"
    with pytest.raises(UserError, match=line):
        teacher(max_length=513)
    with pytest.raises(UserError, match=r"^params.yaml: teachers.small.long_texts.stride: 63 is too large: a window"):
        teacher(max_length=64, long_texts={"stride": 63})
    writer = TeacherConfig(kind="lm", model="small", max_length=40, prompt="plain")
    llama = ModelConfig(folder=str(tiny_models / "tiny-llama"))
    model = load_teacher_model("small", writer, llama, SHORT)
    assert model.max_length == 40 and len(model.encode([long])[0]) <= 40
    assert count_cut_texts(model, ["profit rose", long]) == {"rows": 2, "cut": 1, "tokens": 40}


def test_a_max_length_of_a_teacher_is_checked_with_the_params(tiny_models, tmp_path, monkeypatch):
    repo = prepare(tmp_path)
    monkeypatch.chdir(repo)
    (repo / "models").mkdir()
    (repo / "models" / "encoder").symlink_to(tiny_models / "tiny-bert")
    check_models(load(repo, changed("teachers.encoder.max_length", 512)))
    line = "^params.yaml: teachers.encoder.max_length: 600 tokens are too many: the model reads 512 at most$"
    with pytest.raises(UserError, match=line):
        check_models(load(repo, changed("teachers.encoder.max_length", 600)))


def test_the_audit_counts_rows_with_many_words():
    texts = pd.Series([" ".join(["word"] * n) for n in (1, 128, 129, 600)])
    assert rows_longer_than(texts) == {"128": 2, "256": 1, "512": 1, "1024": 0, "4096": 0}
