"""`make deps`: write the union of all stages' imports into the deps of `check` in dvc.yaml."""

from pathlib import Path
from typing import Any

from lkcache.presets import yaml
from pipeline.closure import closures, named_files

DVC = Path("dvc.yaml")


def load_yaml(path: Path) -> tuple[Any, Any]:
    parser = yaml()
    parser.preserve_quotes = True
    parser.indent(mapping=2, sequence=4, offset=2)
    return parser.load(path), parser


def body(stage: Any) -> Any:
    """A stage, or what its `foreach` does."""
    return stage.get("do", stage)


def expected() -> list[str]:
    """Every file that some stage imports, less those that cells name by template."""
    folders = ("drafts", "losses", "exports")
    by_name = {f"{m.replace('.', '/')}.py" for folder in folders for m in named_files(folder)}
    return sorted({file for files in closures().values() for file in files} - by_name)


def main() -> None:
    document, parser = load_yaml(DVC)
    document["stages"]["check"]["deps"] = expected()
    parser.dump(document, DVC)


if __name__ == "__main__":
    main()
