"""Checkpoints for runtimes other than transformers: what is written, and how far it is from the model."""
