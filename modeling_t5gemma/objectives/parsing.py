"""Objectives as a training configuration writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from .checks import check_weight, shown
from .combining import Mixture, Schedule
from .denoising import BartInfilling, Denoiser, SpanCorruption
from .example import Objective
from .prefix_lm import PrefixLM

# Denoisers as a training configuration would write them, by the name of their mixture.
DENOISERS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        # UL2 (arXiv 2205.05131, table 1). Its S is drawn around a quarter of the sequence; here it is a quarter.
        "ul2": (
            {"mean_span": 3, "rate": 0.15, "mode": "R"},
            {"mean_span": 8, "rate": 0.15, "mode": "R"},
            {"mean_span": 3, "rate": 0.5, "mode": "X"},
            {"mean_span": 8, "rate": 0.5, "mode": "X"},
            {"mean_span": 64, "rate": 0.15, "mode": "X"},
            {"mean_span": 64, "rate": 0.5, "mode": "X"},
            {"placement": "end", "rate": 0.25, "mode": "S"},
        ),
        # T5Gemma 2 (arXiv 2512.14856). It states no mode tokens; these follow UL2's rule: X has long spans or a high
        # rate.
        "t5gemma2": (
            {"mean_span": 3, "rate": 0.15, "mode": "R"},
            {"mean_span": 12, "rate": 0.5, "mode": "X"},
            {"mean_span": 32, "rate": 0.15, "mode": "X"},
            {"mean_span": 32, "rate": 0.5, "mode": "X"},
            {"placement": "end", "rate": 0.75, "weight": 4, "mode": "S"},
        ),
        # T5 (arXiv 1910.10683, section 3.3.4), which is UL2's first R.
        "t5": ({"mean_span": 3, "rate": 0.15, "mode": "R"},),
    }
)
PRESETS = ("prefix_lm", *DENOISERS, "bart")


def objective_from(
    spec: object,
    sentinels: Sequence[int],
    *,
    eos: int | None,
    mode_tokens: Mapping[str, int] | None = None,
    mask: int | None = None,
) -> Objective:
    """Build an objective from what a training configuration says.

    Args:
        spec: a preset's name; ``{name: prefix_lm, cut: random, min_source: 1}``; ``{name: ul2, sentinel_at_end:
            true}``; ``{name: bart, rate: 0.3, poisson: 3}``; ``{denoisers: [{mean_span: 3, rate: 0.15, placement:
            spread, weight: 2, mode: R}, ...], sentinel_at_end: false}``; or ``{mixture: [{objective: ul2, weight:
            0.5}, ...]}``. All keys but ``name``, ``denoisers``, ``mixture``, ``objective``, ``rate`` and a spread
            denoiser's ``mean_span`` may be left out.
        sentinels: ids in the order of their use.
        eos: ends targets that do not plainly continue the source; None for none.
        mode_tokens: ids by mode. With them a preset's denoisers put theirs first in the source, without them they do
            not; a denoiser of the configuration's own does as its ``mode`` says.
        mask: BART's mask token.

    Raises:
        UserError: a name or key is unknown, or a value is not allowed.
    """
    return _Parser(tuple(sentinels), eos, mode_tokens, mask).objective(spec, "objective")


def schedule_from(
    spec: object,
    sentinels: Sequence[int],
    *,
    eos: int | None,
    mode_tokens: Mapping[str, int] | None = None,
    mask: int | None = None,
) -> Schedule:
    """Build a schedule: like :func:`objective_from`, or from a list ``[{objective: ul2, share: 0.9}, ...]``.

    Raises:
        UserError: a name or key is unknown, or a value is not allowed.
    """
    parser = _Parser(tuple(sentinels), eos, mode_tokens, mask)
    if not isinstance(spec, list | tuple):
        return Schedule(((1.0, parser.objective(spec, "objective")),))
    return Schedule(tuple((share, objective) for objective, share in parser.weighted(spec, "objective", "share")))


@dataclass(frozen=True)
class _Parser:
    """What specs need to know of the tokenizer. ``where`` is the place of a spec in the configuration."""

    sentinels: tuple[int, ...]
    eos: int | None
    mode_tokens: Mapping[str, int] | None
    mask: int | None

    def objective(self, spec: object, where: str) -> Objective:
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise UserError(
                f"{where} is {shown(spec)}; it can be one of {', '.join(PRESETS)}, or a mapping with name, denoisers "
                "or mixture."
            )
        if "mixture" in spec:
            _check_keys(spec, where, required=("mixture",))
            weighted = self.weighted(spec["mixture"], f"{where}.mixture", "weight")
            objectives, weights = zip(*weighted)
            return Mixture(objectives, weights, "+".join(objective.name for objective in objectives))
        if "denoisers" in spec:
            _check_keys(spec, where, required=("denoisers",), optional=("sentinel_at_end",))
            denoisers = [
                self.denoiser(denoiser, f"{where}.denoisers[{number}]")
                for number, denoiser in enumerate(_nonempty_list(spec["denoisers"], f"{where}.denoisers"))
            ]
            return self.corruption("denoisers", denoisers, _boolean(spec, "sentinel_at_end", where))
        return self.preset(spec, where)

    def preset(self, spec: Mapping[Any, Any], where: str) -> Objective:
        name = spec.get("name")
        if not isinstance(name, str) or name not in PRESETS:
            found = f"has no name, denoisers or mixture: {shown(spec)}" if name is None else f"is {shown(name)}"
            raise UserError(f"{where} {found}; the names are {', '.join(PRESETS)}.")
        if name == "prefix_lm":
            _check_keys(spec, where, required=("name",), optional=("cut", "min_source"))
            with _at(where):
                return PrefixLM(spec.get("cut", "half"), _integer(spec.get("min_source", 1), f"{where}.min_source"))
        if name == "bart":
            _check_keys(spec, where, required=("name",), optional=("rate", "poisson"))
            if self.mask is None:
                raise UserError(f"{where} is bart, which needs a mask token. Give its id as `mask`.")
            numbers = {key: _number(spec[key], f"{where}.{key}") for key in ("rate", "poisson") if key in spec}
            with _at(where):
                return BartInfilling(mask=self.mask, eos=self.eos, **numbers)
        _check_keys(spec, where, required=("name",), optional=("sentinel_at_end",))
        drop = {"mode"} if self.mode_tokens is None else set()
        denoisers = [
            self.denoiser({key: row[key] for key in row if key not in drop}, where) for row in DENOISERS[name]
        ]
        return self.corruption(name, denoisers, _boolean(spec, "sentinel_at_end", where))

    def weighted(self, spec: object, where: str, key: str) -> list[tuple[Objective, float]]:
        """The rows of a mixture or a schedule, each an objective and a number."""
        rows = []
        for number, row in enumerate(_nonempty_list(spec, where)):
            place = f"{where}[{number}]"
            entry = _check_keys(row, place, required=("objective", key))
            value = _number(entry[key], f"{place}.{key}")
            with _at(place):
                check_weight(value, key)
            rows.append((self.objective(entry["objective"], f"{place}.objective"), value))
        return rows

    def denoiser(self, spec: object, where: str) -> Denoiser:
        row = _check_keys(spec, where, required=("rate",), optional=("mean_span", "placement", "weight", "mode"))
        numbers = {key: _number(row[key], f"{where}.{key}") for key in ("rate", "weight") if key in row}
        mean_span = _number(row["mean_span"], f"{where}.mean_span") if "mean_span" in row else None
        mode_token = None
        if "mode" in row:
            known = self.mode_tokens or {}
            if row["mode"] not in known:
                listed = ", ".join(map(str, known)) or "none"
                raise UserError(f"{where}.mode is {shown(row['mode'])}; `mode_tokens` has {listed}. Add its id there.")
            mode_token = known[row["mode"]]
        with _at(where):
            return Denoiser(mean_span, placement=row.get("placement", "spread"), mode_token=mode_token, **numbers)

    def corruption(self, name: str, denoisers: Sequence[Denoiser], sentinel_at_end: bool) -> Mixture:
        parts = tuple(SpanCorruption(denoiser, self.sentinels, self.eos, sentinel_at_end) for denoiser in denoisers)
        return Mixture(parts, tuple(denoiser.weight for denoiser in denoisers), name)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in the configuration before the message of a user's error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_keys(
    spec: object, where: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[Any, Any]:
    allowed = ", ".join(required + optional)
    if not isinstance(spec, Mapping):
        raise UserError(f"{where} is {shown(spec)}; it must be a mapping with {allowed}.")
    if unknown := [key for key in spec if key not in required + optional]:
        raise UserError(f"{where} has the unknown key {shown(unknown[0])}; it can have {allowed}.")
    if missing := [key for key in required if key not in spec]:
        raise UserError(f"{where} lacks {missing[0]}; it can have {allowed}.")
    return spec


def _nonempty_list(spec: object, where: str) -> Sequence[object]:
    if not isinstance(spec, list | tuple) or not spec:
        raise UserError(f"{where} is {shown(spec)}; it must be a list with at least one entry.")
    return spec


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} is {shown(value)}; it must be a number.")
    return value


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} is {shown(value)}; it must be a whole number.")
    return value


def _boolean(spec: Mapping[Any, Any], key: str, where: str) -> bool:
    value = spec.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}.{key} is {shown(value)}; it can be true or false.")
    return value
