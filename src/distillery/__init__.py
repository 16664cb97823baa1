"""Distillery: turn a large language model into a small one that does one job in one domain."""

__version__ = "0.1.0"
