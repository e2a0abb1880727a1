"""README's tree is the disk; presets compose; the default is the embedded preset."""

import re
from pathlib import Path

import pytest

from lkcache.presets import compose, dump, names
from pipeline.check import check_params
from pipeline.config import read_params

PRESETS = Path("presets")


def test_readme_tree_captions_every_file() -> None:
    text = Path("README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") :]
    named = set(re.findall(r"^ {2,}([\w.]+\.(?:py|md))\b", tree, flags=re.MULTILINE))
    disk = {
        path.name
        for package in ("lkcache", "stages", "pipeline", "storage")
        for path in Path(package).rglob("*.py")
        if path.name != "__init__.py"
    } | {"FORMAT.md"}
    assert named == disk, f"missing {sorted(disk - named)}, gone {sorted(named - disk)}"


def test_params_are_the_embedded_preset() -> None:
    assert Path("params.yaml").read_bytes() == Path("presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("preset", names(PRESETS))
def test_preset_composes_to_good_parameters(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    dump(compose(PRESETS, preset), path)
    check_params(read_params(path))


def test_composing_the_embedded_preset_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    dump(compose(PRESETS, "embedded"), path)
    assert path.read_bytes() == Path("presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "NOTATION.md", "MATHS.md"])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", Path(page).read_text(encoding="utf-8")):
        assert Path(link).exists(), f"{page} links to {link}"
