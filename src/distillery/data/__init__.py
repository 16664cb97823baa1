"""From a file of labelled texts to splits that do not leak into each other."""
