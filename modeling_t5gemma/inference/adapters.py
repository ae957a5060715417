"""Adapters put on the base that they were trained on."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..io.checkpoints import ADAPTER, told
from ..io.fields import refuse_code
from ..io.safetensors_files import read_header
from ..io.text_files import read_json

BASE_FILE = "base.json"


def load_adapter(base: PreTrainedModel, adapter: Path) -> Any:
    """A ``peft.PeftModel`` of a base and an adapter's folder.

    Raises:
        UserError: the folder holds no adapter, one that is damaged, or one for another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    recorded = read_base(adapter)
    found = fingerprint(base)
    if recorded.get("fingerprint", found) != found:
        raise UserError(
            f"{adapter} was trained on another model than {base.config.name_or_path}: on {recorded['path']}. Give "
            "that one (--base)."
        )
    weights = adapter / SAFETENSORS_WEIGHTS_NAME
    if not os.path.isfile(weights):
        pickled = ": a .bin is a pickle, which is never loaded" if any(adapter.glob("*.bin")) else ""
        raise UserError(f"{weights} is missing{pickled}. Save the adapter as safetensors.")
    wrong = f"{adapter}, which names {recorded['path']} as its base, does not fit {base.config.name_or_path}"
    # Beside an adapter of an embedding, peft saves the embedding.
    held = {name for name in read_header(weights) if ".base_layer." not in name}
    with told(wrong, "Give the base that it was trained on (--base)"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, str(adapter))
        strangers = sorted(held ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if strangers:
        raise UserError(
            f"{wrong}: {len(strangers)} tensors such as {strangers[0]} are on one side only. Give the "
            "base that it was trained on (--base)."
        )
    return model


def read_base(adapter: Path) -> dict[str, str]:
    """``path`` of the base, and its ``fingerprint`` where this package has trained the adapter.

    Raises:
        UserError: the folder holds no adapter, or one that is damaged or asks for code of its own.
    """
    config = adapter / ADAPTER
    if not os.path.lexists(config):
        raise UserError(f"{adapter} has no {ADAPTER}: it is no adapter.")
    content = read_json(config)
    refuse_code(content, config)
    if content.get("megatron_config"):  # peft would import the module that it names
        raise UserError(f"{config} asks for code of its own (megatron_config), which is never run. Take it out.")
    found: dict[str, Any] = {"path": content.get("base_model_name_or_path")}
    if os.path.lexists(adapter / BASE_FILE):
        found |= read_json(adapter / BASE_FILE)
    if not isinstance(found["path"], str) or not isinstance(found.get("fingerprint", ""), str):
        raise UserError(
            f"{adapter} does not name the base that it was trained on. Put back the {ADAPTER} and {BASE_FILE} that "
            "were saved with it."
        )
    return found


def fingerprint(model: nn.Module) -> str:
    """What tells a base from others: the names of its weights and the gains of its norms, which are small, differ
    between any two trained models, and are left alone by adapters. They are taken in bfloat16, so that the type a base
    is loaded in makes no difference.
    """
    seen = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            continue
        seen.update(name.replace(".base_layer.", ".").encode())
        if parameter.ndim == 1:
            seen.update(parameter.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return seen.hexdigest()
