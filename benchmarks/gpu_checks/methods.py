"""What models compute on the device: number formats, token trees, sampling, int8, deterministic algorithms."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

from architectures import ARCHITECTURES, END, PAD, WINDOW, drawn_rows, random_model
from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models import forward_check, precision
from distillery.models.devices import default_device
from distillery.models.generation import end_tokens
from distillery.models.int8 import Int8Linear
from distillery.models.packed.hidden import completion_hidden_states
from distillery.models.packed.recorded_passes import RecordedPasses, recorded_passes
from distillery.models.runtime import configure_runtime
from distillery.training.machine import machine_name
from distillery.training.teacher_models import load_teacher_model
from gpu_checks import Place, use_device
from gpu_checks.students import TASK, corpus_rows, largest_difference, teacher_of

VOCABULARY = 97
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=END)  # all that is read of one
LENGTHS = (9, 14, 90, 70)  # of rows: the batches of two fill sequences of two lengths
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "albert": SHAPE | {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "mpnet": SHAPE,
    "deberta-v2": SHAPE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": SHAPE | {"cls_token_id": 2, "sep_token_id": END},
}


def choose_device_and_dtype(place: Place) -> str:
    """The device that is chosen without a name, the number formats that `dtype: auto` takes, and their times."""
    use_device("")
    chosen = default_device().type
    assert chosen == place.device or place.device == "cpu", f"{chosen} is chosen, not {place.device}"
    use_device(place.device)
    configure_runtime()
    if not place.is_gpu:
        precision.LAYERS, precision.TOKENS, precision.ROUNDS = 1, 8, 1
    path = place.folder / "dtype.json"
    dtypes = precision.faster_dtypes(path)  # times both, and keeps the choice
    assert precision.faster_dtypes(path) == dtypes
    (record,) = json.loads(path.read_text()).values()
    times = "; ".join(
        f"{use} {', '.join(f'{dtype} {1000 * s:.2f} ms' for dtype, s in of_use.items())}: {dtypes[use]}"
        for use, of_use in record["seconds"].items()
    )
    return f"{machine_name()}; {times}"


def nucleus_sampling(place: Place) -> str:
    """Drawn tokens, with and without `top_p`, of token trees and of padded batches, twice the same."""
    figures, failures = [], []
    for arch in ("causal", "seq2seq"):
        model = teacher_of(place, arch, place.folder)["teacher"].open_fold(-1)
        ids = model.encode(corpus_rows(8).texts)
        for top_p in (1.0, 0.9):
            title = f"{arch}, top_p {top_p:g}"
            try:
                drawn = [
                    model.generate_tokens(ids, max_new_tokens=6, temperature=0.7, top_p=top_p, seed=1) for _ in range(2)
                ]
                (figures if drawn[0] == drawn[1] else failures).append(title)
            except RuntimeError as error:
                failures.append(f"{title}: {str(error).splitlines()[0]}")
    assert not failures, "; ".join(failures)
    return f"same tokens twice: {'; '.join(figures)}"


def _methods(model: Any, dtype: torch.dtype) -> tuple[str, float, list[str]]:
    """The methods for `model` in `dtype`, the largest difference of a used one as a share of its tolerance, and why."""
    device = next(model.parameters()).device.type

    def autocast() -> Any:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    with forward_check.undisturbed(model), autocast(), contextlib.redirect_stdout(io.StringIO()):
        torch.set_autocast_cache_enabled(False)
        compared = forward_check._ComparedRows(model, 64, dtype, end_tokens(model, TOKENIZER))
        errors: list[float] = []
        for name in ("_scoring_error", "_generation_error"):
            setattr(compared, name, _recorded(getattr(compared, name), compared.tolerance, errors))
        methods = compared.choose_methods(64)
    return (
        f"{methods.scoring}/{methods.generation}",
        max(errors, default=0.0) / compared.tolerance,
        compared.differences,
    )


def _recorded(error: Any, tolerance: float, errors: list[float]) -> Any:
    """`error` that appends to `errors` what is within the tolerance."""

    def record(method: str) -> float:
        value = error(method)
        if value <= tolerance:
            errors.append(value)
        return value

    return record


def forward_methods(place: Place) -> str:
    """The methods of each architecture, on the device and on the CPU, and their differences from the plain pass."""
    configure_runtime()
    names = list(ARCHITECTURES) if place.is_gpu else ["llama", "gpt2", "bloom"]
    others, shares, failures, on_cpu = [], {}, [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in names:
            model = random_model(name, VOCABULARY)
            if dtype == torch.float32:
                on_cpu[name] = _methods(model, dtype)[0]
            try:
                method, share, reasons = _methods(model.to(place.device), dtype)
            except Exception as error:
                failures.append(f"{name} in {str(dtype)[6:]}: {(str(error).splitlines() or ['?'])[0]}")
                continue
            shares[str(dtype)[6:]] = max(shares.get(str(dtype)[6:], (0.0, "")), (share, name))
            if method != on_cpu[name]:
                others.append(f"{name} in {str(dtype)[6:]}: {method}, not {on_cpu[name]} ({'; '.join(reasons)})")
    figure = "largest difference as a share of the tolerance: "
    figure += ", ".join(f"{dtype} {share:.2f} ({name})" for dtype, (share, name) in shares.items())
    figure += f"; other methods than on the CPU in float32: {len(others)} of {2 * len(names)}"
    print("\n".join(others + failures), flush=True)
    assert not failures, f"{len(failures)} fail: {failures[0]}; {figure}"
    return figure + (f", first {others[0]}" if others else "")


def _backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def _training_models() -> dict[str, Any]:
    """Functions that build a model of each architecture for training."""
    models: dict[str, Any] = {name: lambda name=name: random_model(name, VOCABULARY) for name in ARCHITECTURES}

    def encoder(kind: str) -> Any:
        ends = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END}
        config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_labels=3, **ends, **ENCODERS[kind])
        return transformers.AutoModelForSequenceClassification.from_config(config)

    models |= {kind: lambda kind=kind: encoder(kind) for kind in ENCODERS}
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
    config = transformers.AutoConfig.for_model("t5", vocab_size=VOCABULARY, pad_token_id=PAD, **shape)
    return models | {"t5": lambda: transformers.AutoModelForSeq2SeqLM.from_config(config)}


def deterministic_architectures(place: Place) -> str:
    """A training step of each architecture, twice: the gradients are equal, or an operation has no such algorithm."""
    configure_runtime()
    rows = torch.tensor(drawn_rows(VOCABULARY, WINDOW + 8, WINDOW + 8, WINDOW + 8))
    models = _training_models()
    equal, problems = 0, []
    for name in models if place.is_gpu else ("llama", "bert", "t5"):
        try:
            model = models[name]().to(place.device).train()
        except Exception as error:  # this release of transformers has no such model
            print(f"{name}: cannot be built: {error}", flush=True)
            continue
        labels = torch.tensor([0, 1, 2]) if name in ENCODERS else rows
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}
        batch = {key: value.to(place.device) for key, value in batch.items()}
        try:
            first, second = _backward(model, batch), _backward(model, batch)
            if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                equal += 1
            else:
                problems.append(f"{name}: other gradients the second time")
        except Exception as error:
            problems.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
    print("\n".join(problems), flush=True)
    figure = f"equal gradients: {equal} of {equal + len(problems)} architectures"
    assert not problems, f"{figure}; {'; '.join(problems)[:300]}"
    return figure


def recorded_steps(place: Place) -> str:
    """Losses and gradients of recorded passes beside plain ones, of each architecture that is scored by token trees."""
    configure_runtime()
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, VOCABULARY - 4, (n,), generator=draw).tolist() for n in LENGTHS]
    batches = [[rows[i] for i in pair] for pair in ((0, 1), (2, 3), (1, 0), (2, 1))]
    equal, refused, problems = 0, [], []
    for name in ARCHITECTURES if place.is_gpu else ("llama", "gpt2"):
        for dtype in (torch.float32, torch.bfloat16):
            title = f"{name} in {str(dtype)[6:]}"
            try:
                apart, reason = _recorded_beside_plain(name, place.device, dtype, batches)
            except Exception as error:  # not a model for trees, or one that this release of transformers lacks
                print(f"{title}: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
                continue
            if reason:
                refused.append(name)
                print(f"{title}: {reason}", flush=True)
            elif apart > torch.finfo(dtype).eps ** 0.5:
                problems.append(f"{title}: {apart:.1e} apart")
            else:
                equal += 1
    print("\n".join(problems), flush=True)
    figure = f"{equal} equal, {len(refused)} not recorded ({', '.join(dict.fromkeys(refused))})"
    assert not problems, f"{len(problems)} differ: {problems[0]}; {figure}"
    return figure


def _recorded_beside_plain(
    name: str, device: str, dtype: torch.dtype, batches: list[list[list[int]]]
) -> tuple[float, str]:
    """How far losses and gradients of recorded passes are from plain ones, relative; or why none are recorded."""
    model = random_model(name, VOCABULARY).to(device).train()
    printed = io.StringIO()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        plain, reference = _summed_gradients(model, batches, None)
        recorded = recorded_passes(model)
        if recorded is None:
            return 0.0, "nothing to record, or dropout"
        with contextlib.redirect_stdout(printed):
            losses, gradients = _summed_gradients(model, batches, recorded)
    apart = float((gradients - reference).abs().max() / reference.abs().max())
    return max(apart, largest_difference(losses, plain)), "" if recorded.usable else printed.getvalue().strip()


def _summed_gradients(
    model: Any, batches: list[list[list[int]]], recorded: RecordedPasses | None
) -> tuple[list[float], torch.Tensor]:
    """The losses of `batches`, and the gradients of all weights of the layers summed over them."""
    model.zero_grad()
    losses = []
    for prompts in batches:
        states = completion_hidden_states(model, prompts, [[[5, END], [6]]] * len(prompts), recorded=recorded)
        loss = states.hidden[states.index].float().sigmoid()[:, ::3].mean()
        loss.backward()
        losses.append(loss.item())
    return losses, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def int8_teacher(place: Place) -> str:
    """A prompted teacher in int8 ends in one line on a GPU; and what the products themselves would do there."""
    spec = TeacherConfig.model_validate({"kind": "lm", "model": "tiny", "quantize": "int8"})
    origin = ModelConfig.model_validate({"folder": str(place.models / "tiny-llama")})
    try:
        load_teacher_model("teacher", spec, origin, TASK)
        line = "it runs"
    except UserError as mistake:
        line = str(mistake)
    assert (line == "it runs") != place.is_gpu and "\n" not in line, line
    layer, products = Int8Linear(nn.Linear(64, 48)).to(place.device), []
    for tokens in (1, 5, 17, 32):
        try:
            layer(torch.randn(tokens, 64, device=place.device))
            products.append(f"{tokens}: yes")
        except RuntimeError as error:
            products.append(f"{tokens}: no ({str(error).splitlines()[0][:60]})")
    return f"{line}; products of tokens: {', '.join(products)}"
