"""From the body of a vendor's response to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillery.models.token_strings import TOKEN_ID, token_string
from distillery.tasks.parsing import REASONING_END, REASONING_START, without_reasoning
from distillery.teachers.api.failures import one_line
from distillery.teachers.cache import Answer

REASONING_KEYS = ("reasoning_content", "reasoning")  # of DeepSeek, llama.cpp and others; of newer vLLM and OpenRouter
LONGEST_TAG = 32  # characters
MAX_STEPS = 16  # tokens of an answer whose alternatives are kept: more than a label has
REFUSED_FINISHES = ("content_filter", "refusal")  # of OpenAI's form, of Anthropic's


def read_completion(body: Mapping[str, Any], all_tokens: bool = False) -> Answer:
    """The answer in `body`, a chat completion in OpenAI's form.

    all_tokens: whether to keep the log-probabilities at all tokens of the answer, or those that a label needs.
    See :meth:`distillery.teachers.api.transport.Transport.send` for its metadata. Raises AttributeError, LookupError or
    TypeError when `body` is no such completion.
    """
    choice = body["choices"][0]
    message = choice["message"]
    text, reasoning = _text_of(message.get("content"))
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), reasoning)
    metadata: dict[str, Any] = {"finish": choice.get("finish_reason"), "model": body.get("model")}
    usage = body.get("usage")
    if usage:
        metadata["usage"] = [usage["prompt_tokens"], usage["completion_tokens"]]
        hidden = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        reasoning = reasoning or (f"{hidden} hidden tokens" if hidden else "")
    content = (choice.get("logprobs") or {}).get("content")
    if content is not None and all_tokens:
        metadata["tokens"] = _tokens(content)
    elif content is not None:
        metadata["steps"] = _steps(content)
    return _answer(text, reasoning, metadata, refusal=message.get("refusal"))


def read_message(body: Mapping[str, Any]) -> Answer:
    """The answer in `body`, a message in Anthropic's form; else see :func:`read_completion`."""
    text, reasoning = _text_of(body["content"])
    metadata = {"finish": body.get("stop_reason"), "model": body.get("model")}
    metadata["usage"] = [body["usage"]["input_tokens"], body["usage"]["output_tokens"]]
    return _answer(text, reasoning, metadata)


def _answer(text: str, reasoning: str, metadata: dict[str, Any], refusal: str | None = None) -> Answer:
    """The answer, with `refused` or `reasoning` in its metadata when it is nothing else."""
    if not without_reasoning(text):
        if refusal or metadata["finish"] in REFUSED_FINISHES:
            metadata["refused"] = one_line(refusal or f"the answer ended with `{metadata['finish']}`")
        elif text.strip() or reasoning:
            metadata["reasoning"] = one_line(text.strip() or reasoning)
    return Answer(text.strip(), metadata)


def _answer_start(content: Sequence[Mapping[str, Any]]) -> int:
    """The position of the first token of the answer after any reasoning; past the end when there is no answer."""
    start, text = 0, ""
    for position, entry in enumerate(content):
        text = (text + entry["token"])[-LONGEST_TAG:]
        if REASONING_END.search(text):
            start, text = position + 1, ""
    begun = "".join(entry["token"] for entry in content[start : start + MAX_STEPS])
    return len(content) if REASONING_START.match(begun) else start


def _tokens(content: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The tokens of the answer, after any reasoning: [token, logprob, alternatives [[token, logprob]]], as strings of
    :mod:`distillery.models.token_strings`. The token itself is among its alternatives."""
    start = _answer_start(content)
    while 0 < start < len(content) and not content[start]["token"].strip():
        start += 1  # white space between the reasoning and the answer
    tokens = []
    for entry in content[start:]:
        token, logprob = _token_string(entry), float(entry["logprob"])
        others = [[_token_string(other), other["logprob"]] for other in entry.get("top_logprobs") or []]
        others = [[other, value] for other, value in others if value is not None]  # JSON's form of a probability of 0
        own = [] if token in [other for other, _ in others] else [[token, logprob]]
        tokens.append([token, logprob, others + own])
    return tokens


def _token_string(entry: Mapping[str, Any]) -> str:
    return token_string(entry["token"], entry.get("bytes"), entry.get("id"))


def read_scored_tokens(body: Mapping[str, Any], prompt: int, completion: int) -> Answer:
    """The log-probabilities at the last `completion` of `prompt` + `completion` tokens that an endpoint has read.

    The metadata `tokens` is as for :func:`read_completion`, or None when the endpoint returned none for these tokens;
    `decoded` is what each of them writes, in the words of the endpoint. Else see :func:`read_completion`; raises
    ValueError, too, for lists of unequal lengths.
    """
    choice, end = body["choices"][0], prompt + completion
    metadata: dict[str, Any] = {"model": body.get("model"), "tokens": None}
    if usage := body.get("usage"):
        metadata["usage"] = [usage["prompt_tokens"], usage["completion_tokens"]]
    scored, echoed = choice.get("prompt_logprobs"), choice.get("logprobs") or {}
    if scored and len(scored) == end:  # of vLLM: {id: {logprob, decoded_token}}, the token itself first
        tokens = []
        for position in scored[prompt:]:
            alternatives = [[f"{TOKEN_ID}{key}", value["logprob"]] for key, value in position.items()]
            tokens.append([*alternatives[0], alternatives])
        metadata["decoded"] = [next(iter(position.values())).get("decoded_token") for position in scored[prompt:]]
        metadata["tokens"] = tokens
    elif len(echoed.get("tokens") or []) >= end and echoed.get("top_logprobs"):
        span = slice(prompt, end)
        metadata["tokens"] = [
            [token, logprob, [[token, logprob], *([o, p] for o, p in (others or {}).items() if o != token)]]
            for token, logprob, others in zip(
                *(echoed[key][span] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
            )
        ]
        metadata["decoded"] = echoed["tokens"][span]
    return Answer("", metadata)


def _steps(content: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The first tokens of the answer, after any reasoning, each with its alternatives: [token, [[token, logprob]]]."""
    start = _answer_start(content)
    steps = []
    for entry in content[start : start + MAX_STEPS]:
        alternatives = [[other["token"], other["logprob"]] for other in entry.get("top_logprobs") or []]
        if entry["token"] not in [token for token, _ in alternatives]:
            alternatives.append([entry["token"], entry["logprob"]])
        steps.append([entry["token"], alternatives])
    return steps


def _text_of(content: str | Sequence[Mapping[str, Any]] | None) -> tuple[str, str]:
    """The text and the reasoning in the content of a message: a string, or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    parts = [(part["type"], part.get(part["type"]) or "") for part in content]
    texts, reasoning = ([value for kind, value in parts if kind == wanted] for wanted in ("text", "thinking"))
    return "".join(texts), "".join(value if isinstance(value, str) else _text_of(value)[0] for value in reasoning)
