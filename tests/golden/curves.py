"""Ten steps of each draft kind on the tiny cache: their losses, and the digest of the weights.

`python -m tests.golden.curves` rewrites `curves.json`; a diff of it is to be reviewed.
"""

import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.draft import find
from pipeline.interface import Interface, Shape
from pipeline.loss import find as find_loss
from pipeline.train import FitConfig, Inputs, fit_from_cache
from storage.reader import Cache
from tests.caches import D, V, write_cache
from tests.stages.training import FIT, PARAMS

FILE = Path(__file__).parent / "curves.json"
STEPS = 10
KINDS = ("lm", "medusa", "eagle3")


def inputs_of(kind: str, folder: Path | None) -> Inputs:
    """A draft of the tests' project on the cache in `folder`, which is its own held-out cache."""
    module, g = find(kind), torch.Generator().manual_seed(3)
    embed, head = (torch.randn(V, D, generator=g) for _ in range(2))
    cache: Any = Cache.open(folder / "train.zarr") if folder else None
    return Inputs(
        section=module.Config(**PARAMS["drafts"][kind]),
        model=module.Model,
        shape=Shape(V, D),
        interface=Interface(embed, head, torch.ones(D), 1e-6) if kind != "lm" else None,
        train=cache,
        heldout=cache,
        head=None,
        source={},
    )


def loss_of(kind: str, **parameters: float) -> Any:
    """A loss with its config bound."""
    module = find_loss(kind)
    return partial(module.loss, config=module.Config(kind=kind, **parameters))


def curve(kind: str, folder: Path, **over: Any) -> dict[str, Any]:
    """The losses of a run from scratch under lk_lambda on `folder`'s cache, and its weights.

    over: other parameters of the loop.
    """
    inputs = inputs_of(kind, folder)
    draft = inputs.fresh(0)
    fitted = fit_from_cache(
        draft,
        inputs,
        loss=loss_of("lk_lambda", eta=3.0),
        config=FitConfig(**{**FIT, "steps": STEPS, "log_every": 1, **over}),
        seed=0,
        stage="train",
        cell=kind,
    )
    weights = hashlib.sha256()
    for name, tensor in sorted(draft.trainable().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    return {"loss": [row["loss"] for row in fitted.curve], "weights": weights.hexdigest()}


def main() -> None:
    """Write the losses; the digest is printed, for it is that of one machine's arithmetic."""
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder, "train.zarr"), num_sequences=10)
        made = {kind: curve(kind, Path(folder)) for kind in KINDS}
    losses = {kind: found["loss"] for kind, found in made.items()}
    FILE.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    print({kind: found["weights"] for kind, found in made.items()})


if __name__ == "__main__":
    main()
