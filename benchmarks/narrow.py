"""How much narrower is a paired difference by replay than by decoding the same prompts?

Of every decoded arm against the baseline of its draft, the interval of the relative difference of τ
(`pipeline.statistics.compare`, these seeds: the seed that was decoded) once over the decoding
itself, once over the rows that replay gives of the decoded prompts, cut to the decoder's length,
and once over their whole rollouts. What is left of replay's interval is that prompts differ: no
instrument narrows that, so that the ratio is least where a loss helps some prompts and not others.
At T = 0 the two are the same rounds, so that only T > 0 says anything. Writes `narrow.md`.

    python benchmarks/narrow.py PROJECT
"""

import math
import sys
from pathlib import Path

from pipeline.config import load
from pipeline.findings import ReportConfig
from pipeline.matrix import Arm
from pipeline.results import DECODE, REPLAY, REPLAY_DECODE, Key, Results, read_results
from pipeline.statistics import Interval, Pair, Panel, compare

OUT = Path(__file__).with_suffix(".md")
WANTED = 5.0


def interval(results: Results, keys: tuple[Key, Key], config: ReportConfig) -> Interval:
    """Of the first column against the second, as a fraction."""
    panel = results.panel([[key] for key in keys])
    place = {name: n for n, name in enumerate(results.prompts[keys[0].instrument])}
    mine = [place[name] for name in results.prompts[DECODE]]
    panel = Panel(panel.tokens[:, mine], panel.rounds[:, mine], panel.strata[mine])
    found = compare(
        panel,
        [Pair((0,), (1,))],
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    return found[0].these_seeds


def percent(found: Interval) -> str:
    """`+3.10 [+2.85, +3.35]`."""
    return f"{100 * found.estimate:+.2f} [{100 * found.lo:+.2f}, {100 * found.hi:+.2f}]"


def main() -> None:
    """Read a finished project's results, compare the widths, write the table."""
    project = Path(sys.argv[1])
    params = project / "params.yaml"
    config: ReportConfig = load("report", ReportConfig, path=params)
    arms: dict[str, Arm] = load("arms", dict[str, Arm], path=params)
    here = [a for a in arms.values() if (project / "results" / a.start / "arms").is_dir()]
    results = read_results(project / "results", here)
    lines, ratios = [], []
    for key in (k for k in results.rounds if k.instrument == DECODE and k.temperature > 0):
        arm = arms[key.arm]
        base = next(
            a
            for a in here
            if (a.draft, a.seed, a.objective) == (arm.draft, arm.seed, config.baseline)
        )
        if base.key == arm.key:
            continue
        widths = []
        cells = []
        for instrument in (DECODE, REPLAY_DECODE, REPLAY):
            both = [
                Key(a, instrument, key.temperature, key.gamma, key.law) for a in (key.arm, base.key)
            ]
            if any(k not in results.rounds for k in both):
                break
            found = interval(results, (both[0], both[1]), config)
            widths.append(found.hi - found.lo)
            cells.append(percent(found))
        if len(widths) == 3:
            ratios.append(widths[0] / widths[1])
            lines.append(
                f"| {arm.key} | {base.key} | {key.setting.words} | {key.gamma} | {cells[0]} | "
                f"{cells[1]} | {ratios[-1]:.1f} | {cells[2]} | {widths[0] / widths[2]:.1f} |"
            )
    prompts = len(results.prompts[DECODE])
    said = (
        f"Of {prompts} prompts, the same in both; {100 * config.confidence:g} % intervals, "
        f"{config.resamples:,} resamples; each comparison is a family of its own."
    )
    head = (
        "| arm | against | law | γ | by decoding, % of τ | by replay to the same length | times "
        "narrower | by replay of whole rollouts | times narrower |"
    )
    last = (
        f"To the same length: {min(ratios):.1f} to {max(ratios):.1f} times narrower, geometric "
        f"mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.1f}; {WANTED:g} is asked for."
    )
    text = [
        said,
        "",
        head,
        "| --- | --- | --- | --- | --- | --- | ---: | --- | ---: |",
        *lines,
        "",
        last,
    ]
    OUT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
