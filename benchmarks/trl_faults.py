"""TRL's faults: what its trainers give and what Distillery gives, on the same tiny models.

    PYTHONPATH=src python benchmarks/trl_faults.py

Prints a markdown table. It runs what the tests run (`tests/faults.py`), which fail where Distillery has a fault, too.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny
from faults import CASES, DISTILLATION_TRAINER


def shown(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def main() -> None:
    print(
        f"TRL {version('trl')}. Rows without a number are further faults. DistillationTrainer trains on-policy only: "
        "where it has no figure, the case does not arise.\n"
    )
    print("| fault | test in `tests/test_faults.py` | figures | GKDTrainer | DistillationTrainer | Distillery |")
    print("|---|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        tiny.build_models(Path(scratch))
        for k, case in enumerate(CASES):
            of_trl, of_distillery = case.measure(Path(scratch), Path(scratch) / f"{k}")
            name = f"`test_trl_fault_{case.name}`"
            newer = DISTILLATION_TRAINER.get(case.name)
            of_newer = shown(newer(Path(scratch) / f"{k}")) if newer else "-"
            figures = f"{shown(of_trl)} | {of_newer} | {shown(of_distillery)}"
            print(f"| {case.number or '-'} | {name} | {case.shown} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
