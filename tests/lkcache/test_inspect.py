import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lkcache.inspect import inspect
from storage.errors import DataError
from storage.record import supervised
from tests.storage.samples import FULL, TOPK, make_records, write_cache

ROOT = Path(__file__).parents[2]
# neither is a dependency of the command: a cache is opened on machines that have none of them
BLOCKED = """
import sys
for name in ("torch", "transformers", "dask", "dvc", "scipy"):
    sys.modules[name] = None
sys.argv = ["lkcache", *sys.argv[1:]]
from lkcache.main import main
main()
"""


def lkcache(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, *map(str, arguments)],
        cwd=cwd,
        env={
            "PATH": "/usr/bin:/bin",
            "COLUMNS": "160",
            "HOME": "/nonexistent",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def tokenizer_json() -> bytes:
    words = {f"word{number}": number for number in range(64)}
    return str(Tokenizer(WordLevel(words, unk_token="word0")).to_str()).encode()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "train.zarr"
    files = {"tokenizer.json": tokenizer_json()}
    return write_cache(path, TOPK, make_records(TOPK, [30, 12, 60]), extra_files=files)


def test_a_cache_is_shown_without_torch_or_transformers(cache: Path) -> None:
    record = make_records(TOPK, [30, 12, 60])[2]
    done = lkcache("inspect", cache, "--sequence", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = done.stdout
    assert "3 sequences, 102 tokens" in shown
    assert "source target" in shown
    assert "param min_prob" not in shown
    assert shown.index("entropy, nats") < shown.index("position by position") < shown.index("dtype")
    for name in ("topk_ids", "tail_logp", "hidden", "bytes/token", "tail mass", "maths"):
        assert name in shown
    assert f"word{record.tokens[0]}" in shown
    first = int(np.flatnonzero(supervised(record.turn))[0])
    assert f"'word{record.tokens[first + 1]}'" in shown
    assert f"{np.exp(record.token_logp[first]):.3f}" in shown


def test_parameters_and_whole_digests_are_behind_an_option(cache: Path) -> None:
    shown = lkcache("inspect", cache, "--params").stdout
    assert "t" * 64 in shown.split("made from and by")[1]
    assert "param min_prob" in shown


def test_entropy_and_surprise_are_those_of_the_records(cache: Path) -> None:
    records = make_records(TOPK, [30, 12, 60])
    logp = np.concatenate([r.token_logp[supervised(r.turn)] for r in records])
    shown = lkcache("inspect", cache).stdout
    (line,) = (x for x in shown.splitlines() if x.startswith("-log p of what was said, nats"))
    assert float(line.split()[-1]) == pytest.approx(-logp.astype(np.float64).mean(), abs=1e-3)


def test_counts_of_one_are_in_the_singular(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "one.zarr", FULL, make_records(FULL, [30]))
    lines = [line.strip() for line in lkcache("inspect", path).stdout.splitlines()]
    (holds,) = (line for line in lines if line.startswith("holds"))
    assert holds.endswith("1 sequence, 30 tokens, 1 part")


def test_positions_can_be_chosen(cache: Path) -> None:
    rows = supervised(make_records(TOPK, [30, 12, 60])[2].turn)
    at = int(np.flatnonzero(rows)[3])
    shown = lkcache("inspect", cache, "--sequence", 2, "--tokens", f"{at}:{at + 1}").stdout
    assert f"\n {at}" in shown.split("position by position")[1]
    assert f"\n {at + 1}" not in shown.split("position by position")[1]


def test_a_full_cache_shows_the_largest_logits(tmp_path: Path) -> None:
    records = make_records(FULL, [30])
    path = write_cache(tmp_path / "full.zarr", FULL, records)
    done = lkcache("inspect", path)
    assert done.returncode == 0, done.stderr
    assert records[0].logits is not None
    assert "mode full" in done.stdout
    assert "'#" in done.stdout  # no tokenizer: ids


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sequence": 3}, "sequence 3; expected 0 to 2"),
        ({"tokens": "9"}, "--tokens 9; expected A:B with 0 <= A < B <= 30"),
        ({"tokens": "9:99"}, "--tokens 9:99; expected A:B"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(
    cache: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        inspect(cache, **options)


def test_an_error_is_one_sentence_without_a_traceback(cache: Path) -> None:
    done = lkcache("inspect", cache, "--sequence", 3)
    assert done.returncode == 2
    assert done.stderr.startswith("lkcache inspect: sequence 3; expected 0 to 2, the sequences of")
    assert "Traceback" not in done.stderr


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write_cache(
        tmp_path / "c.zarr", TOPK, make_records(TOPK, [9]), extra_files={"tokenizer.json": b"{}"}
    )
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read"):
        inspect(path)


def test_verify_tells_a_sound_cache_from_a_damaged_one(cache: Path, tmp_path: Path) -> None:
    done = lkcache("verify", cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole and sound" in done.stdout
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [9]))
    chunk = path / "part-00000" / "tokens" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    done = lkcache("verify", path)
    assert done.returncode == 1
    assert "part-00000/tokens/c/0: has" in done.stdout
    done = lkcache("verify", tmp_path / "none.zarr")
    assert done.returncode == 2
    assert "expected a finished cache" in done.stderr


def test_help_lists_every_verb_and_loads_none() -> None:
    done = lkcache("--help")
    assert done.returncode == 0
    for verb in ("estimate", "init", "inspect", "matrix", "use", "verify"):
        assert verb in done.stdout
    quick = BLOCKED.replace(
        "\nmain()\n", "\ntry:\n    main()\nfinally:\n    print(sorted(sys.modules))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", quick, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'typer'" in loaded
    for heavy in ("numpy", "zarr", "pydantic", "lkcache.inspect"):
        assert f"'{heavy}'" not in loaded


def test_an_unknown_verb_is_refused() -> None:
    done = lkcache("explode")
    assert done.returncode == 2
    assert "No such command" in done.stderr
