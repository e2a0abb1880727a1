"""The losses: the contract for each, and how they turn into one another (MATHS (10)-(15))."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.config import parse
from pipeline.loss import find, kinds, masked_mean, reduce
from storage.errors import ConfigError
from tests.contracts.loss import MASK_SN, LossContract, laws, terms_of


class TestKL(LossContract):
    section: ClassVar = {"kind": "kl"}


class TestTV(LossContract):
    section: ClassVar = {"kind": "tv"}


class TestLKAlpha(LossContract):
    section: ClassVar = {"kind": "lk_alpha"}


class TestLKLambda(LossContract):
    section: ClassVar = {"kind": "lk_lambda", "eta": 3.0}


class TestLKLambdaPerToken(LossContract):
    section: ClassVar = {"kind": "lk_lambda", "eta": 3.0, "scope": "token"}


class TestLKFixed(LossContract):
    section: ClassVar = {"kind": "lk_fixed", "weight": 0.5}


def value(kind: str, kl: Tensor, alpha: Tensor, **parameters: Any) -> Tensor:
    module = find(kind)
    config = parse("losses.x", {"kind": kind, **parameters}, module.Config)
    out: Tensor = module.loss(kl, alpha, MASK_SN, config)
    return out


@pytest.fixture
def kl_alpha() -> tuple[Tensor, Tensor]:
    kl, alpha = terms_of(laws(1), laws())
    return kl.detach().requires_grad_(), alpha.detach().requires_grad_()


def test_every_loss_has_a_contract_here() -> None:
    tested = {c.section["kind"] for c in LossContract.__subclasses__()}
    assert tested == set(kinds())


def test_tv_is_half_the_absolute_difference() -> None:
    q, p = (x.softmax(-1) for x in (laws(1), laws()))
    tv = value("tv", *terms_of(laws(1), laws()))
    torch.testing.assert_close(tv, 0.5 * (p - q).abs().sum(-1), rtol=1e-12, atol=1e-12)


def test_kl_is_the_divergence_of_torch() -> None:
    q, p = (x.log_softmax(-1) for x in (laws(1), laws()))
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(value("kl", *terms_of(laws(1), laws())), exact)


def test_lk_alpha_is_the_likelihood_at_a_point_mass() -> None:
    target = torch.full_like(laws(), -1e30)
    target[..., 2] = 0
    nll = -laws(1).log_softmax(-1)[..., 2]
    torch.testing.assert_close(value("lk_alpha", *terms_of(laws(1), target)), nll)


def test_lk_alpha_pulls_as_tv_divided_by_alpha(kl_alpha: tuple[Tensor, Tensor]) -> None:
    kl, alpha = kl_alpha
    (of_lk,) = torch.autograd.grad(value("lk_alpha", kl, alpha).sum(), alpha)
    (of_tv,) = torch.autograd.grad(value("tv", kl, alpha).sum(), alpha)
    torch.testing.assert_close(of_lk, of_tv / alpha)


def test_lk_alpha_of_no_overlap_is_zero_and_pulls_nowhere() -> None:
    alpha = torch.tensor([[0.0, 1e-300, 0.5]], dtype=torch.float64, requires_grad=True)
    module = find("lk_alpha")
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = module.loss(alpha, alpha, mask, module.Config(kind="lk_alpha"))
    (gradient,) = torch.autograd.grad(loss.sum(), alpha)
    assert loss[0, 0] == gradient[0, 0] == 0
    assert gradient[0, 1].item() == pytest.approx(-1e300)
    # uncovered anchors stay in the denominator
    assert masked_mean(loss, mask).item() == pytest.approx(loss[0, 1:].sum().item() / 3)


@pytest.mark.parametrize("scope", ["depth", "token"])
def test_lambda_of_eta_zero_is_kl_and_of_a_large_eta_tv(
    scope: str, kl_alpha: tuple[Tensor, Tensor]
) -> None:
    none = value("lk_lambda", *kl_alpha, eta=0.0, scope=scope)
    torch.testing.assert_close(none, value("kl", *kl_alpha))
    much = value("lk_lambda", *kl_alpha, eta=1e4, scope=scope)
    torch.testing.assert_close(much, value("tv", *kl_alpha))


def test_fixed_weights_of_one_and_zero_are_kl_and_tv(kl_alpha: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(value("lk_fixed", *kl_alpha, weight=1.0), value("kl", *kl_alpha))
    torch.testing.assert_close(value("lk_fixed", *kl_alpha, weight=0.0), value("tv", *kl_alpha))


def test_lambda_is_one_number_a_depth_from_its_supervised_anchors(
    kl_alpha: tuple[Tensor, Tensor],
) -> None:
    kl, alpha = kl_alpha
    weight = torch.stack([(-3 * alpha[s][MASK_SN[s]].mean()).exp() for s in range(3)])[:, None]
    expected = weight * kl + (1 - weight) * (1 - alpha)
    torch.testing.assert_close(value("lk_lambda", kl, alpha, eta=3.0), expected)


@pytest.mark.parametrize("scope", ["depth", "token"])
def test_lambda_is_detached(scope: str, kl_alpha: tuple[Tensor, Tensor]) -> None:
    kl, alpha = kl_alpha
    loss = value("lk_lambda", kl, alpha, eta=3.0, scope=scope)
    of_kl, of_alpha = torch.autograd.grad(loss.sum(), (kl, alpha))
    # ∂/∂KL = λ and ∂/∂α = −(1 − λ): nothing flows through λ itself
    torch.testing.assert_close(of_alpha, of_kl - 1)


def test_depths_are_weighed_by_powers_of_the_decay() -> None:
    loss = torch.tensor([[1.0, 3.0], [4.0, 9.0], [6.0, 6.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert reduce(loss, mask, depth_decay=0.5).item() == pytest.approx(2 + 0.5 * 4 + 0)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"kind": "lk_lambda", "eta": -1.0}, r"losses\.x\.eta is -1\.0; expected .* greater"),
        ({"kind": "lk_lambda", "eta": 3.0, "scope": "batch"}, r"scope is 'batch'; .*'depth'"),
        ({"kind": "lk_fixed", "weight": 1.5}, r"losses\.x\.weight is 1\.5; expected .* less"),
        ({"kind": "lk_lambda"}, r"losses\.x\.eta is missing"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse("losses.x", section, find(section["kind"]).Config)


def test_a_loss_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"loss 'nll'; expected one of kl, lk_alpha, .*tv"):
        find("nll")
