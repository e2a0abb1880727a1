"""Result tables of the arms that the parameters list -> arrays over the same prompts, checked.

Arms are never globbed: what `arms:` lists must be there, and every row must name its arm. Paired
statistics need every arm to have seen the same prompts and, in replay, the same rollouts; where
they differ the results come of different caches, prompts or targets, and nothing is compared.

Knows tables, not statistics' use of them nor pages. Dims: N prompts, C columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.chat import talk_name
from pipeline.matrix import Arm
from pipeline.setting import Setting
from pipeline.statistics import Floats, Panel
from storage.errors import ResultError
from storage.tables import DEPTHS, ROUNDS, STRATA, read_table

REPLAY, DECODE, REPLAY_DECODE = "replay", "decode", "replay_decode"
BLOCK = "replay_block"
ALL = "all"
MIN_PROMPTS = 2
COUNTS = ("tokens", "rounds", "drafted", "accepted")
STRATUM_SUMS = ("anchors", "alpha", "accept", "survive")
SUMS = ("anchors", "alpha", "alpha_lo", "alpha_hi", "accept", "survive")


@dataclass(frozen=True)
class Key:
    """What one column of a panel holds."""

    arm: str
    instrument: str
    temperature: float
    gamma: int
    law: str | None = None
    """None: that temperature alone, drafts sampled; else the law's name (`pipeline.setting`)."""

    @property
    def setting(self) -> Setting:
        """The law and the drafts."""
        return Setting(self.temperature) if self.law is None else Setting.parse(self.law)


@dataclass(frozen=True, order=True)
class Stratum:
    """Anchors of one kind: lo ≤ value < hi."""

    kind: str
    """`position` (of the drafted token in its response) or `entropy` (nats of its law)."""
    lo: float
    hi: float


@dataclass
class Results:
    """All rounds and depths of the listed arms."""

    arms: list[Arm]
    prompts: dict[str, list[str]] = field(default_factory=dict)
    """Prompts of each instrument, in the order of the first arm's table."""
    domain: dict[str, str] = field(default_factory=dict)
    """Domain of each prompt."""
    rounds: dict[Key, dict[str, Floats]] = field(default_factory=dict)
    """By column: tokens, rounds, drafted, accepted [N], zero where the column lacks a prompt."""
    depths: dict[tuple[str, float, int], dict[str, float]] = field(default_factory=dict)
    """By arm, temperature, depth: the sums of `SUMS` over prompts, of laws that are plain."""
    served_depths: dict[tuple[str, str, int], dict[str, float]] = field(default_factory=dict)
    """By arm, law, depth: the same of laws that are not plain."""
    where: dict[tuple[str, float, "Stratum", int], dict[str, float]] = field(default_factory=dict)
    """By arm, temperature, kind of anchor, depth: the sums of `STRATUM_SUMS`; plain laws alone."""

    @property
    def drafts(self) -> list[str]:
        """Drafts in the order of the parameters."""
        return list(dict.fromkeys(arm.draft for arm in self.arms))

    def objectives(self, draft: str | None = None) -> list[str]:
        """Objectives in the order of the parameters."""
        return list(
            dict.fromkeys(a.objective for a in self.arms if draft is None or a.draft == draft)
        )

    def of(self, draft: str, objective: str) -> list[Arm]:
        """Arms of a draft and objective, by seed."""
        found = [a for a in self.arms if a.draft == draft and a.objective == objective]
        return sorted(found, key=lambda arm: arm.seed)

    def temperatures(self) -> list[float]:
        """Temperatures of the replayed rounds, ascending; those of plain laws."""
        replayed = [key for key in self.rounds if key.instrument == REPLAY and key.law is None]
        return sorted({key.temperature for key in replayed})

    def laws(self) -> list[str]:
        """Laws that are not plain, replayed or decoded, by `Setting.order`."""
        names = {key.law for key in self.rounds if key.law is not None}
        return sorted(names, key=lambda name: Setting.parse(name).order)

    def gammas(self, arm: str, temperature: float) -> list[int]:
        """γ that an arm was replayed with."""
        return sorted(
            key.gamma
            for key in self.rounds
            if (key.arm, key.instrument, key.temperature, key.law)
            == (arm, REPLAY, temperature, None)
        )

    def domains(self, instrument: str = REPLAY) -> list[str]:
        """Domains of an instrument's prompts, by name."""
        return sorted({self.domain[prompt] for prompt in self.prompts[instrument]})

    def strata(self, instrument: str) -> NDArray[Any]:
        """[N] domain of each prompt of an instrument."""
        return np.array([self.domain[prompt] for prompt in self.prompts[instrument]])

    def turns(self, instrument: str) -> NDArray[Any]:
        """[N] turn of each prompt in its conversation, from 0."""
        names = self.prompts[instrument]
        known = set(names)
        return np.array(
            [int(p.rpartition("#")[2]) if talk_name(p, known) != p else 0 for p in names]
        )

    def by_talk(self, instrument: str, tokens_CN: Floats, rounds_CN: Floats) -> Panel:
        """The panel of an instrument's prompts, turns of one conversation added up.

        They share their text, so that a conversation is what a bootstrap may draw.
        """
        names = self.prompts[instrument]
        known, strata_N = set(names), self.strata(instrument)
        place: dict[str, int] = {}
        at_N = np.array([place.setdefault(talk_name(p, known), len(place)) for p in names])
        if len(place) == len(names):
            return Panel(tokens_CN, rounds_CN, strata_N)
        first = np.unique(at_N, return_index=True)[1]
        added = [np.zeros((len(tokens_CN), len(place))) for _ in range(2)]
        for total, values in zip(added, (tokens_CN, rounds_CN), strict=True):
            np.add.at(total.T, at_N, values.T)
        return Panel(added[0], added[1], strata_N[first])

    def panel(
        self, columns: Sequence[Sequence[Key]], *, domain: str = ALL, turn: int | None = None
    ) -> Panel:
        """One column per group of keys of one instrument, the group's arms pooled.

        Over the prompts of a domain, and of a turn of their conversations, or over all.
        """
        instrument = columns[0][0].instrument
        strata_N = self.strata(instrument)
        inside_N = np.ones(len(strata_N)) if domain == ALL else (strata_N == domain) * 1.0
        if turn is not None:
            inside_N = inside_N * (self.turns(instrument) == turn)
        stacked = [
            np.stack([sum_of(self.rounds[key][name] for key in group) for group in columns])
            for name in ("tokens", "rounds")
        ]
        return self.by_talk(instrument, stacked[0] * inside_N, stacked[1] * inside_N)


def sum_of(arrays: Iterable[Floats]) -> Floats:
    """The sum of equally long arrays."""
    total: Floats = np.sum(list(arrays), axis=0)
    return total


def read_results(root: Path, arms: Sequence[Arm]) -> Results:
    """Read `<root>/<start>/arms/<objective>.{rounds,depths,strata}.parquet` of every listed arm.

    `ResultError` where a row names another arm, or where two arms did not see the same prompts
    (in replay: the same rollouts).
    """
    results = Results(list(arms))
    first: dict[tuple[str, str], tuple[str, dict[str, int]]] = {}
    tables = {}
    for arm in arms:
        stem = root / arm.start / "arms"
        path = stem / f"{arm.objective}.rounds.parquet"
        tables[arm.key] = _by_column(_own(read_table(path, ROUNDS), arm, path), arm)
        path = stem / f"{arm.objective}.depths.parquet"
        _add_depths(results, _own(read_table(path, DEPTHS), arm, path), arm)
        path = stem / f"{arm.objective}.strata.parquet"
        for row in _own(read_table(path, STRATA), arm, path):
            if _law(row) is not None:
                continue
            stratum = Stratum(row["by"], row["lo"], row["hi"])
            sums = {name: row[name] or 0.0 for name in STRATUM_SUMS}
            results.where[arm.key, row["temperature"], stratum, row["depth"]] = sums
        for key, rows in tables[arm.key].items():
            _same_prompts(first, key, rows)
            for row in rows:
                results.domain.setdefault(row["prompt"], row["domain"])
    _index(results, tables)
    if REPLAY not in results.prompts:
        raise ResultError(
            found="no arm was replayed",
            expected="rollouts of the target's own, which replay scores: of T=0, T=1 or a law of "
            "generate.laws",
            todo="name one of these in evaluate.laws and run dvc repro",
        )
    for instrument, prompts in results.prompts.items():
        known = set(prompts)
        if len({talk_name(p, known) for p in prompts}) < MIN_PROMPTS:
            raise ResultError(
                found=f"{instrument} was run on {len(prompts)} prompt",
                expected=f"at least {MIN_PROMPTS}, because intervals are by prompt",
                todo="raise prepare.heldout_prompts or evaluate.decode_prompts",
            )
    return results


_setting = lru_cache(maxsize=256)(Setting.parse)  # of every row of every table


def _law(row: Mapping[str, Any]) -> str | None:
    """A row's law where it is not plain; `ResultError` where that is no law's name."""
    try:
        setting = _setting(row["law"])
    except ValueError as error:
        raise ResultError(
            found=f"a row of {row['arm']} names the law {row['law']!r}",
            expected=str(error),
            todo="run dvc repro evaluate",
        ) from None
    return None if setting.plain else setting.name


def _own(rows: list[dict[str, Any]], arm: Arm, path: Path) -> list[dict[str, Any]]:
    """Rows that all name their arm."""
    for row in rows:
        if row["arm"] != arm.key:
            raise ResultError(
                found=f"{path} holds rows of the arm {row['arm']}",
                expected=f"rows of {arm.key} alone, as params.yaml names it",
                todo=f"run dvc repro evaluate@{arm.start}",
            )
    if not rows:
        raise ResultError(
            found=f"{path} holds no rows",
            expected=f"the results of {arm.key}",
            todo=f"run dvc repro evaluate@{arm.start}",
        )
    return rows


def _by_column(rows: list[dict[str, Any]], arm: Arm) -> dict[Key, list[dict[str, Any]]]:
    columns: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        key = Key(arm.key, row["instrument"], row["temperature"], row["gamma"], _law(row))
        columns.setdefault(key, []).append(row)
    return columns


def _same_prompts(
    first: dict[tuple[str, str], tuple[str, dict[str, int]]],
    key: Key,
    rows: list[dict[str, Any]],
) -> None:
    """Every arm's prompts (and tokens, where rollouts are shared) equal the first arm's."""
    mine = {row["prompt"]: row["tokens"] for row in rows}
    setting = key.setting
    other, theirs = first.setdefault((key.instrument, setting.name), (key.arm, mine))
    what = f"{key.instrument} at {setting.words}"
    if mine.keys() != theirs.keys() or len(mine) != len(rows):
        odd = sorted(mine.keys() ^ theirs.keys())[:1] or ["a prompt twice"]
        raise ResultError(
            found=f"{what}: {key.arm} has {len(rows)} prompts and {other} {len(theirs)}, "
            f"which differ in {odd[0]}",
            expected="the same prompts for every arm, because differences are paired by prompt",
            todo="run dvc repro evaluate for both",
        )
    # sampled texts differ by arm: where T > 0, and after them every further turn
    if not key.instrument.startswith(DECODE) and mine != theirs:
        odd = sorted(prompt for prompt in mine if mine[prompt] != theirs[prompt])[:1]
        raise ResultError(
            found=f"{what}: {key.arm} and {other} replayed different rollouts of {odd[0]}",
            expected="one cache and target for every arm of a report",
            todo="run dvc repro evaluate for both",
        )


def _index(results: Results, tables: Mapping[str, dict[Key, list[dict[str, Any]]]]) -> None:
    """Arrays over one order of prompts per instrument."""
    for columns in tables.values():
        for key, rows in columns.items():
            known = results.prompts.setdefault(key.instrument, [])
            known.extend(sorted({row["prompt"] for row in rows} - set(known)))
    places = {k: {p: n for n, p in enumerate(names)} for k, names in results.prompts.items()}
    for columns in tables.values():
        for key, rows in columns.items():
            place = places[key.instrument]
            order = [place[row["prompt"]] for row in rows]
            arrays = {}
            for name in COUNTS:
                arrays[name] = np.zeros(len(place))
                arrays[name][order] = [row[name] for row in rows]
            results.rounds[key] = arrays


def _add_depths(results: Results, rows: list[dict[str, Any]], arm: Arm) -> None:
    for row in rows:
        law, zeros = _law(row), dict.fromkeys(SUMS, 0.0)
        if law is None:
            key = (arm.key, row["temperature"], row["depth"])
            sums = results.depths.setdefault(key, zeros)
        else:
            sums = results.served_depths.setdefault((arm.key, law, row["depth"]), zeros)
        for name in SUMS:
            sums[name] += row[name] or 0
