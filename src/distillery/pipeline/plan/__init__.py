"""Check a recipe at full scale without its weights, and count what it would take."""
