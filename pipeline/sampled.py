"""Are a cache's tokens samples of its target's law? Their surprise against what the law expects.

At T = 1 the expected −log p of the next token is the law's entropy, whoever the target; a text of
another target of the same vocabulary is more surprising, or less. At T = 0 the token is the
likeliest. A sequence's rows depend on each other, but what a row's surprise exceeds its law's
entropy by is a martingale difference: sums of them have the sum of the rows' own variances, known
exactly from full laws. Text of no law (`data`) and of truncated or cooled ones is not asked.

    found = sum_up([surprise(logp_CV, token_C, law) for ...])
    require_samples(found, law, "train cache")

Knows no target, no file and no stage. Dims: C rows, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheError

SAMPLES, LIKELIEST = "T=1", "T=0"
STANDARD_ERRORS = 6.0
# Nats a token that the arithmetic of two engines may differ by: bfloat16 logits of 16 to 32 are
# 0.125 apart, so that a few tokens in a hundred are not the likeliest of another batch's pass.
ARITHMETIC = 0.03


@dataclass(frozen=True)
class Surprise:
    """−log p beyond what the law expects, over rows."""

    rows: int = 0
    excess: float = 0.0
    """Sum, nats."""
    variance: float = 0.0
    """Sum of the rows' variances under their laws, nats²; 0 at T = 0."""
    squares: float = 0.0
    """Sum of the squares that were found. Of a peaked law the variance is that of rare tokens,
    which few rows may not have met, or have met by chance; so the larger of the two counts."""

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.excess / max(1, self.rows)

    @property
    def standard_error(self) -> float:
        """Of `mean`, nats."""
        return float(max(self.variance, self.squares) ** 0.5 / max(1, self.rows))

    def summary(self) -> dict[str, float]:
        """As a report shows it."""
        return {
            "rows": self.rows,
            "excess_nats": round(self.mean, 9),
            "standard_error": round(self.standard_error, 9),
        }


def surprise(logp_CV: NDArray[np.float64], token_C: NDArray[np.integer], law: str) -> Surprise:
    """Of the tokens that follow C rows whose full law is log p; of no row where `law` is another.

    `law` is that of the responses: `T=1`, `T=0`, any other.
    """
    if law not in (SAMPLES, LIKELIEST) or not len(token_C):
        return Surprise()
    given_C = logp_CV[np.arange(len(token_C)), token_C]
    if law == LIKELIEST:
        off_C, variance = logp_CV.max(-1) - given_C, 0.0
    else:
        p_CV = np.exp(logp_CV)
        shown_CV = np.where(p_CV > 0, logp_CV, 0.0)  # an id that is ruled out has −inf
        entropy_C = -(p_CV * shown_CV).sum(-1)
        off_C = -given_C - entropy_C
        variance = float(((p_CV * shown_CV**2).sum(-1) - entropy_C**2).sum())
    return Surprise(len(token_C), float(off_C.sum()), variance, float((off_C**2).sum()))


def sum_up(parts: Iterable[Surprise]) -> Surprise:
    """Of all rows together."""
    whole = Surprise()
    for part in parts:
        whole = Surprise(
            whole.rows + part.rows,
            whole.excess + part.excess,
            whole.variance + part.variance,
            whole.squares + part.squares,
        )
    return whole


def require_samples(found: Surprise, law: str, where: str) -> None:
    """`CacheError` where the tokens are not samples of the law, or not its likeliest ones."""
    allowed = ARITHMETIC
    if law == SAMPLES:
        allowed += STANDARD_ERRORS * found.standard_error
    if abs(found.mean) <= allowed:
        return
    more = "less" if found.mean > 0 else "more"
    errors = f"{STANDARD_ERRORS:g} standard errors and a little " if law == SAMPLES else ""
    raise CacheError(
        found=f"{where}: what was said is {abs(found.mean):.3g} nats a token {more} likely than "
        f"the target's own responses at {law} ({found.rows} replayed tokens)",
        expected=f"at most {allowed:.3g} nats, {errors}for arithmetic",
        todo="another target, template or law answered the prompts: remove sequences/ and cache/ "
        "and run dvc repro, which answers them anew; text that is no sample of the target trains "
        "under generate.train_responses: data",
    )
