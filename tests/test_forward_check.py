"""Every method of computing rows, on tiny models of many architectures, against one plain forward pass a row."""

from __future__ import annotations

import runpy
from functools import cache

import pytest
import torch
import transformers

import tiny
from architectures import ARCHITECTURES, END, WINDOW, drawn_rows, plain_greedy, plain_log_probabilities, random_model
from distillery.config.schema import LoraSettings
from distillery.errors import UserError
from distillery.models import forward_check
from distillery.models.forward_methods import ForwardMethods
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import load_task
from distillery.training.student import attach_adapters

WORDS = ["positive", "neutral", "negative", *(f"word{i}" for i in range(90))]
LABELS = [[8], [9, 10], [9, 11, END]]
COMPLETIONS = [[([8, END], 0)], [([12, 13, 14, END], 2), ([15, END], 0)], [([9, 10, 16], 0)], [([7], 0)]]
TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
SEVERAL_STATES = ("gemma3n_text",)  # hidden states a token and layer
TOKENIZER = tiny.word_tokenizer(WORDS, "llama")


@pytest.fixture(autouse=True)
def nothing_checked_before(monkeypatch):
    monkeypatch.setattr(forward_check, "_checked", {})


ROWS = drawn_rows(len(TOKENIZER), 5, 7, 4, WINDOW + 20)


@cache
def model_of(name: str) -> transformers.PreTrainedModel:
    return random_model(name, len(TOKENIZER))


def label_model(name: str, **options) -> LabelModel:
    model = LabelModel(model_of(name), TOKENIZER, TASK, "causal", prompt="plain", **options)
    model.label_token_ids = LABELS
    return model


def label_scores(model: transformers.PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[labels]: log-likelihoods of the labels' tokens after `prompt`."""
    scores = [plain_log_probabilities(model, prompt, tokens)[range(len(tokens)), tokens].sum() for tokens in LABELS]
    return torch.stack(scores)


def fresh(name: str) -> LabelModel:
    """A label model with a model of its own."""
    model = label_model(name)
    model.model = random_model(name, len(TOKENIZER))
    return model


def documented_methods() -> dict[str, list[str]]:
    """Scoring, generation and head of each architecture in the table of docs/models.md."""
    page = (tiny.ROOT / "docs/models.md").read_text(encoding="utf-8")
    lines = page.partition("## Architectures")[2].splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    return {row[1]: row[2:5] for row in cells[2:]}


def test_the_docs_table_every_architecture():
    assert list(documented_methods()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_label_probabilities_are_those_of_plain_forward_passes(name):
    model, texts = label_model(name), [" ".join(WORDS[:n]) for n in (3, 1, WINDOW + 5)]
    expected = torch.stack([label_scores(model.model, row) for row in ROWS])
    with torch.no_grad():
        assert torch.allclose(model.forward(ROWS).label_logits, expected, atol=1e-4)
    prompts = model.encode(texts)
    expected = torch.stack([label_scores(model.model, prompt) for prompt in prompts])
    assert torch.allclose(torch.from_numpy(model.predict(texts)), expected.softmax(-1), atol=1e-5)
    methods = model.forward_methods(ROWS, 8)
    head = "direct" if methods.direct_head else "the model's"
    assert documented_methods()[name] == [methods.scoring, methods.generation, head]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_their_gradients_are_those_of_plain_forward_passes(name):
    check_losses(label_model(name), layers=[] if name in SEVERAL_STATES else [1, 2])


def check_losses(model: LabelModel, layers: list[int]) -> None:
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    output = model.forward(ROWS, COMPLETIONS, layers=layers)
    (output.completion_nll.mean() + output.label_logits.log_softmax(-1)[:, 1].mean()).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.model.zero_grad()

    logprobs, targets, states = [], [], []
    for row, completions in zip(ROWS, COMPLETIONS, strict=True):
        for tokens, skip in completions:
            inputs = torch.tensor([row + tokens])
            outputs = model.model(input_ids=inputs, use_cache=False, output_hidden_states=True)
            logprobs.append(outputs.logits[0, len(row) - 1 + skip : -1].float().log_softmax(-1))
            targets += tokens[skip:]
        states += [outputs.hidden_states[layer][0, len(row) - 1] for layer in layers]
    expected = torch.cat(logprobs)
    label_logits = torch.stack([label_scores(model.model, row) for row in ROWS])
    nll = -expected[range(len(targets)), targets]
    (nll.mean() + label_logits.log_softmax(-1)[:, 1].mean()).backward()
    assert torch.allclose(output.completion_logits.log_softmax(-1), expected, atol=1e-4)
    assert torch.allclose(output.completion_nll, nll, atol=1e-4)
    assert torch.allclose(output.label_logits, label_logits, atol=1e-4)
    if layers:
        assert torch.allclose(output.hidden_states.flatten(0, 1), torch.stack(states), atol=1e-4)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        plain = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(gradient, plain, atol=1e-4, rtol=1e-3)
    model.model.zero_grad()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_those_of_plain_forward_passes(name):
    model = label_model(name)
    expected = [plain_greedy(model.model, row, 6) for row in ROWS]
    assert model.generate_tokens(ROWS, max_new_tokens=6) == expected
    assert model.generate_tokens(ROWS, max_new_tokens=6, batch_size=1) == expected


@pytest.mark.parametrize("method", ["padded", "plain"])
@pytest.mark.parametrize("name", ["llama", "granite", "lfm2", "gpt_oss"])
def test_each_slower_method_gives_the_same(name, method):
    model = label_model(name)
    direct_head = model.forward_methods(ROWS, 8).direct_head
    assert direct_head == (name != "granite")
    model._methods = ForwardMethods(method, method, direct_head, 1000)
    check_losses(model, [1, 2])
    assert model.generate_tokens(ROWS, max_new_tokens=6) == [plain_greedy(model.model, row, 6) for row in ROWS]
    sampled = model.generate_tokens(ROWS, max_new_tokens=4, temperature=1.0, seed=2)
    assert sampled == model.generate_tokens(ROWS, max_new_tokens=4, temperature=1.0, seed=2)


@pytest.mark.parametrize("name", SEVERAL_STATES)
def test_layers_with_several_states_a_token_end_in_one_line(name):
    for methods in (ForwardMethods("padded", length=1000), ForwardMethods("plain", length=1000)):
        model = label_model(name)
        model._methods = methods
        with pytest.raises(UserError, match="several hidden states a token"):
            model.forward(ROWS, layers=[1])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "lfm2", "granitemoehybrid", "mistral, sliding window"])
def test_half_precision_hides_no_other_architecture(name):
    model = fresh(name)
    model.model.bfloat16()
    methods = model.forward_methods(ROWS, 8)
    assert methods.scoring != "packed" and methods.generation != "packed"
    assert methods.direct_head == (name not in ("gemma2", "granitemoehybrid"))


def test_a_sliding_window_counts_where_rows_are_longer(monkeypatch, capsys):
    monkeypatch.setitem(ARCHITECTURES, "wide", ("mistral", ARCHITECTURES["mistral"][1] | {"sliding_window": 100}))
    model, long = fresh("wide"), drawn_rows(len(TOKENIZER), 9, 120)
    assert model.forward_methods(ROWS, 8).scoring == "packed" and capsys.readouterr().out == ""
    with torch.no_grad():
        expected = torch.stack([label_scores(model.model, row) for row in long])
        assert torch.allclose(model.forward(long).label_logits, expected, atol=1e-4)
    line = "mistral: rows are scored padded and continued padded; not packed: a layer sees 100 tokens, a row has 128\n"
    assert capsys.readouterr().out == line
    model.forward(long)
    assert fresh("wide").forward_methods(ROWS, 8).scoring == "padded" and capsys.readouterr().out == ""  # known by now


def test_models_of_one_config_are_checked_once_a_process(monkeypatch):
    compared = []
    compare = forward_check._ComparedRows

    def count(*arguments):
        compared.append(arguments[1])
        return compare(*arguments)

    monkeypatch.setattr(forward_check, "_ComparedRows", count)
    for model in (fresh("llama"), fresh("llama")):
        with torch.no_grad():
            model.forward(ROWS, COMPLETIONS)
            model.forward(ROWS[:1])
        model.generate_tokens(ROWS, max_new_tokens=2)
    assert compared == [64]
    trained = fresh("llama")
    trained.model.config.use_cache = False  # as TRL leaves it
    trained.forward_methods(ROWS, 2)
    assert compared == [64]
    fresh("llama").forward_methods(drawn_rows(len(TOKENIZER), 60), 8)
    fresh("qwen2").forward_methods(drawn_rows(len(TOKENIZER), 200), 8)
    assert compared == [64, 128, 256]
    model = fresh("llama")
    model.model.config.max_position_embeddings = 100
    model.forward_methods(drawn_rows(len(TOKENIZER), 90), 8)
    assert compared[-1] == 100  # no more tokens than the model has positions


def test_stages_share_a_comparison_and_its_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(forward_check.KEEP_CHECKS, "1")
    printed, methods = [], []
    for _stage in range(2):
        monkeypatch.setattr(forward_check, "_checked", {})
        methods.append(fresh("lfm2").forward_methods(ROWS, 2))
        printed.append(capsys.readouterr().out)
        monkeypatch.setattr(forward_check, "_ComparedRows", None)  # a second comparison would fail
    assert methods[0] == methods[1] and methods[0].scoring == "padded"
    assert printed[0] == printed[1] and "not packed" in printed[0]
    half = fresh("lfm2")
    half.model.bfloat16()
    for model, length in ((half, 8), (fresh("lfm2"), 100)):  # another precision, and longer rows
        with pytest.raises(TypeError):
            model.forward_methods(drawn_rows(len(TOKENIZER), length), 2)
    monkeypatch.setattr(forward_check, "_checked", {})
    monkeypatch.setattr(forward_check, "cpu_model", lambda: "another processor")  # other kernels, other rounding
    with pytest.raises(TypeError):
        fresh("lfm2").forward_methods(ROWS, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_leaves_no_trace(dtype):
    results = []
    for known in (True, False):
        model = LabelModel(random_model("gpt2", len(TOKENIZER)), TOKENIZER, TASK, "causal", prompt="plain", dtype=dtype)
        model.model = attach_adapters(model.model, LoraSettings(r=2, dropout=0.3), "causal", 0)
        model.model.train()
        model.model.base_model.model.transformer.h[0].eval()  # a mode of its own
        if known:
            model._methods = ForwardMethods(length=1000)
        modes = [module.training for module in model.model.modules()]
        torch.manual_seed(5)
        output = model.forward(ROWS, COMPLETIONS)
        output.completion_nll.mean().backward()
        assert modes == [module.training for module in model.model.modules()]
        assert torch.is_autocast_cache_enabled() and torch.is_grad_enabled()
        gradients = [p.grad for p in model.model.parameters() if p.requires_grad]
        results.append([output.completion_nll, output.label_logits, torch.get_rng_state(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert max(float(gradient.abs().max()) for gradient in results[0][3:]) > 0


def test_greedy_answers_ignore_what_a_model_would_rather_do():
    model = fresh("bloom")
    model.model.generation_config.repetition_penalty = 5.0
    model.model.generation_config.no_repeat_ngram_size = 1
    assert model.generate_tokens(ROWS, max_new_tokens=6) == [plain_greedy(model.model, row, 6) for row in ROWS]


def test_an_encoder_decoder_gives_what_its_plain_forward_pass_gives():
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=len(TOKENIZER), pad_token_id=1, eos_token_id=END, decoder_start_token_id=1, **size
    )
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in t5.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model = LabelModel(t5, TOKENIZER, TASK, "seq2seq", prompt="plain")
    model.label_token_ids = LABELS

    def logprobs(row: list[int], tokens: list[int]) -> torch.Tensor:
        inputs = {"input_ids": torch.tensor([row]), "decoder_input_ids": torch.tensor([[1, *tokens]])}
        return t5(**inputs, use_cache=False).logits[0].log_softmax(-1)

    with torch.no_grad():
        scores = [[sum(logprobs(row, t)[range(len(t)), t]) for t in LABELS] for row in ROWS]
        assert torch.allclose(model.forward(ROWS).label_logits, torch.tensor(scores), atol=1e-4)
        expected = []
        for row in ROWS:
            tokens: list[int] = []
            while len(tokens) < 5 and tokens[-1:] != [END]:
                tokens.append(int(logprobs(row, tokens)[-1].argmax()))
            expected.append(tokens)
    assert model.generate_tokens(ROWS, max_new_tokens=5) == expected


def test_the_table_of_architectures_shows_what_the_check_prevents():
    table_row = runpy.run_path(str(tiny.ROOT / "benchmarks/architectures.py"))["table_row"]
    name, _, _, _, unchecked, checked, greedy, reason = table_row("lfm2")
    assert (name, greedy, reason) == ("lfm2", "4 of 4", "not packed: only 1 of its 2 layers are attention")
    assert float(unchecked) > 1 and float(checked) < 1e-5  # nats
