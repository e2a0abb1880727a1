"""Presets and the matrix of cells: what `use`, `init` and `matrix` write into `params.yaml`.

`presets/embedded.yaml` is a whole parameter file; every other preset is laid over it: mappings are
merged key by key, except where `kind` differs (another source, another target), which replaces the
mapping, and a draft or loss that is `null`, which is removed. Two keys are not sections: `matrix`
(draft -> seeds and objectives) writes `starts` and `arms`, and `exports` (arm -> format, or a list
of them) writes the export cells. Torch-free; keeps comments.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.config import near
from storage.errors import ConfigError

BASE = "embedded"
NAMED = ("drafts", "losses", "starts", "arms", "exports")


def names(folder: Path) -> list[str]:
    """The presets that a project carries."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def compose(folder: Path, preset: str) -> CommentedMap:
    """The whole parameter file that a preset stands for; `ConfigError` lists those that exist."""
    if not names(folder):
        raise ConfigError(
            found=f"no presets in {folder.absolute()}",
            expected="those that a project carries",
            todo="run from the project's root, or lay one out with lkcache init",
        )
    if preset not in names(folder):
        raise ConfigError(
            found=f"preset {preset!r}",
            expected=f"one of {', '.join(names(folder))}",
            todo=f"choose one{_meant(preset, names(folder))}, or add {folder}/{preset}.yaml",
        )
    params = yaml().load(folder / f"{BASE}.yaml")
    if preset == BASE:
        return params
    overlay = yaml().load(folder / f"{preset}.yaml")
    matrix, exports = overlay.pop("matrix", None), overlay.pop("exports", None)
    _lay_over(params, overlay)
    for section in ("drafts", "losses"):
        for name in [name for name, entry in params[section].items() if entry is None]:
            del params[section][name]
    if matrix is not None:
        write_cells(params, matrix, exports or {})
    if params["target"]["kind"] != "embedded":
        blank_line(params, "generate")  # the mapping that was replaced took it along
    params.yaml_set_start_comment(
        f"Preset {preset!r} laid over the embedded default (`lkcache use {preset}`).\n"
        "Every section is read strictly; presets/embedded.yaml explains each parameter."
    )
    return params


def _meant(name: str, known: Iterable[str]) -> str:
    meant = near(name, known)
    return f" (is it {meant}?)" if meant else ""


def write_cells(
    params: CommentedMap,
    matrix: Mapping[str, Mapping[str, Any]],
    exports: Mapping[str, str | list[str]],
) -> None:
    """Write `starts`, `arms` and `exports` from the lists of seeds and objectives of each draft.

    An arm's first format is keyed by the arm, every other by `<arm>-<format>`.
    """
    starts, arms, cells = CommentedMap(), CommentedMap(), CommentedMap()
    for draft, rows in matrix.items():
        kind = _known(params, "drafts", draft)["kind"]
        for seed in rows["seeds"]:
            start = f"{draft}-{seed}"
            objectives = _flow_list(rows["objectives"])
            starts[start] = _flow(draft=draft, kind=kind, seed=seed, objectives=objectives)
            for objective in rows["objectives"]:
                loss = _known(params, "losses", objective)["kind"]
                arms[f"{draft}-{objective}-{seed}"] = _flow(
                    draft=draft, kind=kind, objective=objective, loss=loss, seed=seed, start=start
                )
    for arm, forms in exports.items():
        if arm not in arms:
            raise ConfigError(
                found=f"export of arm {arm!r}",
                expected=f"one of {', '.join(arms)}",
                todo="name an arm of the matrix",
            )
        row = {key: arms[arm][key] for key in ("start", "draft", "kind", "objective")}
        for index, form in enumerate([forms] if isinstance(forms, str) else forms):
            cells[f"{arm}-{form}" if index else arm] = _flow(**row, format=form)
    params["starts"], params["arms"], params["exports"] = starts, arms, cells
    for block in ("arms", "exports"):  # `starts` keeps the blank line of the section above it
        if block not in params.ca.items:  # as where the line hung on a cell that went
            params.yaml_set_comment_before_after_key(block, before="")


def blank_line(params: CommentedMap, section: str) -> None:
    """An empty line before a section that has none."""
    params.yaml_set_comment_before_after_key(section, before="\n")


def dump(params: CommentedMap, path: Path) -> None:
    """Write a parameter file, comments kept."""
    yaml().dump(params, path)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two parameter files, a line each: `train.steps: 300 -> 20`.

    Entries of a block of cells, of `drafts` or of `losses` that come or go are named in one line,
    and so are the keys that another `kind` does without.
    """
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if name in NAMED or a.get("kind") != b.get("kind"):
                gone, come = [k for k in a if k not in b], [k for k in b if k not in a]
                come = come if name in NAMED else []  # of another kind the values tell more
                for word, keys in (("without", gone), ("with", come)):
                    if keys:
                        lines.append(f"{name}: {word} {', '.join(keys)}")
                a = {k: value for k, value in a.items() if k not in gone}
                b = {k: value for k, value in b.items() if k not in come}
            lines += changes(a, b, f"{name}.")
        elif a != b:
            show = {True: "absent"}
            lines.append(f"{name}: {show.get(key not in old, a)} -> {show.get(key not in new, b)}")
    return lines


def yaml() -> YAML:
    """A round-trip parser: comments and order stay, no line is folded, null is spelt out."""
    parser = YAML()
    parser.width = 200
    parser.representer.add_representer(
        type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return parser


def _flow(**row: Any) -> CommentedMap:
    mapping = CommentedMap(row)
    mapping.fa.set_flow_style()
    return mapping


def _flow_list(items: Iterable[str]) -> CommentedSeq:
    sequence = CommentedSeq(items)
    sequence.fa.set_flow_style()
    return sequence


def _known(params: Mapping[str, Any], section: str, name: str) -> Mapping[str, Any]:
    if name not in params[section]:
        raise ConfigError(
            found=f"{name!r} is not in `{section}` of the parameter file",
            expected=f"one of {', '.join(params[section])}",
            todo=f"add {section}.{name} or correct the name",
        )
    found: Mapping[str, Any] = params[section][name]
    return found


def _lay_over(base: CommentedMap, overlay: Mapping[str, Any]) -> None:
    for key, value in overlay.items():
        old = base.get(key)
        same_kind = isinstance(old, Mapping) and (
            not isinstance(value, Mapping) or old.get("kind") == value.get("kind", old.get("kind"))
        )
        if isinstance(value, Mapping) and same_kind:
            _lay_over(base[key], value)
        else:
            base[key] = value
