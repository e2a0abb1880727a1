"""What every loss promises: subclass `LossContract`, name the config, inherit every check.

Algebra on float64 logits against a sparse law, through the real terms: [S, N] anchors of S depths,
some of them masked.
"""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.config import parse
from pipeline.law import DenseLaw
from pipeline.loss import extra_terms, find, kinds, reduce
from pipeline.terms import terms
from storage.errors import ConfigError

S, N, V = 3, 5, 11
MASK_SN = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def laws(seed: int = 0, *, scale: float = 1.5) -> Tensor:
    """[S, N, V] logits."""
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(S, N, V, generator=g, dtype=torch.float64)


def terms_of(z_SNV: Tensor, target_SNV: Tensor, extra: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """kl_SN, alpha_SN and more against the law softmax(target)."""
    law = DenseLaw(target_SNV.flatten(0, 1).log_softmax(-1))
    return tuple(x.view(S, N) for x in terms(z_SNV.flatten(0, 1), law, extra=extra))


def total(
    module: Any, config: Any, z_SNV: Tensor, target_SNV: Tensor, mask_SN: Tensor = MASK_SN
) -> Tensor:
    """The scalar that training descends."""
    kl, alpha, *more = terms_of(z_SNV, target_SNV, extra_terms(config))
    return reduce(module.loss(kl, alpha, mask_SN, *more, config), mask_SN, depth_decay=0.8)


class LossContract:
    """Subclass with `section`; pytest runs every check below on it."""

    section: ClassVar[dict[str, Any]]

    @pytest.fixture
    def module(self) -> Any:
        return find(self.section["kind"])

    @pytest.fixture
    def config(self, module: Any) -> Any:
        return parse("losses.tested", self.section, module.Config)

    def test_is_found_by_its_file_name(self, module: Any) -> None:
        assert self.section["kind"] in kinds()
        assert module.__name__ == f"pipeline.losses.{self.section['kind']}"
        assert "MATHS (" in module.__doc__

    def test_refuses_a_parameter_that_it_does_not_read(self, module: Any) -> None:
        with pytest.raises(ConfigError, match=r"losses\.tested\.surplus is unknown"):
            parse("losses.tested", {**self.section, "surplus": 1}, module.Config)

    def test_is_zero_where_q_is_p(self, module: Any, config: Any) -> None:
        # its gradient need not be: α has a corner there, whose side the last bit decides
        assert total(module, config, laws(), laws()).item() == pytest.approx(0, abs=1e-12)

    def test_is_positive_elsewhere_and_worse_for_a_worse_draft(
        self, module: Any, config: Any
    ) -> None:
        losses = [total(module, config, laws() + x * laws(1), laws()) for x in (0.3, 1.0, 3.0)]
        assert 0 < losses[0] < losses[1] < losses[2]

    def test_its_gradient_raises_acceptance(self, module: Any, config: Any) -> None:
        z = laws(1).requires_grad_()
        before = terms_of(z, laws())[1][MASK_SN].mean()
        (gradient,) = torch.autograd.grad(total(module, config, z, laws()), z)
        after = terms_of(z - 0.5 * gradient, laws())[1][MASK_SN].mean()
        assert after > before

    def test_its_gradient_is_that_of_finite_differences(self, module: Any, config: Any) -> None:
        if getattr(config, "eta", 0):
            config = config.model_copy(update={"eta": 0.0})  # λ is detached: no such derivative
        z = laws(1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: total(module, config, x, laws()), (z,))

    def test_masked_anchors_have_no_influence(self, module: Any, config: Any) -> None:
        z = laws(1).requires_grad_()
        other = torch.where(MASK_SN[:, :, None], z.detach(), laws(2)).requires_grad_()
        first, second = (total(module, config, x, laws()) for x in (z, other))
        assert first.item() == second.item()
        (gradient,) = torch.autograd.grad(second, other)
        assert not gradient[~MASK_SN].any()

    def test_stays_finite_without_overlap(self, module: Any, config: Any) -> None:
        # p a point mass, q e^−600 there; and α̂ = 0, as where nothing lies in the draft vocabulary
        target = torch.full((S, N, V), -1e30, dtype=torch.float64)
        target[..., 0] = 0
        z = torch.zeros(S, N, V, dtype=torch.float64)
        z[..., 0] = -600
        z.requires_grad_()
        loss = total(module, config, z, target)
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        zero = torch.zeros(S, N, dtype=torch.float64, requires_grad=True)
        more = [zero] * len(extra_terms(config))
        out = reduce(module.loss(zero, zero, MASK_SN, *more, config), MASK_SN, depth_decay=0.8)
        (pull,) = torch.autograd.grad(out, zero, allow_unused=True)
        assert torch.isfinite(out)
        assert pull is None or torch.isfinite(pull).all()

    def test_an_empty_mask_gives_zero_and_pulls_nowhere(self, module: Any, config: Any) -> None:
        z = laws(1).requires_grad_()
        out = total(module, config, z, laws(), torch.zeros_like(MASK_SN))
        (gradient,) = torch.autograd.grad(out, z)
        assert out.item() == 0
        assert not gradient.any()
