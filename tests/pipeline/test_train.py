"""The loop: it learns, repeats to the bit, treats all losses alike, and stops where it must."""

import threading
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import parse, read_params
from pipeline.dataset import collate, training_batches
from pipeline.depths import depth_terms
from pipeline.draft import Draft, Needs, find
from pipeline.interface import Shape
from pipeline.loss import find as find_loss
from pipeline.optimizer import AdamW
from pipeline.terms import terms
from pipeline.train import (
    FitConfig,
    Fitted,
    WarmupConfig,
    evaluate,
    fit,
    reading,
    write_curve,
)
from storage.errors import ConfigError, CorruptPart, DraftError
from tests.caches import LAYOUT, D, V, record
from tests.golden.curves import inputs_of

LM = {
    "kind": "lm",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 24,
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}
CONFIG: dict[str, Any] = {
    "steps": 40,
    "lr": 2e-2,
    "lr_warmup_steps": 4,
    "lr_final": 0.05,
    "batch_sequences": 4,
    "betas": [0.9, 0.95],
    "weight_decay": 0.01,
    "clip": 1.0,
    "depth_weights": "decay",
    "depth_decay": 0.8,
    "heldout_sequences": 8,
    "log_every": 10,
    "micro_batch_sequences": None,
    "pack_tokens": None,
    "checkpoint_depths": False,
    "target_law": None,
    "dtype": "float32",
    "ranks": 1,
    "sharding": "ddp",
    "threads": 1,
}


def batches(num: int, *, seed: int = 0) -> list[Batch]:
    return [
        collate([record(f"{seed}-{i}-{b}", num_tokens=20 + b) for b in range(4)], LAYOUT)
        for i in range(num)
    ]


DATA = batches(10)
HELDOUT = batches(2, seed=9)


def draft(section: dict[str, Any] = LM, *, seed: int = 0) -> Draft:
    module = find(section["kind"])
    built: Draft = module.Model.build(module.Config(**section), Shape(V, D), None, seed)
    return built


def loss_of(kind: str, **parameters: Any) -> Any:
    module = find_loss(kind)
    return partial(module.loss, config=module.Config(kind=kind, **parameters))


def train(model: Draft, *, loss: Any = None, steps: int = 40, **over: Any) -> Fitted:
    config = FitConfig(**{**CONFIG, **over})
    data = (DATA * 8)[: steps + 3]
    loss = loss or loss_of("kl")
    return fit(model, data, heldout=HELDOUT, loss=loss, config=config, depth=1, steps=steps)


def test_a_draft_learns_the_law_of_the_cache() -> None:
    model = draft()
    before = evaluate(model, HELDOUT, 1)
    fitted = train(model, steps=70)
    assert fitted.metrics["heldout_alpha"] > before["heldout_alpha"] + 0.1
    assert fitted.metrics["heldout_kl"] < before["heldout_kl"] - 0.5
    assert fitted.curve[-1]["kl"] < fitted.curve[0]["kl"]
    assert not model.training


def test_two_runs_give_the_same_bits() -> None:
    first, second = draft(), draft()
    assert train(first).curve == train(second).curve
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("objective", ["tv", "lk_alpha", "lk_lambda"])
def test_each_objective_raises_acceptance_from_a_shared_start(objective: str) -> None:
    model = draft()
    train(model, steps=20)
    start = evaluate(model, HELDOUT, 1)["heldout_alpha"]
    parameters = {"eta": 3.0} if objective == "lk_lambda" else {}
    fitted = train(model, loss=loss_of(objective, **parameters), steps=30, lr=5e-3)
    assert fitted.metrics["heldout_alpha"] > start


def test_the_curve_has_a_row_every_log_step_and_a_few_held_out_looks() -> None:
    fitted = train(draft(), steps=25)
    assert [row["step"] for row in fitted.curve] == [7, 10, 13, 19, 20, 25]
    looks = [row["step"] for row in fitted.curve if "heldout_alpha" in row]
    assert looks == [7, 13, 19, 25]
    assert fitted.curve[-1]["lr"] == pytest.approx(2e-2 * 0.05)


def test_metrics_count_what_was_read() -> None:
    fitted = train(draft(), steps=3)
    seen = DATA[:3]
    assert fitted.metrics["steps"] == 3
    assert fitted.metrics["tokens"] == sum(int(b.length.sum()) for b in seen)
    assert fitted.metrics["supervised"] == sum(len(b.pairs(0).anchor) for b in seen)
    assert fitted.metrics["uncovered"] == 0
    assert fitted.metrics["parameters"] == sum(p.numel() for p in draft().parameters())
    assert fitted.metrics["train_alpha"] == pytest.approx(fitted.curve[-1]["alpha"])


def test_no_steps_keep_the_fresh_draft_and_still_score_it() -> None:
    model, fresh = draft(), draft()
    fitted = train(model, steps=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    assert fitted.metrics["heldout_alpha"] == fitted.curve[0]["heldout_alpha"] > 0
    assert fitted.metrics["train_loss"] is None
    assert fitted.metrics["steps"] == fitted.metrics["tokens"] == 0


class Pruned(torch.nn.Module):
    """Two depths over a draft vocabulary without most of the ids."""

    def __init__(self, d2t: Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(V, len(d2t)))
        self.register_buffer("d2t", d2t)

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(depth):
            last = batch.tokens.flatten()[batch.pairs(k).anchor + 1 + k]
            yield torch.nn.functional.embedding(last, self.table), torch.eye(self.table.shape[1])


def test_depths_of_different_length_are_masked_and_uncovered_pairs_counted() -> None:
    model: Any = Pruned(torch.tensor([0, 1]))
    _, alpha, mask = depth_terms(model, DATA[0], 3)
    assert mask.sum(1).tolist() == [len(DATA[0].pairs(k).anchor) for k in range(3)]
    assert mask.sum(1).unique().numel() == 3
    assert not alpha[~mask].any()
    config = FitConfig(**CONFIG)
    fitted = fit(
        model, DATA, heldout=HELDOUT, loss=loss_of("lk_alpha"), config=config, depth=3, steps=5
    )
    assert 0 < fitted.metrics["uncovered"] < fitted.metrics["supervised"]
    assert fitted.metrics["uncovered"] == sum(
        int((a == 0)[m].sum()) for _, a, m in (depth_terms(model, b, 3) for b in DATA[:5])
    )


def test_a_batch_without_supervised_tokens_changes_nothing_and_stops_nothing() -> None:
    empty = collate([record("x", num_tokens=6, num_prompt=6)], LAYOUT)
    config = FitConfig(**{**CONFIG, "weight_decay": 0.0})
    model, fresh = draft(), draft()
    fitted = fit(
        model, [empty], heldout=HELDOUT, loss=loss_of("kl"), config=config, depth=1, steps=1
    )
    assert fitted.metrics["train_loss"] == 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )


def test_a_step_without_supervised_tokens_is_skipped_and_counted() -> None:
    empty = collate([record("x", num_tokens=6, num_prompt=6)], LAYOUT)
    config = FitConfig(**{**CONFIG, "weight_decay": 0.5})
    whole, holed = draft(), draft()
    both = {"heldout": HELDOUT, "loss": loss_of("kl"), "config": config, "depth": 1}
    # the rate of a step is its own: a skipped step takes no part in the moments
    first = fit(whole, [empty, DATA[0]], steps=2, **both)
    assert first.metrics["skipped"] == 1
    assert first.curve[0]["loss"] == 0
    rates = [2e-2 * 2 / 4]
    moved = AdamW(list(holed.parameters()), (0.9, 0.95), weight_decay=0.5)
    kl, _, mask = depth_terms(holed, DATA[0], 1)
    (kl.sum() / mask.sum()).backward()
    moved.clip(1.0)
    moved.step(rates[0])
    for a, b in zip(whole.parameters(), holed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_averages_the_losses_of_its_passes() -> None:
    rows = [record(f"m{i}", num_tokens=12 + 5 * i) for i in range(4)]
    passes = [collate(rows[:2], LAYOUT), collate(rows[2:], LAYOUT)]
    config = FitConfig(**{**CONFIG, "micro_batch_sequences": 2})
    loss = loss_of("lk_lambda", eta=3.0)
    model, plain = draft(), draft()
    fitted = fit(model, passes, heldout=HELDOUT, loss=loss, config=config, depth=1, steps=1)
    total = torch.zeros(())
    for batch in passes:  # λ is each pass's own, and so is the denominator
        kl, alpha, mask = depth_terms(plain, batch, 1)
        total = total + loss(kl, alpha, mask)[mask].mean() / 2
    total.backward()
    optimizer = AdamW(list(plain.parameters()), (0.9, 0.95), weight_decay=0.01)
    optimizer.clip(1.0)
    optimizer.step(2e-2 / 4)
    assert fitted.metrics["train_loss"] == pytest.approx(total.item(), rel=1e-6)
    assert fitted.metrics["tokens"] == sum(len(r.tokens) for r in rows)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_halves_and_keeps_whole_weights() -> None:
    whole, half = draft(), draft()
    exact, rounded = train(whole, steps=30), train(half, steps=30, dtype="bfloat16")
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert rounded.curve != exact.curve
    # bfloat16 keeps 8 bits, 0.4 % a product; 30 steps move the curve by 0.2 % (measured)
    for a, b in zip(exact.curve, rounded.curve, strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=0.02)


@pytest.mark.parametrize("kind", ["lm", "medusa", "eagle3"])
def test_every_draft_makes_bfloat16_logits_under_autocast(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = inputs_of(kind, None).fresh(0), []

    def watched(logits: Tensor, *args: Any, **named: Any) -> tuple[Tensor, ...]:
        seen.append(logits.dtype)
        return terms(logits, *args, **named)

    monkeypatch.setattr("pipeline.depths.terms", watched)
    kl, alpha, mask = depth_terms(model, DATA[0], 2 - model.shifts, dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    monkeypatch.undo()
    assert (kl.dtype, alpha.dtype) == (torch.float64, torch.float64)
    exact, *_ = depth_terms(model, DATA[0], 2 - model.shifts)
    torch.testing.assert_close(kl[mask].mean(), exact[mask].mean(), rtol=0.02, atol=0)


def test_an_exploding_pass_names_the_sequences_of_its_step_so_far() -> None:
    passes = iter(range(100))

    def loss(kl: Tensor, alpha: Tensor, mask: Tensor) -> Tensor:
        return kl * (float("nan") if next(passes) == 3 else 1.0)

    config = FitConfig(**{**CONFIG, "batch_sequences": 8, "micro_batch_sequences": 4})
    with pytest.raises(DraftError, match=r"at step 2 on sequences 0-2-0, .*, 0-3-3; expected"):
        fit(draft(), DATA, heldout=HELDOUT, loss=loss, config=config, depth=1, steps=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_a_loss_that_is_not_finite_stops_with_the_sequences_of_its_batch(bad: float) -> None:
    steps = iter(range(100))

    def loss(kl: Tensor, alpha: Tensor, mask: Tensor) -> Tensor:
        return kl * (bad if next(steps) == 2 else 1.0)

    sentence = r"train: loss (nan|inf|1e\+\d+|[0-9.e+]+) at step 3 on sequences 0-2-0, 0-2-1, 0-2-2"
    model = draft()
    with pytest.raises(DraftError, match=sentence):
        train(model, loss=loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_non_finite_features_stop_the_run() -> None:
    model = draft()
    with torch.no_grad():
        next(model.parameters())[3] = float("nan")
    with pytest.raises(DraftError, match=r"expected a finite loss .*; lower lr in params\.yaml"):
        train(model)


def test_the_curve_is_csv_with_empty_cells_where_nothing_was_looked_up(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [
        {"step": 10, "loss": 1.5, "kl": 1.25, "alpha": 1 / 3, "lr": 1e-3},
        {"step": 20, "heldout_kl": 2.0, "heldout_alpha": 0.5},
    ]
    write_curve(tmp_path / "a" / "curve.csv", rows)
    assert (tmp_path / "a" / "curve.csv").read_text() == (
        "step,loss,kl,alpha,lr,heldout_kl,heldout_alpha\n"
        "10,1.5,1.25,0.333333,0.001,,\n"
        "20,,,,,2,0.5\n"
    )


def test_the_sections_of_the_shipped_parameters_are_read(request: pytest.FixtureRequest) -> None:
    params = read_params(request.config.rootpath / "params.yaml")
    assert parse("train", params["train"], FitConfig).steps > 0
    assert parse("warmup", params["warmup"], WarmupConfig).loss == "kl"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, r"train\.lr is 0\.0; expected input should be greater than 0"),
        ({"steps": -1}, r"train\.steps is -1; expected input should be greater than or equal to 0"),
        ({"betas": [0.9]}, r"train\.betas is \[0\.9\]; expected list should have at least 2"),
        ({"betas": [0.9, 1.0]}, r"train\.betas\.1 is 1\.0; expected .* less than 1"),
        ({"depth_decay": 1.1}, r"train\.depth_decay is 1\.1; .* less than or equal to 1"),
        ({"batch_sequences": 2.5}, r"train\.batch_sequences is 2\.5; expected .*integer"),
        ({"micro_batch_sequences": 3}, r"micro_batch_sequences divides batch_sequences"),
        ({"ranks": 5}, r"a pass and the held-out look have a sequence for each of the ranks"),
        ({"micro_batch_sequences": 2, "ranks": 3}, r"a sequence for each of the ranks"),
        ({"dtype": "float16"}, r"train\.dtype is 'float16'; expected .*'float32' or 'bfloat16'"),
        ({"sharding": "zero"}, r"train\.sharding is 'zero'; expected .*'ddp' or 'fsdp'"),
        ({"momentum": 0.9}, r"train\.momentum is unknown; expected only parameters that a stage"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse("train", {**CONFIG, **change}, FitConfig)


def test_collation_is_the_only_reader_of_the_law() -> None:
    # a cache opened without its law must not train silently on nothing
    blind = Batch(**{**DATA[0].__dict__, "law": None})
    with pytest.raises(AssertionError, match="training reads the law"):
        depth_terms(draft(), blind, 1)


@pytest.mark.parametrize(("device", "ahead"), [("cpu", False), ("cuda", True)])
def test_batches_are_made_ahead_where_another_device_computes(device: str, ahead: bool) -> None:
    threads = set()

    def made() -> Generator[Batch, None, None]:
        for batch in DATA[:3]:
            threads.add(threading.get_ident())
            yield batch
        raise CorruptPart(found="part-00000/tokens is gone", expected="a file", todo="look")

    read = reading(made(), device)
    assert [next(read).ids for _ in range(3)] == [b.ids for b in DATA[:3]]
    with pytest.raises(CorruptPart, match=r"part-00000/tokens is gone; expected a file; look"):
        next(read)
    assert (threads != {threading.get_ident()}) == ahead


def test_training_batches_come_in_the_same_order_for_every_loss(tmp_path: Path) -> None:
    from storage.reader import Cache
    from tests.caches import write_cache

    write_cache(tmp_path / "c.zarr")
    seen: list[tuple[str, ...]] = []
    for objective in ("kl", "tv"):
        cache = Cache.open(tmp_path / "c.zarr")
        data = training_batches(cache, seed=1, batch_sequences=4, steps=6, needs=Needs())
        ids: list[str] = []

        def watched(source: Iterator[Batch] = data, into: list[str] = ids) -> Iterator[Batch]:
            for b in source:
                into.extend(b.ids)
                yield b

        config = FitConfig(**CONFIG)
        loss = loss_of(objective)
        fit(draft(), watched(), heldout=HELDOUT, loss=loss, config=config, depth=1, steps=6)
        seen.append(tuple(ids))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 24


def test_a_loss_with_a_term_of_its_own_trains_and_kl_and_alpha_stay_in_the_curve() -> None:
    model = draft()
    before = evaluate(model, HELDOUT, 1)["heldout_alpha"]
    config = FitConfig(**{**CONFIG, "depth_weights": "survival", "depth_decay": 1.0})
    loss = loss_of("jsd")
    fitted = fit(
        model, DATA * 4, heldout=HELDOUT, loss=loss, config=config, depth=1, steps=40, extra=["jsd"]
    )
    assert fitted.metrics["heldout_alpha"] > before + 0.05
    assert 0 < fitted.curve[-1]["loss"] < 0.7 < fitted.curve[0]["kl"]
