"""`lkcache verify CACHE`: re-hash every file and check the structure of every part."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from typer import Argument

from storage.manifest import read_manifest
from storage.verify import check_cache

EXIT_DAMAGED = 1


def verify(cache: Annotated[Path, Argument(help="A cache's folder.")]) -> int:
    """Print what is wrong with CACHE; exits with 1 where anything is."""
    manifest = read_manifest(cache)
    console = Console()
    with console.status("reading") as status:
        findings = check_cache(cache, progress=status.update)
    for finding in findings:
        console.print(Text(str(finding)), soft_wrap=True)
    if findings:
        return EXIT_DAMAGED
    counts = manifest.counts
    console.print(
        f"whole and sound: {len(manifest.parts)} parts, {counts['sequence']:,} sequences, "
        f"{counts['token']:,} tokens, {counts['entry']:,} entries; every digest matches"
    )
    return 0
