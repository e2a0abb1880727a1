"""`lkcache verify CACHE`: re-hash every file and check the structure of every part."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from typer import Argument

from lkcache.words import counted
from storage.manifest import read_manifest
from storage.remote import is_url, remote_manifest
from storage.verify import check_cache

EXIT_DAMAGED = 1


def verify(
    cache: Annotated[str, Argument(help="Its folder, or a URL: s3://bucket/key/train.zarr.")],
) -> int:
    """Print what is wrong with CACHE; exits with 1 where anything is.

    Of a cache in a store every file is fetched once.
    """
    manifest = remote_manifest(cache) if is_url(cache) else read_manifest(Path(cache))
    console = Console()
    with console.status("reading") as status:
        findings = check_cache(cache, progress=status.update)
    for finding in findings:
        console.print(Text(str(finding)), soft_wrap=True)
    if findings:
        return EXIT_DAMAGED
    counts = manifest.counts
    console.print(
        f"whole and sound: {counted(len(manifest.parts), 'part')}, "
        f"{counted(counts['sequence'], 'sequence')}, {counted(counts['token'], 'token')}, "
        f"{counts['entry']:,} kept ids; every digest matches"
    )
    return 0
