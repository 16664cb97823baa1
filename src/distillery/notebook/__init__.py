"""What the notebooks share: the style of tables and plots, figures, and sentences that are computed from results.

One module a notebook, so that a new sentence in one notebook makes no other stage run again. A sentence is a pure
function: facts in, text out. Other facts can give the opposite sentence.
"""
