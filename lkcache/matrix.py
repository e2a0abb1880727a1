"""`lkcache matrix ROW ...`: write the cells of `params.yaml` from lists."""

from typing import Annotated

from typer import Argument, Option

from lkcache.presets import dump, write_cells, yaml
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
    lists = dict(_row(row) for row in rows)
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
    counts = ", ".join(f"{len(params[name])} {name}" for name in ("starts", "arms", "exports"))
    print(f"{PARAMS}: {counts}")
    for arm in old.keys() - kept.keys():
        print(f"export of {arm} was dropped: no such arm any more")


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
        return draft, {
            "seeds": [int(s) for s in seeds.split(",")],
            "objectives": objectives.split(","),
        }
    except ValueError:
        raise ConfigError(
            found=f"row {text!r}",
            expected="DRAFT:SEEDS:OBJECTIVES, such as lm:0,1,2:kl,lk_lambda",
            todo="write every row so",
        ) from None
