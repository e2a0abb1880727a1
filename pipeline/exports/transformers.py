"""`transformers`: an `lm` draft as the folder of a `LlamaForCausalLM`, for assisted generation.

Also read by vLLM (method `draft_model`) and SGLang (`STANDALONE`). Carries the target's tokenizer.
Opened again twice: by our loader, bit for bit, and by transformers' own, within rounding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks import NORM_EPS, ROPE_THETA
from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import (
    ExportConfig,
    Source,
    broken,
    copy_tokenizer,
    own_tensors,
    probe,
    rounded,
    same_logits,
    save_tensors,
    special_tokens,
    write_card,
)
from pipeline.interface import Interface, Shape
from pipeline.keys import Flag, KeyTable, read_flags, read_tensors, rename, unname
from pipeline.target import quiet
from storage.workspace import read_json, write_json

KINDS = ("lm",)
KEYS: KeyTable = {
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
TOKEN_ID = (int, list, type(None))
FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, only=(["LlamaForCausalLM"],)),
    "model_type": Flag(str, only=("llama",)),
    "vocab_size": Flag(int),
    "hidden_size": Flag(int),
    "intermediate_size": Flag(int),
    "num_hidden_layers": Flag(int),
    "num_attention_heads": Flag(int),
    "num_key_value_heads": Flag(int),
    "head_dim": Flag(int),
    "hidden_act": Flag(str, only=("silu",)),
    "rms_norm_eps": Flag(float, only=(NORM_EPS,)),
    "rope_theta": Flag(float, only=(ROPE_THETA,)),
    "rope_parameters.rope_theta": Flag(float, only=(ROPE_THETA,)),
    "rope_parameters.rope_type": Flag(str, only=("default",)),
    "max_position_embeddings": Flag(int),
    "attention_bias": Flag(bool, only=(False,)),
    "mlp_bias": Flag(bool, only=(False,)),
    "tie_word_embeddings": Flag(bool, only=(True,)),
    "dtype": Flag(str),
    "bos_token_id": Flag(TOKEN_ID),
    "eos_token_id": Flag(TOKEN_ID),
    "pad_token_id": Flag(TOKEN_ID),
}
# float32 on both sides, other kernels: 100 ulp of the largest logit
MAX_LOGIT_ERROR = 1e-5
USAGE = """
It carries the target's tokenizer.

```python
target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained(folder))
```
"""


def require(config: Any) -> None:
    """Every `lm` draft is a Llama."""


def _config(source: Source, config: ExportConfig) -> dict[str, Any]:
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
        **special_tokens(spec),
    }


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """A folder that `generate(assistant_model=…)` accepts."""
    save_tensors(folder, rename(own_tensors(draft), KEYS), config.dtype)
    write_json(folder / "config.json", _config(source, config))
    schedule = {
        "num_assistant_tokens": config.num_assistant_tokens,
        "num_assistant_tokens_schedule": "constant",
        # transformers' default of 0.4 stops drafting early: γ would not be γ
        "assistant_confidence_threshold": 0.0,
    }
    write_json(folder / "generation_config.json", {**schedule, **special_tokens(source.spec)})
    copy_tokenizer(source.home, folder)
    write_card(folder, source, config, USAGE)


def read(folder: Path, _: Interface | None) -> Draft:
    """The draft that the folder holds."""
    place, module = folder / "config.json", find("lm")
    flags = read_flags(read_json(place), FLAGS, place=place, complete=True)
    section = {
        "kind": "lm",
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "hidden_size": flags["hidden_size"],
        "num_layers": flags["num_hidden_layers"],
        "num_heads": flags["num_attention_heads"],
        "intermediate_size": flags["intermediate_size"],
    }
    shape = Shape(flags["vocab_size"], flags["hidden_size"])
    draft: Draft = module.Model(parse(str(place), section, module.Config), shape)
    state = draft.state_dict()
    tensors = unname(read_tensors(folder), state, KEYS, place=folder / "model.safetensors")
    draft.load_state_dict(tensors)
    return draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open it with our loader, then with transformers; `DraftError` for what is not ours."""
    same_logits(folder, draft, read(folder, None), source=source, dtype=config.dtype)
    check_theirs(folder, draft, source, config)


def check_theirs(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder with transformers; `DraftError` for a tensor or a logit that is not ours."""
    from transformers import AutoModelForCausalLM

    quiet()
    expected = f"the draft's own tensors and logits within {MAX_LOGIT_ERROR:g}"
    opened, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # the head is the embedding: named missing or not, it is tied
        wrong = sorted({str(key) for key in report[what]} - {"lm_head.weight"})
        if wrong:
            raise broken(folder, f"{what.replace('_', ' ')}: {', '.join(wrong)}", expected)
    batch = probe(draft, source)
    with torch.no_grad():
        ours = next(iter(rounded(draft, config.dtype).training_logits(batch, 1)))
        theirs = opened(batch.tokens).logits.flatten(0, 1)[batch.pairs(0).anchor + 1]
    error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
    if not error <= MAX_LOGIT_ERROR:
        raise broken(folder, f"logits off by {error:.2g} of the largest", expected)
