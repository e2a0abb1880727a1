"""`lkcache compare A B`: results of two projects or git revisions, paired as in the report."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from pipeline.compare import Across, Between, between
from pipeline.config import load, read_params
from pipeline.findings import ReportConfig
from pipeline.matrix import Arm
from pipeline.results import Results, read_results
from pipeline.statistics import Interval, digits_for, percent, verdict
from storage.errors import ConfigError, LkcacheError, ResultError
from storage.tables import ROUNDS, read_table
from storage.workspace import read_json

# for results without their project's parameters
DEFAULT = ReportConfig(baseline="kl", gammas=[4], confidence=0.95, resamples=5000, seed=0)
FETCHED = ("params.yaml", "results", "target/target.json", "cache-report")


@dataclass(frozen=True)
class Side:
    """One of the two."""

    name: str
    """As the user gave it."""
    arms: list[Arm]
    results: Results
    config: ReportConfig | None
    identity: Mapping[str, str] = field(default_factory=dict)
    """What is known of target, prompts and cache: only where the project's records are there."""


def compare(
    a: Annotated[str, Argument(help="A project, its results folder, or REV:PROJECT.")],
    b: Annotated[str, Argument(help="What to compare with it: the same three forms.")],
    gamma: Annotated[
        int, Option(help="γ, drafted tokens a round; 0 takes the first of report.gammas.")
    ] = 0,
    across_caches: Annotated[
        bool,
        Option(
            "--across-caches",
            help="Allow drafts trained from different caches of one target and prompts.",
        ),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say whether B's drafts accept more than A's: the same draft, objective and seed in both.

    The verdicts are the report's: τ by exact replay, paired by prompt and seed, intervals
    simultaneous over the comparisons. REV:PROJECT takes a git revision's results through DVC, such
    as `HEAD~1:.`; they must be in DVC's cache or remote.
    """
    _need_scipy()
    with tempfile.TemporaryDirectory() as folder:
        sides = [_read(name, Path(folder) / str(n)) for n, name in enumerate((a, b))]
    for what, todo in (
        ("target", "compare drafts of one target"),
        ("prompts", "compare results on one set of rollouts"),
        ("cache", "pass --across-caches if the caches are what you compare"),
    ):
        if what != "cache" or not across_caches:
            _check_same(*sides, what=what, todo=todo)
    config = sides[0].config or sides[1].config or DEFAULT
    if gamma:
        config = config.model_copy(update={"gammas": [gamma]})
    found = between(sides[0].results, sides[1].results, config, names=(a, b))
    if gamma and found.gamma != gamma:
        raise ResultError(
            found=f"no replay at γ = {gamma} in both",
            expected=f"a γ that both replayed, such as {found.gamma}",
            todo="correct --gamma",
        )
    if as_json:
        print(json.dumps(_plain(found, a, b), indent=1, ensure_ascii=False))
    else:
        _show(found, sides)


def _need_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ConfigError(
            found="no scipy in this environment",
            expected="it, for the intervals",
            todo="pip install 'lkcache[pipeline]'",
        ) from None


def _read(name: str, scratch: Path) -> Side:
    """Results of a folder, or of a revision fetched into `scratch`."""
    folder = Path(name)
    if not folder.is_dir():
        revision, colon, project = name.partition(":")
        if not colon or not revision:
            raise ConfigError(
                found=f"no folder {name}",
                expected="a project, its results folder, or a git revision as REV:PROJECT",
                todo="correct the path",
            )
        _fetch(Path(project or "."), revision, scratch)
        folder = scratch
    root = folder if (folder / "results").is_dir() else folder.parent
    results = root / "results" if (folder / "results").is_dir() else folder
    params = root / "params.yaml"
    arms = _listed(params) if params.is_file() else _found(results, name)
    return Side(
        name=name,
        arms=arms,
        results=read_results(results, arms),
        config=load("report", ReportConfig, path=params) if _has_report(params) else None,
        identity=_identity(root),
    )


def _listed(params: Path) -> list[Arm]:
    arms: dict[str, Arm] = load("arms", dict[str, Arm], path=params)
    return list(arms.values())


def _has_report(params: Path) -> bool:
    return params.is_file() and "report" in read_params(params)


def _found(results: Path, name: str) -> list[Arm]:
    """The arms of a results folder without parameters, as its tables name them."""
    arms = []
    for path in sorted(results.glob("*/arms/*.rounds.parquet")):
        for row in read_table(path, ROUNDS)[:1]:
            own = {key: row[key] for key in ("draft", "kind", "objective", "loss", "seed")}
            arms.append(Arm(**own, start=path.parents[1].name))
    if not arms:
        raise ResultError(
            found=f"{name} holds no results",
            expected="<start>/arms/<objective>.rounds.parquet, as evaluate writes them",
            todo="run dvc repro evaluate there, or correct the path",
        )
    return arms


def _identity(root: Path) -> dict[str, str]:
    """Target, prompts and cache, as far as the project's records say."""
    known: dict[str, str] = {}
    with suppress(LkcacheError, KeyError):
        known["target"] = read_json(root / "target" / "target.json")["fingerprint"]
    try:
        source = read_json(root / "cache-report" / "report.json")["source"]
    except (LkcacheError, KeyError):
        return known
    known["prompts"] = " ".join(source[s]["sequences"] for s in sorted(source) if s != "train")
    known["cache"] = " ".join(sorted({source[split]["capture"] for split in source}))
    return known


def _check_same(a: Side, b: Side, *, what: str, todo: str) -> None:
    left, right = a.identity.get(what), b.identity.get(what)
    if left and right and left != right:
        raise ResultError(
            found=f"{a.name} is of {what} {_short(left)} and {b.name} of {what} {_short(right)}",
            expected=f"one {what}" if what != "prompts" else "the same prompts and rollouts",
            todo=todo,
        )


def _short(digests: str) -> str:
    return " ".join(f"{digest[:12]}…" for digest in digests.split())


def _fetch(project: Path, revision: str, into: Path) -> None:
    """A revision's parameters, results and records, through DVC."""
    try:
        from dvc.api import DVCFileSystem
    except ImportError:
        raise ConfigError(
            found="no dvc in this environment",
            expected=f"it, to take results of {revision}",
            todo="pip install 'lkcache[pipeline]', or compare two folders",
        ) from None
    into.mkdir(parents=True)
    try:
        system = DVCFileSystem(url=str(project.resolve()), rev=revision)
        system.ls("/", detail=False)  # `exists` calls an unknown revision an absent file
        present = [name for name in FETCHED if system.exists(name)]
        for name in present:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            system.get(name, str(into / name), recursive=system.isdir(name))
    except Exception as error:  # DVC and git raise kinds of their own, which share no base
        raise ResultError(
            found=f"{revision}:{project} cannot be taken ({' '.join(str(error).split())[:200]})",
            expected="a git revision of a DVC project whose results are in DVC's cache or remote",
            todo="correct the revision, or run dvc pull results there",
        ) from None
    if not (into / "results").is_dir():
        raise ResultError(
            found=f"{revision}:{project} has no results",
            expected="a revision in which evaluate had run",
            todo="name another revision",
        )


def _direction(row: Across) -> str:
    interval = row.comparison.difference.verdict
    if row.same:
        return "same"
    if not interval.decided:
        return "open"
    return "longer" if interval.estimate > 0 else "shorter"


def _sentence(row: Across) -> str:
    c = row.comparison
    if row.same:
        return (
            f"{c.draft} {c.objective} takes the same rounds in A and B on every prompt at "
            f"T = {c.temperature:g}"
        )
    return verdict(
        c.difference,
        objective=f"{c.draft} {c.objective} of B",
        baseline="that of A",
        temperature=c.temperature,
    )


def _plain(found: Between, a: str, b: str) -> dict[str, Any]:
    """Everything, fractions as they are."""
    rows = []
    for row in found.rows:
        c = row.comparison
        rows.append(
            {
                "draft": c.draft,
                "objective": c.objective,
                "temperature": c.temperature,
                "tau_a": row.tau_a,
                "tau_b": row.tau_b,
                "direction": _direction(row),
                "verdict": _sentence(row),
                **asdict(c.difference),
            }
        )
    head = {"a": a, "b": b, "gamma": found.gamma, "prompts": found.prompts}
    return {**head, "comparisons": rows, "only_a": found.only_a, "only_b": found.only_b}


def _show(found: Between, sides: list[Side]) -> None:
    console = Console()
    for letter, side in zip("AB", sides, strict=True):
        console.print(Text(f"{letter}  {side.name}"), soft_wrap=True)
        if "prompts" not in side.identity:
            console.print(
                Text(
                    "   (no records of target and cache beside it: only prompts and the lengths of "
                    "their responses were compared)"
                )
            )
    ordered = sorted(found.rows, key=lambda row: -row.comparison.temperature)
    console.print()
    if all(row.same for row in ordered):
        console.print("every arm takes the same rounds in A and B on every prompt")
    for row in [] if all(row.same for row in ordered) else ordered:
        mark = {"longer": "+", "shorter": "−", "open": "·", "same": "="}[_direction(row)]
        console.print(Text(f"{mark} {_sentence(row)}"))
    table = Table(
        title=f"\nτ by replay at γ = {found.gamma}, {found.prompts:,} prompts; differences of B in "
        "percent of A, intervals simultaneous over this table",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    titles = (
        "draft",
        "objective",
        "T",
        "τ A",
        "τ B",
        "B − A, %",
        "these seeds",
        "over seeds",
        "seeds",
    )
    for n, title in enumerate(titles):
        left = n in (0, 1, 6, 7)
        table.add_column(title, justify="left" if left else "right", no_wrap=n > 1, overflow="fold")
    for row in ordered:
        c, d = row.comparison, row.comparison.difference
        over = _ends(d.over_seeds) if d.over_seeds else "withheld"
        table.add_row(
            Text(c.draft),
            Text(c.objective),
            f"{c.temperature:g}",
            f"{row.tau_a:.3f}",
            f"{row.tau_b:.3f}",
            percent(d.these_seeds.estimate, digits=digits_for(d.these_seeds)),
            Text(_ends(d.these_seeds)),
            Text(over),
            str(d.seeds),
        )
    console.print(table)
    for letter, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            console.print(Text(f"\nonly in {letter}: {', '.join(keys)}"))


def _ends(interval: Interval) -> str:
    digits = digits_for(interval)
    return f"[{percent(interval.lo, digits=digits)}, {percent(interval.hi, digits=digits)}]"
