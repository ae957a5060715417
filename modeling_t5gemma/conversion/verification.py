"""Proof with numbers that a converted checkpoint computes what its source computes.

An encoder-decoder made of a decoder-only model holds it in parts that can be run alone: the encoder with a causal
mask, the decoder with its cross-attention silenced, and with layerwise cross-attention the whole. Each is compared
with the source on the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from modeling_t5gemma.configuration_t5gemma import (
    SLIDING,
    AdaptedSeq2SeqConfig,
    AdaptedSeq2SeqModuleConfig,
)
from modeling_t5gemma.conversion.documents import RECORD_FILE, read_record
from modeling_t5gemma.conversion.reference import (
    Continuation,
    Outputs,
    greedy,
    largest_difference,
    load_reference,
    only_layers,
    outputs_of,
)
from modeling_t5gemma.conversion.source import Source, resolve_source
from modeling_t5gemma.cross_attention import KEY_VALUES, kind_of
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import load_config, load_model
from modeling_t5gemma.io.safetensors_files import read_header
from modeling_t5gemma.io.text_files import read_json
from modeling_t5gemma.modeling_t5gemma import AdaptedSeq2SeqForConditionalGeneration

# A difference passes up to this many noise floors: the two sum in different orders in every layer, the floor's run
# differs in the first alone.
ALLOWED_FLOORS = 8
TARGET_TOKENS = 64
GREEDY_TOKENS = 32
# Longer windows are not outrun: attention without a window is what a few hundred tokens can show of them.
LONGEST_WINDOW_TO_OUTRUN = 1024
PREFIX_TOKENS = 320


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what is compared.
        difference: the largest absolute difference; None where the check was skipped.
        allowed: the largest that passes.
        floor: the noise floor; 0 where bits have to be equal.
        note: the number of tokens and the window they exceed or not, or why the check was skipped.
    """

    name: str
    note: str
    difference: float | None = None
    allowed: float = 0.0
    floor: float = 0.0

    @property
    def skipped(self) -> bool:
        return self.difference is None

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; a NaN is not."""
        return self.difference is not None and self.difference <= self.allowed


@dataclass(frozen=True)
class Verification:
    """All checks of one source and one converted checkpoint."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed or check.skipped for check in self.checks)


@dataclass(frozen=True)
class _Converted:
    """What is known of the checkpoint before its weights are read.

    Attributes:
        config: with a causal encoder.
        record: the contents of ``conversion.json``, {} without one.
        layers: for "encoder" and "decoder" the source's layer of each layer, or why it cannot be compared.
    """

    folder: Path
    config: AdaptedSeq2SeqConfig
    record: dict[str, Any]
    layers: dict[str, list[int] | str]

    @property
    def whole(self) -> bool:
        """Whether encoder and decoder together are the source, truncated to some of its layers: each decoder layer has
        an encoder layer that comes from the same one and has the same layers below it."""
        encoder, decoder = self.layers["encoder"], self.layers["decoder"]
        if isinstance(encoder, str) or isinstance(decoder, str):
            return False
        return kind_of(self.config).reads == KEY_VALUES and encoder[: len(decoder)] == decoder


def verify_checkpoint(source: str | Path, converted: str | Path) -> Verification:
    """Compare a converted checkpoint with a source of it.

    Of a pair of two sources it compares the stack that came from this one. Memory: the source's weights in float32,
    then the converted checkpoint's.

    Args:
        source: as ``resolve_source`` takes it.
        converted: the folder of the converted checkpoint.

    Raises:
        UserError: either cannot be read, nothing in them can be compared, or a check fails.
    """
    verification = measure(source, converted)
    for check in verification.checks:
        if not (check.passed or check.skipped):
            raise UserError(
                f"{converted} does not compute what {source} does: {check.name} differs by {check.difference:.1e}, "
                f"{check.allowed:.1e} is allowed. `t5gemma verify` shows all checks; convert it again."
            )
    return verification


def measure(source: str | Path, converted: str | Path) -> Verification:
    """As ``verify_checkpoint``, but a check that fails is left to the caller.

    Raises:
        UserError: either cannot be read, or nothing in them can be compared.
    """
    origin = resolve_source(str(source))
    described = _describe(Path(converted).expanduser(), origin)
    reasons = {side: layers for side, layers in described.layers.items() if isinstance(layers, str)}
    if len(reasons) == 2:
        raise UserError(
            f"Nothing in {converted} can be compared with {source}: the encoder {reasons['encoder']}; the decoder "
            f"{reasons['decoder']}. Give the checkpoint that it was converted from."
        )
    tokens, prefix = _tokens(origin.config)
    expected, continuation = _run_source(origin, described, tokens, prefix)
    model = _load(described)
    return Verification(tuple(_checks(model, described, expected, continuation, tokens, prefix)))


def _describe(folder: Path, source: Source) -> _Converted:
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ("t5gemma", "adapted_seq2seq"):
        raise UserError(
            f"{folder / 'config.json'} is of model type {raw.get('model_type')!r}; a converted checkpoint is "
            "'t5gemma' or 'adapted_seq2seq'. Give the folder that `t5gemma convert` wrote."
        )
    config = with_causal_encoder(load_config(folder))
    record = read_record(folder)
    layers = {side: _source_layers(side, getattr(config, side), record, source) for side in ("encoder", "decoder")}
    if config.share_embeddings and not isinstance(layers["encoder"], str) and isinstance(layers["decoder"], str):
        layers["encoder"] = "has the embedding of the decoder's source"
    return _Converted(folder, config, record, layers)


def with_causal_encoder(config: Any) -> AdaptedSeq2SeqConfig:
    """The config under which a checkpoint's weights make the same model but for an encoder that sees no later token.

    ``T5GemmaConfig`` cannot say that, so the result is an ``AdaptedSeq2SeqConfig`` of the same block.
    """
    stacks = {}
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        known = [name for name in AdaptedSeq2SeqModuleConfig.__annotations__ if hasattr(stack, name)]
        stacks[side] = AdaptedSeq2SeqModuleConfig(**{name: copy.deepcopy(getattr(stack, name)) for name in known})
    stacks["encoder"].bidirectional_layers = "none"
    return AdaptedSeq2SeqConfig(
        encoder=stacks["encoder"],
        decoder=stacks["decoder"],
        cross_attention_type=config.cross_attention_type,
        cross_attention_map=getattr(config, "cross_attention_map", None),
        share_embeddings=config.share_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _source_layers(side: str, stack: Any, record: dict[str, Any], source: Source) -> list[int] | str:
    """The source's layer of each layer of a stack, or why the stack cannot be compared with this source."""
    origin = record.get(side, {})
    names = {record.get(other, {}).get("source") for other in ("encoder", "decoder")}
    if len(names) == 2 and source.name in names and origin.get("source") != source.name:
        return f"comes from {origin.get('source')}"
    config = source.config
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size"):
        if getattr(stack, field) != getattr(config, field):
            return f"has {field} {getattr(stack, field)}, this source {getattr(config, field)}"
    layers: list[int] = origin.get("layers") or list(range(config.num_hidden_layers))
    if len(layers) != stack.num_hidden_layers:
        return f"has {stack.num_hidden_layers} layers, this source {config.num_hidden_layers}, and no {RECORD_FILE}"
    if max(layers) >= config.num_hidden_layers:
        return f"has layers up to {max(layers)} of its source, this one {config.num_hidden_layers}"
    return layers


def _tokens(config: Any) -> tuple[torch.Tensor, int]:
    """Random tokens, int64 (S,), without padding, and the prefix's length: beyond the window where that is cheap."""
    window: int = config.sliding_window if SLIDING in (getattr(config, "layer_types", None) or []) else 0
    outrun = 0 < window <= LONGEST_WINDOW_TO_OUTRUN
    prefix = window + TARGET_TOKENS if outrun else PREFIX_TOKENS
    prefix = min(prefix, config.max_position_embeddings - TARGET_TOKENS)
    if prefix < 1:
        raise UserError(
            f"The source has {config.max_position_embeddings} positions (max_position_embeddings); a comparison takes "
            f"more than {TARGET_TOKENS}. Repair its config.json."
        )
    tokens = torch.randint(0, config.vocab_size, (prefix + TARGET_TOKENS,), generator=torch.Generator().manual_seed(0))
    # A padding token would be taken for padding.
    tokens[tokens == config.pad_token_id] = (config.pad_token_id or 0) + 1
    if config.bos_token_id is not None:
        tokens[0] = config.bos_token_id
    return tokens, prefix


def _run_source(
    source: Source, converted: _Converted, tokens: torch.Tensor, prefix: int
) -> tuple[dict[str, Outputs], Continuation | None]:
    """What the source computes with each stack's layers, and its greedy text where the whole can be compared."""
    reference = load_reference(source, _rounded_to(converted.folder))
    expected: dict[str, Outputs] = {}
    continuation = None
    for side, layers in converted.layers.items():
        if isinstance(layers, str):
            continue
        if side == "decoder" and layers == converted.layers["encoder"]:
            expected[side] = expected["encoder"]
        else:
            with only_layers(reference, layers) as kept:
                expected[side] = outputs_of(kept, tokens)
        if side == "decoder" and converted.whole:
            with only_layers(reference, layers) as kept:
                continuation = greedy(kept, tokens[:prefix], GREEDY_TOKENS)
    return expected, continuation


def _rounded_to(folder: Path) -> torch.dtype | None:
    """The one dtype that all weights are stored in; None if they are in several, each then its own."""
    dtypes = {tensor.dtype for file in folder.glob("*.safetensors") for tensor in read_header(file).values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _load(converted: _Converted) -> AdaptedSeq2SeqForConditionalGeneration:
    model, problems = load_model(
        AdaptedSeq2SeqForConditionalGeneration, converted.folder, config=converted.config, dtype=torch.float32
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems[kind]:
            raise UserError(
                f"{converted.folder} does not hold the weights of its config.json: {kind.replace('_', ' ')} such as "
                f"{sorted(problems[kind])[0]}. Convert it again."
            )
    return cast(AdaptedSeq2SeqForConditionalGeneration, model.eval())


def _checks(
    model: AdaptedSeq2SeqForConditionalGeneration,
    converted: _Converted,
    expected: dict[str, Outputs],
    continuation: Continuation | None,
    tokens: torch.Tensor,
    prefix: int,
) -> Iterator[Check]:
    yield _encoder(model, converted, expected.get("encoder"), tokens)
    if kind_of(converted.config).weights:
        yield _copied_weights(model, converted)
        silence_cross_attention(model)
        source_valid = torch.ones_like(tokens)
    else:
        yield from _whole(model, converted, expected.get("decoder"), continuation, tokens, prefix)
        # Nothing to read is all that it takes to silence it.
        source_valid = torch.zeros_like(tokens)
    yield _decoder(model, converted, expected.get("decoder"), tokens, source_valid)


@torch.no_grad()
def _encoder(model: Any, converted: _Converted, expected: Outputs | None, tokens: torch.Tensor) -> Check:
    name = "causal encoder: states"
    if expected is None:
        return Check(name, f"skipped: it {converted.layers['encoder']}")
    hidden = model.model.encoder(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None]))
    difference = largest_difference(hidden.last_hidden_state[0], expected.hidden)
    return _against_floor(name, _over(tokens, converted.config.encoder), difference, expected.hidden_floor)


@torch.no_grad()
def _decoder(
    model: Any, converted: _Converted, expected: Outputs | None, tokens: torch.Tensor, source_valid: torch.Tensor
) -> Check:
    name = "silenced decoder: logits"
    if expected is None:
        return Check(name, f"skipped: it {converted.layers['decoder']}")
    logits = model(
        input_ids=tokens[None],
        attention_mask=source_valid[None],
        decoder_input_ids=tokens[None],
        decoder_attention_mask=torch.ones_like(tokens[None]),
        use_cache=False,
    ).logits[0]
    difference = largest_difference(logits, expected.logits)
    return _against_floor(name, _over(tokens, converted.config.decoder), difference, expected.logits_floor)


@torch.no_grad()
def _whole(
    model: Any,
    converted: _Converted,
    expected: Outputs | None,
    continuation: Continuation | None,
    tokens: torch.Tensor,
    prefix: int,
) -> Iterator[Check]:
    names = "causal whole: logits", "causal whole: greedy"
    if expected is None or continuation is None:
        reason = "skipped: encoder and decoder do not keep the same layers of one source"
        yield from (Check(name, reason) for name in names)
        return
    logits = model(
        input_ids=tokens[None, : prefix - 1], decoder_input_ids=tokens[None, prefix - 1 :], use_cache=False
    ).logits[0]
    difference = largest_difference(logits, expected.logits[prefix - 1 :])
    note = f"{prefix} + {len(tokens) - prefix}{_window(converted.config.decoder)}"
    yield _against_floor(names[0], note, difference, expected.logits_floor)

    own = greedy(model, tokens[: prefix - 1], GREEDY_TOKENS, decoder_start=int(tokens[prefix - 1]))
    yield _same_text(names[1], continuation, own, expected.logits_floor)


def _same_text(name: str, expected: Continuation, own: Continuation, floor: float) -> Check:
    """Whether two greedy texts are equal up to a choice between words that the source holds for equally good."""
    same = int((expected.tokens == own.tokens).long().cumprod(dim=0).sum())
    note = f"{same} of {len(expected.tokens)} equal"
    if same == len(expected.tokens):
        return _against_floor(name, note, 0.0, floor)
    logits = expected.logits[same]
    lead = (logits[expected.tokens[same]] - logits[own.tokens[same]]).item()
    return _against_floor(name, f"{note}; then the source's choice leads by the difference", lead, floor)


def silence_cross_attention(model: AdaptedSeq2SeqForConditionalGeneration) -> None:
    """Make separate cross-attention add exactly 0. Small is not enough: a Gemma 3 post-norm has gains of up to 185."""
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for parameter in layer.cross_attn.o_proj.parameters():  # type: ignore[union-attr]
                parameter.zero_()


def _copied_weights(model: AdaptedSeq2SeqForConditionalGeneration, converted: _Converted) -> Check:
    name = "copied cross-attention"
    origin = converted.record.get("cross_attention")
    if origin is None:
        return Check(name, f"skipped: no {RECORD_FILE} tells how it began")
    if origin == "random":
        return Check(name, "skipped: it was drawn at random")
    drawn = "kv" if origin == "partial" else ""
    largest, count = 0.0, 0
    weights = dict(model.model.decoder.named_parameters())
    for own_name, own in weights.items():
        if "self_attn" in own_name and not any(f".{projection}_proj." in own_name for projection in drawn):
            cross = weights[own_name.replace("self_attn", "cross_attn")]
            largest, count = max(largest, largest_difference(own, cross)), count + 1
    return Check(name, f"{count} tensors", largest)


def _against_floor(name: str, note: str, difference: float, floor: float) -> Check:
    return Check(name, note, difference, ALLOWED_FLOORS * floor, floor)


def _over(tokens: torch.Tensor, stack: Any) -> str:
    return f"{len(tokens)}{_window(stack)}"


def _window(stack: Any) -> str:
    return f" (window {stack.sliding_window})" if SLIDING in stack.layer_types else ""
