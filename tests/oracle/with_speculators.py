"""`python with_speculators.py WHAT FOLDER …`: open exports with speculators, write their numbers.

Runs where the package is installed (0.9.0), not in the project's environment: imports nothing of
ours. A FOLDER holds `export/` and `batch.safetensors`; `found.safetensors` is written beside them.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def opened(folder: Path) -> Any:
    """The export as the package's own class, with the attention that a CPU has."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(str(folder), config=config).eval()


def kept_logits(model: Any) -> list[torch.Tensor]:
    """Every output of the head, step after step."""
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, given, out: logits.append(out[0].detach()))
    return logits


def eagle3(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors, logits of each step, and the loss of the package's own training step."""
    from speculators.losses import resolve_loss_config

    model, batch = opened(folder / "export"), load_file(folder / "batch.safetensors")
    logits, steps = kept_logits(model), int(batch["steps"])
    _, loss, _ = model(
        hidden_states=batch["hidden"][None],
        input_ids=batch["tokens"][None],
        document_ids=torch.zeros_like(batch["tokens"])[None],
        loss_mask=batch["mask"][None],
        verifier_last_hidden_states=batch["pre_norm"][None],
        ttt_steps=steps,
        ttt_step_loss_decay=0.8,
        loss_config=resolve_loss_config("kl_div", "eager"),
    )
    found = {f"logits.{k}": x for k, x in enumerate(logits)}
    return {**_state(model), **found, "loss": loss.detach()}


def mtp(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors and logits of each step."""
    model, batch = opened(folder / "export"), load_file(folder / "batch.safetensors")
    logits, _, _ = model(batch["tokens"][None], batch["last_hidden"][None])
    return {**_state(model), **{f"logits.{k}": x[0].detach() for k, x in enumerate(logits)}}


def convert(folder: Path) -> dict[str, torch.Tensor]:
    """The original layout as the package converts it."""
    from speculators.convert import convert_model

    target, out = str(folder.parent / "target"), folder / "converted"
    convert_model(str(folder / "export"), target, "eagle3", output_path=str(out))
    return {f"state.{k}": x for k, x in load_file(out / "model.safetensors").items()}


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {f"state.{name}": x.clone().contiguous() for name, x in model.state_dict().items()}


if __name__ == "__main__":
    for what, name in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        found = {"eagle3": eagle3, "mtp": mtp, "convert": convert}[what](Path(name))
        tensors = {k: x.contiguous() for k, x in found.items()}
        save_file(tensors, Path(name) / "found.safetensors")
