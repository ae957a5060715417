"""Adapters put on the base that they were trained on."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError

BASE_FILE = "base.json"
ADAPTER_CONFIG = "adapter_config.json"


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
    if not weights.is_file():
        raise UserError(f"{weights} is missing. Save the adapter as safetensors.")
    wrong = f"{adapter}, which names {recorded['path']} as its base, does not fit {base.config.name_or_path}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(adapter))
        with safe_open(weights, "pt") as file:
            # Beside an adapter of an embedding, peft saves the embedding.
            held = {name for name in file.keys() if ".base_layer." not in name}  # noqa: SIM118
            strangers = sorted(held ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged or cut short ({error}). Save or download it again.") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{wrong} ({' '.join(str(error).split())[:200]}). Give the base that it was trained on (--base)."
        ) from error
    if strangers:
        raise UserError(
            f"{wrong}: {len(strangers)} tensors such as {strangers[0]} are on one side only. Give the base that it "
            "was trained on (--base)."
        )
    return model


def read_base(adapter: Path) -> dict[str, str]:
    """``path`` of the base, and its ``fingerprint`` where this package has trained the adapter.

    Raises:
        UserError: the folder holds no adapter.
    """
    config = adapter / ADAPTER_CONFIG
    if not config.is_file():
        raise UserError(f"{adapter} has no {ADAPTER_CONFIG}: it is no adapter.")
    found: dict[str, str] = {"path": json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]}
    if (record := adapter / BASE_FILE).is_file():
        found |= json.loads(record.read_text(encoding="utf-8"))
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
