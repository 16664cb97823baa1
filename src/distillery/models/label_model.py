"""A model with a task: texts in, a distribution over the labels out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distillery.errors import UserError
from distillery.models.layers import output_head
from distillery.models.packed.decoding import compute_prefix_kv, decode_completions
from distillery.models.packed.hidden import completion_hidden_states
from distillery.models.packed.token_tree import common_prefix
from distillery.tasks.prompts import (
    PLAIN_SEPARATOR,
    RATIONALE_CUE,
    chat_turns,
    count_options,
    render_answer,
    render_prompt,
)
from distillery.tasks.schema import FewShotExample, Task

MAX_ANSWER_TOKENS = 16  # that a free answer may take


def tokenize_labels(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each label's answer; an end token follows where one answer is the beginning of another.

    Raises UserError when two answers are the same tokens.
    """
    tokens = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    nested = any(a is not b and b[: len(a)] == a for a in tokens for b in tokens)
    if len({tuple(t) for t in tokens}) < len(tokens) or not all(tokens):
        raise UserError(
            f"{Path(tokenizer.name_or_path).name}: labels {', '.join(repr(a.strip()) for a in answers)} are not "
            "distinct tokens for its tokenizer; give them other words under `verbalizer` in the task file"
        )
    return [[*t, tokenizer.eos_token_id] for t in tokens] if nested else tokens


Completion = tuple[list[int], int]  # tokens, and how many of them stand before the first supervised one


@dataclass
class ModelOutput:
    """The outputs of a model for n rows, in float32; None for what was not requested.

    label_logits: [n, labels], the label space.
    completion_logits: [m, vocabulary], at the m supervised tokens of the completions, row after row.
    completion_nll: [m], negative log-likelihoods of these tokens, in nats.
    hidden_states: [n, layers, d], of [CLS] (the first token) in an encoder, else where the answer's first token is
    predicted.
    activation_maps: [n, layers, tokens], sums of squares over the channels of a layer, 0 at padding (encoders only).
    """

    label_logits: Tensor | None = None
    completion_logits: Tensor | None = None
    completion_nll: Tensor | None = None
    hidden_states: Tensor | None = None
    activation_maps: Tensor | None = None


class LabelModel:
    """A model with a task: texts in, a distribution over the task's labels out. Teachers and students alike.

    `texts` become token ids by :meth:`encode`; :meth:`forward` is what training differentiates; :meth:`predict`
    is what signals and predictions come from.
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
    ):
        self.batch_size = batch_size  # rows that are asked about at a time
        self.model, self.tokenizer, self.task, self.arch = model, tokenizer, task, arch
        self.prompt_style, self.few_shot, self.max_length = prompt, few_shot, max_length
        self.dtype = getattr(torch, dtype)
        if arch != "classifier":
            # the answers of a `qa` task are those of the rows at hand: see :meth:`set_answers`
            names = [] if task.kind == "qa" else task.names
            self.label_token_ids = tokenize_labels(tokenizer, [render_answer(task, name, prompt) for name in names])
        elif task.kind == "qa":
            raise UserError("params.yaml: a classifier writes no answers: a `qa` task needs a model that does")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """Products in the model's `dtype`; what must stay in float32 (trained weights, softmax) does."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, texts: Sequence[str], shots: Sequence[Sequence[FewShotExample]] | None = None) -> list[list[int]]:
        """Token ids of every text, with the prompt around it for a causal model; at most `max_length` tokens.

        shots: solved examples for each text, instead of the first `few_shot` of the task file.
        A text that is too long loses its end, never the prompt. Raises UserError when the prompt alone is too long,
        and when the tokenizer is not the model's.
        """
        if self.arch == "classifier":
            out = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
            return self._known(out)
        out = []
        for i, text in enumerate(texts):
            solved = shots[i] if shots is not None else None
            ids = self._prompt_ids(text, solved)
            if len(ids) > self.max_length:
                own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                keep = len(own) - (len(ids) - self.max_length) - 2  # the cut may split differently when read again
                if keep < 1:
                    raise UserError(f"max_length: {self.max_length} tokens are too few for the prompt of {len(ids)}")
                ids = self._prompt_ids(self.tokenizer.decode(own[:keep]), solved)
            out.append(ids)
        return self._known(out)

    def _known(self, ids: list[list[int]]) -> list[list[int]]:
        """`ids`, every one of which the weights know; else the lookup would fail deep within the model."""
        size, highest = self.model.get_input_embeddings().weight.shape[0], max(map(max, filter(None, ids)), default=0)
        if highest >= size:
            raise UserError(
                f"{Path(self.tokenizer.name_or_path).name}: its tokenizer gives token {highest}, but its weights know "
                f"0 to {size - 1}; tokenizer and weights are of different models"
            )
        return ids

    def prompt_for(self, text: str, solved: Sequence[FewShotExample] | int) -> str:
        """The prompt of a generative model for `text`, with the examples `solved`, or so many of the task file's."""
        return render_prompt(chat_turns(self.task, text, solved), self.tokenizer, self.prompt_style)

    def _prompt_ids(self, text: str, shots: Sequence[FewShotExample] | None = None) -> list[int]:
        special = (
            self.prompt_style == "plain" or self.arch == "seq2seq"
        )  # an encoder wants the end token it was trained with
        prompt = self.prompt_for(text, self.few_shot if shots is None else shots)
        return self.tokenizer(prompt, add_special_tokens=special)["input_ids"]

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
        """Score rows `ids` [n][tokens]; see :class:`ModelOutput` for what comes back.

        completions: [n][any number] of token sequences to score after each row; not for a classifier.
        label_space: whether to compute the label logits. layers: of which to return hidden states (0 the embeddings, j
        the output of layer j, as `transformers` counts them). activation_maps: of these layers, for encoders.
        prefix_kv: keys and values of the tokens that all rows begin with; see :func:`compute_prefix_kv`.
        """
        with self.autocast():
            if self.arch == "classifier":
                return self._classify(ids, layers, activation_maps)
            if not label_space and not completions:  # one token that is predicted and never fed costs nothing
                completions = [[([self.tokenizer.eos_token_id], 1)]] * len(ids)
            label_completions = [(tokens, len(tokens)) for tokens in self.label_token_ids] if label_space else []
            scored = [[*label_completions, *(completions[i] if completions else [])] for i in range(len(ids))]
            tokens = [[completion for completion, _ in row] for row in scored]
            if self.arch == "causal":
                hidden, index, target, branch, at_prompt = completion_hidden_states(
                    self.model, ids, tokens, layers, prefix_kv
                )
                logits = output_head(self.model)(hidden).float()
            else:
                logits, target, branch, at_prompt = self._decode(ids, tokens, layers)
                index = torch.arange(len(target), device=target.device)
        output = ModelOutput(hidden_states=at_prompt.float() if at_prompt is not None else None)
        nll = (logits.logsumexp(-1)[index] - logits[index, target]) if label_space or completions else None
        if label_space:
            # completions other than labels share one more column, which is cut off
            n_labels = len(self.label_token_ids)
            column = torch.tensor(
                [i * (n_labels + 1) + min(j, n_labels) for i, row in enumerate(scored) for j in range(len(row))]
            )
            scores = torch.zeros(len(ids) * (n_labels + 1), device=self.device)
            scores = scores.index_add(0, column.to(self.device)[branch], -nll)
            output.label_logits = scores.view(len(ids), -1)[:, :n_labels]
        if completions:
            skips = [skip for row in scored for _, skip in row]
            lengths = [len(completion) for row in tokens for completion in row]
            supervised = [k >= skip for skip, length in zip(skips, lengths, strict=True) for k in range(length)]
            supervised = torch.tensor(supervised, device=self.device)
            output.completion_logits, output.completion_nll = logits[index[supervised]], nll[supervised]
        return output

    def _classify(self, ids: Sequence[Sequence[int]], layers: Sequence[int], activation_maps: bool) -> ModelOutput:
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.device)
        encoded = self.model(**batch, output_hidden_states=bool(layers))
        output = ModelOutput(encoded.logits.float())
        if layers:
            hidden = torch.stack([encoded.hidden_states[j] for j in layers], 1).float()
            output.hidden_states = hidden[:, :, 0]
            if activation_maps:
                output.activation_maps = hidden.square().sum(-1) * batch["attention_mask"][:, None]
        return output

    def _decode(
        self, ids: Sequence[Sequence[int]], completions: Sequence[Sequence[list[int]]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As :func:`completion_hidden_states`, with logits [n, vocabulary] for hidden states.

        Each text is encoded once, however many completions it has.
        """
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.device)
        encoded = self.model.get_encoder()(**batch).last_hidden_state
        flat = [completion for row in completions for completion in row]
        row = torch.tensor([i for i, branches in enumerate(completions) for _ in branches], device=self.device)
        width = max(map(len, flat))
        target = torch.zeros(len(flat), width, dtype=torch.long)
        real = torch.zeros(len(flat), width, dtype=torch.bool)
        for i, completion in enumerate(flat):
            target[i, : len(completion)] = torch.tensor(completion)
            real[i, : len(completion)] = True
        target, real = target.to(self.device), real.to(self.device)
        start = torch.full((len(flat), 1), self.model.config.decoder_start_token_id, device=self.device)
        out = self.model(
            encoder_outputs=(encoded[row],),
            attention_mask=batch["attention_mask"][row],
            decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
            use_cache=False,
            output_hidden_states=bool(layers),
        )
        branch = torch.arange(len(flat), device=self.device)[:, None].expand(-1, width)[real]
        at_prompt = None
        if layers:
            first = torch.tensor([0, *(len(branches) for branches in completions[:-1])], device=self.device).cumsum(0)
            at_prompt = torch.stack([out.decoder_hidden_states[j][first, 0] for j in layers], 1)
        return out.logits[real].float(), target[real], branch, at_prompt

    def label_completion(self, label: int) -> Completion:
        """The answer `label` (an index) with the token that ends it, all of it supervised."""
        tokens, end = self.label_token_ids[label], [self.tokenizer.eos_token_id]
        return (tokens if tokens[-1:] == end else tokens + end), 0

    def set_answers(self, answers: Sequence[str]) -> None:
        """Let labels be the texts `answers`: the answers to the questions of a `qa` task."""
        self.label_token_ids = [
            self.tokenizer(render_answer(self.task, answer, self.prompt_style), add_special_tokens=False)["input_ids"]
            for answer in answers
        ]

    def answer_questions(
        self,
        texts: Sequence[str],
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        *,
        cached: Sequence[str | None] | None = None,
        on_batch: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """What the model answers to each of `texts`, greedily, up to the end of a line; as it was trained to.

        cached, on_batch: as in :meth:`generate`.
        """
        out = [None] * len(texts) if cached is None else list(cached)
        wanted = [text is None for text in out]
        if not any(wanted):
            return out

        def store_batch(rows: list[int], tokens: list[list[int]]) -> None:
            new = [i for i in rows if wanted[i]]
            for i, text in zip(rows, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                if wanted[i]:
                    out[i] = " ".join((text.strip().splitlines() or [""])[0].split())
            if on_batch:
                on_batch(new, [out[i] for i in new])

        settings = {"max_new_tokens": max_new_tokens, "batch_size": self.batch_size}
        self.generate_tokens(self.encode(texts), wanted=wanted, on_batch=store_batch, **settings)
        return out

    def row_completions(self, label: int, rationale: str | None = None) -> list[Completion]:
        """What a student is told of a row: the answer, then the reason if there is one."""
        return [self.label_completion(label), *([self.rationale_completion(label, rationale)] if rationale else [])]

    def rationale_completion(self, label: int, rationale: str) -> Completion:
        """`rationale` after the answer `label`: a second task, told apart from the first by `tasks.REASON`."""
        name = render_answer(self.task, self.task.names[label], self.prompt_style)
        before = self.tokenizer(name + RATIONALE_CUE, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(f" {rationale}", add_special_tokens=False)["input_ids"]
        return [*before, *after, self.tokenizer.eos_token_id], len(before)

    @torch.no_grad()
    def predict(
        self,
        texts: Sequence[str],
        shots: Sequence[Sequence[FewShotExample]] | None = None,
        *,
        cached: Sequence[Sequence[float] | None] | None = None,
        on_batch: Callable[[list[int], np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32, each row summing to 1. shots: see :meth:`encode`.

        What all prompts begin with (instruction, solved examples) is read once, not once a batch. Of a `qa` task the
        answers are written, and every row is as likely right as wrong: nobody has looked yet.

        cached: probabilities from an earlier run, None where there are none. on_batch: called after every batch with
        the indices and probabilities that were not cached. Batches are cut from all rows, so a run that continues
        gives, to the bit, what one run would have given.
        """
        if self.task.kind == "qa":
            self.answer_questions(texts)
            return np.full((len(texts), len(self.task.names)), 0.5, dtype=np.float32)
        ids = self.encode(texts, shots)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.zeros((len(ids), len(self.task.names)), dtype=np.float32)
        wanted = np.array([cached is None or cached[i] is None for i in range(len(ids))], dtype=bool)
        for i in np.flatnonzero(~wanted):
            out[i] = cached[i]
        if not wanted.any():
            return out
        training = self.model.training
        self.model.eval()
        prefix_kv = None
        if self.arch == "causal" and len(ids) > 1:
            with self.autocast():
                prefix_kv = compute_prefix_kv(self.model, ids[0][: common_prefix(ids)])
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            new = [i for i in rows if wanted[i]]
            if not new:
                continue
            logits = self.forward([ids[i] for i in rows], prefix_kv=prefix_kv).label_logits
            for row, i in zip(logits, rows, strict=True):
                row[count_options(self.task, texts[i]) :] = -torch.inf  # an option that the row does not have
            out[new] = logits.softmax(-1).cpu().numpy()[wanted[rows]]
            if on_batch:
                on_batch(new, out[new])
        self.model.train(training)
        return out

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        cached: Sequence[str | None] | None = None,
        on_batch: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """What the model says next in each conversation (turns as in a chat); greedy when `temperature` is 0.

        Whatever the style of its label prompt, a model with a chat template is talked to in it: it then knows when to
        stop. Without one the answer ends at the first empty line. What all prompts begin with is read once.

        cached: answers from an earlier run, None where there is none. on_batch: called after every batch with the
        indices and texts that were not cached. A batch draws the same random numbers whatever came before it, so
        a run that continues gives what one run would have given.
        """
        cached = [None] * len(conversations) if cached is None else list(cached)
        if None not in cached:
            return cached
        style = "chat" if self.tokenizer.chat_template else "plain"
        prompts = [render_prompt(turns, self.tokenizer, style) for turns in conversations]
        special = style == "plain" or self.arch == "seq2seq"
        ids = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in prompts]
        open_rows = [text is None for text in cached]
        out = list(cached)

        def store_batch(rows: list[int], tokens: list[list[int]]) -> None:
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            new = []
            for i, text in zip(rows, texts, strict=True):
                if open_rows[i]:
                    text = text.split(PLAIN_SEPARATOR)[0] if style == "plain" else text
                    out[i] = " ".join(text.split())
                    new.append(i)
            if on_batch:
                on_batch(new, [out[i] for i in new])

        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
        }
        self.generate_tokens(ids, wanted=open_rows, on_batch=store_batch, **settings)
        return out

    @torch.no_grad()
    def generate_tokens(
        self,
        ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        wanted: Sequence[bool] | None = None,
        on_batch: Callable[[list[int], list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """The tokens that the model writes after each prompt, up to and with its end token; greedy when `temperature`
        is 0. What all prompts begin with is read once; torch's random state is left as it was.

        wanted: a batch without a wanted row is left out. on_batch: called with the rows and tokens of each batch.
        """
        training = self.model.training
        self.model.eval()
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[list[int]] = [[] for _ in ids]
        # weights that are being trained lie in float32 whatever the precision of the products
        wide = any(weight.dtype == torch.float32 for weight in self.model.parameters())
        with torch.random.fork_rng(), self.autocast() if wide else nullcontext():
            prefix_kv = (
                compute_prefix_kv(self.model, ids[0][: common_prefix(ids)]) if ids and self.arch == "causal" else None
            )
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                if wanted is not None and not any(wanted[i] for i in rows):
                    continue
                torch.manual_seed(1_000_003 * seed + start)
                prompts, settings = (
                    [ids[i] for i in rows],
                    {"max_new_tokens": max_new_tokens, "temperature": temperature},
                )
                if prefix_kv:
                    made = decode_completions(self.model, prompts, prefix_kv, end_token_ids=self.end_token_ids(), **settings)
                else:
                    made = self._generate(prompts, **settings)
                for i, tokens in zip(rows, made, strict=True):
                    out[i] = tokens
                if on_batch:
                    on_batch(rows, made)
        self.model.train(training)
        return out

    def end_token_ids(self) -> set[int]:
        """The tokens after which nothing more is written."""
        also = getattr(self.model.generation_config, "eos_token_id", None)
        return {self.tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])} - {None}

    def _generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float
    ) -> list[list[int]]:
        """:meth:`generate_tokens` for models that take no trees."""
        pad, width = self.tokenizer.pad_token_id, max(map(len, prompts))
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        fill = [width - len(row) for row in prompts]
        if self.arch == "seq2seq":  # an encoder is filled up on the right, as in training
            tokens = [[*row, *[pad] * n] for n, row in zip(fill, prompts, strict=True)]
            seen = [[1] * len(row) + [0] * n for n, row in zip(fill, prompts, strict=True)]
        else:
            tokens = [[*[pad] * n, *row] for n, row in zip(fill, prompts, strict=True)]
            seen = [[0] * n + [1] * len(row) for n, row in zip(fill, prompts, strict=True)]
        asked = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(seen)}
        made = self.model.generate(**{k: v.to(self.device) for k, v in asked.items()}, **settings)
        out = []
        for row in made[:, 1 if self.arch == "seq2seq" else width :].tolist():
            stop = next((k + 1 for k, token in enumerate(row) if token in self.end_token_ids()), len(row))
            out.append(row[:stop])
        return out
