"""Evaluation: what came out, and what it takes to believe it. Nothing here trains or writes reports."""
