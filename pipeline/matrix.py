"""The cells of the default run: `starts`, `arms` and `exports` of `params.yaml`; torch-free.

A start is one draft and seed (the KL warm-up that its arms share), an arm one objective trained
from a start, an export one arm in one engine's format. Each entry repeats what dvc.yaml's templates
read beside it (`kind`, `loss`), and `check_matrix` keeps the copies equal to their originals.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import PARAMS, Strict, load, parse
from storage.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
"""Of a draft or objective: it becomes part of a cell's key, split at hyphens, and of a path."""
Seed = Annotated[int, Field(ge=0)]


class Start(Strict):
    """One entry of `starts`."""

    draft: Name
    kind: Name
    seed: Seed
    objectives: list[Name]
    """Of its arms, in order; here for `evaluate`, whose params name the start alone."""

    @property
    def key(self) -> str:
        """`<draft>-<seed>`."""
        return f"{self.draft}-{self.seed}"


class Arm(Strict):
    """One entry of `arms`."""

    draft: Name
    kind: Name
    objective: Name
    """An entry of `losses`."""
    loss: Name
    """That entry's kind: the file under `pipeline/losses/`."""
    seed: Seed
    start: str

    @property
    def key(self) -> str:
        """`<draft>-<objective>-<seed>`."""
        return f"{self.draft}-{self.objective}-{self.seed}"


class Export(Strict):
    """One entry of `exports`: keyed by its arm, or `<arm>-<format>` where an arm has several."""

    start: str
    draft: Name
    kind: Name
    objective: Name
    format: Name

    def arm(self, key: str) -> str:
        """The arm that the entry of that key exports."""
        return key.removesuffix(f"-{self.format}")


def cell(section: str, argv: Sequence[str], model: type[Any]) -> tuple[str, Any]:
    """The key given on a stage's command line and its entry of `section`, checked by `model`."""
    if len(argv) != 2:
        raise ConfigError(
            found=f"{len(argv) - 1} arguments",
            expected=f"one key of {section} in {PARAMS}",
            todo=f"run dvc repro, or python -m stages.<stage> <key of {section}>",
        )
    return argv[1], load(f"{section}.{argv[1]}", model)


def check_matrix(params: Mapping[str, Any]) -> None:
    """Parse the three blocks and compare them with each other, `drafts` and `losses`.

    `ConfigError` names the first entry whose key, kind, loss, seed or start does not agree. The
    sections `drafts` and `losses` are mappings of mappings with a `kind`.
    """
    starts: dict[str, Start] = parse("starts", params.get("starts"), dict[str, Start])
    arms: dict[str, Arm] = parse("arms", params.get("arms"), dict[str, Arm])
    exports: dict[str, Export] = parse("exports", params.get("exports"), dict[str, Export])
    for key, start in starts.items():
        _agree(f"starts.{key}", "kind", start.kind, _kind(params, "drafts", start.draft))
        _agree(f"starts.{key}", "its key", key, start.key)
    for key, arm in arms.items():
        _agree(f"arms.{key}", "kind", arm.kind, _kind(params, "drafts", arm.draft))
        _agree(f"arms.{key}", "loss", arm.loss, _kind(params, "losses", arm.objective))
        _agree(f"arms.{key}", "its key", key, arm.key)
        _agree(f"arms.{key}", "start", arm.start, f"{arm.draft}-{arm.seed}")
        _require(f"arms.{key}.start", arm.start, "starts", starts)
    for key, start in starts.items():
        trained = [arm.objective for arm in arms.values() if arm.start == key]
        _agree(f"starts.{key}", "objectives", start.objectives, trained)
    written: dict[tuple[str, str], str] = {}
    for key, export in exports.items():
        arm_key = export.arm(key)
        _require(f"exports.{key}", arm_key, "arms", arms)
        arm = arms[arm_key]
        if (other := written.setdefault((arm_key, export.format), key)) != key:
            raise ConfigError(
                found=f"{PARAMS}: exports.{other} and exports.{key} are both {arm_key} as "
                f"{export.format}",
                expected="an entry for each format of an arm",
                todo=f"remove one, or correct the format and key of exports.{key}",
            )
        for name in ("start", "draft", "kind", "objective"):
            _agree(f"exports.{key}", name, getattr(export, name), getattr(arm, name))


def _kind(params: Mapping[str, Any], section: str, name: str) -> str:
    """The kind of a named draft or loss."""
    entries = params.get(section)
    entries = entries if isinstance(entries, Mapping) else {}
    _require(f"the name {name}", name, section, entries)
    entry = entries[name]
    return str(entry.get("kind")) if isinstance(entry, Mapping) else str(entry)


def _require(where: str, name: str, section: str, entries: Mapping[str, Any]) -> None:
    if name not in entries:
        raise ConfigError(
            found=f"{PARAMS}: {where} refers to {name!r}, which {section} does not hold",
            expected=f"one of {', '.join(map(str, entries)) or 'no entry yet'}",
            todo=f"add {section}.{name} to {PARAMS} or correct the name",
        )


def _agree(where: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ConfigError(
            found=f"{PARAMS}: {where} has {found!r} for {what}",
            expected=f"{expected!r}, as its other entries say",
            todo=f"correct {where} in {PARAMS}, or write the blocks with lkcache matrix",
        )
