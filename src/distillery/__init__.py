"""Distillery: turn a large language model into a small one that does one job in one domain."""

import logging

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel whenever it is imported
