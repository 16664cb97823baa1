"""Tasks: what is predicted, the prompts for it, and the parsing of answers."""
