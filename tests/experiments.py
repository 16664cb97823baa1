"""A small valid `params.yaml` for tests of its schema and checks, and changes of it."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from distillery.config.load import load_params
from distillery.config.schema import Params

BASE = """
seeds: [0]
data:
  news: {source: news.csv, task: mood, split: {train: 0.2, pool: 0.4, validation: 0.1, test: 0.3}}
  bare: {source: bare.csv, task: mood, split: {train: 0.5, validation: 0.25, test: 0.25}}
  other: {source: other.csv, task: topic, split: {train: 0.5, validation: 0.25, test: 0.25}}
models:
  llm: {wheel: a-b==1.0, sha256: "%s", gguf: a/b.gguf}
  encoder: {folder: models/encoder}
teachers:
  llm:
    {kind: lm, model: llm, data: [news, bare], finetune: {on: news/train, epochs: 2, learning_rate: 1e-3, lora: {r: 4}}}
  encoder: {kind: classifier, model: encoder, data: [news], finetune: {on: news/train, steps: 9, learning_rate: 1.0e-4}}
augment: {source: news, teacher: llm}
students:
  kd:
    model: encoder
    arch: classifier
    control: gold
    init: {layers: [0, 2]}
    phases:
      - {data: [news/pool, news/augmented], teachers: [llm], loss: {kl: 1.0}, epochs: 1, learning_rate: 1.0e-4}
      - {data: [news/train], teachers: [llm], loss: {ce: 0.5, kl: 0.5}, steps: 3, learning_rate: 1.0e-4}
  gold:
    model: encoder
    arch: classifier
    phases: [{data: [news/train], loss: {ce: 1.0}, steps: 4, learning_rate: 1.0e-4}]
evaluate: {headline: kd}
""" % ("0f" * 32)
DELETE = object()


def prepare(folder: Path) -> Path:
    """`folder` with the task files that BASE names."""
    (folder / "tasks").mkdir()
    for task in ("mood", "topic"):
        (folder / "tasks" / f"{task}.yaml").write_text("kind: classification\nlabels: {a: one, b: two}\n")
    (folder / "dvc.yaml").touch()
    return folder


def changed(key: str, value):
    """BASE as plain objects with the value at the dotted `key` replaced."""
    raw = YAML(typ="safe", pure=True).load(BASE)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = raw
    for part in path:
        node = node[part]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return raw


def load(folder: Path, raw) -> Params:
    path = folder / "params.yaml"
    with open(path, "w") as file:
        YAML().dump(raw, file)  # the safe one sorts keys
    return load_params(path)
