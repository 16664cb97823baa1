"""Distillery: turn a large language model into a small one that does one job in one domain."""

import logging
import os

__version__ = "0.1.0"

# oneDNN keeps the bfloat16 kernels that it compiles for every new shape: by default fewer than one epoch meets
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the version is pinned
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel whenever it is imported
