"""Check a recipe without its weights, and count what it would take."""
