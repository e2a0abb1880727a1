"""A cache in a store (`s3://…`, any URL of fsspec): a local folder that fills as it is read.

    mirror = open_mirror("s3://bucket/key/train.zarr", expect={}, limit_bytes=MIRROR_BYTES)
    mirror.bring({"part-00000/tokens/c/0": entry})    # now it is mirror.folder / that name

A store promises less than a disk, and the guarantees are the same: opening reads the manifest and
its digest, lists the store once, and refuses a file that is missing, of another size, or of a part
that the manifest does not know. A file is fetched whole the first time it is needed and its sha256
compared before anything is decoded from it; what came then lies in a temporary folder (`TMPDIR`
says where) until `limit_bytes` are held, so that a second epoch of a cache that fits costs no
traffic. A window, or a few sequences of a part, take of large files the chunks that they need
(`range`): each answers to its crc32c, and the file's sha256 waits until it is read whole.

How a store is reached (endpoint, key, profile) is fsspec's and the store's own configuration:
`AWS_*` and `FSSPEC_S3_*` in the environment. Knows nothing of arrays.
"""

import re
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storage.errors import CacheError, MissingManifest
from storage.manifest import (
    GROUP,
    MANIFEST,
    MANIFEST_DIGEST,
    FileEntry,
    Manifest,
    check_source,
    corrupt,
    parse_manifest,
)

MIRROR_BYTES = 8 << 30
"""Of local disk for a remote cache's files; the least recently used are given up first."""
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
Result = TypeVar("Result")


class Mirror:
    """The files of one remote cache that are on this disk, each as the manifest lists it."""

    def __init__(self, url: str, *, limit_bytes: int) -> None:
        """Use `open_mirror`, which checks the whole store first."""
        self.url = url.rstrip("/")
        self.folder = Path(tempfile.mkdtemp(prefix="lkcache-"))
        # removed with this object, or when the interpreter ends
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.manifest: Manifest
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[str, int] = OrderedDict()
        self._held_bytes = 0
        self._fs, self._root = _connect(self.url)

    def fetch(self, name: str) -> bytes:
        """A small file's bytes; `FileNotFoundError` where there is none."""
        return self._ask(name, lambda: bytes(self._fs.cat_file(f"{self._root}/{name}")))

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of everything below the cache."""
        self._fs.invalidate_cache(self._root)  # a listing of an earlier opening says nothing
        found = self._ask("", lambda: self._fs.find(self._root, detail=True))
        skip = len(self._root.strip("/")) + 1
        return {path.strip("/")[skip:]: int(info["size"]) for path, info in found.items()}

    def bring(self, files: Mapping[str, FileEntry]) -> None:
        """Have the files on this disk, fetched and their digests compared where they were not yet.

        Those asked for together stay together, however large. `CorruptPart` where one is not what
        was written, or the store has lost it.
        """
        absent = {}
        for name, stated in files.items():
            if name in self._held and (self.folder / name).is_file():
                self._held.move_to_end(name)
            else:
                absent[name] = stated
        self._fetch_files(absent)
        for name, stated in absent.items():
            if problem := stated.problem(self.folder / name, digest=True):
                (self.folder / name).unlink(missing_ok=True)
                raise corrupt(self.url, name, problem)
            self._held_bytes += stated.num_bytes - self._held.pop(name, 0)
            self._held[name] = stated.num_bytes
        while self._held_bytes > self._limit_bytes and len(self._held) > len(files):
            oldest, size = self._held.popitem(last=False)
            (self.folder / oldest).unlink(missing_ok=True)
            self._held_bytes -= size

    def range(self, name: str, num_bytes: int, start: int, length: int) -> bytes:
        """A stretch of a file of `num_bytes`; a negative start counts from its end. Not kept."""
        start = max(0, num_bytes + start) if start < 0 else start
        stop = min(num_bytes, start + length)
        try:
            return self._ask(
                name,
                lambda: bytes(self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop)),
            )
        except FileNotFoundError:
            raise corrupt(self.url, name, "is missing") from None

    def holds(self, name: str) -> bool:
        """Whether a file is on this disk."""
        return name in self._held

    def _fetch_files(self, names: Collection[str]) -> None:
        """All at once where there are several, which a store answers side by side."""
        places = {f"{self._root}/{name}": str(self.folder / name) for name in names}
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        if len(places) > 1:
            try:
                self._ask("", lambda: self._fs.get(list(places), list(places.values())))
            except FileNotFoundError:
                pass  # one by one, so that it can be named
            else:
                return
        for name, (there, here) in zip(names, places.items(), strict=True):
            try:
                self._ask(name, partial(self._fs.get_file, there, here))
            except FileNotFoundError:
                raise corrupt(self.url, name, "is missing") from None

    def _ask(self, name: str, request: Callable[[], Result]) -> Result:
        """What the store answers; its refusals as sentences, a missing file as itself."""
        where = f"{self.url}/{name}".rstrip("/")
        try:
            return request()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise CacheError(
                found=f"no access to {where} ({_said(error)})",
                expected="a store that these credentials may list and read",
                todo="correct the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), or ask the "
                "bucket's owner for s3:ListBucket and s3:GetObject",
            ) from None
        # connection, timeout, credentials that are not there: each library has kinds of its own
        except Exception as error:
            raise CacheError(
                found=f"{where} cannot be read ({type(error).__name__}: {_said(error)})",
                expected="a store that answers",
                todo="check the address, the network and the credentials (AWS_ENDPOINT_URL, "
                "AWS_PROFILE, …), then try again",
            ) from None


def is_url(path: Path | str) -> bool:
    """Whether it names a store; a path of the disk has no `scheme://`."""
    return isinstance(path, str) and URL.match(path) is not None


def open_mirror(url: str, *, expect: Mapping[str, str], limit_bytes: int) -> Mirror:
    """Check a remote cache as `Cache.open` checks a local one, without reading its arrays.

    `MissingManifest`, `NewerFormat`, `FingerprintMismatch`, `CorruptPart`, or `CacheError` where
    the store cannot be reached or read.
    """
    mirror = Mirror(url, limit_bytes=limit_bytes)
    mirror.manifest = _manifest(mirror)
    check_source(mirror.url, mirror.manifest.source, expect)
    _check_listing(mirror)
    mirror.bring(mirror.manifest.files)
    return mirror


def remote_manifest(url: str) -> Manifest:
    """The manifest of a cache in a store, its digest compared; errors as of `open_mirror`."""
    return _manifest(Mirror(url, limit_bytes=0))


def _manifest(mirror: Mirror) -> Manifest:
    """Fetch it, with its digest, into the local folder."""
    try:
        content, stated = mirror.fetch(MANIFEST), mirror.fetch(MANIFEST_DIGEST)
    except FileNotFoundError as error:
        raise MissingManifest(
            found=f"{mirror.url} holds no {MANIFEST} with its digest ({_said(error)})",
            expected="a finished cache, whose manifest is written last",
            todo="correct the bucket and key, or push the whole cache again",
        ) from None
    (mirror.folder / MANIFEST).write_bytes(content)
    (mirror.folder / MANIFEST_DIGEST).write_bytes(stated)
    return parse_manifest(content, stated, f"{mirror.url}/{MANIFEST}")


def _check_listing(mirror: Mirror) -> None:
    """Exactly the parts of the manifest, every file with its size, from one listing."""
    found = mirror.sizes()
    stated = dict(mirror.manifest.files)
    for part in mirror.manifest.parts:
        stated |= {f"{part.name}/{name}": entry for name, entry in part.files.items()}
    listed = {part.name for part in mirror.manifest.parts}
    there = {name.split("/")[0] for name in found if name.startswith("part-")}
    for extra in sorted(there - listed):
        raise corrupt(mirror.url, extra, "is not in the manifest")
    for gone in sorted(listed - there):
        raise corrupt(mirror.url, gone, "is missing")
    for name, entry in stated.items():
        if name not in found:
            raise corrupt(mirror.url, name, "is missing")
        if found[name] != entry.num_bytes:
            problem = f"has {found[name]} bytes, the manifest says {entry.num_bytes}"
            raise corrupt(mirror.url, name, problem)
    # the log of a part is small; arrays are hashed when they are read
    mirror.bring({f"{p.name}/{GROUP}": p.files[GROUP] for p in mirror.manifest.parts})


def _connect(url: str) -> tuple[Any, str]:
    """The filesystem that speaks a URL's scheme, and the cache's path in it."""
    scheme = url.split("://", maxsplit=1)[0]
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as error:
        extra = "lkcache[s3]" if scheme in ("s3", "s3a") else f"the package that speaks {scheme}"
        raise CacheError(
            found=f"{url} needs a package that is not installed ({_said(error)})",
            expected="fsspec and the package of the store",
            todo=f"pip install {extra}",
        ) from None
    except ValueError as error:
        raise CacheError(
            found=f"{url} cannot be opened ({_said(error)})",
            expected="a URL that fsspec knows: s3://bucket/key, gs://…, https://…",
            todo="correct the URL, or give a folder",
        ) from None
    return fs, root.rstrip("/")


def _said(error: BaseException) -> str:
    """An error's own words in one line."""
    return " ".join(str(error).split()) or type(error).__name__
