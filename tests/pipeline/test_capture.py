"""The teacher-forced pass: every stored number against a plain forward of the sequence alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline import topk
from pipeline.capture import CaptureConfig, fingerprint_of, law_of, layout_of
from pipeline.interface import Head, HeadRule
from pipeline.target import Target
from pipeline.teacher import Pass, batches
from storage.codecs import decode_int8, decode_p, from_bf16_bits, int8_error, p_error
from storage.errors import DataError, TargetError
from storage.record import Record, supervised
from storage.sequences import Sequences
from storage.tables import SEQUENCES, write_table
from tests.pipeline.test_topk import Widest
from tests.targets import target_of

PARAMS: dict[str, Any] = {
    "mode": "topk",
    "keep": "threshold",
    "min_prob": 5e-3,
    "top_p": None,
    "max_kept": 20,
    "tail_samples": 6,
    "tail_full_mass": 0.05,
    "tail_min_mass": 1e-4,
    "hidden_layers": [0, 2],
    "last_hidden": True,
    "hidden_dtype": "bfloat16",
    "part_tokens": 60,
    "batch_tokens": 64,
    "seed": 0,
    "threads": 1,
}
KNOBS = ("keep", "min_prob", "max_kept", "tail_samples", "tail_full_mass", "tail_min_mass")
WHOLE: dict[str, Any] = dict.fromkeys(KNOBS)
"""What the modes that keep whole laws do not read."""


def config_of(**changes: Any) -> CaptureConfig:
    whole = WHOLE if changes.get("mode", "topk") != "topk" else {}
    return CaptureConfig(**{**PARAMS, **whole, **changes})


def rows_of(count: int = 7) -> list[dict[str, Any]]:
    """Two turns each, and one sequence that nothing in is supervised."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        length = 5 + (7 * i) % 19
        turn = [-1, -1, 0, 0, 0, -1, -1, *[1] * (length - 7)][:length] if i != 3 else [-1] * length
        tokens = rng.integers(0, 64, length).tolist()
        rows.append({"id": f"s{i}", "domain": "d", "tokens": tokens, "turn": turn, "law": "T=1"})
    return rows


def file_of(folder: Path, rows: list[dict[str, Any]]) -> Sequences:
    path = folder / "train.parquet"
    write_table(path, SEQUENCES, [{"finished": True, **row} for row in rows])
    return Sequences.open(path)


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    return target_of(tiny_model())


def captured(target: Target, rows: Any = None, **changes: Any) -> list[Record]:
    config = config_of(**changes)
    teacher = Pass(
        target,
        layout_of(target.spec, config),
        rule=config.rule(),
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    return teacher.records(rows or rows_of())


def passing(target: Target, **changes: Any) -> Pass:
    config = config_of(**changes)
    layout = layout_of(target.spec, config)
    return Pass(target, layout, rule=config.rule(), batch_tokens=config.batch_tokens, seed=0)


def exact(target: Target, row: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    features = target.forward(torch.tensor([row["tokens"]]), layers=[0, 2])
    logits = target.logits(features.last_hidden[0]).double()
    return torch.log_softmax(logits, -1), features


def test_records_hold_the_law_of_a_plain_forward(target: Target) -> None:
    for row, record in zip(rows_of(), captured(target), strict=True):
        logp_TV, _ = exact(target, row)
        rows = supervised(record.turn)
        assert record.id == row["id"]
        assert record.tokens.tolist() == row["tokens"]
        entry, draw = 0, 0
        for t in range(len(rows)):
            ids = record.topk_ids[entry : entry + record.kept[t]].astype(np.int64)
            codes = record.topk_p[entry : entry + record.kept[t]]
            tail = record.tail_ids[draw : draw + record.tail_kept[t]].astype(np.int64)
            entry, draw = entry + record.kept[t], draw + record.tail_kept[t]
            if not rows[t]:
                assert record.kept[t] == record.token_logp[t] == record.tail_logp_mass[t] == 0
                assert record.tail_kept[t] == 0
                continue
            p = logp_TV[t].exp().numpy()
            assert set(ids) == set(np.argsort(-p)[: len(ids)])
            assert p[ids].min() >= 5e-3 - 1e-6
            assert len(ids) == 20 or np.delete(p, ids).max() < 5e-3 + 1e-6
            assert np.all(np.abs(decode_p(codes) - p[ids]) <= p_error(codes) + 1e-6)
            assert record.token_logp[t] == pytest.approx(np.log(p[row["tokens"][t + 1]]), abs=1e-4)
            assert np.exp(record.tail_logp_mass[t]) == pytest.approx(np.delete(p, ids).sum(), 1e-3)
            assert not set(tail) & set(ids)
        assert entry == len(record.topk_ids)
        assert draw == len(record.tail_ids)


def test_records_hold_the_features_of_a_plain_forward(target: Target) -> None:
    for row, record in zip(rows_of(), captured(target), strict=True):
        _, features = exact(target, row)
        assert record.hidden is not None
        assert record.last_hidden is not None
        close = {"rtol": 2**-8, "atol": 1e-5}
        np.testing.assert_allclose(from_bf16_bits(record.hidden), features.hidden[0], **close)
        np.testing.assert_allclose(
            from_bf16_bits(record.last_hidden), features.last_hidden[0], **close
        )


def test_full_records_hold_every_log_probability(target: Target) -> None:
    full = captured(target, mode="full", hidden_layers=[], last_hidden=False)
    for row, record in zip(rows_of(), full, strict=True):
        logp_TV, _ = exact(target, row)
        rows = supervised(record.turn)
        assert record.logits is not None
        assert record.hidden is None
        assert not record.kept.any()
        np.testing.assert_allclose(
            from_bf16_bits(record.logits), logp_TV[torch.from_numpy(rows)], rtol=2**-8, atol=1e-5
        )


def test_tail_samples_do_not_depend_on_the_batch(target: Target) -> None:
    together, alone = captured(target), captured(target, batch_tokens=1)
    for a, b in zip(together, alone, strict=True):
        assert a.tail_ids.tolist() == b.tail_ids.tolist()
        assert a.topk_ids.tolist() == b.topk_ids.tolist()
    other = captured(target, seed=1)
    assert any(
        a.tail_ids.tolist() != b.tail_ids.tolist() for a, b in zip(together, other, strict=True)
    )


def test_batches_stay_within_their_tokens() -> None:
    lengths = [3, 50, 9, 9, 70, 1, 20]
    found = batches(lengths, 64)
    assert found == [[4], [1], [6, 2, 3], [0, 5]]


@pytest.mark.parametrize("mode", ["topk", "full"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("ids", [[17], range(64)], ids=["one", "all"])
def test_logits_that_are_not_finite_name_sequence_and_position(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, mode: str, value: float, ids: Sequence[int]
) -> None:
    target = target_of(tiny_model())
    plain = target.logits

    def broken(last_hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(last_hidden).clone()
        logits[1, list(ids)] = value
        return logits

    monkeypatch.setattr(target, "logits", broken)
    rows = rows_of()[4:6]
    # batches begin with the longest sequence; its supervised rows are 2, 3, 7, ...
    assert len(rows[1]["tokens"]) > len(rows[0]["tokens"])
    with pytest.raises(
        TargetError, match="logits at sequence 's5', position 3 are NaN or infinite"
    ):
        captured(target, rows=rows, **({"mode": mode, **WHOLE} if mode == "full" else {}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [1] * 257, "turn": [0] * 257}, "has 257 tokens"),
        ({"tokens": [1, 64], "turn": [0, 0]}, "holds the token id 64"),
        ({"tokens": [], "turn": []}, "has 0 tokens and 0 turns"),
        ({"tokens": [1, 2], "turn": [0]}, "has 2 tokens and 1 turns"),
    ],
)
def test_a_sequence_that_does_not_fit_is_named(
    target: Target, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    rows = rows_of()
    rows[4] = {**rows[4], **change}
    rows[6] = {**rows[6], "tokens": [], "turn": []}  # a later one is not named
    with pytest.raises(DataError, match=f"train.parquet: sequence 's4' {said}; .* ids below 64"):
        law_of(file_of(tmp_path, rows), target.spec)


def test_sequences_of_two_laws_are_refused(target: Target, tmp_path: Path) -> None:
    rows = rows_of()
    assert law_of(file_of(tmp_path, rows), target.spec) == "T=1"
    with pytest.raises(DataError, match=r"sequences of T=1 and data; expected .* all of one law"):
        law_of(file_of(tmp_path, [*rows, {**rows[0], "law": "data"}]), target.spec)
    with pytest.raises(DataError, match="no law: it is empty; expected at least one sequence"):
        law_of(file_of(tmp_path, []), target.spec)


def test_the_last_index_is_no_hidden_layer(target: Target) -> None:
    with pytest.raises(TargetError, match=r"hidden layer 4 .* indices 0 to 3 .* last_hidden"):
        layout_of(target.spec, config_of(hidden_layers=[1, 4]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_p": 0.9}, "null for top_p, which mode topk and keep threshold does not read"),
        ({"min_prob": None}, "values for min_prob, which mode topk and keep threshold reads"),
        ({"keep": "fixed"}, "null for min_prob, which mode topk and keep fixed does not read"),
        ({"keep": "nucleus", "min_prob": None}, "values for top_p, which mode topk and keep nuc"),
        ({"keep": None}, "values for keep, which mode topk and keep None reads"),
        ({"mode": "full", "max_kept": 9}, "null for max_kept, which mode full does not read"),
        ({"mode": "rebuild", "last_hidden": False}, "last_hidden: true, from which mode rebuild"),
        (
            {"mode": "rebuild", "hidden_layers": [], "hidden_dtype": "int8"},
            "hidden_dtype: bfloat16, since no hidden state is stored in 8 bits",
        ),
    ],
)
def test_a_knob_that_nothing_reads_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(**change)


def test_rules_keep_what_they_say(target: Target) -> None:
    fixed = captured(target, keep="fixed", min_prob=None)
    nucleus = captured(target, keep="nucleus", min_prob=None, top_p=0.5)
    for most, few in zip(fixed, nucleus, strict=True):
        rows = supervised(most.turn)
        assert (most.kept[rows] == 20).all()
        assert (few.kept[rows] >= 1).all()
        assert few.kept.sum() <= most.kept.sum()
        # what is kept of a row is the beginning of what a larger rule keeps
        for t in rows.nonzero()[0]:
            a, b = int(most.kept[:t].sum()), int(few.kept[:t].sum())
            ids = few.topk_ids[b : b + few.kept[t]]
            assert most.topk_ids[a : a + few.kept[t]].tolist() == ids.tolist()
            held = decode_p(few.topk_p[b : b + few.kept[t]])
            assert few.kept[t] == 20 or held.sum() > 0.48


def test_rebuild_records_keep_the_states_that_laws_are_made_of(target: Target) -> None:
    kept = captured(target, mode="rebuild", hidden_dtype="int8")
    for row, record, plain in zip(rows_of(), kept, captured(target), strict=True):
        logp_TV, _ = exact(target, row)
        assert record.logits is None
        assert not record.kept.any()
        assert not record.tail_kept.any()
        np.testing.assert_array_equal(record.token_logp, plain.token_logp)
        assert record.last_hidden is not None
        assert record.hidden_int8 is not None
        np.testing.assert_array_equal(record.last_hidden, plain.last_hidden)
        rows = supervised(record.turn)
        state = torch.from_numpy(from_bf16_bits(record.last_hidden))
        law = target.logits(state).double().softmax(-1)
        tv = 0.5 * (law - logp_TV.exp()).abs().sum(-1)[torch.from_numpy(rows)]
        assert (tv < 1e-2).all()  # bfloat16 states under logits of a few units


def test_eight_bit_records_are_within_the_codecs_error(target: Target) -> None:
    for row, record in zip(rows_of(), captured(target, hidden_dtype="int8"), strict=True):
        _, features = exact(target, row)
        assert record.hidden is None
        assert record.last_hidden is None
        for name, x in (("hidden", features.hidden), ("last_hidden", features.last_hidden)):
            code, scale = getattr(record, f"{name}_int8"), getattr(record, f"{name}_scale")
            off = np.abs(decode_int8(code, scale) - x[0].numpy())
            assert (off <= int8_error(scale, 32) + 1e-6).all()


class Small:
    """A target whose device holds so many tokens and no more."""

    def __init__(self, target: Target, tokens: int) -> None:
        self.target, self.tokens, self.tried = target, tokens, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def forward(self, tokens_BT: torch.Tensor, **options: Any) -> Any:
        self.tried.append(tokens_BT.numel())
        if tokens_BT.numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return self.target.forward(tokens_BT, **options)


def test_a_batch_without_memory_is_halved_and_counted(target: Target) -> None:
    small, plenty = Small(target, 40), passing(target, batch_tokens=160)
    teacher = passing(small, batch_tokens=160)  # type: ignore[arg-type]
    for found, wanted in zip(teacher.records(rows_of()), plenty.records(rows_of()), strict=True):
        assert found.id == wanted.id
        np.testing.assert_array_equal(found.tail_ids, wanted.tail_ids)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        # another batch may round differently: a few ulp of float32 logits
        np.testing.assert_allclose(found.token_logp, wanted.token_logp, atol=1e-5)
    assert small.tried[0] > 40
    assert (teacher.stats().halvings, plenty.stats().halvings) == (2, 0)
    assert teacher.stats().rows == plenty.stats().rows
    assert (
        teacher.stats().tokens == plenty.stats().tokens == sum(len(r["tokens"]) for r in rows_of())
    )
    assert max(small.tried[2:]) <= 40  # what did not fit once is not tried again


def test_a_sequence_without_memory_is_named(target: Target) -> None:
    longest = max(rows_of(), key=lambda row: len(row["tokens"]))
    name, size = longest["id"], len(longest["tokens"])
    with pytest.raises(
        TargetError,
        match=rf"no memory on cpu for sequence '{name}' of {size} tokens "
        r"alone; expected memory for the target .*; free the device",
    ):
        passing(Small(target, 3)).records(rows_of())  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab_size", [151_936, 201_088])
def test_large_vocabularies_are_captured_in_bounded_memory(
    tiny_model: Any, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a float32 [R, V]: 20 rows here would be 12 to 16 MB, a chunk is 8."""
    monkeypatch.setattr(topk, "CHUNK_ELEMENTS", 1 << 21)
    large = target_of(tiny_model(vocab_size=vocab_size, hidden_size=8, num_layers=1).bfloat16())
    tokens = [vocab_size - 1 - 7 * i for i in range(21)]
    row = {"id": "s", "domain": "d", "tokens": tokens, "turn": [0] * 21, "law": "T=1"}
    with Widest() as widest:
        (record,) = passing(large, hidden_layers=[0]).records([row])
    assert widest.elements <= topk.CHUNK_ELEMENTS < 20 * vocab_size
    assert record.tokens.tolist() == tokens
    assert record.tail_ids.max() >= 2**17
    last_hidden = large.forward(torch.tensor([tokens])).last_hidden[0]
    logp_TV = torch.log_softmax(large.logits(last_hidden).double(), -1)
    wanted = logp_TV[torch.arange(20), torch.tensor(tokens[1:])]
    np.testing.assert_allclose(record.token_logp[:20], wanted, atol=1e-4)
    with Widest() as widest:
        (whole,) = passing(large, mode="full", hidden_layers=[0]).records([row])
    assert widest.elements <= topk.CHUNK_ELEMENTS
    assert whole.logits is not None
    assert whole.logits.shape == (20, vocab_size)


@pytest.mark.parametrize("wrong", ["weight", "rule", "shape"])
def test_a_head_that_is_not_the_targets_is_refused(target: Target, wrong: str) -> None:
    weight = target.model.lm_head.weight
    head = {
        "weight": Head(weight.roll(1, 0), HeadRule()),
        "rule": Head(weight, HeadRule(caps=(2.0,))),
        "shape": Head(weight[:-1], HeadRule()),
    }[wrong]
    config = config_of(mode="rebuild")
    layout = layout_of(target.spec, config)
    for given, fits in ((head, False), (Head(weight, HeadRule()), True)):
        teacher = Pass(target, layout, rule=None, batch_tokens=64, seed=0, head=given)
        if fits:
            assert len(teacher.records(rows_of())) == 7
            continue
        with pytest.raises(
            TargetError,
            match=r"an LM head in target/interface that does not .*; expected the lm_head",
        ):
            teacher.records(rows_of())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_layers": [1, 1]},
        {"hidden_layers": [-1]},
        {"min_prob": 1.0},
        {"max_kept": 0},
        {"max_kept": 65_536},
        {"tail_samples": 256},
        {"tail_full_mass": 0.0},
        {"mode": "sparse"},
        {"top_p": 1.0},
        {"hidden_dtype": "float8"},
        {"batch_tokens": 0},
    ],
)
def test_values_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        config_of(**change)


def test_the_fingerprint_names_target_sequences_and_parameters(target: Target) -> None:
    def of(fingerprint: str = "tiny", digest: str = "a", **changes: Any) -> str:
        spec = target.spec.model_copy(update={"fingerprint": fingerprint})
        return fingerprint_of(spec, config_of(**changes), {"train": digest})

    assert of() == of()
    assert len({of(), of("other"), of(digest="b"), of(min_prob=1e-3), of(seed=1)}) == 5
