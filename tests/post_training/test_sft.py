"""Fine-tuning on tiny models: what is computed, that it survives, and that adapters come off again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3ForCausalLM, Seq2SeqTrainingArguments
from transformers import T5GemmaForConditionalGeneration as StockT5Gemma
from typer.testing import CliRunner

from modeling_t5gemma.commands.merge import merge
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.adapters import load_adapter
from modeling_t5gemma.post_training.adapters import add_adapter
from modeling_t5gemma.post_training.decoder_only import collate_answers, give_answer_losses
from modeling_t5gemma.post_training.generated_metrics import score
from modeling_t5gemma.post_training.settings import (
    AnswerDataSettings,
    EvaluationSettings,
    LoraSettings,
    RecordsSettings,
    SftSettings,
    TuningSettings,
)
from modeling_t5gemma.post_training.sft import DecoderOnlySftTrainer, SftTrainer
from modeling_t5gemma.post_training.sft_run import make_trainer
from modeling_t5gemma.training.checkpoints import find
from modeling_t5gemma.training.loading import layout_of
from modeling_t5gemma.training.settings import DistillationSettings, ModelSettings
from tests import tiny
from tests.post_training.chat import SIZE, chat_tokenizer, words, write

KINDS = ["separate", "layerwise", "decoder-only"]
COMMAND = typer.Typer()
COMMAND.command()(merge)
STACK = {**tiny.BALANCED, "vocab_size": SIZE}


def tiny_model(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    if kind == "separate":
        return tiny.t5gemma(STACK, STACK)
    source = tiny.gemma3(vocab_size=SIZE)
    return source if kind == "decoder-only" else tiny.layerwise(source, bidirectional_layers="all")


def saved(folder: Path, kind: str, seed: int = 0) -> str:
    if not folder.exists():
        tiny_model(kind, seed).save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
        (folder / "NOTICE").write_text("of the base")
    return str(folder)


def make(
    folder: Path,
    kind: str = "separate",
    *,
    records: list[dict] | None = None,
    held_out: int = 0,
    pack: tuple[int, int] | None = None,
    block: int = 16,
    teacher: str | None = None,
    lora: LoraSettings | None = None,
    tuning: TuningSettings | None = None,
    generate: int = 0,
    output: str = "out",
    model: str | None = None,
    data: dict | None = None,
    **training,
):
    """The trainer of a run of examples/sft.py on a tiny model."""
    torch.manual_seed(0)
    path = write(folder / "records.jsonl", words(24) if records is None else records)
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2}
    return make_trainer(
        SftSettings(
            ModelSettings(model or saved(folder / kind, kind), teacher=teacher, teacher_dtype="float32"),
            AnswerDataSettings(
                RecordsSettings(path),
                **{
                    "held_out": held_out,
                    "max_source": 40,
                    "max_target": 12,
                    "pack": pack,
                    "block": block,
                    **(data or {}),
                },
            ),
            Seq2SeqTrainingArguments(
                output_dir=str(folder / output),
                logging_steps=1,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **{**defaults, **training},
            ),
            DistillationSettings(share=0.5),
            tuning or TuningSettings(),
            EvaluationSettings(generate=generate, samples=1, max_new_tokens=5),
            lora,
        )
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Size]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_neither_losses_nor_gradients(tmp_path, kind):
    records = words(6)
    common = dict(records=records, block=6, max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    plain = make(tmp_path, kind, output="plain", per_device_train_batch_size=6, **common)
    packed = make(tmp_path, kind, output="packed", pack=(6 * 41, 6 * 12), per_device_train_batch_size=1, **common)
    for trainer in (plain, packed):
        trainer.train()
    assert losses(plain) == pytest.approx(losses(packed), rel=1e-5)
    for (name, a), b in zip(plain.model.named_parameters(), packed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_a_decoder_only_model_learns_its_answers_as_transformers_computes_it(tmp_path):
    trainer = make(tmp_path, "decoder-only", records=words(3), per_device_train_batch_size=3)
    model, tokenizer = tiny_model("decoder-only").train(), chat_tokenizer()
    examples = [row[0] for row in next(iter(trainer._batches(0).rows)).rows]
    layout = layout_of(model, tokenizer)
    expected = []
    for example in examples:
        ids = torch.tensor([[2, *example.source, *example.target]])
        labels = ids.clone()
        labels[:, : 1 + len(example.source)] = -100
        expected.append(model(input_ids=ids, labels=labels).loss * len(example.target))
    total = sum(expected) / sum(len(example.target) for example in examples)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    give_answer_losses(model)
    found = model(**collate_answers([[each] for each in examples], layout, packed=False)).loss
    found.backward()
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], SIZE)


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("separate", None),
        ("decoder-only", None),
        ("layerwise", LoraSettings(rank=2)),
        ("decoder-only", LoraSettings(rank=2, dropout=0.1)),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, kind, lora):
    def build(output):
        return make(tmp_path, kind, lora=lora, output=output, pack=(90, 30), max_steps=5)

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(_StopAfter(3))
    first.train()
    assert find(tmp_path / "parts").last.name == "checkpoint-2"
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    for (name, a), b in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b[1]) and a.requires_grad == b[1].requires_grad, name


def test_a_checkpoint_of_an_adapter_holds_it_alone(tmp_path):
    trainer = make(tmp_path, lora=LoraSettings(rank=2), max_steps=2)
    trainer.train()
    with safe_open(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118
    assert not list((tmp_path / "out").rglob("model*.safetensors"))
    assert 0 < sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) < 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_computes_the_same_without_peft(tmp_path, kind):
    trainer = make(tmp_path, kind, lora=LoraSettings(rank=4), learning_rate=2e-2)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-6"
    result = CliRunner().invoke(COMMAND, [str(folder), "--output", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "merged") == weights(tmp_path / kind)
    lost = CliRunner().invoke(COMMAND, [str(folder), "--output", str(tmp_path / kind), "--overwrite"])
    assert isinstance(lost.exception, UserError) and "which would be lost" in str(lost.exception)
    assert (tmp_path / "merged" / "NOTICE").read_text() == "of the base"
    ids = tiny.tokens(2, 9)
    inputs = {"input_ids": ids} if kind == "decoder-only" else {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    stock = {"separate": StockT5Gemma, "decoder-only": Gemma3ForCausalLM, "layerwise": AutoModelForSeq2SeqLM}[kind]
    merged = stock.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    base = type(merged).from_pretrained(tmp_path / kind).eval()
    assert merged.config.tie_word_embeddings and merged.generation_config.eos_token_id == [1, 6]
    with torch.no_grad():
        wanted = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-4)
        assert (base(**inputs).logits - wanted).abs().max() > 1e-2


def test_an_adapter_of_another_base_is_refused(tmp_path):
    make(tmp_path, lora=LoraSettings(rank=2), max_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    others = {
        "weights": tiny_model("separate", seed=1),
        "layers": tiny.t5gemma({**STACK, "num_hidden_layers": 2}, STACK),
        "family": tiny_model("layerwise"),
    }
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
        run = [str(folder), "--base", str(tmp_path / name), "--output", str(tmp_path / "merged")]
        error = CliRunner().invoke(COMMAND, run).exception
        assert isinstance(error, UserError) and "trained on another model" in str(error), error
        assert str(tmp_path / "separate") in str(error) and not (tmp_path / "merged").exists()
    (folder / "base.json").unlink()  # as of an adapter that was not trained here
    for name in ("layers", "family"):
        with pytest.raises(UserError, match="does not fit"):
            load_adapter(others[name], folder)
    with pytest.raises(UserError, match="no adapter"):
        load_adapter(others["weights"], tmp_path)


def test_an_adapter_keeps_frozen_what_is_frozen(tmp_path):
    trainer = make(tmp_path, "layerwise", lora=LoraSettings(rank=2), tuning=TuningSettings(frozen=["encoder"]))
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and ".decoder." in name for name in trained)
    with pytest.raises(UserError, match="adapter cannot be made"):
        add_adapter(tiny_model("separate"), LoraSettings(targets="nothing"))


@pytest.mark.parametrize("kind", ["layerwise", "decoder-only"])
def test_it_learns_and_its_answers_are_measured(tmp_path, kind):
    trainer = make(
        tmp_path,
        kind,
        records=words(400),
        held_out=10,
        generate=10,
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=40,
        eval_on_start=True,
        save_steps=1000,
        lr_scheduler_type="constant",
    )
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(measured) == 2
    assert measured[-1]["eval_loss"] < 0.5 * measured[0]["eval_loss"]
    assert measured[-1]["eval_loss_wrong"] > measured[-1]["eval_loss"]
    assert measured[0]["eval_exact_match"] < 20 < measured[-1]["eval_exact_match"]
    assert {"eval_rouge1", "eval_rougeL", "eval_bleu", "eval_chrf"} <= set(measured[-1])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert any("eval_exact_match" in entry for entry in summary["log"])


def test_scores_are_those_of_the_texts():
    same = score(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert list(same.values()) == pytest.approx([100] * 6)
    found = score(["the dog", "a b c d"], ["the cat", "a b c d"])
    assert found["exact_match"] == 50 and found["rouge1"] == pytest.approx(75) and found["rouge2"] == 50
    assert 0 < found["bleu"] < 100 and 0 < found["chrf"] < 100
    assert set(score([""], ["a"]).values()) == {0.0}


def test_a_teacher_is_followed(tmp_path):
    trainer = make(tmp_path, teacher=saved(tmp_path / "decoder-only", "decoder-only"), max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(0.5 * entry["cross_entropy"] + 0.5 * entry["distillation"], rel=1e-4)


def test_epochs_become_steps(tmp_path):
    trainer = make(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5)
    assert trainer.args.max_steps == 10  # 48 of 24 examples
    assert isinstance(trainer, SftTrainer)
    assert isinstance(make(tmp_path, "decoder-only", output="other"), DecoderOnlySftTrainer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pack": (30, 12)}, "packed row has 30 and 12"),
        ({"data": {"max_source": 300}}, "was made for 256"),
        ({"data": {"eval": RecordsSettings("x")}, "held_out": 2}, "not both"),
        ({"data": {"chat_template": "nowhere.jinja"}}, "nowhere.jinja cannot be read"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "at least two held-out"),
        ({"kind": "decoder-only", "teacher": "x"}, "is decoder-only"),
        ({"teacher": "separate"}, r"The teacher .*separate is an encoder-decoder \(t5gemma\), .* is decoder-only"),
        ({"generate": -1}, "evaluation.generate .-1. and samples"),
        ({"records": [{"text": "a"}]}, "It has 'text'"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_told(tmp_path, changes, message):
    if changes.get("teacher") == "separate":
        changes = {"teacher": saved(tmp_path / "separate", "separate")}
    with pytest.raises(UserError, match=message):
        make(tmp_path, **changes)


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["separate", "decoder-only"])
def test_four_bit_weights_stay_and_their_adapter_merges_into_the_base(tmp_path, kind):
    trainer = make(tmp_path, kind, lora=LoraSettings(rank=2, four_bit=True), learning_rate=2e-2)
    assert any(type(p).__name__ == "Params4bit" for p in trainer.model.parameters())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    run = [str(tmp_path / "out" / "checkpoint-6"), "--output", str(tmp_path / "merged")]
    result = CliRunner().invoke(COMMAND, run)
    assert result.exit_code == 0, (result.output, result.exception)
    auto = AutoModelForCausalLM if kind == "decoder-only" else AutoModelForSeq2SeqLM
    auto.from_pretrained(tmp_path / "merged")


class _StopAfter:
    def __new__(cls, step):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    control.should_training_stop = True

        return Callback()
