"""The experiment in force: `params.yaml`, read, validated as a whole, and handed on as typed objects.

Everything a user changes is a key here. A wrong key or value raises :class:`UserError` with one line that
names the file, the key and what is allowed, before any stage has run.
"""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

SPLITS = ("train", "pool", "validation", "test")
WRITERS = ("lm", "seq2seq", "api")  # kinds of teacher that write rationales and paraphrases
DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")  # in the phase's `space`
STATE_TERMS = ("hidden", "pkd", "attention", "cosine")
LOSS_TERMS = ("ce", *DIVERGENCES, "uld", *STATE_TERMS, "rationale", "prior")


class UserError(Exception):
    """A mistake of the user's, told in one line: which file, key or row, and what is allowed."""

    def _render_traceback_(self) -> list[str]:  # IPython asks the exception how it wants to be shown
        return [f"error: {self}"]


class Section(BaseModel):
    # strict: a number in quotes is a slip, and coercing it here would hide it from the tools that do not
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
WHEEL = r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$"
SHA256 = r"^[0-9a-f]{64}$"
URL = r"^https?://[^@\s]+$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
LAYERS = r"^(all|(first|last|every)-[1-9][0-9]*)$"
WORD = r"^\S(.*\S)?$"
PATTERNS = {
    WORD: "text without white space around it",
    NAME: "a name of letters, digits, `_`, `.` and `-` that starts with a letter or digit",
    WHEEL: "name==version",
    SHA256: "64 digits of 0-9 and a-f",
    URL: "http://… or https://…, without a user name or password",
    VARIABLE: "the name of an environment variable, never the key itself",
    LAYERS: "`all`, `first-N`, `last-N` or `every-N`",
}

Name = Annotated[str, Field(pattern=NAME)]
Pinned = Annotated[str, Field(pattern=WHEEL)]
Digest = Annotated[str, Field(pattern=SHA256)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Split(Section):
    """Share of the rows of every label that goes to each split, by whole groups; the shares add up to 1."""

    train: Fraction
    pool: Fraction = 0.0
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _adds_up(self):
        total = self.train + self.pool + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + pool + validation + test must add up to 1, not {total:g}")
        return self


class HubSplits(Section):
    """Which of a hub data set's own splits plays which part, in the hub's words (`train[:90%]`)."""

    train: str | None = None
    pool: str | None = None
    validation: str
    test: str


class Columns(Section):
    """Which column of the file holds what.

    text: several columns are joined by a space.  label: null says that the rows have none, and are all pool.
    options: of a `choice` task, a column with a list or one column an option.  first: what its `label` calls the first.
    """

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    label: str | None = "label"
    options: str | Annotated[list[str], Field(min_length=2)] = "options"
    first: Literal[0, 1, "A"] = 0
    id: str = "id"
    group: str = "group"
    rationale: str = "rationale"


class Filter(Section):
    """Which rows of a corpus are to the point: by language, then by words; the next step is a phase's `take`.

    languages: what the column `language` may hold.  keywords: words or phrases, `least` of which a text must hold.
    """

    languages: Annotated[list[str], Field(min_length=1)] | None = None
    language: str = "language"
    keywords: list[str] = []
    least: Annotated[int, Field(gt=0)] = 1


class Source(Section):
    """One named data set. `source` is a .jsonl, .csv, .tsv or .parquet file, or `hub:owner/name[@revision]`."""

    source: str
    task: Name
    split: Split | None = None
    hub_splits: HubSplits | None = None
    columns: Columns = Columns()
    hub_config: str | None = None
    hub_split: str = "train"
    filter: Filter | None = None
    seed: int = 0
    limit: Annotated[int, Field(gt=0)] | None = None
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85

    @model_validator(mode="after")
    def _one_way_to_split(self):
        if self.columns.label is None:
            if self.split or self.hub_splits:
                raise ValueError("rows without label are all pool; take `split` and `hub_splits` away")
        elif (self.split is None) == (self.hub_splits is None):
            raise ValueError("needs exactly one of `split` (shares) or `hub_splits` (the hub's own splits)")
        if self.hub_splits and not self.source.startswith("hub:"):
            raise ValueError("`hub_splits` is for a source hub:owner/name; a file needs `split`")
        return self

    def holds(self, split: str) -> bool:
        """Whether any row goes to `split`."""
        if self.columns.label is None:
            return split == "pool"
        return bool(getattr(self.split or self.hub_splits, split))


class Built(Section):
    """A small model of this architecture with random weights, to try an experiment without the real one.

    words: files whose words its tokenizer knows.
    """

    type: Literal["t5", "gpt2", "llama", "bert", "albert"]
    words: Annotated[list[str], Field(min_length=1)]
    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    layers: Annotated[int, Field(gt=0)] = 4
    heads: Annotated[int, Field(gt=0)] = 4
    seed: int = 0


class Model(Section):
    """Where a model comes from: exactly one of `wheel` (pinned, with `sha256`), `hub` (with `revision`), `folder`,
    `built`.

    Lists of `wheel` and `sha256`: wheels that each hold a part of one zip archive, too large for a single one.
    """

    wheel: Pinned | Annotated[list[Pinned], Field(min_length=2)] | None = None
    sha256: Digest | Annotated[list[Digest], Field(min_length=2)] | None = None
    gguf: str | None = None
    hub: str | None = None
    revision: str | None = None
    folder: str | None = None
    built: Built | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self):
        if self.wheel:
            if self.hub or not self.sha256 or (self.gguf is None) == (self.folder is None):
                raise ValueError("a `wheel` needs `sha256` and one of `gguf` or `folder` (a path inside the wheel)")
            wheels, digests = ([v] if isinstance(v, str) else v for v in (self.wheel, self.sha256))
            if len(wheels) != len(digests):
                raise ValueError(f"{len(wheels)} `wheel` need as many `sha256`, in the same order; not {len(digests)}")
        elif sum(origin is not None for origin in (self.hub, self.folder, self.built)) != 1:
            raise ValueError("needs exactly one of `wheel`, `hub`, `folder` or `built`")
        elif self.hub and not self.revision:
            raise ValueError("a `hub` model needs a pinned `revision` (a commit hash or a tag)")
        return self


class Lora(Section):
    r: Annotated[int, Field(gt=0)] = 16
    alpha: Positive | None = None  # 2 r when not given
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class Adapter(Lora):
    kind: Literal["none", "lora", "qlora"] = "none"


class Training(Section):
    """What every gradient descent here needs; phases and fine-tuning share it."""

    epochs: Positive | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    learning_rate: Positive
    batch_size: Annotated[int, Field(gt=0)] = 16
    accumulate: Annotated[int, Field(gt=0)] = 1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Positive = 1.0

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` or `steps`")
        return self


class Finetune(Training):
    """Fine-tuning of a teacher on gold rows, and `folds` more on parts of them for out-of-fold signals.

    folds: 0 where no student learns from this teacher about the rows it was tuned on; it then says nothing of them.
    """

    on: str
    lora: Lora | None = None
    folds: Literal[0] | Annotated[int, Field(ge=2)] = 2


class Price(Section):
    """US dollars a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Api(Section):
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
    attempts: Annotated[int, Field(gt=0)] = 8
    price: Price | None = None
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


class Answers(Section):
    """Answers of an external LLM that were asked for elsewhere: .csv, .tsv, .jsonl or .parquet files.

    repeats: `drop` answers that are, word for word, those of the row before although that is another text: the trace of
    a script that kept its last answer when a call failed. Only explanations tell; a bare label may well come twice.
    """

    files: Annotated[list[str], Field(min_length=1)]
    columns: AnswerColumns
    repeats: Literal["drop", "keep"] = "drop"


class Teacher(Section):
    """A model that produces signals. Without `finetune` it is only prompted (label-free).

    `api` is asked over the network, `answers` reads what an external LLM answered before.

    For those that are only prompted: `prompts` of the task file are tried on validation rows beside its `prompt`, and
    the best is taken. `shots` says where the `few_shot` solved examples come from: the task file, gold rows, or for
    each row the gold rows most similar to it (by the encoder `embeddings`), never of its own group. `calibrate` divides
    by what the prompt says of no text at all (`contextual`) or of many texts (`batch`). `quantize: nf4` loads their
    linear layers in 4 bits.
    """

    kind: Literal["lm", "classifier", "seq2seq", "api", "answers"]
    model: Name | None = None
    api: Api | None = None
    answers: Answers | None = None
    data: list[Name] | None = None  # the sources it labels; all of them when not given
    finetune: Finetune | None = None
    prompt: Literal["chat", "plain"] = "chat"
    prompts: list[str] = []
    few_shot: Count = 0
    shots: Literal["task", "gold", "similar"] = "task"
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
        if (self.shots == "similar") != (self.embeddings is not None):
            raise ValueError("`shots: similar` and `embeddings` (an encoder of `models`) go together")
        chosen = self.prompts or self.shots != "task" or self.calibrate != "none"
        if chosen and (self.finetune or self.kind in ("classifier", "answers")):
            raise ValueError("`prompts`, `shots` and `calibrate` are for teachers that are only prompted")
        return self


class Keep(Section):
    same_label: bool = True
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_similarity: Fraction = 0.2


class Augment(Section):
    """Paraphrases of a source's gold rows; `per_row: 0` turns them off."""

    source: Name
    teacher: Name
    per_row: Count = 1
    temperature: Positive = 0.7
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    batch_size: Annotated[int, Field(gt=0)] = 32
    keep: Keep = Keep()
    seed: int = 0


class Init(Section):
    """Which of the model's layers the student keeps: a list of indices, `all`, `first-N`, `last-N` or `every-N`.

    freeze: `embeddings` leaves the token vectors as they are, most of a small encoder's parameters.
    """

    layers: Annotated[list[Count], Field(min_length=1)] | Annotated[str, Field(pattern=LAYERS)] = "all"
    freeze: Literal["nothing", "embeddings"] = "nothing"


class EarlyStopping(Section):
    metric: Literal["accuracy", "macro_f1", "loss"] = "macro_f1"
    patience: Annotated[int, Field(gt=0)] = 3
    every: Annotated[int, Field(gt=0)]  # optimizer steps between two looks at the validation split


class Take(Section):
    """Which pseudo-labels to learn from: of at least this confidence (of the teachers' mean), that all of them give."""

    confidence: Fraction = 0.0
    agree: bool = False


class Phase(Training):
    """One leg of a student's training.

    space: what the divergences compare. `labels`: the distribution over the task's labels, exact at any temperature.
    `vocabulary`: the next token's, at every token of the answer; the teachers must be language models.
    """

    data: Annotated[list[str], Field(min_length=1)]  # `source/split`
    teachers: list[Name] = []
    mix: Literal["uniform", "validation", "confidence"] = "uniform"
    take: Take = Take()  # of the rows without a gold label
    loss: Annotated[dict[Literal[LOSS_TERMS], Positive], Field(min_length=1)]
    space: Literal["labels", "vocabulary"] = "labels"
    temperature: Positive = 1.0
    scale_by_t2: bool = True  # Hinton et al. 2015: keeps the gradient's size independent of the temperature
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of `jsd`; its ends are `kl` and `reverse_kl`
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of `skew_*`
    # teacher layer of the student's layers: a rule of PKD, or a list of layers or of [student, teacher] pairs
    layers: Literal["skip", "last"] | list[Count | Annotated[list[Count], Field(min_length=2, max_length=2)]] = "skip"
    rationales: bool = False  # the divergences cover the tokens of the rationales, too
    top_k: Annotated[int, Field(gt=0)] | None = None  # keep so many outcomes of a vocabulary, not all
    on_policy: Fraction = 0.0  # share of batches whose answers the student writes itself
    max_new_tokens: Annotated[int, Field(gt=0)] = 16  # of these answers
    order: Literal["random", "confidence", "length"] = "random"
    early_stopping: EarlyStopping | None = None

    @property
    def asks_tokens(self) -> bool:
        """Whether the teachers are asked about tokens, not only about labels."""
        return "uld" in self.loss or (self.space == "vocabulary" and any(term in DIVERGENCES for term in self.loss))

    @property
    def asks_states(self) -> bool:
        return any(term in STATE_TERMS for term in self.loss)

    @property
    def tells_reasons(self) -> bool:
        return self.rationales or "rationale" in self.loss

    @model_validator(mode="after")
    def _terms_fit(self):
        signals = [term for term in self.loss if term not in ("ce", "rationale", "prior")]
        if signals and not self.teachers:
            raise ValueError(f"loss term `{signals[0]}` needs `teachers`")
        if self.order == "confidence" and not self.teachers:
            raise ValueError("`order: confidence` needs `teachers`")
        if self.on_policy and not (self.space == "vocabulary" and self.asks_tokens and "uld" not in self.loss):
            raise ValueError("`on_policy` needs `space: vocabulary` and a divergence in `loss`")
        if self.top_k:
            other = [term for term in self.loss if term in (*DIVERGENCES, "uld") and term != "kl"]
            if self.space != "vocabulary" or "kl" not in self.loss or other or len(self.teachers) != 1:
                raise ValueError("`top_k` needs `space: vocabulary`, one teacher, and `kl` as the only divergence")
            if self.temperature != 1:
                raise ValueError("`top_k` needs `temperature: 1`: at another, the mass of the rest is not known")
            if self.on_policy:
                raise ValueError("`top_k` is for signals that are kept; with `on_policy` the teacher is asked anew")
        return self


class Student(Section):
    """A model and a list of phases. `control` names the student that differs from this one in one thing only."""

    model: Name
    arch: Literal["causal", "classifier", "seq2seq"]
    init: Init = Init()
    adapter: Adapter = Adapter()
    phases: list[Phase]
    control: Name | None = None
    prompt: Literal["chat", "plain"] = "chat"
    few_shot: Count = 0
    max_length: Annotated[int, Field(gt=8)] = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False  # less memory: activations are computed again during backward
    checkpoint_every: Annotated[int, Field(gt=0)] = 50  # optimizer steps between two checkpoints


class Evaluate(Section):
    headline: Name  # the student that the report's first sentence is about
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    throughput_rows: Annotated[int, Field(gt=0)] = 128
    rewritten_rows: Count = 64  # test rows asked again with other names, amounts or spelling; 0: none
    paraphrased_rows: Count = 0  # and test rows that `augment.teacher` puts into other words
    pretrained_on: dict[Name, list[Name]] = {}  # who had learned from a source before: no test of them
    samples: Annotated[int, Field(gt=0)] = 12
    seed: int = 0


class Search(Section):
    """Random settings for one phase of a student, tried on a share of its gold rows: see `python -m distillery.search`.

    phase: counted from 1.  learning_rate: lowest and highest.  choose: values for other keys of the phase.
    """

    student: Name
    phase: Annotated[int, Field(gt=0)] = 1
    sets: Annotated[int, Field(gt=0)] = 25
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    folds: Annotated[int, Field(ge=2)] = 3
    learning_rate: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    choose: dict[
        Literal["batch_size", "temperature", "weight_decay", "warmup", "epochs", "steps", "schedule", "loss"],
        Annotated[list[Any], Field(min_length=1)],
    ] = {}
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_choose(self):
        if not self.learning_rate and not self.choose:
            raise ValueError("nothing to choose: give `learning_rate` or `choose`")
        return self


class Published(Section):
    """Figures of a published system, for one student or teacher as it is called here."""

    model: str
    scores: Annotated[dict[str, float], Field(min_length=1)]
    note: str = ""


class Recipe(Section):
    """What a recipe reproduces. guesses: where the source is silent or contradicts itself.  differences: what is not
    as in the source."""

    source: str
    published: list[Published] = []
    guesses: list[str] = []
    differences: list[str] = []
    needs: str = ""  # hardware and time to expect


class Params(Section):
    seeds: Annotated[list[int], Field(min_length=1)]
    data: Annotated[dict[Name, Source], Field(min_length=1)]
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    teachers: dict[Name, Teacher]
    augment: Augment
    students: Annotated[dict[Name, Student], Field(min_length=1)]
    evaluate: Evaluate
    search: Search | None = None
    recipe: Recipe | None = None
    scale: dict[Name, dict[str, Any]] = {}  # overlays, see `python -m distillery.recipe`

    def tested_on(self, student: str) -> str:
        """The source `student` is scored on: the last that it learns from (without phases: the headline's)."""
        phases = self.students[student].phases or self.students[self.evaluate.headline].phases
        return phases[-1].data[-1].split("/")[0] if phases else next(iter(self.data))

    def sources_of(self, teacher: str) -> list[str]:
        """The sources that `teacher` labels, in the order of `data`."""
        return self.teachers[teacher].data or list(self.data)


def root(start: Path | str | None = None) -> Path:
    """The repository root: the nearest folder at or above `start` that holds `dvc.yaml`.

    Raises UserError when there is none. Papermill starts in the root, Jupyter in `notebooks/`.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise UserError(f"{here}: no dvc.yaml here or in any folder above; run from inside the repository")


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, read as DVC reads it (PyYAML's 1.1 takes the key `on` for `True`).

    Raises UserError (file, line) when it is missing or malformed.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def load(path: Path | str | None = None) -> Params:
    """Read and validate `params.yaml` (of the repository root when no path is given).

    Raises UserError with one line naming the first wrong key and what is allowed there.
    """
    path = Path(path) if path else root() / "params.yaml"
    params = validate(Params, read_yaml(path), path.name)
    _check_references(params, path.name, path.parent)
    return params


def validate(kind: type[Section], raw: Any, file: str) -> Any:
    """`raw` as an object of `kind`. Raises UserError with one line naming `file`, the key and what is allowed."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, kind, raw, file)) from None


WORDS = {  # what pydantic's kinds of error mean to somebody who edits YAML
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "missing": "missing",
}


def _one_line(error: ValidationError, kind: type[BaseModel], raw: Any, file: str) -> str:
    located = [(_keys(found, raw), found) for found in error.errors()]
    # An unknown key is nearly always the cause of what else is wrong beside it (its right spelling is "missing").
    top, first = min(located, key=lambda item: item[1]["type"] != "extra_forbidden")
    # A value of several allowed kinds gives an error for each: the one that got furthest says what was meant.
    below = [item for item in located if item[0][: len(top)] == top]
    keys = top
    if first["type"] != "extra_forbidden" and first["loc"][-1:] != ("[key]",):
        keys, first = max(below, key=lambda item: len(item[0]))
    key = ".".join(keys) or "(the whole file)"
    if first["type"] == "extra_forbidden":
        model = _model_at(kind, keys[:-1])
        names = list(model.model_fields) if model else []
        close = difflib.get_close_matches(keys[-1], names, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ";"
        return f"{file}: {key}: unknown key{hint} allowed: {', '.join(names)}"
    here = [found for at, found in below if at == keys]
    said = list(dict.fromkeys(_in_words(found) for found in here if found["type"] != "string_type")) or ["must be text"]
    message = " or ".join([said[0], *(more.removeprefix("must be ") for more in said[1:])])
    silent = first["type"] == "missing" or isinstance(first["input"], (dict, list))
    silent |= (first.get("ctx") or {}).get("pattern") in (URL, VARIABLE)  # what stands there may be a secret
    return f"{file}: {key}: {message}" + ("" if silent else f", not {first['input']!r}")


def _keys(found: Any, raw: Any) -> list[str]:
    """The keys from the top of `raw` to the error; pydantic puts the names of union members among them."""
    keys, node = [], raw
    for part in found["loc"]:
        if isinstance(node, dict) and (part in node or found["type"] in ("missing", "extra_forbidden")):
            keys.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            keys.append(str(part))
            node = node[part]
    return keys


def _in_words(found: Any) -> str:
    if found["type"] == "literal_error":
        return f"must be {found['ctx']['expected']}"
    if found["type"] == "too_short":
        least = found["ctx"]["min_length"]
        return "must not be empty" if least == 1 else f"needs at least {least}"
    if found["type"] == "string_pattern_mismatch":
        return f"must be {PATTERNS[found['ctx']['pattern']]}"
    return WORDS.get(found["type"]) or found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _model_at(kind: Any, keys: Iterable[str]) -> type[BaseModel] | None:
    """The section class that sits at `keys` below `kind`."""
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            kind = field.annotation if field else None
        else:
            kind = next((a for a in _inner(kind) if a is not str), None)
        kind = _unwrap(kind)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _inner(kind: Any) -> list[Any]:
    return list(get_args(kind))[::-1]


def _unwrap(kind: Any) -> Any:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        members = [_unwrap(a) for a in get_args(kind) if a is not type(None)]
        return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), members[0])
    return kind


def _check_references(params: Params, file: str, folder: Path) -> None:
    """Names that point at other sections must exist there."""

    def known(key: str, name: str, names: Iterable[str], what: str) -> None:
        if name not in names:
            raise UserError(f"{file}: {key}: unknown {what} `{name}`; known: {', '.join(names) or 'none'}")

    def split_of(key: str, where: str, splits: tuple[str, ...]) -> str:
        source, _, split = where.partition("/")
        known(key, source, params.data, "source")
        if split not in splits:
            raise UserError(f"{file}: {key}: `{where}` must be `source/split` with split one of {', '.join(splits)}")
        if split in SPLITS and not params.data[source].holds(split):
            raise UserError(f"{file}: {key}: `{where}` is empty: data.{source}.split.{split} is 0")
        return source

    for name, source in params.data.items():
        if not (folder / "tasks" / f"{source.task}.yaml").exists():
            here = sorted(p.stem for p in (folder / "tasks").glob("*.yaml"))
            known(f"data.{name}.task", source.task, here, "task")
    for name, teacher in params.teachers.items():
        if teacher.model:
            known(f"teachers.{name}.model", teacher.model, params.models, "model")
        if teacher.embeddings:
            known(f"teachers.{name}.embeddings", teacher.embeddings, params.models, "model")
        for i, source in enumerate(teacher.data or []):
            known(f"teachers.{name}.data.{i}", source, params.data, "source")
        sources = params.sources_of(name)
        tasks = {params.data[s].task for s in sources}
        if len(tasks) > 1:
            raise UserError(f"{file}: teachers.{name}.data: sources of one task only, not {', '.join(sorted(tasks))}")
        if teacher.finetune:
            source = split_of(f"teachers.{name}.finetune.on", teacher.finetune.on, ("train",))
            if params.data[source].task not in tasks:
                raise UserError(f"{file}: teachers.{name}.finetune.on: `{source}` has another task than its data")
            if source not in sources:
                raise UserError(
                    f"{file}: teachers.{name}.finetune.on: `{source}` is not among its `data`: add it there"
                )
        elif teacher.kind == "classifier":
            raise UserError(f"{file}: teachers.{name}: a classifier needs `finetune`, its head starts untrained")
    known("augment.source", params.augment.source, params.data, "source")
    if params.augment.per_row:
        split_of("augment.source", f"{params.augment.source}/train", ("train",))
        known("augment.teacher", params.augment.teacher, params.teachers, "teacher")
        if params.teachers[params.augment.teacher].kind not in WRITERS:
            raise UserError(
                f"{file}: augment.teacher: `{params.augment.teacher}` cannot write; needs `kind: "
                f"{' or '.join(WRITERS)}`"
            )
        if params.augment.source not in params.sources_of(params.augment.teacher):
            raise UserError(f"{file}: augment.teacher: `{params.augment.teacher}` does not label that source")
    for name, student in params.students.items():
        known(f"students.{name}.model", student.model, params.models, "model")
        if student.control:
            known(
                f"students.{name}.control", student.control, [n for n in params.students if n != name], "other student"
            )
        if student.adapter.kind == "qlora" and student.arch != "causal":
            raise UserError(f"{file}: students.{name}.adapter.kind: qlora is for `arch: causal`, not {student.arch}")
        seen = set()
        for i, phase in enumerate(student.phases):
            key = f"students.{name}.phases.{i}"
            sources = [split_of(f"{key}.data", d, ("train", "pool", "augmented")) for d in phase.data]
            seen |= {params.data[s].task for s in sources}
            if "ce" in phase.loss and not phase.teachers and any(d.endswith("/pool") for d in phase.data):
                raise UserError(f"{file}: {key}.loss: `ce` on a pool needs `teachers`: its rows carry no gold label")
            _check_terms(params, f"{file}: {key}", student, phase)
            for where in phase.data:
                if where.endswith("/augmented") and where.split("/")[0] != params.augment.source:
                    raise UserError(f"{file}: {key}.data: `{where}`: only `{params.augment.source}` is augmented")
            for teacher in phase.teachers:
                known(f"{key}.teachers", teacher, params.teachers, "teacher")
                tuned = params.teachers[teacher].finetune
                for where in phase.data if tuned and not tuned.folds else []:
                    source, split = where.split("/")
                    if source == tuned.on.split("/")[0] and split != "pool":
                        raise UserError(
                            f"{file}: {key}.data: `{where}`: `{teacher}` was tuned on these rows, or on those they are "
                            "made of, and says nothing of them without folds (finetune.folds: 0)"
                        )
                for source in sources:
                    known(f"{key}.teachers", teacher, _labelling(params, source), f"teacher for `{source}`")
        if len(seen) > 1:
            raise UserError(f"{file}: students.{name}.phases: one task only, not {', '.join(sorted(seen))}")
    if params.evaluate.paraphrased_rows:
        known("augment.teacher", params.augment.teacher, params.teachers, "teacher")
        if params.teachers[params.augment.teacher].kind != "lm":
            raise UserError(
                f"{file}: evaluate.paraphrased_rows: `{params.augment.teacher}` (augment.teacher) cannot write"
            )
    for name, sources in params.evaluate.pretrained_on.items():
        known("evaluate.pretrained_on", name, [*params.models, *params.teachers], "model or teacher")
        for source in sources:
            known(f"evaluate.pretrained_on.{name}", source, params.data, "source")
    if params.search:
        known("search.student", params.search.student, params.students, "student")
        if params.search.phase > len(params.students[params.search.student].phases):
            raise UserError(f"{file}: search.phase: `{params.search.student}` has no phase {params.search.phase}")
    known("evaluate.headline", params.evaluate.headline, params.students, "student")
    if len(set(params.seeds)) != len(params.seeds):
        raise UserError(f"{file}: seeds: each seed once, not {params.seeds}")


def _check_terms(params: Params, key: str, student: Student, phase: Phase) -> None:
    """The loss terms of `phase` can be computed for this student and these teachers."""
    kinds = {name: params.teachers[name].kind for name in phase.teachers if name in params.teachers}
    if student.arch == "classifier":
        tokens = [term for term in phase.loss if term in ("uld", "rationale")]
        if tokens or phase.space == "vocabulary" or phase.tells_reasons:
            what = f"loss.{tokens[0]}" if tokens else "rationales" if phase.tells_reasons else "space"
            raise UserError(f"{key}.{what}: a classifier writes no tokens; needs `arch: causal` or `seq2seq`")
    if phase.on_policy and student.arch != "causal":
        raise UserError(f"{key}.on_policy: needs `arch: causal`, not {student.arch}")
    if "attention" in phase.loss and {student.arch, *kinds.values()} != {"classifier"}:
        raise UserError(f"{key}.loss.attention: compares the tokens of two classifiers, student and teacher")
    for name, kind in kinds.items():
        if phase.asks_tokens and kind not in ("lm", "seq2seq"):
            raise UserError(f"{key}.teachers: `{name}` ({kind}) gives no token log-probabilities; use `space: labels`")
        if phase.asks_states and kind not in ("lm", "seq2seq", "classifier"):
            raise UserError(f"{key}.teachers: `{name}` ({kind}) shows no hidden states")


def _labelling(params: Params, source: str) -> list[str]:
    return [t for t in params.teachers if source in params.sources_of(t)]


def raise_if_disk_full(error: Exception, path: Path) -> None:
    """Raise a UserError that names the file if `error` is some library's way to say that there is no space left."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # Libraries written in Rust or C++ tell it in their message only, torch just that a write failed.
    told = (*(os.strerror(code) for code in full), "PytorchStreamWriter failed writing")
    if getattr(error, "errno", None) in full or any(words in str(error) for words in told):
        raise UserError(f"{path}: the disk is full; free some space and run again") from None


@contextmanager
def atomic(path: Path | str):
    """A temporary path beside `path` that takes its place only if the block ends well.

    The block writes a file there or makes a folder; a folder replaces the old one as a whole.
    Raises UserError when the disk is full, naming the file; nothing half-written stays behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)  # os.replace takes the place of an empty folder only
        os.replace(temporary, path)
    except Exception as error:
        raise_if_disk_full(error, path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        checked = load()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    print(
        f"params.yaml: {len(checked.data)} source(s), {len(checked.teachers)} teacher(s), "
        f"{len(checked.students)} student(s) x {len(checked.seeds)} seed(s)"
    )
