"""One process of a distributed run, or the only one: python -m tests.training.worker KIND OUTPUT STEPS BATCH.

KIND is "trainer" (DDP where there are several processes) or "fsdp". Rank 0 prints the losses as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling_t5gemma.collators import Layout, collate, collate_for_teacher
from modeling_t5gemma.losses import IGNORED
from modeling_t5gemma.objectives import PrefixLM, Schedule
from modeling_t5gemma.training.documents import Pieces
from modeling_t5gemma.training.mixture import Samples, Source
from modeling_t5gemma.training.parts import freeze
from modeling_t5gemma.training.rows import Rows
from modeling_t5gemma.training.teacher import Teacher, shard
from tests import tiny
from tests.training.test_trainer import losses, make, text

LAYOUT = Layout(0, 2, 2, 2)


def models():
    torch.manual_seed(0)
    source = tiny.gemma3()
    return tiny.layerwise(source, bidirectional_layers="all"), source


def with_trainer(output: Path, steps: int, batch: int) -> list[float]:
    student, source = models()
    trainer = make(output, student, teacher=source, steps=steps, batch=batch, held_out=0, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    return losses(trainer)


def with_fsdp(steps: int, batch: int) -> list[float]:
    """What the trainer does under FSDP2, which accelerate offers on accelerators only."""
    from torch.distributed.fsdp import fully_shard

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    student, source = models()
    teacher = Teacher(source, LAYOUT)
    freeze(student, ())
    student.train()
    if world > 1:
        for layer in (*student.model.encoder.layers, *student.model.decoder.layers):
            fully_shard(layer)
        fully_shard(student)
        shard(teacher)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    samples = Samples([Source("text", Pieces(text(), 16, 6), 1.0)], Schedule(((1.0, PrefixLM()),)), 3, block=16)
    found = []
    for _, rows in zip(range(steps), Rows(samples, None, batch, world, rank)):
        inputs = collate(rows.rows, LAYOUT, None)
        target = teacher.target(collate_for_teacher(rows.rows, LAYOUT, packed=False))
        count = (inputs["labels"] != IGNORED).sum()
        if world > 1:
            dist.all_reduce(count)
        loss = student(**inputs, target=target, use_cache=False, num_items_in_batch=count).loss
        (loss * world).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        found.append(loss.item())
    return found


def main() -> None:
    kind, output, steps, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if kind == "fsdp":
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo")
        found = with_fsdp(steps, batch)
    else:
        found = with_trainer(output, steps, batch)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("LOSSES", json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
    # Gloo's threads now and then abort an interpreter that ends in its own time.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
