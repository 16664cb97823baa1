"""Tasks: what is predicted, the prompts that ask for it, and how answers are parsed."""
