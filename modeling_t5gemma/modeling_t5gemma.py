"""The models: encoder-decoder, encoder alone, and their heads.

Shapes: B batch, T target length, S source length, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from .cross_attention import kind_of
from .labels import without_start
from .layers import ClassificationHead, LMHead
from .losses import Target, cross_entropy, linear_loss, token_losses
from .stacks import T5GemmaDecoder, T5GemmaEncoder, T5GemmaPreTrainedModel, real_tokens


class T5GemmaModel(T5GemmaPreTrainedModel):
    """Encoder and decoder, without a head."""

    def __init__(self, config: T5GemmaConfig) -> None:
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError(
                f"{type(self).__name__} needs is_encoder_decoder=True in its config; the encoder alone is "
                "T5GemmaEncoderModel."
            )
        self.encoder = T5GemmaEncoder(config.encoder)
        self.decoder = T5GemmaDecoder(config.decoder)
        if config.share_embeddings:
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Encode, unless ``encoder_outputs`` (or a tuple that begins with the hidden states) are given, and decode.

        Arguments as in the two stacks.

        Raises:
            ValueError: there is nothing to decode.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "An encoder-decoder needs decoder_input_ids or decoder_inputs_embeds. The encoder alone is "
                "AutoModelForTextEncoding's, and modeling_t5gemma.embeddings.sentence_transformer(checkpoint) for "
                "sentence-transformers."
            )
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                segment_ids=segment_ids,
                return_dict=True,
                **flags,
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_outputs=encoder_outputs,
            encoder_attention_mask=attention_mask,
            segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
            return_dict=True,
            **flags,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class T5GemmaEncoderModel(T5GemmaPreTrainedModel):
    """The encoder alone; loads from a full checkpoint as well as from its own."""

    _keys_to_ignore_on_load_unexpected = [r"(^|\.)decoder\.", r"^lm_head\.", r"^score\."]  # noqa: RUF012

    def __init__(self, config: T5GemmaConfig) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = False
        super().__init__(config)
        self.encoder = T5GemmaEncoder(config.encoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As ``T5GemmaEncoder``."""
        return self.encoder(input_ids=input_ids, **kwargs)


@dataclass
class T5GemmaLMOutput(Seq2SeqLMOutput):
    """Attributes:
    logits: (B, T, V), or None where a loss was computed without them.
    cross_entropy, distillation: what a loss computed without logits consists of, scalars without a graph.
    token_losses: float32 (B, T), each label's cross-entropy in nats, 0 where ignored.
    """

    cross_entropy: torch.Tensor | None = None
    distillation: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


class T5GemmaForConditionalGeneration(T5GemmaPreTrainedModel, GenerationMixin):
    """The encoder-decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head.out_proj": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: T5GemmaConfig) -> None:
        if not config.is_encoder_decoder:
            config = copy.deepcopy(config)
            config.is_encoder_decoder = True
        super().__init__(config)
        self.model = T5GemmaModel(config)
        self.lm_head = LMHead(config.decoder)
        if config.share_embeddings:
            self._tied_weights_keys = {"lm_head.out_proj.weight": "model.encoder.embed_tokens.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.out_proj

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head.out_proj = value

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """``generate`` asks for dense masks before a compiled step; the decoder builds what it needs itself."""
        return attention_mask

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. The encoder computes and keeps what the decoder reads, unless its states are asked for
        or ``source_only=False``."""
        # The steps of a static cache may be compiled, and a graph has no values to tell what is left out by.
        source_only = kwargs.get("cache_implementation") != "static"
        return super().generate(*args, **{"source_only": source_only, **kwargs})

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        target: Target | None = None,
        return_logits: bool | None = None,
        return_token_losses: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> T5GemmaLMOutput:
        """Logits, and the loss when labels are given.

        In training, a loss comes straight from the hidden states and there are no logits: at 256,000 words they would
        be most of the memory.

        Args:
            labels: int64 (B, T), -100 where ignored. Decoder inputs are made from them unless given.
            logits_to_keep: compute logits for the last so many positions only, or for these indices; 0 for all.
            num_items_in_batch: the number of labels in the whole accumulated batch.
            target: what a teacher thinks of the labels, to distil from.
            return_logits: whether to return logits; by default unless labels are given in training mode.
            return_token_losses: return each label's loss, and neither logits nor their mean.
            temperature: divides the logits of token losses.
            others: as in ``T5GemmaModel``.

        Raises:
            ValueError: a target or token losses without labels, or beside a head that is not one plain matrix (with an
                adapter, quantised or sharded).
        """
        if labels is not None and decoder_inputs_embeds is None:
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            pad = self.config.decoder.pad_token_id
            labels = without_start(labels, decoder_input_ids, self.decoder_start_token_id(), pad)
        if use_cache is None:
            # Teacher forcing has nothing to continue, and a cache would cost the padding mask of the target.
            use_cache = labels is None and not self.training and self.config.decoder.use_cache
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        head = self._plain_head()
        needs_head = target is not None or return_token_losses
        if needs_head and (labels is None or head is None):
            raise ValueError(
                "A distillation target and token losses need labels, and a language-model head that is one matrix: "
                "without an adapter on it, not quantised and not sharded outside of this model's forward."
            )
        if return_logits is None:
            return_logits = labels is None or not (self.training or return_token_losses)
        results: dict[str, Any] = {}
        if return_logits or head is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            results["logits"] = self.lm_head(hidden[:, kept])
        if labels is None:
            return T5GemmaLMOutput(**results, **_passed_on(outputs))
        if head is None:
            results["loss"] = cross_entropy(results["logits"], labels, num_items_in_batch)
        elif return_token_losses:
            results["token_losses"] = token_losses(hidden, head, labels, self.lm_head.softcap, temperature)
        elif "logits" not in results or target is not None:
            loss = linear_loss(
                hidden,
                head,
                labels,
                softcap=self.lm_head.softcap,
                target=target,
                num_items_in_batch=num_items_in_batch,
            )
            results |= {"loss": loss.total, "cross_entropy": loss.cross_entropy, "distillation": loss.distillation}
        else:
            results["loss"] = cross_entropy(results["logits"], labels, num_items_in_batch)
        return T5GemmaLMOutput(**results, **_passed_on(outputs))

    def _plain_head(self) -> torch.Tensor | None:
        """The head's weight (V, D) where the head is that and nothing more: not under an adapter, quantisation or
        tensor parallelism, whose modules have to be called."""
        module = self.lm_head.out_proj
        plain = type(module) is nn.Linear and not isinstance(module.weight, DTensor)
        return module.weight if plain and len(module.weight) == self.config.decoder.vocab_size else None


def _passed_on(outputs: Seq2SeqModelOutput) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


@dataclass
class _Read:
    """What a head reads.

    Attributes:
        hidden: (B, T, D), the final states of the stack that it reads.
        real: bool (B, T), which tokens are no padding; None when nothing says that any is.
        more: hidden_states and attentions, as an output has them.
    """

    hidden: torch.Tensor
    real: torch.Tensor | None
    more: dict[str, Any]

    def pooled(self, pooling: str) -> torch.Tensor:
        """The last real token's state or the mean over the real ones, (B, D), wherever the padding is."""
        batch, length, _ = self.hidden.shape
        real = self.hidden.new_ones(batch, length) if self.real is None else self.real.to(self.hidden)
        if pooling == "mean":
            return (self.hidden * (real / real.sum(1, keepdim=True).clamp(min=1))[..., None]).sum(1)
        index = torch.arange(length, device=real.device)
        last = torch.where(real.bool(), index, 0).argmax(dim=1)
        return self.hidden[torch.arange(batch, device=real.device), last]


class _Classifier(T5GemmaPreTrainedModel):
    """A classification head on the encoder, or on the decoder when the model is an encoder-decoder.

    Raises:
        ValueError: a pooling that stock T5Gemma would ignore.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012
    _num_scores: int | None = None  # num_labels

    def __init__(self, config: T5GemmaConfig, is_encoder_decoder: bool | None = None) -> None:
        if isinstance(config, T5GemmaConfig) and config.classifier_pooling != T5GemmaConfig.classifier_pooling:
            raise ValueError(
                f"T5Gemma reads the last token, and stock transformers would ignore classifier_pooling="
                f"{config.classifier_pooling!r}: AdaptedSeq2SeqConfig.from_t5gemma(config, classifier_pooling=...) "
                "represents it."
            )
        if is_encoder_decoder is not None and is_encoder_decoder != config.is_encoder_decoder:
            config = copy.deepcopy(config)
            config.is_encoder_decoder = is_encoder_decoder
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.is_encoder_decoder:
            self.model: T5GemmaPreTrainedModel = T5GemmaModel(config)
            width = config.decoder.hidden_size
        else:
            self.model = T5GemmaEncoderModel(config)
            width = config.encoder.hidden_size
            self._keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"(^|\.)decoder\."]
        self.score = ClassificationHead(width, self._num_scores or config.num_labels, config.classifier_dropout_rate)
        self.post_init()

    def read(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
        whole: bool = True,
    ) -> _Read:
        """Run the stacks. An encoder-decoder reads its input in the decoder as well, behind the start token.

        Args:
            whole: whether the decoder reads the last token too; left out, a place of its output is one of the input.
        """
        kwargs = {**kwargs, "return_dict": True}
        real = real_tokens(attention_mask, None, input_ids, self.config.encoder.pad_token_id)
        if not self.config.is_encoder_decoder:
            outputs = self.model(input_ids, attention_mask=real, **kwargs)
            more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
            return _Read(outputs.last_hidden_state, real, more)
        if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
            if input_ids is None:
                raise ValueError(
                    "An encoder-decoder classifier reads its input in the decoder too: give input_ids, or "
                    "decoder_input_ids or decoder_inputs_embeds beside inputs_embeds."
                )
            decoder_input_ids, decoder_attention_mask = self._behind_start(input_ids, real, whole)
        outputs = self.model(
            input_ids,
            attention_mask=real,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            use_cache=False,
            **kwargs,
        )
        real = real_tokens(decoder_attention_mask, None, decoder_input_ids, self.config.decoder.pad_token_id)
        more = {"hidden_states": outputs.decoder_hidden_states, "attentions": outputs.decoder_attentions}
        return _Read(outputs.last_hidden_state, real, more)

    def _behind_start(
        self, ids: torch.Tensor, real: torch.Tensor | None, whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder reads of an input (B, S): the start token stands right before each row's first real one,
        so that nothing depends on the padding that a batch has; int64 and bool (B, S + 1), or (B, S) if not whole."""
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        start, first = self.decoder_start_token_id(), real.long().argmax(dim=1, keepdim=True)
        begins = torch.ones_like(first, dtype=torch.bool)
        if whole and kind_of(self.config).continues:
            begins = ids.gather(1, first) != start  # such a source may begin with it by itself
        ids = torch.cat([torch.full_like(first, start), ids], dim=1).scatter(1, first, start)
        real = torch.cat([torch.zeros_like(begins), real], dim=1).scatter(1, first, begins)
        length = ids.shape[1] - (not whole)
        return ids[:, :length], real[:, :length]


class T5GemmaForSequenceClassification(_Classifier):
    """One label a sequence, read off its last real token (the paper's SuperGLUE head)."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores (B, labels), and the loss when labels (B,) are given.

        The tokens are found by the mask, wherever the padding is and whether tokens or embeddings came in.
        """
        read = self.read(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, kwargs)
        scores = self.score(read.pooled(self.config.classifier_pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=scores, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return SequenceClassifierOutput(loss=loss, logits=scores, **read.more)


class T5GemmaForTokenClassification(_Classifier):
    """One label a token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Scores (B, T, labels), and the loss when labels (B, T) are given."""
        read = self.read(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, kwargs, whole=False)
        scores = self.score(read.hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(scores, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=scores, **read.more)


class T5GemmaForMultipleChoice(_Classifier):
    """One of several texts: each gets a score of its own, from one projection, and the softmax is over them."""

    _num_scores = 1

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Scores (B, choices), and the loss when labels (B,) are given.

        Every other tensor is (B, choices, ...): tokens, masks, embeddings, those for the decoder.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        choices = next(iter(tensors.values())).shape[1]
        flat = {**given, **{name: value.flatten(0, 1) for name, value in tensors.items()}}
        ids, mask, decoder_ids, decoder_mask = (
            flat.pop(name, None)
            for name in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        )
        read = self.read(ids, mask, decoder_ids, decoder_mask, flat)
        scores = self.score(read.pooled(self.config.classifier_pooling)).view(-1, choices)
        loss = None if labels is None else cross_entropy(scores, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(loss=loss, logits=scores, **read.more)


class T5GemmaForQuestionAnswering(_Classifier):
    """Where in the input an answer begins and ends. Places are the encoder's, so the encoder alone reads them."""

    _num_scores = 2

    def __init__(self, config: T5GemmaConfig) -> None:
        super().__init__(config, is_encoder_decoder=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Scores of every token as first and as last of the answer, (B, S) each, lowest where it is padding; the loss
        when positions (B,) are given, S or more for an answer that is not in the input."""
        read = self.read(input_ids, attention_mask, None, None, kwargs)
        start, end = self.score(read.hidden).unbind(-1)
        if read.real is not None:
            lowest = torch.finfo(start.dtype).min
            start, end = (each.masked_fill(~read.real.to(each.device), lowest) for each in (start, end))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                start, end, start_positions, end_positions, num_items_in_batch=num_items_in_batch
            )
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **read.more)


class AdaptedSeq2SeqPreTrainedModel(T5GemmaPreTrainedModel):
    """The same models under a config that represents more families."""

    config_class = AdaptedSeq2SeqConfig


class AdaptedSeq2SeqModel(T5GemmaModel):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModel"


class AdaptedSeq2SeqEncoderModel(T5GemmaEncoderModel):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForTextEncoding"


class AdaptedSeq2SeqForConditionalGeneration(T5GemmaForConditionalGeneration):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForSeq2SeqLM"


class AdaptedSeq2SeqForSequenceClassification(T5GemmaForSequenceClassification):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForSequenceClassification"


class AdaptedSeq2SeqForTokenClassification(T5GemmaForTokenClassification):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForTokenClassification"


class AdaptedSeq2SeqForMultipleChoice(T5GemmaForMultipleChoice):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForMultipleChoice"


class AdaptedSeq2SeqForQuestionAnswering(T5GemmaForQuestionAnswering):
    config_class = AdaptedSeq2SeqConfig
    _auto_class = "AutoModelForQuestionAnswering"
