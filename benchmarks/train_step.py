"""One adaptation step, ours beside stock transformers: memory and time.

    python benchmarks/train_step.py --repeats 3

PrefixLM with distillation from a decoder-only teacher, 256 + 256 tokens, batch 4, vocabulary 256,000: student of the
released s-s shape, teacher of Gemma 2's architecture in the shape of its stack, random weights, forward and backward
pass and an AdamW step. Stock: transformers' T5Gemma (eager attention, its only backend), logits of student and teacher
at once, forward KL. Ours: the same computation by the trainer's parts. Both are first checked to have one loss. Times
are medians of interleaved steps in one process. Memory is the peak of anonymous memory (RssAnon) in a step above what
there was before it, after a first step has made gradients and optimizer states, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes

MEMORY_TARGET = 0.25
TIME_TARGETS = {"float32": 0.9, "bfloat16": 0.7}


class Step:
    """A student, a teacher and one batch.

    Args:
        way: "stock" or "ours".
        dtype: of the weights of both models.
    """

    def __init__(self, way: str, preset: str, dtype: torch.dtype, half: int, batch: int) -> None:
        import modeling_t5gemma as m
        from modeling_t5gemma.collators import Layout
        from modeling_t5gemma.training.evaluation import HeldOutPair
        from modeling_t5gemma.training.teacher import Teacher

        self.way = way
        config = m.T5GemmaConfig.from_preset(f"{preset}-{preset}")
        if way == "ours":
            make: Any = m.T5GemmaForConditionalGeneration
        else:
            from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig
            from transformers.models.t5gemma.modeling_t5gemma import T5GemmaForConditionalGeneration as make

            config = T5GemmaConfig(encoder=config.encoder.to_dict(), decoder=config.decoder.to_dict())
        kwargs = {"attn_implementation": "eager"} if way == "stock" else {}
        self.student = with_common_weights(make._from_config(config, **kwargs)).to(dtype).train()
        self.layout = Layout(pad=0, start=2, teacher_begin=2)
        self.teacher = Teacher(decoder_only(config.decoder).to(dtype), self.layout)
        generator = np.random.default_rng(0)
        ids = generator.integers(3, config.decoder.vocab_size, (batch, 2 * half))
        self.rows = [[HeldOutPair(row[:half], row[half:])] for row in ids]
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)

    def loss(self) -> torch.Tensor:
        from modeling_t5gemma.collators import collate, collate_for_teacher

        inputs = collate(self.rows, self.layout, None)
        taught = collate_for_teacher(self.rows, self.layout, packed=False)
        if self.way == "ours":
            return self.student(**inputs, target=self.teacher.target(taught), use_cache=False).loss
        places = taught.pop("places")
        with torch.no_grad():
            expected = self.teacher.model(**taught, use_cache=False).logits.flatten(0, 1)[places].float()
        labels = inputs.pop("labels")
        found = self.student(**inputs, use_cache=False).logits[labels != -100].float()
        return F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.item()


@torch.no_grad()
def with_common_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that follow from their names, which both packages share."""
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return model


def decoder_only(stack: Any) -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")  # fmt: skip
    torch.manual_seed(1)
    return Gemma2ForCausalLM._from_config(
        Gemma2Config(**{name: getattr(stack, name) for name in names}), attn_implementation="eager"
    )


def extra_memory_here(arguments: tuple, threads: int) -> int:
    torch.set_num_threads(threads)
    step = Step(*arguments)
    step()
    return peak_bytes(step)


def verdict(value: float, target: float) -> str:
    return f"{value:6.3f} (at most {target:.2f}: {'met' if value <= target else 'MISSED'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--half", type=int, default=256, help="tokens of source and of target")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(TIME_TARGETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.dtypes:
        rest = (given.preset, getattr(torch, name), given.half, given.batch)
        steps = {way: Step(way, *rest) for way in ("stock", "ours")}
        losses = {way: step() for way, step in steps.items()}
        difference = abs(losses["stock"] - losses["ours"]) / abs(losses["stock"])
        assert difference < {"float32": 1e-4, "bfloat16": 0.02}[name], losses
        measured: dict[str, list[float]] = {way: [] for way in steps}
        for _ in range(given.repeats):
            for way, step in steps.items():
                begin = time.perf_counter()
                step()
                measured[way].append(time.perf_counter() - begin)
        seconds = {way: statistics.median(values) for way, values in measured.items()}
        del steps, step
        memory = {
            way: in_own_process(extra_memory_here, (way, *rest), given.threads, for_memory=True) for way in seconds
        }
        print(f"\n{given.preset}-{given.preset}, {name}, batch {given.batch} of {given.half} + {given.half} tokens")
        for way in seconds:
            print(f"  {way:6}{seconds[way]:8.2f} s a step{memory[way] / 2**20:8.0f} MiB extra, loss {losses[way]:.5f}")
        print(f"  extra memory of stock {verdict(memory['ours'] / memory['stock'], MEMORY_TARGET)}")
        print(f"  time of stock         {verdict(seconds['ours'] / seconds['stock'], TIME_TARGETS[name])}", flush=True)


if __name__ == "__main__":
    main()
