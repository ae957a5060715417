"""``t5gemma inspect``: a checkpoint's architecture as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from modeling_t5gemma.configuration_t5gemma import is_bidirectional
from modeling_t5gemma.conversion.inspection import PARTS, Inspection, TensorHeader, inspect_checkpoint
from modeling_t5gemma.conversion.options import describe_layers
from modeling_t5gemma.cross_attention import kind_of


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder (config.json alone will do) or a Hub repository.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
) -> None:
    """Show what a checkpoint is: stacks, attention, parameters. Reads no weights."""
    inspection = inspect_checkpoint(checkpoint, revision)
    console = Console()
    console.print(stacks_table(inspection))
    console.print(parameters_table(inspection))
    for line in notes(inspection):
        console.print(line, highlight=False)


def stacks_table(inspection: Inspection) -> Table:
    """A column for each stack."""
    config = inspection.config
    stacks: Any = (config.encoder, config.decoder)
    (architecture,) = config.architectures or [type(config).__name__]
    table = Table("", "encoder", "decoder", title=f"{architecture} ({config.model_type})")
    table.add_row("layers", *(_layers(stack) for stack in stacks))
    table.add_row("bidirectional", *(_bidirectional(stack) for stack in stacks))
    table.add_row("sliding window", *(str(stack.sliding_window or "none") for stack in stacks))
    table.add_row("width, FFN", *(f"{stack.hidden_size}, {stack.intermediate_size}" for stack in stacks))
    table.add_row(
        "query / kv heads x head_dim",
        *(f"{stack.num_attention_heads} / {stack.num_key_value_heads} x {stack.head_dim}" for stack in stacks),
    )
    table.add_row("norms", *(_norms(stack) for stack in stacks))
    table.add_row("RoPE", *(_rope(stack) for stack in stacks))
    table.add_row("softcap: attention, logits", *(_softcaps(stack) for stack in stacks))
    table.add_row("vocabulary", *(f"{stack.vocab_size:,}" for stack in stacks))
    table.add_row("longest input", *(f"{stack.max_position_embeddings:,}" for stack in stacks))
    table.add_row("cross-attention", "", _cross_attention(config))
    return table


def parameters_table(inspection: Inspection) -> Table:
    """A row for each part that has weights of its own."""
    table = Table("part", title="Parameters" if inspection.has_weights else "Parameters, by the config (no weights)")
    for heading in ("parameters", "bytes", "dtypes"):
        table.add_column(heading, justify="right")
    for part in PARTS:
        if tensors := inspection.part(part):
            table.add_row(part, *_totals(tensors))
    table.add_section()
    table.add_row("all", *_totals(list(inspection.tensors.values())))
    without = [tensor for part in PARTS if "embedding" not in part for tensor in inspection.part(part)]
    table.add_row("without embeddings", *_totals(without))
    return table


def notes(inspection: Inspection) -> list[str]:
    """What does not fit a table: ties, special tokens, completeness, provenance."""
    config, generation, record = inspection.config, inspection.generation, inspection.record
    embeddings = "shared by both stacks" if config.share_embeddings else "one for each stack"
    head = "tied to the decoder's" if config.tie_word_embeddings else "untied"
    tokens = {
        name: generation.get(f"{name}_token_id", getattr(config, f"{name}_token_id", None))
        for name in ("bos", "eos", "pad", "decoder_start")
    }
    lines = [
        f"Embeddings: {embeddings}; output head {head}.",
        f"Special tokens: {', '.join(f'{name} {token}' for name, token in tokens.items())}.",
    ]
    for words, names in (("lack", inspection.missing), ("hold, unknown to the config,", inspection.unexpected)):
        if names:
            lines.append(f"The files {words} {len(names)} tensors such as {names[0]}.")
    for stack in ("encoder", "decoder"):
        if origin := record.get(stack):
            commit = f", commit {origin['commit']}" if origin["commit"] else ""
            lines.append(f"{stack.title()}: layers {describe_layers(origin['layers'])} of {origin['source']}{commit}.")
    if record:
        lines.append(f"Cross-attention began as: {record['cross_attention']} (seed {record['seed']}).")
    return lines


def _layers(stack: Any) -> str:
    kinds = Counter(kind.removesuffix("_attention") for kind in stack.layer_types)
    return f"{stack.num_hidden_layers}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _bidirectional(stack: Any) -> str:
    layers = [layer for layer in range(stack.num_hidden_layers) if is_bidirectional(stack, layer)]
    if len(layers) in (0, stack.num_hidden_layers):
        return "all" if layers else "none"
    return describe_layers(layers)


def _norms(stack: Any) -> str:
    places = "before and after" if stack.norm_placement == "pre_post" else "before"
    return f"{places}{', on queries and keys' if stack.qk_norm else ''}"


def _rope(stack: Any) -> str:
    rope = stack.rope_parameters
    bases = {kind: rope.get(kind, rope).get("rope_theta") for kind in dict.fromkeys(stack.layer_types)}
    if len(set(bases.values())) == 1:
        return f"base {next(iter(bases.values())):,.0f}"
    return ", ".join(f"{kind.removesuffix('_attention')} {base:,.0f}" for kind, base in bases.items())


def _softcaps(stack: Any) -> str:
    return ", ".join(str(cap or "none") for cap in (stack.attn_logit_softcapping, stack.final_logit_softcapping))


def _cross_attention(config: Any) -> str:
    kind = kind_of(config)
    own = "own weights, " if kind.weights else ""
    if not kind.paired:
        return f"{kind.name}: {own}from the encoder's output"
    layer_map = config.cross_attention_map
    if layer_map == list(range(len(layer_map))):
        return f"{kind.name}: {own}each layer reads the encoder's same"
    return f"{kind.name}: {own}reads encoder layers {','.join('-' if m is None else str(m) for m in layer_map)}"


def _totals(tensors: Sequence[TensorHeader]) -> tuple[str, str, str]:
    sizes = [tensor.nbytes for tensor in tensors if tensor.nbytes is not None]
    dtypes = sorted({tensor.dtype for tensor in tensors if tensor.dtype is not None})
    size = f"{sum(sizes) / 1e6:,.1f} MB" if sizes else ""
    return f"{sum(tensor.parameters for tensor in tensors):,}", size, ", ".join(dtypes)
