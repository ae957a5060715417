"""What a job does: pretrain, adapt or merge, then measure."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.conversion.averaging import average
from modeling_t5gemma.efficiency.accounting import flops
from modeling_t5gemma.objectives import schedule_from
from modeling_t5gemma.training.teacher import Teacher

from .arms import ARMS, Arm
from .claims import CLAIMS
from .jobs import LARGE, SMALL, Job, Result, Settings, keep
from .measures import classified, held_out_bits
from .models import ATTENTION, convert, decoder_only, grown, layers_of_equal_size, load_decoder_only, load_pair
from .starts import FITTED_ON, fit_keys_and_values, silence
from .text import BOS, EOS, PAD, Text, load
from .training import Adapting, StepLoss, Windows, fit, language_modelling

# Kept for the arms that are means of others.
_KEPT = {name for arm in ARMS.values() for name in arm.of}
# Tuning takes time, so it is left out where no claim is about it.
_TUNED = {name for claim in CLAIMS if claim.measure == "labels" for name in (claim.better, claim.worse)}


def run(job: Job, output: Path, settings: Settings, scratch: Path) -> Result:
    """One job; its result has the bits of each held-out window and which test examples were classified rightly.

    Args:
        scratch: an empty folder that vanishes afterwards.
    """
    text = load(output / "text")
    folder = job.folder(output)
    torch.manual_seed(job.seed)
    if job.arm is None:
        return _pretrain(job, folder, settings, text)
    if job.arm.kind == "merged":
        average([folder / name for name in job.arm.of], [1 / len(job.arm.of)] * len(job.arm.of), scratch / "mean")
        return _measured(load_pair(scratch / "mean"), job, settings, text)
    return _adapt(job, job.arm, folder, settings, text, scratch)


def _pretrain(job: Job, folder: Path, settings: Settings, text: Text) -> Result:
    sizes = settings.sizes
    model = decoder_only(sizes, small=job.name == SMALL)
    windows = Windows(text.train, sizes.batch, job.seed)
    fit(model, language_modelling(model, windows), sizes.pretrain_steps, sizes.pretraining_rate, settings.dtype)
    keep(model, folder / job.name)
    return _measured(model, job, settings, text)


def _adapt(job: Job, arm: Arm, folder: Path, settings: Settings, text: Text, scratch: Path) -> Result:
    sizes = settings.sizes
    # Adaptation goes on where pretraining stopped.
    windows = Windows(text.train, sizes.batch, job.seed, first=sizes.pretrain_steps)
    model = start(arm, folder, text, scratch, job.seed)
    curve: list[dict[str, float]] = []

    def after(step: int) -> None:
        if arm.curve and step % (sizes.adapt_steps // sizes.measures) == 0:
            curve.append(_point(model, text, sizes.held_out // 4, step))

    after(0)
    fit(
        model,
        loss(arm, model, windows, folder, text),
        sizes.adapt_steps,
        sizes.pretraining_rate if arm.fresh else sizes.adapting_rate,
        settings.dtype,
        factors={"cross_attention": arm.cross_rate},
        wait=arm.wait,
        waiting=arm.waiting,
        after=after,
    )
    if job.name in _KEPT:
        keep(model, folder / job.name)
    return {**_measured(model, job, settings, text), "curve": curve}


def start(arm: Arm, folder: Path, text: Text, scratch: Path, seed: int) -> PreTrainedModel:
    """The model that an arm begins with."""
    source = load_decoder_only(folder / LARGE)
    if arm.kind == "single":
        return source
    encoder, decoder = (folder / (SMALL if small else LARGE) for small in (arm.small == "both", arm.small))
    pair = convert(
        encoder,
        decoder,
        scratch / "pair",
        cross_attention=arm.cross_attention,
        encoder_attention=arm.encoder_attention,
        encoder_kv=arm.encoder_kv,
        seed=seed,
    )
    if arm.kind == "grown":
        return grown(source, layers_of_equal_size(pair, source))
    if arm.fresh:
        fresh: PreTrainedModel = type(pair)._from_config(pair.config, attn_implementation=ATTENTION)
        return fresh
    if arm.fitted:
        fit_keys_and_values(pair, source, text.train[:FITTED_ON])
    if arm.silenced:
        silence(pair)
    return pair


def loss(arm: Arm, model: PreTrainedModel, windows: Windows, folder: Path, text: Text) -> StepLoss:
    """What an arm learns from."""
    if arm.kind in ("single", "grown"):
        return language_modelling(model, windows)
    stages = [{"objective": objective, "share": share} for share, objective in arm.stages]
    teacher = None
    if arm.distilled:
        teacher = Teacher(load_decoder_only(folder / LARGE), Layout(PAD, BOS, teacher_begin=BOS))
    schedule = schedule_from(stages, text.sentinels, eos=EOS)
    return Adapting(model, windows, schedule, teacher=teacher, contrast=arm.contrast, hidden_words=arm.hidden_words)


def _point(model: PreTrainedModel, text: Text, windows: int, step: int) -> dict[str, float]:
    bits = held_out_bits(model, text, windows)
    right, wrong = (sum(bits[name]) / windows for name in ("right", "wrong"))
    return {"step": step, "loss": round(right, 4), "use": round(wrong - right, 4)}


def _measured(model: PreTrainedModel, job: Job, settings: Settings, text: Text) -> Result:
    sizes = settings.sizes
    half = sizes.window // 2
    tuned = {"classified": classified(model, text, sizes, job.seed, settings.dtype)} if job.name in _TUNED else {}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": flops(model.config, half, half).total,
        **held_out_bits(model, text),
        **tuned,
    }
