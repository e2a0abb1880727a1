"""The wheel: `lkcache` alone at the top, and a project laid out from it, in a bare environment."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from lkcache.project import CODE, SHIPPED, STAMP, activate, find, source
from tests.storage.samples import TOPK, make_records, write_cache

ROOT = Path(__file__).parents[2]
VERSION = "1.2.3"
BUILD = """
import sys
from setuptools import build_meta
wheel, *sdist = sys.argv[1:]  # it changes argv
build_meta.build_wheel(wheel)
for folder in sdist:
    build_meta.build_sdist(folder)
"""
OWN_CODE = """
from pathlib import Path
import stages
from pipeline.closure import closures
assert all((Path.cwd() / file).is_file() for files in closures().values() for file in files)
print(Path(stages.__file__).parent)
"""


def build(tree: Path, *folders: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *map(str, folders)],
        cwd=tree,
        env=os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION_FOR_LKCACHE": VERSION},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist of a copy of this tree, which git does not know."""
    base = tmp_path_factory.mktemp("built")
    tree = base / "tree"
    tree.mkdir()
    no_cache = shutil.ignore_patterns("__pycache__")
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "params.yaml")
    for name in (*SHIPPED, *files, "constraints.txt", "lkcache"):
        (tree / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=no_cache)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    build(tree, base, base)
    return base


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"lkcache-{VERSION}-py3-none-any.whl"


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_lkcache_alone_and_every_file_of_a_project(wheel: Path) -> None:
    held = members(wheel)
    tops = {name.split("/")[0] for name in held}
    assert tops == {"lkcache", f"lkcache-{VERSION}.dist-info"}
    assert held[f"lkcache-{VERSION}.dist-info/top_level.txt"].split() == [b"lkcache"]
    shipped = {
        str(path.relative_to(ROOT))
        for name in SHIPPED
        for path in [ROOT / name, *(ROOT / name).rglob("*")]
        if path.is_file() and "__pycache__" not in path.parts
    }
    carried = {name.removeprefix("lkcache/_project/") for name in held if "/_project/" in name}
    assert carried == shipped
    for name in shipped:
        assert held[f"lkcache/_project/{name}"] == (ROOT / name).read_bytes(), name
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lkcache").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert own == {name for name in held if name.startswith("lkcache/") and "_project" not in name}


def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(built / f"lkcache-{VERSION}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "again").mkdir()
    build(tmp_path / f"lkcache-{VERSION}", tmp_path / "again")
    assert members(tmp_path / "again" / wheel.name) == members(wheel)


@pytest.fixture(scope="module")
def lkcache(wheel: Path) -> Path:
    """The command, installed from the wheel beside the packages of this environment."""
    home = wheel.parent / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    packages = home / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # a folder named in a .pth is searched, its own .pth files (an editable lkcache) are not read
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    command = home / "bin" / "lkcache"
    command.write_text(
        f"#!{home}/bin/python\nfrom lkcache.main import main\nmain()\n", encoding="utf-8"
    )
    command.chmod(0o755)
    return command


def run(command: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "160"}
    return subprocess.run(
        [command, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_a_project_is_laid_out_used_and_estimated(lkcache: Path, tmp_path: Path) -> None:
    project = tmp_path / "mine"
    done = run(lkcache, "init", "mine", "--preset", "smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (project / STAMP).read_text() == f"{VERSION}\n"
    for name in CODE:
        assert (project / name / "__init__.py").is_file()
    assert not (project / "lkcache").exists()
    done = run(lkcache, "use", "embedded", cwd=project)
    assert "params.yaml is now the preset 'embedded'" in done.stdout, done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    done = run(lkcache, "estimate", cwd=project)
    assert (done.returncode, "assumed" in done.stdout) == (0, True), done.stderr
    done = run(lkcache, "init", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine is not empty; expected a new or an empty folder" in done.stderr
    python = [lkcache.parent / "python", "-c", OWN_CODE]  # as `dvc repro` starts a stage
    done = subprocess.run(python, cwd=project, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(project / "stages")), done.stderr


def test_a_cache_opens_where_no_project_is(lkcache: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "a.zarr", TOPK, make_records(TOPK, [12, 9]))
    for verb in ("inspect", "verify"):
        done = run(lkcache, verb, "a.zarr", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "whole and sound: 1 part, 2 sequences" in done.stdout
    assert run(lkcache, "--version", cwd=tmp_path).stdout == f"lkcache {VERSION}\n"


def test_a_projects_own_copy_runs_and_another_version_is_said(
    lkcache: Path, tmp_path: Path
) -> None:
    run(lkcache, "init", "mine", cwd=tmp_path)
    project = tmp_path / "mine"
    (project / STAMP).write_text("0.9.0\n")
    words = project / "storage" / "manifest.py"
    words.write_text(words.read_text() + "\nraise SystemExit('the copy in the project')\n")
    done = run(lkcache, "verify", "none.zarr", cwd=project / "presets")
    assert "the copy in the project" in done.stderr
    assert (
        f"{project} was laid out by lkcache 0.9.0, and {VERSION} is installed; the project's own "
        "stages, pipeline and storage run" in done.stderr
    )


def test_a_repository_is_its_own_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "tests")
    monkeypatch.setattr(sys, "path", [])
    activate()
    assert (sys.path, capsys.readouterr().err) == ([str(ROOT)], "")
    assert (find(ROOT), source()) == (ROOT, ROOT)


def test_a_bare_folder_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    activate()
    assert sys.path == [str(source())]
