"""The families that can be converted, one file each. A new one is a new file and its name here."""

from __future__ import annotations

from modeling_t5gemma.conversion.families import gemma, gemma2, gemma3
from modeling_t5gemma.conversion.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (gemma, gemma2, gemma3)}
