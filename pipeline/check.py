"""Every section of `params.yaml`, and what the sections need of each other, before anything runs.

Knows no file but the parameters and, where the target is a folder, its config.json: no weights, no
cache. What a pretrained target or the user's data holds, the stage that opens it checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import draft, loss
from pipeline.audit import VerifyConfig
from pipeline.capture import CaptureConfig
from pipeline.cluster import ClusterConfig, require_one_way
from pipeline.config import PARAMS, near, parse
from pipeline.embedded import EmbeddedConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.export import ExportConfig, find_format
from pipeline.findings import ReportConfig
from pipeline.generate import GenerateConfig
from pipeline.matrix import Arm, Export, Start, check_matrix
from pipeline.pin import PretrainedConfig, TargetConfig, check_place, find_pretrained
from pipeline.prompts import SETS, PrepareConfig
from pipeline.setting import Setting
from pipeline.sources import StdlibSource, check_source, require_file
from pipeline.target_law import cuts, require_tail
from pipeline.train import FitConfig, WarmupConfig
from pipeline.warm import check_start
from storage.errors import ConfigError
from storage.workspace import read_json

SECTIONS: dict[str, Any] = {
    "prepare": PrepareConfig,
    "target": TargetConfig,
    "generate": GenerateConfig,
    "capture": CaptureConfig,
    "verify": VerifyConfig,
    "warmup": WarmupConfig,
    "train": FitConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "cluster": ClusterConfig,
}
BY_KIND = {"drafts": draft, "losses": loss}
MATRIX = ("starts", "arms", "exports")


def check_params(params: Mapping[str, Any]) -> None:
    """Validate a parameter file; `ConfigError` names the first thing that is wrong."""
    _all_there(params)
    sections = {name: parse(name, params[name], model) for name, model in SECTIONS.items()}
    found = {name: _by_kind(name, params[name]) for name in BY_KIND}
    check_matrix(params)
    starts: dict[str, Start] = parse("starts", params["starts"], dict[str, Start])
    exports: dict[str, Export] = parse("exports", params["exports"], dict[str, Export])
    for start in starts.values():
        _check_needs(start.draft, found["drafts"][start.draft], sections["capture"])
        if (weights := found["drafts"][start.draft].start) is not None:
            check_start(weights)
    arms: dict[str, Arm] = parse("arms", params["arms"], dict[str, Arm])
    for arm in arms.values():
        loss.require_law(
            arm.objective,
            found["losses"][arm.objective],
            sections["capture"].mode,
            cut=cuts(sections["train"].target_law),
        )
    for name in ("warmup", "train"):
        capture = sections["capture"]
        sampled = capture.mode != "topk" or capture.tail_samples > 0
        require_tail(name, sections[name].target_law, sampled=sampled)
    for cell in exports.values():
        find_format(cell.kind, cell.format).require(found["drafts"][cell.draft])
    _check_target(
        sections, {start.draft: found["drafts"][start.draft] for start in starts.values()}
    )
    _check_seeds(sections["evaluate"], starts)
    _check_report(sections, params)
    _check_laws(sections)
    check_source(sections["prepare"].source)
    for path in sections["prepare"].filters.evaluation_prompts:
        require_file(path, SETS)


def _all_there(params: Mapping[str, Any]) -> None:
    known = [*SECTIONS, *BY_KIND, *MATRIX]
    for name in params:
        if name not in known:
            meant = near(str(name), [k for k in known if k not in params])
            raise ConfigError(
                found=f"{PARAMS}: section {name!r} is unknown",
                expected=f"one of {', '.join(known)}",
                todo=f"remove {name} from {PARAMS} or correct its spelling"
                + (f" (is it {meant}?)" if meant else ""),
            )
    for name in known:
        if name not in params:
            raise ConfigError(
                found=f"{PARAMS}: section {name} is missing",
                expected=", ".join(known),
                todo=f"add {name}, as presets/embedded.yaml has it",
            )


def _by_kind(section: str, entries: Any) -> dict[str, Any]:
    """The entries of `drafts` or `losses`, each by its kind's own model."""
    parsed = {}
    rows: dict[str, dict[str, Any]] = parse(section, entries, dict[str, dict[str, Any]])
    for name, row in rows.items():
        module = BY_KIND[section].find(str(row.get("kind")))
        parsed[name] = parse(f"{section}.{name}", row, module.Config)
    return parsed


def _check_needs(name: str, config: Any, capture: CaptureConfig) -> None:
    """The cache will hold what the draft reads."""
    needs = draft.find(config.kind).Model.needs(config)
    if needs.num_layers not in (0, len(capture.hidden_layers)):
        raise ConfigError(
            found=f"{PARAMS}: capture.hidden_layers names {len(capture.hidden_layers)} layers",
            expected=f"{needs.num_layers}, which the draft {name} ({config.kind}) reads",
            todo="name them in capture.hidden_layers; capture and what follows run again",
        )
    if needs.last_hidden and not capture.last_hidden:
        raise ConfigError(
            found=f"{PARAMS}: capture.last_hidden is false",
            expected=f"true, because the draft {name} ({config.kind}) reads it",
            todo="set capture.last_hidden: true; capture and what follows run again",
        )


def _check_target(sections: Mapping[str, Any], drafts: Mapping[str, Any]) -> None:
    """What the embedded target's shape allows; a pretrained one is checked where it is opened."""
    target, generate, capture = (sections[name] for name in ("target", "generate", "capture"))
    if not isinstance(target, EmbeddedConfig):
        _check_revision(target)
        require_one_way(sections["cluster"], shards=target.tensor_parallel)
        num_layers, vocab_size = _known_shape(target)
        _check_layers(capture, num_layers)
        _check_vocabularies(drafts, vocab_size)
        return
    longest = generate.max_prompt_tokens + generate.max_new_tokens
    if longest > target.context_tokens:
        raise ConfigError(
            found=f"{PARAMS}: generate allows sequences of {longest} tokens",
            expected=f"at most target.context_tokens, {target.context_tokens}",
            todo="lower generate.max_prompt_tokens or max_new_tokens, or raise the context",
        )
    _check_layers(capture, target.num_layers)


def _known_shape(target: PretrainedConfig) -> tuple[int | None, int | None]:
    """Layers and vocabulary: of the folder's config.json, else of `target.shape`, else unknown."""
    if Path(target.model).is_dir():
        path = find_pretrained(target) / "config.json"  # holds target.shape against it
        stated = read_json(path) if path.is_file() else {}
        stated = stated.get("text_config", stated)
        return stated.get("num_hidden_layers"), stated.get("vocab_size")
    shape = target.shape
    return (None, None) if shape is None else (shape.num_layers, shape.vocab_size)


def _check_layers(capture: CaptureConfig, num_layers: int | None) -> None:
    """Before prompts are answered for hours: `capture` would refuse them only then."""
    for layer in capture.hidden_layers:
        if num_layers is not None and layer >= num_layers:
            raise ConfigError(
                found=f"{PARAMS}: capture.hidden_layers names layer {layer}",
                expected=f"indices from 0 to {num_layers - 1}; the stream after the last "
                "layer is normed and is capture.last_hidden",
                todo="correct capture.hidden_layers",
            )


def _check_vocabularies(drafts: Mapping[str, Any], vocab_size: int | None) -> None:
    for name, config in drafts.items():
        size = getattr(config, "draft_vocab_size", None)
        if size is not None and vocab_size is not None and size > vocab_size:
            raise ConfigError(
                found=f"{PARAMS}: drafts.{name}.draft_vocab_size is {size}",
                expected=f"at most the target's {vocab_size}, or null for all of it",
                todo=f"correct drafts.{name}.draft_vocab_size",
            )


def _check_revision(target: PretrainedConfig) -> None:
    """A preset cannot know the commit; without one nothing is worth starting."""
    if target.revision is None and not Path(target.model).is_dir():
        raise ConfigError(
            found=f"{PARAMS}: target.revision is null for {target.model}, which is no folder here",
            expected="the commit of the hub repository, 40 hex digits, since a branch can move",
            todo="set target.revision to the commit that its page shows, or name a local folder",
        )
    check_place(target)


def _check_seeds(evaluate: EvaluateConfig, starts: Mapping[str, Start]) -> None:
    """A seed that no start has would decode nothing, and say nothing."""
    seeds = sorted({start.seed for start in starts.values()})
    stray = [seed for seed in evaluate.decode_seeds if seed not in seeds]
    if stray and seeds:
        raise ConfigError(
            found=f"{PARAMS}: evaluate.decode_seeds names {stray[0]}, the seed of no start",
            expected=f"seeds of starts: {', '.join(map(str, seeds))}; or [], to decode nothing",
            todo="correct evaluate.decode_seeds",
        )


def _check_report(sections: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    report, evaluate = sections["report"], sections["evaluate"]
    if report.baseline not in params["losses"]:
        raise ConfigError(
            found=f"{PARAMS}: report.baseline is {report.baseline!r}",
            expected=f"one of {', '.join(params['losses'])}",
            todo="name an objective",
        )
    if max(report.gammas) > evaluate.depth:
        raise ConfigError(
            found=f"{PARAMS}: report.gammas asks for {max(report.gammas)}",
            expected=f"at most evaluate.depth, {evaluate.depth}",
            todo="raise evaluate.depth or lower report.gammas",
        )


def _check_laws(sections: Mapping[str, Any]) -> None:
    """Rollouts that nothing would replay are not made; files of prompts are there."""
    replayed = {Setting.parse(name).law for name in sections["evaluate"].laws}
    unread = [law for law in sections["generate"].laws if law not in replayed]
    if unread:
        raise ConfigError(
            found=f"{PARAMS}: generate.laws names {unread[0]}",
            expected=f"laws that evaluate.laws names too: {', '.join(sorted(replayed))}",
            todo="add it to evaluate.laws, or take it out of generate.laws",
        )
    prepare = sections["prepare"]
    for name, given in sections["evaluate"].prompt_sets.items():
        require_file(given.path, f"evaluate.prompt_sets.{name}.path")
        known = isinstance(prepare.source, StdlibSource)  # nobody's questions stand in there
        if not known and given.path not in prepare.filters.evaluation_prompts:
            raise ConfigError(
                found=f"{PARAMS}: evaluate.prompt_sets.{name} reads {given.path}",
                expected="every such file among prepare.filters.evaluation_prompts, so that no "
                "draft trains on the prompts that it is measured on",
                todo=f"add {given.path} to prepare.filters.evaluation_prompts",
            )
