"""README's tree is the disk; presets compose; the default is the embedded preset."""

import re
from pathlib import Path

import pytest

from lkcache.estimate import estimate
from lkcache.presets import compose, dump, names
from lkcache.use import to_do
from pipeline.check import check_params
from pipeline.config import read_params
from storage.errors import ConfigError

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
def test_preset_composes_to_good_parameters(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two things are the user's: the prompts, and the commit of a target on the hub."""
    path = tmp_path / "params.yaml"
    dump(compose(PRESETS, preset), path)
    params = read_params(path)
    monkeypatch.chdir(tmp_path)
    left = to_do(params)
    if params["target"]["kind"] == "pretrained":
        assert left[0].startswith(
            f"set target.revision to the commit of {params['target']['model']}"
        )
        with pytest.raises(
            ConfigError, match=r"target.revision is null for .*, which is no folder"
        ):
            check_params(params)
        params["target"]["revision"] = "0" * 40
    if params["prepare"]["source"]["kind"] == "jsonl":
        assert left[-1] == "put your prompts into prompts.jsonl, which prepare.source names"
        Path("prompts.jsonl").touch()
    assert not to_do(params)
    check_params(params)


@pytest.mark.parametrize("preset", names(PRESETS))
def test_preset_is_estimated_without_network_or_model(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(compose(PRESETS, preset), tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**15}))
    assert estimate(tflops=400) == 0
    said = capsys.readouterr().out
    drafts = {arm["draft"] for arm in read_params(tmp_path / "params.yaml")["arms"].values()}
    assert all(f"training {draft}, all its losses and seeds" in said for draft in drafts)
    assert "all of it, evaluation apart" in said
    assert "what would save most: " in said


def test_composing_the_embedded_preset_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    dump(compose(PRESETS, "embedded"), path)
    assert path.read_bytes() == Path("presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "NOTATION.md", "MATHS.md"])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", Path(page).read_text(encoding="utf-8")):
        assert Path(link).exists(), f"{page} links to {link}"
