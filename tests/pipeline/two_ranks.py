"""What two processes do in `test_ranks`: `python -m tests.pipeline.two_ranks FOLDER [die]`.

The first rank starts the second and writes what it saw to FOLDER/seen.json.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import resume
from pipeline.dataset import collate
from pipeline.ranks import Ranks, open_ranks
from pipeline.train import FitConfig, _Pass, fit_from_cache
from storage.errors import DraftError
from tests.caches import LAYOUT, record
from tests.golden.curves import inputs_of, loss_of
from tests.stages.training import FIT

STEPS = 8
MODULE = "tests.pipeline.two_ranks"
CONFIG = FitConfig(
    **{
        **FIT,
        "steps": STEPS,
        "log_every": 1,
        "batch_sequences": 6,
        "micro_batch_sequences": 3,  # one sequence for the first rank, two for the second
    }
)


def run(ranks: Ranks, folder: Path, kind: str = "eagle3", **over: Any) -> dict[str, Any]:
    """Curve, metrics and weights of one training on the cache in `folder`."""
    inputs = inputs_of(kind, folder)
    draft = inputs.fresh(0)
    arguments = {"loss": loss_of("lk_lambda", eta=3.0), "config": CONFIG, "seed": 0} | over
    fitted = fit_from_cache(draft, inputs, stage="train", cell=kind, ranks=ranks, **arguments)
    weights = {name: tensor.flatten().tolist() for name, tensor in draft.trainable().items()}
    return {"curve": fitted.curve, "metrics": fitted.metrics, "weights": weights}


def broken(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Stop before step 5, with a checkpoint of every step, and go on from it."""
    resume.EVERY_S = 0.0
    resume.SHARE = 0
    steps, state = iter(range(100)), folder / "state"
    loss = loss_of("lk_lambda", eta=3.0)

    def stops(*terms: Any) -> Any:
        if next(steps) == 2 * 4:
            raise InterruptedError
        return loss(*terms)

    try:
        run(ranks, folder, loss=stops, resume=state)
    except InterruptedError:
        # the second rank knows nothing of the folder
        return run(ranks, folder, resume=state if ranks.first else None)
    raise AssertionError("ended")


def exploded(ranks: Ranks, folder: Path) -> str:
    """What the first rank says of a loss that is no number."""
    try:
        run(ranks, folder, loss=lambda kl, alpha, mask: kl * float("nan"))
    except (DraftError, SystemExit) as error:
        return str(error)
    return ""


def one_sided(ranks: Ranks) -> list[float]:
    """Gradient norms of a pass whose second sequence, the second rank's, is all prompt."""
    inputs = inputs_of("lm", None)
    made = [record("a", num_tokens=9), record("b", num_tokens=7, num_prompt=7)]
    draft = inputs.fresh(0)
    model = ranks.wrap(_Pass(draft, torch.float32))
    own = made[ranks.index :: ranks.size]
    (kl, _, mask), _ = ranks.gather(model(collate(own, LAYOUT), 1), tokens=0)
    assert mask.sum() == 3
    ((kl * mask).sum() * ranks.size).backward()
    grads = [p.grad for p in draft.parameters()]
    return [g.norm().item() for g in grads if g is not None]


def main() -> None:
    """All that two ranks are to show, in one pair of processes."""
    folder, seen = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    with open_ranks(2, where="cpu", sharding="ddp", module=MODULE) as ddp:
        if "die" in sys.argv:
            os._exit(3)
        fsdp = replace(ddp, sharding="fsdp")
        seen["ddp"] = run(ddp, folder)
        seen["fsdp"] = run(fsdp, folder)
        seen["resumed"] = broken(fsdp, folder)
        seen["exploded"] = exploded(ddp, folder)
        seen["one_sided"] = one_sided(ddp)
        if ddp.first:
            (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
