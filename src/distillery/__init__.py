"""Distillery: turn a large language model into a small one that does one job in one domain."""

import logging
import os

__version__ = "0.1.0"

# Libraries read these when they are imported, so they stand here; `models.runtime` makes the other settings of a run.
# oneDNN compiles a bfloat16 kernel for every new shape, and one epoch meets more shapes than it stores by default.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # no warning that the module may change: the version is pinned
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel whenever it is imported
