"""Environment variables under which two runs on one machine agree to the last bit.

They fix thread counts that would follow the load, kernel choices that would follow memory alignment, and hash order. A
sum's rounding still depends on the number of threads, that is, on the machine; set OMP_NUM_THREADS to compare machines.
A value that the user has set stays.
"""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "DISTILLERY_KEEP_CHECKS": "1",  # of the methods that fit a model: one comparison for all stages
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MKL_CBWR": "AUTO",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    "PYTHONHASHSEED": "0",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # what Apple's GPU lacks runs on the CPU
    # warnings of the libraries, with the folders of this machine in them
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning,ignore:IProgress not found",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_environment() -> bool:
    """Set the variables for processes started from here on. Returns whether one of them was missing."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    return bool(missing)


def restart_with_environment() -> None:
    """Start this command anew when a variable is missing: Python and MKL read them only at their own start."""
    if set_environment():
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)
