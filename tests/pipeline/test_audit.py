"""A sound cache passes the replay; what is wrong with one is named by sequence and position."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline import audit, certificate
from pipeline.audit import (
    Bar,
    Found,
    Job,
    Sample,
    VerifyConfig,
    choose,
    replay,
    replay_all,
    replay_unit,
    unigrams,
)
from pipeline.capture import layout_of
from pipeline.certificate import TARGET, UNIGRAM, covered, joined, summary
from pipeline.cluster import Cluster
from pipeline.coverage import coverage
from pipeline.target import Target
from pipeline.teacher import Pass
from storage.codecs import decode_p, from_bf16_bits
from storage.errors import CacheError
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised
from storage.tables import SEQUENCES, write_table
from storage.writer import plan_parts, seal, write_part
from tests.pipeline.test_capture import config_of, rows_of
from tests.targets import target_of

CONFIG = VerifyConfig(
    sequences=5, max_logp_error=1e-3, max_tv=2e-3, max_hidden_error=1e-2, seed=0, threads=1
)
BAR = Bar(min_prob=5e-3, max_kept=20, slack=1e-3)


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    return target_of(tiny_model())


def records_of(target: Target, **changes: Any) -> tuple[list[Record], Layout]:
    config = config_of(**changes)
    layout = layout_of(target.spec, config)
    teacher = Pass(target, layout, rule=config.rule(), batch_tokens=64, seed=0)
    rows = [{**row, "domain": "ab"[i % 2]} for i, row in enumerate(rows_of())]
    return teacher.records(rows), layout


def write(folder: Path, records: list[Record], layout: Layout, **changes: Any) -> tuple[Path, Path]:
    """A cache of these records, and the sequences they claim to be of."""
    cache, sequences = folder / "train.zarr", folder / "train.parquet"
    cache.mkdir()
    lengths = [len(record.tokens) for record in records]
    parts = [
        write_part(cache, number, records[a:b], layout)
        for number, (a, b) in enumerate(plan_parts(lengths, part_tokens=50))
    ]
    params = config_of(**{"mode": layout.mode, **changes}).model_dump()
    seal(cache, layout=layout, parts=parts, source={"target": "tiny"}, params=params)
    rows = [{**row, "finished": True} for row in rows_of()]
    write_table(sequences, SEQUENCES, rows)
    return cache, sequences


def audited(
    target: Target, folder: Path, records: list[Record], layout: Layout, mp: Any, **changes: Any
) -> Any:
    cache, sequences = write(folder, records, layout, **changes)
    mp.setattr(audit, "resident_target", lambda *_, **__: target)
    samples = [Sample(cache, sequences, "train", index) for index in range(len(records))]
    job = Job(folder, "tiny", "cpu", CONFIG, unigrams({"train": cache}), str(folder))
    return replay_unit(job, samples)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "fixed", "min_prob": None},
        {"keep": "fixed", "min_prob": None, "max_kept": 99},
        {"keep": "nucleus", "min_prob": None, "top_p": 0.7},
        {"hidden_dtype": "int8"},
        {"mode": "full"},
        {"mode": "rebuild"},
    ],
)
def test_a_sound_cache_passes(
    target: Target, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, layout = records_of(target, **changes)
    mode = layout.mode
    found = audited(target, tmp_path, records, layout, monkeypatch, **changes)
    errors = [one.errors for one in found]
    assert all(error["token_logp"] < 1e-4 for error in errors if "token_logp" in error)
    assert {"hidden", "last_hidden", "token_logp", "tv"} <= set(errors[0])
    assert ("kept_set" in errors[0]) == (mode == "topk")
    if mode == "rebuild":
        assert 0 < max(found["tv"] for found in errors if "tv" in found) < 1e-2


@pytest.mark.parametrize(
    ("changes", "surplus"),
    [
        ({"keep": "fixed", "min_prob": None}, {"max_kept": 12}),
        ({"keep": "fixed", "min_prob": None}, {"max_kept": 25}),
        ({"keep": "nucleus", "min_prob": None, "top_p": 0.7}, {"top_p": 0.6}),
        ({"keep": "nucleus", "min_prob": None, "top_p": 0.7}, {"top_p": 0.8}),
        ({}, {"min_prob": 2e-2}),
        ({}, {"min_prob": 1e-3}),
    ],
)
def test_ids_kept_by_another_rule_are_refused(
    target: Target,
    tmp_path: Path,
    changes: dict[str, Any],
    surplus: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records, layout = records_of(target, **changes)
    stated = {**changes, **surplus}
    with pytest.raises(CacheError, match="has a number of ids wrongly kept, left out or sampled"):
        audited(target, tmp_path, records, layout, monkeypatch, **stated)


def test_a_rebuilt_law_of_another_state_is_refused(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, layout = records_of(target, mode="rebuild")
    assert records[5].last_hidden is not None
    flat = np.zeros(layout.vocab_size, np.float32)
    errors = replay(target, records[5], layout=layout, bar=BAR, unigram_V=flat).errors
    assert errors["tv_beyond_rounding"].max() < 1e-3
    rolled = replace(records[5], last_hidden=np.roll(records[5].last_hidden, 1, axis=0))
    errors = replay(target, rolled, layout=layout, bar=BAR, unigram_V=flat).errors
    assert errors["tv_beyond_rounding"].max() > 0.1
    records[5] = rolled
    with pytest.raises(CacheError, match="has a relative error of last_hidden of"):
        audited(target, tmp_path, records, layout, monkeypatch)


def change(record: Record, name: str, place: int, value: Any) -> Record:
    array = getattr(record, name).copy()
    array[place] = value
    return replace(record, **{name: array})


def worst(target: Target, record: Record) -> dict[str, tuple[float, int]]:
    layout, flat = layout_of(target.spec, config_of()), np.zeros(64, np.float32)
    errors = replay(target, record, layout=layout, bar=BAR, unigram_V=flat).errors
    return {kind: (float(e.max()), int(e.argmax())) for kind, e in errors.items()}


def test_each_error_is_found_where_it_is(target: Target) -> None:
    record = records_of(target)[0][5]
    rows = supervised(record.turn)
    t = int(rows.nonzero()[0][2])
    first = int(record.kept[:t].sum())
    draw = int(record.tail_kept[:t].sum())
    assert record.tail_kept[t] > 0
    sound = worst(target, record)
    assert sound["kept_set"] == (0.0, 0)
    half = decode_p(record.topk_p[first : first + 1]) / 2
    cases = [
        ("token_logp", "token_logp", t, record.token_logp[t] + 0.5, 0.5),
        ("tail_logp_mass", "tail_logp_mass", t, record.tail_logp_mass[t] - 0.5, 0.5),
        ("tail_logp", "tail_logp", draw, record.tail_logp[draw] + np.float16(0.5), 0.5),
        ("topk_p", "tv", first, np.rint(1023 * half**0.5)[0], float(half[0]) / 2),
    ]
    for array, kind, place, value, size in cases:
        found = worst(target, change(record, array, place, value))
        assert found[kind][0] == pytest.approx(size, rel=0.1), array
        assert found[kind][1] == t, array
    # a kept id in the place of another: one is wrongly kept, one wrongly left out
    tokens = torch.from_numpy(record.tokens.astype(np.int64))
    last_hidden = target.forward(tokens[None]).last_hidden[0, t]
    unlikely = int(target.logits(last_hidden).argmin())
    found = worst(target, change(record, "topk_ids", first, unlikely))
    assert found["kept_set"] == (2.0, t)
    sampled = change(record, "tail_ids", draw, record.topk_ids[first])
    assert worst(target, sampled)["kept_set"] == (1.0, t)


def test_hidden_states_of_another_position_are_found(target: Target) -> None:
    record = records_of(target)[0][5]
    assert record.hidden is not None
    shifted = replace(record, hidden=np.roll(record.hidden, 1, axis=0))
    assert worst(target, shifted)["hidden"][0] > 0.1
    assert worst(target, record)["hidden"][0] < 2**-8


def test_laws_of_another_position_are_refused_by_name(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, layout = records_of(target)
    record = records[5]
    t = int(supervised(record.turn).nonzero()[0][1])
    records[5] = change(record, "token_logp", t, record.token_logp[t] + 0.01)
    with pytest.raises(
        CacheError,
        match=rf"train cache, sequence 's5', position {t} has an error of token_logp of 0.0\d+; "
        r"expected at most 0.001, as the section verify says; check that target",
    ):
        audited(target, tmp_path, records, layout, monkeypatch)


def test_sequences_of_another_file_are_refused(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, layout = records_of(target)
    records[2] = change(records[2], "tokens", 1, (records[2].tokens[1] + 1) % 64)
    with pytest.raises(CacheError, match=r"sequence 's2' has another id, tokens .* row 2 of train"):
        audited(target, tmp_path, records, layout, monkeypatch)


def test_samples_are_drawn_once_each_and_by_seed(target: Target, tmp_path: Path) -> None:
    cache, sequences = write(tmp_path, *records_of(target))

    def of(seed: int) -> list[int]:
        config = CONFIG.model_copy(update={"seed": seed})
        (unit,) = choose({"train": cache}, {"train": sequences}, config)
        return [sample.index for sample in unit]

    assert of(0) == of(0)
    assert len(set(of(0))) == 5
    assert {tuple(of(seed)) for seed in range(8)} != {tuple(of(0))}


def test_the_largest_error_of_each_split_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    width = {"t": {"alpha_width": np.array([0.1])}}
    found = [
        Found({"tv": 0.1, "hidden": 0.2}, width),
        Found({"hidden": 0.1}, width),
        Found({"tv": 0.3}, {}),
    ]
    samples = [Sample(Path(), Path(), split, 0) for split in ("a", "a", "b")]
    monkeypatch.setattr(audit, "replay_unit", lambda _, __: found)
    cluster = Cluster(None, threads=1)
    whole = replay_all([samples], Job(Path(), "", "cpu", CONFIG, {}, ""), cluster)
    assert whole["a"].errors == {"tv": 0.1, "hidden": 0.2}
    assert whole["b"] == Found({"tv": 0.3}, {})
    assert whole["a"].certificate["t"]["alpha_width"].tolist() == [0.1, 0.1]


def test_coverage_counts_what_the_records_hold(target: Target, tmp_path: Path) -> None:
    records, layout = records_of(target)
    found = coverage(Cache.open(write(tmp_path, records, layout)[0]))
    rows = [supervised(record.turn) for record in records]
    kept = np.concatenate([r.kept[own] for r, own in zip(records, rows, strict=True)])
    tail = np.concatenate([r.tail_logp_mass[own] for r, own in zip(records, rows, strict=True)])
    assert found["rows"] == len(kept)
    assert found["tokens"] == sum(len(record.tokens) for record in records)
    assert found["mean_kept"] == pytest.approx(kept.mean(), abs=1e-6)
    assert found["mean_tail_mass"] == pytest.approx(np.exp(tail).mean(), rel=1e-5)
    assert found["mean_kept_mass"] == pytest.approx(1 - np.exp(tail).mean(), rel=1e-5)
    assert found["kept_quantiles"]["p50"] == np.quantile(kept, 0.5, method="inverted_cdf")
    assert set(found["mean_kept_by_domain"]) == {"a", "b"}
    assert set(found["bytes_per_token"]) == {array.name for array in layout.arrays()}


def test_a_full_cache_covers_everything(target: Target, tmp_path: Path) -> None:
    found = coverage(Cache.open(write(tmp_path, *records_of(target, mode="full"))[0]))
    assert found["mean_kept"] == 64
    assert found["mean_tail_mass"] == 0
    assert found["kept_quantiles"] == {"p10": 64, "p50": 64, "p90": 64, "p99": 64}


@pytest.mark.parametrize("key", ["sequences", "max_logp_error", "max_tv", "max_hidden_error"])
def test_limits_must_be_positive(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        VerifyConfig(**{**CONFIG.model_dump(), key: 0})


@pytest.mark.parametrize("mode", ["topk", "full", "rebuild"])
def test_truncation_is_certified_at_every_supervised_token(
    target: Target, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, layout = records_of(target, mode=mode)
    found = joined([f.certificate for f in audited(target, tmp_path, records, layout, monkeypatch)])
    num_rows = sum(int(supervised(record.turn).sum()) for record in records)
    assert set(found) == {TARGET, UNIGRAM}
    for draft, columns in found.items():
        for name in ("alpha", "kl"):
            assert covered(columns, name).all()
            assert len(columns[name]) == num_rows
            assert (columns[f"{name}_width"] > 0).all()
        numbers = summary(found)[draft]
        assert numbers["rows"] == num_rows
        assert numbers["alpha_covered"] == numbers["kl_covered"] == 1
        assert numbers["alpha_width"] <= numbers["alpha_width_p99"] <= 1
        assert abs(numbers["alpha_error"]) <= 4 * numbers["alpha_error_se"] + 0.01
        assert numbers["kl_error_slack"] > 0
    assert (found[TARGET]["alpha"] > found[UNIGRAM]["alpha"]).all()  # one close, one far


def test_what_a_states_rounding_does_to_a_rebuilt_law_is_certified(target: Target) -> None:
    """Against the slow version: α of the law of the stored state, and of the target's own."""
    records, layout = records_of(target, mode="rebuild")
    record, flat = records[5], np.zeros(64, np.float32)
    found = replay(target, record, layout=layout, bar=BAR, unigram_V=flat)
    assert found.certified == supervised(record.turn).nonzero()[0].tolist()
    tokens = torch.from_numpy(record.tokens.astype(np.int64))
    exact_TD = target.forward(tokens[None]).last_hidden[0, found.certified]
    assert record.last_hidden is not None
    stored_TD = torch.from_numpy(from_bf16_bits(record.last_hidden[found.certified]))
    p, stored = (target.logits(x).double().softmax(-1) for x in (exact_TD, stored_TD))
    q = (p.log() / 1.5).softmax(-1)
    error = torch.minimum(stored, q).sum(-1) - torch.minimum(p, q).sum(-1)
    columns = found.certificate[TARGET]
    np.testing.assert_allclose(columns["alpha_error"], error, atol=2e-6)
    # the cache's own interval is of the stored law; the audit adds what it measured
    assert (columns["alpha_width"] < 1e-5).all()
    np.testing.assert_allclose(columns["alpha_widened"], (stored - p).abs().sum(-1), atol=1e-5)
    assert (np.abs(columns["alpha_error"]) <= columns["alpha_widened"]).all()
    assert covered(columns, "alpha").all()
    assert covered(columns, "kl").all()
    numbers = summary({TARGET: columns})[TARGET]
    assert 1e-5 < numbers["alpha_widened"] < 2e-2
    rolled = replace(record, last_hidden=np.roll(record.last_hidden, 1, axis=0))
    wrong = replay(target, rolled, layout=layout, bar=BAR, unigram_V=flat).certificate[TARGET]
    assert wrong["alpha_widened"].mean() > 0.1


def test_the_unigram_counts_the_caches_own_supervised_tokens(
    target: Target, tmp_path: Path
) -> None:
    records, layout = records_of(target)
    logits = unigrams({"train": write(tmp_path, records, layout)[0]})["train"]
    counts = np.zeros(64)
    for record in records:
        for t in supervised(record.turn).nonzero()[0]:
            counts[record.tokens[t + 1]] += 1
    np.testing.assert_allclose(np.exp(logits), counts + 1, rtol=1e-6)


def test_long_sequences_are_certified_at_evenly_spread_rows(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "CERTIFIED_ROWS", 3)
    monkeypatch.setattr(audit, "CHUNK_ELEMENTS", 2 * 64)  # two rows at once: across chunks
    record = records_of(target)[0][5]
    layout, flat = layout_of(target.spec, config_of()), np.zeros(64, np.float32)
    found = replay(target, record, layout=layout, bar=BAR, unigram_V=flat)
    rows = supervised(record.turn).nonzero()[0]
    assert found.certified == [rows[0], rows[len(rows) // 3], rows[2 * len(rows) // 3]]
    assert len(found.certificate[TARGET]["alpha"]) == 3
    monkeypatch.setattr(audit, "CERTIFIED_ROWS", len(rows))
    whole = replay(target, record, layout=layout, bar=BAR, unigram_V=flat)
    np.testing.assert_allclose(
        whole.certificate[TARGET]["alpha"][[0, len(rows) // 3]],
        found.certificate[TARGET]["alpha"][:2],
    )


@pytest.mark.parametrize(("name", "symbol"), [("bounds", "α"), ("kl_bounds", "KL")])
def test_an_interval_that_fails_is_an_error(
    target: Target,
    tmp_path: Path,
    name: str,
    symbol: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = getattr(certificate, name)

    def narrow(*args: Any, **kwargs: Any) -> Any:
        lo, hi = sound(*args, **kwargs)
        return lo, lo + 1e-6 * (hi - lo)

    monkeypatch.setattr(certificate, name, narrow)
    records, layout = records_of(target)
    with pytest.raises(
        CacheError,
        match=rf"train cache, sequence 's\d', position \d+: {symbol} of the reference draft "
        r"'target at T=1.5' is \S+, outside its certified \[\S+, \S+\]; expected every interval "
        r"to hold the exact value; remove the cache",
    ):
        audited(target, tmp_path, records, layout, monkeypatch)
