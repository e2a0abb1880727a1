"""Pin a target: check its files, load it once, write `target.json` and the interface.

Everything that can be refused without the weights is refused before they are loaded. Then a short
pass compares what `pipeline.target` computes with the model's own logits and hidden states, so
that no later stage has to trust a family's conventions.
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Processes, Strict, Threads
from pipeline.embedded import EmbeddedConfig
from pipeline.interface import HeadRule
from pipeline.target import (
    INTERFACE,
    MODEL_FILES,
    MTP,
    PROBE,
    SPEC,
    TOKENIZER_FILES,
    DType,
    Target,
    TargetSpec,
    WeightsFile,
    body_of,
    files_digest,
    head_rule,
    load_model,
    load_tokenizer,
    sample_digest,
    snapshot,
)
from pipeline.tp_plan import require_plan
from storage.errors import TargetError
from storage.workspace import digest, file_digest, read_json, write_json

COMMIT = re.compile(r"[0-9a-f]{40}")
PROBE_TOKENS = 8
# the same sums in the same order on the same device; what remains is a fused kernel's freedom
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
STATIC_ROPE = ("linear", "llama3", "yarn")
LONGROPE = ("longrope", "su")  # the name, and an older one
# where families keep their first multi-token-prediction module; {n}: the number of layers
MTP_PREFIXES = {
    "deepseek": "model.layers.{n}.",
    "mimo": "model.mtp_layers.0.",
    "qwen3_next": "mtp.",
}


class ShapeConfig(Strict):
    """A model's shape, so that `lkcache estimate` needs neither the model nor a network."""

    vocab_size: Annotated[int, Field(ge=2)]
    hidden_size: Annotated[int, Field(ge=1)]
    num_layers: Annotated[int, Field(ge=1)]
    intermediate_size: Annotated[int, Field(ge=1)]
    """Of a dense layer, or of one expert; estimates use the two below instead."""
    num_parameters: Annotated[float, Field(gt=0)]
    """Of the whole model, in bytes half of what its bfloat16 files take."""
    active_parameters: Annotated[float, Field(gt=0)]
    """That a token is multiplied by: fewer in a mixture of experts."""


class PretrainedConfig(Strict):
    """Section `target` for a model that exists: a local folder or a hub id."""

    kind: Literal["pretrained"]
    model: Annotated[str, Field(min_length=1)]
    revision: str | None
    """Commit of a hub repository, 40 hex digits; null for a folder."""
    dtype: DType
    trust_remote_code: bool
    threads: Threads
    tensor_parallel: Processes = 1
    """Processes of one host, a device each, that hold a shard of every matrix. They order the
    additions, so that another number is another target (docs/cluster.md)."""
    shape: ShapeConfig | None = None
    """What `lkcache estimate` goes by until the model is here, which is then held against it."""


TargetConfig = Annotated[EmbeddedConfig | PretrainedConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Origin:
    """Where a target comes from and how it is to be read."""

    kind: Literal["embedded", "pretrained"]
    model: str
    revision: str | None = None
    dtype: DType = "float32"
    sharpen: float = 1.0
    trust_remote_code: bool = False
    tensor_parallel: int = 1


def find_pretrained(config: PretrainedConfig) -> Path:
    """The local files of a pretrained target; a hub repository is fetched at its commit.

    `TargetError` where its config.json contradicts `target.shape`.
    """
    home = _find(config)
    if config.shape is not None and (home / "config.json").is_file():
        _check_shape(config.shape, home / "config.json")
    return home


def _check_shape(shape: ShapeConfig, path: Path) -> None:
    stated = read_json(path)
    stated = stated.get("text_config", stated)
    names = {"num_layers": "num_hidden_layers"}
    for field in ("vocab_size", "hidden_size", "num_layers"):
        ours, theirs = getattr(shape, field), stated.get(names.get(field, field))
        if theirs is not None and theirs != ours:
            raise TargetError(
                found=f"target.shape.{field} {ours}",
                expected=f"{theirs}, as {path} has it",
                todo=f"correct target.shape.{field} in params.yaml, or target.model",
            )


def _find(config: PretrainedConfig) -> Path:
    check_place(config)
    home = Path(config.model)
    if config.revision is None:
        return home
    return snapshot(config.model, config.revision)


def check_place(config: PretrainedConfig) -> None:
    """`TargetError` unless the section names a folder alone, or a hub id with a commit.

    Nothing is opened or fetched: `check` asks it too, before DVC gives up the present target.
    """
    home = Path(config.model)
    if home.is_dir():
        if config.revision is not None:
            raise TargetError(
                found=f"target.revision {config.revision!r} for the local folder {home}",
                expected="null, since a folder is pinned by the digest of its weights",
                todo="set target.revision to null",
            )
        return
    if config.model.count("/") > 1 or config.model.startswith((".", "/", "~")):
        raise TargetError(
            found=f"no folder {config.model}",
            expected="a folder of transformers, or a hub id such as org/name",
            todo="correct target.model in params.yaml",
        )
    if config.revision is None or not COMMIT.fullmatch(config.revision):
        raise TargetError(
            found=f"target.revision {config.revision!r} for {config.model}, which is no folder",
            expected="a commit of 40 hex digits, since a branch or a tag of the hub can move",
            todo="copy the commit from the model's page on the hub, or name a local folder",
        )


def check_folder(home: Path, *, trust_remote_code: bool = False) -> None:
    """`TargetError` unless the folder holds config, safetensors and a tokenizer that fits."""
    if not (home / "config.json").is_file():
        raise TargetError(
            found=f"{home} has no config.json",
            expected="a folder written by save_pretrained",
            todo="correct target.model or complete the folder",
        )
    if not list(home.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in home.glob(pattern))
        if pickles:
            raise TargetError(
                found=f"{home} has its weights as {pickles[0]}, a pickle, which can run code",
                expected="weights in *.safetensors",
                todo="convert them: load where you trust them and save_pretrained to a new folder",
            )
        raise TargetError(
            found=f"{home} has no weights",
            expected="one or more *.safetensors files beside config.json",
            todo="complete the folder (git-lfs or the download may have left them out)",
        )
    if not any((home / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TargetError(
            found=f"{home} has no tokenizer",
            expected="tokenizer.json beside config.json",
            todo="save the tokenizer of this model to the folder",
        )
    _check_vocabulary(home, trust_remote_code=trust_remote_code)


def _check_vocabulary(home: Path, *, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            home, trust_remote_code=trust_remote_code, local_files_only=True
        )
        tokenizer = load_tokenizer(home, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise TargetError(
            found=f"transformers cannot read {home}: {' '.join(str(error).split())[:200]}",
            expected="a causal LM that this version of transformers knows",
            todo="mend the folder, or set target.trust_remote_code where you trust its code",
        ) from None
    width = config.get_text_config().vocab_size
    if len(tokenizer) > width:
        raise TargetError(
            found=f"the tokenizer in {home} has {len(tokenizer)} tokens",
            expected=f"at most {width}, the rows of the model's embedding",
            todo="use the tokenizer that belongs to this model",
        )


def pin(home: Path, out: Path, *, origin: Origin) -> TargetSpec:
    """Check and load the model in `home`, and write `target.json` and the interface into `out`."""
    check_folder(home, trust_remote_code=origin.trust_remote_code)
    if origin.tensor_parallel > 1:
        require_plan(home, origin.tensor_parallel, trust_remote_code=origin.trust_remote_code)
    model = load_model(home, dtype=origin.dtype, trust_remote_code=origin.trust_remote_code)
    tokenizer = load_tokenizer(home, trust_remote_code=origin.trust_remote_code)
    spec = describe(model, tokenizer, home, origin=origin)
    target = Target(model=model, tokenizer=tokenizer, spec=spec)
    probe(target)
    write_interface(out, model)
    if spec.tensor_parallel > 1:
        write_probe(out, target)
    write_mtp(out, home, model.config.get_text_config())
    files = (out / name for name in (INTERFACE, MTP) if (out / name).is_file())
    spec = spec.model_copy(update={"interface": {path.name: sample_digest(path) for path in files}})
    if spec.longrope:
        print(
            f"target: the context counts as {spec.context}, so that no law depends on a "
            "neighbour; vLLM must serve it with --max-model-len no longer than that, since beyond "
            "it takes those angles for every sequence",
            file=sys.stderr,
        )
    write_json(out / SPEC, spec.as_dict())
    return spec


def describe(model: Any, tokenizer: Any, home: Path, *, origin: Origin) -> TargetSpec:
    """The description of a loaded model; its fingerprint names content, never a place."""
    text = model.config.get_text_config()
    weights = tuple(
        WeightsFile(
            name=path.name,
            bytes=path.stat().st_size,
            sha256=file_digest(path),
            sample_sha256=sample_digest(path),
        )
        for path in sorted(home.glob("*.safetensors"))
    )
    content: dict[str, Any] = {
        "weights_sha256": digest({file.name: file.sha256 for file in weights}),
        "tokenizer_sha256": files_digest(home, TOKENIZER_FILES),
        "template_sha256": digest(getattr(tokenizer, "chat_template", None)),
        "model_sha256": files_digest(home, MODEL_FILES),
        "vocab_size": model.get_output_embeddings().weight.shape[0],
        "dtype": origin.dtype,
    }
    context_tokens, switch = text.max_position_embeddings, longrope_tokens(text)
    longrope = switch is not None and switch < context_tokens
    if origin.tensor_parallel > 1:  # shards add in another order: other bits of every law
        content["tensor_parallel"] = origin.tensor_parallel
    return TargetSpec(
        longrope=longrope,
        kind=origin.kind,
        model=origin.model,
        revision=origin.revision,
        fingerprint=digest(content),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        eos_ids=_eos_ids(model, tokenizer),
        bos_id=tokenizer.bos_token_id,
        context_tokens=switch if longrope and switch else context_tokens,
        sharpen=origin.sharpen,
        trust_remote_code=origin.trust_remote_code,
        weights=weights,
        **content,
    )


def longrope_tokens(config: Any) -> int | None:
    """The length up to which longrope's angles are those of short sequences; None without it.

    transformers chooses by the longest sequence of a batch, so that beyond this length the law of a
    short one would depend on its neighbours. `dynamic` changes beyond max_position_embeddings,
    where the context ends anyway; no other rule does.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rules = [rule for rule in rope.values() if isinstance(rule, dict)] or [rope]
    found = [
        rule.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
        for rule in rules
        if (rule.get("rope_type") or rule.get("type")) in LONGROPE
    ]
    return min(found, default=None)


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """What ends a response: the generation config's ids, else the config's, else the tokenizer's.

    Chat models end turns with an id of their own (Llama 3's <|eot_id|>) that only the generation
    config lists.
    """
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return sorted({ids} if isinstance(ids, int) else set(ids))
    return []


@torch.no_grad()
def probe(target: Target) -> None:
    """`TargetError` unless our forward and head give the model's own logits and streams."""
    spec = target.spec
    tokens = probe_tokens(spec)
    layers = range(spec.num_layers)
    own = target.model(tokens, output_hidden_states=True, use_cache=False)
    ours = target.forward(tokens, layers=layers)
    assert ours.hidden is not None
    tolerance = PROBE_TOLERANCE[spec.dtype]
    pairs = {"logits": (target.logits(ours.last_hidden[0]), own.logits[0])}
    pairs["last hidden state"] = (ours.last_hidden, own.hidden_states[-1])
    for k in layers:
        pairs[f"hidden state {k}"] = (ours.hidden[:, :, k], own.hidden_states[k])
    for what, (here, there) in pairs.items():
        if here.shape != there.shape or not _near(here, there, tolerance):
            raise TargetError(
                found=f"the {what} of {type(target.model).__name__} differs from what its "
                "config's fields make of its LM head and layers",
                expected="a head with logit_scale, logits_scaling or a soft cap at most",
                todo="choose another target, or add this family's rule to pipeline/target.py",
            )


def probe_tokens(spec: TargetSpec) -> Tensor:
    """[1, T] ids spread over the vocabulary."""
    count = min(PROBE_TOKENS, spec.vocab_size, spec.context_tokens)
    return torch.arange(count)[None] * (spec.vocab_size // count)


@torch.no_grad()
def write_probe(out: Path, target: Target) -> None:
    """What the whole target makes of a few tokens, for its shards to be held against."""
    from safetensors.torch import save_file

    tokens = probe_tokens(target.spec)
    last_hidden = target.forward(tokens).last_hidden[0]
    logits = target.logits(last_hidden)
    found = {"tokens": tokens[0], "last_hidden": last_hidden, "logits": logits}
    (out / PROBE).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in found.items()}, out / PROBE)


def _near(here: Tensor, there: Tensor, tolerance: float) -> bool:
    scale = there.float().abs().max().clamp(min=1e-6)
    return bool((here.float() - there.float()).abs().max() <= tolerance * scale)


def write_interface(out: Path, model: Any) -> None:
    """Embedding [V, D], LM head [V, D] and final norm [D] in the model's dtype, bit for bit.

    A tied head is written twice: readers need not know. `TargetError` where the three do not have
    these shapes, the head has a bias, or the norm is no RMS norm.
    """
    from safetensors.torch import save_file

    norm, head = body_of(model).norm, model.get_output_embeddings()
    embed = model.get_input_embeddings().weight.detach()
    if embed.shape != head.weight.shape or getattr(head, "bias", None) is not None:
        raise TargetError(
            found=f"an embedding of {tuple(embed.shape)} and an LM head of "
            f"{tuple(head.weight.shape)}{' with a bias' if head.bias is not None else ''}",
            expected="two matrices of one shape and no bias, on which drafts are built",
            todo="choose another target",
        )
    eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
    stated = {"eps": eps, "offset": _norm_offset(norm, eps)}
    tensors = {"embed": embed, "lm_head": head.weight.detach(), "norm": norm.weight.detach()}
    (out / INTERFACE).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        out / INTERFACE,
        # one key: safetensors writes several in the random order of a hash map
        metadata={"norm": json.dumps({**stated, **_head_metadata(model)})},
    )


def write_mtp(out: Path, home: Path, config: Any) -> None:
    """Copy the target's own MTP module, if it has one: transformers leaves its tensors unread.

    Names are the files' own without their prefix, dtype and bits too; a draft of kind `mtp` that
    starts from them compares its shape with the settings beside them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    prefixes = {k: p.format(n=config.num_hidden_layers) for k, p in MTP_PREFIXES.items()}
    found: dict[str, dict[str, Tensor]] = {layout: {} for layout in prefixes}
    for path in sorted(home.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  not a mapping
                for layout, prefix in prefixes.items():
                    if name.startswith(prefix):
                        found[layout][name.removeprefix(prefix)] = stored.get_tensor(name)
    layouts = [layout for layout, tensors in found.items() if tensors]
    if not layouts:
        return
    layout = layouts[0]
    described = {"layout": layout, "prefix": prefixes[layout], "settings": _mtp_settings(config)}
    save_file(found[layout], out / MTP, metadata={"mtp": json.dumps(described)})


def _mtp_settings(config: Any) -> dict[str, Any]:
    """What the names and shapes of a module's tensors do not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    settings: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None),
        "head_size": getattr(config, "head_dim", None),
        "intermediate_size": config.intermediate_size,
        "hidden_act": getattr(config, "hidden_act", None),
        "rope_theta": rope.get("rope_theta"),
        "rope_type": rope.get("rope_type", "default"),
        "partial_rotary_factor": share or 1.0,
        "rotary": _rotary(config, rope),
        "norm_eps": config.rms_norm_eps,
        "latent": None,
        "experts": None,
    }
    if config.model_type == "deepseek_v3":
        # heads are unfolded to as many keys, of a size that `latent` says
        settings |= {"num_kv_heads": None, "head_size": None, "intermediate_size": None}
        settings["latent"] = {
            "query_rank": config.q_lora_rank,
            "key_rank": config.kv_lora_rank,
            "rotary_size": config.qk_rope_head_dim,
            "plain_size": config.qk_nope_head_dim,
            "value_size": config.v_head_dim,
            "interleaved": config.rope_interleave,
        }
        settings["experts"] = {
            "count": config.n_routed_experts,
            "per_token": config.num_experts_per_tok,
            "groups": config.n_group,
            "groups_per_token": config.topk_group,
            "inner_size": config.moe_intermediate_size,
            "shared": config.n_shared_experts,
            "scale": config.routed_scaling_factor,
            "normed": config.norm_topk_prob,
        }
    return settings


def _rotary(config: Any, rope: dict[str, Any]) -> dict[str, Any] | None:
    """Angles of a rule that no length changes; None for a base alone, or another rule."""
    if rope.get("rope_type") not in STATIC_ROPE:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    score_scale = 1.0
    if config.model_type == "deepseek_v3" and rope.get("mscale_all_dim"):
        factor = max(float(rope["factor"]), 1.0)
        score_scale = (0.1 * rope["mscale_all_dim"] * math.log(factor) + 1.0) ** 2
    return {"inv_freq": inv_freq.tolist(), "scale": float(scale), "score_scale": score_scale}


def _head_metadata(model: Any) -> dict[str, Any]:
    """What the family does to logits, where it does anything."""
    rule = head_rule(model)
    return {} if rule == HeadRule() else {"head": asdict(rule)}


def _norm_offset(norm: Any, eps: float) -> float:
    """What the family adds to the stored weight (Gemma: 1), found by trying."""
    x = torch.linspace(-2.0, 3.0, norm.weight.numel())[None]
    unit = x * torch.rsqrt(x.square().mean() + eps)
    weight = norm.weight.detach().float().cpu()
    with torch.no_grad():
        there = norm(x.to(norm.weight)).float().cpu()
    for offset in (0.0, 1.0):
        if _near(unit * (weight + offset), there, 2e-2):
            return offset
    raise TargetError(
        found=f"a final norm of type {type(norm).__name__}",
        expected="an RMS norm, weight or 1 + weight",
        todo="choose another target",
    )
