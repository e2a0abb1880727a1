"""`lkcache matrix ROW ...`: write the cells of `params.yaml` from lists."""

from typing import Annotated

from typer import Argument

from lkcache.presets import dump, write_cells, yaml
from pipeline.config import PARAMS, read_params
from pipeline.matrix import Export
from storage.errors import ConfigError


def matrix(
    rows: Annotated[list[str], Argument(help="DRAFT:SEEDS:OBJECTIVES, such as lm:0,1,2:kl,tv.")],
) -> None:
    """Write `starts` and `arms` from rows like `lm:0,1,2:kl,tv,lk_lambda`; exports are kept.

    An export of an arm that is no longer in the matrix is dropped, and said so.
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
    write_cells(params, lists, {})
    kept = {arm: forms for arm, forms in old.items() if arm in params["arms"]}
    write_cells(params, lists, kept)
    dump(params, PARAMS)
    print(f"{PARAMS}: {len(params['starts'])} starts, {len(params['arms'])} arms")
    for arm in old.keys() - kept.keys():
        print(f"export of {arm} was dropped: no such arm any more")


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
