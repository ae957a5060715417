"""Losses from hidden states against the dense computation in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from modeling_t5gemma import losses
from modeling_t5gemma.losses import IGNORED, SampledTarget, TeacherTarget, linear_loss, token_losses
from tests import tiny

TOKENS, WIDTH, WORDS = 23, 6, 41


def numbers(dtype: torch.dtype = torch.float64, softcap: float | None = None) -> dict:
    """Hidden states and heads whose logits reach well into the softcap."""
    hidden, weight = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(WORDS, WIDTH, dtype=dtype)
    labels = torch.randint(WORDS, (TOKENS,))
    labels[[0, 5, TOKENS - 1]] = IGNORED
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "softcap": softcap,
    }


def teacher(labels: torch.Tensor, dtype: torch.dtype = torch.float64, **how) -> TeacherTarget:
    kept = int((labels != IGNORED).sum())
    return TeacherTarget(torch.randn(kept, 9, dtype=dtype), torch.randn(WORDS, 9, dtype=dtype), **how)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def dense(hidden, weight, labels, softcap, target=None, count=None) -> tuple[torch.Tensor, ...]:
    """Total, cross-entropy and distillation by the definitions, all logits at once."""
    kept = labels != IGNORED
    logits = cap(hidden[kept] @ weight.T, softcap)
    count = kept.sum() if count is None else count
    hard = F.cross_entropy(logits, labels[kept], reduction="sum") / count
    if target is None:
        return hard, hard, None
    if isinstance(target, SampledTarget):
        soft = -(logits.log_softmax(-1).gather(1, target.ids) * target.weights).sum() / count
    else:
        t = target.temperature
        q = (cap(target.hidden @ target.weight.T, target.softcap) / t).softmax(-1)
        p = (logits / t).softmax(-1)
        m = (p + q) / 2

        def kl(a, b):
            return (a * (a.log() - b.log())).sum()

        soft = {
            "forward_kl": lambda: kl(q, p),
            "reverse_kl": lambda: kl(p, q),
            "jensen_shannon": lambda: (kl(p, m) + kl(q, m)) / 2,
        }[target.divergence]()
        soft = soft * t**2 / count
    return target.share * soft + (1 - target.share) * hard, hard, soft


def compare(arguments: dict, target=None, count=None, tolerance: float = 1e-12) -> None:
    found = linear_loss(**arguments, target=target, num_items_in_batch=count)
    got = torch.autograd.grad(3 * found.total, [arguments["hidden"], arguments["weight"]])
    expected = dense(**arguments, target=target, count=count)
    wanted = torch.autograd.grad(3 * expected[0], [arguments["hidden"], arguments["weight"]])
    for a, b in zip((found.total, found.cross_entropy, found.distillation), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert not found.cross_entropy.requires_grad


@pytest.fixture(params=["one chunk", "chunks and tiles that don't divide the tokens"], autouse=True)
def sizes(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(losses, "CHUNK_BYTES", 7 * WORDS * 8)
        monkeypatch.setattr(losses, "TILE_ELEMENTS", 3 * WORDS)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("count", [None, 100])
def test_cross_entropy_is_the_dense_one(softcap, count):
    compare(numbers(softcap=softcap), count=count)


@pytest.mark.parametrize(
    "divergence, temperature, share, softcaps",
    list(
        itertools.product(
            ["forward_kl", "reverse_kl", "jensen_shannon"], [1.0, 2.5], [1.0, 0.3], [(None, None), (2.0, 1.5)]
        )
    ),
)
def test_distillation_is_the_dense_one(divergence, temperature, share, softcaps):
    arguments = numbers(softcap=softcaps[0])
    compare(
        arguments,
        teacher(arguments["labels"], softcap=softcaps[1], divergence=divergence, temperature=temperature, share=share),
    )


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_samples_of_a_teacher_are_a_cross_entropy(share):
    arguments = numbers(softcap=2.0)
    kept = int((arguments["labels"] != IGNORED).sum())
    weights = torch.rand(kept, 4, dtype=torch.float64)
    weights /= weights.sum(dim=1, keepdim=True)
    # A word drawn twice counts twice.
    compare(arguments, SampledTarget(torch.randint(WORDS, (kept, 4)), weights, share))


def test_gradcheck():
    arguments = numbers(softcap=2.0)
    target = teacher(arguments["labels"], softcap=1.5, share=0.7)

    def total(hidden, weight):
        return linear_loss(hidden, weight, arguments["labels"], softcap=2.0, target=target).total

    assert torch.autograd.gradcheck(total, (arguments["hidden"], arguments["weight"]))


def test_float32_within_1e_5():
    arguments = numbers(torch.float32, softcap=2.0)
    compare(arguments, teacher(arguments["labels"], torch.float32, softcap=1.5), tolerance=1e-5)


def test_bfloat16_sums_in_float32():
    """Nearer to the float64 result than the dense bfloat16 computation is, in any number of chunks."""
    exact = numbers(softcap=2.0)
    rounded = {k: v.detach().bfloat16().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
               for k, v in exact.items()}  # fmt: skip
    widened = {k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
               for k, v in rounded.items()}  # fmt: skip
    truth = torch.autograd.grad(dense(**widened)[0], [widened["hidden"], widened["weight"]])
    ours = torch.autograd.grad(linear_loss(**rounded).total, [rounded["hidden"], rounded["weight"]])
    plain = torch.autograd.grad(dense(**rounded)[0], [rounded["hidden"], rounded["weight"]])
    for found, dense_one, true in zip(ours, plain, truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - true).norm() <= (dense_one - true).norm() * 1.05
        assert (found - true).norm() < 0.01 * true.norm()


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    arguments = numbers(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_loss(**arguments)
    found.total.backward()
    expected = dense(**arguments)[0]
    assert 1e-6 < (found.total - expected).abs() < 0.05
    assert arguments["weight"].grad.dtype == arguments["hidden"].grad.dtype == torch.float32


def test_a_frozen_head_has_no_gradient_and_costs_no_product(monkeypatch):
    arguments = numbers()
    arguments["weight"].requires_grad_(False)
    monkeypatch.setattr(losses, "_add_product", None)
    linear_loss(**arguments).total.backward()
    assert arguments["hidden"].grad is not None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_losses(softcap, temperature):
    arguments = numbers(softcap=softcap)
    found = token_losses(**arguments, temperature=temperature)
    logits = cap(arguments["hidden"] @ arguments["weight"].T, softcap) / temperature
    expected = F.cross_entropy(logits, arguments["labels"], reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(found, expected)
    assert found[0] == 0
    # What is made of them need not be a mean: a product has another gradient at every label.
    for tokens in (found, expected):
        arguments["hidden"].grad = arguments["weight"].grad = None
        (tokens * torch.arange(TOKENS)).square().sum().backward()
        gradients = arguments["hidden"].grad, arguments["weight"].grad
        if tokens is found:
            ours = gradients
    for mine, dense in zip(ours, gradients):
        torch.testing.assert_close(mine, dense)


def test_token_losses_without_labels_have_a_graph():
    arguments = numbers()
    arguments["labels"].fill_(IGNORED)
    token_losses(**arguments).sum().backward()
    assert not arguments["weight"].grad.any() and not arguments["hidden"].grad.any()


def test_nothing_to_learn_is_zero_with_a_graph():
    arguments = numbers()
    arguments["labels"].fill_(IGNORED)
    total = linear_loss(**arguments).total
    total.backward()
    assert total == 0 and not arguments["weight"].grad.any()


def test_rows_with_an_ignored_label_never_count():
    """KL over padding rows (hazard 26): whatever stands there changes nothing."""
    arguments = numbers()
    target = teacher(arguments["labels"])
    before = linear_loss(**arguments, target=target).total
    with torch.no_grad():
        arguments["hidden"][0] = 1e6
    assert linear_loss(**arguments, target=target).total == before


def test_a_target_of_another_length_or_vocabulary_is_refused():
    arguments = numbers()
    target = teacher(arguments["labels"])
    with pytest.raises(ValueError, match=f"{TOKENS - 3} labels"):
        linear_loss(**arguments, target=TeacherTarget(target.hidden[1:], target.weight))
    with pytest.raises(ValueError, match="one vocabulary"):
        linear_loss(**arguments, target=TeacherTarget(target.hidden, target.weight[1:]))


# In the model


def batch() -> dict[str, torch.Tensor]:
    ids = tiny.tokens(2, 9)
    labels = tiny.tokens(2, 7, seed=1)
    labels[1, 4:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def test_training_has_no_logits_and_evaluation_has_them_with_the_same_loss():
    model = tiny.t5gemma()
    evaluated = model(**batch())
    model.train()
    trained = model(**batch())
    assert trained.logits is None and evaluated.logits is not None
    torch.testing.assert_close(trained.loss, evaluated.loss, rtol=1e-6, atol=1e-6)
    assert model(**batch(), return_logits=True).logits is not None


def test_gradients_of_the_whole_model_are_those_of_dense_logits():
    """The head is tied to the decoder's embeddings, so both gradients meet in one tensor."""
    found = {}
    model = tiny.t5gemma().double().train()  # the gradients reach 7: in float32 both ways are 4e-5 from the truth
    for dense_one in (True, False):
        model.zero_grad()
        model(**batch(), return_logits=dense_one, num_items_in_batch=20).loss.backward()
        found[dense_one] = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in found[True].items():
        torch.testing.assert_close(found[False][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_token_losses_of_a_model_mean_its_loss():
    model, inputs = tiny.t5gemma(), batch()
    tokens = model(**inputs, return_token_losses=True)
    assert tokens.logits is None and tokens.token_losses.shape == inputs["labels"].shape
    mean = tokens.token_losses.sum() / (inputs["labels"] != IGNORED).sum()
    torch.testing.assert_close(mean, model(**inputs).loss)


def test_an_adapter_on_the_head_is_not_passed_by():
    """Its weight alone is not what it computes: the loss comes from its logits then."""
    peft = pytest.importorskip("peft")
    model = tiny.t5gemma()
    plain = model(**batch()).loss
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head.out_proj"], init_lora_weights=False))
    adapted.train()
    outputs = adapted(**batch())
    assert outputs.logits is not None and (outputs.loss - plain).abs() > 1e-4
    with pytest.raises(ValueError, match="adapter"):
        adapted(**batch(), target=teacher(batch()["labels"].flatten()))
