"""A small model, text and task that need no download: `make run` takes them through the real pipeline."""
