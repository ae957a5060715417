"""Adapting a converted model: token windows, the distillation loop, held-out losses."""
