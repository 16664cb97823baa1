"""Sections under `teachers`: models and endpoints that label rows."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from distillery.config.schema.answers import AnswerFilesConfig
from distillery.config.schema.base import TRIMMED_TEXT, URL, VARIABLE, Count, Name, Positive, Section
from distillery.config.schema.texts import LongTextsConfig
from distillery.config.schema.training import FinetuneConfig

MIN_EXPLAINED_TOKENS = 32  # of a label and a short sentence
# of `api`: servers, key, pace and limits of cost decide nothing of its answers
API_KEYS_WITHOUT_EFFECT = {
    *("endpoints", "key", "concurrency", "requests_per_minute", "timeout", "max_attempts", "max_unreadable"),
    *("price", "max_cost", "max_total_tokens"),
}


class ApiPrice(Section):
    """Price in US dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Price of prompt tokens."""
    output: Annotated[float, Field(ge=0)]
    """Price of generated tokens."""
    origin: str = ""
    """Where the price is from and of which day it is; the plan of a recipe prints it."""


# Keys of a request that have a key of their own here, or that would change the form of the response.
OWN_REQUEST_KEYS = {"max_completion_tokens": "max_tokens", "top_logprobs": "top_logprobs", "n": "samples"}
OWN_REQUEST_KEYS |= {"echo": "tokens", "prompt_logprobs": "tokens"}
OWN_REQUEST_KEYS |= {key: key for key in ("model", "temperature", "max_tokens", "reasoning_effort")}
OWN_REQUEST_KEYS |= {"logprobs": "labels", "chat_template_kwargs": "chat_template_kwargs"}
FIXED_REQUEST_KEYS = ("messages", "stream")
# Names and beginnings of secrets, so that one that was put here by mistake is not written to a file.
SECRET_KEY = re.compile(
    r"(proxy.?)?authorization|(x.)?api.?key|((access|auth|bearer|api|hf).)?token|.*(secret|password).*", re.IGNORECASE
)
SECRET_VALUE = re.compile(
    r"\s*(?i:bearer|basic)\s+\S|.*\b(sk|pk|rk|csk|hf|gsk|xai|nvapi|ghp|ghs|glpat|pplx)[-_][A-Za-z0-9_-]{8}"
    r"|.*\b(github_pat_|AIza[\w-]{16}|A[KS]IA[A-Z0-9]{12}|eyJ[\w-]{16})",
    re.DOTALL,
)


def path_of_secret(value: JsonValue, path: str) -> str | None:
    """The path of the first secret in `value`, which lies at `path`: what looks like a key or a password."""
    if isinstance(value, dict):
        for key, inner in value.items():
            below = f"{path}.{key}"
            if SECRET_KEY.fullmatch(key) and isinstance(inner, str):
                return below
            if (secret := path_of_secret(inner, below)) is not None:
                return secret
    elif isinstance(value, list):
        secrets = (path_of_secret(inner, f"{path}.{i}") for i, inner in enumerate(value))
        return next((secret for secret in secrets if secret is not None), None)
    elif isinstance(value, str) and SECRET_VALUE.match(value):
        return path
    return None


class EndpointConfig(Section):
    """One of several servers of the same model."""

    base_url: Annotated[str, Field(pattern=URL)]
    """Address of the server."""
    key: Annotated[str, Field(pattern=VARIABLE)] | None = None
    """Name of the environment variable that holds its key; that of `api` when not given."""
    concurrency: Annotated[int, Field(gt=0, le=256)] | None = None
    """Largest number of requests to it at the same time; that of `api` when not given."""
    requests_per_minute: Positive | None = None
    """Largest number of requests to it a minute; that of `api` when not given."""


class ApiConfig(Section):
    """A model behind one or several endpoints. Its limits hold for all requests that were ever made to it from this
    folder."""

    client: Literal["openai", "anthropic"] = "openai"
    """Protocol of the endpoint."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the endpoint."""
    base_url: Annotated[str, Field(pattern=URL)] | None = None
    """Address of the endpoint; the vendor's own when not given."""
    endpoints: list[EndpointConfig] = []
    """Several servers of the same model, in place of `base_url`: a row goes to whichever is free. They have the answers
    and the ceilings in common; which servers there are is no part of an answer's key."""
    key: Annotated[str, Field(pattern=VARIABLE)] | None = None
    """Name of the environment variable that holds the key."""
    labels: Literal["text", "explained", "structured", "logprobs"] = "text"
    """Origin of the label: parsed from free text, from text in which a rationale follows it (`rationales` are then
    those, without a request of their own), from text that the endpoint restricts to the labels, or from the
    probabilities of the answer's first token."""
    samples: Annotated[int, Field(gt=0)] = 1
    """Answers to each question; with several, the share of each label is its probability."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """Sampling temperature; null sends none."""
    max_tokens: Annotated[int, Field(gt=0)] = 16
    """Largest length of an answer, in tokens; the reasoning of a model counts."""
    tokens: Literal["none", "generated", "prompt_logprobs", "echo"] = "none"
    """Log-probabilities of tokens, for students with `space: vocabulary`. `generated`: at the tokens of the teacher's
    own answer. `prompt_logprobs` (of vLLM) and `echo` (of the completions API): at the tokens of a row's label and
    rationale, which the server reads as part of a prompt."""
    top_logprobs: Annotated[int, Field(gt=0)] = 20
    """Likeliest tokens at each position that `tokens` requests; many servers give at most 20."""
    tokenizer: Name | None = None
    """The model in `models` with the teacher's tokenizer and chat template, which writes the prompt of
    `tokens: prompt_logprobs` and `echo`."""
    reasoning_effort: Annotated[str, Field(pattern=TRIMMED_TEXT)] | None = None
    """How much a model of `client: openai` reasons before it answers, such as `none`, `minimal` or `low`; as the
    endpoint chooses when not given."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Arguments for the chat template of the model, at servers of open models: `{enable_thinking: false}` turns the
    reasoning of many of them off."""
    extra_body: dict[str, JsonValue] = {}
    """Further keys of every request, as the endpoint's manual names them. Never a key or a password."""
    concurrency: Annotated[int, Field(gt=0, le=256)] = 8
    """Largest number of requests at the same time, of `endpoints` to each."""
    requests_per_minute: Positive | None = None
    """Largest number of requests a minute, of `endpoints` to each; any when not given."""
    timeout: Positive = 60.0
    """Seconds to wait for an answer."""
    max_attempts: Annotated[int, Field(gt=0)] = 8
    """Requests for one answer before the run stops, or before one of several `endpoints` is set aside."""
    max_unreadable: Annotated[int, Field(gt=0)] | None = 20
    """Answers in a row that cannot be read as a label, or are refused, before the run stops; null: no limit."""
    price: ApiPrice | None = None
    """Price of the tokens."""
    max_cost: Positive | None = None
    """Limit in US dollars: the run stops before the request that may pass it."""
    max_total_tokens: Annotated[int, Field(gt=0)] | None = None
    """Limit in tokens: the run stops before the request that may pass it."""

    @model_validator(mode="after")
    def _fits(self):
        if self.max_cost is not None and self.price is None:
            raise ValueError("`max_cost` needs `price`")
        if self.endpoints and self.base_url:
            raise ValueError("`endpoints` have a `base_url` each: leave that of the section out")
        addresses = [endpoint.base_url.rstrip("/") for endpoint in self.endpoints]
        if repeated := sorted({address for address in addresses if addresses.count(address) > 1}):
            raise ValueError(f"`endpoints` holds {repeated[0]} twice: raise its `concurrency` instead")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("`samples` above 1 need a `temperature` above 0, or all answers are equal")
        if self.labels == "logprobs" and self.client == "anthropic":
            raise ValueError("`labels: logprobs` is not for `client: anthropic`, which returns none")
        if self.labels == "explained" and self.max_tokens < MIN_EXPLAINED_TOKENS:
            raise ValueError(
                f"`labels: explained` needs room for a sentence: `max_tokens` {MIN_EXPLAINED_TOKENS} or more"
            )
        return self

    @model_validator(mode="after")
    def _tokens_fit(self):
        if self.tokens == "none" and self.top_logprobs != ApiConfig.model_fields["top_logprobs"].default:
            raise ValueError("`top_logprobs` is for `tokens`: set it, too")
        if self.scores_given_tokens != (self.tokenizer is not None):
            raise ValueError("`tokens: prompt_logprobs` or `echo`, and `tokenizer` (a model of `models`) go together")
        if self.tokens != "none" and self.client == "anthropic":
            raise ValueError(f"`tokens: {self.tokens}` is not for `client: anthropic`, which returns none")
        if self.tokens == "generated" and (self.samples > 1 or self.labels == "structured"):
            wrong = "samples" if self.samples > 1 else "labels: structured"
            raise ValueError(f"`tokens: generated` takes one free answer for each row: leave out `{wrong}`")
        return self

    @model_validator(mode="after")
    def _extra_keys_fit(self):
        if self.client == "anthropic":
            for key in ("reasoning_effort", "chat_template_kwargs"):
                if getattr(self, key):
                    raise ValueError(f"`{key}` is not for `client: anthropic`: use `extra_body`")
        for key in self.extra_body:
            if key in FIXED_REQUEST_KEYS:
                raise ValueError(f"`extra_body` cannot set `{key}`")
            if own := OWN_REQUEST_KEYS.get(key):
                raise ValueError(f"`extra_body` cannot set `{key}`: use `{own}` of this section")
        for key in ("reasoning_effort", "chat_template_kwargs", "extra_body"):
            if (path := path_of_secret(getattr(self, key), key)) is not None:
                raise ValueError(
                    f"`{path}` looks like a key or a password, which no file may hold: put it into an environment "
                    "variable, and the name of that variable into `key`"
                )
        return self

    @property
    def servers(self) -> list[ApiConfig]:
        """The settings for each server: of `endpoints` their own, where they have some, else the section alone."""
        own = [{key: value for key, value in endpoint if value is not None} for endpoint in self.endpoints]
        return [self.model_copy(update=settings | {"endpoints": []}) for settings in own] or [self]

    @property
    def scores_given_tokens(self) -> bool:
        """Whether the endpoint scores tokens that it is given, in place of those that it generates."""
        return self.tokens in ("prompt_logprobs", "echo")

    @property
    def extra_request_keys(self) -> dict[str, JsonValue]:
        """The keys of a request that decide its answer beside those that all endpoints know."""
        extra = {"reasoning_effort": self.reasoning_effort, "chat_template_kwargs": self.chat_template_kwargs}
        return {key: value for key, value in extra.items() if value} | self.extra_body


class TeacherConfig(Section):
    """A model that gives signals for rows: labels, probabilities, rationales. Without `finetune` a language model is
    only prompted, and a classifier predicts with the head that its model brings for these labels.

    `prompts`, `examples_from` and `calibrate` are for teachers that are only prompted; `calibrate: batch` and
    `clusters` also for probabilities from files.
    """

    kind: Literal["lm", "classifier", "seq2seq", "api", "answers"]
    """A local causal language model, an encoder with a classification head, an encoder and decoder, a model behind an
    endpoint, or answers from files."""
    model: Name | None = None
    """The model in `models`; not for `kind: api` and `kind: answers`."""
    api: ApiConfig | None = None
    """The endpoint of `kind: api`."""
    answers: AnswerFilesConfig | None = None
    """The files of `kind: answers`."""
    data: list[Name] | None = None
    """The sources it labels; all when not given."""
    finetune: FinetuneConfig | None = None
    """Fine-tuning on gold rows before it labels; a classifier needs it if its model brings no head for the labels."""
    prompt: Literal["chat", "plain"] = "chat"
    """Form of the prompt: the tokenizer's chat template, or the turns as plain text."""
    prompts: list[str] = []
    """Other prompts of the task file to try; the best one is used."""
    choose_prompt_by: Literal["macro_f1", "mutual_information"] = "macro_f1"
    """What makes a prompt the best: `macro_f1` on validation rows, or the `mutual_information` of text and prediction
    over rows of pool or train, which takes no label (Sorensen et al. 2022)."""
    few_shot: Count = 0
    """Solved examples in the prompt."""
    examples_from: Literal["task", "gold", "similar"] = "task"
    """Origin of the solved examples: the task file, gold rows, or for each row the most similar gold rows of other
    groups."""
    embeddings: Name | None = None
    """The encoder in `models` that measures the similarity for `examples_from: similar`."""
    calibrate: Literal["none", "contextual", "batch", "clusters"] = "none"
    """Correct probabilities without a gold label. `contextual`, `batch`: divide them by a label prior, the prediction
    for empty texts (Zhao et al. 2021) or the mean prediction for many texts (Zhou et al. 2024). `clusters`: find the
    cluster of each label among the log-probabilities of many texts (Han et al. 2023)."""
    max_length: Annotated[int, Field(gt=8)] | None = None
    """Largest length of text and prompt, in tokens; longer texts are cut. When not given: 256 of a classifier and of a
    teacher that is fine-tuned, 4096 of one that is only prompted, at most those that its model reads."""
    long_texts: LongTextsConfig | None = None
    """Read texts longer than `max_length` in overlapping windows; for `kind: classifier`."""
    rationales: Count = 0
    """Rows for which it writes a rationale."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 48
    """Largest length of a rationale, in tokens."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Rows in one batch of prediction or generation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of the computation. `auto`: float32 or bfloat16, whichever is faster on this machine, for training
    and for prediction; timed once and kept in `.cache/dtype.json`."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """`nf4`: linear layers in 4 bits, which saves memory; with `finetune.lora` while it is tuned (QLoRA, Dettmers et
    al. 2023), after which it is whole again. `int8`: their products in 8-bit integers, which is faster on a CPU with
    instructions for them, and does not work on a GPU; for a teacher that is only prompted."""
    seed: int = 0
    """Seed of fine-tuning, folds and sampled rows."""

    @model_validator(mode="after")
    def _kind_fits(self):
        tuned = self.finetune is not None and not (self.quantize == "nf4" and self.finetune.lora)
        if self.quantize != "none" and (self.kind not in ("lm", "seq2seq") or tuned):
            raise ValueError(
                "`quantize` is for a `kind: lm` or `seq2seq` that is only prompted, or with `nf4` tuned by "
                "`finetune.lora`"
            )
        required = self.kind if self.kind in ("api", "answers") else "model"
        for key in ("model", "api", "answers"):
            if (getattr(self, key) is not None) != (key == required):
                raise ValueError(
                    f"`kind: {self.kind}` needs `{required}`" + (f", not `{key}`" if key != required else "")
                )
        if self.long_texts and self.kind != "classifier":
            raise ValueError(f"`long_texts` is for `kind: classifier`, not {self.kind}")
        if self.max_length and required != "model":
            raise ValueError(f"`max_length` is for local models, not `kind: {self.kind}`")
        if self.finetune and required != "model":
            raise ValueError(f"`kind: {self.kind}` cannot be fine-tuned here: leave `finetune` out")
        if self.api and self.api.labels == "explained" and self.examples_from != "task":
            raise ValueError("`labels: explained` takes `examples_from: task`: gold rows bring no rationales")
        if (self.examples_from == "similar") != (self.embeddings is not None):
            raise ValueError("`examples_from: similar` and `embeddings` (an encoder of `models`) go together")
        prompted = self.prompts or self.examples_from != "task" or self.calibrate != "none"
        if self.kind == "answers":
            prompted = self.prompts or self.examples_from != "task"
            has_probabilities = self.answers.columns.probabilities
            if self.calibrate == "contextual" or (self.calibrate != "none" and not has_probabilities):
                raise ValueError(
                    "`kind: answers` can be calibrated by `calibrate: batch` or `clusters`, and only if its files hold "
                    "probabilities (`answers.columns.probabilities`)"
                )
        if prompted and (self.finetune or self.kind in ("classifier", "answers")):
            raise ValueError("`prompts`, `examples_from` and `calibrate` are for teachers that are only prompted")
        return self
