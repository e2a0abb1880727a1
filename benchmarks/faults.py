"""Damage a sealed cache in every way there is, open it, read it all: refused by name, or a failure.

`python -m benchmarks.faults [FAULTS]`, from the project's root; 1,000 by default, to `faults.md`.

A fault is *refused* when opening or reading raises an error for the user, *named* when that says
which shard (part), and which file, or which of the root's files. Whatever was handed out before
must equal the sound cache, else it counts as *wrong data*. Some faults are put in after the cache
was opened: then only reading can find them.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import LkcacheError
from storage.layout import Layout
from storage.manifest import GROUP, MANIFEST, MANIFEST_DIGEST, digest_line
from storage.reader import Cache
from storage.record import Record
from storage.workspace import digest
from tests.storage.samples import SOURCE, make_records, write_cache

FAULTS, SEED = 1_000, 0
# equal lengths: parts whose small arrays are of equal size, so that a swap changes no size
LENGTHS = [24] * 6
LAYOUT = Layout("topk", 64, 8, (1,), True)
EXTRA = {"tokenizer.json": b'{"a": 1}\n'}


@dataclass
class Ruin:
    """A cache to damage, another one to damage it with, and chance."""

    cache: Path
    other: Path
    rng: random.Random

    def files(self, *, root: bool = True) -> list[Path]:
        """All files, those of the root folder or not."""
        found = sorted(p for p in self.cache.rglob("*") if p.is_file())
        return [p for p in found if root or p.parent != self.cache]

    def parts(self) -> list[Path]:
        """The shards."""
        return sorted(self.cache.glob("part-*"))

    def file(self, *, root: bool = True, pattern: str = "*") -> Path:
        """One of the files."""
        return self.rng.choice([p for p in self.files(root=root) if p.match(pattern)])

    def name(self, path: Path) -> str:
        """The shard of a path, or the root's file."""
        return path.relative_to(self.cache).parts[0]


def put(path: Path, content: bytes) -> None:
    """Replace a file that is a link to the sound cache's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    return one.read_bytes() == other.read_bytes()


def flip(ruin: Ruin) -> set[str]:
    """A bit flips."""
    path = ruin.rng.choice([p for p in ruin.files() if p.stat().st_size])
    content = bytearray(path.read_bytes())
    content[ruin.rng.randrange(len(content))] ^= 1 << ruin.rng.randrange(8)
    put(path, bytes(content))
    return {ruin.name(path)}


def zeros(ruin: Ruin) -> set[str]:
    """A run of bytes reads as zeros, as of a block that was never written."""
    path = ruin.rng.choice([p for p in ruin.files() if any(p.read_bytes())])
    content = bytearray(path.read_bytes())
    at = ruin.rng.choice([i for i, byte in enumerate(content) if byte])
    stop = min(len(content), at + ruin.rng.randint(1, 4096))
    content[at:stop] = bytes(stop - at)
    put(path, bytes(content))
    return {ruin.name(path)}


def truncate(ruin: Ruin) -> set[str]:
    """A file ends early."""
    path = ruin.rng.choice([p for p in ruin.files() if p.stat().st_size])
    put(path, path.read_bytes()[: ruin.rng.randrange(path.stat().st_size)])
    return {ruin.name(path)}


def empty(ruin: Ruin) -> set[str]:
    """A file is empty."""
    path = ruin.rng.choice([p for p in ruin.files() if p.stat().st_size])
    put(path, b"")
    return {ruin.name(path)}


def lengthen(ruin: Ruin) -> set[str]:
    """A file goes on after its end."""
    path = ruin.file()
    put(path, path.read_bytes() + ruin.rng.randbytes(ruin.rng.randint(1, 64)))
    return {ruin.name(path)}


def lose_file(ruin: Ruin) -> set[str]:
    """A file is missing."""
    path = ruin.file()
    path.unlink()
    return {ruin.name(path)}


def lose_chunk(ruin: Ruin) -> set[str]:
    """A chunk is missing: zarr alone reads fill values."""
    path = ruin.file(root=False, pattern="c/*")
    path.unlink()
    return {ruin.name(path)}


def lose_shard(ruin: Ruin) -> set[str]:
    """A shard is missing."""
    part = ruin.rng.choice(ruin.parts())
    shutil.rmtree(part)
    return {part.name}


def lose_array(ruin: Ruin) -> set[str]:
    """An array is missing."""
    folder = ruin.file(root=False, pattern="*/zarr.json").parent
    shutil.rmtree(folder)
    return {ruin.name(folder)}


def swap_files(ruin: Ruin) -> set[str]:
    """Two files of equal size change places, where there are two."""
    path = ruin.file(root=False)
    others = [p for p in ruin.files(root=False) if not same(p, path)]
    equal = [p for p in others if p.stat().st_size == path.stat().st_size]
    other = ruin.rng.choice(equal or others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    put(path, theirs)
    put(other, mine)
    return {ruin.name(path), ruin.name(other)}


def swap_chunks(ruin: Ruin) -> set[str]:
    """The same array of two shards changes places."""
    while True:
        one = ruin.file(root=False, pattern="c/*")
        part = ruin.rng.choice(ruin.parts())
        other = part / one.relative_to(ruin.cache / ruin.name(one))
        if other.is_file() and not same(one, other):
            break
    mine, theirs = one.read_bytes(), other.read_bytes()
    put(one, theirs)
    put(other, mine)
    return {ruin.name(one), part.name}


def swap_shards(ruin: Ruin) -> set[str]:
    """Two shards change names."""
    one, other = ruin.rng.sample(ruin.parts(), 2)
    one.rename(ruin.cache / "x")
    other.rename(one)
    (ruin.cache / "x").rename(other)
    return {one.name, other.name}


def double_file(ruin: Ruin) -> set[str]:
    """A file lies over another one."""
    path = ruin.file(root=False)
    other = ruin.rng.choice([p for p in ruin.files(root=False) if not same(p, path)])
    put(other, path.read_bytes())
    return {ruin.name(other)}


def double_shard(ruin: Ruin) -> set[str]:
    """A shard lies over another one."""
    one, other = ruin.rng.sample(ruin.parts(), 2)
    shutil.rmtree(other)
    shutil.copytree(one, other, copy_function=os.link)
    return {other.name}


def add_shard(ruin: Ruin) -> set[str]:
    """A shard lies there a second time, under the next name."""
    added = ruin.cache / f"part-{len(ruin.parts()):05d}"
    shutil.copytree(ruin.rng.choice(ruin.parts()), added, copy_function=os.link)
    return {added.name}


def foreign_chunk(ruin: Ruin) -> set[str]:
    """A chunk is another cache's, of the same place."""
    while True:
        path = ruin.file(root=False, pattern="c/*")
        foreign = ruin.other / path.relative_to(ruin.cache)
        if foreign.is_file() and not same(path, foreign):
            break
    put(path, foreign.read_bytes())
    return {ruin.name(path)}


def foreign_shard(ruin: Ruin) -> set[str]:
    """A shard is another cache's, sound in itself."""
    part = ruin.rng.choice(ruin.parts())
    shutil.rmtree(part)
    shutil.copytree(ruin.other / part.name, part, copy_function=os.link)
    return {part.name}


def foreign_cache(ruin: Ruin) -> set[str]:
    """The whole cache is another one: of another fingerprint than what the reader expects."""
    shutil.rmtree(ruin.cache)
    shutil.copytree(ruin.other, ruin.cache, copy_function=os.link)
    return {"made from"}


def foreign_manifest(ruin: Ruin) -> set[str]:
    """The manifest and its digest are another cache's."""
    for name in (MANIFEST, MANIFEST_DIGEST):
        put(ruin.cache / name, (ruin.other / name).read_bytes())
    return {"made from"}


def edit(value: Any, rng: random.Random) -> Any:
    """The same JSON with one leaf changed."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return {**value, key: edit(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], edit(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}0" if isinstance(value, str) else 0


def edit_array(ruin: Ruin) -> set[str]:
    """An array's metadata is edited and is still JSON."""
    path = ruin.file(root=False, pattern="*/*/zarr.json")
    put(path, json.dumps(edit(json.loads(path.read_bytes()), ruin.rng)).encode())
    return {ruin.name(path)}


def edit_log(ruin: Ruin) -> set[str]:
    """A shard's commit log is edited and its own digest mended."""
    path = ruin.rng.choice(ruin.parts()) / GROUP
    value = json.loads(path.read_bytes())
    log = value["attributes"]["lkcache"]
    log.pop("sha256")
    log = edit(log, ruin.rng)
    value["attributes"]["lkcache"] = {**log, "sha256": digest(log)}
    put(path, json.dumps(value).encode())
    return {ruin.name(path)}


def edit_root(ruin: Ruin) -> set[str]:
    """The root group's metadata is edited."""
    path = ruin.cache / GROUP
    put(path, json.dumps(edit(json.loads(path.read_bytes()), ruin.rng)).encode())
    return {GROUP}


def edit_manifest(ruin: Ruin) -> set[str]:
    """The manifest is edited, its digest is not."""
    path = ruin.cache / MANIFEST
    put(path, json.dumps(edit(json.loads(path.read_bytes()), ruin.rng)).encode())
    return {MANIFEST}


def forge_file(ruin: Ruin) -> set[str]:
    """The manifest says another size or digest of a file, its own digest is mended."""
    value = json.loads((ruin.cache / MANIFEST).read_bytes())
    part = ruin.rng.choice(value["parts"])
    entry = part["files"][ruin.rng.choice(sorted(part["files"]))]
    if ruin.rng.random() < 0.5:
        entry[0] += 1
    else:
        entry[1] = hashlib.sha256(entry[1].encode()).hexdigest()
    _seal(ruin.cache, value)
    return {part["name"]}


def forge_shard(ruin: Ruin) -> set[str]:
    """The manifest lists one shard less, its own digest is mended."""
    value = json.loads((ruin.cache / MANIFEST).read_bytes())
    part = value["parts"].pop(ruin.rng.randrange(len(value["parts"])))
    _seal(ruin.cache, value)
    return {part["name"]}


def forge_version(ruin: Ruin) -> set[str]:
    """The manifest is of a newer format or of none, its own digest is mended."""
    value = json.loads((ruin.cache / MANIFEST).read_bytes())
    value |= {"version": 2} if ruin.rng.random() < 0.5 else {"layout": None}
    _seal(ruin.cache, value)
    return {MANIFEST}


def forge_source(ruin: Ruin) -> set[str]:
    """The manifest names another source, its own digest is mended; the reader knows its source."""
    value = json.loads((ruin.cache / MANIFEST).read_bytes())
    value["source"]["target"] = digest(value["source"]["target"])
    _seal(ruin.cache, value)
    return {"made from"}


def _seal(cache: Path, value: Any) -> None:
    content = json.dumps(value).encode()
    put(cache / MANIFEST, content)
    put(cache / MANIFEST_DIGEST, digest_line(content))


def fold_file(ruin: Ruin) -> set[str]:
    """A folder stands where a file was."""
    path = ruin.file()
    path.unlink()
    path.mkdir()
    return {ruin.name(path)}


def unsealed(ruin: Ruin) -> set[str]:
    """The manifest or its digest is missing."""
    path = ruin.cache / ruin.rng.choice([MANIFEST, MANIFEST_DIGEST])
    path.unlink()
    return {path.name}


BEFORE: list[Callable[[Ruin], set[str]]] = [
    flip, zeros, truncate, empty, lengthen, lose_file, lose_chunk, lose_array, lose_shard,
    swap_files, swap_chunks, swap_shards, double_file, double_shard, add_shard, foreign_chunk,
    foreign_shard, foreign_cache, foreign_manifest, edit_array, edit_log, edit_root, edit_manifest,
    forge_file, forge_shard, forge_version, forge_source, fold_file, unsealed,
]  # fmt: skip
# of these alone reading must know: the root's files and the logs are read when a cache is opened
AFTER = [lose_chunk, lose_array, swap_chunks, foreign_chunk, edit_array, double_shard]


@dataclass
class Tally:
    """What became of the faults of one kind."""

    faults: int = 0
    refused: int = 0
    named: int = 0
    wrong: int = 0


def equal(one: Record, other: Record) -> bool:
    """Whether every number of two records is the same."""
    names = [*Record.__dataclass_fields__]
    pairs = ((getattr(one, name), getattr(other, name)) for name in names)
    return all(a is b or np.array_equal(a, b, equal_nan=False) for a, b in pairs)


def campaign(faults: int, *, seed: int = SEED) -> dict[str, Tally]:
    """Every kind in turn until `faults` were made."""
    rng = random.Random(seed)  # noqa: S311  no secret
    kinds = [(kind, False) for kind in BEFORE] + [(kind, True) for kind in AFTER]
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        sound, other, path = (Path(folder) / f"{name}.zarr" for name in ("sound", "other", "ruin"))
        records = make_records(LAYOUT, LENGTHS)
        write_cache(sound, LAYOUT, records, part_tokens=48, extra_files=EXTRA)
        foreign = {**SOURCE, "target": "x" * 64}
        strange = make_records(LAYOUT, LENGTHS, seed=1)
        write_cache(other, LAYOUT, strange, part_tokens=48, source=foreign, extra_files=EXTRA)
        wanted = {record.id: record for record in Cache.open(sound).epoch(0)}
        assert len(wanted) == len(LENGTHS)
        for number in range(faults):
            kind, late = kinds[number % len(kinds)]
            said = f"{kind.__doc__}".strip().rstrip(".") + (" (after opening)" if late else "")
            tally = tallies.setdefault(said, Tally())
            shutil.copytree(sound, path, copy_function=os.link)
            ruin = Ruin(path, other, rng)
            names: set[str] = set()
            tally.faults += 1
            try:
                if not late:
                    names = kind(ruin)
                cache = Cache.open(path, expect=SOURCE)
                if late:
                    names = kind(ruin)
                for record in cache.epoch(number):
                    tally.wrong += not equal(record, wanted[record.id])
            except LkcacheError as error:
                tally.refused += 1
                tally.named += any(name in str(error) for name in names)
            shutil.rmtree(path)
    return tallies


def table(found: dict[str, Tally]) -> str:
    """The result, for people."""
    total = Tally(*(sum(getattr(t, k) for t in found.values()) for k in Tally.__annotations__))
    rows = [*found.items(), ("**all**", total)]
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults {total.faults}`: {total.faults} faults of {len(found)}",
        "kinds, each in a fresh copy of a sound cache of three shards, which is then opened with",
        "its source expected and read to its end. *Wrong data*: sequences handed out that differ",
        "from the sound ones.",
        "",
        "| fault | faults | refused | shard or file named | wrong data |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| {n} | {t.faults} | {t.refused} | {t.named} | {t.wrong} |" for n, t in rows),
        "",
        "Not tried, because nothing in the folder could show it: an edit of which every digest up",
        "to `manifest.sha256` was computed anew is malice, not damage (FORMAT, *Not checked*).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the campaign, print its table, keep it; 1 where a fault was not refused by name."""
    faults = int(sys.argv[1]) if len(sys.argv) > 1 else FAULTS
    found = campaign(faults)
    text = table(found)
    print(text)
    if faults >= FAULTS:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    return int(any(t.named < t.faults or t.wrong for t in found.values()))


if __name__ == "__main__":
    sys.exit(main())
