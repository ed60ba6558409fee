"""The pipeline, its compiler, the command `tune16` and the recipes."""
