"""A recipe without its weights: what fits, what fails, and figures computed by hand."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import hub
import tiny
from distillery.config.schema import ModelConfig, OwnSplits, PhaseConfig, SourceConfig, StudentConfig, TrainingConfig
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.models import devices
from distillery.models.layers import count_parameters
from distillery.pipeline.plan import command, facts, shapes
from distillery.pipeline.plan.costs import api_costs, disk_bytes, stage_memory, training_hours
from distillery.pipeline.plan.resolve import RecipePlan, resolve_recipe
from distillery.pipeline.plan.resources import GPUS, NF4_BYTES, UTILISATION, Memory, optimizer_bytes
from distillery.pipeline.plan.rows import count_hub_rows, count_slice
from distillery.pipeline.plan.tokenizers import write_stand_in
from distillery.tasks.schema import load_task
from distillery.training.student import build_student

FILES = ["config.json", "model.safetensors", "tokenizer.json"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 3,
    "eos_token_id": 2,
}
WEIGHTS = 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24)  # of the linear layers of both layers
OTHERS = 2 * 2048 * 16 + 2 * 2 * 16 + 16  # embeddings, output head, norms
SENTENCES, LABELS = (
    ["Profit rose to EUR 4 mn.", "The meeting is on Monday.", "Sales fell."],
    ["positive", "neutral", "negative"],
)
PHASE = {"data": ["demo/train"], "loss": {"ce": 1.0}, "epochs": 2, "batch_size": 4, "learning_rate": 1.0e-3}
KD = PHASE | {"teachers": ["big"], "loss": {"ce": 0.5, "kl": 0.5}}


def write_facts(
    root, name: str, config: dict | None = None, family: str = "one", files: list[str] | None = FILES, **more
):
    """The facts of the model `me/<name>`."""
    known = {"config": LLAMA if config is None else config, "tokenizer": {"family": family, "size": 2048}} | more
    known |= {} if files is None else {"files": {"main": files}}
    content = {key: {"value": value, "origin": "invented", "date": None} for key, value in known.items()}
    path = root / f"recipes/facts/me--{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hub": f"me/{name}"} | content))  # JSON is YAML


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with sixty rows, and the facts of a model `me/small`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    shutil.copytree(tiny.ROOT / "tasks", tmp_path / "tasks")
    rows = [json.loads(line) for line in (tiny.ROOT / "data/corpora/finance.jsonl").open(encoding="utf-8")][:60]
    (tmp_path / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_facts(tmp_path, "small", parameters=WEIGHTS + OTHERS, stored_dtype="float32")
    return tmp_path


def recipe(phases: list[dict] | None = None, **student) -> dict:
    """A recipe whose student and teacher are of `me/small`; `student` changes the student."""
    share = {"train": 0.5, "pool": 0.1, "validation": 0.2, "test": 0.2}
    small = {"hub": "me/small", "revision": "main"}
    return {
        "seeds": [0, 1],
        "data": {"demo": {"source": "demo.jsonl", "task": "finance-sentiment", "split": share, "near_duplicate": 1.0}},
        "models": {"small": small, "other": small},
        "teachers": {"big": {"kind": "lm", "model": "other", "prompt": "plain", "dtype": "bfloat16"}},
        "augment": {"source": "demo", "teacher": "big", "per_row": 0},
        "students": {
            "kd": {"model": "small", "arch": "causal", "prompt": "plain", "phases": phases or [PHASE]} | student
        },
        "evaluate": {"headline": "kd"},
    }


def failures(plan: RecipePlan) -> dict[str, str]:
    return {finding.place: finding.text for finding in plan.failed}


# ------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("targets", "missing"), [(["q_proj", "c_attn"], "c_attn"), (["c_attn"], "c_attn"), (["proj"], "proj")]
)
def test_a_target_that_no_layer_has_fails(root, targets, missing):
    plan = resolve_recipe(root, "demo", recipe(adapter={"kind": "lora", "r": 2, "targets": targets}))
    known = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    assert failures(plan) == {"students.kd": f"targets: no linear layer is called `{missing}`; there are: {known}"}


def test_targets_are_counted(root):
    plan = resolve_recipe(
        root, "demo", recipe(adapter={"kind": "qlora", "r": 2, "targets": ["q_proj", "self_attn.v_proj"]})
    )
    trained = 2 * 2 * ((16 + 16) + (16 + 8))
    text = (
        f"{WEIGHTS + OTHERS + trained:,} parameters, {trained:,} of them trained: adapters in 4 layers (q_proj, v_proj)"
    )
    assert not plan.failed and ("students.kd", text) in [(finding.place, finding.text) for finding in plan.findings]


def test_series_adapters_are_counted_beside_the_published_weights(root):
    plan = resolve_recipe(root, "demo", recipe(adapter={"kind": "series", "size": 2}))
    trained = 2 * 2 * (2 * 16 * 2 + 16 + 2)
    text = f"{WEIGHTS + OTHERS + trained:,} parameters, {trained:,} of them trained: adapters in 4 layers"
    published = f"{WEIGHTS + OTHERS:,} parameters; published: {WEIGHTS + OTHERS:,}"
    texts = [finding.text for finding in plan.findings if finding.place == "students.kd"]
    assert not plan.failed and f"{text} (o_proj, down_proj)" in texts and published in texts
    assert stage_memory(plan)["04_distill, kd, training"].gradients == 4 * trained


@pytest.mark.parametrize(
    ("teacher", "space", "reason"),
    [
        ({"family": "two"}, "vocabulary", "its vocabulary does not fit"),
        ({"family": "two"}, "labels", None),
        (
            {"config": LLAMA | {"vocab_size": 3000}},
            "vocabulary",
            "vocabularies of 2048 (student) and 3000 (teacher) tokens differ",
        ),
        ({"config": LLAMA | {"vocab_size": 2112}}, "vocabulary", None),  # the same tokenizer, padded to another size
    ],
)
def test_an_unequal_vocabulary_fails_where_the_loss_compares_tokens(root, teacher, space, reason):
    write_facts(root, "other", **teacher)
    raw = recipe([KD | {"space": space}])
    raw["models"]["other"] = {"hub": "me/other", "revision": "main"}
    failed = failures(resolve_recipe(root, "demo", raw))
    assert list(failed) == ([] if reason is None else ["students.kd.phases.0"])
    assert reason is None or reason in failed["students.kd.phases.0"]


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["config.json", "pytorch_model.bin", "vocab.txt"], "*.safetensors"),
        (["model.safetensors", "tokenizer.json"], "config.json"),
        (["config.json", "model-00001-of-00002.safetensors"], "a tokenizer"),
    ],
)
def test_a_missing_file_fails(root, files, missing):
    write_facts(root, "small", files=files)
    holds = f"me/small@main holds no {missing}"
    assert failures(resolve_recipe(root, "demo", recipe())) == {"models.small": holds, "models.other": holds}


def test_a_count_of_parameters_that_is_not_the_published_one_fails(root):
    write_facts(root, "small", parameters=7)
    assert failures(resolve_recipe(root, "demo", recipe())) == {
        "students.kd": f"{WEIGHTS + OTHERS:,} parameters; published: 7"
    }


def test_texts_longer_than_the_positions_fail(root):
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": 2048}
    write_facts(root, "small", config=config)
    assert "tokens are too many" in failures(resolve_recipe(root, "demo", recipe(max_length=256)))["students.kd"]
    assert not resolve_recipe(root, "demo", recipe(max_length=240)).failed


def test_what_is_not_known_is_no_failure(root):
    (root / "recipes/facts/me--small.yaml").unlink()
    plan = resolve_recipe(root, "demo", recipe())
    unknown = {finding.place for finding in plan.findings if finding.status == "unknown"}
    assert not plan.failed and unknown == {"models.small", "models.other", "teachers.big", "students.kd"}
    text, row = command.describe_plan(plan, "a100-80gb")
    assert "unknown" in text and row[-2:] == ("0", "6")
    needed = "a run reads config.json, *.safetensors and one of tokenizer.json, tokenizer.model, "
    assert f"the files of me/small@main are not known; {needed}" in text


def test_every_fact_has_its_origin_and_date(root):
    """Those of a model at hand are printed one by one; those of the recipes all have a day, and say if unchecked."""
    path = root / "recipes/facts/me--small.yaml"
    content = json.loads(path.read_text())
    content["config"] |= {"origin": "published, written down from memory", "date": "2026-11-26", "checked": False}
    content["parameters"] |= {"origin": "its page", "date": "2026-11-25"}
    path.write_text(json.dumps(content))
    plan = resolve_recipe(root, "demo", recipe())
    text, _ = command.describe_plan(plan, "a100-80gb")
    origins = [re.split("  +", line) for line in text[text.index("\nmodel  facts") :].splitlines()[2:7]]
    assert origins[:4] == [
        ["small", "config", "published, written down from memory on 2026-11-26, not checked"],
        ["small", "tokenizer, stored dtype, files", "invented"],
        ["small", "parameters", "its page, 2026-11-25"],
        ["other", "config", "published, written down from memory on 2026-11-26, not checked"],
    ]
    assert "a100-80gb: the vendor's data sheets, written down from memory on 2026-11-26, not checked" in text
    for path in (tiny.ROOT / facts.FACTS).glob("*.yaml"):
        # without its tokenizer's family a model has a vocabulary of its own, which no teacher's fits
        assert path.name.startswith("datasets--") or {"config", "tokenizer"} <= set(read_yaml(path)), path.name
        for known in [facts.Fact(**value) for value in read_yaml(path).values() if isinstance(value, dict)]:
            assert known.date is not None and known.checked == ("written down" not in known.origin)


# ------------------------------------------------------------------------------- figures


def test_states_of_8_bits_take_a_quarter_of_the_memory():
    def phase(optimizer: str) -> TrainingConfig:
        return TrainingConfig(steps=1, learning_rate=1.0, optimizer=optimizer)

    bytes_of = {name: optimizer_bytes([phase(name)]) for name in ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")}
    assert bytes_of == {"adamw": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}
    assert optimizer_bytes([phase("adamw_8bit"), phase("adamw")]) == 8 and optimizer_bytes([]) == 0


def test_rows_steps_memory_and_disk_by_hand(root):
    raw = recipe([PHASE, KD], dtype="bfloat16", adapter={"kind": "qlora", "r": 2, "targets": ["q_proj"]})
    plan = resolve_recipe(root, "demo", raw)
    train = plan.sources["demo"].counts["train"]
    assert sum(plan.sources["demo"].counts.values()) == 60 and train == pytest.approx(30, abs=3)
    assert [(phase.rows, phase.steps) for phase in plan.phases] == [(train, 2 * -(-train // 4))] * 2
    trained, stages = 2 * 2 * (16 + 16), stage_memory(plan)
    training = stages["04_distill, kd, training"]
    assert training.weights == pytest.approx(NF4_BYTES * WEIGHTS + 2 * OTHERS + 4 * trained)
    assert (training.gradients, training.optimizer) == (4 * trained, 8 * trained)
    assert stages["02_teach, big"].total == 2 * (WEIGHTS + OTHERS)
    assert stages["05_evaluate"].total == 3 * 2 * (WEIGHTS + OTHERS)
    kd = plan.params.students["kd"]
    for name, prompt, held in (("same", "plain", 3), ("chat", "chat", 4)):  # another prompt is another shape
        students = {"kd": kd, name: kd.model_copy(update={"prompt": prompt})}
        two = replace(plan, params=plan.params.model_copy(update={"students": students}))
        two.models = plan.models | {f"students.{name}": plan.models["students.kd"]}
        assert stage_memory(two)["05_evaluate"].total == held * 2 * (WEIGHTS + OTHERS)
    disk = disk_bytes(plan)
    assert disk["fetched models"] == 2 * 4 * (WEIGHTS + OTHERS)
    assert disk["students and tuned teachers, twice (DVC's cache)"] == 2 * 2 * 2 * (WEIGHTS + OTHERS)
    hours = training_hours(plan, "a100-80gb")["students.kd.phases.0"]
    phase = plan.phases[0]
    flops = 2 * phase.steps * phase.step.flops * phase.tokens[0] / phase.tokens[1]
    assert hours == pytest.approx(flops / (UTILISATION * GPUS["a100-80gb"].half) / 3600)


def test_memory_and_hours_of_processes_that_share_the_rows_or_the_model(root):
    def planned(dtype: str = "bfloat16", **compute) -> tuple[Memory, float]:
        plan = resolve_recipe(root, "demo", recipe(dtype=dtype) | {"compute": compute})
        return (
            stage_memory(plan)["04_distill, kd, training"],
            training_hours(plan, "a100-80gb")["students.kd.phases.0"],
        )

    (alone, hours), (ddp, of_two), (fsdp, of_three) = (
        planned(),
        planned(processes=2),
        planned(processes=3, strategy="fsdp"),
    )
    every = WEIGHTS + OTHERS
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * every, 4 * every, 8 * every)
    assert ddp == replace(alone, activations=alone.activations / 2)
    assert (of_two, of_three) == (pytest.approx(hours / 2), pytest.approx(hours / 3))
    outside, layer = 2 * 2048 * 16 + 16, WEIGHTS // 2 + 2 * 16  # embeddings, head and last norm; of one layer
    assert outside + 2 * layer == every
    gathered, with_gradients = outside + 2 * layer, outside + layer
    assert fsdp.weights == pytest.approx(4 * every / 3 + 2 * gathered)
    assert fsdp.gradients == pytest.approx(4 * every / 3 + 4 * with_gradients)
    assert (fsdp.optimizer, fsdp.activations) == (pytest.approx(8 * every / 3), alone.activations / 3)
    assert planned("float32", processes=3, strategy="fsdp")[0].weights == pytest.approx(4 * every / 3 + 4 * gathered)


def test_names_may_hold_dots_and_begin_alike(root):
    """`kd` holds the activations of its own phase alone, not those of the larger batch of `kd-1.5b`."""
    raw = recipe()
    tuning = {"on": "demo/train", "epochs": 1, "batch_size": 2, "learning_rate": 1.0e-3}
    raw["teachers"] = {"big-1.5b": raw["teachers"]["big"] | {"finetune": tuning}}
    raw["augment"]["teacher"] = "big-1.5b"
    wide = PHASE | {"batch_size": 4 * PHASE.get("batch_size", 16)}
    raw["students"] = {"kd": raw["students"]["kd"], "kd-1.5b": raw["students"]["kd"] | {"phases": [wide]}}
    plan = resolve_recipe(root, "demo", raw)
    names = ["teachers.big-1.5b.finetune", "students.kd.phases.0", "students.kd-1.5b.phases.0"]
    assert sorted(training_hours(plan, "a100-80gb")) == sorted(names)
    stages = stage_memory(plan)
    small, large = (stages[f"04_distill, {name}, training"].activations for name in ("kd", "kd-1.5b"))
    assert 0 < small < large


def test_the_mean_of_tokens_is_that_of_all_rows_and_the_step_that_of_the_longest(root):
    """600 rows of two lengths, one in two of them long; a second source has short rows alone."""
    words = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=3)][:600]
    labels = ["positive", "neutral", "negative"]
    rows = [
        {"text": f"{word} rose" + " by a lot" * (number % 2 * 20), "label": labels[number // 2 % 3]}
        for number, word in enumerate(words)
    ]
    for name, some in (("demo", rows), ("short", rows[::2])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    raw = recipe([PHASE, PHASE | {"data": ["demo/train", "short/train"]}])
    raw["data"]["short"] = raw["data"]["demo"] | {"source": "short.jsonl"}
    plan = resolve_recipe(root, "demo", raw)
    student, (alone, with_short) = plan.models["students.kd"], plan.phases
    short, long = ([len(student.encode([row["text"]])[0]) for row in rows[n::2]] for n in (0, 1))
    half, (mean, longest) = (sum(short) / 300 + sum(long) / 300) / 2, alone.tokens
    assert longest == max(long) and abs(mean - half) < 0.2 * half
    mean, longest = with_short.tokens
    assert longest == max(long) and mean < 0.9 * half
    assert with_short.step.flops == alone.step.flops  # both are of the longest rows, in the first source


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_operations_are_those_of_a_real_model(root, checkpointing):
    """What autograd saves for a real model of this shape, with the attention that is made of products."""
    phase = PhaseConfig(**PHASE | {"loss": {"ce": 1.0, "label_prior": 0.1}})
    spec = StudentConfig(
        model="small", arch="causal", prompt="plain", phases=[phase], gradient_checkpointing=checkpointing
    )
    task, frame = load_task("finance-sentiment"), pd.DataFrame({"text": SENTENCES, "label": LABELS})
    write_stand_in(
        root / "here", LLAMA, "one", [*SENTENCES, *(f" {label}" for label in LABELS), task.prompt.instruction]
    )
    steps = []
    for open_it in (shapes.open_student, real_student):
        student = open_it(spec, ModelConfig(folder="here"), root / "here", task)
        with sdpa_kernel(SDPBackend.MATH):
            steps.append(shapes.run_step(student, phase, frame.assign(split_ref="demo/train"), {}))
    assert steps[0] == steps[1] and steps[0].activations > 0 and steps[0].flops > 6 * WEIGHTS


def real_student(spec: StudentConfig, origin: ModelConfig, folder, task):
    """The student with random weights, whose forward pass is the one that the plan takes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return build_student(spec, folder, task, 0, origin)


def test_hidden_states_of_two_widths_are_projected(root):
    write_facts(root, "other", config=LLAMA | {"hidden_size": 32})
    raw = recipe([KD | {"loss": {"ce": 1.0, "hidden": 0.1}}])
    raw["models"]["other"] = {"hub": "me/other", "revision": "main"}
    plan = resolve_recipe(root, "demo", raw)
    assert not plan.failed and plan.phases[0].step.projections == [(16, 32)]
    texts = [finding.text for finding in plan.findings]
    assert "a batch runs forward and backward; hidden states projected from 16 to 32" in texts


@pytest.mark.parametrize(
    ("choices", "rows"),
    [({}, 2 * 31 * 0.5 * 2 / 3), ({"epochs": [1, 4]}, 4 * 31 / 3), ({"steps": [3], "batch_size": [2, 8]}, 24)],
)
def test_the_trials_of_a_search_count_in_the_hours(root, choices, rows):
    """Each of its folds trains on the others' rows of the share; of choices the largest counts."""
    raw = recipe([PHASE])
    without = training_hours(resolve_recipe(root, "demo", raw), "a100-80gb")
    search = {"student": "kd", "phase": 1, "trials": 5, "share": 0.5, "folds": 3, "learning_rate": [1.0e-4, 1.0e-3]}
    plan = resolve_recipe(root, "demo", raw | {"search": search | {"choices": choices}})
    hours = training_hours(plan, "a100-80gb")
    (phase,) = plan.phases
    assert phase.rows == 31
    a_row = without["students.kd.phases.0"] / 2 / (phase.steps * 4)  # two seeds
    assert hours == without | {"search": pytest.approx(5 * 3 * rows * a_row)}
    text, row = command.describe_plan(plan, "a100-80gb")
    assert "search of students.kd.phases.0: 5 x 3 trainings" in text and row[6] == f"{sum(hours.values()):.2f}"


def test_the_cost_of_an_endpoint_and_its_limit(root):
    raw = recipe([KD | {"loss": {"kl": 1.0}}])
    price = {"input": 2.0, "output": 4.0, "origin": "its page of 2026-11-26"}
    raw["teachers"]["big"] = {"kind": "api", "api": {"model": "m", "price": price, "max_cost": 1.0e-6}, "rationales": 5}
    plan = resolve_recipe(root, "demo", raw)
    cost = api_costs(plan)["big"]
    assert cost.requests == 60 + 5 and cost.output_tokens == 60 * 16 + 5 * 48
    assert cost.dollars == pytest.approx((2 * cost.input_tokens + 4 * cost.output_tokens) / 1e6)
    assert "above max_cost" in failures(plan)["teachers.big.api"]
    assert "  its page of 2026-11-26\n" in command.describe_plan(plan, "a100-80gb")[0]


@pytest.mark.parametrize(
    ("expression", "sizes", "rows"),
    [
        ("train", {"train": 100}, 100),
        ("train[20:50]", {"train": 100}, 30),
        ("train[20:500]", {"train": 100}, 80),
        ("train[:12%]", {"train": 3100}, 372),
        ("train[90%:]", {"train": 100}, 10),
        ("train[20:50]", {}, 30),
        ("train[:12%]", {}, None),
        ("train[20:]", {}, None),
        ("train", {}, None),
    ],
)
def test_rows_of_a_slice(expression, sizes, rows):
    assert count_slice(expression, sizes) == rows


def test_rows_of_a_hub_source_without_labels_are_a_pool():
    spec = SourceConfig(source="hub:me/news", task="t", columns={"label": None}, hub_split="train[:50]", limit=40)
    assert count_hub_rows(spec, {}) == {"train": 0, "pool": 40, "validation": 0, "test": 0}
    own = SourceConfig(source="hub:me/news", task="t", splits=OwnSplits(train="train", test="test"))
    assert count_hub_rows(own, {"train": 7}) == {"train": 7, "pool": 0, "validation": 0, "test": None}


class NoFloat64(TorchDispatchMode):
    """Raises where an operation gives numbers in float64 on the `meta` device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise AssertionError(f"{func} gives float64")
        return result


@pytest.mark.parametrize(
    ("arch", "loss", "space"),
    [
        ("causal", {"ce": 1.0, "label_prior": 0.1, "hidden": 0.1}, "labels"),
        ("causal", {"kl": 1.0}, "vocabulary"),
        ("causal", {"jsd": 1.0, "uld": 1.0}, "vocabulary"),
    ],
)
def test_no_loss_puts_float64_on_the_device(root, monkeypatch, arch, loss, space):
    """Apple's GPU has no such numbers; here the `meta` device stands for it."""
    monkeypatch.setattr(devices, "NO_FLOAT64", ("meta",))
    raw = recipe([KD | {"loss": loss, "space": space, "teachers": ["big", "second"]}])
    raw["teachers"]["second"] = raw["teachers"]["big"]
    with NoFloat64():
        assert failures(resolve_recipe(root, "demo", raw)) == {}


# ------------------------------------------------------------------------------- the hub, the command, the recipes


def test_the_hub_is_read_where_it_can_be_reached(root, tmp_path, monkeypatch):
    """Its config and list of files, at the recipe's revision; never its weights."""
    from huggingface_hub import constants

    files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"weights"}
    repos = {"me/whole": hub.Repo(files), "me/pickled": hub.Repo(pickled, others=(hub.Repo(files, branches=("pr",)),))}
    facts._hub_is_reachable.cache_clear()
    with hub.serving(repos) as (url, requests):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        read = {
            (name, revision): facts.read_model_facts(
                root, name, ModelConfig(hub=f"me/{name}", revision=revision), tmp_path / revision
            )
            for name, revision in (("whole", "main"), ("pickled", "main"), ("pickled", "pr"), ("absent", "main"))
        }
    facts._hub_is_reachable.cache_clear()
    assert (
        read["whole", "main"].facts["config"].value == LLAMA
        and read["whole", "main"].facts["config"].origin == "the hub"
    )
    assert facts.missing_files(read["pickled", "main"].files) == ["*.safetensors", "a tokenizer"]
    assert not facts.missing_files(read["pickled", "pr"].files)
    assert read["absent", "main"].problem.startswith("the hub does not give me/absent@main")
    assert not [line for line in requests if "/resolve/" in line and line.endswith(".safetensors")]


def test_the_command_writes_one_table_and_its_exit_status_names_what_failed(root, monkeypatch, capsys):
    monkeypatch.setattr(command, "repository_root", lambda: root)
    broken = recipe(adapter={"kind": "lora", "r": 2, "targets": ["c_attn"]})
    for name, content in (("fits", recipe()), ("broken", broken)):
        with (root / f"recipes/{name}.yaml").open("w") as file:
            YAML().dump(content, file)
    needs = {"setting": "recipe.needs", "source": "one H100, 30 minutes", "place": "5"}
    fits = recipe() | {"recipe": {"source": "s", "needs": "a GPU", "settings": [needs]}}
    two = {"recipe": {"settings": []}, "compute": {"processes": 2}, "students": {"kd": {"dtype": "bfloat16"}}}
    small = {"models": {"small": {"revision": "other"}}, "students": {"kd": {"dtype": "bfloat16"}}}
    with (root / "recipes/fits.yaml").open("w") as file:
        YAML().dump(fits | {"scale": {"two": two, "small": small}}, file)
    command.run_plan("fits")
    assert f"hours: on {command.DEFAULT_GPU} at" in capsys.readouterr().out
    command.run_plan("fits", scale="two")
    printed = capsys.readouterr().out
    assert printed.startswith("\nfits, two: ") and f"hours: on 2 x {command.DEFAULT_GPU} at" in printed
    assert not (root / "recipes/PLAN.md").exists()
    with pytest.raises(SystemExit) as status:
        command.run_plan("all")
    assert status.value.code == 1
    assert capsys.readouterr().err.startswith(
        "failed: broken: students.kd: targets: no linear layer is called `c_attn`"
    )
    rows = [
        line.strip("| ").split(" | ") for line in (root / "recipes/PLAN.md").read_text().splitlines() if line[:1] == "|"
    ]
    assert [(row[0], row[-2]) for row in rows[2:]] == [("broken", "1"), ("fits", "0"), ("fits, two", "0")]
    last = (root / "recipes/PLAN.md").read_text().splitlines()[-1]
    assert last == "fits: the source has one H100, 30 minutes; the trainings here take 0.00 hours on h100-80gb."
    with pytest.raises(UserError, match="gpu: `abacus` is not known; there are: a100-80gb, "):
        command.run_plan("fits", "abacus")
    with pytest.raises(UserError, match="--scale: needs the name of one recipe in place of `all`"):
        command.run_plan("all", scale="two")


def test_the_table_of_all_recipes_has_each_of_them_and_no_failure():
    lines = (tiny.ROOT / "recipes/PLAN.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line[:1] == "|"][2:]
    planned = command.planned_scales(tiny.ROOT)
    assert [row[0] for row in rows] == [f"{name}, {scale}" if scale else name for name, scale in planned]
    assert {name for name, _ in planned} == {path.stem for path in (tiny.ROOT / "recipes").glob("*.yaml")}
    assert ("anon-crisis-llama2", "whole") in planned and ("anon-crisis-llama2", "small") not in planned
    assert {row[-2] for row in rows} == {"0"}
    assert lines[-1].startswith("finnews-bloom: the source has one H100 of 80 GB, about 30 minutes; the trainings here")


def test_a_recipe_of_this_project_fits():
    plan = resolve_recipe(tiny.ROOT, "stepbystep-gpt2")
    assert not plan.failed and count_parameters(plan.models["students.gpt2"].model)[0] == 124_439_808
    assert [(phase.rows, phase.steps) for phase in plan.phases] == [(8445, 1584)] * 4  # 11 % of FinGPT's 76,772
