"""Hydra YAML: one folder a config group, experiments on top."""
