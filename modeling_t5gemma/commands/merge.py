"""``t5gemma merge``: an adapter into its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from modeling_t5gemma.inference.adapters import load_adapter, read_base
from modeling_t5gemma.io.checkpoints import read_generation_config
from modeling_t5gemma.io.staging import check_apart, check_output, staged
from modeling_t5gemma.io.tensors import check_finite_model
from modeling_t5gemma.post_training.adapters import merge_adapter
from modeling_t5gemma.training.loading import load_whole
from modeling_t5gemma.training.papers import copy_papers, papers_of_run
from modeling_t5gemma.training.tokenizing import load_tokenizer


def merge(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA run, or of one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[str | None, typer.Option(help="The model that it was trained on, if not where it says.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Add a LoRA adapter to the weights of its base: a checkpoint like the base's, which needs no peft."""
    check_output(output, overwrite=overwrite)
    path = base or read_base(adapter)["path"]
    check_apart(output, [adapter, Path(path)])
    disable_progress_bar()
    model = merge_adapter(load_adapter(load_whole(path, dtype="auto"), adapter))
    tokenizer = load_tokenizer(str(adapter if (adapter / "tokenizer_config.json").is_file() else path))
    if generation := read_generation_config(adapter):  # with the ends of an answer that it was trained to
        model.generation_config = GenerationConfig.from_dict(generation)
    check_finite_model(model, output)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with staged(output, overwrite=overwrite, needed=size) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_papers(path, folder)
        for file in papers_of_run(adapter):
            shutil.copyfile(file, folder / file.name)
    typer.echo(f"{output}: {path} with {adapter} merged into it.")
