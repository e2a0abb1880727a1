"""Records to batches: what the law's numbers mean, what the order depends on, what is refused."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from pipeline.dataset import (
    arrays,
    collate,
    epoch_runs,
    heldout_batches,
    require,
    supervised_counts,
    training_batches,
)
from pipeline.draft import Needs
from pipeline.law import DenseLaw, SparseLaw
from pipeline.terms import terms
from storage.codecs import encode_int8, from_bf16_bits
from storage.errors import DraftError
from storage.layout import Layout
from storage.reader import Cache
from storage.record import supervised
from tests.caches import FULL, LAYERS, LAYOUT, D, V, chain, record, write_cache

RECORDS = [record(str(i), num_tokens=n, num_prompt=i + 2) for i, n in enumerate((12, 20, 7))]


def batch() -> tuple[Batch, SparseLaw]:
    made = collate(RECORDS, LAYOUT)
    assert isinstance(made.law, SparseLaw)
    return made, made.law


def test_sequences_are_padded_with_nothing_that_could_be_supervised() -> None:
    made, _ = batch()
    assert made.tokens.shape == (3, 20)
    assert made.length.tolist() == [12, 20, 7]
    assert made.ids == ("0", "1", "2")
    for b, r in enumerate(RECORDS):
        assert made.tokens[b, : len(r.tokens)].tolist() == r.tokens.tolist()
        assert not made.tokens[b, len(r.tokens) :].any()
        assert (made.turn[b, len(r.tokens) :] == -1).all()
        assert made.turn[b, : len(r.tokens)].tolist() == r.turn.tolist()
        assert made.token_logp[b, : len(r.tokens)].tolist() == r.token_logp.tolist()


def test_every_supervised_row_has_its_own_law_and_no_other_row_has_one() -> None:
    made, law = batch()
    chained = torch.tensor(chain())
    rows = [made.law_row[b, t].item() for b, t in (made.law_row >= 0).nonzero().tolist()]
    assert rows == list(range(law.num_rows))
    for b, r in enumerate(RECORDS):
        assert (made.law_row[b, : len(r.turn)] >= 0).tolist() == supervised(r.turn).tolist()
        for t in np.flatnonzero(supervised(r.turn)):
            own = law.take(made.law_row[b, t : t + 1])
            p_V = chained[int(r.tokens[t])]
            torch.testing.assert_close(own.p.double(), p_V[own.ids], rtol=0.02, atol=1e-3)
            assert sorted(own.ids[:6].tolist()) == sorted(p_V.topk(6).indices.tolist())


def test_weights_make_kept_ids_samples_and_bucket_one_law() -> None:
    _, law = batch()
    mass = torch.zeros(law.num_rows).index_add_(0, law.rows(), law.weight * law.p) + law.bucket
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=5e-3)  # codes of p
    assert law.kept is not None
    assert law.tail is not None
    sampled = law.entry_start.diff() > law.kept
    assert sampled.any()
    assert not sampled.all()
    assert not law.bucket[sampled].any()
    torch.testing.assert_close(law.bucket[~sampled], law.tail[~sampled])
    first = torch.arange(len(law.ids)) - law.entry_start[law.rows()] < law.kept[law.rows()]
    assert (law.weight[first] == 1).all()


def test_features_come_back_from_bf16_bits_unchanged() -> None:
    made, _ = batch()
    assert made.hidden is not None
    assert made.last_hidden is not None
    assert made.hidden.shape == (3, 20, len(LAYERS), D)
    assert made.hidden.dtype == made.last_hidden.dtype == torch.float32
    bits = made.hidden[1].to(torch.bfloat16).view(torch.uint16).numpy()
    assert RECORDS[1].hidden is not None
    assert (bits == RECORDS[1].hidden).all()
    assert not made.hidden[2, 7:].any()


def test_features_of_eight_bits_come_back_as_their_codes_say() -> None:
    layout = replace(LAYOUT, hidden_dtype="int8")
    plain, _ = batch()
    records = []
    for r in RECORDS:
        assert r.hidden is not None
        assert r.last_hidden is not None
        codes = {}
        for name, bits in (("hidden", r.hidden), ("last_hidden", r.last_hidden)):
            code, scale = encode_int8(from_bf16_bits(bits))
            codes |= {name: None, f"{name}_int8": code, f"{name}_scale": scale}
        records.append(replace(r, **codes))
    assert {"hidden_int8", "hidden_scale"} <= arrays(layout, Needs(num_layers=3))
    assert {"last_hidden_int8", "last_hidden_scale"} <= arrays(layout, Needs(last_hidden=True))
    made = collate(records, layout)
    for found, exact in ((made.hidden, plain.hidden), (made.last_hidden, plain.last_hidden)):
        assert found is not None
        assert exact is not None
        assert found.shape == exact.shape
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((found - exact).abs() <= 0.51 * step).all()  # one group: its scale is rounded up
        assert not found[2, 7:].any()


def test_full_logits_give_the_dense_law_of_the_same_rows() -> None:
    full = [record(str(i), layout=FULL, num_tokens=n) for i, n in enumerate((12, 20))]
    made = collate(full, FULL)
    assert isinstance(made.law, DenseLaw)
    row = made.law.take(made.law_row[1, 9:10]).logp.double().exp()
    expected = torch.tensor(chain()[int(full[1].tokens[9])])[None]
    torch.testing.assert_close(row, expected, rtol=0.05, atol=1e-4)  # bf16 logits
    torch.testing.assert_close(row.sum(-1), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-6)


def test_packed_rows_hold_every_sequence_whole_with_its_own_law_and_turns() -> None:
    records = [*RECORDS, record("long", num_tokens=40), record("last", num_tokens=9)]
    plain, packed = collate(records, LAYOUT), collate(records, LAYOUT, pack_tokens=30)
    assert packed.first is not None
    assert isinstance(packed.law, SparseLaw)
    assert isinstance(plain.law, SparseLaw)
    # the longest decides how long rows are at the least
    assert packed.tokens.shape == (3, 40)
    assert packed.length.tolist() == [40, 39, 9]
    assert sorted(packed.ids) == sorted(plain.ids)
    starts = [
        (b, t)
        for b in range(3)
        for t in range(40)
        if packed.first[b, t] == t and t < packed.length[b]
    ]
    assert len(starts) == 5
    for (b, at), name in zip(starts, packed.ids, strict=True):
        r = next(x for x in records if x.id == name)
        row, rows = plain.ids.index(name), slice(at, at + len(r.tokens))
        own = slice(0, len(r.tokens))
        assert packed.tokens[b, rows].tolist() == r.tokens.tolist()
        assert (packed.first[b, rows] == at).all()
        assert packed.position[b, rows].tolist() == list(range(len(r.tokens)))
        for what in ("token_logp", "hidden", "last_hidden"):
            assert torch.equal(getattr(packed, what)[b, rows], getattr(plain, what)[row, own])
        own_rows = (packed.law_row[b, rows] >= 0).nonzero().squeeze(1)
        assert own_rows.tolist() == np.flatnonzero(supervised(r.turn)).tolist()
        mine = packed.law.take(packed.law_row[b, rows][own_rows])
        same = plain.law.take(plain.law_row[row, own][own_rows])
        assert torch.equal(mine.ids, same.ids)
        assert torch.equal(mine.weight, same.weight)
    turns = [packed.turn[1, t].item() for t in range(39) if packed.turn[1, t] >= 0]
    assert len(set(turns)) == 3  # of three sequences of one turn each
    for depth in range(3):
        assert len(packed.pairs(depth).anchor) == len(plain.pairs(depth).anchor)


def test_records_read_without_their_law_give_a_batch_without_one(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=4)
    records = Cache.open(tmp_path / "c.zarr").records([0, 1], arrays={"tokens", "turn"})
    made = collate(records, LAYOUT)
    assert made.law is None
    assert made.hidden is None


def test_pairs_of_every_depth_meet_the_law_of_their_position() -> None:
    made, law = batch()
    chained = torch.tensor(chain())
    for depth in (0, 1, 3):
        pairs = made.pairs(depth)
        last = made.tokens.flatten()[pairs.anchor + 1 + depth]
        p = chained[last]
        own = law.take(pairs.row)
        torch.testing.assert_close(own.p.double(), p[own.rows(), own.ids], rtol=0.02, atol=1e-3)
        exact = p[torch.arange(len(last)), pairs.token].log().float()
        torch.testing.assert_close(pairs.logp, exact, rtol=1e-5, atol=1e-6)


def test_sparse_terms_estimate_the_terms_of_the_full_law() -> None:
    # many draws of samples; the only bias left is the rounding of stored p
    z = torch.randn(V, V, generator=torch.Generator().manual_seed(3))
    errors = []
    for draw in range(60):
        made = collate([record("x", num_tokens=30, samples=4, seed=draw)], LAYOUT)
        assert isinstance(made.law, SparseLaw)
        last = made.tokens.flatten()[(made.law_row.flatten() >= 0).nonzero().squeeze(1)]
        exact = terms(z[last], DenseLaw(torch.tensor(chain())[last].log()))
        sampled = made.law.bucket == 0
        errors.append(
            torch.stack(
                [
                    (a - b)[sampled].mean()
                    for a, b in zip(terms(z[last], made.law), exact, strict=True)
                ]
            )
        )
    kl, alpha = torch.stack(errors).mean(0).tolist()
    assert abs(alpha) < 2e-3
    assert abs(kl) < 2e-2


def test_the_order_comes_from_the_seed_and_no_sequence_is_dropped(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=14)
    cache = Cache.open(tmp_path / "c.zarr")

    def order(seed: int, stage: str = "train") -> list[str]:
        batches = training_batches(
            cache, seed=seed, batch_sequences=4, steps=7, needs=Needs(), stage=stage
        )
        return [i for b in batches for i in b.ids]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, "warmup")
    assert len(order(0)) == 28
    # 14 is no multiple of 4: the short end of the first epoch opens the fourth batch
    assert len(set(order(0)[:14])) == len(set(order(0)[14:])) == 14


def test_only_what_the_draft_needs_is_read(tmp_path: Path) -> None:
    assert arrays(LAYOUT, Needs()) & {"hidden", "last_hidden", "logits"} == set()
    assert "hidden" in arrays(LAYOUT, Needs(num_layers=3))
    assert "last_hidden" in arrays(LAYOUT, Needs(last_hidden=True))
    assert "topk_ids" not in arrays(FULL, Needs())
    write_cache(tmp_path / "c.zarr", num_sequences=3)
    needs = Needs(last_hidden=True)
    cache = Cache.open(tmp_path / "c.zarr")
    made = next(training_batches(cache, seed=0, batch_sequences=2, steps=1, needs=needs))
    assert made.hidden is None
    assert made.last_hidden is not None


def test_heldout_batches_are_fixed_and_spread_over_the_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=10)
    cache = Cache.open(tmp_path / "c.zarr")
    made = heldout_batches(cache, batch_sequences=2, sequences=5, needs=Needs())
    assert [b.ids for b in made] == [("train-0", "train-2"), ("train-4", "train-6"), ("train-8",)]
    everything = heldout_batches(cache, batch_sequences=20, sequences=99, needs=Needs())
    assert len(everything[0].ids) == 10


def test_supervised_tokens_are_counted(tmp_path: Path) -> None:
    records = write_cache(tmp_path / "c.zarr", num_sequences=5)
    assert Cache.open(tmp_path / "c.zarr").num_parts == 1
    write_cache(tmp_path / "more.zarr", num_sequences=5, part_tokens=40)
    cache = Cache.open(tmp_path / "more.zarr")
    assert cache.num_parts > 1
    counts = supervised_counts(cache)
    expected = np.zeros(V, dtype=int)
    for r in records:
        for t in range(1, len(r.tokens)):
            if r.turn[t] >= 0 and r.turn[t] == r.turn[t - 1]:
                expected[r.tokens[t]] += 1
    assert counts.tolist() == expected.tolist()


def test_a_cache_without_the_layers_is_refused_with_the_parameter_to_set() -> None:
    sentence = (
        r"a cache with 3 captured layers; expected the 2 that this draft reads; give "
        r"capture\.hidden_layers 2 layer ids in params\.yaml and run dvc repro, which reruns"
    )
    with pytest.raises(DraftError, match=sentence):
        require(LAYOUT, Needs(num_layers=2))
    require(LAYOUT, Needs(num_layers=3))


def test_a_cache_without_last_hidden_is_refused_with_the_parameter_to_set() -> None:
    with pytest.raises(DraftError, match=r"without last_hidden; .* set capture\.last_hidden: true"):
        require(Layout("topk", V, D, (), last_hidden=False), Needs(last_hidden=True))


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=0)
    cache = Cache.open(tmp_path / "c.zarr")
    batches = training_batches(cache, seed=0, batch_sequences=2, steps=1, needs=Needs())
    with pytest.raises(DraftError, match=r"a cache without sequences; expected at least one"):
        list(islice(batches, 1))


def test_the_order_is_that_of_the_caches_own_epochs(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=20, part_tokens=100)
    cache = Cache.open(tmp_path / "c.zarr")
    assert cache.num_parts > 3
    for seed in range(3):
        order = [cache.ids[i] for run in epoch_runs(cache, seed) for i in run.tolist()]
        assert order == [r.id for r in cache.epoch(seed, arrays={"tokens"})]


def test_a_later_step_reads_what_an_unbroken_run_reads(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=10)
    cache = Cache.open(tmp_path / "c.zarr")
    plan = {"seed": 1, "batch_sequences": 4, "steps": 9, "needs": Needs()}
    whole = [b.ids for b in training_batches(cache, **plan)]
    for step in (1, 4, 8, 9):
        assert [b.ids for b in training_batches(cache, **plan, first_step=step)] == whole[step:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_passes_and_ranks_cut_the_same_steps(tmp_path: Path, ranks: int) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=10)
    cache = Cache.open(tmp_path / "c.zarr")
    plan = {"seed": 1, "batch_sequences": 6, "steps": 4, "needs": Needs()}
    whole = [b.ids for b in training_batches(cache, **plan)]
    shares = [
        [
            b.ids
            for b in training_batches(cache, **plan, micro_batch_sequences=3, rank=(rank, ranks))
        ]
        for rank in range(ranks)
    ]
    assert {len(share) for share in shares} == {8}
    for step, ids in enumerate(whole):
        passes = [sum((s[n] for s in shares), ()) for n in (2 * step, 2 * step + 1)]
        assert passes == [ids[:3], ids[3:]]


def test_ranks_share_the_held_out_sequences_and_none_goes_without(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", num_sequences=7)
    cache = Cache.open(tmp_path / "c.zarr")
    plan = {"batch_sequences": 4, "sequences": 7, "needs": Needs()}
    alone = {i for b in heldout_batches(cache, **plan) for i in b.ids}
    shares = [
        [i for b in heldout_batches(cache, **plan, rank=(r, 3)) for i in b.ids] for r in range(3)
    ]
    assert sorted(i for share in shares for i in share) == sorted(alone)
    with pytest.raises(
        DraftError, match=r"7 held-out sequences for 8 training ranks; .* lower ranks"
    ):
        heldout_batches(cache, **plan, rank=(0, 8))
