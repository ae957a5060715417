"""What users do with a PreTrainedModel: caches, LoRA, compiling, exporting, dtypes, device maps, pipelines."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

import modeling_t5gemma as m
from modeling_t5gemma.losses import cross_entropy
from tests.tiny import BALANCED, NARROW, VOCAB, gemma3, layerwise, t5gemma, tokens, word_tokenizer

MAKE = {
    "separate": lambda **changes: t5gemma({**BALANCED, **changes}, {**BALANCED, **changes}),
    "layerwise": lambda **changes: layerwise(gemma3(**changes), bidirectional_layers="all"),
}


@pytest.fixture(params=MAKE)
def model(request):
    return MAKE[request.param]()


@pytest.fixture(params=MAKE)
def small(request):
    """A layer of each kind: compiling takes seconds a layer."""
    return MAKE[request.param](num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@torch.no_grad()
def test_cache_keeps_the_whole_input_and_a_window_of_the_target(model):
    """A separate cross-attention's cache never inherits the decoder's sliding layers, whoever made the cache; a
    layerwise one's keeps there what the first target token reads."""
    decoder = model.config.decoder
    window = decoder.sliding_window
    ids, target = tokens(1, 3 * window), tokens(1, 2 * window)
    expected = model(input_ids=ids, decoder_input_ids=target, use_cache=False).logits
    caches = {
        "none": None,
        "sliding on both sides": EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder)),
        "static": EncoderDecoderCache(
            StaticCache(config=decoder, max_cache_len=3 * window),
            StaticCache(config=decoder, max_cache_len=3 * window),
        ),
    }
    for cache in caches.values():
        encoded = model.get_encoder()(input_ids=ids)
        steps = []
        for t in range(target.shape[1]):
            out = model(
                encoder_outputs=encoded, decoder_input_ids=target[:, t : t + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=0)
        kept = {"full_attention": 3 * window, "sliding_attention": 3 * window}
        if model.config.decoder.cross_attention_type == "layerwise":
            kept["sliding_attention"] = window - 1
        held = [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers]
        assert held == [kept[kind] for kind in decoder.layer_types]
        for kind, layer in zip(decoder.layer_types, cache.self_attention_cache.layers, strict=True):
            assert kind == "full_attention" or layer.keys.shape[2] <= window


@torch.no_grad()
def test_cross_attention_is_computed_once(model):
    encoded = model.get_encoder()(input_ids=tokens(1, 9))
    out = model(encoder_outputs=encoded, decoder_input_ids=tokens(1, 1), use_cache=True)
    before = [layer.keys.clone() for layer in out.past_key_values.cross_attention_cache.layers]
    encoded.last_hidden_state.zero_()
    model(encoder_outputs=encoded, decoder_input_ids=tokens(1, 1), past_key_values=out.past_key_values, use_cache=True)
    for kept, layer in zip(before, out.past_key_values.cross_attention_cache.layers, strict=True):
        assert torch.equal(kept, layer.keys)


def test_a_cache_of_the_wrong_kind_is_refused(model):
    with pytest.raises(TypeError, match="EncoderDecoderCache"):
        model(input_ids=tokens(1, 4), decoder_input_ids=tokens(1, 2), past_key_values=DynamicCache())


@pytest.mark.gpu
@torch.no_grad()
def test_offloaded_cache(model):
    model = model.cuda()
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    ids = tokens(2, 12).cuda()
    offloaded = model.generate(ids, cache_implementation="offloaded", **common)
    assert torch.equal(offloaded, model.generate(ids, **common))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    batch = {"input_ids": tokens(2, 12), "labels": tokens(2, 6, seed=1)}
    model.train()
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], atol=1e-5, rtol=1e-4)


def test_num_items_in_batch_makes_accumulation_exact(model):
    model.train()
    ids, labels = tokens(4, 9), tokens(4, 8, seed=1)
    labels[0, 2:] = labels[1, 5:] = -100
    whole = model(input_ids=ids, labels=labels).loss
    count = (labels != -100).sum()
    halves = [
        model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_cross_entropy_drops_ignored_rows_and_survives_having_none():
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    labels = torch.randint(0, VOCAB, (2, 5))
    labels[0, 1:4] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    nothing = cross_entropy(logits, torch.full_like(labels, -100))
    assert nothing == 0
    nothing.backward()
    assert logits.grad.abs().sum() == 0


@pytest.mark.needs("peft")
def test_lora_has_default_targets_and_merges(model):
    from peft import get_peft_model

    from modeling_t5gemma.lora import lora_config

    batch = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6, seed=1)}
    model_before = model(**batch).logits.detach()
    tuned = get_peft_model(model, lora_config(r=4, lora_alpha=1, init_lora_weights=False)).eval()
    adapted = [name for name, _ in tuned.named_modules() if name.endswith("lora_A")]
    stacks = {name.split(".layers.")[0].rsplit(".", 1)[-1] for name in adapted}
    assert stacks == {"encoder", "decoder"}
    assert sum("cross_attn" in name for name in adapted) == (
        16 if model.config.cross_attention_type == "separate" else 0
    )
    with torch.no_grad():
        expected = tuned(**batch).logits
        assert not torch.allclose(expected, model_before, atol=1e-3)
        assert tuned.generate(input_ids=tokens(1, 9), max_new_tokens=3).shape[0] == 1
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=0)
    assert isinstance(merged, m.T5GemmaForConditionalGeneration)


def test_the_tensor_parallel_plan_includes_cross_attention():
    plan = t5gemma().tp_plan
    for stack in ("encoder", "decoder"):
        assert plan[f"model.{stack}.layers.*.self_attn.q_proj"] == "colwise"
    for projection, style in zip("qkvo", ("colwise", "colwise", "colwise", "rowwise"), strict=True):
        assert plan[f"model.decoder.layers.*.cross_attn.{projection}_proj"] == style
    assert plan["lm_head.out_proj"] == "colwise_gather_output"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    batch = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6, seed=1)}
    got, expected = loaded(**batch).logits.float(), model(**batch).logits
    assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > 0.98


@pytest.mark.needs("accelerate")
@torch.no_grad()
def test_device_map(model, tmp_path):
    model.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map=device_map)
        common = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(
            loaded.generate(tokens(1, 9).to(loaded.device), **common).cpu(), model.generate(tokens(1, 9), **common)
        )


@torch.no_grad()
def test_compile(small):
    batch = {"input_ids": tokens(2, 12), "decoder_input_ids": tokens(2, 6, seed=1), "use_cache": False}
    expected = small(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_export_of_encoder_and_decoder(small):
    ids, target = tokens(2, 12), tokens(2, 6, seed=1)
    encoder = small.get_encoder()
    mask = torch.ones_like(ids)
    expected = encoder(input_ids=ids, attention_mask=mask)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(
        encoder,
        (),
        {"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": {1: length}, "attention_mask": {1: length}},
    )
    got = exported.module()(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got["last_hidden_state"], expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    longer = tokens(2, 30)
    got = exported.module()(input_ids=longer, attention_mask=torch.ones_like(longer))
    torch.testing.assert_close(
        got["last_hidden_state"], encoder(input_ids=longer).last_hidden_state, atol=1e-4, rtol=1e-4
    )

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small

        def forward(self, encoder_outputs, attention_mask, decoder_input_ids):
            return self.model(
                encoder_outputs=encoder_outputs,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            ).logits

    step = torch.export.export(Step(), (expected, mask, target))
    reference = small(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(step.module()(expected, mask, target), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generate_compiles_its_steps_with_a_static_cache(small):
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = small.generate(tokens(2, 9), **common)
    torch._dynamo.reset()
    small.forward = torch.compile(small.forward, backend="eager", fullgraph=True)
    got = small.generate(tokens(2, 9), cache_implementation="static", **common)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_pipeline(model, tmp_path):
    words = word_tokenizer()
    from transformers import pipeline

    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    write = pipeline("seq2seq-generation", model=str(tmp_path))
    assert type(write.model).__module__ == "modeling_t5gemma.modeling_t5gemma"
    texts = ["w5 w6 w7 w8", "w9 w4"]
    results = write(texts, max_new_tokens=6, do_sample=False)
    begin = "<bos>" if model.config.decoder.cross_attention_type == "layerwise" else ""
    batch = words(begin + texts[1], return_tensors="pt")
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert results[1] == [{"generated_text": words.decode(expected[0], skip_special_tokens=True)}]


def test_unbalanced_stacks_train():
    model = t5gemma(BALANCED, NARROW).train()
    model(input_ids=tokens(2, 9), labels=tokens(2, 6)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
