"""A cache in an S3-compatible store: the same records, the same refusals, the same training."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

import storage.layout
import storage.reader
from lkcache.diff import diff
from lkcache.inspect import inspect
from lkcache.verify import verify
from storage.errors import CacheError, CorruptPart, FingerprintMismatch, MissingManifest
from storage.reader import Cache
from storage.remote import is_url
from storage.stream import Stream
from tests.caches import write_cache as write_chain
from tests.storage.samples import TOPK, make_records, write_cache
from tests.storage.test_reader import LENGTHS, assert_same

BUCKET = "caches"


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """fsspec's S3 filesystem before a store of this process, on a port of its own."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with patch.dict(os.environ, environment):
        S3FileSystem.clear_instance_cache()
        made = S3FileSystem()
        made.mkdir(BUCKET)
        yield made
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "train.zarr"
    return write_cache(path, TOPK, make_records(TOPK, LENGTHS), part_tokens=200)


@pytest.fixture(scope="module")
def url(store: Any, cache_path: Path) -> str:
    return push(store, cache_path, "key/train.zarr")


def push(store: Any, path: Path, key: str) -> str:
    """As `aws s3 sync` would; returns the URL."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    remote = [f"{BUCKET}/{key}/{p.relative_to(path).as_posix()}" for p in files]
    store.put([str(p) for p in files], remote)
    return f"s3://{BUCKET}/{key}"


def test_what_was_pushed_is_read_back(url: str, cache_path: Path) -> None:
    there, here = Cache.open(url), Cache.open(cache_path)
    assert there.name == url
    assert there.manifest.encode() == here.manifest.encode()
    assert_same(list(there.epoch(3)), list(here.epoch(3)))
    assert_same([there.window(7, 10, 70)], [here.window(7, 10, 70)])
    for one, other in zip(
        islice(Stream(there, seed=1, pack_tokens=120, prefetch=1), 6),
        Stream(here, seed=1, pack_tokens=120),
        strict=False,
    ):
        assert_same(one, other)


def test_its_local_copy_stays_within_the_bound_and_is_fetched_again(
    url: str, cache_path: Path
) -> None:
    cache = Cache.open(url, keep_bytes=1, mirror_bytes=6000)
    names, here = {"tokens", "topk_ids", "hidden"}, Cache.open(cache_path)
    for _ in range(2):
        assert_same(list(cache.epoch(0, arrays=names)), list(here.epoch(0, arrays=names)))
        copied = [p for p in cache.path.rglob("*") if p.is_file() and "manifest" not in p.name]
        assert sum(p.stat().st_size for p in copied) <= 6000
    folder = cache.path
    del cache
    assert not folder.exists()


def test_training_from_it_gives_the_same_bytes(store: Any, tmp_path: Path) -> None:
    import torch

    from pipeline.dataset import heldout_batches, training_batches
    from pipeline.train import FitConfig, fit
    from tests.pipeline.test_train import CONFIG, draft, loss_of

    path = tmp_path / "chain.zarr"
    write_chain(path)
    digests = []
    for cache in (Cache.open(path), Cache.open(push(store, path, "chain.zarr"))):
        model = draft()
        needs = model.needs(None)  # type: ignore[arg-type]
        fit(
            model,
            training_batches(cache, seed=0, batch_sequences=4, steps=5, needs=needs),
            heldout=heldout_batches(cache, batch_sequences=4, sequences=4, needs=needs),
            loss=loss_of("kl"),
            config=FitConfig(**CONFIG),
            depth=1,
            steps=5,
        )
        sha = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        digests.append(sha.hexdigest())
    assert digests[0] == digests[1]


def test_it_is_inspected_by_its_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(url)
    shown = capsys.readouterr().out
    assert url in shown
    assert "10 sequences, 352 tokens" in shown


def test_it_is_verified_and_compared_by_its_url(
    url: str, store: Any, cache_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(url) == 0
    assert "whole and sound: 2 parts, 10 sequences, 352 tokens" in capsys.readouterr().out
    assert diff(url, str(cache_path)) == 0
    assert "equal byte for byte" in capsys.readouterr().out
    store.pipe_file(f"{url}/stray", b"x")
    damaged = {"part-00000/topk_p/c/0": b"", "part-00001/tokens/c/0": b""}
    try:
        assert verify(url) == 1
        assert "stray: is not in the manifest" in capsys.readouterr().out
        store.rm_file(f"{url}/stray")
        for name in damaged:
            damaged[name] = (cache_path / name).read_bytes()
            store.pipe_file(f"{url}/{name}", damaged[name][:-1] + b"x")
        assert verify(url) == 1
        shown = capsys.readouterr().out
        assert all(re.search(rf"{name} has sha256", shown) for name in damaged)
    finally:
        for name, sound in damaged.items():
            store.pipe_file(f"{url}/{name}", sound)
    with pytest.raises(MissingManifest, match=r"s3://caches/none.zarr holds no manifest.json"):
        verify("s3://caches/none.zarr")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("part-00001/topk_ids/c/0", None, r"part-00001/topk_ids/c/0 is missing"),
        ("part-00001/topk_ids/c/0", b"x", r"part-00001/topk_ids/c/0 has 1 bytes, the manifest"),
        ("part-00001/topk_ids/c/0", "flip", r"part-00001/topk_ids/c/0 has sha256 .*, the man"),
        ("part-00001/zarr.json", "flip", r"part-00001/zarr.json has sha256 .*, the manifest"),
        ("part-00009/zarr.json", b"{}", r"part-00009 is not in the manifest"),
        ("manifest.json", "flip", r"manifest.json has sha256 .*; expected what manifest.sha256"),
    ],
)
def test_damage_in_the_store_is_refused_by_name(
    store: Any, url: str, cache_path: Path, name: str, content: bytes | str | None, sentence: str
) -> None:
    place = f"{url}/{name}"
    sound = (cache_path / name).read_bytes() if (cache_path / name).is_file() else None
    if content is None:
        store.rm_file(place)
    elif isinstance(content, str):
        assert sound
        store.pipe_file(place, bytes([sound[0] ^ 1]) + sound[1:])
    else:
        store.pipe_file(place, content)
    try:
        with pytest.raises(CorruptPart, match=rf"s3://caches/key/train\.zarr.*{sentence}"):
            list(Cache.open(url).epoch(0))
    finally:
        if sound is None:
            store.rm_file(place)
        else:
            store.pipe_file(place, sound)


def test_an_object_lost_after_opening_is_refused_by_name(
    store: Any, url: str, cache_path: Path
) -> None:
    cache, name = Cache.open(url), "part-00000/tokens/c/0"
    store.rm_file(f"{url}/{name}")
    try:
        with pytest.raises(CorruptPart, match=rf"train.zarr: {name} is missing"):
            list(cache.epoch(0))
    finally:
        store.pipe_file(f"{url}/{name}", (cache_path / name).read_bytes())


def test_what_is_not_there_is_told_from_what_may_not_be_read(store: Any, url: str) -> None:
    with pytest.raises(MissingManifest, match=r"s3://nowhere/x.zarr holds no manifest.json .*buck"):
        Cache.open("s3://nowhere/x.zarr")
    with pytest.raises(MissingManifest, match=r"s3://caches/none.zarr holds no .* correct the b"):
        Cache.open("s3://caches/none.zarr")
    with pytest.raises(FingerprintMismatch, match=r"s3://caches/key/train.zarr was made from tar"):
        Cache.open(url, expect={"target": "u" * 64})
    with (
        patch.object(store, "cat_file", side_effect=PermissionError("Access Denied")),
        pytest.raises(
            CacheError, match=r"no access to s3://.*/manifest.json \(Access Denied\); ex"
        ),
    ):
        Cache.open(url)
    with (
        patch.object(store, "cat_file", side_effect=TimeoutError("60 s")),
        pytest.raises(CacheError, match=r"cannot be read \(\w*TimeoutError.*check the address"),
    ):
        Cache.open(url)


def test_a_url_that_nothing_speaks_is_refused() -> None:
    with pytest.raises(CacheError, match=r"ftq://x/y cannot be opened .* a URL that fsspec knows"):
        Cache.open("ftq://x/y")
    with (
        patch.dict(sys.modules, {"s3fs": None}),
        patch.dict("fsspec.registry._registry", clear=True),
        pytest.raises(CacheError, match=r"needs a package .* pip install lkcache\[s3\]"),
    ):
        Cache.open("s3://caches/key/train.zarr")
    assert is_url("gs://b/k")
    assert not is_url("/cache/train.zarr")
    assert not is_url(Path("s3:/b/k"))


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[Any]]]:
    """A cache of small chunks, and (file, bytes) of each answer of a store that holds it too.

    Its URL is counted://kept/train.zarr.
    """
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    answers: list[Any] = []

    class Counted(MemoryFileSystem):
        protocol = "counted"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("counted://"))

        def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            content: bytes = super().cat_file(path, start=start, end=end)
            answers.append((path.removeprefix("/kept/train.zarr/"), len(content)))
            return content

        def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
            answers.append((rpath.removeprefix("/kept/train.zarr/"), self.info(rpath)["size"]))
            super().get_file(rpath, lpath)

    monkeypatch.setattr(storage.layout, "WIDE_CHUNK_BYTES", 256)
    monkeypatch.setattr(storage.reader, "RANGE_BYTES", 0)
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, LENGTHS), part_tokens=200)
    with patch.dict("fsspec.registry._registry"):
        fsspec.register_implementation("counted", Counted, clobber=True)
        Counted().put(str(path), "/kept/train.zarr", recursive=True)
        yield path, answers


def test_a_window_of_a_store_fetches_its_chunks_alone(counted: tuple[Path, list[Any]]) -> None:
    path, answers = counted
    here, there = Cache.open(path), Cache.open("counted://kept/train.zarr")
    name = "part-00000/hidden/c/0/0/0"
    size = (path / name).stat().st_size
    assert_same([there.window(2, 10, 12)], [here.window(2, 10, 12)])
    assert 0 < sum(count for file, count in answers if file == name) < size / 2
    # an epoch wants all of it: whole, and once
    answers.clear()
    assert_same(list(there.epoch(0)), list(here.epoch(0)))
    assert [count for file, count in answers if file == name] == [size]
    assert len({file for file, _ in answers}) == len(answers)


def test_a_chunk_that_a_store_damaged_is_refused_without_its_file(
    counted: tuple[Path, list[Any]],
) -> None:
    import fsspec

    store, there = fsspec.filesystem("counted"), Cache.open("counted://kept/train.zarr")
    name = "/kept/train.zarr/part-00000/hidden/c/0/0/0"
    sound = store.cat_file(name)
    store.pipe_file(name, sound[:1] + bytes([sound[1] ^ 1]) + sound[2:])
    with pytest.raises(CorruptPart, match=r"part-00000/hidden cannot be decoded .*chunk 0 contra"):
        there.window(0, 0, 2, arrays={"hidden"})
    with (
        patch.object(type(store), "cat_file", side_effect=TimeoutError("60 s")),
        pytest.raises(
            CacheError, match=r"last_hidden/c/0/0 cannot be read \(TimeoutErr.*check the"
        ),
    ):
        there.window(0, 0, 2, arrays={"last_hidden"})
    store.rm_file("/kept/train.zarr/part-00000/last_hidden/c/0/0")
    with pytest.raises(CorruptPart, match="part-00000/last_hidden/c/0/0 is missing"):
        there.window(0, 0, 2, arrays={"last_hidden"})


def test_any_store_of_fsspec_will_do(cache_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(cache_path), "/kept/train.zarr", recursive=True)
    try:
        for url in ("memory://kept/train.zarr", f"file://{cache_path}"):
            assert_same(list(Cache.open(url).epoch(1)), list(Cache.open(cache_path).epoch(1)))
    finally:
        memory.rm("/kept", recursive=True)
