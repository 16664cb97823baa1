"""Many rows in one sequence without padding.

The tokens that all prompts begin with stand there once. Each row's own tokens and each completion's tokens follow as
branches that attend to their own ancestors only. The output head runs at the positions of predicted tokens alone.
"""
