"""`lkcache matrix ROW ...`: write the cells of `params.yaml` from lists."""

from collections.abc import Mapping
from typing import Annotated, Any

from typer import Argument, Option

from lkcache.presets import dump, write_cells, yaml
from lkcache.words import counted
from pipeline.config import PARAMS, read_params
from pipeline.matrix import Export
from storage.errors import ConfigError


def matrix(
    rows: Annotated[list[str], Argument(help="DRAFT:SEEDS:OBJECTIVES, such as lm:0,1,2:kl,tv.")],
    export: Annotated[
        list[str] | None,
        Option(help="ARM:FORMAT, such as lm-lk_lambda-0:transformers; may be given again."),
    ] = None,
) -> None:
    """Write `starts` and `arms` from rows like `lm:0,1,2:kl,tv,lk_lambda`; exports are kept.

    An export of an arm that is no longer in the matrix is dropped, and said so. --export adds one.
    """
    lists = _lists(rows)
    for section in ("drafts", "losses", "exports"):
        if not isinstance(read_params().get(section), dict):
            raise ConfigError(
                found=f"{PARAMS} has no mapping {section}",
                expected="the whole parameter file of a project",
                todo="correct it, or write it anew with lkcache use PRESET",
            )
    params = yaml().load(PARAMS)
    old: dict[str, list[str]] = {}
    for key, cell in params["exports"].items():
        old.setdefault(Export(**cell).arm(key), []).append(cell["format"])
    for arm, form in map(_export, export or []):
        if form not in old.setdefault(arm, []):
            old[arm].append(form)
    asked = {arm: old[arm] for arm, _ in map(_export, export or [])}
    write_cells(params, lists, asked)  # refuses an arm that was asked for and is not there
    kept = {arm: forms for arm, forms in old.items() if arm in params["arms"]}
    write_cells(params, lists, kept)
    dump(params, PARAMS)
    blocks = ("start", "arm", "export")
    print(f"{PARAMS}: {', '.join(counted(len(params[f'{name}s']), name) for name in blocks)}")
    for arm in old.keys() - kept.keys():
        print(f"export of {arm} was dropped: no such arm any more")
    _tell_seeds(read_params())


def _tell_seeds(params: Mapping[str, Any]) -> None:
    """`check` refuses to decode a seed that no start has: say so while the rows are at hand."""
    seeds = sorted({cell["seed"] for cell in params["starts"].values()})
    asked = (params.get("evaluate") or {}).get("decode_seeds") or []
    if stray := [seed for seed in asked if seed not in seeds]:
        print(
            f"evaluate.decode_seeds names {stray[0]}, the seed of no start: set it to seeds of "
            f"{', '.join(map(str, seeds))}, or to []"
        )


def _lists(rows: list[str]) -> dict[str, dict[str, list[int] | list[str]]]:
    """Seeds and objectives by draft, a row each."""
    lists: dict[str, dict[str, list[int] | list[str]]] = {}
    for row in rows:
        draft, cells = _row(row)
        if draft in lists:
            raise ConfigError(
                found=f"two rows of the draft {draft}",
                expected="one, with all its seeds and objectives",
                todo=f"write them as one row {draft}:SEEDS:OBJECTIVES",
            )
        lists[draft] = cells
    return lists


def _export(text: str) -> tuple[str, str]:
    arm, colon, form = text.partition(":")
    if not (arm and colon and form):
        raise ConfigError(
            found=f"--export {text!r}",
            expected="ARM:FORMAT, such as lm-lk_lambda-0:transformers",
            todo="write every export so",
        )
    return arm, form


def _row(text: str) -> tuple[str, dict[str, list[int] | list[str]]]:
    parts = text.split(":")
    try:
        draft, seeds, objectives = parts
        found: dict[str, list[int] | list[str]] = {
            "seeds": [int(s) for s in seeds.split(",")],
            "objectives": objectives.split(","),
        }
    except ValueError:
        raise ConfigError(
            found=f"row {text!r}",
            expected="DRAFT:SEEDS:OBJECTIVES, such as lm:0,1,2:kl,lk_lambda",
            todo="write every row so",
        ) from None
    for name, items in found.items():
        if len(set(items)) < len(items) or any(
            isinstance(item, int) and item < 0 for item in items
        ):
            raise ConfigError(
                found=f"the {name} of row {text!r}",
                expected="each of them once, seeds from 0",
                todo="correct the row",
            )
    return draft, found
