"""Settings that cannot be meant."""

from __future__ import annotations

import pytest
from transformers import Seq2SeqTrainingArguments

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.adapters import add_adapter
from modeling_t5gemma.post_training.settings import AnswerDataSettings, LoraSettings, RecordsSettings, SftSettings
from modeling_t5gemma.training.checks import check_arguments, check_settings, check_yaml
from modeling_t5gemma.training.settings import ModelSettings
from tests import tiny
from tests.training.test_trainer import make


def arguments(**given) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments("out", **{"use_cpu": True, "report_to": "none", **given})


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("learning_rate", -1, "training.learning_rate is -1: it is at least 0"),
        ("learning_rate", float("nan"), "training.learning_rate is nan: give a finite number"),
        ("weight_decay", float("inf"), "finite"),
        ("max_grad_norm", float("nan"), "finite"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("save_total_limit", 0, "at least 1"),
        ("num_train_epochs", float("nan"), "finite"),
        ("adam_beta2", 1, "training.adam_beta2 is 1: it is below 1"),
        ("seed", -1, "training.seed is -1"),
        ("seed", 2**32, "at most"),
        ("lr_scheduler_kwargs", {"evil": 1}, "cannot be made with lr_scheduler_kwargs"),
        ("report_to", ["evil"], r"training.report_to is evil, which is not installed or not known here\. Take none"),
        ("resume_from_checkpoint", "nowhere/checkpoint-7", "give --resume instead"),
        ("save_only_model", True, "no run can go on from"),
        ("predict_with_generate", True, "training.predict_with_generate have no meaning"),
    ],
)
def test_training_arguments_are_refused(name, value, words):
    given = arguments()
    setattr(given, name, value)
    with pytest.raises(UserError, match=words):
        check_arguments(given)


@pytest.mark.parametrize(
    "data, words",
    [
        ({"block": 0}, "data.block is 0: it is at least 1"),
        ({"seed": -1}, "data.seed is -1"),
        ({"workers": -1}, "data.workers"),
        ({"max_target": 0}, "data.max_target"),
        ({"pack": (0, 5)}, "data.pack is 0"),
    ],
)
def test_numbers_of_sections_are_refused(data, words):
    def settings(**data) -> SftSettings:
        return SftSettings(ModelSettings("m"), AnswerDataSettings(RecordsSettings("r"), **data), arguments())

    check_settings(settings())
    with pytest.raises(UserError, match=words):
        check_settings(settings(**data))


@pytest.mark.parametrize("lora", [LoraSettings(targets="("), LoraSettings(rank=0)])
def test_an_adapter_that_cannot_be_made_is_refused(lora):
    with pytest.raises(UserError, match="The adapter cannot be made"):
        add_adapter(tiny.t5gemma(), lora)


def test_a_file_of_settings_that_unfolds_without_end_is_refused(tmp_path):
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(9)]
    for text, words in (
        ("\n".join(lines), "by its references"),
        ("a: &a [*a]", "refers to itself"),
        ("[" * 5000, "cannot be read as settings"),
        ("a: [", "cannot be read as settings"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            check_yaml(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text("a: &a {b: 1}\nc: *a\n")
    check_yaml(tmp_path / "good.yaml")


def test_attention_without_a_gradient_is_refused(tmp_path):
    model = tiny.t5gemma()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="no gradient on a CPU"):
        make(tmp_path, model)
