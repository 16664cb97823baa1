"""Every model and data set that a recipe names, from a hub that has tiny ones under these names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hub
import tiny
from distillery.config.schema import SourceConfig

TYPES = {  # the architectures behind the hub ids that the recipes name
    "meta-llama/Llama-2-7b-hf": "llama",
    "meta-llama/Llama-2-13b-hf": "llama",
    "Orkhan/llama-2-7b-absa": "llama",
    "bigscience/bloom-1b1": "bloom",
    "ProsusAI/finbert": "bert",
    "google-bert/bert-base-uncased": "bert",
    "FacebookAI/roberta-base": "roberta",
    "distilbert/distilbert-base-uncased": "distilbert",
    "albert/albert-base-v2": "albert",
    "google/flan-t5-small": "t5",
    "google/flan-t5-base": "t5",
    "google/flan-t5-large": "t5",
    "google/flan-t5-xl": "t5",
    "google-t5/t5-small": "t5",
    "google-t5/t5-large": "t5",
    "facebook/opt-13b": "opt",
    "facebook/opt-1.3b": "opt",
    "openai-community/gpt2-xl": "gpt2",
    "openai-community/gpt2": "gpt2",
}
CONVERTED = {  # repositories without safetensors at `main`, and the revision that has some
    "ProsusAI/finbert": "refs/pr/8",
    "facebook/opt-1.3b": "refs/pr/25",
    "facebook/opt-13b": "refs/pr/28",
}
SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "distilbert": {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "albert": {"embedding_size": 8},
}
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def model_files(kind: str, folder: Path) -> dict[str, bytes]:
    """The files of a tiny model of this architecture."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    encoder = kind in ("bert", "roberta", "distilbert", "albert")
    tokenizer = tiny.word_tokenizer(["profit rose and fell"], "bert" if encoder else "llama")
    shape = SHAPES.get(kind, {}) if kind in SHAPES and kind != "albert" else SHAPE | SHAPES.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    torch.manual_seed(0)
    auto = AutoModel if encoder else AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hub.folder(folder)


def model_repo(name: str, files: dict[str, bytes]) -> hub.Repo:
    """The repository `name` with the model's `files`, which some have at another revision than `main`."""
    if name not in CONVERTED:
        return hub.Repo(files)
    pickled = {path: content for path, content in files.items() if not path.endswith(".safetensors")}
    return hub.Repo(pickled, others=(hub.Repo(files, branches=(CONVERTED[name],)),))


def tables() -> dict[str, hub.Repo]:
    """The public data sets that the recipes name, a few rows each, in the columns they have."""
    words = ["profit", "sales", "margin", "orders", "costs", "output"]
    many = [f"{a} of the {b} business in quarter {i}" for i, (a, b) in enumerate((a, b) for a in words for b in words)]

    def parts(rows: list[dict], labels: dict | None = None, under: str = "data", names=("train", "validation", "test")):
        return {f"{under}/{name}-00000-of-00001.parquet": hub.parquet(rows, labels) for name in names}

    def configs(name: str, splits: tuple[str, ...]) -> dict[str, bytes]:
        files = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        return {"README.md": f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n".encode()}

    three = ("train", "validation", "test")
    fpb = [{"sentence": text, "label": i % 3} for i, text in enumerate(many)]
    news = [{"headline": text} for text in many]
    tweets = [{"text": text, "label": i % 3} for i, text in enumerate(many)]
    fingpt = [{"input": text, "output": "positive", "instruction": "What is the sentiment?"} for text in many]
    grande = [
        {"sentence": f"the _ of {t}", "option1": "a", "option2": "b", "answer": str(1 + i % 2)}
        for i, t in enumerate(many)
    ]
    siqa = [
        {"context": t, "question": "why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": str(1 + i % 3)}
        for i, t in enumerate(many)
    ]
    aqua = [
        {
            "question": t,
            "options": [f"{x}){n}" for n, x in enumerate("ABCDE")],
            "rationale": "so",
            "correct": "ABCDE"[i % 5],
        }
        for i, t in enumerate(many)
    ]
    trivia = [
        {"question": t, "question_id": f"q{i}", "answer": {"value": f"V{i}", "aliases": [f"V{i}", "W"], "type": "x"}}
        for i, t in enumerate(many)
    ]
    return {
        "datasets/atrost/financial_phrasebank": hub.Repo(parts(fpb, {"label": ["negative", "neutral", "positive"]})),
        "datasets/ashraq/financial-news": hub.Repo(parts(news, names=("train",))),
        "datasets/zeroshot/twitter-financial-news-sentiment": hub.Repo(parts(tweets, names=("train", "validation"))),
        "datasets/FinGPT/fingpt-sentiment-train": hub.Repo(parts(fingpt, names=("train",))),
        "datasets/allenai/winogrande": hub.Repo(parts(grande, under="winogrande_xl") | configs("winogrande_xl", three)),
        "datasets/lighteval/siqa": hub.Repo(parts(siqa, names=("train", "validation"))),
        "datasets/deepmind/aqua_rat": hub.Repo(parts(aqua, under="raw") | configs("raw", three)),
        "datasets/mandarjoshi/trivia_qa": hub.Repo(
            parts(trivia, under="rc.nocontext") | configs("rc.nocontext", three)
        ),
    }


def few(source: SourceConfig) -> dict[str, Any]:
    """A recipe's source for tables of 36 rows: the shares of its splits are made for many thousand."""
    spec = source.model_dump(exclude_unset=True) | {"hub_split": "train", "near_duplicate": 1.0}
    if source.splits:
        own = {part: text.partition("[")[0] for part, text in spec["splits"].items()}
        cut = {"train": "[:18]", "pool": "[18:24]", "validation": "[24:30]", "test": "[30:]"}
        spec["splits"] = {part: text + cut[part] for part, text in own.items()}
    return spec


def test_every_model_and_table_that_a_recipe_names_resolves(tmp_path):
    """By its id, at its revision, as the right class, with the columns, splits and configurations that are named."""
    from distillery.config.load import validate_section
    from distillery.config.schema import Params
    from distillery.pipeline.recipe import load_recipe

    repos, jobs, arch = tables(), {}, {"lm": "causal", "classifier": "classifier", "seq2seq": "seq2seq"}
    files = {kind: model_files(kind, tmp_path / kind) for kind in sorted(set(TYPES.values()))}
    repos |= {name: model_repo(name, files[kind]) for name, kind in TYPES.items()}
    for path in sorted((tiny.ROOT / "recipes").glob("*.yaml")):
        params = validate_section(Params, load_recipe(tiny.ROOT, path.stem), path.name)
        used = {teacher.model: arch[teacher.kind] for teacher in params.teachers.values() if teacher.model}
        used |= {student.model: student.arch for student in params.students.values()}
        for model, model_arch in used.items():
            if params.models[model].hub:
                job = ("model", model, params.models[model].model_dump(), {"arch": model_arch})
                jobs.setdefault((params.models[model].hub, model_arch), job)
        for name, source in params.data.items():
            if source.source.startswith("hub:"):
                jobs.setdefault((source.source, ""), ("data", name, few(source), None))
    with hub.serving(repos) as (url, _):
        results = dict(zip(jobs, hub.fetch(url, tmp_path, list(jobs.values())), strict=True))
    errors = {key: result["error"] for key, result in results.items() if "error" in result}
    assert not errors
    assert {name for name, model_arch in results if model_arch} == set(TYPES)
    class_endings = {
        "causal": ("CausalLM", "LMHeadModel"),
        "classifier": ("SequenceClassification",),
        "seq2seq": ("Generation",),
    }
    for (name, model_arch), result in results.items():
        if model_arch:
            assert result["class"].lower().startswith(TYPES[name]), name
            assert result["class"].endswith(class_endings[model_arch]), name
        else:
            assert result["rows"]["pool" if "ashraq" in name or "fingpt" in name else "train"] > 0


NOTEBOOK = """
import json, sys
import matplotlib
matplotlib.use("agg")
cells = json.load(open("notebooks/01_data.ipynb"))["cells"]
for name in json.loads(sys.stdin.read()):
    variables = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), variables)
            variables["source"] = name
"""


def test_the_data_notebook_shows_every_table_of_the_recipes(tmp_path):
    """With the hub's own splits, without labels, with options, with written answers; each in its last cell's files."""
    from distillery.config.load import validate_section
    from distillery.config.schema import Params
    from distillery.files import read_yaml
    from distillery.pipeline.recipe import load_recipe

    repo, data = tiny.experiment(tmp_path / "repo"), {}
    raw = read_yaml(repo / "params.yaml")
    for teacher in raw["teachers"].values():
        teacher["data"] = ["finance"]
    for path in sorted((tiny.ROOT / "recipes").glob("*.yaml")):
        params = validate_section(Params, load_recipe(tiny.ROOT, path.stem), path.name)
        for name, source in params.data.items():
            if source.source.startswith("hub:"):
                data[f"{path.stem}-{name}"] = few(source)
    (repo / "params.yaml").write_text(json.dumps(raw | {"data": raw["data"] | data}))  # JSON is YAML
    with hub.serving(tables()) as (url, _):
        hub.run_with_hub(url, tmp_path, NOTEBOOK, list(data), repo)
    kinds = {(source["task"], "splits" in source) for source in data.values()}
    assert len(kinds) >= 5 and any(source["columns"].get("label", "") is None for source in data.values())
    for name in data:
        assert (repo / f"data/processed/{name}/audit.json").exists(), name
