"""From the body of a vendor's response to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillery.tasks.parsing import REASONING_END, REASONING_START, without_reasoning
from distillery.teachers.api.failures import one_line
from distillery.teachers.cache import Answer

REASONING_KEYS = ("reasoning_content", "reasoning")  # of DeepSeek, llama.cpp and others; of newer vLLM and OpenRouter
LONGEST_TAG = 32  # characters
MAX_STEPS = 16  # tokens of an answer whose alternatives are kept: more than a label has
REFUSED_FINISHES = ("content_filter", "refusal")  # of OpenAI's form, of Anthropic's


def read_completion(body: Mapping[str, Any]) -> Answer:
    """The answer in `body`, a chat completion in OpenAI's form.

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
    if content is not None:
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


def _steps(content: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The first tokens of the answer, after any reasoning, each with its alternatives: [token, [[token, logprob]]]."""
    start, text = 0, ""
    for position, entry in enumerate(content):
        text = (text + entry["token"])[-LONGEST_TAG:]
        if REASONING_END.search(text):
            start, text = position + 1, ""
    answer = content[start : start + MAX_STEPS]
    if REASONING_START.match("".join(entry["token"] for entry in answer)):
        return []
    steps = []
    for entry in answer:
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
