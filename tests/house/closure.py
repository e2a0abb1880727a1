"""What each stage of dvc.yaml imports of our own, directly or not; `make deps` writes it there.

`python -m tests.house.closure` rewrites the `.py` deps of every stage in dvc.yaml: the closure of
`stages.<verb>` and of every draft and loss that its cells name by template, less the plumbing that
cannot change an output, less what a template names already.
"""

import re
from pathlib import Path
from typing import Any

import grimp
from ruamel.yaml import YAML

# cannot change an output: reading parameters, fanning out, recording a run. Argued in review.
PLUMBING = {"pipeline.config", "pipeline.cluster", "pipeline.provenance"}
DVC = Path("dvc.yaml")
BLOCK = {"warmup": "starts", "train": "arms", "evaluate": "starts", "export": "exports"}


def load_yaml(path: Path) -> Any:
    parser = YAML()
    parser.width = 200
    parser.preserve_quotes = True
    parser.indent(mapping=2, sequence=4, offset=2)
    return parser.load(path), parser


def source(module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def closure(graph: Any, module: str) -> set[str]:
    found = {module} | graph.find_upstream_modules(module)
    return {source(m) for m in found if m.count(".") and m not in PLUMBING}


def found_by_name(stage: Any) -> set[str]:
    """The draft and loss modules that a stage's templates name, over all kinds that exist."""
    modules = set()
    for dep in stage["deps"]:
        if match := re.match(r"pipeline/(drafts|losses)/\$\{", dep):
            folder = Path("pipeline", match[1])
            modules |= {f"pipeline.{match[1]}.{p.stem}" for p in folder.glob("[a-z]*.py")}
        elif match := re.match(r"pipeline/(drafts|losses)/(\w+)\.py", dep):
            modules.add(f"pipeline.{match[1]}.{match[2]}")
    return modules


def expected(graph: Any, name: str, stage: Any) -> list[str]:
    """The `.py` deps that a stage's imports ask for, sorted; templates stand for the rest."""
    static = closure(graph, f"stages.{name}")
    named = found_by_name(stage)
    by_name = set().union(*(closure(graph, module) for module in named)) if named else set()
    own = {source(module) for module in named}
    literal = {
        dep for dep in stage["deps"] if re.fullmatch(r"pipeline/(drafts|losses)/\w+\.py", dep)
    }
    return sorted(static | (by_name - own) | literal)


def body(stage: Any) -> Any:
    return stage.get("do", stage)


def main() -> None:
    graph = grimp.build_graph("lkcache", "stages", "pipeline", "storage", cache_dir=None)
    document, parser = load_yaml(DVC)
    for name, stage in document["stages"].items():
        deps = body(stage)["deps"]
        kept = [d for d in deps if not d.endswith(".py") or "${" in d]
        del deps[:]
        deps.extend([*kept, *expected_of(graph, name, body(stage), kept)])
    parser.dump(document, DVC)


def expected_of(graph: Any, name: str, stage: Any, kept: list[str]) -> list[str]:
    literal = ["pipeline/losses/kl.py"] if name == "warmup" else []  # `warmup.loss` is kl alone
    return expected(graph, name, {"deps": [*kept, *literal]})


if __name__ == "__main__":
    main()
