"""`lkcache use PRESET`: write `params.yaml` from a preset and say what changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ruamel.yaml.comments import CommentedMap
from typer import Argument, Option

from lkcache.fit import fit
from lkcache.presets import changes, compose, dump
from lkcache.words import counted
from pipeline.config import PARAMS, read_params
from storage.errors import ConfigError


def use(
    preset: Annotated[str, Argument(help="A file of presets/, without .yaml.")],
    target: Annotated[
        Path | None,
        Option(help="A model's folder, in place of the preset's target; the drafts are fitted."),
    ] = None,
    prompts: Annotated[
        Path | None, Option(help="A file of prompts or conversations, in place of the preset's.")
    ] = None,
) -> None:
    """Write params.yaml from presets/PRESET.yaml; prints every parameter that changed.

    With --target the captured layers, the drafts' heads and widths and their vocabularies become
    those that the folder's config.json asks for. Paths are as seen from the project's root.
    """
    old = _before()
    params = compose(Path("presets"), preset)
    if target is not None:
        fit(params, target)
    if prompts is not None:
        source = CommentedMap(kind="jsonl", train=str(prompts), heldout=None)
        source.fa.set_flow_style()
        params["prepare"]["source"] = source
    dump(params, PARAMS)
    lines = changes(old, read_params()) if old else []
    told = counted(len(lines), "parameter") if old else "all"
    print(f"{PARAMS} is now the preset {preset!r}: {told} changed")
    for line in lines:
        print(f"  {line}")
    if missing := to_do(read_params()):
        print("before `dvc repro`:")
        for line in missing:
            print(f"  {line}")


def _before() -> dict[str, Any]:
    """The parameters that are to be replaced; empty where there are none that can be read."""
    try:
        return read_params() if PARAMS.exists() else {}
    except ConfigError as error:  # a broken file is a reason to write a new one
        print(f"replaced: {error.found}")
        return {}


def to_do(params: Mapping[str, Any]) -> list[str]:
    """What a parameter file leaves to its user: the target's commit, the prompts."""
    found = []
    target, source = params["target"], params["prepare"]["source"]
    from_hub = target["kind"] == "pretrained" and not Path(target["model"]).is_dir()
    if from_hub and target["revision"] is None:
        found.append(
            f"set target.revision to the commit of {target['model']}, 40 hex digits, which its "
            "page on the hub shows; or name a local folder in target.model"
        )
    if source["kind"] == "jsonl" and not Path(source["train"]).is_file():
        found.append(f"put your prompts into {source['train']}, which prepare.source names")
    return found
