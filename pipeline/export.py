"""A trained draft as the folder that an engine loads: key tables, config files, model card.

A format of a kind is a writer and a check (`FORMATS`). The writer renames our tensors by a key
table in which every tensor stands; the check opens the folder again with the engine's own loader
and compares logits with ours at the exported dtype, because loaders fill what they miss at random
and say nothing (draft_training.md §2). Safetensors only. Knows no stage, no cache and no file of a
draft; bytes are a function of draft, target and parameters.
"""

import copy
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from pipeline.batch import Batch
from pipeline.blocks import NORM_EPS, ROPE_THETA
from pipeline.config import Strict
from pipeline.draft import Draft
from pipeline.seeds import generator
from pipeline.target import TOKENIZER_FILES, TargetSpec
from storage.errors import ConfigError, DraftError
from storage.workspace import write_json

# our tensor -> theirs; several names share it in equal pieces, in that order
KeyTable = Mapping[str, tuple[str, ...]]
LLAMA_KEYS: KeyTable = {
    "embed": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "layers.{i}.input_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.post_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.attention.qkv.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.attention.out.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.mlp.gate_up.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}
# float32 on both sides, other kernels: 100 ulp of the largest logit
MAX_LOGIT_ERROR = 1e-5
PROBE_ROWS, PROBE_TOKENS = 4, 32


class ExportConfig(Strict):
    """Section `export`."""

    dtype: Literal["float32", "bfloat16", "float16"]
    num_assistant_tokens: Annotated[int, Field(gt=0)]
    """γ that the folder asks its engine for; an engine's own setting goes before it."""


@dataclass(frozen=True)
class Source:
    """Where an export comes from."""

    arm: str
    spec: TargetSpec
    home: Path
    """The target's files, its tokenizer among them."""
    draft: Mapping[str, Any]
    """`config.json` of the checkpoint."""


@dataclass(frozen=True)
class Format:
    """How a kind of draft is written for an engine, and how that is checked."""

    write: Callable[[Path, Draft, Source, ExportConfig], None]
    check: Callable[[Path, Draft, ExportConfig], None]


def rename(state: Mapping[str, Tensor], table: KeyTable) -> dict[str, Tensor]:
    """Our tensors under the engine's names; `DraftError` for one that the table does not hold."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.search(r"\.(\d+)\.", name)
        number = layer.group(1) if layer else ""
        theirs = table.get(re.sub(r"\.\d+\.", ".{i}.", name, count=1))
        if theirs is None:
            raise DraftError(
                found=f"a tensor {name} in the draft",
                expected="only those of the format's key table in pipeline/export.py",
                todo="add it to the table",
            )
        pieces = tensor.chunk(len(theirs), dim=0)
        for key, piece in zip(theirs, pieces, strict=True):
            renamed[key.replace("{i}", number)] = piece.contiguous()
    return renamed


def model_card(source: Source, config: ExportConfig) -> str:
    """README.md: what the draft is, where it comes from and how it is used."""
    spec, draft = source.spec, source.draft
    rows = {
        "target": f"{spec.model} ({spec.kind})" if spec.model != "." else spec.kind,
        "target revision": spec.revision or "none",
        "target fingerprint": f"`{spec.fingerprint}`",
        **{f"{name} fingerprint": f"`{v}`" for name, v in draft["source"].items()},
        **{name: v for name, v in draft.items() if name not in ("config", "shape", "source")},
        **{f"config.{name}": v for name, v in draft["config"].items()},
        "dtype": config.dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
tags: [speculative-decoding, draft-model]
---
# {source.arm}

A draft for speculative decoding, trained by lkcache from a cache of its target's laws. It is of
use only with this target, whose tokenizer it carries.

```python
target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained(folder))
```

| provenance | |
| --- | --- |
{table}
"""


def _transformers_config(source: Source, config: ExportConfig) -> dict[str, Any]:
    section, spec = source.draft["config"], source.spec
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": section["hidden_size"],
        "intermediate_size": section["intermediate_size"],
        "num_hidden_layers": section["num_layers"],
        "num_attention_heads": section["num_heads"],
        "num_key_value_heads": section["num_heads"],
        "head_dim": section["hidden_size"] // section["num_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,  # transformers 4 and engines that read it there
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "max_position_embeddings": spec.context_tokens,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": config.dtype,
        **_special_tokens(spec),
    }


def _special_tokens(spec: TargetSpec) -> dict[str, Any]:
    """The target's: an engine compares them, and the default of Llama would be id 2."""
    eos = spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids) or None
    return {"bos_token_id": spec.bos_id, "eos_token_id": eos, "pad_token_id": None}


def write_transformers(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """A `LlamaForCausalLM` folder that `generate(assistant_model=…)` accepts."""
    dtype = getattr(torch, config.dtype)
    state = {name: tensor.detach().to(dtype) for name, tensor in draft.trainable().items()}
    save_file(rename(state, LLAMA_KEYS), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _transformers_config(source, config))
    schedule = {
        "num_assistant_tokens": config.num_assistant_tokens,
        "num_assistant_tokens_schedule": "constant",
        # transformers' default of 0.4 stops drafting early: γ would not be γ
        "assistant_confidence_threshold": 0.0,
    }
    write_json(folder / "generation_config.json", {**schedule, **_special_tokens(source.spec)})
    _copy_tokenizer(source.home, folder)
    (folder / "README.md").write_text(model_card(source, config), encoding="utf-8")


def _copy_tokenizer(home: Path, folder: Path) -> None:
    names = [name for name in TOKENIZER_FILES if (home / name).is_file()]
    if not names:
        raise DraftError(
            found=f"no tokenizer in {home}",
            expected=f"at least one of {', '.join(TOKENIZER_FILES)}",
            todo="bring the target's files back, or run dvc repro --force target",
        )
    for name in names:
        shutil.copyfile(home / name, folder / name)


def check_transformers(folder: Path, draft: Draft, config: ExportConfig) -> None:
    """Open the folder with transformers; `DraftError` for a tensor or a logit that is not ours."""
    from transformers import AutoModelForCausalLM

    opened, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # the head is the embedding: named missing or not, it is tied
        wrong = sorted({str(key) for key in report[what]} - {"lm_head.weight"})
        if wrong:
            raise _broken(folder, f"{what.replace('_', ' ')}: {', '.join(wrong)}")
    probe = _probe(opened.config.vocab_size)
    with torch.no_grad():
        ours = next(iter(_rounded(draft, config).training_logits(probe, 1)))
        theirs = opened(probe.tokens).logits.flatten(0, 1)[probe.pairs(0).anchor + 1]
    error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
    if not error <= MAX_LOGIT_ERROR:
        raise _broken(folder, f"logits off by {error:.2g} of the largest")


def _broken(folder: Path, what: str) -> DraftError:
    return DraftError(
        found=f"{folder.name} opened again with {what}",
        expected=f"the draft's own tensors and logits within {MAX_LOGIT_ERROR:g}",
        todo="correct the format's key table or config in pipeline/export.py",
    )


def _rounded(draft: Draft, config: ExportConfig) -> Draft:
    """The draft with the values that the export's dtype keeps."""
    dtype = getattr(torch, config.dtype)
    rounded = copy.deepcopy(draft).float()
    with torch.no_grad():
        for tensor in rounded.trainable().values():
            tensor.copy_(tensor.to(dtype).to(tensor.dtype))
    return rounded


def _probe(vocab_size: int) -> Batch:
    """A few rows of random tokens, supervised throughout."""
    shape = (PROBE_ROWS, PROBE_TOKENS)
    tokens = torch.randint(vocab_size, shape, generator=generator(0, "export", "probe"))
    return Batch(
        ids=("",) * PROBE_ROWS,
        domains=("",) * PROBE_ROWS,
        tokens=tokens,
        length=torch.full((PROBE_ROWS,), PROBE_TOKENS),
        turn=torch.zeros(shape, dtype=torch.int64),
        token_logp=torch.zeros(shape),
        law_row=torch.zeros(shape, dtype=torch.int64),
        law=None,
        hidden=None,
        last_hidden=None,
    )


FORMATS: Mapping[str, Mapping[str, Format]] = {
    "lm": {"transformers": Format(write_transformers, check_transformers)},
}


def find_format(kind: str, name: str) -> Format:
    """A kind's format; `ConfigError` lists those that exist."""
    formats = FORMATS.get(kind, {})
    if name not in formats:
        known = [f"{form} for {owner}" for owner, own in FORMATS.items() for form in own]
        raise ConfigError(
            found=f"export format {name!r} for a draft of kind {kind}",
            expected=f"one of {', '.join(formats)}" if formats else " or ".join(known),
            todo="correct `format` under exports in params.yaml",
        )
    return formats[name]


def export_draft(
    folder: Path, draft: Draft, *, form: Format, source: Source, config: ExportConfig
) -> None:
    """Write the folder anew, then open it again; `DraftError` where it is not the draft."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    form.write(folder, draft, source, config)
    form.check(folder, draft, config)
