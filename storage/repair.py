"""Which parts of a cache are bad, and how the good ones go back to scratch for a refill.

    found = examine(path, log)       # reads every byte, changes nothing
    reopen(found, log, place)        # good parts into the scratch folder of their fingerprint
    drop(found)                      # what is bad goes

A part is good where its files are those that the manifest lists; where the manifest is gone or
damaged, where its commit log verifies and has the digest that capture recorded of it elsewhere
(the `parts` of `timings/capture.json`). Its structure is not questioned: a part that was captured
wrong is captured wrong again. Good parts are linked, not moved: what is in place stays until its
successor is published. Knows names and digests, no stage.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import CacheError
from storage.manifest import (
    ATTRIBUTE,
    GROUP,
    MANIFEST,
    MANIFEST_DIGEST,
    Manifest,
    PartEntry,
    read_manifest,
)
from storage.workspace import file_digest, file_names, remove, sync, write_json
from storage.writer import part_name, stats_path

Log = Sequence[Mapping[str, Any]]
"""What capture recorded of each part, in order: `log`, its `zarr.json`'s digest, and its counts."""


@dataclass
class Examined:
    """One cache: which parts are good, and what is wrong with the rest."""

    path: Path
    manifest: Manifest | None
    """None where it is missing or damaged."""
    good: dict[str, list[str]] = field(default_factory=dict)
    """Sound parts, with the names of their files."""
    unrecorded: list[str] = field(default_factory=list)
    """Sound parts whose counts capture did not record: they are captured again."""
    bad_parts: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Part, file of the root or stray file -> what is wrong with it."""


def examine(path: Path, log: Log) -> Examined:
    """Re-hash every file of a cache; `log` decides where the manifest cannot."""
    try:
        manifest = read_manifest(path)
    except CacheError as error:
        return _by_log(path, log, str(error.found))
    found = Examined(path, manifest)
    listed = {MANIFEST, MANIFEST_DIGEST, *manifest.files}
    for number, part in enumerate(manifest.parts):
        listed |= {f"{part.name}/{name}" for name in part.files}
        recorded = log[number]["log"] if number < len(log) else ""
        if problem := _part_problem(path / part.name, part):
            found.bad[part.name] = problem
            found.bad_parts.append(part.name)
        elif recorded == part.files[GROUP].sha256:
            found.good[part.name] = sorted(part.files)
        else:
            found.unrecorded.append(part.name)
    for name, entry in manifest.files.items():
        if problem := entry.problem(path / name, digest=True):
            found.bad[name] = problem
    for name in sorted(set(file_names(path)) - listed):
        if name.split("/", 1)[0] not in found.bad:  # a bad part goes whole
            found.bad[name] = "is not in the manifest"
    return found


def _part_problem(folder: Path, part: PartEntry) -> str:
    """The first file that is not as listed."""
    if not folder.is_dir():
        return "is missing"
    for name, entry in part.files.items():
        if problem := entry.problem(folder / name, digest=True):
            return f"{name} {problem}"
    return ""


def _by_log(path: Path, log: Log, problem: str) -> Examined:
    """Without a manifest a part is good where it is byte for byte what capture recorded."""
    found = Examined(path, None, bad={MANIFEST: problem})
    for number, recorded in enumerate(log):
        name = part_name(number)
        try:
            content = (path / name / GROUP).read_bytes()
            if file_digest(path / name / GROUP) != recorded["log"]:
                raise ValueError("its commit log is not the one that capture recorded")
            entry = PartEntry.from_dict(json.loads(content)["attributes"][ATTRIBUTE])
            said = _part_problem(path / name, entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"cannot be trusted ({error})"
        if said:
            found.bad[name] = said
            found.bad_parts.append(name)
        else:
            found.good[name] = [GROUP, *sorted(entry.files)]
    return found


def reopen(found: Examined, log: Log, place: Path) -> None:
    """Link the good parts into `place`, the cache's folder in scratch, with what is known of them.

    Copies where links fail. Safe to repeat after a kill.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name, files in found.good.items():
        remove(place / name)
        partial = place / f".{name}.{os.getpid()}.partial"
        remove(partial)
        for file in files:
            target = partial / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(found.path / name / file, target)
        sync(partial)
        index = int(name.removeprefix("part-"))
        counts = {key: value for key, value in log[index].items() if key != "log"}
        write_json(stats_path(place, index), counts)  # before the part, as capture does
        partial.rename(place / name)
    sync(place)


def drop(found: Examined) -> None:
    """Remove what is bad, and the manifest: whoever compares the folder sees that it changed.

    DVC may not: it trusts a file of unchanged size and time.
    """
    for name in [*found.bad, MANIFEST]:
        remove(found.path / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another filesystem, or one without hard links
        shutil.copyfile(source, target)
