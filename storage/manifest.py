"""What a cache says of itself: identity, layout, counts, coverage, and a digest of every file.

`manifest.json` is written last and `manifest.sha256` beside it holds its digest, so a cache with a
manifest is complete and one whose manifest was edited is refused. A part's commit log is an
attribute of its own zarr group (`part-00000/zarr.json`), written after its arrays.

`source` (who made it from what) and `params` are kept for others and never interpreted here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import CorruptPart, FingerprintMismatch, MissingManifest, NewerFormat
from storage.layout import VERSION, Layout
from storage.workspace import file_digest, file_names

FORMAT = "lkcache"
GROUP = "zarr.json"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
ATTRIBUTE = "lkcache"
"""The attribute of root and part groups that holds what this project says."""
REFILL = "remove the cache and run dvc repro, or fetch it again from where it came"


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of a file."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        """Measure a file on the disk."""
        return cls(path.stat().st_size, file_digest(path))

    def problem(self, path: Path, *, digest: bool) -> str:
        """How the file differs: missing, another size, another content; empty where it does not."""
        if not path.is_file():
            return "is missing"
        found = path.stat().st_size
        if found != self.num_bytes:
            return f"has {found} bytes, the manifest says {self.num_bytes}"
        if digest and (other := file_digest(path)) != self.sha256:
            return f"has sha256 {other[:12]}…, the manifest says {self.sha256[:12]}…"
        return ""

    def as_list(self) -> list[int | str]:
        """JSON form: [bytes, sha256]."""
        return [self.num_bytes, self.sha256]


@dataclass(frozen=True)
class PartEntry:
    """A committed part: what it holds and the digest of each of its files."""

    name: str
    counts: Mapping[str, int]
    """Lengths of the ragged dims: token, entry, sample, row, sequence."""
    coverage: Mapping[str, Any]
    """Sums over supervised rows: kept, tail_mass, tail_kept; and counts by domain."""
    files: Mapping[str, FileEntry]
    """Names relative to the part; `zarr.json` of the part's group included."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "counts": dict(self.counts),
            "coverage": dict(self.coverage),
            "files": {name: entry.as_list() for name, entry in sorted(self.files.items())},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "PartEntry":
        """The entry of a manifest or commit log."""
        files = {name: FileEntry(*entry) for name, entry in value["files"].items()}
        return cls(value["name"], value["counts"], value["coverage"], files)

    def array_files(self, array: str) -> dict[str, FileEntry]:
        """Files of one array."""
        return {n: entry for n, entry in self.files.items() if n.startswith(f"{array}/")}


@dataclass(frozen=True)
class Manifest:
    """The whole cache's description."""

    layout: Layout
    source: Mapping[str, str]
    params: Mapping[str, Any]
    parts: tuple[PartEntry, ...]
    files: Mapping[str, FileEntry]
    """Files of the root but the manifest and its digest: `zarr.json`, `tokenizer.json`, …"""

    @property
    def counts(self) -> dict[str, int]:
        """Lengths of the ragged dims over all parts."""
        dims = ("sequence", "token", "row", "entry", "sample")
        return {dim: sum(part.counts[dim] for part in self.parts) for dim in dims}

    @property
    def array_bytes(self) -> dict[str, int]:
        """Stored bytes of each array over all parts, zarr metadata included."""
        return {
            array.name: sum(
                entry.num_bytes
                for part in self.parts
                for entry in part.array_files(array.name).values()
            )
            for array in self.layout.arrays()
        }

    @property
    def coverage(self) -> dict[str, Any]:
        """Means over supervised rows, and counts by domain."""
        rows = max(1, self.counts["row"])
        sums = {
            key: sum(part.coverage[key] for part in self.parts)
            for key in ("kept", "tail_mass", "bucket_mass", "tail_kept")
        }
        domains: dict[str, dict[str, int]] = {}
        for part in self.parts:
            for name, counts in part.coverage["domains"].items():
                known = domains.setdefault(name, dict.fromkeys(counts, 0))
                for key, count in counts.items():
                    known[key] += count
        return {
            "mean_kept": sums["kept"] / rows,
            "mean_tail_mass": sums["tail_mass"] / rows,
            "mean_unsampled_tail_mass": sums["bucket_mass"] / rows,
            "mean_tail_samples": sums["tail_kept"] / rows,
            "domains": domains,
        }

    def encode(self) -> bytes:
        """The bytes of `manifest.json`: sorted keys, indent 1, no clock, host or path."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "layout": self.layout.as_dict(),
            "source": dict(self.source),
            "params": dict(self.params),
            "counts": self.counts,
            "coverage": self.coverage,
            "bytes": self.array_bytes,
            "files": {name: entry.as_list() for name, entry in self.files.items()},
            "parts": [part.as_dict() for part in self.parts],
        }
        text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
        return (text + "\n").encode("utf-8")


def digest_line(manifest: bytes) -> bytes:
    """The content of `manifest.sha256`, as `sha256sum -c` reads it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode("ascii")


def read_manifest(cache: Path) -> Manifest:
    """Read and check manifest, format version and the manifest's own digest.

    `MissingManifest`, `NewerFormat`, or `CorruptPart` naming `manifest.json`.
    """
    path = cache / MANIFEST
    try:
        content = path.read_bytes()
        stated = (cache / MANIFEST_DIGEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingManifest(
            found=f"{error.filename} does not exist" if cache.is_dir() else f"no folder {cache}",
            expected="a finished cache, whose manifest is written last",
            todo="run dvc repro, so that capture finishes it, or correct the path",
        ) from None
    return parse_manifest(content, stated, path)


def parse_manifest(content: bytes, stated: bytes, where: Path | str) -> Manifest:
    """The manifest of the bytes of `manifest.json` and `manifest.sha256`; `where` names the former.

    `CorruptPart` where they contradict each other or are none, `NewerFormat`.
    """
    if stated != digest_line(content):
        raise CorruptPart(
            found=f"{where} has sha256 {digest_line(content)[:12].decode()}…",
            expected=f"what {MANIFEST_DIGEST} says, {stated[:12].decode('ascii', 'replace')}…",
            todo=REFILL,
        )
    return _parse(content, where)


def _parse(content: bytes, path: Path | str) -> Manifest:
    try:
        value = json.loads(content)
        version = value["version"]
        if value["format"] != FORMAT or type(version) is not int or version < 1:
            raise ValueError(f"format {value['format']!r}, version {version!r}")
        if version > VERSION:
            raise NewerFormat(
                found=f"{path} is of format version {version}",
                expected=f"version {VERSION} or older",
                todo="update lkcache",
            )
        return Manifest(
            layout=Layout.from_dict(value["layout"]),
            source=value["source"],
            params=value["params"],
            parts=tuple(PartEntry.from_dict(part) for part in value["parts"]),
            files={name: FileEntry(*entry) for name, entry in value["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptPart(
            found=f"{path} cannot be read ({type(error).__name__}: {error})",
            expected=f"a manifest of {FORMAT} version {VERSION} (storage/FORMAT.md)",
            todo=REFILL,
        ) from None


def check_files(cache: Path, manifest: Manifest) -> None:
    """The cheap checks of opening: exactly the parts listed, every file with its size.

    `CorruptPart` names the part and file. Digests of the parts' files are checked as they are read.
    """
    listed = {part.name for part in manifest.parts}
    for extra in sorted(p.name for p in cache.glob("part-*") if p.name not in listed):
        raise corrupt(cache, extra, "is not in the manifest")
    for name, entry in manifest.files.items():
        if problem := entry.problem(cache / name, digest=True):
            raise corrupt(cache, name, problem)
    for part in manifest.parts:
        if not (cache / part.name).is_dir():
            raise corrupt(cache, part.name, "is missing")
        for name, entry in part.files.items():
            # the log of a part is small; the arrays are hashed as they are read
            if problem := entry.problem(cache / part.name / name, digest=name == GROUP):
                raise corrupt(cache, f"{part.name}/{name}", problem)


def check_source(path: Path | str, source: Mapping[str, str], expect: Mapping[str, str]) -> None:
    """`FingerprintMismatch` naming both sides where a source differs from what is expected."""
    for key, wanted in expect.items():
        found = source.get(key)
        if found != wanted:
            raise FingerprintMismatch(
                found=f"{path} was made from {key} {found or '(not stated)'}",
                expected=f"{key} {wanted}",
                todo="run dvc repro, so that both come from the same sources",
            )


def corrupt(cache: Path | str, where: str, problem: str) -> CorruptPart:
    """The error for a damaged part or file of a cache."""
    return CorruptPart(
        found=f"{cache}: {where} {problem}",
        expected="every file as the cache's manifest lists it",
        todo=REFILL,
    )


def file_entries(folder: Path, *, without: Sequence[str] = ()) -> dict[str, FileEntry]:
    """Measure all files below a folder."""
    return {n: FileEntry.of(folder / n) for n in file_names(folder) if n not in without}
