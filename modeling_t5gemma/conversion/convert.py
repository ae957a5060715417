"""A conversion from end to end: sources, target, plan, then the checkpoint, in a folder that appears whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_t5gemma.conversion.documents import write_documents
from modeling_t5gemma.conversion.options import DTYPES, ConversionOptions
from modeling_t5gemma.conversion.plan import Constant, Copied, Drawn, Plan, Write, build_plan
from modeling_t5gemma.conversion.source import Source, resolve_source
from modeling_t5gemma.conversion.target import Target, build_target
from modeling_t5gemma.conversion.tokenizers import check_same_vocabulary, write_tokenizer
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.safetensors_files import TensorToWrite, write_index, write_safetensors
from modeling_t5gemma.io.staging import check_apart, check_output, staged
from modeling_t5gemma.io.tensors import constant_chunks, drawn_chunks, repeated_chunks, stored_chunks


class Prepared(NamedTuple):
    """A conversion that only has to be carried out."""

    options: ConversionOptions
    target: Target
    plan: Plan


def prepare(options: ConversionOptions, *, dry_run: bool = False) -> Prepared:
    """Find and check everything, and write nothing.

    Args:
        dry_run: do without the weights of sources on the Hub; the result can be shown but not carried out.

    Raises:
        UserError: see ``resolve_source``, ``build_target`` and ``build_plan``; or the output exists.
    """
    check_output(options.output, overwrite=options.overwrite)

    def resolve(given: str) -> Source:
        return resolve_source(given, options.revision, options.aliases_of, weights=not dry_run)

    dec = resolve(options.dec)
    enc = dec if options.enc == options.dec else resolve(options.enc)
    if options.revision is not None and enc.commit is None and dec.commit is None:
        raise UserError(f"--revision is for Hub repositories, but {enc.path} and {dec.path} are here. Leave it out.")
    check_apart(options.output, [enc.folder, dec.folder])
    check_same_vocabulary(enc, dec)
    target = build_target(enc, dec, options)
    return Prepared(options, target, build_plan(target, DTYPES[options.dtype]))


def carry_out(prepared: Prepared, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write the checkpoint, and verify it if the options say so.

    Anonymous memory stays within a few buffers of ``tensors.CHUNK_BYTES`` whatever the size.

    Args:
        on_bytes: called with the number of bytes of each piece of the weights written.

    Raises:
        UserError: the disk is full, or verification fails. Nothing is left behind.
    """
    options, target, plan = prepared
    enc, dec = target.encoder.source, target.decoder.source
    with staged(options.output, overwrite=options.overwrite, needed=plan.nbytes) as folder:
        turn_ends = write_tokenizer(enc, dec, folder, target.config)
        _write_config(folder, prepared)
        _generation_config(dec, turn_ends).save_pretrained(folder)
        write_documents(folder, target, plan, options)
        _write_weights(folder, prepared, on_bytes)
        if options.verify:
            # Imported here: it loads models, which converting does not need.
            from modeling_t5gemma.conversion.verification import verify_checkpoint

            try:
                for path in dict.fromkeys((enc.path, dec.path)):
                    verify_checkpoint(path, folder)
            except UserError as error:
                # The folder of this name is about to vanish.
                raise UserError(str(error).replace(str(folder), str(options.output))) from error


def hub_code_files() -> list[Path]:
    """The modules that a checkpoint of our own ``model_type`` carries, so that it loads where the package is not."""
    modeling = Path(str(files("modeling_t5gemma"))) / "modeling_t5gemma.py"
    return [modeling, *map(Path, sorted(set(get_relative_import_files(modeling))))]


def _write_config(folder: Path, prepared: Prepared) -> None:
    config = prepared.target.config
    config.dtype = prepared.plan.dtype
    config.save_pretrained(folder)
    if getattr(config, "auto_map", None):
        for path in hub_code_files():
            shutil.copyfile(path, folder / path.name)


def _generation_config(dec: Source, turn_ends: list[int]) -> GenerationConfig:
    """The special tokens to start and stop at, from the source's own generation config where it has one.

    Its sampling settings are left: they were chosen for a chat model, and T5Gemma's results are greedy.
    """
    ids = {
        name: dec.generation.get(name, getattr(dec.config, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if turn_ends:
        ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
        ids["eos_token_id"] = list(dict.fromkeys([*ends, *turn_ends]))
    return GenerationConfig(decoder_start_token_id=ids["bos_token_id"], **ids)


def _write_weights(folder: Path, prepared: Prepared, on_bytes: Callable[[int], None]) -> None:
    writes = {write.name: write for write in prepared.plan.writes}
    try:
        shards = split_state_dict_into_shards_factory(
            writes,
            get_storage_size=lambda write: write.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=prepared.options.max_shard_size,
        )
    except ValueError as error:
        raise UserError(f'--max-shard-size is {prepared.options.max_shard_size!r}; write it as "5GB".') from error
    for file, names in shards.filename_to_tensors.items():
        # Widest first keeps each tensor aligned; the sort is stable, so a source is read front to back.
        ordered = sorted((writes[name] for name in names), key=lambda write: -write.dtype.itemsize)
        write_safetensors(folder / file, [_to_write(write, prepared) for write in ordered], on_bytes)
    if shards.is_sharded:
        write_index(folder, shards.tensor_to_filename, prepared.plan.nbytes)


def _to_write(write: Write, prepared: Prepared) -> TensorToWrite:
    name, shape, dtype, origin = write.name, write.shape, write.dtype, write.origin
    if isinstance(origin, Drawn):
        seed = prepared.options.seed
        return TensorToWrite(name, shape, dtype, lambda: drawn_chunks(shape, dtype, origin.std, seed, name))
    if isinstance(origin, Constant):
        return TensorToWrite(name, shape, dtype, lambda: constant_chunks(shape, dtype, origin.value))
    assert isinstance(origin, Copied)
    tensor = prepared.target.stack(origin.side).source.tensors[origin.name]
    if origin.repeats > 1:
        return TensorToWrite(
            name, shape, dtype, lambda: repeated_chunks(tensor, dtype, origin.head_dim, origin.repeats)
        )
    verbatim = tensor.verbatim() if tensor.dtype == dtype else None
    return TensorToWrite(name, shape, dtype, verbatim or (lambda: stored_chunks(tensor, dtype)))
