"""Tiny targets: a project with one on disk, and a member of each family that we claim to serve."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.pin import Origin, pin
from pipeline.target import Target, TargetSpec
from storage.tables import PROMPTS, write_table

ROOT = Path(__file__).parents[1]
V = 300
SENTENCE = "the cat sat on a mat and then went home with seven red apples for old friends"
WORDS = SENTENCE.split()


# what the members share; four layers, so that an engine's capture after layers has three of them
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 24,
}
# windows shorter than a sequence, so that what leaves them is seen to be gone
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # the layers that readers of the original EAGLE layout take, 2, n//2, n-3, differ from n = 7 on
    "llama-3.1-8b": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 7}),
    "llama-3.3-70b": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "num_attention_heads": 8, "num_key_value_heads": 1},
    ),
    "gpt-oss-20b": (
        "GptOss",
        {
            **MIXED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "rope_theta": 150_000.0, "truncate": False},
        },
    ),
    "gpt-oss-120b": (
        "GptOss",
        {
            **MIXED,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "rope_parameters": {**YARN, "rope_theta": 150_000.0, "truncate": False},
        },
    ),
    "qwen3-235b-a22b": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 10,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
            "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "qwen3-8b": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma-3-4b": (
        "Gemma3",
        {
            **MIXED,
            "head_dim": 8,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
        },
    ),
}


# its own MTP module as a section of `drafts:`
DEEPSEEK_MTP: dict[str, Any] = {
    "kind": "mtp",
    "depth": 2,
    "init": "target",
    "attention": "step0",
    "num_heads": 4,
    "num_kv_heads": None,
    "head_size": None,
    "intermediate_size": None,
    "qk_norm": False,
    "qkv_bias": False,
    "rope_theta": 1e4,
    "norm_eps": 1e-6,
    "latent": {
        "query_rank": 24,
        "key_rank": 16,
        "rotary_size": 8,
        "plain_size": 12,
        "value_size": 10,
        "interleaved": True,
    },
    "experts": {
        "count": 8,
        "per_token": 3,
        "groups": 4,
        "groups_per_token": 2,
        "inner_size": 16,
        "shared": 1,
        "scale": 2.5,
        "normed": True,
    },
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}


def mtp_tensors(model: Any) -> dict[str, Any]:
    """A module for the DeepSeek member as its files would hold it: the block of its last layer."""
    import torch

    n, size = model.config.num_hidden_layers, model.config.hidden_size
    g = torch.Generator().manual_seed(9)
    tensors = {
        "enorm.weight": 1 + 0.2 * torch.randn(size, generator=g),
        "hnorm.weight": 1 + 0.2 * torch.randn(size, generator=g),
        "shared_head.norm.weight": model.get_decoder().norm.weight.clone(),
        "eh_proj.weight": torch.randn(size, 2 * size, generator=g) * size**-0.5,
    }
    for name, x in model.get_decoder().layers[-1].state_dict().items():
        if not name.startswith("mlp.experts."):
            tensors[name] = x.clone()
            continue
        for e, matrix in enumerate(x):  # one tensor of all experts, gate above up, in memory
            what = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
            for part, rows in zip(what, matrix.chunk(len(what)), strict=True):
                tensors[f"mlp.experts.{e}.{part}_proj.weight"] = rows.clone()
    return {f"model.layers.{n}.{name}": x for name, x in tensors.items()}


def member(family: str, *, entropy: float = 1.75) -> Any:
    """A random member of a family: its config's peculiarities, small, its laws of `entropy` nats.

    Weights are large enough that every layer, router, sink and bias matters to the logits; then the
    final norm alone is scaled, which a tied embedding does not feel.
    """
    import torch
    import transformers

    name, own = FAMILIES[family]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SHAPE, **own})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tied = config.tie_word_embeddings
    for key, x in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        noise = torch.randn(x.shape, generator=generator)
        if "norm" in key:
            x.add_(noise * 0.2)
        elif "correction" in key:  # beside scores within 0 … 1
            x.copy_(noise * 0.1)
        elif "embed" in key:
            x.copy_(noise * (0.1 if tied else 1.0))  # a larger tied one repeats the last token
        elif x.ndim >= 2:
            x.copy_(noise * x.shape[-1] ** -0.5)
        elif x.ndim == 1:  # biases, sinks
            x.copy_(noise * 0.5)
    tokens = torch.randint(1, V, (8, 24), generator=generator)
    norm, offset = model.get_decoder().norm, 1.0 if name == "Gemma3" else 0.0
    plain, low, high = norm.weight.clone(), 0.0, None
    scale = 1e-2
    while high is None or high / low > 1.01:
        norm.weight.copy_((plain + offset) * scale - offset)
        logp = model(tokens, use_cache=False).logits.log_softmax(-1)
        flat = float(-(logp.exp() * logp).sum(-1).mean()) > entropy
        low, high = (scale, high) if flat else (low, scale)
        scale = scale * 1.5 if high is None else (low + high) / 2
    return model


def target_of(model: Any, *, eos_ids: Sequence[int] = (0,)) -> Target:
    """A target around a model that no file holds; it has no tokenizer."""
    config = model.config
    spec = TargetSpec(
        kind="embedded",
        model=".",
        revision=None,
        fingerprint="tiny",
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        eos_ids=list(eos_ids),
        bos_id=None,
        context_tokens=config.max_position_embeddings,
        dtype="float32",
        sharpen=1.0,
    )
    return Target(model=model, tokenizer=None, spec=spec)


def tokenizer() -> Any:
    """A byte-level BPE of V tokens; its end token is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def prompts(split: str, count: int) -> list[dict[str, Any]]:
    """Prompts of one to nine words in two domains."""
    return [
        {
            "id": f"{split}-{i}",
            "domain": ("prose", "code")[i % 2],
            "split": split,
            "text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + (5 * i) % 9)),
            "response": None,
        }
        for i in range(count)
    ]


def write_params(folder: Path, **sections: dict[str, Any]) -> None:
    """The project's own parameters, small, with these values in place of theirs."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    small: dict[str, dict[str, Any]] = {
        "generate": {"max_prompt_tokens": 12, "max_new_tokens": 10, "batch_sequences": 4},
        "capture": {"part_tokens": 120, "batch_tokens": 96, "hidden_layers": [1, 3]},
        "verify": {"sequences": 4},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    for changes in (small, sections):
        for name, values in changes.items():
            params[name].update(values)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def write_project(folder: Path, model: Any, *, chat_template: str | None = None) -> None:
    """`params.yaml`, `target/` and `data/prompts.parquet`; the model must have V tokens."""
    target = folder / "target"
    model.save_pretrained(target)
    words = tokenizer()
    words.chat_template = chat_template
    words.save_pretrained(target)
    pin(target, target, origin=Origin("embedded", "."))
    rows = [*prompts("train", 14), *prompts("heldout", 6)]
    write_table(folder / "data" / "prompts.parquet", PROMPTS, rows)
    write_params(folder)


def copy_project(source: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def assert_assisted_alike(
    target: Target, folder: Path, prompt: Sequence[int], *, gamma: int, new_tokens: int
) -> list[int]:
    """Assisted generation and our decoder with an exported `lm`: what each round kept.

    Equal texts, and equal acceptances round by round. Theirs drafts from the prompt on, ours once
    the target has said its first token: they are given that token. Near the end theirs drafts no
    more than fit, so that the last round's count may differ.
    """
    import pytest
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Theirs

    from pipeline.export import find_format
    from pipeline.speculate import Rules, decode

    draft = find_format("lm", "transformers").read(folder, None)
    rules = Rules(gamma, 0.0, new_tokens, tuple(target.spec.eos_ids), trace=True)
    given, none = torch.tensor(prompt), torch.zeros(1, rules.num_uniforms, dtype=torch.float64)
    ours = decode(target, draft, [given], rules, uniforms_BU=none)[0][0]
    begun = torch.cat([given, torch.tensor(ours.tokens[:1])])[None]
    matches: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Theirs, "update_candidate_strategy", lambda self, ids, scores, n: matches.append(int(n))
        )
        text = target.model.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            assistant_model=AutoModelForCausalLM.from_pretrained(folder),
            max_new_tokens=new_tokens - 1,
            do_sample=False,
            pad_token_id=0,
        )
    assert text[0, len(given) :].tolist() == ours.tokens
    kept = [sum(drafted.kept for drafted in turn.drafts) for turn in ours.trace]
    assert matches[: len(kept) - 1] == kept[:-1]
    assert len(matches) == len(kept)
    return kept
