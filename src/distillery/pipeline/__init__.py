"""What `dvc.yaml` calls. Nothing imports it."""
