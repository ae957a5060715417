"""Group relative policy optimisation: from rewards to advantages, and from log-probabilities to a loss.

GRPO is of arXiv 2402.03300; some ways of clipping and weighting are DAPO's (arXiv 2503.14476) and Dr. GRPO's (arXiv
2503.20783).

Shapes: N completions, group by group; G completions of one prompt; T tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .settings import PolicyLossType, ScaleRewards

# Keeps an advantage finite where all rewards are the same; TRL's value.
SMALL = 1e-4


def advantages(rewards: torch.Tensor, group: int, scale: ScaleRewards) -> torch.Tensor:
    """Rewards less the mean of their group, float64 (N,).

    Args:
        rewards: (N,), of one whole step.
        group: G.
        scale: what they are divided by: "group", the group's standard deviation (arXiv 2402.03300, section 4.1.2);
            "batch", that of all N; "none", nothing, as the standard deviation favours prompts that are nearly always
            or nearly never answered well (arXiv 2503.20783, section 3.1). Deviations are those of a sample (divided by
            its size less 1), as in TRL.
    """
    grouped = rewards.double().view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (deviations(rewards, group)[:, None] + SMALL)
    elif scale == "batch":
        centred = centred / (grouped.flatten().std() + SMALL)
    return centred.flatten()


def deviations(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """The standard deviation of each group, float64 (N / G,)."""
    return rewards.double().view(-1, group).std(dim=1)


def token_weights(
    mask: torch.Tensor,
    loss_type: PolicyLossType,
    *,
    completions: int,
    tokens: torch.Tensor | int,
    max_completion_length: int,
) -> torch.Tensor:
    """What each token counts in the loss, float32 (N, T); the loss of a step is the weighted sum over all its
    micro-batches and ranks.

    Args:
        mask: bool (N, T), the tokens of this micro-batch that are trained on.
        loss_type: "grpo", the mean over completions of each one's mean over its tokens, so that a token of a long one
            counts less; "bnpo", the mean over the tokens of the micro-batch, and of micro-batches; "dr_grpo", the sum
            over tokens by the completions and ``max_completion_length``, which no completion's length changes; "dapo",
            the mean over all tokens of the step.
        completions: of the whole step.
        tokens: of the whole step that are trained on.
    """
    weights = mask.float()
    if loss_type == "grpo":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1) / completions
    if loss_type == "bnpo":
        return weights / weights.sum().clamp(min=1) * (len(mask) / completions)
    if loss_type == "dr_grpo":
        return weights / (completions * max_completion_length)
    return weights / torch.as_tensor(tokens, device=weights.device).clamp(min=1)


@dataclass(frozen=True, eq=False)
class PolicyTerms:
    """Of each token, float32 (N, T).

    Attributes:
        loss: with a graph.
        kl: the estimate of the divergence from the reference, or None.
        low, high: 1 where the ratio was clipped from below (a bad answer already is less likely by enough) or above.
    """

    loss: torch.Tensor
    kl: torch.Tensor | None
    low: torch.Tensor
    high: torch.Tensor


def policy_terms(
    logps: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float,
) -> PolicyTerms:
    """The clipped objective (arXiv 2402.03300, equation 3), negated.

    Args:
        logps, old, reference: (N, T), of each token under the model, under the one that sampled it, and under the
            reference; 0 where there is no token.
        advantages: (N,).
        epsilon, epsilon_high: how far the ratio of probabilities may move below and above 1 (arXiv 2503.14476,
            section 3.1).
        beta: weight of KL(model || reference), estimated by r - log r - 1 with r = reference / model, which has no
            bias and is never negative (arXiv 2402.03300, equation 4).
    """
    gain = advantages.to(logps.dtype)[:, None]
    ratio = (logps - old).exp()
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon_high) * gain)
    kl = None
    if reference is not None:
        difference = reference - logps
        kl = difference.exp() - difference - 1
        loss = loss + beta * kl
    low, high = (ratio < 1 - epsilon) & (gain < 0), (ratio > 1 + epsilon_high) & (gain > 0)
    return PolicyTerms(loss, None if kl is None else kl.detach(), low.to(loss.dtype), high.to(loss.dtype))
