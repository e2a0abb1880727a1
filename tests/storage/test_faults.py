"""Damage of every kind must be refused by name; none may come back as data."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.errors import CorruptPart, LkcacheError, MissingManifest
from storage.layout import Layout
from storage.reader import Cache
from storage.verify import check_cache
from tests.storage.samples import make_records, write_cache

# equal lengths: parts with files of equal size, so that a swap changes no size
LENGTHS = [24] * 2
LAYOUT = Layout("topk", 64, 8, (1,), False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "sound.zarr"
    return write_cache(path, LAYOUT, make_records(LAYOUT, LENGTHS), part_tokens=30)


def put(path: Path, content: bytes) -> None:
    """Replace a file that may be a link to the sound cache's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    put(path, bytes(content))


def truncate(path: Path, rng: np.random.Generator) -> None:
    put(path, path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def lose(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def swap(path: Path, rng: np.random.Generator) -> None:
    """Exchange with another file of other content, of the same size where there is one."""
    root = next(p for p in path.parents if p.name.endswith(".zarr"))
    others = [p for p in sorted(root.rglob("*")) if p.is_file() and not same(p, path)]
    equal = [p for p in others if p.stat().st_size == path.stat().st_size]
    other = (equal or others)[int(rng.integers(len(equal or others)))]
    mine, theirs = path.read_bytes(), other.read_bytes()
    put(path, theirs)
    put(other, mine)


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def duplicate_part(path: Path, rng: np.random.Generator) -> None:
    root = next(p for p in path.parents if p.name.endswith(".zarr"))
    shutil.copytree(root / "part-00000", root / "part-00002")


def exchange_parts(path: Path, rng: np.random.Generator) -> None:
    root = next(p for p in path.parents if p.name.endswith(".zarr"))
    (root / "part-00000").rename(root / "x")
    (root / "part-00001").rename(root / "part-00000")
    (root / "x").rename(root / "part-00001")


KINDS: list[Callable[[Path, np.random.Generator], None]] = [
    flip, flip, flip, truncate, lose, swap, swap, duplicate_part, exchange_parts,
]  # fmt: skip


def test_a_hundred_random_faults_are_refused_by_name(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = sorted(p.relative_to(sound) for p in sound.rglob("*") if p.is_file())
    path = tmp_path / "c.zarr"
    for _ in range(100):
        shutil.copytree(sound, path, copy_function=os.link)
        target = files[int(rng.integers(len(files)))]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        kind(path / target, rng)
        with pytest.raises((CorruptPart, MissingManifest)) as caught:
            list(Cache.open(path).epoch(0))
        assert re.search(r"part-\d{5}|manifest|zarr\.json", str(caught.value)), (kind, target)
        shutil.rmtree(path)


def test_every_fault_is_found_by_verify_too(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    files = sorted(p.relative_to(sound) for p in sound.rglob("*") if p.is_file())
    for number, kind in enumerate(KINDS):
        path = tmp_path / f"{number}.zarr"
        shutil.copytree(sound, path, copy_function=os.link)
        kind(path / files[int(rng.integers(len(files)))], rng)
        assert check_cache(path), kind


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose, r"part-00001/topk_ids/c/0 is missing"),
        (truncate, r"part-00001/topk_ids/c/0 has \d+ bytes, the manifest says \d+"),
        (flip, r"part-00001/topk_ids/c/0 has sha256 .*, the manifest says .*; expected every"),
    ],
)
def test_the_part_and_the_array_are_named(
    sound: Path, tmp_path: Path, damage: Callable[..., None], sentence: str
) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(sound, path, copy_function=os.link)
    damage(path / "part-00001" / "topk_ids" / "c" / "0", np.random.default_rng(0))
    with pytest.raises(CorruptPart, match=sentence):
        list(Cache.open(path).epoch(0))


def test_a_file_that_rots_after_its_first_reading_is_refused(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(sound, path, copy_function=os.link)
    chunk = path / "part-00000" / "topk_ids" / "c" / "0"
    for damage, sentence in ((flip, "cannot be decoded"), (lose, "is missing")):
        cache = Cache.open(path, keep_bytes=1)
        list(cache.epoch(0))
        content = chunk.read_bytes()
        damage(chunk, np.random.default_rng(2))
        with pytest.raises(CorruptPart, match=rf"part-00000/topk_ids\S* {sentence}"):
            list(cache.epoch(0))
        put(chunk, content)


def test_undamaged_parts_stay_readable(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(sound, path, copy_function=os.link)
    flip(path / "part-00001" / "tokens" / "c" / "0", np.random.default_rng(0))
    cache = Cache.open(path)
    assert len(cache.records([0])) == 1
    with pytest.raises(LkcacheError, match="part-00001"):
        cache.records([1])
