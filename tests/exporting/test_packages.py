"""The two programs give what the model gives, for any batch, length and number of slots, and need nothing of ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from modeling_t5gemma.exporting.decoding import Decoding
from modeling_t5gemma.exporting.deviation import Model
from modeling_t5gemma.exporting.packages import Packages, TwoPrograms, save_programs
from modeling_t5gemma.exporting.programs import make_programs
from modeling_t5gemma.inference.loading import Checkpoint, load_checkpoint
from tests import tiny
from tests.exporting.conftest import STACK, save, source_and_target, untied

LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
MAKE: dict[str, Callable[[], torch.nn.Module]] = {
    # With a softcap and stacks of different sizes.
    "separate": lambda: untied({**STACK, "attn_logit_softcapping": 5.0, "hidden_size": 48}, STACK),
    "layerwise": lambda: tiny.layerwise(tiny.gemma3(**LAYERS), bidirectional_layers="all"),
}
# Writing takes most of the time, so not every kind of file is written for either model.
CASES = [("separate", "torch"), ("layerwise", "torch"), ("layerwise", "onnx")]


Written = tuple[Checkpoint, dict[str, Packages]]


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Callable[[str], Written]:
    """By kind a model in evaluation mode and its packages by format; made once."""
    made: dict[str, Written] = {}

    def write(kind: str) -> Written:
        if kind not in made:
            torch.manual_seed(2)
            folder = tmp_path_factory.mktemp(kind)
            found = load_checkpoint(str(save(MAKE[kind](), folder / "checkpoint")), dtype="float32")
            decoding = Decoding.of(found, "float32")
            programs = make_programs(found.model, decoding)
            found.model.set_attn_implementation("auto")
            formats = [form for other, form in CASES if other == kind]
            for form in formats:
                save_programs(*programs, folder, form)
            made[kind] = found, {form: Packages(folder, form, decoding) for form in formats}
        return made[kind]

    return write


@pytest.fixture(params=CASES, ids="-".join)
def exported(request, written) -> tuple[Checkpoint, Packages]:
    kind, form = request.param
    checkpoint, packages = written(kind)
    return checkpoint, packages[form]


@pytest.mark.parametrize(("rows", "length", "new"), [(1, 1, 1), (1, 20, 30), (3, 12, 12)])
def test_the_same_tokens(exported, rows, length, new):
    """Beyond the windows, with padding on either side and inside, in batches of any size."""
    checkpoint, packages = exported
    ids = tiny.tokens(rows, length, seed=rows)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :4] = mask[1, 9:] = mask[2, 3] = 0
    own = checkpoint.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
    assert torch.equal(packages.generate(ids, mask, max_new_tokens=new), own)
    assert new == 1 or len(own.unique()) > 4


def test_texts_end_and_padding_is_inferred(exported):
    checkpoint, packages = exported
    ids, mask = tiny.padded(tiny.tokens(3, 8, seed=5), [8, 3, 5], "right", 8)
    free = packages.generate(ids, mask, max_new_tokens=10)
    end = int(free[1, 4])
    ending = Packages.__new__(Packages)
    ending.__dict__ = {**packages.__dict__, "decoding": Decoding(**{**vars(packages.decoding), "ends": [end, 1]})}
    own = checkpoint.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=[end, 1]
    )
    assert torch.equal(ending.generate(ids, max_new_tokens=10), own)
    assert 0 in own[1] and not torch.equal(own, free)


def test_the_same_log_probabilities(exported):
    checkpoint, packages = exported
    source, target = source_and_target(11, 13)
    assert packages.log_probs(source, target) == pytest.approx(Model(checkpoint).log_probs(source, target), abs=1e-4)


def test_what_is_not_decoded_yet_is_not_read(exported):
    """Whoever has a loop of his own may keep anything in the slots beyond."""
    _, packages = exported
    mask = torch.ones(1, 3, dtype=torch.long)
    cross = packages._encode(tiny.tokens(1, 3), mask)
    shape = (packages.decoding.layers, 1, packages.decoding.heads, 6, packages.decoding.head_dim)
    made = [
        packages._step(torch.tensor([[9]]), torch.tensor([2]), mask, *cross, keys, keys)
        for keys in (torch.zeros(shape), torch.zeros(shape).index_fill(3, torch.tensor([2, 3, 4, 5]), 1e3))
    ]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", MAKE)
def test_the_programs_need_nothing_of_ours(written, kind):
    packages = written(kind)[1]["torch"]
    for program in (packages._encode, packages._step):
        called = {node.target for node in program.graph.nodes if node.op == "call_function"}
        operators = {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}
        assert operators == {"aten"}


def test_bfloat16(tmp_path):
    """The same as the model in bfloat16 with the same attention."""
    model = tiny.layerwise(tiny.gemma3(num_hidden_layers=1, layer_types=["full_attention"]))
    checkpoint = load_checkpoint(str(save(model, tmp_path / "checkpoint")), dtype="float32")
    decoding = Decoding.of(checkpoint, "bfloat16")
    backend = TwoPrograms("torch", "bfloat16")
    backend.write(checkpoint, tmp_path, decoding)
    packages = backend.load(tmp_path, decoding)
    model = load_checkpoint(str(tmp_path / "checkpoint"), dtype="bfloat16").model
    ids = tiny.tokens(2, 9)
    own = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(packages.generate(ids, max_new_tokens=8), own)
    assert np.isfinite(packages.log_probs(*source_and_target(5, 5))).all()
