"""`lkcache use PRESET`: write `params.yaml` from a preset and say what changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from lkcache.presets import changes, compose, dump
from pipeline.config import PARAMS, read_params


def use(preset: Annotated[str, Argument(help="A file of presets/, without .yaml.")]) -> None:
    """Write params.yaml from presets/PRESET.yaml; prints every parameter that changed."""
    old = read_params() if PARAMS.exists() else {}
    params = compose(Path("presets"), preset)
    dump(params, PARAMS)
    lines = changes(old, read_params())
    print(f"{PARAMS} is now the preset {preset!r}: {len(lines)} parameters changed")
    for line in lines:
        print(f"  {line}")
    if missing := to_do(read_params()):
        print("before `dvc repro`:")
        for line in missing:
            print(f"  {line}")


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
