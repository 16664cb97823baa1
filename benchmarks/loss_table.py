"""Every loss term beside an independent reference: formula, space, source, and the largest error seen.

    PYTHONPATH=src python benchmarks/loss_table.py [random cases per term, 1000 by default]

Prints a markdown table. Errors are |Distillery - reference| / max(1, |reference|), the reference always in float64.
The references are those of the tests (`tests/references.py`); the tests fail above 1e-9 in float64.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from references import CHECKS, largest_error


def main(cases: int = 1000) -> None:
    print(f"Largest error over {cases} random cases a term, torch {torch.__version__}.\n")
    print("| term | formula | space | source | reference | float64 | float32 |")
    print("|---|---|---|---|---|---|---|")
    for check in CHECKS:
        errors = [largest_error(check, cases, dtype) for dtype in (torch.float64, torch.float32)]
        cells = [f"`{check.term}`", check.formula, check.space, check.source, check.reference]
        cells = [cell.replace("|", "\\|") for cell in cells] + [f"{error:.1e}" for error in errors]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
