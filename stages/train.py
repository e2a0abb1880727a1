"""Train one draft under one loss, from the warm-up's weights and the cache alone.

`python -m stages.train <arm>`, which starts `train.ranks` processes, or `torchrun --nproc-per-node
<ranks> -m stages.train <arm>`. All arms of a start see the same weights, data, steps and rate; only
the loss differs. The target's body is never opened. A killed run goes on from its scratch.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from pipeline.checkpoint import load_draft, save_draft
from pipeline.cluster import ClusterConfig, device
from pipeline.config import load
from pipeline.loss import extra_terms, find, require_law
from pipeline.matrix import Arm, cell
from pipeline.provenance import run
from pipeline.ranks import open_ranks
from pipeline.target_law import cuts
from pipeline.train import FitConfig, fit_from_cache, open_inputs, write_curve
from storage.workspace import Workspace, digest, tree_digest, write_json


def main() -> None:
    """Check, take the warm-up's weights, fit, write."""
    key, arm = cell("arms", sys.argv, Arm)
    config: FitConfig = load("train", FitConfig)
    loss = find(arm.loss)
    objective = load(f"losses.{arm.objective}", loss.Config)
    where = device(load("cluster", ClusterConfig))
    torch.set_num_threads(config.threads)
    inputs = open_inputs(arm.draft, arm.kind, cache=Path("cache"), target=Path("target"))
    require_law(arm.objective, objective, inputs.train.layout.mode, cut=cuts(config.target_law))
    section, begin = inputs.section.model_dump(), Path("warmup", arm.start, "model")
    draft = load_draft(begin, inputs.interface, inputs.shape, expect=inputs.source, config=section)
    out, timing = Path("drafts", arm.start, arm.objective), Path("timings", f"train-{key}.json")
    model, curve, metrics = out / "model", out / "curve.csv", out / "metrics.json"
    parameters = [config.model_dump(), section, objective.model_dump(), arm.model_dump()]
    fingerprint = digest([parameters, inputs.source, tree_digest(begin)])
    outs = [model, curve, metrics, timing]
    with open_ranks(
        config.ranks, where=where, sharding=config.sharding, module="stages.train"
    ) as ranks:
        fit = partial(
            fit_from_cache,
            draft,
            inputs,
            loss=partial(loss.loss, config=objective),
            config=config,
            seed=arm.seed,
            stage="train",
            cell=key,
            extra=extra_terms(objective),
            ranks=ranks,
        )
        if not ranks.first:
            fit()
            return
        with Workspace("train", fingerprint, outs=outs, cell=key) as workspace:
            fitted = fit(resume=workspace.path(model).with_name("resume"))
            meta = {
                "draft": arm.draft,
                "objective": arm.objective,
                "loss": arm.loss,
                "seed": arm.seed,
            }
            save_draft(
                workspace.path(model),
                draft,
                config=section,
                meta={**meta, **inputs.reads, **inputs.source},
                shape=inputs.shape,
            )
            write_curve(workspace.path(curve), fitted.curve)
            write_json(workspace.path(metrics), fitted.metrics)
            write_json(workspace.path(timing), fitted.timing)
            workspace.publish()


if __name__ == "__main__":
    run("train", main)
