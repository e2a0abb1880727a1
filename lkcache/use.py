"""`lkcache use PRESET`: write `params.yaml` from a preset and say what changed."""

from pathlib import Path

from lkcache.presets import changes, compose, dump
from pipeline.config import PARAMS, read_params


def use(preset: str) -> None:
    """Write params.yaml from presets/PRESET.yaml; prints every parameter that changed."""
    old = read_params() if PARAMS.exists() else {}
    params = compose(Path("presets"), preset)
    dump(params, PARAMS)
    lines = changes(old, read_params())
    print(f"{PARAMS} is now the preset {preset!r}: {len(lines)} parameters changed")
    for line in lines:
        print(f"  {line}")
