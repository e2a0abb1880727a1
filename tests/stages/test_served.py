"""Rollouts of served laws: generated, captured and verified beside those at T = 1 and T = 0."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import capture, generate, verify
from storage.codecs import decode_p
from storage.errors import CacheError, ConfigError
from storage.reader import Cache
from storage.tables import SEQUENCES, read_table
from storage.writer import seal, write_part
from tests.targets import copy_project, write_params, write_project

LAWS = ["T=0.7,top_k=20,top_p=0.8", "T=1.5"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generate.main()
        before = {p.name: p.read_bytes() for p in Path("sequences").glob("*.parquet")}
        write_params(folder, generate={"laws": LAWS})
        generate.main()
        # further laws change nothing of what is always there
        assert {p.name: p.read_bytes() for p in Path("sequences").glob("*.parquet")} == before
        capture.main()
        verify.main()
    return folder


def test_each_law_has_rollouts_of_the_heldout_prompts(project: Path) -> None:
    heldout = read_table(project / "sequences/heldout.parquet", SEQUENCES)
    responses = []
    for law in LAWS:
        rows = read_table(project / f"sequences/served/{law}.parquet", SEQUENCES)
        assert [row["id"] for row in rows] == [row["id"] for row in heldout]
        assert {row["law"] for row in rows} == {law}
        responses.append([row["tokens"] for row in rows])
    assert responses[0] != responses[1] != [row["tokens"] for row in heldout]
    assert set(json.loads((project / "metrics/generate.json").read_text())) >= set(LAWS)


def test_their_caches_are_of_that_law_and_hold_laws_at_one(project: Path) -> None:
    """Stored laws are the target's at T = 1; log p of the tokens is of the law they came from."""
    for law in LAWS:
        cache = Cache.open(project / f"cache/served/{law}.zarr")
        assert cache.source["law"] == law
        record = cache.records([1])[0]
        first = int(np.flatnonzero(record.kept)[0])
        entries = slice(0, int(record.kept[first]))
        p = decode_p(record.topk_p[entries]).sum() + np.exp(record.tail_logp_mass[first])
        assert p == pytest.approx(1, abs=0.02)
        # a nucleus holds less than all, so that its tokens are likelier than under T = 1
        at = record.topk_ids[entries].tolist().index(int(record.tokens[first + 1]))
        plain = float(decode_p(record.topk_p[entries])[at])
        assert abs(np.exp(record.token_logp[first]) - plain) > 1e-3
    report = json.loads((project / "cache-report/report.json").read_text())
    assert set(report["splits"]) == {"train", "heldout", "greedy", *LAWS}
    for split in report["splits"].values():
        assert split["replay_max_error"]["token_logp"] < 1e-4


def test_verify_sees_log_probabilities_of_another_law(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sequences under the log p of T = 1: refused."""
    monkeypatch.chdir(copy_project(project, tmp_path))
    path = Path(f"cache/served/{LAWS[1]}.zarr")
    cache = Cache.open(path)
    records = [
        replace(record, token_logp=record.token_logp / 1.5)
        for record in cache.records(range(cache.num_sequences))
    ]
    other = tmp_path / "other.zarr"
    other.mkdir()
    parts = [write_part(other, 0, records, cache.layout)]
    seal(
        other,
        layout=cache.layout,
        parts=parts,
        source=cache.source,
        params=cache.manifest.params,
    )
    path.rename(tmp_path / "aside")
    other.rename(path)
    with pytest.raises(CacheError, match=r"T=1.5 cache, sequence .* has an error of token_logp of"):
        verify.main()


@pytest.mark.parametrize(
    ("laws", "sentence"),
    [
        (["T=1"], r"generate.laws is \['T=1'\]; expected laws other than T=0 and T=1"),
        (["T=0.5,drafts=greedy"], "expected laws other than T=0 and T=1, without drafts="),
        (["T=0.5", "T=0.50"], "expected each law once"),
        (["warm"], r"generate.laws.0 is 'warm'; expected a name of T=<temperature>"),
    ],
)
def test_laws_that_are_none_or_there_already_are_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laws: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, generate={"laws": laws})
    with pytest.raises(ConfigError, match=sentence):
        generate.main()


def test_a_token_outside_the_support_counts_as_its_last() -> None:
    from pipeline.serve import Serving, serve_logits, token_logp

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator)
    serving = Serving(temperature=0.8, top_k=9, top_p=0.7)
    served = serve_logits(logits, serving)
    inside = served.argmax(-1)
    torch.testing.assert_close(
        token_logp(logits, inside, serving), served.gather(1, inside[:, None])[:, 0]
    )
    outside = logits.argmin(-1)
    assert (served.gather(1, outside[:, None]) == -torch.inf).all()
    p = torch.softmax(logits.double() / 0.8, -1)
    own = p.gather(1, outside[:, None])[:, 0]
    mass = torch.where(served > -torch.inf, p, 0.0).sum(-1)
    torch.testing.assert_close(token_logp(logits, outside, serving), (own / (mass + own)).log())
