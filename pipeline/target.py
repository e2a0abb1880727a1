"""The target: what `target/target.json` pins, how it is loaded, and its two halves as functions.

`pipeline.pin` writes the folder, everyone else reads it here; `pipeline.sharded` chooses between a
whole target and shards of one. A folder is either the embedded
target itself (kind `embedded`) or a description of a model that lies elsewhere (kind `pretrained`:
a local folder, or a hub id with a revision); `load_target` finds the files and refuses those that
are not the pinned ones.

Layer ids follow the `hidden_states` convention of transformers: index k is the residual stream
after k layers, 0 the embedding's output. Index n (the number of layers) is *after* the final norm
there; here it has its own name, `last_hidden`, and is no layer id.

Dims: B sequences, T tokens, N rows, L asked layers, D width, V vocabulary.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from pipeline.config import Strict
from pipeline.interface import Head, HeadRule, Interface, Mtp
from storage.errors import TargetError
from storage.workspace import digest, file_digest, read_json

SPEC = "target.json"
INTERFACE = Path("interface") / "interface.safetensors"
MTP = Path("interface") / "mtp.safetensors"
PROBE = Path("interface") / "probe.safetensors"
# what changes a tokenizer's ids or the text that it makes of a conversation
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MODEL_FILES = ("config.json", "generation_config.json")
# the sampled digest: the header with every tensor's name and shape lies in the first block, and a
# fine-tuned twin of equal size differs in nearly every other one
HEAD_BYTES, BLOCK_BYTES, NUM_BLOCKS = 1 << 20, 1 << 16, 64

DType = Literal["float32", "bfloat16", "float16"]
DeviceMap = str | tuple[tuple[str, int | str], ...]
"""How transformers spreads layers over devices: by a rule of its own, or module by module."""


class WeightsFile(Strict):
    """One safetensors file of the target."""

    name: str
    bytes: int
    sha256: str
    sample_sha256: str
    """`sample_digest`, compared at every load; `sha256` is taken once, by the `target` stage."""


class TargetSpec(Strict):
    """What a target is; equal fingerprints give equal laws from equal tokens."""

    kind: Literal["embedded", "pretrained"]
    model: str
    """Folder as `params.yaml` names it, or hub id; "." for the embedded target."""
    revision: str | None
    """Commit of the hub repository, 40 hex digits; None for folders."""
    fingerprint: str
    weights_sha256: str
    tokenizer_sha256: str
    template_sha256: str
    vocab_size: int
    """V: rows of the LM head, which may exceed the tokenizer's vocabulary."""
    hidden_size: int
    num_layers: int
    eos_ids: list[int]
    bos_id: int | None
    context_tokens: int
    """The longest sequence whose law does not depend on what shares its batch."""
    dtype: DType
    sharpen: float
    """Temperature folded into the final norm of the embedded target; 1.0 otherwise."""
    model_sha256: str = ""
    """Digest of config.json and generation_config.json."""
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    """N: processes that each hold a shard of every matrix; they order the additions."""
    weights: tuple[WeightsFile, ...] = Field(default=(), strict=False)
    interface: dict[str, str] = Field(default_factory=dict)
    """`sample_digest` of each file of `target/interface`, compared whenever one is opened."""
    longrope: bool = False
    """Whether the model takes other rotary angles, for all of a batch, beyond context_tokens."""

    @property
    def context(self) -> str:
        """`context_tokens` in words, with what ends it where that is no end of the model's own."""
        why = " (beyond, longrope turns all of a batch by other angles)" if self.longrope else ""
        return f"{self.context_tokens} tokens{why}"

    def as_dict(self) -> dict[str, Any]:
        """As `target.json` has it; what most targets lack is left out, as it always was."""
        own = {"tensor_parallel": self.tensor_parallel > 1, "longrope": self.longrope}
        return self.model_dump(exclude={name for name, there in own.items() if not there})


@dataclass(frozen=True)
class Features:
    """What one pass of the body gives, in the model's dtype."""

    hidden: Tensor | None
    """[B, T, L, D] residual stream before each asked layer; None where none was asked."""
    last_hidden: Tensor
    """[B, T, D] after the final norm."""


@dataclass
class Target:
    """A frozen causal LM of transformers, its tokenizer and what was pinned of it."""

    model: Any
    tokenizer: Any
    spec: TargetSpec

    @cached_property
    def body(self) -> nn.Module:
        """The decoder below the LM head."""
        return body_of(self.model)

    @cached_property
    def _head(self) -> Callable[[Tensor], Tensor]:
        return head_of(self.model)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] of the LM head, where logits come to lie."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """One pass of the body, no head; `layers` are `hidden_states` indices below n.

        attention_mask: [B, T] of 0/1, or 4-d in the additive or boolean form of transformers.
        cache: a transformers `Cache`, updated in place. `TargetError` for an impossible layer.
        """
        check_layers(layers, self.spec.num_layers)
        with torch.no_grad(), _tapped(self.body, layers) as streams:
            out = self.body(
                input_ids=tokens_BT,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        # layers may lie on several devices
        where = out.last_hidden_state.device
        stack = [streams[k].to(where) for k in layers]
        hidden = torch.stack(stack, dim=2) if layers else None
        return Features(hidden=hidden, last_hidden=out.last_hidden_state)

    def settle(self) -> None:
        """Whether what was computed so far may be kept: a whole target has nothing to say."""

    @torch.no_grad()
    def logits(self, last_hidden_ND: Tensor) -> Tensor:
        """[N, V] in the model's dtype: the LM head with the model's own scaling and soft cap."""
        return self._head(last_hidden_ND)


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """`TargetError` unless every id is a `hidden_states` index below the number of layers."""
    wrong = [k for k in layers if not 0 <= k < num_layers]
    if wrong:
        raise TargetError(
            found=f"hidden layer {wrong[0]} asked of a target of {num_layers} layers",
            expected=f"hidden_states indices 0 to {num_layers - 1} (index {num_layers} is after "
            "the final norm and is kept as last_hidden)",
            todo="correct capture.hidden_layers in params.yaml",
        )


def body_of(model: Any) -> Any:
    """The decoder of a causal LM: `layers`, then `norm`; `TargetError` where it has another form.

    Llama, Qwen, Mistral, Gemma, gpt-oss, DeepSeek and most others of transformers have it.
    """
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    missing = [n for n in ("layers", "norm", "embed_tokens") if not hasattr(body, n)]
    if missing:
        raise TargetError(
            found=f"a {type(model).__name__} whose decoder has no {' and no '.join(missing)}",
            expected="a causal LM built as embed_tokens, layers, norm and an LM head",
            todo="choose a target of that form",
        )
    return body


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The LM head with what the model's config says to do to its logits, in the model's order.

    `pipeline.pin` compares it with the model's own logits once, so that a family with a rule
    that is not read here is refused and never captured wrongly.
    """
    head, rule = model.get_output_embeddings(), head_rule(model)

    def apply(last_hidden_ND: Tensor) -> Tensor:
        return rule.apply(head(last_hidden_ND.to(head.weight.dtype)))

    return apply


def head_rule(model: Any) -> HeadRule:
    """The scaling and the soft caps that the model's config states."""
    config = model.config.get_text_config()

    def stated(*names: str) -> tuple[float, ...]:
        found = [getattr(config, name, None) for name in names]
        return tuple(float(value) for value in found if value is not None)

    divisor = stated("logits_scaling")
    return HeadRule(
        factors=stated("logit_scale", "lm_head_multiplier"),
        divisor=divisor[0] if divisor else None,
        caps=stated("final_logit_softcapping", "logits_soft_cap"),
    )


@contextmanager
def _tapped(body: Any, layers: Sequence[int]) -> Iterator[Mapping[int, Tensor]]:
    """Collect the input of the asked layers only: a deep target's other streams are never kept."""
    streams: dict[int, Tensor] = {}

    def tap(k: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams[k] = args[0] if args else kwargs["hidden_states"]

        return body.layers[k].register_forward_pre_hook(keep, with_kwargs=True)

    handles = [tap(k) for k in sorted(set(layers))]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def read_spec(folder: Path) -> TargetSpec:
    """The pinned description of a target folder; neither torch's nor transformers' work."""
    path = folder / SPEC
    if not path.is_file():
        raise TargetError(
            found=f"no file {path}",
            expected="the description that the target stage writes",
            todo="run dvc repro target",
        )
    try:
        return TargetSpec.model_validate(read_json(path))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise TargetError(
            found=f"{path} has {where} missing, unknown or of another type",
            expected="a description written by this version",
            todo="run dvc repro --force target",
        ) from None


def read_interface(folder: Path) -> Interface:
    """Embedding, LM head and final norm of a target folder as float32; the body is not opened.

    Where the family multiplies by 1 + weight (Gemma), the returned norm is that sum.
    """
    with _stored_interface(folder) as stored:
        norm = json.loads(stored.metadata()["norm"])
        tensors = {k: stored.get_tensor(k).float() for k in ("embed", "lm_head", "norm")}
    return Interface(
        embed=tensors["embed"],
        lm_head=tensors["lm_head"],
        norm=tensors["norm"] + norm["offset"],
        norm_eps=norm["eps"],
        mtp=partial(_read_mtp, folder / MTP) if (folder / MTP).is_file() else None,
    )


def read_head(folder: Path) -> Head:
    """The LM head of a target folder in the target's dtype, with what its family does to logits."""
    with _stored_interface(folder) as stored:
        rule = json.loads(stored.metadata()["norm"]).get("head", {})
        weight = stored.get_tensor("lm_head")
    lists = {name: tuple(rule.get(name, ())) for name in ("factors", "caps")}
    return Head(weight, HeadRule(divisor=rule.get("divisor"), **lists))


def read_probe(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T], and what the whole target made of them: last hidden [T, D], logits [T, V]."""
    from safetensors import safe_open

    path = folder / PROBE
    if not path.is_file():
        raise TargetError(
            found=f"no file {path}",
            expected="numbers of the whole target, which its shards are held against",
            todo="run dvc repro --force target",
        )
    with safe_open(path, framework="pt") as stored:
        tokens, last_hidden, logits = (
            stored.get_tensor(name) for name in ("tokens", "last_hidden", "logits")
        )
    return tokens, last_hidden, logits


def _stored_interface(folder: Path) -> Any:
    from safetensors import safe_open

    path = folder / INTERFACE
    if not path.is_file():
        raise TargetError(
            found=f"no file {path}",
            expected="the target's embedding, LM head and final norm",
            todo="run dvc repro target",
        )
    _check_interface(folder, path)
    return safe_open(path, framework="pt")


def _check_interface(folder: Path, path: Path) -> None:
    """`TargetError` where a file of the interface is not what the target stage wrote for it.

    An LM head of another target has the same shape and trains a draft of nothing.
    """
    pinned = read_spec(folder).interface if (folder / SPEC).is_file() else {}
    there, here = pinned.get(path.name), sample_digest(path)
    if there is not None and there != here:
        raise TargetError(
            found=f"{path} (embedding, LM head, final norm) has digest {here[:12]}",
            expected=f"{there[:12]}, which {SPEC} pins for this target",
            todo="bring the pinned file back, or run dvc repro --force target",
        )


def _read_mtp(path: Path) -> Mtp:
    """The target's own MTP module as `pipeline.pin.write_mtp` copied it."""
    from safetensors import safe_open

    _check_interface(path.parents[1], path)
    with safe_open(path, framework="pt") as stored:
        described = json.loads(stored.metadata()["mtp"])
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    return Mtp(**described, tensors=tensors)


def load_target(
    folder: Path, *, device: str = "cpu", device_map: DeviceMap | None = None
) -> Target:
    """Load the pinned target, frozen; `TargetError` where its files are gone or are others.

    With a `device_map` its layers are spread over this process's devices, in place of `device`.
    """
    spec = read_spec(folder)
    home = home_of(spec, folder)
    check_files(spec, home)
    tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
    if device_map is not None:
        return Target(model=_spread_model(home, spec, device_map), tokenizer=tokenizer, spec=spec)
    model = load_model(home, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code)
    return Target(model=model.to(device), tokenizer=tokenizer, spec=spec)


def _spread_model(home: Path, spec: TargetSpec, device_map: DeviceMap) -> Any:
    """The model with its layers where the map says; every layer's arithmetic is its device's.

    `TargetError` where the map misses a module, or where transformers, choosing by itself, found no
    room on the devices and left layers to the CPU or the disk: each pass would fetch them anew.
    """
    model = load_model(
        home,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        device_map=device_map,
    )
    if not isinstance(device_map, str):
        _require_every_module(model, [place for place, _ in device_map])
    placed = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if isinstance(device_map, str) and len(placed) > 1 and placed & {"cpu", "disk"}:
        raise TargetError(
            found=f"layers of the target left to {' and '.join(sorted(placed & {'cpu', 'disk'}))}",
            expected="room for all of them on the worker's devices",
            todo="raise cluster.parallel.devices, free the devices, or name the places of all "
            "modules in cluster.parallel.map",
        )
    return model


def _require_every_module(model: Any, places: Sequence[str]) -> None:
    """`TargetError` where a map misses a parameter or names what is no module.

    transformers leaves the one to the CPU and passes over the other.
    """
    missed = [
        name
        for name, _ in model.named_parameters()
        if not any(place == "" or name.startswith(f"{place}.") for place in places)
    ]
    unknown = sorted({*places} - {name for name, _ in model.named_modules()})
    if missed or unknown:
        found = f"no place for {missed[0]}" if missed else f"a place for {unknown[0]!r}"
        raise TargetError(
            found=f"cluster.parallel.map with {found}",
            expected="a device for every module of the target, named as transformers does",
            todo="correct cluster.parallel.map, or set it to auto",
        )


def quiet() -> None:
    """No progress bars of transformers where nobody watches: a worker's log, CI, a file."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def load_model(
    home: Path,
    *,
    dtype: DType,
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    **of_transformers: Any,
) -> Any:
    """A causal LM from local safetensors files: evaluation mode, no gradients, never a pickle."""
    from transformers import AutoModelForCausalLM

    quiet()
    model = AutoModelForCausalLM.from_pretrained(
        home,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        device_map=dict(device_map) if isinstance(device_map, tuple) else device_map,
        **of_transformers,
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(home: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        home, trust_remote_code=trust_remote_code, local_files_only=True
    )


def home_of(spec: TargetSpec, folder: Path) -> Path:
    """Where the model's files lie: the target folder, the folder it names, or the hub's cache."""
    if spec.kind == "embedded":
        return folder
    if spec.revision is not None:
        return snapshot(spec.model, spec.revision)
    home = Path(spec.model)
    if not home.is_dir():
        raise TargetError(
            found=f"no folder {home}, which {folder / SPEC} pins",
            expected="the target's files where they were when the target stage ran",
            todo="bring the folder back, or correct target.model and run dvc repro",
        )
    return home


def snapshot(model: str, revision: str) -> Path:
    """The local snapshot of a hub repository at a commit, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # *.py only matters under trust_remote_code, and is text
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        found, todo = f"hub model {model} has no revision {revision}", "correct target.revision"
    except (RepositoryNotFoundError, HFValidationError):
        found = f"neither a folder nor a readable hub model is named {model}"
        todo = "correct target.model, or log in with `hf auth login` where it is gated"
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        found = f"hub model {model} at {revision} is not in the local cache and the hub is silent"
        todo = f"connect, or run `hf download {model} --revision {revision}` where there is network"
    raise TargetError(
        found=found, expected="a model of the hub at a commit that exists", todo=todo
    ) from None


def sample_digest(path: Path) -> str:
    """sha256 of a file's size, its head and 64 blocks: tells two models apart in milliseconds."""
    size = path.stat().st_size
    seen = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        seen.update(file.read(HEAD_BYTES))
        rest = max(size - HEAD_BYTES - BLOCK_BYTES, 0)
        for block in range(NUM_BLOCKS):
            file.seek(HEAD_BYTES + rest * block // NUM_BLOCKS)
            seen.update(file.read(BLOCK_BYTES))
    return seen.hexdigest()


def files_digest(home: Path, names: Sequence[str]) -> str:
    """One digest of those of the named files that exist."""
    return digest({n: file_digest(home / n) for n in names if (home / n).is_file()})


def check_files(spec: TargetSpec, home: Path) -> None:
    """`TargetError` unless tokenizer, config and weights in `home` are the pinned ones."""
    pinned = [
        ("tokenizer", spec.tokenizer_sha256, files_digest(home, TOKENIZER_FILES)),
        ("model configuration", spec.model_sha256, files_digest(home, MODEL_FILES)),
    ]
    for file in spec.weights:
        path = home / file.name
        here = sample_digest(path) if path.is_file() else "absent"
        pinned.append((f"weights file {file.name}", file.sample_sha256, here))
    for what, there, here in pinned:
        if there != here:
            raise TargetError(
                found=f"the {what} in {home} has digest {here[:12]}",
                expected=f"{there[:12]}, which {SPEC} pins",
                todo="bring the pinned files back, or run dvc repro --force target to pin these",
            )
