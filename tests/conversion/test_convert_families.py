"""Each family through the whole converter: the right names, the right bytes, a checkpoint that every loader takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5GemmaForConditionalGeneration,
)

from modeling_t5gemma.conversion.target import expected_tensors
from modeling_t5gemma.errors import UserError
from tests.conversion.tiny import VOCABULARY, tensors_of

FAMILIES = ("gemma", "gemma2", "gemma3")
# What a layer's tensors become: the one name that differs between families is the reason for having families.
NORMS = {
    "gemma": {
        "input_layernorm": "pre_self_attn_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
    },
    "gemma2": {
        "input_layernorm": "pre_self_attn_layernorm",
        "post_attention_layernorm": "post_self_attn_layernorm",
    },
}
NORMS["gemma3"] = NORMS["gemma2"]


def renamed(family: str, name: str, side: str) -> str:
    for old, new in NORMS[family].items():
        name = name.replace(f".{old}.", f".{new}.")
    return name.replace("model.", f"model.{side}.", 1)


def load(folder: Path):
    import modeling_t5gemma  # noqa: F401  # registers the classes

    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model).__module__ == "modeling_t5gemma.modeling_t5gemma"
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stacks_are_the_source(family, sources, convert):
    source = sources(family)
    converted = tensors_of(convert(source))
    for name, tensor in tensors_of(source).items():
        for side in ("encoder", "decoder"):
            assert torch.equal(converted.pop(renamed(family, name, side)), tensor), name
    assert all("cross_attn" in name for name in converted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cross_attention", ["copy", "random", "partial", "layerwise"])
def test_the_model_classes_load_it_whole(family, cross_attention, sources, convert):
    model = load(convert(sources(family), cross_attention=cross_attention))
    ids = torch.tensor([[5, 9, 270, 271]])
    with torch.no_grad():
        assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_and_causal_it_is_the_source(family, sources, convert):
    """Encoder: the first tokens; decoder: those from there on. Untrained, the logits are the source's."""
    source = AutoModelForCausalLM.from_pretrained(sources(family), attn_implementation="eager").eval()
    model = load(convert(sources(family), cross_attention="layerwise", encoder_attention="causal")).eval()
    ids = torch.randint(7, 300, (2, 24))
    with torch.no_grad():
        expected = source(input_ids=ids).logits[:, 11:]
        logits = model(input_ids=ids[:, :11], decoder_input_ids=ids[:, 11:]).logits
    # One rounding error in the embeddings moves these logits by up to 7e-5.
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-4)


def test_gemma2_gives_stock_t5gemma(sources, convert):
    """Loaded where this package is not: the built-in class takes every tensor."""
    folder = convert(sources("gemma2"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "t5gemma"
    assert not list(folder.glob("*.py"))
    model, info = T5GemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.tensor([[5, 9, 270, 271]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits
        logits = load(folder)(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma", {}),
        ("gemma3", {}),
        ("gemma2", {"cross_attention": "layerwise"}),
        ("gemma2", {"encoder_attention": "causal"}),
        ("gemma2", {"encoder_attention": "1-2"}),
        ("gemma2", {"share_embeddings": True}),
    ],
)
def test_what_stock_cannot_represent_has_its_own_model_type(family, options, sources, convert):
    folder = convert(sources(family), **options)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "adapted_seq2seq"
    assert config["architectures"] == ["AdaptedSeq2SeqForConditionalGeneration"]
    assert (folder / "modeling_t5gemma.py").exists() and (folder / "configuration_t5gemma.py").exists()
    load(folder)


def test_the_code_that_travels_along_is_enough(sources, convert, tmp_path):
    """In a process that cannot import this package."""
    folder = convert(sources("gemma3"), cross_attention="layerwise")
    script = (
        "import sys; sys.modules['modeling_t5gemma'] = None\n"
        "import transformers\n"
        f"model = transformers.AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "assert tokenizer.padding_side == 'right'\n"
        "ids = tokenizer('the', return_tensors='pt').input_ids\n"
        "assert ids[0, 0] == tokenizer.bos_token_id\n"
        "print(type(model).__name__, model(input_ids=ids, decoder_input_ids=ids).logits.shape[-1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split()[-2:] == ["AdaptedSeq2SeqForConditionalGeneration", "320"], done.stderr[-2000:]


def test_a_multimodal_gemma3_leaves_its_vision_tower_behind(sources, convert):
    source = sources("multimodal")
    assert any("vision_tower" in name for name in tensors_of(source))
    folder = convert(source)
    left_out = json.loads((folder / "conversion.json").read_text())["left_out"]
    assert {entry["reason"] for entry in left_out} >= {"vision tower", "projection of images"}
    load(folder)


def test_encoder_and_decoder_of_two_sizes(sources, convert):
    """9b-2b in small: cross-attention takes the encoder's width, and nothing could be copied into it."""
    large = sources("gemma2", hidden_size=128, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    folder = convert(large, sources("gemma2"))
    converted = tensors_of(folder)
    assert converted["model.decoder.layers.0.cross_attn.k_proj.weight"].shape == (64, 128)
    assert converted["model.decoder.layers.0.pre_cross_attn_layernorm.weight"].abs().max() == 0
    drawn = converted["model.decoder.layers.3.cross_attn.o_proj.weight"]
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05)
    load(folder)


def test_two_families_in_one_model(sources, convert):
    load(convert(sources("gemma2"), sources("gemma3")))


@pytest.mark.parametrize("other", [True, False])
def test_a_head_that_a_config_says_is_tied(other, sources, copy_of, convert):
    """Merging an adapter can leave one that differs: the tensors are believed, as transformers does."""
    source = copy_of(sources("gemma3"))
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + (0.02 if other else 0)
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    folder = convert(source, cross_attention="layerwise")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not other
    kept = tensors_of(folder).get("lm_head.out_proj.weight")
    assert torch.equal(kept, head) if other else kept is None


def test_an_untied_head_is_kept(sources, convert):
    source = sources("gemma2", tie_word_embeddings=False)
    folder = convert(source)
    assert torch.equal(tensors_of(folder)["lm_head.out_proj.weight"], tensors_of(source)["lm_head.weight"])
    load(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"cross_attention": "layerwise"}, {"share_embeddings": True}])
def test_expected_tensors_are_the_model_classes_own(family, options, sources, convert):
    """The names and shapes that the plan goes by, against the state dict of the classes on the meta device."""
    model = load(convert(sources(family), **options))
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert expected_tensors(model.config) == shapes


class TestFilesBeside:
    @pytest.mark.parametrize(("how", "begins"), [("copy", False), ("layerwise", True)])
    def test_the_tokenizer_says_what_begins_and_pads_a_text(self, how, begins, sources, convert):
        """In the files alone: a class that knows nothing of this package reads them so."""
        source, folder = sources("gemma3"), convert(sources("gemma3"), cross_attention=how)
        original = AutoTokenizer.from_pretrained(source)
        for cls in (AutoTokenizer, PreTrainedTokenizerFast):
            tokenizer = cls.from_pretrained(folder)
            rows = tokenizer(["the cat", "a"], padding=True)
            expected = [
                [2] * begins + ids for ids in original(["the cat", "a"], add_special_tokens=False)["input_ids"]
            ]
            padding = len(expected[0]) - len(expected[1])
            assert rows["input_ids"] == [expected[0], [*expected[1], *[0] * padding]]
            assert set(rows) == {"input_ids", "attention_mask"}
            assert tokenizer.get_vocab() == original.get_vocab()
            assert tokenizer.special_tokens_map == original.special_tokens_map
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Seq2SeqTokenizer"

    @pytest.mark.parametrize("how", ["copy", "layerwise"])
    def test_a_template_writes_bos_where_sources_begin_with_it(self, how, sources, convert, copy_of):
        source = copy_of(sources("gemma2"))
        (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
        tokenizer = AutoTokenizer.from_pretrained(convert(source, cross_attention=how))
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])["input_ids"]
        assert ids == tokenizer("the cat")["input_ids"]

    def test_no_text_becomes_a_word_without_an_embedding(self, sources, convert, copy_of):
        """As Gemma 3's last word, <image_soft_token>. It keeps its id, and whoever spells it writes characters."""
        source = copy_of(sources("gemma3", vocab_size=len(VOCABULARY)))
        original = AutoTokenizer.from_pretrained(source)
        original.add_special_tokens({"extra_special_tokens": ["<image>"]})
        original.save_pretrained(source)
        config = json.loads((source / "tokenizer_config.json").read_text())
        config["image_token"], config["added_tokens_decoder"] = "<image>", {len(VOCABULARY): {"content": "<image>"}}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        assert len(VOCABULARY) in original("<image>")["input_ids"]
        folder = convert(source)
        for cls in (AutoTokenizer, PreTrainedTokenizerFast):
            tokenizer = cls.from_pretrained(folder)
            ids = tokenizer("the <image>")["input_ids"]
            assert max(ids) < len(VOCABULARY) and tokenizer.decode(ids) == "the <image>"
            assert tokenizer.get_vocab() == original.get_vocab()

    def test_a_tokenizer_without_a_config_gets_its_tokens_names(self, sources, convert, copy_of):
        source = copy_of(sources("gemma3"))
        (source / "tokenizer_config.json").unlink()
        tokenizer = AutoTokenizer.from_pretrained(convert(source, cross_attention="layerwise"))
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
        assert tokenizer("a")["input_ids"][0] == 2

    def test_a_damaged_tokenizer_is_refused(self, sources, convert, copy_of):
        source = copy_of(sources("gemma3"))
        (source / "tokenizer.json").write_text('{"added_tokens": [')
        with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer that can be read"):
            convert(source)

    def test_generation_starts_with_bos_and_keeps_the_ends(self, sources, convert):
        config = GenerationConfig.from_pretrained(convert(sources("gemma2")))
        assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (2, [1, 6], 0)
        assert not config.do_sample

    def test_a_chat_template_ends_its_turns(self, sources, convert, copy_of):
        source = copy_of(sources("gemma2"))
        (source / "generation_config.json").unlink()
        (source / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}<end_of_turn>\n")
        end = VOCABULARY.index("<end_of_turn>")
        assert GenerationConfig.from_pretrained(convert(source)).eos_token_id == [1, end]

    def test_notice_terms_and_card(self, sources, convert, copy_of):
        source = copy_of(sources("gemma2"))
        (source / "GEMMA_TERMS.html").write_text("the terms")
        folder = convert(source)
        notice = (folder / "NOTICE").read_text()
        assert notice.startswith(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
        )
        assert "modified" in notice
        assert (folder / "GEMMA_TERMS.html").read_text() == "the terms"
        card = (folder / "README.md").read_text()
        assert "license: gemma" in card and "GEMMA_TERMS.html" in card and "{{" not in card

    def test_without_a_copy_of_the_terms_their_place_is_told(self, sources, convert):
        assert "https://ai.google.dev/gemma/terms" in (convert(sources("gemma2")) / "GEMMA_TERMS.md").read_text()

    def test_no_tokenizer_no_tokenizer_files(self, sources, convert):
        assert not list(convert(sources("gemma2", tokenizer=False)).glob("tokenizer*"))


class TestVerify:
    def test_it_passes(self, sources, convert):
        load(convert(sources("gemma3"), cross_attention="layerwise", verify=True))

    def test_a_checkpoint_that_fails_never_appears(self, sources, convert, monkeypatch, tmp_path):
        """And the message names the folder that was asked for, not the one that was written to."""
        from modeling_t5gemma.io import tensors

        read = tensors.SafetensorsTensor.rows
        monkeypatch.setattr(tensors.SafetensorsTensor, "rows", lambda *at: read(*at).roll(1, dims=0))
        with pytest.raises(UserError, match=r"/converted does not compute what"):
            convert(sources("gemma3"), encoder_kv="mha", cross_attention="copy", verify=True)
        assert not list(tmp_path.iterdir())
