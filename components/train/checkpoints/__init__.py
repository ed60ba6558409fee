"""Checkpoints that survive kills.

store       all checkpoints of a run, on this disk and in S3: whole or absent
record      the record that makes one whole: sizes and SHA-256 of its files
state       its files: adapter, optimiser, and all else that the next step depends on
"""
