"""The model that a run began as, which preferences and rewards are weighed against: a second model, or the trained one
without its adapter. And the log-probabilities that both are compared by.

Shapes: R sources, G answers to each, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UserError


def log_probabilities(model: nn.Module, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """Of each label, float32 (R * G, T), 0 where ignored. There are no logits, and each source is encoded once.

    Args:
        model: the encoder-decoder, wrapped or not; only its forward is called.
        batch: of ``collate_answers``.
        temperature: divides the logits.
    """
    losses: torch.Tensor = model(
        **batch, use_cache=False, return_token_losses=True, temperature=temperature
    ).token_losses
    return -losses


class Reference:
    """Log-probabilities under the model that a run began as.

    Args:
        policy: what is trained.
        loaded: a frozen model; None for the policy without its adapter.

    Raises:
        UserError: there is neither.
    """

    def __init__(self, policy: nn.Module, loaded: nn.Module | None) -> None:
        if loaded is None and not hasattr(policy, "disable_adapter"):
            raise UserError(
                "Without LoRA there is no adapter to switch off for the reference: precompute its log-probabilities, "
                "or load a second model."
            )
        self.policy = policy
        self.loaded = None if loaded is None else loaded.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
        """As ``log_probabilities``, without a graph; ``model`` is the policy, wrapped as it is trained."""
        if self.loaded is not None:
            return log_probabilities(self.loaded, batch, temperature)
        with without_adapter(self.policy), evaluating(model):
            return log_probabilities(model, batch, temperature)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as its base. peft would make every adapter trainable afterwards, frozen ones too."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def shard_reference(model: nn.Module) -> None:
    """Spread its layers over all ranks (FSDP2); embeddings, norms and head stay whole."""
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(model, "_no_split_modules", ()))
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module)
