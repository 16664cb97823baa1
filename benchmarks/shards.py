"""The memory of two processes that train together: each holds the whole model (`ddp`), or a half of it (`fsdp`).

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/shards.py [classifier] [causal] [whole]

The students of `processes.py`, float32, two processes of one thread: `whole` trains all weights of SmolLM2's first
six layers, on which shards save most. Prints for each what a process holds of weights, gradients and optimizer states
before the last step, the largest memory of a process, the seconds of a step (the median), and the largest relative
difference of the loss of a step.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from processes import STUDENTS, measure

STRATEGIES = ("ddp", "fsdp")


def main() -> None:
    """Measure the students, `whole` by default, and print the table."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    table = []
    for kind in sys.argv[1:] or ["whole"]:
        if kind not in STUDENTS:
            sys.exit(f"no student `{kind}`; there are: {', '.join(STUDENTS)}")
        with tempfile.TemporaryDirectory() as scratch:
            measure(kind, "float32", 1, Path(scratch) / "teacher")  # it computes the outputs of the teacher
            results = {name: measure(kind, "float32", 2, Path(scratch) / name, strategy=name) for name in STRATEGIES}
        losses = {name: np.array(result["loss"]) for name, result in results.items()}
        for name, result in results.items():
            held = [f"{held / 2**20:.0f} of {whole / 2**20:.0f}" for held, whole in result["held"]]
            table.append(
                {
                    "student": kind,
                    "strategy": name,
                    **dict(zip(("MB, weights", "gradients", "states"), held, strict=True)),
                    "MB, each of two": f"{result['memory']:.0f}",
                    "s a step": f"{median(result['s']):.3f}",
                    "loss, relative": f"{np.abs(losses[name] / losses['ddp'] - 1).max():.1e}",
                }
            )
    print(f"threads of a process: {torch.get_num_threads()}")
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
