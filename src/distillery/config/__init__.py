"""The experiment in `params.yaml`: its schema, the loading of the file, and its checks."""
