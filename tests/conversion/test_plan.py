"""The plan is total: nothing forgotten, nothing twice, no shape that does not fit. Every option does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_t5gemma.conversion.convert import prepare
from modeling_t5gemma.conversion.options import ConversionOptions, describe_layers, parse_layers
from modeling_t5gemma.conversion.plan import Copied, Drawn
from modeling_t5gemma.conversion.target import expected_tensors
from modeling_t5gemma.errors import UserError
from tests.conversion.tiny import tensors_of


@pytest.fixture
def plan(tmp_path):
    def make(enc: Path, dec: Path | None = None, **options):
        return prepare(ConversionOptions(str(enc), str(dec or enc), tmp_path / "output", **options))

    return make


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "multimodal"])
@pytest.mark.parametrize(
    "options",
    [
        {"cross_attention": "copy"},
        {"cross_attention": "random", "enc_layers": "0,3"},
        {"cross_attention": "partial", "dec_layers": "1-2", "encoder_kv": "mha"},
        {"cross_attention": "layerwise", "share_embeddings": True},
    ],
)
def test_every_tensor_is_accounted_for(family, options, sources, plan):
    prepared = plan(sources(family), **options)
    names = [write.name for write in prepared.plan.writes]
    assert len(names) == len(set(names)) and set(names) == set(expected_tensors(prepared.target.config))
    for side in ("encoder", "decoder"):
        used = {w.origin.name for w in prepared.plan.writes if isinstance(w.origin, Copied) and w.origin.side == side}
        left_out = [left.name for left in prepared.plan.left_out if left.side == side]
        assert not used & set(left_out)
        assert sorted({*used, *left_out}) == sorted(prepared.target.stack(side).source.tensors)
        assert len(left_out) == len(set(left_out))


class TestRefusals:
    def spoil(self, folder: Path, change) -> Path:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"no tensor for layers\.1\.mlp\.up_proj\.weight"),
            (
                lambda t: t.update({"model.layers.1.extra.weight": torch.ones(1)}),
                r"extra\.weight, which no Gemma 2 has",
            ),
            (
                lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}),
                "layers.9.*its config does not",
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(7)}),
                r"norm\.weight as \[7\].*config makes it \[64\]",
            ),
            (lambda t: t.update({"norm.weight": torch.ones(64)}), "for one place"),
            (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}), "q_proj.bias"),
        ],
    )
    def test_a_checkpoint_that_is_not_what_its_config_says(self, change, message, sources, copy_of, plan):
        source = self.spoil(copy_of(sources("gemma2")), change)
        with pytest.raises(UserError, match=message) as error:
            plan(source)
        assert str(source) in str(error.value)

    def test_copying_across_widths(self, sources, plan):
        with pytest.raises(UserError, match=r"copy needs equal widths.*partial or random"):
            plan(sources("gemma2", hidden_size=128), sources("gemma2"), cross_attention="copy")

    def test_layerwise_across_depths(self, sources, plan):
        with pytest.raises(UserError, match="one depth"):
            plan(sources("gemma2", num_hidden_layers=6), sources("gemma2"), cross_attention="layerwise")

    def test_layerwise_across_key_value_heads(self, sources, plan):
        with pytest.raises(UserError, match="num_key_value_heads has to be equal"):
            plan(sources("gemma2"), cross_attention="layerwise", encoder_kv="mha")

    def test_layerwise_without_a_layer_that_is_read(self, sources, plan):
        with pytest.raises(UserError, match="but not everywhere"):
            plan(sources("gemma2"), cross_attention="layerwise", enc_layers="0,2", dec_layers="1,3")

    def test_sharing_across_widths(self, sources, plan):
        with pytest.raises(UserError, match="share_embeddings needs equal"):
            plan(sources("gemma2", hidden_size=128), sources("gemma2"), share_embeddings=True)

    def test_vocabularies_that_differ(self, sources, plan):
        with pytest.raises(UserError, match=r"vocabularies differ.*320 words.*384"):
            plan(sources("gemma2"), sources("gemma2", vocab_size=384))

    def test_a_source_that_is_not_causal(self, sources, plan):
        with pytest.raises(UserError, match="not causal"):
            plan(sources("gemma2", use_bidirectional_attention=True))

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("enc_layers", "0-4", "layers go from 0 to 3"),
            ("dec_layers", "0-99999999999", "layers go from 0 to 3"),
            ("dec_layers", "2,1", "ascending"),
            ("enc_layers", "1,1", "ascending"),
            ("enc_layers", "3-1", "ascending"),
            ("enc_layers", "", "write layers as"),
            ("enc_layers", "-1", "write layers as"),
            ("encoder_attention", "7", "layers go from 0 to 3"),
            ("encoder_attention", "both", "write layers as"),
            ("cross_attention", "copied", "auto, copy, random"),
            ("encoder_kv", "mqa", "gqa, mha"),
            ("dtype", "int8", "auto, float32"),
        ],
    )
    def test_options_out_of_range(self, option, value, message, sources, plan):
        with pytest.raises(UserError, match=message) as error:
            plan(sources("gemma2"), **{option: value})
        assert f"--{option.replace('_', '-')}" in str(error.value)

    def test_key_value_heads_that_do_not_divide(self, sources, copy_of, plan):
        source = copy_of(sources("gemma2"))
        config = config_of(source)
        (source / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
        with pytest.raises(UserError, match="4 attention heads and 3 key/value heads"):
            plan(source)


class TestCrossAttention:
    def test_auto_is_the_papers_rule(self, sources, plan):
        tiny, wide = sources("gemma2"), sources("gemma2", hidden_size=128)
        fewer = sources("gemma2", num_key_value_heads=1)
        assert plan(tiny).target.cross_attention == "copy"
        assert plan(tiny, sources("gemma2", seed=1)).target.cross_attention == "copy"
        for enc in (wide, fewer):
            assert plan(enc, tiny).target.cross_attention == "random"
        assert plan(tiny, enc_layers="0-2").target.cross_attention == "random"

    def test_copy_takes_self_attention_and_the_norms_around_it(self, sources, convert):
        converted = tensors_of(convert(sources("gemma3"), cross_attention="copy"))
        cross = {name: tensor for name, tensor in converted.items() if "cross_attn" in name}
        assert len(cross) == 4 * (4 + 2 + 2)
        for name, tensor in cross.items():
            assert torch.equal(tensor, converted[name.replace("cross_attn", "self_attn")])

    def test_partial_draws_keys_and_values_alone(self, sources, convert):
        converted = tensors_of(convert(sources("gemma2"), cross_attention="partial"))
        for name, tensor in converted.items():
            if "cross_attn" in name:
                is_copy = torch.equal(tensor, converted[name.replace("cross_attn", "self_attn")])
                assert is_copy == (".k_proj." not in name and ".v_proj." not in name), name

    def test_random_has_norms_of_gain_one_and_the_sources_spread(self, sources, plan, convert):
        origins = {w.name: w.origin for w in plan(sources("gemma3"), cross_attention="random").plan.writes}
        assert origins["model.decoder.layers.0.cross_attn.q_proj.weight"] == Drawn(0.5)
        converted = tensors_of(convert(sources("gemma3"), cross_attention="random"))
        norms = [tensor for name, tensor in converted.items() if "cross_attn" in name and "norm" in name]
        assert len(norms) == 4 * 4 and not any(norm.any() for norm in norms)

    def test_layerwise_follows_the_source_layers(self, sources, plan):
        def layer_map(**options):
            config = plan(sources("gemma2"), cross_attention="layerwise", **options).target.config
            return config.cross_attention_map

        assert layer_map() == [0, 1, 2, 3]
        assert layer_map(dec_layers="1,3") == [1, 3]
        assert layer_map(enc_layers="1-3", dec_layers="1-3") == [0, 1, 2]
        # What is not kept is not read.
        assert layer_map(enc_layers="0-2") == [0, 1, 2, None]
        assert layer_map(enc_layers="1-3", dec_layers="0-1") == [None, 0]


class TestStacks:
    def test_a_subset_keeps_its_layers_and_their_kinds(self, sources, convert):
        source = sources("gemma2")
        folder = convert(source, enc_layers="0,2-3", dec_layers="1")
        config = config_of(folder)
        assert config["encoder"]["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
        assert config["decoder"]["layer_types"] == ["full_attention"]
        original, converted = tensors_of(source), tensors_of(folder)
        for side, kept in (("encoder", (0, 2, 3)), ("decoder", (1,))):
            for new, old in enumerate(kept):
                name = "layers.{}.mlp.up_proj.weight"
                assert torch.equal(
                    converted[f"model.{side}.{name.format(new)}"], original[f"model.{name.format(old)}"]
                )

    def test_multi_head_encoder(self, sources, convert):
        source = sources("gemma3")
        folder = convert(source, encoder_kv="mha")
        config = config_of(folder)
        assert config["encoder"]["num_key_value_heads"] == 4 and config["decoder"]["num_key_value_heads"] == 2
        original = tensors_of(source)["model.layers.2.self_attn.v_proj.weight"].view(2, 32, 64)
        repeated = tensors_of(folder)["model.encoder.layers.2.self_attn.v_proj.weight"].view(4, 32, 64)
        assert torch.equal(repeated, original.repeat_interleave(2, dim=0))

    def test_encoder_attention(self, sources, plan):
        def layers(spec, **options):
            return plan(
                sources("gemma3"), encoder_attention=spec, **options
            ).target.config.encoder.bidirectional_layers

        assert layers("bidirectional") == layers("0-3") == "all"
        assert layers("causal") == "none"
        assert layers("1-2") == [1, 2]
        assert layers("1", enc_layers="0,3") == [1]  # the converted encoder's own numbers

    def test_shared_embeddings_are_the_decoders(self, sources, convert):
        enc, dec = sources("gemma2"), sources("gemma2", seed=1)
        folder = convert(enc, dec, share_embeddings=True)
        converted = tensors_of(folder)
        assert "model.decoder.embed_tokens.weight" not in converted  # tied to the encoder's
        expected = tensors_of(dec)["model.embed_tokens.weight"]
        assert torch.equal(converted["model.encoder.embed_tokens.weight"], expected)


class TestDtypeAndShards:
    def test_auto_keeps_the_dtype(self, sources, convert):
        source = sources("gemma2", dtype=torch.bfloat16)
        folder = convert(source, cross_attention="random")
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.bfloat16}
        assert config_of(folder)["dtype"] == "bfloat16"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_change_is_torchs_own(self, dtype, sources, convert):
        source = sources("gemma2", dtype=torch.bfloat16 if dtype == "float32" else torch.float32)
        folder = convert(source, dtype=dtype)
        wanted = getattr(torch, dtype)
        expected = tensors_of(source)["model.embed_tokens.weight"].to(wanted)
        assert torch.equal(tensors_of(folder)["model.encoder.embed_tokens.weight"], expected)
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {wanted}

    def test_mixed_dtypes_stay_and_lie_aligned(self, sources, copy_of, convert):
        source = copy_of(sources("gemma2"))
        tensors = load_file(source / "model.safetensors")
        mixed = {n: t if n.endswith("norm.weight") else t.bfloat16() for n, t in tensors.items()}
        save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
        folder = convert(source)
        assert tensors_of(folder)["model.encoder.norm.weight"].dtype == torch.float32
        assert config_of(folder)["dtype"] == "bfloat16"

    def test_shards_have_an_index_and_hold_everything_once(self, sources, convert):
        whole = tensors_of(convert(sources("gemma2"), output="whole"))
        folder = convert(sources("gemma2"), output="parts", max_shard_size="300KB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 3 and not (folder / "model.safetensors").exists()
        for name, file in index["weight_map"].items():
            assert torch.equal(load_file(folder / file)[name], whole[name])
        assert set(index["weight_map"]) == set(whole)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())

    def test_a_sharded_source(self, sources, convert, tmp_path):
        from transformers import Gemma2ForCausalLM

        source = tmp_path / "shards"
        Gemma2ForCausalLM.from_pretrained(sources("gemma2")).save_pretrained(source, max_shard_size="200KB")
        assert len(list(source.glob("*.safetensors"))) > 2
        whole = tensors_of(convert(sources("gemma2"), output="whole"))
        parts = tensors_of(convert(source, output="parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_a_size_that_is_none(self, sources, convert, tmp_path):
        with pytest.raises(UserError, match="--max-shard-size is 'big'"):
            convert(sources("gemma2"), max_shard_size="big")
        assert not list(tmp_path.iterdir())


class TestSeed:
    def test_a_seed_decides_what_is_drawn(self, sources, convert):
        runs = [
            tensors_of(convert(sources("gemma2"), output=f"run{i}", cross_attention="random", seed=seed))
            for i, seed in enumerate((0, 0, 1))
        ]
        name = "model.decoder.layers.0.cross_attn.q_proj.weight"
        assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
        assert not torch.equal(runs[0][name], runs[2][name])

    def test_a_tensors_values_do_not_depend_on_the_others(self, sources, convert):
        """The same layer of the same name, whether all of cross-attention is drawn or a half."""
        name = "model.decoder.layers.2.cross_attn.k_proj.weight"
        random = tensors_of(convert(sources("gemma2"), output="a", cross_attention="random"))
        partial = tensors_of(convert(sources("gemma2"), output="b", cross_attention="partial"))
        assert torch.equal(random[name], partial[name])
        other = random["model.decoder.layers.3.cross_attn.k_proj.weight"]
        assert not torch.equal(random[name], other)


def test_layer_lists_read_back_as_they_were_written():
    assert parse_layers("--x", "0-2,5,7-8", 9) == [0, 1, 2, 5, 7, 8]
    assert parse_layers("--x", None, 3) == [0, 1, 2]
    for numbers in ([0], [0, 1, 2, 5], [3, 5, 7]):
        assert parse_layers("--x", describe_layers(numbers), 9) == numbers
