"""The site's hook: pages that live elsewhere in the repository join it, and links to them follow.

MATHS, NOTATION, FORMAT, the benchmarks and their pictures are read where they stand; a link from a
page of the site to one of them (`../MATHS.md`) becomes a link inside the site. One to any other
file of the repository keeps its text only; one to no file at all stays, and mkdocs warns.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "MATHS.md",
    "NOTATION.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "storage/FORMAT.md",
    *(
        str(path.relative_to(ROOT))
        for kind in ("md", "svg")
        for path in sorted((ROOT / "benchmarks").glob(f"*.{kind}"))
    ),
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside `docs/`, under their own paths."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site, code blocks apart."""
    source = page.file.src_uri
    home = ROOT if source in OUTSIDE else ROOT / "docs"
    here = (home / source).parent

    def follow(link: re.Match[str]) -> str:
        picture, text, target, anchor = (group or "" for group in link.groups())
        path = Path(os.path.normpath(here / target))
        place = site_path(path)
        if place is None:
            return text if path.exists() and not picture else link.group()
        relative = os.path.relpath(place, Path(source).parent)
        return f"{picture}[{text}]({relative}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(follow, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, LINK.sub(follow, markdown[end:])])


def site_path(path: Path) -> str | None:
    """Where a file of the repository stands in the site; README's place is the first page's."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return name if name in OUTSIDE else None
