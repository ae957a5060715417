"""A griffe extension for the API reference: parameters that are explained together, "k, v: ...", stay together.

The parser for docstrings takes what stands behind the first space for a type, so the space becomes one that does not
break.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_TOGETHER = re.compile(r"^ *(?:\w+, )+\w+: ", re.MULTILINE)


class NamesTogether(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _TOGETHER.sub(
                lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), obj.docstring.value
            )
