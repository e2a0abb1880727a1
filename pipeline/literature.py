"""What arXiv 2602.23881 (v2) reports of each architecture and loss, for a report to stand beside.

τ of MT-Bench, HumanEval and GSM8K at T = 0 and 1, from its Tables 1 and 4; a gain is the mean over
the three sets against the same draft under KL. Its drafts are trained from random weights (MTP:
from the target's own module) and draft chains of 7 (MEDUSA and MLP: 6). It prints no interval.

Knows names of drafts' and losses' kinds, nothing of our results.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Sets = tuple[float, float, float]


@dataclass(frozen=True)
class Loss:
    """A loss as the paper tells them apart: its kind and, where it has one, η or λ."""

    kind: str
    setting: float | None = None


@dataclass(frozen=True)
class Published:
    """One draft of the paper: τ of the three sets by temperature and loss."""

    name: str
    tau: Mapping[float, Mapping[Loss, Sets]]

    def gain(self, loss: Loss, temperature: float) -> float | None:
        """Mean τ over the sets against KL's, as a fraction; None where the paper has no row."""
        rows = self.tau.get(temperature, {})
        if loss not in rows:
            return None
        return sum(rows[loss]) / sum(rows[KL]) - 1


KL, TV, ALPHA = Loss("kl"), Loss("tv"), Loss("lk_alpha")
FIXED = Loss("lk_fixed", 0.5)


def _eta(eta: float) -> Loss:
    return Loss("lk_lambda", eta)


EAGLE3 = Published(
    "EAGLE-3, Llama-3.1-8B",
    {
        0: {
            KL: (3.75, 4.82, 4.50),
            TV: (2.81, 3.42, 3.34),
            ALPHA: (3.77, 4.82, 4.55),
            FIXED: (3.78, 4.84, 4.53),
            _eta(0.7): (3.79, 4.88, 4.54),
            _eta(1): (3.80, 4.83, 4.54),
            _eta(3): (3.84, 4.89, 4.57),
            _eta(10): (3.67, 4.85, 4.53),
        },
        1: {
            KL: (3.39, 4.31, 3.88),
            TV: (2.67, 3.25, 3.12),
            ALPHA: (3.50, 4.48, 3.98),
            FIXED: (3.35, 4.36, 3.95),
            _eta(0.7): (3.53, 4.45, 3.98),
            _eta(1): (3.51, 4.47, 3.96),
            _eta(3): (3.48, 4.52, 4.02),
            _eta(10): (3.34, 4.51, 4.03),
        },
    },
)
MEDUSA = Published(
    "MEDUSA, Llama-3.1-8B",
    {
        0: {KL: (2.05, 2.41, 2.11), ALPHA: (2.06, 2.42, 2.11), _eta(10): (2.07, 2.44, 2.13)},
        1: {KL: (1.72, 2.02, 1.81), ALPHA: (1.78, 2.09, 1.85), _eta(10): (1.85, 2.22, 1.92)},
    },
)
MLP = Published(
    "MLP, Llama-3.1-8B",
    {
        0: {KL: (2.45, 2.42, 2.42), ALPHA: (2.48, 2.46, 2.46), _eta(3): (2.48, 2.83, 2.46)},
        1: {KL: (2.13, 2.16, 2.16), ALPHA: (2.17, 2.19, 2.19), _eta(3): (2.19, 2.62, 2.18)},
    },
)
MTP = Published(
    "MTP, DeepSeek-V3",
    {
        0: {KL: (3.96, 4.74, 5.67), _eta(3): (4.00, 4.77, 5.72)},
        1: {KL: (3.66, 4.39, 5.23), _eta(3): (3.88, 4.64, 5.51)},
    },
)
BY_KIND: Mapping[str, Published] = {
    "eagle3": EAGLE3,
    "medusa": MEDUSA,
    "mlp": MLP,
    "mtp": MTP,
    "lm": EAGLE3,  # the paper has no standalone LM; its ablation is of EAGLE-3
}


def loss_of(section: Mapping[str, object]) -> Loss:
    """A section of `losses` in the paper's terms."""
    setting = {"lk_lambda": "eta", "lk_fixed": "weight"}.get(str(section.get("kind")))
    value = section.get(setting) if setting else None
    return Loss(str(section.get("kind")), float(value) if isinstance(value, int | float) else None)
