"""What was measured of one arm, as rows of a model card; torch-free.

Every τ stands with its interval, by prompt, over all domains: replay is exact on held-out rollouts,
decode is real speculative decoding (DESIGN §7).
"""

from pathlib import Path

from pipeline.matrix import Arm
from pipeline.results import DECODE, REPLAY, Key, read_results
from pipeline.statistics import Panel, tau
from storage.errors import ResultError

# a card is read once: the report's own figures use its parameters
CONFIDENCE, RESAMPLES, SEED = 0.95, 2000, 0


def rows(results: Path, arm: Arm) -> list[str]:
    """A Markdown table of τ by instrument, temperature and γ, or the sentence why there is none.

    An export does not fail for want of rollouts that replay could score.
    """
    try:
        found = read_results(results, [arm])
    except ResultError as error:
        return [f"No τ of this arm: {error}"]
    keys = sorted(
        (key for key in found.rounds if key.instrument in (REPLAY, DECODE)),
        key=lambda key: (key.instrument, key.setting.order, key.gamma),
    )
    lines = [
        f"τ, tokens per target pass with the bonus token; {CONFIDENCE:.0%} intervals by prompt.",
        "",
        "| instrument | law | γ | τ | interval | prompts |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_row(found.panel([[key]]), key) for key in keys]


def _row(panel: Panel, key: Key) -> str:
    """One instrument, law and γ."""
    interval = tau(panel, confidence=CONFIDENCE, resamples=RESAMPLES, seed=SEED)[0]
    return (
        f"| {key.instrument} | {key.setting.words} | {key.gamma} | {interval.estimate:.3f} | "
        f"{interval.lo:.3f} – {interval.hi:.3f} | {int((panel.rounds > 0).sum())} |"
    )
