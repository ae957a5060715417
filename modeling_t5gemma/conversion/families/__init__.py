"""The families that can be converted, one file each. A new one is a new file and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling_t5gemma.conversion.families import gemma, gemma2, gemma3
from modeling_t5gemma.conversion.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (gemma, gemma2, gemma3)}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a decoder-only checkpoint's ``config.json`` describes one of, None if it is of none."""
    named = set(config.get("architectures") or [])
    for family in FAMILIES.values():
        if config.get("model_type") in (family.model_type, family.name) or named & set(family.architectures):
            return family
    return None
