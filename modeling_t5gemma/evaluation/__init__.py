"""Checkpoints of both kinds on benchmarks by one tool, EleutherAI's lm-evaluation-harness."""
