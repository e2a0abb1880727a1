"""A cache kept outside DVC's own copy, or pushed and pulled, and what still tells it apart."""

import hashlib
import os
import shutil
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.stores import BUCKET, CREDENTIALS, s3_store, ssh_host
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


def pulled(project: Path, clone: Path, *, ok: bool = True) -> str:
    """What a fresh clone's `dvc pull` says; the clone holds what git and the stage's deps bring."""
    (clone / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", "dvc.lock", ".dvc/config"):
        shutil.copyfile(project / name, clone / name)
    shutil.copytree(project / "made", clone / "made")
    return run("dvc", "pull", "capture", cwd=clone, ok=ok)


def assert_arrived(project: Path, clone: Path) -> None:
    here, there = (folder / "cache" / "train.zarr" for folder in (project, clone))
    assert (there / "manifest.json").read_bytes() == (here / "manifest.json").read_bytes()
    assert "up to date" in run("dvc", "status", cwd=clone)
    assert verify(there) == 0


@pytest.mark.parametrize("kind", ["s3", "ssh"])
def test_a_fresh_clone_pulls_what_was_pushed(kind: str, tmp_path: Path) -> None:
    if find_spec(f"dvc_{kind}") is None:
        pytest.skip("needs the extra `remotes`")
    project = captured(tmp_path / "a")
    with ExitStack() as stack:
        if kind == "s3":
            server = stack.enter_context(s3_store(tmp_path / "store"))
            stack.enter_context(patch.dict(os.environ, CREDENTIALS))
            url, option = f"s3://{BUCKET}/lkcache", ("endpointurl", server.url)
        else:
            # its host key is in nobody's known_hosts: DVC does not look, as the page says
            server = stack.enter_context(ssh_host(tmp_path / "host"))
            url, option = f"{server.url}{tmp_path}/host/dvc", ("keyfile", str(server.keyfile))
        run("dvc", "remote", "add", "-d", "store", url, cwd=project)
        run("dvc", "remote", "modify", "store", *option, cwd=project)
        run("dvc", "push", "capture", cwd=project)
        pulled(project, tmp_path / "b")
        assert "in sync" in run("dvc", "status", "-c", cwd=tmp_path / "b")
    assert_arrived(project, tmp_path / "b")


def test_damage_in_a_remote_is_seen_by_us_and_by_dvc_only_where_it_is_told(tmp_path: Path) -> None:
    project = captured(tmp_path / "a")
    run("dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"), cwd=project)
    run("dvc", "push", "capture", cwd=project)
    array = project / "cache" / "train.zarr" / "part-00000" / "tokens" / "c" / "0"
    content = bytearray(array.read_bytes())
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    victim = tmp_path / "remote" / "files" / "md5" / md5[:2] / md5[2:]
    content[len(content) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)
    pulled(project, tmp_path / "b")
    assert "up to date" in run("dvc", "status", cwd=tmp_path / "b")
    assert verify(tmp_path / "b" / "cache" / "train.zarr") == 1
    run("dvc", "remote", "modify", "store", "verify", "true", cwd=project)
    assert "failed to pull" in pulled(project, tmp_path / "c", ok=False)


def test_a_file_gone_from_a_remote_is_pushed_once_its_listing_is_gone(tmp_path: Path) -> None:
    project, remote = captured(tmp_path / "a"), tmp_path / "remote"
    run("dvc", "remote", "add", "-d", "store", str(remote), cwd=project)
    run("dvc", "push", "capture", cwd=project)
    (listing,) = remote.rglob("*.dir")
    lost = next(p for p in remote.rglob("*") if p.is_file() and p != listing)
    lost.unlink()
    assert "up to date" in run("dvc", "push", "capture", cwd=project)  # it looks at the listing
    assert not lost.exists()
    listing.unlink()
    assert "2 files pushed" in run("dvc", "push", "capture", cwd=project)
    assert lost.exists()
