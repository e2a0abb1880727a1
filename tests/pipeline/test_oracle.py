"""Our exports and our loss against the `speculators` package, in an interpreter of its own.

The package pins other versions than ours, so it is not a test dependency. Make an environment with
`pip install torch==2.13.0 speculators==0.9.0` (then remove torchvision and torchaudio) and name its
interpreter in LKCACHE_SPECULATORS_PYTHON; where the package is importable here, nothing is needed.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import export_draft, find_format
from pipeline.interface import Interface, Shape
from pipeline.law import DenseLaw
from pipeline.loss import reduce
from pipeline.losses import kl
from pipeline.terms import terms
from tests.pipeline.test_exports import EAGLE3, EAGLE31, MTP, config, source_in

OWN = sys.executable if find_spec("speculators") else None
PYTHON = os.environ.get("LKCACHE_SPECULATORS_PYTHON", OWN)
pytestmark = pytest.mark.skipif(PYTHON is None, reason="no interpreter with speculators 0.9.0")
SCRIPT = Path(__file__).parents[1] / "oracle" / "with_speculators.py"
V, D, T, STEPS, VD = 64, 32, 40, 3, 24
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # float32 on both sides (issue 4)


def interface(model: Any) -> Interface:
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    return Interface(embed.detach(), head.detach(), torch.ones(D), 1e-6)


def make(section: dict[str, Any], given: Interface) -> Draft:
    module, size = find(section["kind"]), section.get("draft_vocab_size")
    d2t = None if size is None else torch.arange(size) * 2 + 1
    parsed = parse("drafts.x", section, module.Config)
    draft: Draft = module.Model.build(parsed, Shape(V, D), given, 0, d2t=d2t)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in draft.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return draft


def exported(folder: Path, draft: Draft, form: str, model: Any) -> None:
    """The export, whose verifier is the target's own folder beside it."""
    folder.mkdir()
    target, source = folder.parent / "target", source_in(folder / "home")
    sizes = {"vocab_size": V, "hidden_size": D, "num_layers": 8}
    spec = source.spec.model_copy(update={"model": str(target), **sizes})
    given = replace(source, spec=spec, home=target, interface=interface(model))
    found = find_format(draft.config.kind, form)
    export_draft(folder / "export", draft, form=found, source=given, config=config("float32"))


def batch(hidden: Tensor | None, last_hidden: Tensor, tokens: Tensor) -> Batch:
    """One sequence, one turn."""
    return Batch(
        ids=("",),
        domains=("",),
        tokens=tokens[None],
        length=torch.tensor([T]),
        turn=torch.zeros(1, T, dtype=torch.int64),
        token_logp=torch.zeros(1, T),
        law_row=torch.arange(T)[None],
        law=None,
        hidden=None if hidden is None else hidden[None],
        last_hidden=last_hidden[None],
    )


@dataclass(frozen=True)
class Asked:
    """A case that the package has been asked about."""

    folder: Path
    draft: Any
    given: Interface

    @property
    def found(self) -> dict[str, Tensor]:
        return load_file(self.folder / "found.safetensors")

    def assert_same_tensors(self, *, beside: set[str]) -> None:
        """Theirs are the folder's to the bit; what they hold beside comes of the target."""
        ours = load_file(self.folder / "export" / "model.safetensors")
        states = {k: x for k, x in self.found.items() if k.startswith("state.")}
        theirs = {k.removeprefix("state."): x for k, x in states.items()}
        assert theirs.keys() - ours.keys() <= beside
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor), name


WHOLE = {**EAGLE31, "train_head": False}
PRUNED = {**EAGLE3, "train_head": False, "draft_vocab_size": VD}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eagle3": ("eagle3", "speculators", PRUNED),
    "fc_norm": ("eagle3", "speculators", {**PRUNED, "fc_norm": True, "norm_before_residual": True}),
    "eagle31": ("eagle3", "speculators", WHOLE),
    "original": ("convert", "eagle", PRUNED),
    "mtp": ("mtp", "speculators", {**MTP, "attention": "per_step", "depth": STEPS}),
}


def sequence() -> dict[str, Tensor]:
    """Random tokens and features; `last_hidden` is `pre_norm` after the target's norm."""
    g = torch.Generator().manual_seed(5)
    tokens, hidden = torch.randint(V, (T,), generator=g), torch.randn(T, 3, D, generator=g)
    pre_norm = torch.randn(T, D, generator=g)
    last_hidden = pre_norm * torch.rsqrt(pre_norm.square().mean(-1, keepdim=True) + 1e-6)
    return {"tokens": tokens, "hidden": hidden, "pre_norm": pre_norm, "last_hidden": last_hidden}


def as_theirs(what: str) -> dict[str, Tensor]:
    """The batch as the package takes it."""
    x = sequence()
    if what == "mtp":
        return {"tokens": x["tokens"], "last_hidden": x["last_hidden"]}
    # their index i holds x_{i+1}, g_i and the law of x_{i+2}; the last has no token to follow
    mask = torch.ones(T - 1, dtype=torch.bool)
    mask[-1] = False
    return {
        "tokens": x["tokens"][1:].clone(),
        "hidden": x["hidden"][:-1].flatten(1),
        "pre_norm": x["pre_norm"][1:].clone(),
        "mask": mask,
        "steps": torch.tensor(STEPS),
    }


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Any:
    """All cases answered by one process: to import the package takes most of the time."""
    root = tmp_path_factory.mktemp("oracle")
    model = tiny_model(vocab_size=V, num_layers=8)
    model.lm_head.weight.mul_(0.3)  # a loss of about 1 nat a depth: float32 carries 1e-5 of it
    model.save_pretrained(root / "target")
    cases, arguments = {}, []
    for name, (what, form, section) in CASES.items():
        draft = make(section, interface(model))
        exported(root / name, draft, form, model)
        save_file(as_theirs(what), root / name / "batch.safetensors")
        cases[name] = Asked(root / name, draft, interface(model))
        arguments += [what, str(root / name)]
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, str(SCRIPT), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return cases


@pytest.mark.parametrize("name", ["eagle3", "fc_norm", "eagle31"])
def test_eagle3_is_that_of_speculators_in_tensors_logits_and_loss(asked: Any, name: str) -> None:
    case, x = asked[name], sequence()
    case.assert_same_tensors(beside={"verifier_lm_head.weight", "verifier_norm.weight"})
    data = batch(x["hidden"], x["last_hidden"], x["tokens"])
    law = DenseLaw((x["last_hidden"] @ case.given.lm_head.T).log_softmax(-1))
    losses = torch.zeros(STEPS, T, dtype=torch.float64)
    mask = torch.zeros(STEPS, T, dtype=torch.bool)
    for k, logits in enumerate(case.draft.training_logits(data, STEPS)):
        pairs = data.pairs(k)
        torch.testing.assert_close(logits, case.found[f"logits.{k}"][pairs.anchor], **CLOSE)
        losses[k, : len(logits)], _ = terms(logits, law.take(pairs.row), d2t=case.draft.d2t)
        mask[k, : len(logits)] = True
    loss = reduce(kl.loss(losses, losses, mask, config=kl.Config(kind="kl")), mask, depth_decay=0.8)
    # the package's mean divides by the count + 1e-5, 3e-7 of the loss here
    torch.testing.assert_close(loss.float(), case.found["loss"], **CLOSE)
    assert loss > 0.1


def test_mtp_is_that_of_speculators_in_tensors_and_logits(asked: Any) -> None:
    """Every depth under the package's own attention; under the serving one depth 0 alone."""
    case, x = asked["mtp"], sequence()
    case.assert_same_tensors(beside={"embed_tokens.weight", "lm_head.weight"})
    data = batch(None, x["last_hidden"], x["tokens"])
    for attention in ("per_step", "step0"):
        case.draft.config = case.draft.config.model_copy(update={"attention": attention})
        off = []
        for k, logits in enumerate(case.draft.training_logits(data, STEPS)):
            theirs = case.found[f"logits.{k}"]
            off.append(float((logits.detach()[: len(theirs)] - theirs).abs().max()))
        assert off[0] <= 1e-5
        assert all(error <= 1e-5 for error in off) == (attention == "per_step")


def test_the_original_layout_converts_to_our_speculators_folder(asked: Any) -> None:
    """Equal weights went into both: the converted tensors are those of our other export."""
    theirs = asked["original"].found
    ours = load_file(asked["eagle3"].folder / "export" / "model.safetensors")
    assert theirs.keys() == {f"state.{name}" for name in ours}
    for name, tensor in ours.items():
        assert torch.equal(theirs[f"state.{name}"], tensor), name
