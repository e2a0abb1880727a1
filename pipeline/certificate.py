"""What truncation costs, where full laws are at hand: widths and coverage of bounds, errors.

`verify` has no draft, so two stated ones stand in (DESIGN §5): the target itself at T = 1.5, which
is close, and the unigram of the cache's own supervised tokens, which is far. Neither depends on the
tail samples. Knows no target, no file and no stage.

Dims: N audited rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bounds import bounds, distance, estimate_slack, kl_bounds
from pipeline.law import Law
from pipeline.terms import terms

TEMPERATURE = 1.5
TARGET, UNIGRAM = "target at T=1.5", "unigram"
Columns = dict[str, NDArray[np.float64]]
"""Numbers of every audited row by name, [N] each."""
Certificate = dict[str, Columns]
"""By reference draft."""


def unigram(count_V: Tensor) -> NDArray[np.float32]:
    """[V] logits of the law of these counts, each one more so that no id is impossible."""
    logits: NDArray[np.float32] = torch.log(count_V.double() + 1).float().numpy()
    return logits


def reference_drafts(logp_NV: Tensor, unigram_V: Tensor) -> dict[str, Tensor]:
    """Logits [N, V] of the two references at rows whose full law is log p, in float32."""
    return {
        TARGET: (logp_NV / TEMPERATURE).float(),
        UNIGRAM: unigram_V.to(logp_NV.device).expand(logp_NV.shape),
    }


def certify(logp_NV: Tensor, law: Law, drafts: Mapping[str, Tensor]) -> Certificate:
    """Hold what the stored rows say against their full laws (float64 [N, V]), for each draft.

    Intervals are widened by what the full law differs from every one that the row may stand for
    (`bounds.distance`): the arithmetic of two runs of the target, and in mode `rebuild` what the
    rounding of a hidden state does to its law. Neither is the bounds', which the cache alone gives;
    only an audit can measure it. It is reported beside them.
    """
    off_N = distance(logp_NV, law)
    found = {}
    for name, logits_NV in drafts.items():
        logr_NV = logp_NV - logits_NV.double().log_softmax(-1)
        p_NV = logp_NV.exp()
        kl_N = (p_NV * logr_NV).sum(-1)
        alpha_N = torch.minimum(p_NV, (logp_NV - logr_NV).exp()).sum(-1)
        kl_hat_N, alpha_hat_N = terms(logits_NV, law)
        lo_N, hi_N = bounds(logits_NV, law)
        kl_lo_N, kl_hi_N = kl_bounds(logits_NV, law)
        slack_N, kl_slack_N = estimate_slack(
            logits_NV, law, alpha_width_N=hi_N - lo_N, kl_width_N=kl_hi_N - kl_lo_N
        )
        # d KL / d p = 1 + log p/q
        kl_off_N = off_N * (2 + logr_NV.abs().amax(-1))
        columns = {
            "alpha": alpha_N,
            "alpha_lo": lo_N - off_N,
            "alpha_hi": hi_N + off_N,
            "alpha_width": hi_N - lo_N,
            "alpha_error": alpha_hat_N - alpha_N,
            "alpha_slack": slack_N,
            "alpha_widened": off_N,
            "kl": kl_N,
            "kl_lo": kl_lo_N - kl_off_N,
            "kl_hi": kl_hi_N + kl_off_N,
            "kl_width": kl_hi_N - kl_lo_N,
            "kl_widened": kl_off_N,
            "kl_error": kl_hat_N - kl_N,
            "kl_slack": kl_slack_N,
        }
        found[name] = {key: x.numpy(force=True) for key, x in columns.items()}
    return found


def joined(parts: Sequence[Certificate]) -> Certificate:
    """The rows of several certificates, in order."""
    whole: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for part in parts:
        for draft, columns in part.items():
            for key, values in columns.items():
                whole.setdefault(draft, {}).setdefault(key, []).append(values)
    return {
        draft: {key: np.concatenate(values) for key, values in columns.items()}
        for draft, columns in whole.items()
    }


def covered(columns: Columns, name: str) -> NDArray[np.bool_]:
    """[N] whether the interval of `alpha` or `kl` holds the exact value."""
    # the exact sums err by float64's rounding
    inside: NDArray[np.bool_] = (columns[f"{name}_lo"] - 1e-12 <= columns[name]) & (
        columns[name] <= columns[f"{name}_hi"] + 1e-12
    )
    return inside


def summary(certificate: Certificate) -> dict[str, dict[str, Any]]:
    """By reference draft, what a report shows; an error's `se` takes rows as independent."""
    return {draft: _summed(columns) for draft, columns in certificate.items()}


def _summed(columns: Columns) -> dict[str, Any]:
    num_rows = len(columns["alpha"])
    found: dict[str, Any] = {"rows": num_rows}
    for name in ("alpha", "kl"):
        width, error = columns[f"{name}_width"], columns[f"{name}_error"]
        numbers = {
            "exact": columns[name].mean(),
            "width": width.mean(),
            "width_p99": np.quantile(width, 0.99),
            "widened": columns[f"{name}_widened"].mean(),
            "error": error.mean(),
            "error_se": error.std() / num_rows**0.5,
            "error_slack": columns[f"{name}_slack"].mean(),
            "covered": covered(columns, name).mean(),
        }
        found |= {f"{name}_{key}": round(float(value), 9) for key, value in numbers.items()}
    return found
