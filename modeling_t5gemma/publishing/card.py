"""The model card of a checkpoint that is published."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData

from ..conversion.options import describe_layers
from ..conversion.target import stack_configs
from ..cross_attention import kind_of
from ..errors import UserError
from .lineage import Lineage
from .recipe import Recipe
from .results import Result, model_index
from .settings import Publication
from .validation import Validated


def make_card(
    given: Publication,
    validated: Validated,
    lineage: Lineage,
    recipes: Sequence[Recipe],
    results: Sequence[Result],
    terms_file: str | None,
    *,
    has_record: bool,
) -> ModelCard:
    """Fill ``MODEL_CARD.md``.

    Args:
        recipes: of the runs, the latest first.
        terms_file: the name of the terms' copy beside it; None if none are asked for.
        has_record: whether ``conversion.json`` is beside it.

    Raises:
        UserError: the licence is not known, or not the one that the terms ask for.
    """
    name = given.repository.partition("/")[2]
    config = validated.config
    datasets = [*given.datasets, *(dataset for recipe in recipes for dataset in recipe.datasets)]
    tags = [
        "encoder-decoder",
        "text2text-generation",
        config.model_type,
        *(["distillation"] if lineage.teachers else []),
    ]
    data = ModelCardData(
        base_model=lineage.bases or None,
        base_model_relation=_relation(lineage),
        license=_license(given, lineage),
        language=list(given.languages) or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",  # the Hub's task of encoder-decoders too, "text2text-generation" is a tag
        tags=tags,
        model_name=name if results else None,
        eval_results=model_index(results) or None,
    )
    stacks = stack_configs(config)
    bidirectional = getattr(stacks[0], "bidirectional_layers", "all")
    rows: dict[str, list[object]] = {
        "layers": [stack.num_hidden_layers for stack in stacks],
        "width / FFN": [f"{stack.hidden_size} / {stack.intermediate_size}" for stack in stacks],
        "query / kv heads x head_dim": [
            f"{stack.num_attention_heads} / {stack.num_key_value_heads} x {stack.head_dim}" for stack in stacks
        ],
        "bidirectional layers": [
            bidirectional if isinstance(bidirectional, str) else describe_layers(bidirectional),
            "none",
        ],
    }
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=files("modeling_t5gemma.conversion").joinpath("files/MODEL_CARD.md").read_text(encoding="utf-8"),
        model_name=name,
        repository=given.repository,
        sources=_sources(lineage),
        adaptation=_adaptation(recipes, lineage),
        architecture=[[title, *cells] for title, cells in rows.items()],
        cross_attention=kind_of(config).summary,
        provenance=_provenance(validated, lineage),
        has_record=has_record,
        needs_package=validated.needs_code,
        begins=validated.begins,
        says=validated.says,
        chats=validated.chats,
        training=_training(recipes, given.hardware),
        evaluation=_evaluation(results) or ("Not evaluated." if recipes else None),
        legal=lineage.legal,
        terms_file=terms_file,
        teachers=lineage.teachers,
    )
    return card


def _relation(lineage: Lineage) -> str | None:
    """The Hub's word for how the model derives from its bases: adaptation is a fine-tuning, of two models a merge."""
    if not lineage.bases:
        return None
    return "finetune" if len(lineage.bases) == 1 else "merge"


def _license(given: Publication, lineage: Lineage) -> str:
    asked = lineage.legal.license if lineage.legal else None
    if asked is not None and given.license not in (None, asked):
        raise UserError(
            f"--license {given.license}, but a derivative of Gemma stays under its terms. Leave it out, or give "
            f"{asked}."
        )
    license = given.license or asked
    if license is None:
        raise UserError("Nothing tells the licence of this checkpoint. Give --license, as apache-2.0.")
    return license


def _sources(lineage: Lineage) -> str:
    linked = [f"[{name}](https://huggingface.co/{name})" for name in lineage.bases]
    return " and ".join(linked or lineage.local) or "random weights"


def _adaptation(recipes: Sequence[Recipe], lineage: Lineage) -> str | None:
    if not recipes:
        return None
    taught = f", in part on the output of {' and '.join(lineage.teachers)}" if lineage.teachers else ""
    return f"It was trained after conversion{taught}: see [below](#training-data-and-procedure)."


def _provenance(validated: Validated, lineage: Lineage) -> list[str]:
    lines = [f"{validated.parameters:,} parameters in {' and '.join(validated.dtypes)}."]
    if lineage.local:
        lines.append(f"Converted from local copies: {', '.join(lineage.local)}.")
    return lines


def _training(recipes: Sequence[Recipe], hardware: str | None) -> str | None:
    parts = []
    for number, recipe in enumerate(reversed(recipes), start=1):  # as they followed each other
        if len(recipes) > 1:
            parts.append(f"### Run {number}")
        compute = [*recipe.compute, *([("hardware", hardware)] if hardware else [])]
        for title, rows in (("setting", recipe.rows), ("compute", compute)):
            if rows:
                parts.append(_table([title, ""], rows))
    return "\n\n".join(parts) or None


def _evaluation(results: Sequence[Result]) -> str | None:
    if not results:
        return None
    rows = [(r.name, r.metric, r.split or "", f"{r.value:.4g}", r.notes or "") for r in results]
    return _table(["data", "metric", "split", "value", "how"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
