"""Series adapters: where they stand, what is trained, and who can open such a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import kinds
import tiny
from deployed import write_student
from distillery.config.schema import AdapterSettings, LoraSettings, PhaseConfig, StudentConfig
from distillery.deploy.export import write_exports
from distillery.deploy.predictors import open_predictor
from distillery.deploy.push import student_files
from distillery.deploy.settings import SETTINGS_FILE
from distillery.errors import UserError
from distillery.evaluation.speed import student_shape
from distillery.files import write_json
from distillery.models.devices import shapes_alone
from distillery.models.layers import count_parameters
from distillery.models.load import load_model
from distillery.models.packed.frozen_layers import compute_frozen_states, count_frozen_layers
from distillery.models.save import save_model
from distillery.models.series_adapters import ADAPTER_WEIGHTS, SeriesAdapter, adapted_layers, sublayer_outputs
from distillery.tasks.schema import load_task
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import attach_adapters, attach_series_adapters, build_student, load_student
from distillery.training.weights import load_weights, save_weights

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
SERIES = {"kind": "series", "size": 4}
TEXTS = tiny.texts()[:6]


def student(tiny_models, arch: str = "classifier", **more):
    kind = {"classifier": "bert", "causal": "llama", "seq2seq": "t5"}[arch]
    spec = StudentConfig(model="m", arch=arch, adapter=SERIES | more, phases=[], prompt="plain")
    return build_student(spec, tiny_models / f"tiny-{kind}", TASK, 0), spec


def disturb(model: torch.nn.Module) -> None:
    """Draw the trained weights anew, so that each adapter is far from the identity."""
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.5)


def architecture(kind: str) -> torch.nn.Module:
    """A model of 2 layers, 3 of ALBERT, which are one."""
    arch = next(arch for arch, names in kinds.ARCHS.items() if kind in names)
    sizes = (
        kinds.SHAPES.get(kind, kinds.SHAPE)
        | {"vocab_size": 50}
        | ({"num_hidden_layers": 3} if kind == "albert" else {})
    )
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0)
    auto = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    return auto[arch].from_config(config)


# ------------------------------------------------------------------------------- where they stand


@pytest.mark.parametrize("kind", [kind for names in kinds.ARCHS.values() for kind in names])
def test_each_sublayer_ends_in_one_adapter(kind):
    """Two in a layer, three in one that also attends to an encoder; in ALBERT two for all layers."""
    names = sublayer_outputs(architecture(kind))
    per_part = [name.rpartition(".")[0] for name in names]
    assert len(names) == {"albert": 2, "t5": 2 * 2 + 2 * 3, "bart": 2 * 2 + 2 * 3}.get(kind, 2 * 2)
    assert kind in ("opt", "bart") or len(set(per_part)) == len(names) or kind == "albert"  # whose `fc2` has no parent
    assert not any(part in name for name in names for part in ("classifier", "pooler", "lm_head"))


def test_layers_are_chosen_as_those_of_lora():
    assert all(".1." in name for name in sublayer_outputs(architecture("bert"), "last-1"))
    assert len(sublayer_outputs(architecture("t5"), [1])) == 2 + 3
    with pytest.raises(UserError, match="does not fit a model with layers 0 to 1"):
        sublayer_outputs(architecture("gpt2"), [2])
    with pytest.raises(UserError, match="AlbertForSequenceClassification has no list of 3 layers"):
        sublayer_outputs(architecture("albert"), "last-1")


def test_a_model_of_unknown_layers_is_refused():
    config = transformers.AutoConfig.for_model(
        "mamba", hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=20, pad_token_id=0
    )
    with pytest.raises(
        UserError, match="no output of attention is known in the layers of MambaForCausalLM; take `lora`"
    ):
        sublayer_outputs(transformers.AutoModelForCausalLM.from_config(config))


# ------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_adapter_by_hand(activation):
    adapter = SeriesAdapter(3, 2, activation)
    near = torch.randn(5, 3)
    assert (adapter(near) - near).abs().max() < 1e-4  # before its first step
    disturb(adapter)
    w1, b1, w2, b2 = (p.detach().numpy() for p in adapter.parameters())
    hidden = near.numpy() @ w1.T + b1
    gelu = torch.nn.functional.gelu(torch.tensor(hidden)).numpy()
    inner = np.maximum(hidden, 0) if activation == "relu" else gelu
    np.testing.assert_allclose(adapter(near).detach(), near.numpy() + inner @ w2.T + b2, atol=1e-5)


def test_the_output_of_a_sublayer_passes_through_its_adapter_before_the_residual(tiny_models):
    """Zero adapters leave the model as it is; one that maps all to a constant shifts its sublayer's output by it."""
    model, _ = student(tiny_models, "causal")
    plain = load_model(tiny_models / "tiny-llama", "causal")
    tokens = torch.arange(5, 20)[None]
    layer = model.model.get_submodule("model.layers.1.mlp.down_proj")
    for weight in model.model.parameters():
        weight.data.mul_(0 if weight.requires_grad else 1)
    with torch.no_grad():
        assert torch.equal(model.model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
        layer.get_submodule("series_adapter").up.bias.fill_(0.5)
        plain.get_submodule("model.layers.1").register_forward_hook(
            lambda _layer, _inputs, output: (
                (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5
            )
        )
        torch.testing.assert_close(model.model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


@pytest.mark.parametrize("arch", ["classifier", "causal", "seq2seq"])
def test_the_adapters_and_the_head_alone_are_trained(tiny_models, arch):
    model, _ = student(tiny_models, arch)
    moving = {name for name, weight in model.model.named_parameters() if weight.requires_grad}
    head = {"classifier.weight", "classifier.bias"} if arch == "classifier" else set()
    adapters = {name for name in moving if ".series_adapter." in name}
    assert moving == adapters | head and len(adapters) == 4 * len(adapted_layers(model.model))
    total, trained = count_parameters(model.model)
    assert trained == len(adapted_layers(model.model)) * (2 * 32 * 4 + 32 + 4) + (3 * 32 + 3 if head else 0)
    assert trained < 0.25 * total


# ------------------------------------------------------------------------------- training


def rows(n: int = 6) -> TrainingRows:
    return TrainingRows(TEXTS[:n], np.eye(3)[[i % 3 for i in range(n)]].astype(np.float32))


def test_a_checkpoint_holds_what_is_trained_and_a_resumed_run_ends_alike(tiny_models, tmp_path):
    model, _ = student(tiny_models)
    settings = {"learning_rate": 1e-2, "schedule": "constant", "batch_size": 4, "warmup": 0.0}
    phase = PhaseConfig(data=["a/train"], loss={"ce": 1.0}, steps=6, **settings)
    train_phase(model, rows(), phase, folder=tmp_path / "whole", seed=0, checkpoint_every=3)
    held = load_file(tmp_path / "whole/checkpoint-3/model.safetensors")
    moving = {name for name, weight in model.model.named_parameters() if weight.requires_grad}
    assert set(held) == moving
    resumed, _ = student(tiny_models)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole/checkpoint-3").rename(tmp_path / "killed/checkpoint-3")
    train_phase(resumed, rows(), phase, folder=tmp_path / "killed", seed=0, checkpoint_every=3)
    assert np.array_equal(resumed.predict(TEXTS), model.predict(TEXTS))
    save_weights(model.model, tmp_path / "weights.safetensors")
    assert set(load_file(tmp_path / "weights.safetensors")) == moving
    fresh, _ = student(tiny_models)
    load_weights(fresh.model, tmp_path / "weights.safetensors")
    assert np.array_equal(fresh.predict(TEXTS), model.predict(TEXTS))


def test_layers_below_the_lowest_adapter_are_computed_once(tiny_models):
    model, _ = student(tiny_models, "causal", layers="last-2")
    disturb(model.model)
    assert count_frozen_layers(model.model) == 2
    ids = model.encode(TEXTS)
    completions = [[model.label_completion(i) for i in range(3)]] * len(ids)
    whole = model.forward(ids).label_logits
    frozen = compute_frozen_states(model.model, ids, completions)
    assert frozen is not None and frozen.depth == 2
    model.frozen_states = compute_frozen_states(
        model.model, ids, [[(tokens, 0) for tokens in model.label_token_ids]] * len(ids)
    )
    assert torch.equal(model.forward(ids).label_logits, whole)


# ------------------------------------------------------------------------------- who opens it


def test_transformers_alone_does_not_open_such_a_folder(tiny_models, tmp_path):
    """It would leave out the adapters and predict something else."""
    model, spec = student(tiny_models)
    disturb(model.model)
    save_model(model.model, model.tokenizer, tmp_path / "model")
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again = load_student(spec, tmp_path / "model", TASK)
    save_model(again.model, again.tokenizer, tmp_path / "again")
    for name in ("model.series.safetensors", ADAPTER_WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert load_student(spec, tmp_path / "model", TASK, "bfloat16").model.dtype == torch.bfloat16


def test_a_saved_student_may_be_cut_and_trained_whole(tiny_models, tmp_path):
    model, _ = student(tiny_models)
    disturb(model.model)
    save_model(model.model, model.tokenizer, tmp_path / "model")
    spec = StudentConfig(model="m", arch="classifier", init={"layers": [0, 3]}, phases=[])
    cut = build_student(spec, tmp_path / "model", TASK, 0)
    total, trained = count_parameters(cut.model)
    assert total == trained and len(adapted_layers(cut.model)) == 4
    save_model(cut.model, cut.tokenizer, tmp_path / "cut")
    assert np.array_equal(load_student(spec, tmp_path / "cut", TASK).predict(TEXTS), cut.predict(TEXTS))


def test_a_student_cut_to_layers_without_adapters_is_a_plain_one(tiny_models, tmp_path):
    model, _ = student(tiny_models, layers="last-2")
    save_model(model.model, model.tokenizer, tmp_path / "model")
    spec = StudentConfig(model="m", arch="classifier", init={"layers": "first-2"}, phases=[])
    cut = build_student(spec, tmp_path / "model", TASK, 0)
    assert not adapted_layers(cut.model)
    save_model(cut.model, cut.tokenizer, tmp_path / "cut")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut")
    assert np.array_equal(load_student(spec, tmp_path / "cut", TASK).predict(TEXTS), cut.predict(TEXTS))


def test_an_adapter_on_adapters_and_4_bits_are_refused(tiny_models, tmp_path):
    model, _ = student(tiny_models)
    for attach in (
        lambda: attach_series_adapters(model.model, AdapterSettings(**SERIES), "classifier", 0),
        lambda: attach_adapters(model.model, LoraSettings(r=2), "classifier", 0),
    ):
        with pytest.raises(UserError, match="has series adapters already; train all its weights instead"):
            attach()
    save_model(model.model, model.tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="model: has series adapters, and is not loaded in 4 bits"):
        load_model(tmp_path / "model", "classifier", labels=TASK.names, quantize=True)


def test_a_file_with_other_adapters_is_refused(tiny_models, tmp_path):
    model, spec = student(tiny_models)
    save_model(model.model, model.tokenizer, tmp_path / "model")
    path = tmp_path / "model" / ADAPTER_WEIGHTS
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)
    with pytest.raises(
        UserError, match="^model: cannot be loaded as classifier: .* holds other adapters than its config"
    ):
        load_student(spec, tmp_path / "model", TASK)
    path.unlink()
    with pytest.raises(UserError, match="^model: cannot be loaded as classifier: "):
        load_student(spec, tmp_path / "model", TASK)


@pytest.mark.parametrize(("config", "problem"), [("{", "is not valid JSON"), ("[]", "holds no keys and values")])
def test_a_damaged_config_ends_in_one_line(tiny_models, tmp_path, config, problem):
    settings = write_student(tiny_models / "tiny-bert", tmp_path / "plain")
    (tmp_path / "config.json").write_text(config)
    for use in (lambda: load_model(tmp_path, "causal"), lambda: write_exports(tmp_path, settings)):
        with pytest.raises(UserError, match=f"cannot be loaded: its config.json {problem}"):
            use()


def test_it_is_planned_from_shapes_alone(tiny_models, tmp_path):
    model, spec = student(tiny_models)
    save_model(model.model, model.tokenizer, tmp_path / "model")
    with shapes_alone():
        planned, _ = student(tiny_models)
        assert count_parameters(planned.model) == count_parameters(model.model)
        assert (
            count_parameters(load_student(spec, tmp_path / "model", TASK).model)[0] == count_parameters(model.model)[0]
        )


def test_its_speed_and_memory_are_those_of_its_own_shape():
    """Merged adapters leave the shape of a model as it was, these do not."""

    def shape(**adapter) -> str:
        return student_shape(StudentConfig(model="m", arch="classifier", phases=[], adapter=adapter))

    assert shape() == shape(kind="lora", r=4) != shape(**SERIES)
    assert shape(**SERIES) == shape(**SERIES) != shape(**SERIES | {"size": 8})


def test_it_is_not_exported(tiny_models, tmp_path):
    model, _ = student(tiny_models)
    settings = write_student(tiny_models / "tiny-bert", tmp_path / "plain")
    save_model(model.model, model.tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="^s has series adapters, which no export can hold; train it with `lora`$"):
        write_exports(tmp_path / "model", settings)
    assert not (tmp_path / "model/onnx").exists()


def test_it_is_served_and_pushed_as_other_students_are(tiny_models, tmp_path):
    model, _ = student(tiny_models)
    disturb(model.model)
    settings = write_student(tiny_models / "tiny-bert", tmp_path / "plain")
    save_model(model.model, model.tokenizer, folder := tmp_path / "model")
    write_json(folder / SETTINGS_FILE, settings.model_dump())
    (folder / "README.md").write_text("a card")
    model.max_length = settings.max_length
    assert np.array_equal(open_predictor(folder, settings, "auto", 1).predict(TEXTS), model.predict(TEXTS))
    assert {"model.series.safetensors", ADAPTER_WEIGHTS} <= set(student_files(folder))
