"""The count of the default run's operations: formulas by hand, and calls that are left out without a difference."""

from __future__ import annotations

import json
from types import ModuleType

import pandas as pd
import pytest
import torch
import transformers

import tiny
from distillery.config.schema import FinetuneConfig
from distillery.models import forward_check
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.packed.hidden import completion_hidden_states
from distillery.models.packed.token_tree import pack_token_tree
from distillery.tasks.schema import TaskPrompt, load_task
from distillery.training.rows import gold_rows
from distillery.training.run import train_phase

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
TASK = TASK.model_copy(update={"prompt": TaskPrompt(template="{text}")})


@pytest.fixture(scope="module")
def operations() -> ModuleType:
    return tiny.load_benchmark("operations")


@pytest.fixture(scope="module")
def counted_stage(operations) -> ModuleType:
    return tiny.load_benchmark("counted_stage")


def test_attention_of_a_cpu_by_hand(operations):
    batch, heads, kv_heads, tokens, size = 2, 4, 2, 5, 8
    query = torch.randn(batch, heads, tokens, size, requires_grad=True)
    key, value = (torch.randn(batch, kv_heads, tokens, size, requires_grad=True) for _ in range(2))
    product = 2 * batch * heads * tokens * tokens * size
    with operations.count_operations() as forward:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert forward.get_total_flops() == 2 * product  # scores, and their mean of the values
    with operations.count_operations() as backward:
        attended.sum().backward()
    assert backward.get_total_flops() in (4 * product, 5 * product)  # the kernel computes the scores again


@pytest.mark.parametrize("rows", [1, 6])
def test_products_in_4_bits_by_hand(operations, rows):
    import bitsandbytes

    inner, outer = 64, 128
    layer = bitsandbytes.nn.Linear4bit(inner, outer, bias=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    inputs = torch.randn(rows, inner)
    product = 2 * rows * inner * outer
    with torch.no_grad(), operations.count_operations() as counter:
        layer(inputs)
    assert counter.get_total_flops() == product
    with operations.count_operations() as counter:  # the weight is frozen: one product backward, for the inputs
        layer(inputs.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * product


def test_token_trees_by_hand(operations):
    model = transformers.AutoModelForCausalLM.from_config(tiny.causal_config("llama"))
    prompts, completions = [[3, 4, 8, 9], [3, 4, 10], [3, 4, 11, 12, 13]], [[[5], [6, 7]]] * 3
    hidden, inner, heads, kv_heads, layers, size = 16, 24, 4, 2, 2, 4
    tree = pack_token_tree(prompts, completions)
    tokens, prefix, (rows, width) = tree.input_ids.shape[1], tree.prefix_length, tree.own_index.shape
    keys_values, token_wise = hidden * 2 * kv_heads * size, hidden * 2 * heads * size + 3 * hidden * inner
    pairs, read = rows * width * (prefix + width) + prefix * prefix, 6  # the last layer reads two tokens of a row
    products = layers * tokens * keys_values + ((layers - 1) * tokens + read) * token_wise
    expected = 2 * products + layers * 2 * 2 * heads * size * pairs
    with torch.no_grad(), operations.count_operations() as counter:
        completion_hidden_states(model, prompts, completions)
    assert counter.get_total_flops() == expected


def test_a_linear_count_is_used_only_when_confirmed_and_only_for_combinations(operations):
    count, truth = operations.LinearCount(), lambda a, b: 3 * a + 1000 * b
    for a, b in [(1, 1), (2, 1), (3, 1), (5, 1)]:
        assert count.estimate([a, b]) is None
        count.add([a, b], truth(a, b))
    assert count.estimate([7, 1]) is None  # right twice so far
    count.add([7, 2], truth(7, 2))
    assert count.estimate([70, 20]) == truth(70, 20)
    only_rows = operations.LinearCount()
    for rows in range(1, 6):
        only_rows.add([rows, 0], 3 * rows)
    assert only_rows.estimate([9, 0]) == 27
    assert only_rows.estimate([9, 1]) is None


def test_a_count_that_is_not_linear_is_never_used(operations):
    count = operations.LinearCount()
    for n in range(1, 30):
        assert count.estimate([n]) is None
        count.add([n], n**2 + 1)


def student(tiny_models, kind: str) -> LabelModel:
    arch = {"bert": "classifier", "llama": "causal"}[kind]
    folder = tiny_models / f"tiny-{kind}"
    model = load_model(folder, arch, labels=TASK.names)
    return LabelModel(model, load_tokenizer(folder), TASK, arch, prompt="plain", batch_size=3)


def gold() -> pd.DataFrame:
    lines = (tiny.ROOT / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    return pd.DataFrame([json.loads(line) for line in lines])


def test_predictions_take_the_same_operations_when_batches_are_left_out(counted_stage, tiny_models):
    model, totals = student(tiny_models, "bert"), []
    model.predict(gold()["text"].tolist())  # a model of a new config compares what it reads, once a process
    for sampled in (False, True):
        counter = counted_stage.StageCounter(sampled, {})
        with counter.installed():
            model.predict(gold()["text"].tolist())
        assert (counter.calls > 0) == sampled
        totals.append(counter.by_kind)
    assert totals[0] == totals[1] and totals[0]["prediction"] == counter.total() > 0


def test_training_takes_the_same_operations_when_steps_are_left_out(counted_stage, tiny_models, tmp_path):
    rows, totals = gold_rows(gold(), TASK), []
    phase = FinetuneConfig(on="finance/train", epochs=2, batch_size=3, learning_rate=1e-3).as_phase()
    for sampled in (False, True):
        forward_check._checked.clear()  # which is computed once a process
        counter = counted_stage.StageCounter(sampled, {})
        with counter.installed():
            train_phase(student(tiny_models, "llama"), rows, phase, folder=tmp_path / str(sampled), seed=0)
        assert (counter.calls > 0) == sampled
        totals.append((counter.total(), counter.by_kind))
    assert totals[0] == totals[1] and totals[0][1]["training"] > 0


def test_every_code_cell_of_the_notebooks_is_run_once(counted_stage):
    for notebook in sorted((tiny.ROOT / "notebooks").glob("0*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        parts = list(counted_stage.notebook_parts(notebook, {"teacher": "x"}))
        assert [code for _, code in parts if code != "teacher = 'x'"] == codes[1:]
        assert len({title for title, _ in parts if title}) >= len(parts) / 2


def test_what_the_finished_run_predicted_stands_in_for_a_model_that_was_not_trained(counted_stage, tiny_models):
    model, texts = student(tiny_models, "bert"), gold()["text"].tolist()[:4]
    counter = counted_stage.StageCounter(True, {texts[1]: [0.5, 0.25, 0.25]})
    with counter.installed():
        probabilities = model.predict(texts)
    assert probabilities[1].tolist() == [0.5, 0.25, 0.25]
    assert probabilities[0].tolist() == pytest.approx(model.predict(texts)[0].tolist())


def test_a_stage_is_counted_in_a_folder_without_git(tmp_path, monkeypatch):
    """The stages of a commit are counted in a copy of its files, which is no repository."""
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    benchmark = tiny.load_benchmark("default_run")
    monkeypatch.setattr(benchmark, "count_stage", lambda *_, **__: [{"part": "all", "training": 1.0}])
    target = tmp_path / "parts.json"
    monkeypatch.setattr("sys.argv", ["default_run.py", "--count", "05_evaluate", "--target", str(target)])
    benchmark.main()
    assert json.loads(target.read_text()) == [{"part": "all", "training": 1.0}]
