"""Our pages as a browser shows them: no error, no request, no barrier; `make page-check` runs this.

Skipped where Node, Chromium or the packages of `package.json` are not there. `CHROMIUM` names a
browser, `PAGE_SHOTS` a folder for pictures and a printed PDF, `PAGES` more pages to look at.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lkcache.cache_page import build
from stages.report import main as report
from storage.reader import Cache
from tests.pipeline.synthetic import World, write_project
from tests.storage.samples import TOPK, make_records, write_cache

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = Path(os.environ.get("PAGE_MODULES", HERE / "node_modules"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WORLD = World(
    prompts=18,
    decoded=9,
    depth=5,
    drafts={"lm": ("lm", 3, ("kl", "tv", "lk_lambda")), "medusa": ("medusa", 1, ("kl", "tv"))},
)


def browser() -> str:
    """The Chromium to use; skips with the reason where something is missing."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if shutil.which("node") is None:
        pytest.skip("no node: install Node 20, then `make page-check`")
    if found is None:
        pytest.skip("no Chromium: install it or set CHROMIUM, then `make page-check`")
    if not all((MODULES / name).is_dir() for name in ("axe-core", "puppeteer-core")):
        pytest.skip("no axe-core and puppeteer-core: `make page-check` installs them")
    return found


def faults(*pages: Path) -> list[str]:
    """What `pages.mjs` has to say of the pages."""
    shots = os.environ.get("PAGE_SHOTS", "-")
    command = ["node", str(HERE / "pages.mjs"), browser(), str(MODULES), shots, *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.stdout, done.stderr
    return [f"{f['page']} {f['view']}: {f['fault']}" for f in json.loads(done.stdout)]


def test_the_report_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser()
    write_project(tmp_path, WORLD, resamples=300)
    monkeypatch.chdir(tmp_path)
    report()
    assert faults(tmp_path / "report/index.html") == []


def test_the_page_of_a_cache_has_no_fault(tmp_path: Path) -> None:
    browser()
    path = write_cache(tmp_path / "train.zarr", TOPK, make_records(TOPK, [30, 12, 60]))
    page = tmp_path / "cache.html"
    page.write_text(build(Cache.open(path), word=lambda k: f"w{k}"), encoding="utf-8")
    assert faults(page) == []


def test_the_pages_of_docs_and_those_named_have_no_fault() -> None:
    browser()
    named = [Path(name) for name in os.environ.get("PAGES", "").split()]
    pages = [*sorted((ROOT / "docs").rglob("*.html")), *named]
    assert pages
    assert faults(*pages) == []


def test_a_page_with_faults_is_found_out(tmp_path: Path) -> None:
    """The instrument itself: each of these would pass a check that looks at nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><html><head><title>bad</title><style>a:focus{outline:0}</style></head>"
        "<body><main><h1>bad</h1><p style='color:#bbb;background:#fff'>too faint to read</p>"
        "<img src='picture.png'><div style='width:3000px'>wide</div><a href='#x'>a link</a></main>"
        "<script>console.error('said'); throw new Error('thrown')</script></body></html>",
        encoding="utf-8",
    )
    found = "\n".join(faults(page))
    for view in ("desktop-light", "desktop-dark", "phone-light", "phone-dark"):
        assert f"bad.html {view}: console error: said" in found
    for fault in (
        "uncaught thrown",
        "request of file:",
        "axe image-alt",
        "axe color-contrast",
        "axe html-has-lang",
        "the page scrolls sideways by",
        "no visible focus on <a",
    ):
        assert fault in found, fault
