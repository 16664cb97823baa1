"""TRL's faults beside the terms and trainers of this package, shared by the tests and by `benchmarks/trl_faults.py`.

Every function in `CASES` runs TRL's GKDTrainer and this package's on the same tiny models and returns the figures of
both. `DISTILLATION_TRAINER` holds, by the name of a case, what TRL's newer trainer gives; it is on-policy alone, has no
gold answers and no text of a teacher, so the other cases do not arise. The tests in `test_faults.py` state what all
these figures have to be.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

import tiny
from distillery import losses
from distillery.config.schema import PhaseConfig
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.packed.token_tree import common_prefix
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import load_task
from distillery.training.completions import StepCounts
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import TrainingRows
from distillery.training.trainers import build_trainer

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
TEXTS = [
    "Operating profit rose.",
    "The meeting will be held in May.",
    "Sales fell and the loss grew.",
    "Net sales rose in May.",
]
LABELS = [0, 1, 2, 0]


@dataclass
class Case:
    """number: the fault's place in the list (0: not in it). shown: what the figures are."""

    number: int
    name: str
    shown: str
    measure: Callable[[Path, Path], tuple[list[float], list[float]]]


CASES: list[Case] = []


def case(number: int, shown: str) -> Callable[[Any], Any]:
    """measure(tiny models' folder, empty folder) -> (TRL's figures, own figures)."""

    def add(measure: Any) -> Any:
        CASES.append(Case(number, measure.__name__, shown, measure))
        return measure

    return add


# ------------------------------------------------------------------------------- TRL's trainer around tiny models


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "user", "assistant", *"abcdefghijklm"])}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<pad>")
    turns = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    result.chat_template = turns + "{% if add_generation_prompt %}assistant {% endif %}"
    return result


def llama(seed: int, vocabulary: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=1.0,  # far from uniform, so that temperature and divergence matter
    )
    return LlamaForCausalLM(config)


def gkd(folder: Path, student: Any, teacher: Any, tokenizer: Any, messages: list[Any], **options: Any) -> GKDTrainer:
    defaults = {"lmbda": 0.0, "beta": 0.5, "temperature": 1.0, "max_length": 512, "per_device_train_batch_size": 4}
    arguments = GKDConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_dropout=True, save_strategy="no", disable_tqdm=True, **{**defaults, **options},
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=arguments,
        train_dataset=Dataset.from_list([{"messages": turns} for turns in messages]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # whose lines would stand between the rows of the benchmark's table
    return trainer


def letters(folder: Path, teacher: Any = None, **options: Any) -> GKDTrainer:
    """TRL's trainer on four rows of letters."""
    turns = [("a b c", "d e"), ("f g", "h i j"), ("k", "l"), ("a c e", "m")]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    return gkd(folder, llama(0), teacher or llama(1), word_tokenizer(), messages, **options)


def batch_of(trainer: GKDTrainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def supervised(trainer: GKDTrainer, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits, teacher log-probabilities and targets at the supervised positions, as rows."""
    with torch.no_grad():
        both = [
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
            for model in (trainer.model, trainer.teacher_model)
        ]
    targets = batch["labels"][:, 1:]
    at = targets != -100
    return both[0][at], both[1][at].log_softmax(-1), targets[at]


def pair(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and log-probabilities of 4 positions with k outcomes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, k, generator=generator, dtype=torch.double) * 2
    return student, teacher.log_softmax(-1)


# ------------------------------------------------------------------------- this package's trainer on the same task


def finance(folder: Path, seed: int, **more: Any) -> LabelModel:
    """A tiny language model that predicts the sentiment of a sentence."""
    model = load_model(folder / "tiny-llama", "causal")
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return LabelModel(model.eval(), load_tokenizer(folder / "tiny-llama"), TASK, "causal", **more)


def messages(texts: list[str]) -> list[list[dict[str, str]]]:
    answers = [TASK.names[label] for label in LABELS]
    return [
        [*chat_turns(TASK, text), {"role": "assistant", "content": word}]
        for text, word in zip(texts, answers, strict=False)
    ]


def trainer_of(
    student: LabelModel, teacher: LabelModel, out: Path, rationales: list[str] | None = None, **more: Any
) -> Any:
    """This package's trainer of a phase on `TEXTS`."""
    settings = {
        "data": ["toy/train"],
        "teachers": ["one"],
        "loss": {"jsd": 1.0},
        "space": "vocabulary",
        "batch_size": 4,
        "learning_rate": 1e-3,
    }
    settings |= {"steps": 1} if "epochs" not in more else {}
    rows = TrainingRows(TEXTS, np.array(LABELS), rationales=rationales)
    box = OpenableTeacher(lambda fold: teacher, "one", teacher.model.config.num_hidden_layers, out / "signals")
    return build_trainer(
        student, rows, PhaseConfig.model_validate(settings | more), folder=out / "run", seed=0, title="own",
        checkpoint_every=10**6, teachers={"one": box},
    )  # fmt: skip


def first_loss(trainer: Any) -> tuple[int, float]:
    """Supervised tokens of our trainer's first batch, and its loss."""
    batch = trainer.completions.micro_batch(list(range(4)))
    trainer.counts = StepCounts.of([batch])
    loss = trainer.compute_loss(trainer.model, {"micro_batch": batch})
    return trainer.counts.compared_tokens, loss.item()


class HeadRows:
    """Counts the rows that go through an output head."""

    def __init__(self, model: Any):
        self.count = 0
        model.get_output_embeddings().register_forward_hook(self.add)

    def add(self, module: Any, inputs: Any, logits: torch.Tensor) -> None:
        self.count += logits.shape[:-1].numel()


def count_calls(owner: Any, name: str) -> list[int]:
    """A list that grows whenever `owner.name` is called."""
    calls: list[int] = []
    method = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    setattr(owner, name, counted)
    return calls


# ------------------------------------------------------------------------------- the faults


@case(1, "on-policy loss of one model with answers of 4, 16, 64 tokens")
def on_policy_loss_is_divided_by_the_datasets_label_count(folder: Path, out: Path):
    trl_figures, own_figures = [], []
    for length in (4, 16, 64):
        trl = letters(out, lmbda=1.0, max_new_tokens=length, max_steps=1)
        trl.create_optimizer_and_scheduler(1)
        batches, count = trl.get_batch_samples(iter(trl.get_train_dataloader()), 1, torch.device("cpu"))
        torch.manual_seed(0)
        inputs = dict(batches[0])
        trl_figures.append(trl.training_step(trl.model, inputs, count).item())
        student, teacher, targets = supervised(trl, inputs)  # training_step leaves what it generated in `inputs`
        assert len(targets) == 4 * length and int(count) < 4 * length
        own_figures.append(losses.reduce(losses.jsd(student, teacher), None, len(targets)).item())
        assert math.isclose(trl_figures[-1], own_figures[-1] * len(targets) / int(count), rel_tol=1e-4)
    return trl_figures, own_figures


@case(2, "loss at T = 1, 5")
def temperature_never_reaches_the_loss(folder: Path, out: Path):
    trl_figures, own_figures = [], []
    for temperature in (1.0, 5.0):
        trl = letters(out, temperature=temperature)
        batch = batch_of(trl)
        student, teacher, targets = supervised(trl, batch)
        trl_figures.append(trl.compute_loss(trl.model, batch).item())
        own_figures.append(losses.reduce(losses.jsd(student, teacher, temperature, 0.5), None, len(targets)).item())
        exact = GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(len(targets)), 0.5, temperature)
        assert math.isclose(own_figures[-1], exact.item(), abs_tol=1e-12)  # the static function does take a temperature
    return trl_figures, own_figures


@case(3, "divergence at beta = 0, 0.01, 0.99, 1 (own: `scaled`)")
def beta_jumps_at_its_ends(folder: Path, out: Path):
    student, teacher = pair(50)
    betas = (0.0, 0.01, 0.99, 1.0)
    trl_figures = [GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(4), beta).item() for beta in betas]
    return trl_figures, [losses.jsd(student, teacher, beta=beta, scaled=True).mean().item() for beta in betas]


@case(4, "loss with the right answers, with wrong ones")
def no_cross_entropy_term(folder: Path, out: Path):
    trl = letters(out)
    batch = batch_of(trl)
    wrong = {**batch, "labels": torch.where(batch["labels"] == -100, -100, 5)}
    trl_figures, own_figures = [], []
    for labels in (batch, wrong):
        trl_figures.append(trl.compute_loss(trl.model, labels).item())
        student, teacher, targets = supervised(trl, labels)
        loss = {"ce": 0.5, "jsd": 0.5}
        total, _ = losses.combine_terms(
            loss, student, targets=targets, teacher_logprobs=teacher, denominator=len(targets)
        )
        own_figures.append(total.item())
    return trl_figures, own_figures


@case(5, "tokens of the instruction before a text that is too long: in the prompt, left after the cut")
def a_long_text_pushes_the_instruction_out(folder: Path, out: Path):
    student = finance(folder, 0)
    long = " ".join(TEXTS * 20)
    prompts = student.encode([TEXTS[0], TEXTS[1]])
    instruction = prompts[0][: common_prefix(prompts)]
    limit = len(instruction) + 40
    student.max_length = limit
    trl = gkd(out, student.model, student.model, student.tokenizer, messages([long]), max_length=limit)
    batch = trl.data_collator([trl.train_dataset[0]])
    left = [common(instruction, ids) for ids in (batch["input_ids"][0].tolist(), student.encode([long])[0])]
    return [len(instruction), left[0]], [len(instruction), left[1]]


def common(a: list[int], b: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@case(5, "answers' tokens supervised where the generation prompt is no prefix of the turn, and the loss")
def a_generation_prompt_of_its_own_masks_the_answers(folder: Path, out: Path):
    student, teacher = finance(folder, 0), finance(folder, 1)
    for model in (student, teacher):  # as templates of models that think first do
        ends = "{% if add_generation_prompt %}<|im_start|>assistant\n"
        # As many words as an answer has tokens. With more words, TRL's collator raises an error for this kind of
        # tokenizer; for one of bytes it stays silent as it does here.
        model.tokenizer.chat_template = tiny.CHAT.replace(ends, ends + "the year ")
        assert model.tokenizer.chat_template != tiny.CHAT
    trl = gkd(out, student.model, teacher.model, student.tokenizer, messages(TEXTS))
    batch = trl.data_collator([trl.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        trl_loss = trl.compute_loss(trl.model, batch).item()
    return [int((batch["labels"] != -100).sum()), trl_loss], list(first_loss(trainer_of(student, teacher, out)))


@case(6, "positions a step through the student's head, through the teacher's; supervised")
def every_position_goes_through_both_heads(folder: Path, out: Path):
    student, teacher = finance(folder, 0), finance(folder, 1)
    trl = gkd(out, student.model, teacher.model, student.tokenizer, messages(TEXTS))
    batch = trl.data_collator([trl.train_dataset[i] for i in range(4)])
    trainer = trainer_of(student, teacher, out)  # this calls the teacher, once
    heads = [HeadRows(model.model) for model in (student, teacher)]
    trl.compute_loss(trl.model, batch)
    trl_figures = [head.count for head in heads]
    count, _ = first_loss(trainer)
    own_figures = [head.count - before for head, before in zip(heads, trl_figures, strict=True)]
    return [*trl_figures, int((batch["labels"] != -100).sum())], [*own_figures, count]


@case(7, "divergence of 120 tokens from the same vocabulary padded to 128 (nan: refused)")
def padded_vocabularies_are_refused(folder: Path, out: Path):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, k, generator=generator) for k in (120, 128))
    try:
        trl_value = GKDTrainer.generalized_jsd_loss(student, teacher).item()
    except RuntimeError:
        trl_value = math.nan
    return [trl_value], [losses.jsd(*losses.shared_vocabulary(student, teacher.log_softmax(-1))).mean().item()]


@case(8, "times the teacher writes its text in 1 epoch, in 3 epochs of 2 steps")
def sequence_distillation_writes_anew_in_every_step(folder: Path, out: Path):
    trl_figures, own_figures = [], []
    for epochs in (1, 3):
        student, teacher = finance(folder, 0), finance(folder, 1)
        written, continued = count_calls(teacher.model, "generate"), count_calls(teacher, "generate_tokens")
        state = random.getstate()
        settings = {"seq_kd": True, "max_new_tokens": 2, "per_device_train_batch_size": 2, "num_train_epochs": epochs}
        gkd(out, student.model, teacher.model, student.tokenizer, messages(TEXTS), **settings).train()
        random.setstate(state)
        trl_figures.append(len(written))
        rationales = teacher.generate([turns[:-1] for turns in messages(TEXTS)], max_new_tokens=4)  # once, for good
        loss = {"ce": 0.5, "rationale": 0.5}
        more = {"teachers": [], "space": "labels", "batch_size": 2}
        trainer_of(student, teacher, out, rationales=rationales, loss=loss, epochs=epochs, **more).train()
        own_figures.append(len(continued))
    return trl_figures, own_figures


@case(0, "divergence from a teacher with a probability of 0")
def a_zero_probability_gives_nan(folder: Path, out: Path):
    student, teacher = pair(7)
    teacher[:, 0] = -torch.inf
    return [GKDTrainer.generalized_jsd_loss(student, teacher).item()], [losses.jsd(student, teacher).mean().item()]


# ------------------------------------------------------------------------------- TRL's newer trainer


def distillation(out: Path, student: Any, teacher: Any, **options: Any) -> DistillationTrainer:
    """TRL's on-policy trainer on four prompts of letters."""
    arguments = DistillationConfig(
        output_dir=str(out), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, max_steps=1, disable_tqdm=True, **{"beta": 0.5, **options},
    )  # fmt: skip
    prompts = [[{"role": "user", "content": text}] for text in ("a b c", "f g", "k", "a c e")]
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=arguments, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=letter_tokenizer(),
    )  # fmt: skip


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Of letters, with an end token, which this trainer asks for."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "m"
    return tokenizer


def distillation_loss(trainer: DistillationTrainer, temperature: float = 1.0, beta: float = 0.5) -> float:
    """The loss of answers that its student samples at T = 1, as `training_step` takes it."""
    torch.manual_seed(0)
    batch = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    trainer.temperature, trainer.beta = temperature, beta
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


def distillation_on_policy_loss(out: Path) -> list[float]:
    return [distillation_loss(distillation(out, llama(0), llama(1), max_completion_length=n)) for n in (4, 16, 64)]


def distillation_temperature(out: Path) -> list[float]:
    return [distillation_loss(distillation(out, llama(0), llama(1), max_completion_length=4), t) for t in (1.0, 5.0)]


def distillation_beta(out: Path) -> list[float]:
    trainers = [distillation(out, llama(0), llama(1), max_completion_length=16) for _ in range(4)]
    return [
        distillation_loss(trainer, beta=beta) for trainer, beta in zip(trainers, (0.0, 0.01, 0.99, 1.0), strict=True)
    ]


def distillation_padded_vocabulary(out: Path) -> list[float]:
    try:
        return [distillation_loss(distillation(out, llama(0), llama(1, vocabulary=24), max_completion_length=4))]
    except ValueError:
        return [math.nan]


DISTILLATION_TRAINER = {
    "on_policy_loss_is_divided_by_the_datasets_label_count": distillation_on_policy_loss,
    "temperature_never_reaches_the_loss": distillation_temperature,
    "beta_jumps_at_its_ends": distillation_beta,
    "padded_vocabularies_are_refused": distillation_padded_vocabulary,
}
