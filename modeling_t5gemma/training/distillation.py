"""PrefixLM with knowledge distillation from the decoder-only original, the plain loop.

"Encoder-Decoder Gemma" (arXiv 2504.06225), section 3: the teacher reads the whole window, and its distributions at the
target positions are the soft labels. Temperature and learning rate are not stated there; the temperature is 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .checkpoint import load_state, save_state
from .heads import Head, distillation_backward
from .precision import Precision
from .prefix_lm import PrefixLM
from .windows import Windows

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class DistillationSettings:
    """What a run does.

    Attributes:
        steps: optimizer steps.
        batch_size: windows a step.
        learning_rate: the peak, reached after ``warmup_steps`` and lowered by a cosine to a tenth of itself.
        clip: the largest norm of the whole gradient.
        seed: decides the order of the windows.
        tokens_of_logits: how many tokens' logits exist at once.
        save_every: steps between two states on disk.
    """

    steps: int = 46
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 4
    clip: float = 1.0
    seed: int = 0
    tokens_of_logits: int = 64
    save_every: int = 10


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Windows,
    layout: PrefixLM,
    settings: DistillationSettings,
    precision: Precision,
    output: Path,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train ``student`` in place, all of it but its embeddings.

    A run that was interrupted goes on from its last state; on one machine it then ends with the very bits of a run
    that was not.

    Args:
        student: an encoder-decoder with float32 weights.
        teacher: the decoder-only original, on the same device.
        windows: what to train on.
        output: the folder of ``METRICS_FILE`` (a JSON object a step: step, loss in nats a target token, learning_rate,
            gradient_norm, seconds) and ``STATE_FILE``.
        on_step: called with each step's metrics.

    Raises:
        ValueError: ``output`` holds the state of a run with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    _freeze_embeddings(student)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run = {**asdict(settings), **asdict(layout), "dtype": str(precision.dtype), "windows": windows.digest()}
    first = load_state(output / STATE_FILE, student, optimizer, run)
    _forget_metrics(output / METRICS_FILE, first)

    heads = Head.of(student, precision.dtype), Head.of(teacher, precision.dtype)
    student.train()
    teacher.eval()
    for step in range(first, settings.steps):
        begin = time.perf_counter()
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = windows[batch_of_step(step, len(windows), settings)].to(student.device)
        student_hidden, teacher_hidden = _hidden_states(student, teacher, batch, layout, precision)
        loss = distillation_backward(student_hidden, heads[0], teacher_hidden, heads[1], settings.tokens_of_logits)
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {
            "step": step,
            "loss": loss.item(),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "seconds": time.perf_counter() - begin,
        }
        with (output / METRICS_FILE).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        on_step(metrics)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            save_state(output / STATE_FILE, step + 1, student, optimizer, run)
    student.eval()


def learning_rate(step: int, settings: DistillationSettings) -> float:
    """Linear warm-up to the peak, then a cosine that ends at a tenth of it."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    return settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def batch_of_step(step: int, count: int, settings: DistillationSettings) -> torch.Tensor:
    """Which of ``count`` windows step ``step`` trains on, int64 (batch,).

    Every epoch is a permutation of its own, a function of seed and epoch alone, so a resumed run needs no replay.
    """
    places = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    orders = {epoch: _order(settings.seed, epoch, count) for epoch in (places // count).unique().tolist()}
    return torch.stack([orders[place // count][place % count] for place in places.tolist()])


def _order(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _hidden_states(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Windows, layout: PrefixLM, precision: Precision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of both models at the positions that predict the target, (tokens, width) each."""
    source, target = layout.student_inputs(batch)
    with precision.autocast(student.device):
        with torch.no_grad():
            taught = teacher.base_model(input_ids=layout.teacher_inputs(batch), use_cache=False).last_hidden_state
        learnt = student.base_model(input_ids=source, decoder_input_ids=target, use_cache=False).last_hidden_state
    return learnt.flatten(0, 1), taught[:, -target.shape[1] :].flatten(0, 1)


def _freeze_embeddings(student: PreTrainedModel) -> None:
    """A few thousand steps see a small part of the vocabulary; the head is tied to the decoder's embeddings."""
    for name, weight in student.named_parameters():
        weight.requires_grad_("embed_tokens" not in name and "lm_head" not in name)


def _forget_metrics(path: Path, first: int) -> None:
    """Drop the lines of steps that the state on disk does not know."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first]
        path.write_text("".join(line + "\n" for line in lines))
