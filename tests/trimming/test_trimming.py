"""Vocabularies trimmed to texts: the tokenizer, the rows, and every id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import modeling_t5gemma as m
from modeling_t5gemma.cli import app
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import tensors
from modeling_t5gemma.objectives import load_sentinels, save_sentinels, sentinels_of
from modeling_t5gemma.post_training.rendering import Renderer
from modeling_t5gemma.publishing.validation import validate
from modeling_t5gemma.training.loading import load_teacher, load_whole
from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.trimming.byte_pairs import BytePairs
from modeling_t5gemma.trimming.token_ids import renumber
from modeling_t5gemma.trimming.trim import Trimmed, TrimOptions, trim
from tests import tiny
from tests.conversion.tiny import tensors_of, tiny_model
from tests.post_training.chat import assistant, user
from tests.trimming.vocabularies import DATA, KINDS, OTHER, SENTINELS, gemma


def pairs_of(tokenizer: Any) -> BytePairs:
    return BytePairs(json.loads(tokenizer.backend_tokenizer.to_str()), "it")


def ids(tokenizer: Any, *words: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


def save(folder: Path, model: Any, tokenizer: Any, **generation: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation:
        GenerationConfig(**generation).save_pretrained(folder)
    return folder


def named(tokenizer: Any) -> dict[str, Any]:
    """The ids that a config names."""
    ends = ids(tokenizer, "<eos>", "<end_of_turn>")
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if "<end_of_turn>" in tokenizer.get_vocab() else tokenizer.eos_token_id,
    }


@pytest.fixture
def data(tmp_path: Path) -> TextSource:
    rows = [{"text": text} for text in DATA] + [{"text": [user("say the cat"), assistant("the cat")]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(str(tmp_path / "data.jsonl"))


@pytest.fixture
def run(tmp_path: Path, data: TextSource) -> Callable[..., tuple[Path, Trimmed]]:
    """``run(checkpoint, **options)``: where the trimmed checkpoint is, and what was done."""

    def made(checkpoint: Path, name: str = "trimmed", **options: Any) -> tuple[Path, Trimmed]:
        options.setdefault("texts", (data,))
        return tmp_path / name, trim(TrimOptions(str(checkpoint), tmp_path / name, **options))

    return made


@pytest.fixture(scope="module")
def decoder_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 whose tokenizer has one token more than the model has rows."""
    tokenizer = gemma()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image_soft_token>"]}, replace_extra_special_tokens=False
    )
    model = tiny_model("gemma3", vocab_size=len(tokenizer) - 1, **named(tokenizer))
    folder = save(tmp_path_factory.mktemp("source"), model, tokenizer)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size + 1
    return folder


# The tokenizer


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, None) for kind in KINDS), ("gemma", 320), ("llama", 285), ("qwen", 270)]
)
def test_texts_keep_their_tokens_and_others_can_be_read_back(kind, size, tmp_path, run):
    tokenizer = KINDS[kind]()
    model = tiny_model("gemma", vocab_size=len(tokenizer) + 5, num_hidden_layers=1, **named(tokenizer))
    folder, done = run(save(tmp_path / "source", model, tokenizer), size=size, verify=False)
    before, after = AutoTokenizer.from_pretrained(tmp_path / "source"), AutoTokenizer.from_pretrained(folder)
    assert len(after) == done.kept == (size or done.kept) and done.kept < len(before)
    assert size or (done.kept % 64 == 0 or done.kept == len(before))
    there = set(after.get_vocab())
    for text in DATA:
        if size is None:
            assert after.tokenize(text) == before.tokenize(text)
        else:
            assert not there.issuperset(before.tokenize(text)) or after.tokenize(text) == before.tokenize(text)
    assert not size or any(after.tokenize(text) != before.tokenize(text) for text in DATA)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.text(max_size=40), st.text("the cdog sat\n\n ", max_size=60), st.sampled_from(OTHER)))
    def reads_back(text: str) -> None:
        old, new = before(text, add_special_tokens=False).input_ids, after(text, add_special_tokens=False).input_ids
        assert after.decode(new) == before.decode(old)
        words = before.convert_ids_to_tokens(old)
        assert not there.issuperset(words) or after.convert_ids_to_tokens(new) == words

    reads_back()
    ids_of = {word: index for word, index in before.get_vocab().items() if word in there}
    assert sorted(ids_of, key=ids_of.__getitem__) == sorted(there, key=after.get_vocab().__getitem__)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_to_stay_stays(kind, tmp_path, run):
    """Special, control and byte tokens, sentinels, what the template writes: also where the texts hardly need any."""
    tokenizer = KINDS[kind]()
    model = tiny_model("gemma", vocab_size=len(tokenizer), num_hidden_layers=1, **named(tokenizer))
    (tmp_path / "one.txt").write_text("a")
    source = save(tmp_path / "source", model, tokenizer)
    folder, _ = run(source, texts=(TextSource(str(tmp_path / "one.txt")),), verify=False)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map
    words = {token.content for token in before.added_tokens_decoder.values()}
    assert {token.content for token in after.added_tokens_decoder.values()} == words
    assert all(
        str(token) == str(after.added_tokens_decoder[index]) for index, token in after.added_tokens_decoder.items()
    )
    if kind != "qwen":
        found, kept = sentinels_of(before.get_vocab()), sentinels_of(after.get_vocab())
        assert after.convert_ids_to_tokens(kept) == before.convert_ids_to_tokens(found) == SENTINELS
    if kind == "gemma":
        assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(after.get_vocab())
        turn = [Renderer(each, max_source=40, max_target=40).target([assistant("a")]) for each in (before, after)]
        assert after.convert_ids_to_tokens(turn[1]) == before.convert_ids_to_tokens(turn[0])
        ends = [Renderer(each, max_source=40, max_target=40).ends() for each in (before, after)]
        assert after.convert_ids_to_tokens(ends[1]) == before.convert_ids_to_tokens(ends[0])
    assert after("a").input_ids == [
        after.convert_tokens_to_ids(w) for w in before.convert_ids_to_tokens(before("a").input_ids)
    ]


def test_the_most_frequent_tokens_are_closed():
    """Without merges on the way to a token, none leads there; a word that none leads to needs none."""
    for kind in ("gemma", "llama"):
        pairs = pairs_of(KINDS[kind]())
        tokenizer = KINDS[kind]()
        watched = tokenizer.tokenize(DATA[0])
        closed = pairs.closed(ids(tokenizer, *watched))
        assert closed == pairs.closed(closed)
        for index in closed:
            halves = pairs.halves(tokenizer.convert_ids_to_tokens(index))
            assert halves is None or {pairs.ids[half] for half in halves} <= closed
        assert pairs.halves("ing") is not None
    assert pairs.halves("Zyxt") is None


def test_only_byte_pairs_that_have_bytes(tmp_path):
    from tokenizers import Tokenizer, models

    for model, told in (
        (models.WordLevel({"a": 0}, unk_token="a"), "is WordLevel"),
        (models.BPE({"a": 0}, []), "no token for each byte"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "with affixes"),
    ):
        with pytest.raises(UserError, match=told):
            BytePairs(json.loads(Tokenizer(model).to_str()), "it")


# The model


def pair(kind: str, tokenizer: Any, cls: str = "ForConditionalGeneration", **changes: Any) -> Any:
    stack = {k: v for k, v in tiny.BALANCED.items() if "softcapping" not in k} | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        **named(tokenizer),
    }
    if kind == "t5gemma":
        stack["attn_logit_softcapping"] = 5.0
        config: Any = m.T5GemmaConfig(encoder=dict(stack), decoder=dict(stack), **named(tokenizer), **changes)
    else:
        config = m.AdaptedSeq2SeqConfig(encoder=dict(stack), decoder=dict(stack), **changes)
    return tiny.stir(getattr(m, f"{'T5Gemma' if kind == 't5gemma' else 'AdaptedSeq2Seq'}{cls}")(config))


@pytest.mark.parametrize(
    ("kind", "cls", "changes"),
    [
        ("t5gemma", "ForConditionalGeneration", {}),
        ("t5gemma", "ForConditionalGeneration", {"tie_word_embeddings": False}),
        ("adapted", "ForConditionalGeneration", {"cross_attention_type": "layerwise", "share_embeddings": True}),
        ("adapted", "ForSequenceClassification", {}),
        ("t5gemma", "ForMultipleChoice", {}),
        ("adapted", "EncoderModel", {}),
        ("adapted", "Model", {}),
    ],
)
def test_a_pair_computes_what_it_did(kind, cls, changes, tmp_path, run, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 4000)  # of the rows of an embedding, a part at a time
    tokenizer = gemma()
    model = pair(kind, tokenizer, cls, **changes)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="100KB")
    tokenizer.save_pretrained(source)
    folder, done = run(source)
    assert done.difference is not None and done.difference < 1e-6
    old, new = tensors_of(source), tensors_of(folder)
    assert old.keys() == new.keys()
    kept = json.loads((folder / "kept_ids.json").read_text())
    for name, tensor in old.items():
        rows = tensor[kept] if len(tensor) == len(tokenizer) else tensor
        assert torch.equal(new[name], rows), name
    config = json.loads((folder / "config.json").read_text())
    sizes = [config.get("vocab_size", done.kept), *(config[side]["vocab_size"] for side in ("encoder", "decoder"))]
    assert sizes == [done.kept] * 3


def test_a_wrong_row_is_found(decoder_only, tmp_path, run, monkeypatch):
    from modeling_t5gemma.trimming import trim as module

    def wrong(name: str, tensor: Any, kept: list[int]) -> Any:
        return write(name, tensor, [*kept[:-40], *(index - 1 for index in kept[-40:])])

    write = module._to_write
    monkeypatch.setattr(module, "_to_write", wrong)
    with pytest.raises(UserError, match="does not compute what"):
        run(decoder_only)
    assert not (tmp_path / "trimmed").exists()


def test_a_token_without_a_row_is_left_out(decoder_only, run):
    folder, done = run(decoder_only)
    after = AutoTokenizer.from_pretrained(folder)
    assert done.dropped == ("<image_soft_token>",) and "<image_soft_token>" not in after.get_vocab()
    assert len(after) == load_whole(str(folder)).config.vocab_size == done.kept
    assert after.decode(after("<image_soft_token>", add_special_tokens=False).input_ids) == "<image_soft_token>"


def test_every_id_is_renumbered(tmp_path, run):
    tokenizer = gemma()
    cat, dog, unused = ids(tokenizer, "▁cat", "▁do", "<unused9>")
    turn = ids(tokenizer, "<end_of_turn>")[0]
    source = save(
        tmp_path / "source",
        pair("adapted", tokenizer),
        tokenizer,
        decoder_start_token_id=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=[1, turn],
        suppress_tokens=[cat],
        bad_words_ids=[[cat, dog]],
        sequence_bias=[[[dog], -1.0]],
        forced_eos_token_id=1,
    )
    save_sentinels(source, ids(tokenizer, *reversed(SENTINELS)))
    (source / "run.json").write_text(
        json.dumps({"model": {"path": "x"}, "recipe": {"sentinels": [unused], "mode_tokens": {"R": unused}}})
    )
    (source / "NOTICE").write_text("terms")
    (source / "README.md").write_text("# Card")
    (source / "tokenizer.model").write_bytes(b"of the whole vocabulary")
    (source / "checkpoint-5").mkdir()
    folder, done = run(source, sentinels=4, held_out=(TextSource(str(tmp_path / "data.jsonl")),))
    after = AutoTokenizer.from_pretrained(folder)
    cat, dog, unused = ids(after, "▁cat", "▁do", "<unused9>")
    made = json.loads((folder / "generation_config.json").read_text())
    assert made["eos_token_id"] == ids(after, "<eos>", "<end_of_turn>") and made["suppress_tokens"] == [cat]
    assert made["bad_words_ids"] == [[cat, dog]] and made["sequence_bias"] == [[[dog], -1.0]]
    assert load_sentinels(folder) == tuple(ids(after, *reversed(SENTINELS)))  # which the checkpoint was trained with
    recipe = json.loads((folder / "run.json").read_text())["recipe"]
    assert recipe == {"sentinels": [unused], "mode_tokens": {"R": unused}}
    config = json.loads((folder / "config.json").read_text())
    assert config["decoder"]["eos_token_id"] == ids(after, "<eos>", "<end_of_turn>")
    assert not (folder / "tokenizer.model").exists() and not (folder / "checkpoint-5").exists()
    assert (folder / "NOTICE").read_text().startswith("terms\n\n") and f"{done.kept:,} of" in (
        folder / "NOTICE"
    ).read_text()
    assert (folder / "README.md").read_text().startswith("# Card\n\n## Vocabulary")
    assert done.held_out is not None and done.held_out.changed == 0 and done.held_out.longer == 0


def test_ids_of_other_forms():
    document = {
        "forced_decoder_ids": [[1, 5]],
        "text_config": {"image_token_index": 6, "mm_tokens_per_image": 6},
        "added_tokens_decoder": {"7": {"content": "x"}},
        "pad_token_id": None,
        "pad_token_type_id": 0,
        "max_new_tokens": 9,
        "begin_suppress_tokens": [5, 6],
    }
    assert renumber(document, lambda key, index: index + 100) == {
        "forced_decoder_ids": [[1, 105]],
        "text_config": {"image_token_index": 106, "mm_tokens_per_image": 6},
        "added_tokens_decoder": {"107": {"content": "x"}},
        "pad_token_id": None,
        "pad_token_type_id": 0,
        "max_new_tokens": 9,
        "begin_suppress_tokens": [105, 106],
    }


def test_sentinels_that_nothing_names_can_go(decoder_only, run):
    folder, _ = run(decoder_only, sentinels=4)
    assert {word for word in AutoTokenizer.from_pretrained(folder).get_vocab() if "unused" in word} == {*SENTINELS[:4]}


# Students and teachers


def test_a_teacher_is_trimmed_like_its_student(decoder_only, tmp_path, run):
    tokenizer = AutoTokenizer.from_pretrained(decoder_only)
    student, done = run(decoder_only, "student", size=400)
    again, like = run(decoder_only, "teacher", texts=(), like=student)
    assert (student / "kept_ids.json").read_bytes() == (again / "kept_ids.json").read_bytes()
    from modeling_t5gemma.training.settings import DistillationSettings, ModelSettings

    settings_ = ModelSettings(path=str(student), teacher=str(again), dtype="float32", teacher_dtype="float32")
    assert load_teacher(settings_, DistillationSettings(), None) is not None
    assert like.kept == done.kept and like.difference == 0

    with pytest.raises(UserError, match="another vocabulary"):
        run(again, "other", texts=(), like=student)
    with pytest.raises(UserError, match="was not trimmed"):
        run(decoder_only, "other", texts=(), like=decoder_only)
    del tokenizer


def test_ids_lead_back_through_two_trimmings(decoder_only, run):
    first, _ = run(decoder_only, "first", size=700)
    second, _ = run(first, "second", size=350)
    before, after = AutoTokenizer.from_pretrained(decoder_only), AutoTokenizer.from_pretrained(second)
    kept = json.loads((second / "kept_ids.json").read_text())
    assert after.convert_ids_to_tokens(list(range(len(after)))) == before.convert_ids_to_tokens(kept)
    assert (
        json.loads((second / "trim.json").read_text())["vocabulary"]
        == json.loads((first / "trim.json").read_text())["vocabulary"]
    )
    teacher, _ = run(decoder_only, "teacher", texts=(), like=second)
    assert torch.equal(
        tensors_of(teacher)["model.embed_tokens.weight"], tensors_of(second)["model.embed_tokens.weight"]
    )


# The command


def test_the_command_and_what_comes_after_it(tmp_path, data):
    """Sizes and changes are told; the result generates, fills masks and is fit to be published."""
    tokenizer = gemma()
    source = save(tmp_path / "source", pair("t5gemma", tokenizer).bfloat16(), tokenizer, decoder_start_token_id=2)
    (tmp_path / "other.txt").write_text("\n".join(OTHER))
    command = [
        "trim",
        str(source),
        "--text",
        data.path,
        "--size",
        "450",
        "--quiet",
        "--output",
        str(tmp_path / "small"),
    ]
    result = CliRunner().invoke(app, [*command, "--held-out", str(tmp_path / "other.txt")])
    assert result.exit_code == 0, result.output
    assert (
        "450 of " in result.output and "Of the held-out text, " in result.output and "Of the texts, " in result.output
    )
    small = str(tmp_path / "small")
    assert validate(tmp_path / "small").config.decoder.vocab_size == 450
    for words in (["generate", small, "--max-new-tokens", "4"], ["inspect", small]):
        result = CliRunner().invoke(app, words, input="the cat")
        assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["fill", small, "the [MASK] sat", "--max-new-tokens", "4"]).exit_code in (0, 1)
    assert AutoModelForSeq2SeqLM.from_pretrained(small).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 100}, "tokens have to stay"),
        ({"size": 10**6}, "and there are"),
        ({"texts": ()}, "Give --text"),
        ({"checkpoint": "nowhere/at-all"}, "not in the cache|Hub"),
    ],
)
def test_what_cannot_be_done_is_told(options, told, decoder_only, tmp_path, data):
    given = {"checkpoint": str(decoder_only), "output": tmp_path / "out", "texts": (data,), "verify": False, **options}
    with pytest.raises(UserError, match=told):
        trim(TrimOptions(**given))
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_be_trimmed(tmp_path, run):
    tokenizer = gemma()
    source = save(tmp_path / "source", pair("adapted", tokenizer), tokenizer, suppress_tokens=[10**5])
    with pytest.raises(UserError, match="suppress_tokens 100000, and the embedding has rows for 0 to"):
        run(source)
    (source / "generation_config.json").unlink()
    stack = {**tiny.BALANCED, "vocab_size": len(tokenizer), **named(tokenizer)}
    two = m.T5GemmaConfig(encoder={**stack, "vocab_size": 400}, decoder=stack)
    save(tmp_path / "two", m.T5GemmaForConditionalGeneration(two), tokenizer)
    with pytest.raises(UserError, match="several vocabularies"):
        run(tmp_path / "two")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        run(source)
