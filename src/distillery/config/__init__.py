"""The experiment in `params.yaml`: its schema, how it is read, and what is checked."""
