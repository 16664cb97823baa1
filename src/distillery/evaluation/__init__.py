"""Evaluation: scores of the trained models, and the checks that make them trustworthy. Trains and reports nothing."""
