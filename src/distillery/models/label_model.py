"""A model with a task: texts in, a distribution over the labels out, or a probability of each label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.errors import UserError
from distillery.models.batches import batches_by_length
from distillery.models.encoding import Completion, check_token_ids, cut_prompts, tokenize_labels
from distillery.models.forward_check import check_forward
from distillery.models.forward_methods import ForwardMethods
from distillery.models.generation import end_tokens, first_line, first_paragraph, generate_batch, one_line
from distillery.models.packed.decoding import compute_prefix_kv
from distillery.models.packed.frozen_layers import FrozenStates
from distillery.models.packed.recorded_passes import RecordedPasses
from distillery.models.packed.token_tree import common_prefix
from distillery.models.runtime import configure_runtime
from distillery.models.scoring import (
    ModelOutput,
    causal_token_logits,
    completion_output,
    scored_completions,
    seq2seq_token_logits,
)
from distillery.models.windows import Windows, encode_texts, windowed_output
from distillery.tasks.prompts import RATIONALE_CUE, chat_turns, render_answer, render_prompt
from distillery.tasks.schema import FewShotExample, Task

MAX_ANSWER_TOKENS = 16  # that a free answer may take


class LabelModel:
    """A model with a task: texts in, a distribution over the task's labels out. Teachers and students alike.

    `texts` become token ids by :meth:`encode`; :meth:`forward` is what training differentiates; :meth:`predict`
    is where signals and predictions come from. :meth:`answer_questions` takes its place for a `qa` task.

    arch: `causal`, `seq2seq` or `classifier`. prompt: the style of :func:`render_prompt`, not for a classifier.
    few_shot: solved examples of the task file in a prompt. max_length: tokens of an encoded text, with its prompt.
    dtype: the precision of products. batch_size: rows predicted at a time. windows: in which a classifier reads texts.

    Raises UserError for a classifier of a `qa` task, for another model of a `multilabel` task, and for labels that are
    the same tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        arch: str,
        *,
        prompt: str = "chat",
        few_shot: int = 0,
        max_length: int = 256,
        dtype: str = "float32",
        batch_size: int = 32,
        windows: Windows | None = None,
    ):
        configure_runtime()
        self.model, self.tokenizer, self.task, self.arch = model, tokenizer, task, arch
        self.prompt_style, self.few_shot, self.max_length = prompt, few_shot, max_length
        self.dtype, self.batch_size, self.windows = getattr(torch, dtype), batch_size, windows
        self.frozen_states: FrozenStates | None = None  # for training, as the next
        self.recorded: RecordedPasses | None = None
        self.known_states: FrozenStates | None = None  # for prediction
        self.sharded: Any = None  # the root of its shards, where several processes hold a part of each weight
        self._methods, self._longest_row = ForwardMethods(), 0  # tokens of the longest text that was encoded
        if arch != "classifier" and task.kind == "multilabel":
            raise UserError(f"params.yaml: a `multilabel` task needs a classifier: {arch} writes one label")
        if arch != "classifier":
            # the answers of a `qa` task are those of the rows at hand: see :meth:`set_answers`
            answers = [render_answer(task, name, prompt) for name in ([] if task.kind == "qa" else task.names)]
            self.label_token_ids = tokenize_labels(tokenizer, answers)
        elif task.kind == "qa":
            raise UserError("params.yaml: a classifier writes no answers: a `qa` task needs a model that does")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def longest_answer(self) -> int:
        """Tokens that the longest label with its end token takes behind a prompt; 0 of a classifier."""
        return 0 if self.arch == "classifier" else max(map(len, self.label_token_ids), default=0) + 1

    def autocast(self) -> torch.autocast:
        """Products in the model's `dtype`, not on `meta`; what must stay in float32 (trained weights, softmax) does."""
        return torch.autocast(self.device.type.replace("meta", "cpu"), self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, texts: Sequence[str], shots: Sequence[Sequence[FewShotExample]] | None = None) -> list[list[int]]:
        """Token ids of every text, with the prompt around it for a generative model; at most `max_length` tokens.

        shots: solved examples for each text, instead of the first `few_shot` of the task file.
        A text that is too long loses its end, never the prompt. Raises UserError when the prompt alone is too long,
        and when the tokenizer is not the model's.
        """
        if self.arch == "classifier":
            ids = encode_texts(self.tokenizer, texts, self.max_length, self.windows)
        else:
            ids = cut_prompts(self.tokenizer, texts, shots, self.prompt_ids, self.max_length)
        check_token_ids(ids, self.tokenizer, self.model)
        self._longest_row = max([self._longest_row, *map(len, ids)])
        return ids

    def forward_methods(self, ids: Sequence[Sequence[int]], new_tokens: int) -> ForwardMethods:
        """How a causal model computes rows `ids` with `new_tokens` more; see :func:`check_forward`."""
        length = max([self._longest_row, *map(len, ids)]) + new_tokens
        if self.arch == "causal" and length > self._methods.length:
            self._methods = check_forward(self.model, self.tokenizer, length, self.autocast)
        return self._methods

    def prompt_for(self, text: str, solved: Sequence[FewShotExample] | int) -> str:
        """The prompt of a generative model for `text`, with the examples `solved`, or so many of the task file's."""
        return render_prompt(chat_turns(self.task, text, solved), self.tokenizer, self.prompt_style)

    def prompt_ids(self, text: str, solved: Sequence[FewShotExample] | None = None) -> list[int]:
        """Token ids of the prompt for `text`, however long; an encoder's end with the token it was trained with."""
        special = self.prompt_style == "plain" or self.arch == "seq2seq"
        prompt = self.prompt_for(text, self.few_shot if solved is None else solved)
        return self.tokenizer(prompt, add_special_tokens=special)["input_ids"]

    def label_completion(self, label: int) -> Completion:
        """The answer `label` (an index) with the token that ends it, all of it supervised."""
        tokens, end = self.label_token_ids[label], [self.tokenizer.eos_token_id]
        return (tokens if tokens[-1:] == end else tokens + end), 0

    def set_answers(self, answers: Sequence[str]) -> None:
        """Let labels be the texts `answers`: the answers to the questions of a `qa` task."""
        rendered = [render_answer(self.task, answer, self.prompt_style) for answer in answers]
        self.label_token_ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]

    def row_completions(self, label: int, rationale: str | None = None) -> list[Completion]:
        """The completions that a row is trained on: its answer, then the rationale if there is one."""
        return [self.label_completion(label), *([self.rationale_completion(label, rationale)] if rationale else [])]

    def rationale_completion(self, label: int, rationale: str) -> Completion:
        """`rationale` after the answer `label`: a second task, marked by :data:`RATIONALE_CUE`."""
        name = render_answer(self.task, self.task.names[label], self.prompt_style)
        before = self.tokenizer(name + RATIONALE_CUE, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(f" {rationale}", add_special_tokens=False)["input_ids"]
        return [*before, *after, self.tokenizer.eos_token_id], len(before)

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Completion]] | None = None,
        *,
        label_space: bool = True,
        layers: Sequence[int] = (),
        activation_maps: bool = False,
        prefix_kv: Any = None,
    ) -> ModelOutput:
        """Score rows `ids` [n][tokens]; see :class:`ModelOutput` for the result.

        completions: [n][any number] of token sequences to score after each row; not for a classifier.
        label_space: whether to compute the label logits. layers: of which to return hidden states (0 the embeddings, j
        the output of layer j, as `transformers` counts them). activation_maps: of these layers, for encoders.
        prefix_kv: keys and values of the tokens that all rows begin with; see :func:`compute_prefix_kv`.
        """
        if self.arch == "classifier":
            with self.autocast():
                return windowed_output(self.model, self.tokenizer, ids, layers, activation_maps, self.windows)
        labels = self.label_token_ids if label_space else []
        scored = scored_completions(len(ids), labels, completions, self.tokenizer.eos_token_id)
        tokens = [[completion for completion, _ in row] for row in scored]
        methods = self.forward_methods(ids, max(len(completion) for row in tokens for completion in row))
        with self.autocast():
            if self.arch == "seq2seq":
                token_logits = seq2seq_token_logits(self.model, self.tokenizer, ids, tokens, layers)
            else:
                computed = (self.frozen_states, self.recorded) if torch.is_grad_enabled() else (self.known_states,)
                token_logits = causal_token_logits(self.model, ids, tokens, layers, prefix_kv, methods, *computed)
        return completion_output(token_logits, scored, len(labels) if label_space else None, bool(completions))

    @torch.no_grad()
    def predict(
        self,
        texts: Sequence[str],
        shots: Sequence[Sequence[FewShotExample]] | None = None,
        *,
        n_options: Sequence[int] | None = None,
        cached: Sequence[Sequence[float] | None] | None = None,
        on_batch: Callable[[list[int], np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32, each row summing to 1 but for a `multilabel` task.

        The tokens that all prompts begin with (instruction, solved examples) are computed once, not once a batch.
        shots: see :meth:`encode`. n_options: of a `choice` task, how many labels have an option; the others get 0.

        cached: probabilities from an earlier run, None where there are none. on_batch: called after every batch with
        the indices and probabilities that were not cached. Batches are cut from all rows, so a run that continues
        gives, to the bit, what one run would have given. Raises ValueError for a `qa` task, which has free answers.
        """
        if self.task.kind == "qa":
            raise ValueError("predict: a `qa` task has no distribution over labels; use answer_questions")
        ids, limits = self.encode(texts, shots), None if n_options is None else list(n_options)
        probabilities = np.zeros((len(ids), len(self.task.names)), dtype=np.float32)
        wanted = np.array([cached is None or cached[i] is None for i in range(len(ids))], dtype=bool)
        for i in np.flatnonzero(~wanted):
            probabilities[i] = cached[i]
        if not wanted.any():
            return probabilities
        training = self.model.training
        self.model.eval()
        methods = self.forward_methods(ids, MAX_ANSWER_TOKENS)
        with self.autocast():
            prefix_kv = self._prefix_kv(ids, methods.scoring) if len(ids) > 1 else None
        for rows in batches_by_length(ids, self.batch_size):
            new = [i for i in rows if wanted[i]]
            if not new:
                continue
            logits = self.forward([ids[i] for i in rows], prefix_kv=prefix_kv).label_logits
            if limits is not None:
                for row, i in zip(logits, rows, strict=True):
                    row[limits[i] :] = -torch.inf
            values = logits.sigmoid() if self.task.kind == "multilabel" else logits.softmax(-1)
            probabilities[new] = values.cpu().numpy()[wanted[rows]]
            if on_batch:
                on_batch(new, probabilities[new])
        self.model.train(training)
        return probabilities

    def _prefix_kv(self, ids: Sequence[Sequence[int]], method: str) -> Any:
        """Keys and values of what all rows `ids` begin with; None where `method` or shards cannot share it."""
        shared = bool(ids) and self.arch == "causal" and method == "packed" and self.sharded is None
        return compute_prefix_kv(self.model, ids[0][: common_prefix(ids)]) if shared else None

    def answer_questions(
        self,
        texts: Sequence[str],
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        *,
        cached: Sequence[str | None] | None = None,
        on_batch: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """The model's answer to each of `texts`, greedily decoded, up to the end of a line; as it was trained to.

        cached, on_batch: as in :meth:`generate`.
        """
        settings = {"max_new_tokens": max_new_tokens, "batch_size": self.batch_size}
        return self._generate_texts(lambda: self.encode(texts), len(texts), first_line, cached, on_batch, **settings)

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        cached: Sequence[str | None] | None = None,
        on_batch: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """The model's next turn in each conversation (turns as in a chat), one line; drawn by :func:`next_tokens`.

        Whatever the style of its label prompt, a model with a chat template is prompted by it: it then knows when to
        stop. Without one the answer ends at the first empty line.

        cached: answers from an earlier run, None where there is none. on_batch: called after every batch with the
        indices and texts that were not cached. A batch draws the same random numbers whatever came before it, so
        a run that continues gives what one run would have given.
        """
        style = "chat" if self.tokenizer.chat_template else "plain"

        def encode() -> list[list[int]]:
            prompts = [render_prompt(turns, self.tokenizer, style) for turns in conversations]
            special = style == "plain" or self.arch == "seq2seq"
            return [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in prompts]

        clean = first_paragraph if style == "plain" else one_line
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        settings |= {"seed": seed, "batch_size": batch_size}
        return self._generate_texts(encode, len(conversations), clean, cached, on_batch, **settings)

    def _generate_texts(
        self,
        encode: Callable[[], list[list[int]]],
        n: int,
        clean: Callable[[str], str],
        cached: Sequence[str | None] | None,
        on_batch: Callable[[list[int], list[str]], None] | None,
        **settings: Any,
    ) -> list[str]:
        """`clean`ed texts after `n` prompts, which `encode` gives; only those that are not `cached` are generated."""
        texts = [None] * n if cached is None else list(cached)
        wanted = [text is None for text in texts]
        if not any(wanted):
            return texts

        def store_batch(rows: list[int], tokens: list[list[int]]) -> None:
            decoded = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text in zip(rows, decoded, strict=True):
                if wanted[i]:
                    texts[i] = clean(text)
            new = [i for i in rows if wanted[i]]
            if on_batch:
                on_batch(new, [texts[i] for i in new])

        self.generate_tokens(encode(), wanted=wanted, on_batch=store_batch, **settings)
        return texts

    @torch.no_grad()
    def generate_tokens(
        self,
        ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        wanted: Sequence[bool] | None = None,
        on_batch: Callable[[list[int], list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """The tokens generated after each prompt, up to and with its end token; greedy when `temperature` is 0.

        The tokens that all prompts begin with are computed once; torch's random state is left as it was. wanted: a
        batch without a wanted row is left out. on_batch: called with the rows and tokens of each batch.
        """
        training, completions = self.model.training, [[] for _ in ids]
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        settings |= end_tokens(self.model, self.tokenizer)
        self.model.eval()
        # weights that are being trained lie in float32 whatever the precision of the products
        wide = any(weight.dtype == torch.float32 for weight in self.model.parameters())
        methods = self.forward_methods(ids, max_new_tokens)
        with torch.random.fork_rng(), self.autocast() if wide else nullcontext():
            prefix_kv = self._prefix_kv(ids, methods.generation)
            for k, rows in enumerate(batches_by_length(ids, batch_size)):
                if wanted is not None and not any(wanted[i] for i in rows):
                    continue
                torch.manual_seed(1_000_003 * seed + k * batch_size)
                generated = generate_batch(self.model, [ids[i] for i in rows], prefix_kv, methods, **settings)
                for i, tokens in zip(rows, generated, strict=True):
                    completions[i] = tokens
                if on_batch:
                    on_batch(rows, generated)
        self.model.train(training)
        return completions
