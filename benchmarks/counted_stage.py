"""Run a stage's notebook cell by cell and count its operations; see :mod:`default_run`.

It uses of the package what commits long ago had, too: `LabelModel`, its tokens and its token trees.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from operations import LinearCount, count_operations
from replayed_generation import conversation_key, generation_numbers, kept_texts, learn_generation
from transformers import Trainer

from distillery.evaluation import speed
from distillery.models import label_model
from distillery.models.label_model import LabelModel
from distillery.models.packed import decoding
from distillery.models.packed.token_tree import pack_token_tree

KINDS = ("training", "prediction", "generation")


def call_numbers(model: LabelModel, ids: list, completions: Any, label_space: bool, prefix_kv: Any) -> list[int]:
    """The numbers of a call whose linear function its operations are: see :class:`operations.LinearCount`.

    Of an encoder, padded: rows, tokens, and tokens that meet in attention. Of a causal model: tokens in the sequence,
    positions with logits, and the pairs of tokens that meet: own with own, own with prefix, prefix with prefix.
    """
    if model.arch == "classifier":
        width = max(map(len, ids))
        return [len(ids), len(ids) * width, len(ids) * width**2]
    labels = [(tokens, len(tokens)) for tokens in model.label_token_ids] if label_space else []
    scored = [[*labels, *(completions[i] if completions else [])] for i in range(len(ids))]
    tree = pack_token_tree(ids, [[tokens for tokens, _ in row] for row in scored], prefix_kv)
    (rows, width), prefix = tree.own_index.shape, tree.prefix_length
    tokens, positions = tree.input_ids.shape[1], len(set(tree.logit_positions.tolist()))
    return [tokens, positions, rows * width**2, rows * width * prefix, prefix**2]


def model_signature(model: LabelModel) -> str:
    """A text that is equal for models whose calls take the same operations: layers, shapes, what is trained."""
    weights = [(name, tuple(weight.shape), weight.requires_grad) for name, weight in model.model.named_parameters()]
    frozen = getattr(getattr(model, "frozen_states", None), "depth", 0)
    return str([model.arch, weights, frozen])


class StageCounter:
    """Counts the calls of a stage by kind.

    sampled: whether calls are left out whose operations follow from those of calls before. known: text -> the
    probabilities that the finished run predicted, which stand in for those of a model that was not trained. texts:
    conversation -> the text that the finished run generated. predicted: whether every prediction runs all the same.
    """

    def __init__(
        self, sampled: bool, known: dict[str, Any], texts: dict[str, str] | None = None, predicted: bool = False
    ):
        self.sampled, self.known, self.texts, self.predicted = sampled, known, texts or {}, predicted
        self.replayed: dict[tuple[int, ...], list[int]] = {}  # prompt -> generated tokens of the finished run
        self.missing = 0  # generated texts that the finished run has not kept
        self.counter = count_operations()
        self.counts: dict[str, LinearCount] = defaultdict(LinearCount)
        self.by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.left_out, self.calls = 0, 0  # operations, calls
        self.within: str | None = None  # the kind of the call that runs

    def total(self) -> int:
        """All operations so far, those of calls that were left out, too."""
        return self.counter.get_total_flops() + self.left_out

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Whatever is computed in this block is of the kind `name`, but for blocks inside blocks."""
        if self.within:
            yield
            return
        start, self.within = self.total(), name
        try:
            yield
        finally:
            self.by_kind[name] += self.total() - start
            self.within = None

    def call(self, key: str, numbers: list[int], run: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """`run`, or, where its operations are known from calls before, `otherwise`."""
        estimate = self.counts[key].estimate(numbers) if self.sampled else None
        if estimate is not None:
            self.left_out += estimate
            self.calls += 1
            return otherwise()
        start = self.counter.get_total_flops()
        result = run()
        self.counts[key].add(numbers, self.counter.get_total_flops() - start)
        return result

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Training steps and predictions go through this counter, within the block.

        The evaluation's test of speed repeats its predictions as often as time allows; here each model has one round.
        """
        step, forward = Trainer.training_step, LabelModel.forward
        predict = LabelModel.predict

        def counted_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch, student = inputs["micro_batch"], trainer.student
            ids, requested = [trainer.token_ids[i] for i in batch.rows], trainer.phase_loss.requested_outputs
            numbers = call_numbers(student, ids, batch.completions, requested["label_space"], None)
            key = f"step {model_signature(student)} {sorted(trainer.phase.loss)} {requested}"
            run = lambda: step(trainer, model, inputs, *args, **kwargs)  # noqa: E731
            with self.kind("training"):
                return self.call(key, numbers, run, lambda: torch.zeros(()))

        def counted_forward(model: LabelModel, ids: list, *args: Any, **kwargs: Any) -> Any:
            run = lambda: forward(model, ids, *args, **kwargs)  # noqa: E731
            if self.predicted or args or set(kwargs) - {"prefix_kv"} or torch.is_grad_enabled():
                return run()
            prefix_kv = kwargs.get("prefix_kv")
            numbers = call_numbers(model, ids, None, True, prefix_kv)
            labels = torch.zeros(len(ids), len(model.task.names))
            key = f"batch {model_signature(model)} {prefix_kv is None}"
            return self.call(key, numbers, run, lambda: label_model.ModelOutput(labels))

        def counted_predict(model: LabelModel, texts: list, *args: Any, **kwargs: Any) -> Any:
            with self.kind("prediction"):
                probabilities = predict(model, texts, *args, **kwargs)
            for i, text in enumerate(texts):
                if text in self.known:
                    probabilities[i] = self.known[text]
            return probabilities

        with (
            patch.object(Trainer, "training_step", counted_step),
            patch.multiple(LabelModel, forward=counted_forward, predict=counted_predict),
            self.generation_installed(),
            patch.object(speed, "throughput", partial(speed.throughput, budget=1e-9)),
            self.counter,
        ):
            yield

    @contextmanager
    def generation_installed(self) -> Iterator[None]:
        """Generation goes through this counter, within the block: texts that the finished run kept are not generated
        again."""
        generate, generate_tokens = LabelModel.generate, LabelModel.generate_tokens
        decode, conversations = decoding.decode_completions, []

        def counted_conversations(model: LabelModel, turns: list, **kwargs: Any) -> Any:
            conversations[:] = [self.texts.get(conversation_key(conversation)) for conversation in turns]
            return generate(model, turns, **kwargs)

        def counted_tokens(model: LabelModel, ids: list, **kwargs: Any) -> Any:
            end, longest = [model.tokenizer.eos_token_id], kwargs["max_new_tokens"]
            for prompt, text in zip(ids, conversations, strict=True) if len(conversations) == len(ids) else []:
                tokens = [] if text is None else model.tokenizer(text, add_special_tokens=False)["input_ids"] + end
                self.replayed[tuple(prompt)] = tokens[:longest] or [0] * longest
                self.missing += text is None
            with self.kind("generation"):
                return generate_tokens(model, ids, **kwargs)

        def counted_decode(model: Any, prompts: list, prefix_kv: Any, **kwargs: Any) -> Any:
            def run(rows: list, **changed: Any) -> tuple[list[list[int]], int]:
                start = self.counter.get_total_flops()
                tokens = decode(model, rows, prefix_kv, **kwargs | changed)
                return tokens, self.counter.get_total_flops() - start

            tokens = [self.replayed.get(tuple(prompt)) for prompt in prompts]
            if not self.sampled or self.within != "generation" or None in tokens or not self.texts:
                return run(prompts)[0]
            count = self.counts[f"generation {type(model)} {len(prefix_kv)}"]
            self.left_out -= learn_generation(count, run, prompts, prefix_kv)
            numbers = generation_numbers(prompts, list(map(len, tokens)), prefix_kv, kwargs["max_new_tokens"])
            estimate = count.estimate(numbers)
            if estimate is None:
                return run(prompts)[0]
            self.left_out += estimate
            return tokens

        with ExitStack() as patches:
            patches.enter_context(
                patch.multiple(LabelModel, generate=counted_conversations, generate_tokens=counted_tokens)
            )
            for module in list(sys.modules.values()):
                if getattr(module, "decode_completions", None) is decode:
                    patches.enter_context(patch.object(module, "decode_completions", counted_decode))
            yield


def known_probabilities(folder: Path, stage: str) -> dict[str, Any]:
    """Text -> probabilities that the teacher of a stage gave its rows in the finished run; empty for other stages."""
    notebook, _, teacher = stage.partition("-")
    if notebook != "02_teach":
        return {}
    signals = pd.read_parquet(folder / "data/teacher" / teacher / "signals.parquet")
    known = {}
    for (source, split), part in signals.groupby(["source", "split"]):
        texts = pd.read_parquet(folder / "data/processed" / source / f"{split}.parquet").set_index("id")["text"]
        known |= dict(zip(texts.loc[part["id"]], part["probabilities"], strict=True))
    return known


def notebook_parts(notebook: Path, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, code) of each code cell: its section, and the first sentence before it where a section has several.

    values: what stands in place of the defaults in the cell of parameters.
    """
    section, sentence, codes = "", "", []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines = [line for line in source.splitlines() if line]
            section = lines[0].lstrip("# ") if source.startswith("#") else section
            sentence = "" if source.startswith("#") else re.sub(r"[*`$]", "", lines[0]).split(".")[0]
        elif "parameters" in cell["metadata"].get("tags", []):
            codes.append((section, "\n".join(f"{name} = {value!r}" for name, value in values.items())))
        else:
            codes.append((f"{section}: {sentence}" if sentence else section, source))
    yield from codes


def count_stage(folder: Path, stage: str, store: Path, sampled: bool = True) -> list[dict[str, Any]]:
    """Run the notebook of `stage` in `folder` and count it: a record (part, operations by kind) for each cell with
    some. Prints how many calls were left out.

    store: answers of the finished run. sampled: see :class:`StageCounter`.
    """
    notebook, *selectors = stage.split("-", 1)
    values: dict[str, Any] = {}
    if notebook == "04_distill":
        student, _, seed = selectors[0].rpartition("-")
        values = {"student": student, "seed": int(seed)}
    elif selectors:
        values = {{"01_data": "source", "02_teach": "teacher"}[notebook]: selectors[0]}
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    known, predicted = known_probabilities(folder, stage), notebook == "03_augment"  # its predictions choose rows
    counter, records = StageCounter(sampled, known, kept_texts(store), predicted), []
    with counter.installed():
        for title, code in notebook_parts(Path("notebooks") / f"{notebook}.ipynb", values):
            start, before = counter.total(), dict(counter.by_kind)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, title, "exec"), namespace)
            done = {kind: counter.by_kind[kind] - before[kind] for kind in KINDS}
            done["other"] = counter.total() - start - sum(done.values())
            if any(done.values()):
                records.append({"part": title} | done)
                print(f"{stage}: {title}: {sum(done.values()) / 1e12:.3f} TFLOP", flush=True)
    print(f"{stage}: {counter.calls} calls were left out, {counter.missing} generated texts are unknown", flush=True)
    return records or [{"part": "", **dict.fromkeys(KINDS, 0), "other": 0}]
