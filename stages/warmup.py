"""Train the KL start that all losses of a draft and seed share, from the cache alone.

`python -m stages.warmup <start>`; ranks and resuming as in `stages.train`. `steps: 0` keeps the
fresh draft, the paper's from-scratch recipe. The target's body is never opened.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from pipeline.checkpoint import save_draft
from pipeline.cluster import ClusterConfig, device
from pipeline.config import load
from pipeline.draft import Draft
from pipeline.losses import kl
from pipeline.matrix import Start, cell
from pipeline.provenance import run
from pipeline.ranks import open_ranks
from pipeline.target import read_spec
from pipeline.train import Inputs, WarmupConfig, fit_from_cache, open_inputs, write_curve
from pipeline.warm import begin
from storage.workspace import Workspace, digest, write_json

TARGET = Path("target")


def main() -> None:
    """Check, build from the seed, fit, write."""
    key, start = cell("starts", sys.argv, Start)
    config: WarmupConfig = load("warmup", WarmupConfig)
    where = device(load("cluster", ClusterConfig))
    torch.set_num_threads(config.threads)
    inputs = open_inputs(start.draft, start.kind, cache=Path("cache"), target=TARGET)
    section = inputs.section.model_dump()
    out, timing = Path("warmup", key), Path("timings", f"warmup-{key}.json")
    model, curve, metrics = out / "model", out / "curve.csv", out / "metrics.json"
    fingerprint = digest([config.model_dump(), section, start.key, inputs.source])
    outs = [model, curve, metrics, timing]
    with open_ranks(
        config.ranks, where=where, sharding=config.sharding, module="stages.warmup"
    ) as ranks:
        draft = _draft(inputs, start.seed)
        fit = partial(
            fit_from_cache,
            draft,
            inputs,
            loss=partial(kl.loss, config=kl.Config(kind="kl")),
            config=config,
            seed=start.seed,
            stage="warmup",
            cell=key,
            ranks=ranks,
        )
        if not ranks.first:
            fit()
            return
        with Workspace("warmup", fingerprint, outs=outs, cell=key) as workspace:
            fitted = fit(resume=workspace.path(model).with_name("resume"))
            meta = {"draft": start.draft, "objective": "kl", "seed": start.seed, **inputs.source}
            meta |= inputs.reads
            save_draft(workspace.path(model), draft, config=section, meta=meta, shape=inputs.shape)
            write_curve(workspace.path(curve), fitted.curve)
            write_json(workspace.path(metrics), fitted.metrics)
            write_json(workspace.path(timing), fitted.timing)
            workspace.publish()


def _draft(inputs: Inputs, seed: int) -> Draft:
    """A fresh draft, or one with the weights that its section starts from."""
    if inputs.section.start is None:
        return inputs.fresh(seed)
    return begin(
        inputs.section,
        model=inputs.model,
        spec=read_spec(TARGET),
        interface=inputs.interface,
        layers=list(inputs.train.layout.hidden_layers),
        seed=seed,
    )


if __name__ == "__main__":
    run("warmup", main)
