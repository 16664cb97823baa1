"""The benchmark that compares a served model with the same model loaded here."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import loopback
import tiny
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer


@pytest.fixture
def served_teacher():
    return tiny.load_benchmark("served_teacher")


@pytest.fixture
def speaker(served_teacher, tmp_path, monkeypatch) -> Path:
    """The folder of a tiny model, which the benchmark's server has and which it opens in place of the GGUF file."""
    folder = loopback.build_speaker(tmp_path / "speaker", served_teacher.TASK.words)

    def open_folder(file: Path, _: Path) -> LabelModel:
        model, tokenizer = load_model(file, "causal", dtype="float32").eval(), load_tokenizer(file)
        settings = {"few_shot": served_teacher.FEW_SHOT, "max_length": 2048}
        return LabelModel(model, tokenizer, served_teacher.TASK, "causal", **settings)

    @contextmanager
    def token_server(_: Path, model: Path):
        with loopback.Proxy(loopback.TokenServer(model)) as proxy:
            yield f"{proxy.url}/v1"

    monkeypatch.setattr(served_teacher, "open_gguf", open_folder)
    monkeypatch.setattr(served_teacher, "llama_server", token_server)
    return folder


def test_a_server_with_the_same_model_differs_from_it_in_nothing(served_teacher, speaker, capsys):
    served_teacher.main([sys.executable, "--model", str(speaker), "--rows", "2"])
    output = capsys.readouterr().out
    assert "calls of the server: 6 for 6 rows" in output
    # an answer that is no label leaves its row unread
    assert re.search("[456] of 6 rows read, 100.0% with the same likeliest label", output)
    assert "likeliest token the same at 100.0%" in output and "6 answers" in output
    gaps = re.findall(r"largest (0\.\d+)", output.split("mass beyond")[0])
    assert len(gaps) == 7 and max(map(float, gaps)) <= 1e-4
    less = [float(nats) for nats in re.findall(r"as one: (-?[\d.]+) nats less", output)]
    assert len(less) == 4 and less == sorted(less, reverse=True) and less[0] > 0


def test_a_program_that_ends_at_once_is_named(served_teacher, tmp_path):
    with (
        pytest.raises(UserError, match=f"{re.escape(sys.executable)} ended with code [12] before it answered"),
        served_teacher.llama_server(Path(sys.executable), tmp_path / "model.gguf"),
    ):
        pass
