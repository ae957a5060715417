"""Everything the Auto classes reach is ours, from full checkpoints, encoders alone and remote code."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)
from transformers import (
    T5GemmaEncoderModel as StockEncoder,
)

import modeling_t5gemma as m
from tests.tiny import gemma3, layerwise, t5gemma, tokens, word_tokenizer

AUTO_CLASSES = [
    (AutoModel, "Model"),
    (AutoModelForSeq2SeqLM, "ForConditionalGeneration"),
    (AutoModelForSequenceClassification, "ForSequenceClassification"),
    (AutoModelForTokenClassification, "ForTokenClassification"),
    (AutoModelForTextEncoding, "EncoderModel"),
]


@pytest.fixture(scope="module", params=["T5Gemma", "AdaptedSeq2Seq"])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    model = t5gemma() if request.param == "T5Gemma" else layerwise(gemma3(), bidirectional_layers="all")
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.mark.parametrize(("auto", "head"), AUTO_CLASSES)
def test_every_auto_class_loads_ours(checkpoint, auto, head):
    prefix, _, folder = checkpoint
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__ == "modeling_t5gemma.modeling_t5gemma"
    assert type(model).__name__ == prefix + head
    assert type(AutoConfig.from_pretrained(folder)).__module__ == "modeling_t5gemma.configuration_t5gemma"
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert {key.split(".")[0] for key in report["missing_keys"]} <= {"score"}
    assert type(auto.from_config(model.config)) is type(model)


@torch.no_grad()
def test_encoder_alone_from_a_full_checkpoint(checkpoint, tmp_path, caplog):
    prefix, full, folder = checkpoint
    cls = getattr(m, f"{prefix}EncoderModel")
    encoder = cls.from_pretrained(folder).eval()
    assert "decoder" not in caplog.text
    ids = tokens(2, 9)
    expected = full.get_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected)
    encoder.save_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), AutoModelForTextEncoding.from_pretrained(tmp_path)):
        torch.testing.assert_close(again.eval()(ids).last_hidden_state, expected)
    if prefix == "T5Gemma":
        stock = StockEncoder.from_pretrained(tmp_path, attn_implementation="eager").eval()
        torch.testing.assert_close(stock(ids).last_hidden_state, expected, atol=3e-5, rtol=0)


def test_stock_registration_does_not_shadow_ours():
    """Imported after transformers has already loaded its own T5Gemma."""
    code = """
        from transformers import T5GemmaForConditionalGeneration, AutoModelForSeq2SeqLM, AutoConfig
        import modeling_t5gemma as m
        config = AutoConfig.for_model("t5gemma")
        assert isinstance(config, m.T5GemmaConfig)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_an_adapted_checkpoint_loads_where_the_package_is_absent(tmp_path):
    """The code files travel with the checkpoint; another process without the package runs them."""
    torch.manual_seed(0)
    model = layerwise(gemma3(), bidirectional_layers="all")
    model.save_pretrained(tmp_path / "checkpoint")
    ids = tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    code = f"""
        import sys, torch
        sys.path = [p for p in sys.path if p not in ("", {str(os.getcwd())!r})]
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name == "modeling_t5gemma":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        from transformers import AutoModelForSeq2SeqLM, AutoModelForTextEncoding
        folder = {str(tmp_path / "checkpoint")!r}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules")
        assert model.generate(torch.tensor({ids.tolist()}), max_new_tokens=5, do_sample=False).tolist() == {expected}
        AutoModelForTextEncoding.from_pretrained(folder, trust_remote_code=True)
        model.save_pretrained({str(tmp_path / "again")!r})
        AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
        try:
            AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            pass
        else:
            raise AssertionError("a stock loader read a model type it does not know")
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_remote_code_and_the_package_live_side_by_side(tmp_path):
    """The same code imported a second time, as it is with trust_remote_code=True and the package installed."""
    model = layerwise(gemma3())
    model.save_pretrained(tmp_path)
    code = f"""
        import modeling_t5gemma, torch
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        name = "modeling_t5gemma.AdaptedSeq2SeqForConditionalGeneration"
        cls = get_class_from_dynamic_module(name, {str(tmp_path)!r})
        ours = modeling_t5gemma.AdaptedSeq2SeqForConditionalGeneration.from_pretrained({str(tmp_path)!r})
        ids = torch.arange(3, 12)[None]
        assert cls is not type(ours)
        a = cls.from_pretrained({str(tmp_path)!r})(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(a, ours(input_ids=ids, decoder_input_ids=ids).logits)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.needs("sentence_transformers")
@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_sentence_transformers_on_top(tmp_path, pooling):
    from sentence_transformers import SentenceTransformer

    from modeling_t5gemma.embeddings import sentence_transformer

    texts = ["w5 w6 w7", "w8 w9"]
    words = word_tokenizer()
    for model, begin in ((t5gemma(), ""), (layerwise(gemma3(), bidirectional_layers="all"), "<bos> ")):
        batch = words([begin + text for text in texts], return_tensors="pt", padding=True)
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        sentences = sentence_transformer(str(folder), pooling=pooling, device="cpu")
        hidden = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        mask = batch["attention_mask"][..., None]
        mean, last = (hidden * mask).sum(1) / mask.sum(1), hidden[[0, 1], mask[..., 0].sum(1) - 1]
        expected = mean if pooling == "mean" else last
        torch.testing.assert_close(sentences.encode(texts, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
        sentences.save(str(folder / "saved"))
        again = SentenceTransformer(str(folder / "saved"), device="cpu", trust_remote_code=True)
        torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
