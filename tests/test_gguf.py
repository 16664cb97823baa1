"""GGUF files of causal students: tensors, config, tokenizer and prompt, what is refused, and their scores."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import report_project
import tiny
from deployed import TASK, rows, write_run, write_student
from distillery.cli import main
from distillery.config.load import load_params
from distillery.config.schema import StudentConfig
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.deploy.calibrate import write_settings
from distillery.deploy.export import compare_exports, write_exports
from distillery.deploy.exports import add_exports
from distillery.deploy.gguf_file import INFERENCE_FIELD, encode_tensor, read_gguf, write_gguf
from distillery.deploy.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_fields
from distillery.deploy.predictors import open_predictor, read_exports
from distillery.deploy.settings import read_settings
from distillery.deploy.torch_predictor import open_label_model
from distillery.errors import UserError
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.evaluation.speed import Measurements
from distillery.models.save import save_model
from distillery.pipeline.model_checks import check_models
from distillery.report.page import leaderboard_markdown
from distillery.training.student import build_student
from experiments import changed, load, prepare

CONFIG = EvaluateConfig(headline="s", bootstrap=100, throughput_rows=4, export_tolerance=0.5)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 5e4, "rms_norm_eps": 1e-6}
KINDS = {  # what differs from model to model: GQA, a tied head, biases, heads of another width
    "llama": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 8, "sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.bpe_tokenizer(tiny.texts()[:400])


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str, **more) -> Path:
    """A model of `kind` with random weights, more embeddings than the tokenizer has tokens, and the tokenizer."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, **SHAPE | ends | KINDS.get(kind, {}) | more, vocab_size=len(tokenizer) + 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms and biases are all 1 and 0 at first
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def students(tokenizer, tmp_path_factory):
    """The model folder of a student of each kind."""
    root, folders = tmp_path_factory.mktemp("students"), {}
    for kind in KINDS:
        folders[kind] = root / kind
        write_student(write_base(root / f"{kind}-base", tokenizer, kind), root / kind, "causal")
    return folders


def read_fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_weights_and_the_config_of_the_student(students, tmp_path, kind, precision):
    """Its reader has its own table of names and order of rows. In 8 bits: those of `gguf.quants`, to the bit."""
    path, folder = tmp_path / "model.gguf", students[kind]
    write_gguf(folder, read_settings(folder), path, precision)
    student, model = AutoModelForCausalLM.from_pretrained(folder), read_gguf(path)
    weights = student.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, values in model.state_dict().items():
        expected = weights[name].float().numpy()
        if precision == "f16" and expected.ndim == 2:
            expected = expected.astype(np.float16).astype(np.float32)
        elif precision == "q8_0" and expected.ndim == 2:
            # blocks lie within rows, so the order of rows does not matter to them
            expected = gguf.dequantize(gguf.quantize(expected, gguf.GGMLQuantizationType.Q8_0), 8)
        assert np.array_equal(values.numpy(), expected), name
    for key in (*SHAPE, "vocab_size", "head_dim", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        if key != "rope_theta" and hasattr(student.config, key):
            assert getattr(model.config, key) == pytest.approx(getattr(student.config, key)), key
    assert model.config.rope_parameters["rope_theta"] == 5e4
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {kind for name, kind in types.items() if "norm" in name or "bias" in name} == {"F32"}
    assert {types["token_embd.weight"], types["blk.1.ffn_down.weight"]} == {precision.upper()}
    assert ("output.weight" in types) is (kind != "llama")
    assert read_fields(path)["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7}[precision]


def test_blocks_of_8_bits_are_those_of_the_library_and_narrow_rows_stay_in_16(tokenizer):
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    blocks, kind = encode_tensor(values, "q8_0")
    assert kind == gguf.GGMLQuantizationType.Q8_0
    assert blocks.tobytes() == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()
    narrow, kind = encode_tensor(values[:, :40], "q8_0")
    assert kind == gguf.GGMLQuantizationType.F16 and np.array_equal(narrow, values[:, :40].astype(np.float16))
    values[0, 0] = 1e5  # float16 ends at 65,504
    for precision in ("f16", "q8_0"):
        large, kind = encode_tensor(values, precision)
        assert kind == gguf.GGMLQuantizationType.F32 and np.array_equal(large, values)


def test_the_tokenizer_and_the_chat_template_are_those_of_the_student(students, tmp_path):
    folder, path = students["llama"], tmp_path / "model.gguf"
    write_gguf(folder, read_settings(folder), path, "f16")
    fields, tokenizer = read_fields(path), AutoTokenizer.from_pretrained(folder)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(tokenizer) + 12
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert types[:4] == [3, 3, 3, 1] and types[-12:] == [5] * 12 and set(types[3:-12]) == {1}
    assert fields["tokenizer.chat_template"] == tiny.CHAT and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_eos_token"] is False
    for name in ("bos", "eos"):
        assert fields[f"tokenizer.ggml.{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)  # it makes a tokenizer of tokens and merges
    for text in [*rows(40)["text"], "<|im_start|>user\nProfit rose<|im_end|>"]:
        assert read(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_prompt_in_the_file_gives_the_probabilities_of_the_student(students, tmp_path):
    """From the file alone, by `transformers`, as the README of a program would do it."""
    folder, path = students["llama"], tmp_path / "model.gguf"
    for style, few_shot in (("plain", 1), ("chat", 0)):
        settings = read_settings(folder).model_copy(update={"prompt": style, "few_shot": few_shot, "max_length": 900})
        write_gguf(folder, settings, path, "f32")
        prompt = json.loads(read_fields(path)[INFERENCE_FIELD])
        model, tokenizer = read_gguf(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        text, scores = "Profit rose to EUR 13.1 mn.", []
        ids = tokenizer(prompt["before"] + text + prompt["after"], add_special_tokens=prompt["special_tokens"])
        for answer in prompt["answers"]:
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids["input_ids"] + tokens])).logits[0, len(ids["input_ids"]) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())
        expected = open_label_model(folder, settings).predict([text])[0]
        assert np.allclose(torch.stack(scores).softmax(-1).detach(), expected, atol=1e-5)
        assert prompt["labels"] == TASK.names and prompt["temperature"] == settings.temperature


def test_adapters_are_merged(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, "llama")
    adapter = {"kind": "lora", "r": 4}
    spec = StudentConfig(model="m", arch="causal", phases=[], prompt="plain", adapter=adapter)
    student = build_student(spec, base, TASK, seed=0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    ids = torch.arange(3, 40)[None]
    expected = student.model(ids).logits.detach()
    save_model(student.model, student.tokenizer, tmp_path / "model")
    settings = write_student(base, tmp_path / "other", "causal")
    write_gguf(tmp_path / "model", settings, tmp_path / "model.gguf", "f32")
    assert torch.allclose(read_gguf(tmp_path / "model.gguf")(ids).logits, expected, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (plain - expected).abs().max() > 0.1


REFUSED = {  # kind of model, changes of its config -> the end of the line
    "gpt2": ({}, "the architecture gpt2 is not written as GGUF; known: llama, mistral, qwen2$"),
    "mistral": ({"sliding_window": 16}, "mistral with another `sliding_window` than usual is not written as GGUF"),
    "qwen2": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "qwen2 with another `rope_type` than usual is not written as GGUF",
    ),
    "llama": ({"attention_bias": True}, "llama with another `attention_bias` than usual is not written as GGUF"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_the_file_cannot_describe_is_one_line_and_no_file(students, tokenizer, tmp_path, kind):
    changes, line = REFUSED[kind]
    if kind == "gpt2":
        AutoModelForCausalLM.from_config(tiny.causal_config("gpt2")).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    else:
        write_base(tmp_path / "model", tokenizer, kind, **changes)
    with pytest.raises(UserError, match=line):
        write_exports(tmp_path / "model", read_settings(students["llama"]))
    assert not [*tmp_path.rglob("*.gguf")] and not (tmp_path / "model/gguf").exists()


def test_ways_to_cut_texts_that_have_a_name_and_one_that_has_none(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    def fields(steps: list[dict], **more) -> dict:
        words = Tokenizer(models.BPE({"a": 0, "<e>": 1}, [], **more))
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        content = json.loads(words.to_str())
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        words = Tokenizer.from_str(json.dumps(content))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(tmp_path)
        return tokenizer_fields(tmp_path, 2)

    level = {"add_prefix_space": False, "trim_offsets": True}
    for name, steps in PRE_TOKENIZERS.items():
        whole = [step | (level if step["type"] == "ByteLevel" else {}) for step in steps]
        assert fields(whole, ignore_merges=name == "llama-bpe")["tokenizer.ggml.pre"] == name
        prefixed = [step | ({"add_prefix_space": True} if step["type"] == "ByteLevel" else {}) for step in whole]
        for other in (
            {"ignore_merges": name != "llama-bpe"},
            {"ignore_merges": name == "llama-bpe", "steps": prefixed},
        ):
            with pytest.raises(UserError, match="known: byte-level BPE that cuts as gpt-2, smollm, qwen2, llama-bpe$"):
                fields(other.pop("steps", whole), **other)


def test_a_tokenizer_of_words_is_one_line(tiny_models, tmp_path):
    settings = write_student(tiny_models / "tiny-llama", tmp_path / "model", "causal")
    with pytest.raises(UserError, match="its tokenizer cannot be written as GGUF; known: byte-level BPE"):
        write_exports(tmp_path / "model", settings)


def test_free_answers_are_not_exported(students):
    settings = read_settings(students["llama"])
    questions = settings.model_copy(update={"task": settings.task.model_copy(update={"kind": "qa"})})
    with pytest.raises(UserError, match="s: exports are compared by the probabilities of labels; a `qa` task has none"):
        write_exports(students["llama"], questions)


def test_the_scores_are_those_of_the_weights_in_the_file(students):
    folder, test = students["llama"], rows(40)
    settings = read_settings(folder)
    write_exports(folder, settings)
    returned = compare_exports(folder, settings, test, CONFIG)
    exports, student = read_exports(folder, "gguf"), open_label_model(folder, settings).predict(test["text"])
    assert list(exports) == ["gguf-q8_0", "gguf-f16"]
    for name, scores in exports.items():
        path = folder / "gguf" / scores["file"]
        p = open_label_model(folder, settings, read_gguf(path)).predict(test["text"])
        assert np.array_equal(returned[name], p) and scores["bytes"] == path.stat().st_size
        assert scores["largest_difference"] == pytest.approx(np.abs(p - student).max(), abs=1e-7)
        assert scores["agreement"] == (p.argmax(1) == student.argmax(1)).mean()
        assert scores["accuracy"] == (np.array(TASK.names)[p.argmax(1)] == test["label"]).mean()
        assert "rows_per_second" not in scores  # torch computes these, no program that reads such files
    assert 0 < exports["gguf-f16"]["largest_difference"] < exports["gguf-q8_0"]["largest_difference"] < 0.2
    assert exports["gguf-q8_0"]["bytes"] < 0.7 * exports["gguf-f16"]["bytes"]
    assert open_predictor(folder, settings, "auto", 1).engine == "torch"  # nothing here computes with such a file


def test_an_export_that_would_fail_after_the_training_is_named_when_params_are_checked(tmp_path, monkeypatch):
    repo = prepare(tmp_path)
    monkeypatch.chdir(repo)
    raw = changed("evaluate.export", ["kd"])
    for student in raw["students"].values():
        student["max_length"] = 40
    raw["students"]["kd"]["arch"] = "causal"
    params = load(repo, raw)
    tiny.causal_config("llama").save_pretrained(repo / "models/encoder")
    check_models(params)
    tiny.causal_config("gpt2").save_pretrained(repo / "models/encoder")
    line = "^params.yaml: evaluate.export.0: `kd` is gpt2; GGUF files are written of llama, mistral, qwen2$"
    with pytest.raises(UserError, match=line):
        check_models(params)
    (repo / "tasks/mood.yaml").write_text("kind: qa\nprompt: {instruction: Answer., template: '{text}'}\n")
    with pytest.raises(UserError, match="`kd` writes free answers; only students with labels are exported"):
        check_models(params)


@pytest.fixture(scope="module")
def project(students, tmp_path_factory):
    """A finished experiment whose headline is a causal model, to be exported."""
    root = tmp_path_factory.mktemp("project")
    spec = report_project.experiment(seeds=[0])
    spec["evaluate"] |= {"export": ["tiny-kd"], "bootstrap": 100}
    spec["students"]["tiny-kd"] |= {"arch": "causal", "model": "large", "prompt": "plain"}
    spec["students"]["tiny-kd"]["max_length"] = 512
    write_run(root, spec, students["llama"].with_name("llama-base"))
    return root


def test_exports_have_lines_of_their_own_on_the_leaderboard(project):
    params = load_params(project / "params.yaml")
    plain = gather_results(project, params)
    write_settings(project, params)
    results, measured = add_exports(project, plain, Measurements())
    board = leaderboard(results, measured.timing).set_index("model")
    half, small = board.loc["tiny-kd, GGUF float16"], board.loc["tiny-kd, GGUF Q8_0"]
    for line in (half, small):
        assert line["role"] == "export" and line["versus"] == "tiny-kd" and line["verdict"] == "within tolerance"
        assert np.isnan(line["sentences_per_second"])
    assert half["agreement_with_student"] == 1 and half["largest_difference"] < 0.01
    assert "| tiny-kd, GGUF Q8_0 | export | – |" in leaderboard_markdown(board.reset_index())


def test_the_command_exports_a_run_and_prints_its_scores(project, capsys):
    main(["export", str(project / "runs/tiny-kd-0")])
    printed = capsys.readouterr().out
    for word in ("gguf-q8_0", "gguf-f16", "agreement", "largest_difference", "within_tolerance", "bytes"):
        assert word in printed
