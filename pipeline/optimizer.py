"""AdamW, gradient clipping and the learning rate's course, without torch.optim.

`torch.optim` imports torch._dynamo when its first optimizer is made: 1.5-2 s, which is a tenth of a
default training cell (measured, torch 2.13). The update is the same, to the last bits: a test
compares the two. Sharded parameters (FSDP2) are updated slice by slice. MATHS (18)-(19).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.ranks import local

EPS = 1e-8  # torch's and the paper's default


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        betas: tuple[float, float],
        *,
        weight_decay: float,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`total` sums a scalar over the processes, where each holds a slice (`Ranks`)."""
        self.params, self.betas, self.weight_decay = list(params), betas, weight_decay
        self._total = total
        self.step_count = 0
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self) -> None:
        """Forget the gradients; a parameter without one is left alone by `step`."""
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        """Scale all gradients so that their joint norm is at most `limit`; returns the norm."""
        grads = [local(p.grad) for p in self.params if p.grad is not None]
        joint = torch.stack([g.norm() for g in grads]).norm()
        if self._total is not None:
            joint = self._total(joint.square()).sqrt()
        norm = joint.item()
        if norm > limit:
            for g in grads:
                g.mul_(limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients at hand."""
        self.step_count += 1
        beta1, beta2 = self.betas
        rate = lr / (1 - beta1**self.step_count)
        root = math.sqrt(1 - beta2**self.step_count)
        for whole_p, whole_mean, whole_square in zip(
            self.params, self.mean, self.square, strict=True
        ):
            if whole_p.grad is None:
                continue
            p, grad = local(whole_p), local(whole_p.grad)
            mean, square = local(whole_mean), local(whole_square)
            p.mul_(1 - lr * self.weight_decay)
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p.addcdiv_(mean, square.sqrt().div_(root).add_(EPS), value=-rate)


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, final: float) -> float:
    """Linear to `peak` over `warmup` steps, then a cosine down to `final` · peak at the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    turn = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, turn))))
