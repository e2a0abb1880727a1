"""The losses: the contract for each, and how they turn into one another (MATHS (10)-(15))."""

import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.check import check_params
from pipeline.config import parse, read_params
from pipeline.loss import align, find, kinds, masked_mean, reach, reduce, require_law
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


class TestEndToEndTV(LossContract):
    section: ClassVar = {"kind": "e2e_tv"}


class TestJSD(LossContract):
    section: ClassVar = {"kind": "jsd"}


class TestReverseKL(LossContract):
    section: ClassVar = {"kind": "reverse_kl"}


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
    with pytest.raises(
        ConfigError, match=r"loss 'nll'; expected one of e2e_tv, jsd, kl, lk_alpha, .*tv"
    ):
        find("nll")


def test_reverse_kl_is_the_divergence_of_torch_and_jsd_its_mixture() -> None:
    q, p = (x.log_softmax(-1) for x in (laws(1), laws()))
    _, _, jsd, reverse = terms_of(laws(1), laws(), ("jsd", "reverse_kl"))
    divergence = torch.nn.functional.kl_div
    exact = divergence(p, q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reverse, exact)
    middle = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=torch.float64).log()
    halves = [divergence(middle, x, log_target=True, reduction="none").sum(-1) for x in (p, q)]
    torch.testing.assert_close(jsd, (halves[0] + halves[1]) / 2)


def test_a_loss_of_whole_laws_is_refused_on_a_truncated_cache() -> None:
    config = find("reverse_kl").Config(kind="reverse_kl")
    with pytest.raises(
        ConfigError, match=r"objective rkl \(loss reverse_kl\) on a cache of mode t"
    ):
        require_law("rkl", config, "topk")
    require_law("rkl", config, "full")
    require_law("jsd", find("jsd").Config(kind="jsd"), "topk")


def test_check_refuses_it_before_anything_runs_and_only_where_an_arm_trains_it() -> None:
    params = read_params()
    params["losses"]["tv"] = {"kind": "reverse_kl"}
    for arm in params["arms"].values():
        if arm["objective"] == "tv":
            arm["loss"] = "reverse_kl"
    with pytest.raises(ConfigError, match=r"reverse_kl\) on a cache of mode topk; expected whole"):
        check_params(params)
    params = read_params()
    params["losses"]["unused"] = {"kind": "reverse_kl"}
    check_params(params)


def ragged(turns: list[list[int]]) -> Batch:
    """A batch of which only the turns matter."""
    turn = torch.tensor(turns)
    zero = torch.zeros_like(turn)
    return Batch(
        ids=(),
        domains=(),
        tokens=zero,
        length=zero[:, 0],
        turn=turn,
        token_logp=zero.float(),
        law_row=zero,
        law=None,
        hidden=None,
        last_hidden=None,
    )


TURNS = [
    [-1, 0, 0, 0, 0, -1, 1, 1, 1, -1, -1],
    [-1, -1, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    [-1, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1],
    [0, 0, 0, -1, -1, 1, -1, 2, 2, -1, -1],
]


def brute(alpha_of: Any, depth: int) -> list[tuple[int, int, float]]:
    """(anchor, depth k, Π_{i<=k} α) of every supervised pair, one token at a time."""
    found = []
    width = len(TURNS[0])
    for k, (b, turn) in itertools.product(range(depth), enumerate(TURNS)):
        for j in range(width - 2 - k):
            if turn[j + 1] >= 0 and turn[j + 1] == turn[j + 2 + k]:
                product = 1.0
                for i in range(k + 1):
                    product *= alpha_of(b * width + j, i)
                found.append((b * width + j, k, product))
    return found


def test_columns_are_anchors_so_that_a_path_runs_down_a_column() -> None:
    def alpha_of(anchor: int, k: int) -> float:
        return ((anchor * 7 + k * 13) % 11 + 1) / 12

    batch, depth = ragged(TURNS), 4
    anchors = [batch.pairs(k).anchor for k in range(depth)]
    ragged_alpha = [
        torch.tensor([alpha_of(int(j), k) for j in own], dtype=torch.float64)
        for k, own in enumerate(anchors)
    ]
    alpha, mask = align(ragged_alpha, anchors)
    assert mask.sum(-1).tolist() == [len(own) for own in anchors]
    expected = brute(alpha_of, depth)
    assert int(mask.sum()) == len(expected)
    config = find("e2e_tv").Config(kind="e2e_tv")
    value = find("e2e_tv").loss(alpha, alpha, mask, config)
    column = {int(j): n for n, j in enumerate(anchors[0])}
    weight = reach(alpha, mask)
    for anchor, k, product in expected:
        n = column[anchor]
        assert mask[k, n]
        assert value[k, n].item() == pytest.approx((1 - product) / depth)
        assert weight[k, n].item() == pytest.approx(product / alpha_of(anchor, k))
    # 1 − mean over depths of the mean over anchors
    means = [
        sum(p for _, k, p in expected if k == depth_) / len(own)
        for depth_, own in enumerate(anchors)
    ]
    total = reduce(value, mask, depth_decay=1.0, depth_weights="uniform")
    assert total.item() == pytest.approx(1 - sum(means) / depth)


def test_aligning_keeps_gradients_in_their_places() -> None:
    batch = ragged(TURNS)
    anchors = [batch.pairs(k).anchor for k in range(3)]
    values = [torch.rand(len(a), dtype=torch.float64, requires_grad=True) for a in anchors]
    aligned, mask = align(values, anchors)
    weight = torch.rand(aligned.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((aligned * weight).sum(), values)
    for k, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, weight[k][mask[k]])


def test_a_batch_that_supervises_nothing_aligns_to_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    aligned, mask = align([torch.zeros(0, dtype=torch.float64)] * 2, [none, none])
    assert aligned.shape == mask.shape == (2, 0)
    for weights in ("decay", "uniform", "survival"):
        assert (
            reduce(aligned, mask, depth_decay=1, depth_weights=weights, alpha_SN=aligned).item()
            == 0
        )


def test_survival_weighs_a_depth_by_the_detached_acceptance_before_it() -> None:
    loss = torch.tensor([[1.0, 3.0], [4.0, 9.0], [6.0, 6.0]], dtype=torch.float64)
    alpha = torch.tensor([[0.5, 0.25], [0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    alpha.requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    total = reduce(loss * alpha, mask, depth_decay=1, depth_weights="survival", alpha_SN=alpha)
    first = (1 * 0.5 + 3 * 0.25) / 2
    second = (0.5 * 4 * 0.5 + 0.25 * 9 * 1) / 2
    assert total.item() == pytest.approx(first + second + 0.25 * 6)
    (gradient,) = torch.autograd.grad(total, alpha)
    expected = torch.tensor([[0.5, 1.5], [1.0, 1.125], [1.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_uniform_weighs_all_depths_alike() -> None:
    loss = torch.tensor([[1.0, 3.0], [4.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert reduce(loss, mask, depth_decay=1, depth_weights="uniform").item() == 2 + 4
