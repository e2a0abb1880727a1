"""`lkcache repair CACHE`: drop a cache's bad parts, so that capture computes only them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from lkcache.words import counted
from pipeline.config import read_params
from storage.errors import CacheError, FingerprintMismatch, LkcacheError
from storage.manifest import Manifest
from storage.repair import Examined, Log, drop, examine, reopen
from storage.workspace import Workspace, file_digest, read_json

EXIT_DAMAGED = 1
STAGE = "capture"
TIMINGS = Path("timings") / f"{STAGE}.json"


def repair(
    cache: Annotated[Path, Argument(help="The damaged cache, such as cache/train.zarr.")],
    yes: Annotated[bool, Option("--yes", help="Do it; without, say what would be done.")] = False,
) -> int:
    """Find the bad parts of CACHE and prepare its project so that capture computes only them again.

    Sound parts of all caches of the same capture are linked back into .scratch, bad ones are
    removed; `dvc repro capture` then fills the gaps, to the same bytes. Without --yes nothing is
    changed. Where DVC's own cache or a remote holds the data, `dvc checkout --force` is quicker.
    """
    project = _project(cache)
    logs = _logs(project)
    console = Console()
    with console.status("reading every byte"):
        examined = [examine(path, logs.get(path.stem, ())) for path in _siblings(cache)]
    manifest = _sound_manifest(examined)
    _check_current(project, examined)
    _tell(console, examined, cache)
    if not any(found.bad for found in examined):
        return 0
    again = sum(len(found.bad_parts) + len(found.unrecorded) for found in examined)
    kept = sum(len(found.good) for found in examined)
    if not yes:
        console.print(
            Text(
                f"\n--yes would link {counted(kept, 'sound part')} back into .scratch and remove "
                f"what is bad; capture would then compute {counted(again, 'part')} again"
            )
        )
        return EXIT_DAMAGED
    outs = [found.path.resolve().relative_to(project.resolve()) for found in examined]
    fingerprint = manifest.source["capture"]
    with Workspace(STAGE, fingerprint, outs=outs, root=project) as workspace:
        for found, out in zip(examined, outs, strict=True):
            reopen(found, logs.get(found.path.stem, ()), workspace.path(out))
        workspace.forget()
        for found in examined:
            if found.bad:
                drop(found)
    console.print(
        Text(f"\n{kept} sound parts are back in .scratch; run dvc repro capture in {project}, ")
        + Text(f"which computes {counted(again, 'part')} again")
    )
    return 0


def _project(cache: Path) -> Path:
    """The folder whose stage wrote the cache; `CacheError` where the cache stands alone."""
    if cache.parts and cache.parts[0].endswith(":"):  # a URL, of which Path keeps one slash
        raise CacheError(
            found=f"{cache}, which lies in a store",
            expected="a folder of the project that captured it",
            todo="repair the cache there, or dvc checkout it, and push it again",
        )
    if not cache.is_dir():
        raise CacheError(
            found=f"no folder {cache}", expected="a cache, damaged or not", todo="correct the path"
        )
    for folder in cache.resolve().parents:
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise CacheError(
        found=f"{cache} lies in no project (no dvc.yaml and params.yaml above it)",
        expected="the project that captured it, whose target and sequences refill it",
        todo="fetch the cache again from where it came; lkcache verify says what is damaged",
    )


def _siblings(cache: Path) -> list[Path]:
    """All caches of the capture: they are published together, so they go back together."""
    folder = cache.resolve().parent
    return sorted(path for path in folder.glob("*.zarr") if path.is_dir())


def _logs(project: Path) -> dict[str, Log]:
    """What capture recorded of its parts, by split; empty where it recorded nothing."""
    try:
        recorded: dict[str, Log] = read_json(project / TIMINGS).get("parts", {})
    except LkcacheError:
        return {}
    return recorded


def _sound_manifest(examined: list[Examined]) -> Manifest:
    """One that names the capture; refuses where none is left, or where there are two captures."""
    named = {
        found.manifest.source.get("capture", ""): found
        for found in examined
        if found.manifest is not None
    }
    if not named:
        raise CacheError(
            found=f"no cache in {examined[0].path.parent} has a sound manifest",
            expected="at least one, which says what capture they come from",
            todo="run dvc repro -f capture, which computes everything again",
        )
    if len(named) > 1 or "" in named:
        paths = [str(found.path) for found in named.values()]
        told = " and ".join(
            f"{p} of {key[:12] or 'none'}" for p, key in zip(paths, named, strict=True)
        )
        raise FingerprintMismatch(
            found=f"caches of different captures side by side: {told}",
            expected="caches of one capture",
            todo="run dvc repro -f capture, or move the one that does not belong there",
        )
    manifest = next(iter(named.values())).manifest
    assert manifest is not None
    return manifest


def _check_current(project: Path, examined: list[Examined]) -> None:
    """Capture refills only a cache of the present parameters, target and sequences."""
    params = read_params(project / "params.yaml").get(STAGE, {})
    target = _or_nothing(project / "target" / "target.json").get("fingerprint")
    for found in examined:
        if found.manifest is None:
            continue
        stated = found.manifest.params
        sequences = project / "sequences" / f"{found.path.stem}.parquet"
        digest = file_digest(sequences) if sequences.is_file() else None
        pairs = [
            *((f"capture.{key}", stated.get(key), value) for key, value in params.items()),
            ("target", found.manifest.source.get("target"), target),
            ("sequences", found.manifest.source.get("sequences"), digest),
        ]
        for what, there, here in pairs:
            if there != here:
                raise FingerprintMismatch(
                    found=f"{found.path} was captured with {what} {there}",
                    expected=f"the project's own, {'which is missing' if here is None else here}",
                    todo="put it back (git, dvc pull) and repair, or run dvc repro, which captures "
                    "everything anew",
                )


def _or_nothing(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path)
    except LkcacheError:
        return {}


def _tell(console: Console, examined: list[Examined], cache: Path) -> None:
    for found in examined:
        total = len(found.good) + len(found.unrecorded) + len(found.bad_parts)
        if not found.bad:
            console.print(Text(f"{found.path.name}: all {total} parts are sound"))
        for name, problem in found.bad.items():
            console.print(Text(f"{found.path.name}: {name}: {problem}"), soft_wrap=True)
        if found.manifest is None and not (found.good or found.bad_parts):
            console.print(
                Text(
                    f"{found.path.name}: nothing says which of its parts are sound: all"
                    " would be computed again"
                )
            )
    lost = sum(len(found.unrecorded) for found in examined)
    if lost and any(found.bad for found in examined):
        console.print(
            Text(
                f"of {lost} sound parts {TIMINGS} does not say what capture counted there "
                "(an older capture?): they would be computed again too"
            )
        )
    if not any(found.bad for found in examined):
        console.print(Text(f"nothing to repair: every file of {cache} and its siblings matches"))
