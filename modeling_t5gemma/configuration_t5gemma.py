"""Configurations: T5Gemma as released, and the wider encoder-decoder for what T5Gemma cannot represent.

``T5GemmaConfig`` adds no key to transformers' own, so that a checkpoint goes back and forth between this package and
stock transformers. ``AdaptedSeq2SeqConfig`` has its own ``model_type``, so that no stock loader can read its weights
wrongly. Both describe the same model classes: a stack reads its switches from its config, and ``T5GemmaModuleConfig``
carries the values that T5Gemma fixes as class attributes, which are never serialised.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers import T5GemmaConfig as StockT5GemmaConfig
from transformers import T5GemmaModuleConfig as StockT5GemmaModuleConfig
from transformers.configuration_utils import SubConfigSpec

from .cross_attention import KEY_VALUES, kind_of

# A T5GemmaModuleConfig or an AdaptedSeq2SeqModuleConfig. Their fields are Optional until __post_init__ has filled
# them, which no type checker sees.
StackConfig: TypeAlias = Any

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
CLASSIFIER_POOLINGS = ("last", "mean")

# Encoder and decoder stacks, from the released checkpoints; 27b from Gemma 2 27B, which has no T5Gemma release. The
# query_pre_attn_scalar of the small ones is inferred to be their head_dim.
STACK_PRESETS: dict[str, dict[str, int]] = {
    name: dict(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
    )
    for name, layers, width, ffn, heads, kv_heads, head_dim, scalar in (
        ("s", 8, 512, 1024, 8, 8, 64, 64),
        ("b", 12, 768, 2048, 12, 12, 64, 64),
        ("l", 24, 1024, 2816, 16, 16, 64, 64),
        ("ml", 26, 1152, 6912, 4, 4, 256, 256),
        ("xl", 24, 2048, 5120, 32, 32, 64, 64),
        ("2b", 26, 2304, 9216, 8, 4, 256, 256),
        ("9b", 42, 3584, 14336, 16, 8, 256, 256),
        ("27b", 46, 4608, 36864, 32, 16, 128, 144),
    )
}
RELEASED_PAIRS = ("s-s", "b-b", "l-l", "ml-ml", "xl-xl", "2b-2b", "9b-2b", "9b-9b")


class FamilySwitches(NamedTuple):
    """The switches that tell one family's block from another's."""

    norm_placement: str
    norm_unit_offset: bool
    qk_norm: bool
    qkv_bias: bool
    scale_embeddings: bool
    softcaps_attention: bool


# A combination that is not a row here is refused: no checkpoint has it, so nothing could prove it right.
FAMILY_SWITCHES = {
    "gemma": FamilySwitches("pre", True, False, False, True, False),
    "gemma2": FamilySwitches("pre_post", True, False, False, True, True),
    "gemma2 without attention softcap": FamilySwitches("pre_post", True, False, False, True, False),
    "gemma3": FamilySwitches("pre_post", True, True, False, True, False),
    "llama, mistral": FamilySwitches("pre", False, False, False, False, False),
    "qwen2": FamilySwitches("pre", False, False, True, False, False),
    "qwen3": FamilySwitches("pre", False, True, False, False, False),
}


# What AdaptedSeq2SeqConfig or its stacks can vary and T5Gemma cannot.
_T5GEMMA_FIXES = frozenset(
    {
        "norm_placement",
        "norm_unit_offset",
        "qk_norm",
        "qkv_bias",
        "scale_embeddings",
        "bidirectional_layers",
        "cross_attention_type",
        "cross_attention_map",
        "share_embeddings",
        "classifier_pooling",
    }
)


class _Stack:
    """What the configs of both kinds of stack derive from their fields."""

    @property
    def base_model_tp_plan(self: Any) -> dict[str, str]:
        """Tensor parallelism: heads and FFN columns are split, outputs summed; cross-attention too, which stock leaves
        out, where the stack has it."""
        attentions = ["self_attn"]
        if self.is_decoder and kind_of(self).weights:
            attentions.append("cross_attn")
        plan = {f"layers.*.{attention}.{p}_proj": "colwise" for attention in attentions for p in "qkv"}
        plan |= {f"layers.*.{attention}.o_proj": "rowwise" for attention in attentions}
        plan |= {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise"}
        plan["layers.*.mlp.down_proj"] = "rowwise"
        if self.qk_norm:
            norms = {f"layers.*.{attention}.{p}_norm" for attention in attentions for p in "qk"}
            plan |= dict.fromkeys(sorted(norms), "replicated_with_grad_allreduce")
        return plan


@strict
class T5GemmaModuleConfig(_Stack, StockT5GemmaModuleConfig):
    """One stack of a T5Gemma: transformers' own config, which fixes the block to Gemma 2's.

    Raises:
        ValueError: a switch of ``AdaptedSeq2SeqModuleConfig`` is given a value that stock T5Gemma would ignore.
    """

    norm_placement = "pre_post"
    norm_unit_offset = True
    qk_norm = False
    qkv_bias = False
    scale_embeddings = True
    bidirectional_layers = "all"
    cross_attention_type = "separate"
    cross_attention_map = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unrepresentable(kwargs)
        super().__post_init__(**kwargs)
        _check_stack(self)


class _Pair:
    """A config around two stacks: what they have from it follows when it is set anew, before a model is built."""

    _PASSED_DOWN = ("dropout_rate", "attention_dropout")
    _built = False  # only after construction are the stacks this config's own

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._built and name in self._PASSED_DOWN:
            setattr(self.encoder, name, value)  # type: ignore[attr-defined]
            setattr(self.decoder, name, value)  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        fields.pop("_built", None)
        return fields


@strict
class T5GemmaConfig(_Pair, StockT5GemmaConfig):
    """An encoder-decoder Gemma as released ("Encoder-Decoder Gemma", arXiv 2504.06225), key for key transformers' own.

    Raises:
        ValueError: a value that stock transformers would silently ignore; ``AdaptedSeq2SeqConfig`` represents more.
    """

    sub_configs_defaults = {  # noqa: RUF012
        "encoder": SubConfigSpec(T5GemmaModuleConfig),
        "decoder": SubConfigSpec(T5GemmaModuleConfig),
    }

    encoder: StackConfig = None
    decoder: StackConfig = None

    share_embeddings = False
    cross_attention_type = "separate"
    cross_attention_map = None
    classifier_pooling = "last"

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unrepresentable(kwargs)
        self.encoder = _own_stack(self.encoder, T5GemmaModuleConfig)
        self.decoder = _own_stack(self.decoder, T5GemmaModuleConfig)
        _refuse_other_dropout(self)
        super().__post_init__(**kwargs)
        self.vocab_size = self.decoder.vocab_size
        self._built = True

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> T5GemmaConfig:
        """The config of a released pair, or of any two stacks.

        Args:
            name: "ENCODER-DECODER", each one of ``STACK_PRESETS``: "2b-2b", "9b-2b", "27b-9b".
            kwargs: further fields of ``T5GemmaConfig``; ``vocab_size`` goes to both stacks.

        Raises:
            ValueError: an unknown stack.
        """
        stacks = name.split("-")
        if len(stacks) != 2 or any(stack not in STACK_PRESETS for stack in stacks):
            raise ValueError(
                f"Unknown preset {name!r}: give ENCODER-DECODER with two of {', '.join(STACK_PRESETS)}, "
                f"such as {RELEASED_PAIRS[5]!r} (released: {', '.join(RELEASED_PAIRS)})."
            )
        shared = {"vocab_size": kwargs.pop("vocab_size")} if "vocab_size" in kwargs else {}
        encoder, decoder = ({**STACK_PRESETS[stack], **shared} for stack in stacks)
        return cls(encoder=encoder, decoder=decoder, **kwargs)


@strict
class AdaptedSeq2SeqModuleConfig(_Stack, PreTrainedConfig):
    """One stack of an ``AdaptedSeq2SeqConfig``. Fields not explained are those of ``T5GemmaModuleConfig``.

    Attributes:
        attention_bias: biases on all four attention projections.
        qkv_bias: biases on queries, keys and values alone (Qwen 2).
        norm_placement: "pre" (a norm before each sublayer) or "pre_post" (one after it as well, inside the residual).
        norm_unit_offset: the gain is 1 + weight (Gemma) rather than weight.
        qk_norm: RMSNorm over head_dim on queries and keys before RoPE (Gemma 3, Qwen 3).
        scale_embeddings: embeddings are multiplied by sqrt(hidden_size) (Gemma).
        rope_parameters: transformers' rope dictionary, or one per layer type.
        bidirectional_layers: of an encoder: "all", "none" (the paper's causal-encoder ablation) or layer numbers.
        cross_attention_type, cross_attention_map, cross_attention_hidden_size: set by the ``AdaptedSeq2SeqConfig``
            around the stack.

    Raises:
        ValueError: a combination of switches that no supported family uses, or a field outside its range.
    """

    model_type = "adapted_seq2seq_module"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    vocab_size: int = 262144
    hidden_size: int = 640
    intermediate_size: int = 2048
    num_hidden_layers: int = 18
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    attention_dropout: int | float = 0.0
    dropout_rate: int | float = 0.0
    query_pre_attn_scalar: int | float = 256
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    norm_placement: str = "pre_post"
    norm_unit_offset: bool = True
    qk_norm: bool = True
    scale_embeddings: bool = True
    bidirectional_layers: str | list[int] = "all"
    is_decoder: bool = False
    cross_attention_hidden_size: int | None = None
    cross_attention_type: str = "separate"
    cross_attention_map: list[int | None] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [FULL] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        _check_stack(self)


@strict
class AdaptedSeq2SeqConfig(_Pair, PreTrainedConfig):
    """An encoder-decoder made of any supported family's decoder-only stack.

    Attributes:
        encoder, decoder: the two stacks.
        cross_attention_type: "separate": own weights, keys and values from the encoder's final output, no RoPE (the
            paper's). "layerwise": decoder layer l has no cross-attention weights; in one softmax it attends to the
            keys and values that encoder layer m(l) computed for its own self-attention and then to its own. With a
            causal encoder and the same tokens that is the decoder-only model itself.
        cross_attention_map: m as a list with an encoder layer for each decoder layer; the identity by default. A
            decoder layer with None reads nothing of the source but its first token, ``<bos>``, which it computes
            itself: an encoder can end below its decoder (SPEED, arXiv 2605.06105).
        share_embeddings: encoder, decoder and head use one embedding matrix.
        classifier_pooling: what a label of a sequence is read off: "last", its last token ("Encoder-Decoder Gemma",
            arXiv 2504.06225), or "mean", the mean over its tokens.

    Raises:
        ValueError: stacks that cannot be paired in the way asked for.
    """

    model_type = "adapted_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    sub_configs_defaults = {  # noqa: RUF012
        "encoder": SubConfigSpec(AdaptedSeq2SeqModuleConfig),
        "decoder": SubConfigSpec(AdaptedSeq2SeqModuleConfig),
    }
    # The code travels with the checkpoint, so that it loads with trust_remote_code=True where this package is absent.
    _auto_class = "AutoConfig"
    _AUTO_MAP: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_t5gemma.AdaptedSeq2SeqConfig",
        "AutoModel": "modeling_t5gemma.AdaptedSeq2SeqModel",
        "AutoModelForSeq2SeqLM": "modeling_t5gemma.AdaptedSeq2SeqForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_t5gemma.AdaptedSeq2SeqForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_t5gemma.AdaptedSeq2SeqForTokenClassification",
        "AutoModelForMultipleChoice": "modeling_t5gemma.AdaptedSeq2SeqForMultipleChoice",
        "AutoModelForQuestionAnswering": "modeling_t5gemma.AdaptedSeq2SeqForQuestionAnswering",
        "AutoModelForTextEncoding": "modeling_t5gemma.AdaptedSeq2SeqEncoderModel",
    }

    encoder: StackConfig = None
    decoder: StackConfig = None
    is_encoder_decoder: bool = True
    cross_attention_type: str = "separate"
    cross_attention_map: list[int | None] | None = None
    share_embeddings: bool = False
    classifier_pooling: str = "last"
    dropout_rate: int | float = 0.0
    classifier_dropout_rate: int | float = 0.0
    attention_dropout: int | float = 0.0
    tie_word_embeddings: bool = True
    vocab_size: int = 262144

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder = _own_stack(self.encoder, AdaptedSeq2SeqModuleConfig)
        self.decoder = _own_stack(self.decoder, AdaptedSeq2SeqModuleConfig)
        super().__post_init__(**kwargs)
        encoder, decoder = self.encoder, self.decoder
        for stack in (encoder, decoder):
            stack.dropout_rate = self.dropout_rate
            stack.attention_dropout = self.attention_dropout
        encoder.is_decoder = False
        decoder.is_decoder = True
        decoder.cross_attention_hidden_size = encoder.hidden_size
        self.vocab_size = decoder.vocab_size
        self.auto_map = dict(self._AUTO_MAP)
        self.initializer_range = kwargs.get("initializer_range", decoder.initializer_range)
        for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
            if key not in kwargs:
                setattr(self, key, getattr(decoder, key))

        if self.classifier_pooling not in CLASSIFIER_POOLINGS:
            raise ValueError(
                f"classifier_pooling is {self.classifier_pooling!r}; it can be one of {CLASSIFIER_POOLINGS}."
            )
        kind = kind_of(self)
        self.cross_attention_map = kind.layer_map(encoder, decoder, self.cross_attention_map)
        if kind.reads == KEY_VALUES:
            _check_shared_key_values(kind.name.capitalize(), encoder, decoder, self.cross_attention_map)
        for stack in (encoder, decoder):
            stack.cross_attention_type = self.cross_attention_type
            stack.cross_attention_map = self.cross_attention_map
        if self.share_embeddings and not self.tie_word_embeddings:
            raise ValueError(
                "share_embeddings is one matrix for both stacks and the head: it needs tie_word_embeddings."
            )
        if self.share_embeddings and (encoder.vocab_size, encoder.hidden_size) != (
            decoder.vocab_size,
            decoder.hidden_size,
        ):
            raise ValueError(
                f"share_embeddings needs equal vocabularies and widths; the encoder has {encoder.vocab_size} x "
                f"{encoder.hidden_size}, the decoder {decoder.vocab_size} x {decoder.hidden_size}."
            )
        self._built = True

    @classmethod
    def from_t5gemma(cls, config: T5GemmaConfig, **changes: Any) -> AdaptedSeq2SeqConfig:
        """The same model under this config, for what T5Gemma cannot represent; its weights have the same names.

        Args:
            changes: fields of this config.
        """
        stacks = {
            side: {
                name: copy.deepcopy(getattr(stack, name))
                for name in AdaptedSeq2SeqModuleConfig.__annotations__
                if hasattr(stack, name)
            }
            for side, stack in (("encoder", config.encoder), ("decoder", config.decoder))
        }
        own = ("is_encoder_decoder", "dropout_rate", "classifier_dropout_rate", "attention_dropout",
               "tie_word_embeddings", "initializer_range", "bos_token_id", "pad_token_id", "eos_token_id",
               "dtype")  # fmt: skip
        return cls(**stacks, **{**{name: getattr(config, name) for name in own}, **changes})


def is_bidirectional(config: StackConfig, layer_idx: int) -> bool:
    """Whether layer ``layer_idx`` of an encoder sees later tokens; a decoder's never does."""
    if config.is_decoder or config.bidirectional_layers == "none":
        return False
    return config.bidirectional_layers == "all" or layer_idx in config.bidirectional_layers


def rope_parameters_of(config: StackConfig, layer_type: str) -> dict[str, Any]:
    """The rope dictionary of one layer type, whether the config has one for all or one for each."""
    assert config.rope_parameters is not None, "transformers fills it in"
    parameters: dict[str, Any] = config.rope_parameters.get(layer_type, config.rope_parameters)
    return parameters


def _own_stack(stack: Any, cls: type) -> Any:
    """A stack config that belongs to the config around it alone: what is derived for it never reaches the caller's."""
    if isinstance(stack, PreTrainedConfig) and not isinstance(stack, cls):
        stack = stack.to_dict()
    return copy.deepcopy(stack)


def _refuse_unrepresentable(kwargs: dict[str, Any]) -> None:
    """Refuse the switches that stock T5Gemma would carry along in the config and ignore."""
    for name in _T5GEMMA_FIXES & kwargs.keys():
        fixed = (
            getattr(T5GemmaModuleConfig, name) if hasattr(T5GemmaModuleConfig, name) else getattr(T5GemmaConfig, name)
        )
        value = kwargs.pop(name)
        if value != fixed:
            raise ValueError(
                f"T5Gemma fixes {name}={fixed!r}, so stock transformers would ignore {name}={value!r}. "
                "Use AdaptedSeq2SeqConfig, which represents it."
            )


def _refuse_other_dropout(config: StockT5GemmaConfig) -> None:
    """Refuse a stack's own dropout where the pair's, which stock puts over it, differs."""
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        for name in ("dropout_rate", "attention_dropout"):
            value = (stack or {}).get(name) if not isinstance(stack, PreTrainedConfig) else getattr(stack, name, None)
            if value and value != getattr(config, name):
                raise ValueError(
                    f"{side}.{name} is {value}, but T5Gemma has one for both stacks: set {name} on T5GemmaConfig."
                )


def _check_stack(config: Any) -> None:
    """Refuse a stack that the model classes cannot build as described."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of num_key_value_heads "
            f"({config.num_key_value_heads})."
        )
    if len(config.layer_types) != config.num_hidden_layers or set(config.layer_types) - {FULL, SLIDING}:
        raise ValueError(
            f"layer_types has {len(config.layer_types)} entries of kinds {sorted(set(config.layer_types))}; it needs "
            f"{config.num_hidden_layers}, each {FULL!r} or {SLIDING!r}."
        )
    if SLIDING in config.layer_types and not config.sliding_window:
        raise ValueError(f"layer_types has {SLIDING!r}, so sliding_window has to be a positive number of positions.")
    for layer_type in sorted(set(config.layer_types)):
        rope = rope_parameters_of(config, layer_type)
        if rope.get("rope_type") not in ROPE_TYPES:
            raise ValueError(
                f"The rope_type of {layer_type} is {rope.get('rope_type')!r}; only frequencies that do not depend on "
                f"the input's length are supported: {', '.join(map(repr, ROPE_TYPES))}."
            )
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"The partial_rotary_factor of {layer_type} is {rope['partial_rotary_factor']}; heads are rotated "
                "whole, so it can only be 1."
            )
    switches = FamilySwitches(
        config.norm_placement,
        config.norm_unit_offset,
        config.qk_norm,
        config.qkv_bias,
        config.scale_embeddings,
        config.attn_logit_softcapping is not None,
    )
    if switches not in FAMILY_SWITCHES.values():
        table = "; ".join(f"{family}: {tuple(row)}" for family, row in FAMILY_SWITCHES.items())
        raise ValueError(
            f"No supported family combines {', '.join(f'{k}={v!r}' for k, v in switches._asdict().items())}. "
            f"Supported, with the switches in this order: {table}."
        )
    layers = config.bidirectional_layers
    if isinstance(layers, str):
        valid = layers in ("all", "none")
    else:
        valid = all(0 <= layer < config.num_hidden_layers for layer in layers)
    if not valid:
        raise ValueError(
            f"bidirectional_layers is {layers!r}; it can be 'all', 'none' or a list of layer numbers from 0 to "
            f"{config.num_hidden_layers - 1}."
        )


def _check_shared_key_values(kind: str, encoder: Any, decoder: Any, layer_map: Any) -> None:
    """Refuse a pair whose layers cannot use each other's keys and values."""
    for name in ("num_key_value_heads", "head_dim", "qk_norm", "sliding_window"):
        if getattr(encoder, name) != getattr(decoder, name):
            raise ValueError(
                f"{kind} cross-attention shares keys and values, so {name} has to be equal: the encoder has "
                f"{getattr(encoder, name)}, the decoder {getattr(decoder, name)}. Use 'separate' for such a pair."
            )
    for layer, paired in ((layer, m) for layer, m in enumerate(layer_map) if m is not None):
        kinds = encoder.layer_types[paired], decoder.layer_types[layer]
        if kinds[0] != kinds[1] or rope_parameters_of(encoder, kinds[0]) != rope_parameters_of(decoder, kinds[1]):
            raise ValueError(
                f"{kind} cross-attention needs paired layers of one kind and one RoPE, but encoder layer {paired} is "
                f"{kinds[0]} and decoder layer {layer} {kinds[1]} (or their rope_parameters differ)."
            )
