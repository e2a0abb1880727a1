"""A cache kept outside DVC's own copy: links and `cache: false`, and what still tells it apart."""

import shutil
from pathlib import Path

from lkcache.verify import verify
from tests.projects import run
from tests.storage.samples import TOPK, make_records, write_cache

STAGE = """
stages:
  capture:
    cmd: cp -r made cache
    deps: [made]
    outs:
      - cache/train.zarr{how}
"""


def captured(folder: Path, how: str = "", link: str = "copy") -> Path:
    """A project whose `capture` copies a made-up cache into place."""
    (folder / "made").mkdir(parents=True)
    write_cache(folder / "made" / "train.zarr", TOPK, make_records(TOPK, [20, 15]))
    (folder / "dvc.yaml").write_text(STAGE.format(how=how))
    (folder / ".dvc").mkdir()
    config = f"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    type = {link}\n"
    (folder / ".dvc" / "config").write_text(config)
    run("dvc", "repro", "-q", cwd=folder)
    return folder


def copies(folder: Path) -> list[Path]:
    objects = folder / ".dvc" / "cache" / "files"
    return [path for path in objects.rglob("*") if path.is_file() and path.suffix != ".dir"]


def test_a_cache_out_of_dvcs_copy_keeps_its_identity(tmp_path: Path) -> None:
    project = captured(tmp_path / "a", how=": {cache: false}")
    assert copies(project) == []
    shutil.rmtree(project / "cache")
    assert "deleted" in run("dvc", "status", cwd=project)
    shutil.copytree(project / "made", project / "cache")  # moved by any means
    assert "up to date" in run("dvc", "status", cwd=project)
    assert verify(project / "cache" / "train.zarr") == 0
    damaged = project / "cache" / "train.zarr" / "part-00000" / "tokens" / "c" / "0"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "modified" in run("dvc", "status", cwd=project)
    assert verify(project / "cache" / "train.zarr") == 1


def test_a_linked_cache_is_read_as_any_other(tmp_path: Path) -> None:
    project = captured(tmp_path / "a", link="symlink")
    assert (project / "cache" / "train.zarr" / "part-00000" / "tokens" / "c" / "0").is_symlink()
    assert copies(project)
    assert verify(project / "cache" / "train.zarr") == 0
