"""Adapters on embeddings and head, which are one matrix in the base."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_t5gemma.commands.merge import merge
from tests import tiny
from tests.post_training.chat import SIZE, chat_tokenizer

SHALLOW = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "vocab_size": SIZE}
HEAD, ENCODER, DECODER = "lm_head.out_proj", "model.encoder.embed_tokens", "model.decoder.embed_tokens"
# What an adapter is put on, and how many matrices head and embeddings then are in a merged model: where the head was
# its stack's embedding, and where all three were one.
ADAPTED = {
    "head": (dict(target_modules=rf".*q_proj|{HEAD}"), 3, 3),
    "decoder": (dict(target_modules=rf".*q_proj|{DECODER}"), 3, 3),
    "encoder": (dict(target_modules=rf".*q_proj|{ENCODER}"), 2, 2),
    "stacks": (dict(target_modules=["embed_tokens"]), 3, 3),
    "head saved": (dict(target_modules=["q_proj"], modules_to_save=[HEAD]), 3, 3),
    "encoder saved": (dict(target_modules=["q_proj"], modules_to_save=[ENCODER]), 2, 2),
    "words": (dict(target_modules=["q_proj"], trainable_token_indices={DECODER: [5, 6]}), 3, 3),
    "neither": (dict(target_modules=["q_proj"]), 2, 1),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints whose head is the decoder's embedding, and the encoder's too, and a decoder-only one."""
    stack = {**tiny.BALANCED, **SHALLOW}
    models = {
        "head": tiny.t5gemma(stack, stack),
        "all": tiny.layerwise(tiny.gemma3(**SHALLOW), share_embeddings=True),
        "decoder-only": tiny.gemma3(**SHALLOW),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        chat_tokenizer().save_pretrained(folder / name)
    return {name: (folder / name, type(model)) for name, model in models.items()}


def merge_what_is_stirred(base, cls, folder, inputs, **how):
    """An adapter of random weights, merged by the command: the same logits as the adapter's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word")
        tuned = get_peft_model(cls.from_pretrained(base), LoraConfig(**how)).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    merged = cls.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        wanted = tuned(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-4)
    return merged


@pytest.mark.parametrize("tied", ["head", "all"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_an_adapter_on_one_of_tied_matrices_changes_that_one(tmp_path, bases, adapted, tied):
    how, *matrices = ADAPTED[adapted]
    ids = tiny.tokens(2, 7)
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}
    merged = merge_what_is_stirred(*bases[tied], tmp_path, inputs, task_type="SEQ_2_SEQ_LM", **how)
    found = {merged.get_parameter(f"{name}.weight").data_ptr() for name in (HEAD, DECODER, ENCODER)}
    assert len(found) == matrices[tied == "all"]


def test_the_head_of_a_decoder_only_model_leaves_its_embedding(tmp_path, bases):
    inputs = {"input_ids": tiny.tokens(2, 7), "use_cache": False}
    how = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "lm_head"]}
    merged = merge_what_is_stirred(*bases["decoder-only"], tmp_path, inputs, **how)
    assert not merged.config.tie_word_embeddings
