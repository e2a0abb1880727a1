"""`make deps`: write `docs/reference/` from the typed schema and the verbs' docstrings."""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lkcache.main import VERBS
from lkcache.presets import compose, yaml
from pipeline import draft, loss
from pipeline.check import SECTIONS
from pipeline.config import read_params
from pipeline.matrix import Arm, Export, Start

FOLDER = Path("docs/reference")
PRESET = Path("presets/embedded.yaml")
ABSENT = object()
# what a name means wherever it stands, unless its own field or its line in the preset says more
COMMON = {
    "attention": "`step0`: as it is served; `per_step`: as the speculators package trains.",
    "batch_sequences": "Sequences that are computed together.",
    "confidence": "Of all intervals.",
    "context_tokens": "Longest sequence that the target takes.",
    "fc_norm": "A norm over each fused layer before `fc`; excludes norm_before_fc.",
    "arms": "Trained drafts: one a start and objective.",
    "betas": "AdamW's.",
    "cores": "Of a job.",
    "decode_batch": "Prompts decoded together.",
    "decode_prompts": "Held-out prompts that are decoded.",
    "decode_gamma": "Drafted tokens a round when decoding.",
    "draft": "An entry of `drafts`.",
    "draft_vocab_size": "Ids that the draft may propose, the most frequent ones; null: all.",
    "depth": "S: depths that training unrolls.",
    "dtype": "Of the weights as they are loaded or written.",
    "eta": "How fast λ falls as acceptance grows, MATHS (13).",
    "format": "A file of `pipeline/exports/`.",
    "gpus": "A worker's own.",
    "heldout_prompts": "Prompts kept for evaluation.",
    "hidden_size": "Width.",
    "hosts": "Where workers start; the scheduler runs on the first.",
    "inner_size": "I: width of the draft's own state.",
    "intermediate_size": "Width of the feed-forward layer.",
    "kind": "Chooses this table.",
    "last_hidden": "Whether the last hidden state is stored, which MEDUSA, MLP and MTP read.",
    "log_every": "Steps between points of the curve.",
    "loss": "A file of `pipeline/losses/`.",
    "lr": "Peak rate of the cosine.",
    "lr_warmup_steps": "Steps over which the rate rises.",
    "max_chars": "Of all documents together.",
    "max_logp_error": "Nats.",
    "max_new_tokens": "Longest response.",
    "max_prompt_tokens": "Longer prompts are left out, and counted.",
    "model": "A folder of transformers, or a hub id.",
    "norm_before_fc": "One norm over all fused layers before `fc`.",
    "norm_before_residual": "Whether the residual starts from the normed feature.",
    "norm_eps": "Of every RMS norm.",
    "norm_output": "Whether the state that is passed on is normed.",
    "num_heads": "Attention heads; for `medusa` and `mlp`, depths.",
    "num_layers": "Layers.",
    "objective": "An entry of `losses`.",
    "objectives": "Entries of `losses`, each an arm.",
    "partition": "SLURM's.",
    "port": "Of ssh.",
    "prompt_chars": "Where a document is cut: what stands before is the prompt.",
    "rope_theta": "Rotary base.",
    "scale_input": "Whether the target's state is normed first.",
    "seed": "Of this section's own random streams.",
    "source": "Where documents or prompts come from.",
    "start": "The entry of `starts` that it begins from.",
    "steps": "Of the optimizer.",
    "threads": "Of one process on a CPU.",
    "tie_weights": "Whether stages share embedding, norm, head and projections.",
    "train": "A file of JSON lines.",
    "train_head": "Whether a copy of the target's head is trained, or the head frozen.",
    "train_heads": "Whether each head has a trained output matrix, or the target's, frozen.",
    "train_prompts": "Prompts whose responses train.",
    "trust_remote_code": "Whether the model's own Python may run.",
    "user": "On the hosts; null: as ssh itself would log in.",
    "vocab_size": "V.",
    "walltime": "Of a job, which is submitted again when it ends.",
    "weight": "λ, fixed, MATHS (14).",
    "weight_decay": "AdamW's.",
    "memory": "Of a job.",
    "account": "SLURM's.",
    "layout": "How rows are laid out (`pipeline/layouts.py`); `auto` asks the first row.",
    "id": "Of a data set on the hub, `org/name`, or a folder.",
    "parts": "The sources that are mixed, each with its weight.",
    "min_chars": "Shorter documents and prompts are left out.",
    "top_p": "Of the law: the likeliest ids until they hold this much; null: all.",
    "top_k": "Of the law: as many of the likeliest ids; null: all.",
    "concurrency": "Requests under way at once.",
    "retries": "After a lost connection, a timeout, 429 or 5xx, with growing pauses.",
    "timeout_s": "Of one response.",
    "experts": "Routed experts in place of one feed-forward layer, DeepSeek-V3's; null: none.",
}
HEAD = """# Every parameter

Written by `make deps` from the typed schema that every stage reads `params.yaml` with; a test fails
where it is not current. All keys are strict: an unknown one, a missing one without a default, a
wrong type and a value out of bounds stop the run in `check`, before any output is touched. Values
are the embedded default's (of drafts that it lacks, the preset `full`'s), or in brackets the
schema's own, where a key may be left out.
"""

COMMANDS = """# Every command

Written by `make deps` from the verbs' own texts; `lkcache VERB --help` prints the same. Exit codes:
0, done; 1, something was found; 2, something to mend, said in one sentence. Inside a project its
own copy of the code runs; elsewhere the one that lkcache carries.
"""


def pages() -> dict[Path, str]:
    """Both pages and their text."""
    return {FOLDER / "parameters.md": parameters(), FOLDER / "commands.md": commands()}


def parameters() -> str:
    """A table for every section, kind of draft, kind of loss, and cell."""
    values, comments = read_params(PRESET), yaml().load(PRESET)
    full = compose(PRESET.parent, "full")
    parts = [HEAD]
    for section, model in SECTIONS.items():
        parts.append(f"## `{section}`\n")
        for one in members(model):
            parts += table(section, one, values[section], comments[section])
    for section, module in (("drafts", draft), ("losses", loss)):
        parts.append(f"## `{section}`\n\nEntries by name, of one of these kinds.\n")
        for kind in module.kinds():
            config = module.find(kind).Config
            entry = next((e for e in full[section].values() if e["kind"] == kind), {})
            about = inspect.cleandoc(module.find(kind).__doc__ or "").split("\n\n")[0]
            parts += table(f"{section}, kind {kind}", config, entry, None, about)
    parts.append("## `starts`, `arms`, `exports`\n\nCells, which `lkcache matrix` writes.\n")
    for section, model in (("starts", Start), ("arms", Arm), ("exports", Export)):
        entry = next(iter(values[section].values()))
        parts += table(f"an entry of {section}", model, entry, None)
    return "\n".join(parts).rstrip() + "\n"


def table(
    title: str, model: type[BaseModel], values: Any, comments: Any, about: str = ""
) -> list[str]:
    """A model's fields, and below them the models that its fields name."""
    nested: list[tuple[str, type[BaseModel]]] = []
    lines = [f"### {title}{_kind(model)}\n", (about or summary(model)) + "\n"]
    lines += ["| key | type | value | meaning |", "| --- | --- | --- | --- |"]
    here = values if _kind_of(values) in (None, _kind_of_model(model)) else {}
    for name, field in model.model_fields.items():
        note = described(model).get(name) or comment(comments, name) or COMMON.get(name, "")
        value = here.get(name, ABSENT) if isinstance(here, dict) else ABSENT
        lines.append(f"| `{name}` | {kind_of(field)} | {shown(value, field)} | {escaped(note)} |")
        nested += [(f"{title}.{name}", inner) for inner in members(field.annotation)]
    lines.append("")
    for name, inner in nested:
        inside = here.get(name.rsplit(".", 1)[1]) if isinstance(here, dict) else None
        lines += table(name, inner, inside if isinstance(inside, dict) else {}, None)
    return lines


def members(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, alternatives in order."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        if not isinstance(part, str | int | float | bool):
            yield from members(part)


def _kind(model: type[BaseModel]) -> str:
    kind = _kind_of_model(model)
    return f", kind {kind}" if kind and model.__name__ != "Config" else ""


def _kind_of_model(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    choices = get_args(field.annotation) if field else ()
    return choices[0] if len(choices) == 1 and isinstance(choices[0], str) else None


def _kind_of(values: Any) -> str | None:
    return values.get("kind") if isinstance(values, dict) else None


def summary(model: type[BaseModel]) -> str:
    """The first sentence of a model's docstring, of its own file."""
    text = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


@cache
def described(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field, in the class itself and those it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not (issubclass(owner, BaseModel) and owner.__module__.startswith("pipeline")):
            continue
        body = ast.parse(dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def comment(mapping: Any, name: str) -> str:
    """The comment beside a key of the embedded preset."""
    found = getattr(mapping, "ca", None)
    token = found.items.get(name, [None] * 3)[2] if found else None
    text = token.value.strip().split("\n")[0] if token is not None else ""
    return text.removeprefix("#").strip()


def kind_of(field: FieldInfo) -> str:
    """The type in words, with bounds."""
    return escaped(_words(field.annotation, field.metadata))


def _words(annotation: Any, metadata: Any = ()) -> str:
    bounds = "".join(_bound(item) for item in metadata)
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(inside[0], inside[1:])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in inside)) + bounds
    if origin is Literal:
        return " | ".join(f"`{part}`" for part in inside)
    if origin is list:
        return f"list of {_words(inside[0])}{bounds}"
    if origin is dict:
        return f"mapping to {_words(inside[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"mapping (kind {_kind_of_model(annotation)})" if _kind(annotation) else "mapping"
    return names.get(annotation, str(annotation)) + bounds


def _bound(item: Any) -> str:
    """One constraint of annotated-types or pydantic."""
    signs = {
        "ge": "≥",
        "gt": ">",
        "le": "≤",
        "lt": "<",
        "min_length": "at least",
        "pattern": "like",
    }
    found = ""
    for part in (item, *getattr(item, "metadata", ())):
        for name, sign in signs.items():
            if (value := getattr(part, name, None)) is not None:
                shown_value = f"`{value}`" if name == "pattern" else value
                found += f", {sign} {shown_value}"
    return found


def shown(value: Any, field: FieldInfo) -> str:
    """A value as YAML has it."""
    if value is ABSENT:
        if field.is_required():
            return ""
        return f"[{_yaml(field.default)}]"
    return _yaml(value)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "…"
    words = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    return f"`{words[value] if is_word else value}`"


def escaped(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """Every verb of `lkcache` with its docstring and its options."""
    parts = [COMMANDS]
    for verb, line in VERBS.items():
        function = getattr(import_module(f"lkcache.{verb}"), verb)
        parts.append(f"## `lkcache {verb}`\n\n{line}\n\n{inspect.cleandoc(function.__doc__)}\n")
        rows = [_option(p) for p in inspect.signature(function).parameters.values()]
        parts += ["| argument | default | meaning |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(parts).rstrip() + "\n"


def _option(parameter: inspect.Parameter) -> str:
    found = [m for m in getattr(parameter.annotation, "__metadata__", ()) if hasattr(m, "help")]
    required = parameter.default is inspect.Parameter.empty
    # typer keeps the first name of an annotated option where its default would stand
    names = [n for m in found for n in (m.default, *(m.param_decls or ())) if isinstance(n, str)]
    default = "" if required else _yaml(parameter.default)
    name = f"--{parameter.name.replace('_', '-')}"
    label = parameter.name.upper() if required else ", ".join(names) or name
    text = " ".join(m.help or "" for m in found)
    return f"| `{label}` | {default} | {escaped(text)} |"


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
