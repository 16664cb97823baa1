"""Models with a task: loading, prompts, probabilities, hidden states, generation, 4 bits and saving."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import tiny
from distillery.config.schema import LoraSettings
from distillery.errors import UserError
from distillery.models.encoding import tokenize_labels
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_parameters
from distillery.models.load import _has, load_model, load_tokenizer
from distillery.models.packed.token_tree import common_prefix
from distillery.models.save import save_model
from distillery.tasks.prompts import chat_turns, with_options
from distillery.tasks.schema import Task, load_task
from distillery.training.student import attach_adapters

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")


def test_answers_become_distinct_tokens_and_nested_ones_get_an_end(tiny_models):
    tokenizer = load_tokenizer(tiny_models / "tiny-llama")
    ids = tokenize_labels(tokenizer, ["profit", "profit rose", "loss"])
    assert [len(t) for t in ids] == [2, 3, 2] and {t[-1] for t in ids} == {tokenizer.eos_token_id}
    assert [len(t) for t in tokenize_labels(tokenizer, ["profit", "loss rose"])] == [1, 2]
    for answers in (["profit", "qqq", "zzz"], ["profit", ""]):  # both unknown words are [UNK]
        with pytest.raises(UserError, match="not distinct tokens.*verbalizer"):
            tokenize_labels(tokenizer, answers)


def label_model(folder, arch, *, layers="all", quantize=False, lora=None, dtype="float32", **options) -> LabelModel:
    model = load_model(folder, arch, labels=TASK.names, layers=layers, quantize=quantize, dtype=dtype)
    model = attach_adapters(model, lora, arch, 0)
    return LabelModel(model, load_tokenizer(folder), TASK, arch, dtype=dtype, **options)


def test_a_head_is_drawn_from_the_seed_and_kept_when_it_fits(tiny_models, tmp_path):
    first, same, other = (
        load_model(tiny_models / "tiny-bert", "classifier", labels=TASK.names, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    save_model(first, load_tokenizer(tiny_models / "tiny-bert"), tmp_path / "head")
    again = load_model(tmp_path / "head", "classifier", labels=TASK.names, seed=9)
    assert torch.equal(again.classifier.weight, first.classifier.weight)
    assert again.config.id2label == dict(enumerate(TASK.names))


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"  # one piece
# the packages that its tokenizer lacks here
PIECES = " and ".join(name for name in ("sentencepiece", "protobuf") if not _has(name))
NO_PACKAGE = "pip install '.[tokenizers]' in the project's folder"


@pytest.mark.skipif(bool(importlib.util.find_spec("sentencepiece")), reason="the extra `tokenizers` is installed")
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "files", "reason"),
    [
        ("llama", "LlamaTokenizer", {"tokenizer.model": SENTENCEPIECE}, PIECES),
        ("t5", "T5Tokenizer", {"spiece.model": SENTENCEPIECE}, PIECES),
        ("albert", None, {"spiece.model": SENTENCEPIECE}, PIECES),
        ("llama", "PreTrainedTokenizerFast", {"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tiktoken"),
        ("marian", "MarianTokenizer", {"source.model": SENTENCEPIECE}, PIECES),
        ("llama", "LlamaTokenizer", {}, None),
        ("qwen2", "Qwen2Tokenizer", {}, None),
    ],
)
def test_a_tokenizer_that_cannot_be_built_names_the_model_and_the_package(
    model_type, tokenizer_class, files, reason, tmp_path
):
    """The line of transformers names tiktoken for any file; without a file it makes a tokenizer of three tokens."""
    folder = tmp_path / "large-0123"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_tokenizer(folder)
    missing = f"{next(iter(files), None)} needs {reason}: {NO_PACKAGE}"
    expected = missing if reason else "the folder holds no vocabulary"
    assert str(raised.value) == f"large-0123: no tokenizer can be read: {expected}"


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path, tiny_models):
    with pytest.raises(UserError, match="^nothing: cannot be loaded as causal"):
        load_model(tmp_path / "nothing", "causal")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    for arch in ("causal", "classifier"):
        with pytest.raises(UserError, match=f"^broken: cannot be loaded as {arch}"):
            load_model(tmp_path / "broken", arch, labels=["a", "b"])
    with pytest.raises(UserError, match="^broken: no tokenizer can be read"):
        load_tokenizer(tmp_path / "broken")


def test_four_bits_train_merge_and_are_saved_dense(tiny_models, tmp_path):
    model = load_model(tiny_models / "tiny-llama", "causal")
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)  # freshly drawn weights give nearly uniform probabilities
    save_model(model, load_tokenizer(tiny_models / "tiny-llama"), tmp_path / "large")
    student = label_model(tmp_path / "large", "causal", layers="first-2", quantize=True, lora=LoraSettings(r=4))
    assert count_parameters(student.model.get_base_model())[0] > count_parameters(student.model)[1] > 0
    assert student.model.peft_config["default"].base_model_name_or_path == str(tmp_path / "large")
    texts = tiny.texts()[:6]
    before = student.predict(texts)
    ids = student.encode(texts)
    optimizer = torch.optim.Adam([p for p in student.model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        out = student.forward(ids, [[student.label_completion(i % 3)] for i in range(6)])
        out.completion_nll.mean().backward()
        optimizer.step()
        losses.append(out.completion_nll.mean().item())
    assert losses[-1] < 0.7 * losses[0]
    trained = student.predict(texts)
    save_model(student.model, student.tokenizer, tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    plain_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(p.dtype == torch.float32 for p in plain_model.parameters())
    saved = LabelModel(plain_model, student.tokenizer, TASK, "causal").predict(texts)
    assert np.abs(trained - before).max() > 0.2
    assert np.abs(saved - trained).max() < 1e-4  # rounded to 4 bits once more it would lose a quarter of that


def test_a_student_is_saved_whole_or_not_at_all(tiny_models, tmp_path):
    folder = tiny_models / "tiny-bert"
    model, tokenizer = load_model(folder, "classifier", labels=TASK.names), load_tokenizer(folder)
    with tiny.limit_file_size(10_000), pytest.raises(UserError) as caught:
        save_model(model, tokenizer, tmp_path / "model")
    assert str(caught.value) == f"{tmp_path / 'model'}: the disk is full; free some space and run again"
    assert not list(tmp_path.iterdir())


def test_a_long_text_loses_its_end_and_never_the_prompt(tiny_models):
    long = " ".join(tiny.texts()[:12:2])
    for few_shot in (0, 2):
        student = label_model(tiny_models / "tiny-llama", "causal", few_shot=few_shot)
        whole, empty = student.prompt_ids(long), student.prompt_ids("")
        student.max_length = len(empty) + 30
        (ids,) = student.encode([long])
        assert len(empty) < len(ids) <= student.max_length < len(whole)
        head = common_prefix([whole, empty])
        tail = common_prefix([whole[::-1], empty[::-1]])
        assert head + tail == len(empty)  # what stands around the text
        assert ids[-tail:] == whole[-tail:]
        assert ids[: len(ids) - tail] == whole[: len(ids) - tail]
        student.max_length = len(empty)
        with pytest.raises(UserError, match=f"^max_length: {len(empty)} tokens are too few"):
            student.encode([long])
    encoder = label_model(tiny_models / "tiny-bert", "classifier", max_length=16)
    (ids,) = encoder.encode([long])
    assert len(ids) == 16 and ids[:15] == encoder.tokenizer(long)["input_ids"][:15]
    assert ids[-1] == encoder.tokenizer.sep_token_id


def test_memory_by_formula(tiny_models):
    """As the published estimate for LLaMA-2 7B: 12 bytes a parameter in 16 bits."""
    model = load_model(tiny_models / "tiny-llama", "causal")
    total = count_parameters(model)[0]
    linear = 4 * (4 * 32 * 32 + 3 * 32 * 64)  # of 4 layers: attention's four, the feed-forward's three
    predicted_memory = tiny.load_benchmark("memory").predicted_memory
    full = predicted_memory(model, "full, 16 bits")
    assert full["total"] == 12 * total and full["copies"] == 0
    adapted = predicted_memory(model, "QLoRA, 4 bits", r=8)
    trained = 8 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert adapted["gradients"] == 4 * trained and adapted["optimizer"] == 8 * trained
    frozen = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (total - linear)
    assert adapted["weights"] == pytest.approx(frozen + 4 * trained)
    attention = predicted_memory(model, "QLoRA, 4 bits", r=8, adapted="attn")
    assert attention["gradients"] == 4 * 8 * 4 * 4 * (32 + 32)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(tiny.causal_config("gpt2"))
    adapted = predicted_memory(gpt2, "QLoRA, 4 bits", r=8, adapted="attn")  # its layers are convolutions of width 1
    assert adapted["gradients"] == 4 * 8 * 2 * (16 + 48 + 16 + 16)


def test_the_table_of_memory_has_the_share_that_adapters_save():
    """As the script computes it, beside the share of the published totals; the page has both."""
    memory = tiny.load_benchmark("memory")
    table = pd.read_csv(tiny.ROOT / "benchmarks/memory.csv")
    rows = pd.DataFrame(memory.published_rows())
    pd.testing.assert_frame_equal(table.loc[: len(rows) - 1, rows.columns[3:8]], rows[rows.columns[3:8]])
    saved = table.dropna(subset=["published_saved_percent"]).set_index("model")
    assert saved["published_saved_percent"].tolist() == [95.2, 94.6, 95.5]  # 4 of 84, 0.85 of 15.6, 0.066 of 1.48 GB
    page = (tiny.ROOT / "recipes/README.md").read_text(encoding="utf-8")
    for name, percent in {"LLaMA-2 7B": 93.9, "OPT 1.3B": 92.1, "GPT-2 124M": 88.0}.items():
        whole = table[(table["model"] == name) & (table["training"] == "full, 16 bits")]["total_gb"].item()
        assert (
            saved.loc[name, "saved_percent"]
            == percent
            == pytest.approx(100 * (1 - saved.loc[name, "total_gb"] / whole), abs=0.1)
        )
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} | QLoRA") and "attention" in line)
        assert f"| {percent} | {saved.loc[name, 'published_saved_percent']} |" in line


@pytest.mark.parametrize(("kind", "arch"), [("llama", "causal"), ("bert", "classifier")])
def test_an_option_that_a_row_lacks_has_no_probability(tiny_models, kind, arch):
    task = Task(kind="choice", labels={"A": "", "B": "", "C": ""})
    folder = tiny_models / f"tiny-{kind}"
    model = load_model(folder, arch, labels=task.names)
    scorer = LabelModel(model, load_tokenizer(folder), task, arch)
    rows = [with_options(task, "Profit", options) for options in (["up", "down"], ["up", "down", "flat"])]
    assert scorer.predict(rows).min() > 0  # the text alone excludes no option
    two, three = scorer.predict(rows, n_options=[2, 3])
    assert two[2] == 0 and three.min() > 0
    assert two.sum() == pytest.approx(1) and three.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind, arch", [("tiny-llama", "causal"), ("tiny-bert", "classifier")])
def test_predictions_depend_neither_on_the_batch_nor_on_the_order(tiny_models, kind, arch):
    student = label_model(tiny_models / kind, arch, prompt="chat" if arch == "causal" else "plain")
    for parameter in student.model.parameters():
        parameter.data.mul_(3)  # random weights hardly distinguish one text from another
    texts = tiny.texts()[:40:2]
    expected = student.predict(texts)
    assert expected.dtype == np.float32 and expected.shape == (20, 3)
    assert np.abs(expected.sum(1) - 1).max() < 1e-5 and expected.std(0).min() > 1e-3
    order = np.random.default_rng(0).permutation(20)
    for size in (1, 3, 20):
        student.batch_size = size
        probabilities = student.predict([texts[i] for i in order])
        assert np.abs(probabilities - expected[order]).max() < 1e-5


@pytest.mark.parametrize("arch", ["causal", "seq2seq"])
def test_completions_and_labels_are_scored_in_one_pass(tiny_models, arch):
    kind = {"causal": "tiny-llama", "seq2seq": "tiny-t5"}[arch]
    student = label_model(tiny_models / kind, arch, prompt="chat" if arch == "causal" else "plain")
    for parameter in student.model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    ids, end = student.encode(tiny.texts()[:3]), student.tokenizer.eos_token_id
    completions = [
        student.row_completions(2, "profit rose"),
        student.row_completions(0),
        student.row_completions(1, "it fell"),
    ]
    with torch.no_grad():
        out, alone = student.forward(ids, completions), student.forward(ids)
        answers = [(i, tokens, skip) for i, row in enumerate(completions) for tokens, skip in row]
        logits = [plain_logits(student, ids[i], tokens)[skip:] for i, tokens, skip in answers]
        scores = [
            [
                plain_logits(student, row, label).log_softmax(-1)[range(len(label)), label].sum()
                for label in student.label_token_ids
            ]
            for row in ids
        ]
    targets = [token for _, tokens, skip in answers for token in tokens[skip:]]
    expected = torch.cat(logits)
    assert torch.allclose(out.completion_logits, expected, atol=1e-4)
    assert torch.allclose(out.completion_nll, -expected.log_softmax(-1)[range(len(targets)), targets], atol=1e-4)
    assert torch.allclose(out.label_logits, torch.tensor(scores), atol=1e-4) and torch.allclose(
        out.label_logits, alone.label_logits, atol=1e-5
    )
    assert [tokens[-1] for _, tokens, _ in answers] == [end] * 5
    reason = student.tokenizer.decode(answers[1][1][answers[1][2] :], skip_special_tokens=True)
    assert (
        reason.strip() == "profit rose"
        and answers[1][1][: len(student.label_token_ids[2])] == student.label_token_ids[2]
    )


def plain_logits(student: LabelModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] from one plain forward pass of the whole sequence."""
    if student.arch == "causal":
        return student.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    start = [student.model.config.decoder_start_token_id]
    inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start + tokens[:-1]])}
    return student.model(**inputs).logits[0]


@pytest.mark.parametrize("arch", ["causal", "classifier", "seq2seq"])
def test_hidden_states_are_those_of_transformers(tiny_models, arch):
    kind = {"causal": "tiny-llama", "classifier": "tiny-bert", "seq2seq": "tiny-t5"}[arch]
    student = label_model(tiny_models / kind, arch, prompt="plain")
    ids = student.encode(tiny.texts()[:3])
    start = torch.tensor([[0]])
    with torch.no_grad():
        out = student.forward(ids, label_space=False, layers=[1, 4], activation_maps=arch == "classifier")
        for i, row in enumerate(ids):
            inputs = {"input_ids": torch.tensor([row]), "output_hidden_states": True}
            if arch == "seq2seq":
                hidden = student.model(**inputs, decoder_input_ids=start).decoder_hidden_states
            else:
                hidden = student.model(**inputs).hidden_states
            position = 0 if arch != "causal" else -1
            assert torch.allclose(
                out.hidden_states[i], torch.stack([hidden[1][0, position], hidden[4][0, position]]), atol=1e-4
            )
            if arch == "classifier":
                squares = torch.stack([hidden[j][0].square().sum(-1) for j in (1, 4)])
                assert torch.allclose(out.activation_maps[i, :, : len(row)], squares, rtol=1e-4)
                assert not out.activation_maps[i, :, len(row) :].any()


@pytest.mark.parametrize("kind, arch", [("tiny-llama", "causal"), ("tiny-t5", "seq2seq")])
def test_outputs_that_were_not_requested_are_none(tiny_models, kind, arch):
    student = label_model(tiny_models / kind, arch, prompt="plain")
    out = student.forward(student.encode(tiny.texts()[:2]), label_space=False, layers=[1])
    assert out.hidden_states.shape[:2] == (2, 1)
    assert out.label_logits is None and out.completion_logits is None and out.completion_nll is None


def test_texts_are_generated_the_same_whatever_the_batch(tiny_models, monkeypatch):
    student = label_model(tiny_models / "tiny-llama", "causal")
    for parameter in student.model.parameters():
        parameter.data.mul_(5)
    prompts = [chat_turns(TASK, text) for text in tiny.texts()[:6:2]]
    texts = student.generate(prompts, max_new_tokens=6)
    assert len(set(texts)) > 1
    with monkeypatch.context() as patch:  # nothing shared: every prompt is computed in full
        patch.setattr("distillery.models.packed.decoding.supports_token_trees", lambda model: False)
        assert texts == student.generate(prompts, max_new_tokens=6)
    assert texts == student.generate(prompts, max_new_tokens=6, batch_size=1)
    sampled = student.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1)
    assert sampled == student.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1) != texts


def test_generation_continues_where_it_stopped_with_the_same_texts(tiny_models):
    student = label_model(tiny_models / "tiny-llama", "causal")
    prompts = [chat_turns(TASK, text) for text in tiny.texts()[:10:2]]
    settings = {"max_new_tokens": 4, "temperature": 1.0, "seed": 1, "batch_size": 2}
    stored: dict[int, str] = {}
    whole = student.generate(
        prompts, **settings, on_batch=lambda rows, texts: stored.update(zip(rows, texts, strict=True))
    )
    assert [stored[i] for i in range(5)] == whole
    first = list(stored)[:2]  # as a run that was killed after its first batch left it
    cached, new = [stored[i] if i in first else None for i in range(5)], []
    assert student.generate(prompts, **settings, cached=cached, on_batch=lambda rows, _: new.extend(rows)) == whole
    assert sorted(new + first) == [0, 1, 2, 3, 4]
    assert student.generate(prompts, **settings, cached=whole, on_batch=None) == whole


SETTINGS = """
import os, sys, torch
from pathlib import Path
from transformers.utils import logging
import distillery.training.run
from distillery.models.load import load_model

def settings():
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        logging.get_verbosity() == logging.ERROR,
    ]

print(settings())
load_model(Path(sys.argv[1]), "causal")
print(settings())
"""


def test_loading_a_model_makes_the_settings_of_a_run_and_an_import_does_not(tiny_models):
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    command = [sys.executable, "-W", "ignore", "-c", SETTINGS, str(tiny_models / "tiny-llama")]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2:] == ["[False, True, None, False]", "[True, False, ':4096:8', True]"]


def test_a_model_that_was_loaded_elsewhere_has_the_settings_of_a_run(tiny_models, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models / "tiny-llama")
    tokenizer = load_tokenizer(tiny_models / "tiny-llama")
    torch.use_deterministic_algorithms(False)
    LabelModel(model, tokenizer, TASK, "causal")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
