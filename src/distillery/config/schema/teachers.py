"""Sections under `teachers`: models, endpoints and files that label rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import URL, VARIABLE, Count, Name, Positive, Section
from distillery.config.schema.training import FinetuneConfig


class ApiPrice(Section):
    """US dollars a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class ApiConfig(Section):
    """An endpoint and how it is asked. `key` names the environment variable that holds the key.

    labels: `text` reads the label from what is written, `structured` lets the endpoint write nothing else, `logprobs`
    takes the probabilities of the answer's first token. With `samples` above 1 their agreement gives the probabilities.
    The ceilings hold for all that this model was ever asked from this folder.
    """

    client: Literal["openai", "anthropic"] = "openai"
    model: Annotated[str, Field(min_length=1)]
    base_url: Annotated[str, Field(pattern=URL)] | None = None
    key: Annotated[str, Field(pattern=VARIABLE)] | None = None
    labels: Literal["text", "structured", "logprobs"] = "text"
    samples: Annotated[int, Field(gt=0)] = 1
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    max_tokens: Annotated[int, Field(gt=0)] = 16
    concurrency: Annotated[int, Field(gt=0, le=256)] = 8
    requests_per_minute: Positive | None = None
    timeout: Positive = 60.0
    max_attempts: Annotated[int, Field(gt=0)] = 8
    price: ApiPrice | None = None
    max_cost: Positive | None = None
    max_total_tokens: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _fits(self):
        if self.max_cost is not None and self.price is None:
            raise ValueError("`max_cost` needs `price`")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("`samples` above 1 need a `temperature` above 0, or all say the same")
        if self.labels == "logprobs" and self.client == "anthropic":
            raise ValueError("`labels: logprobs` is not for `client: anthropic`, which tells none")
        return self


class AnswerColumns(Section):
    """Which column holds what. `answer` is for files with label and explanation in one text, as an LLM wrote them."""

    id: str | None = None
    text: str | None = "text"
    label: str | None = None
    explanation: str | None = None
    answer: str | None = None

    @model_validator(mode="after")
    def _fits(self):
        if (self.id is None) == (self.text is None):
            raise ValueError("needs exactly one of `id` or `text`, by which answers find their rows (`text: null`)")
        if (self.label is None) == (self.answer is None):
            raise ValueError("needs exactly one of `label` or `answer`")
        return self


class AnswerFilesConfig(Section):
    """Answers of an external LLM that were asked for elsewhere: .csv, .tsv, .jsonl or .parquet files.

    repeats: `drop` answers that are, word for word, those of the row before although that is another text: the trace of
    a script that kept its last answer when a call failed. Only explanations tell; a bare label may well come twice.
    """

    files: Annotated[list[str], Field(min_length=1)]
    columns: AnswerColumns
    repeats: Literal["drop", "keep"] = "drop"


class TeacherConfig(Section):
    """A model that produces signals. Without `finetune` it is only prompted (label-free).

    `api` is asked over the network, `answers` reads what an external LLM answered before.

    For those that are only prompted: `prompts` of the task file are tried on validation rows beside its `prompt`, and
    the best is taken. `examples_from` names the origin of the `few_shot` solved examples: the task file, gold rows, or
    for each row the gold rows most similar to it (by the encoder `embeddings`), never of its own group. `calibrate`
    divides by what the prompt says of no text at all (`contextual`) or of many texts (`batch`). `quantize: nf4` loads
    their linear layers in 4 bits.
    """

    kind: Literal["lm", "classifier", "seq2seq", "api", "answers"]
    model: Name | None = None
    api: ApiConfig | None = None
    answers: AnswerFilesConfig | None = None
    data: list[Name] | None = None  # the sources it labels; all of them when not given
    finetune: FinetuneConfig | None = None
    prompt: Literal["chat", "plain"] = "chat"
    prompts: list[str] = []
    few_shot: Count = 0
    examples_from: Literal["task", "gold", "similar"] = "task"
    embeddings: Name | None = None
    calibrate: Literal["none", "contextual", "batch"] = "none"
    rationales: Count = 0
    max_new_tokens: Annotated[int, Field(gt=0)] = 48
    batch_size: Annotated[int, Field(gt=0)] = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "nf4"] = "none"
    seed: int = 0

    @model_validator(mode="after")
    def _asked(self):
        if self.quantize != "none" and (self.kind not in ("lm", "seq2seq") or self.finetune):
            raise ValueError("`quantize` is for a `kind: lm` or `seq2seq` that is only prompted, without `finetune`")
        needed = self.kind if self.kind in ("api", "answers") else "model"
        for key in ("model", "api", "answers"):
            if (getattr(self, key) is not None) != (key == needed):
                raise ValueError(f"`kind: {self.kind}` needs `{needed}`" + (f", not `{key}`" if key != needed else ""))
        if self.finetune and needed != "model":
            raise ValueError(f"`kind: {self.kind}` cannot be fine-tuned here: leave `finetune` out")
        if (self.examples_from == "similar") != (self.embeddings is not None):
            raise ValueError("`examples_from: similar` and `embeddings` (an encoder of `models`) go together")
        chosen = self.prompts or self.examples_from != "task" or self.calibrate != "none"
        if chosen and (self.finetune or self.kind in ("classifier", "answers")):
            raise ValueError("`prompts`, `examples_from` and `calibrate` are for teachers that are only prompted")
        return self
