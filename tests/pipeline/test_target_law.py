"""Training for the served law: what p becomes, which rows are only bounded, what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.check import check_params
from pipeline.config import parse, read_params
from pipeline.dataset import collate
from pipeline.law import DenseLaw, SparseLaw
from pipeline.loss import find, require_law
from pipeline.serve import Serving
from pipeline.target_law import (
    cuts,
    is_sampled,
    needs_tail,
    require_tail,
    serve_all,
    serve_batch,
    served,
)
from pipeline.terms import terms
from pipeline.train import FitConfig, fit_from_cache
from storage.errors import ConfigError
from storage.reader import Cache
from storage.writer import plan_parts, seal, write_part
from tests.caches import FULL, LAYOUT, V, chain, record, write_cache
from tests.golden.curves import inputs_of, loss_of
from tests.stages.training import FIT


def law(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Serving:
    return Serving(temperature=temperature, top_k=top_k, top_p=top_p)


def slow(p_V: np.ndarray, serving: Serving) -> np.ndarray:
    """The served law of a row, id by id."""
    if serving.temperature == 0:
        return np.eye(len(p_V))[p_V.argmax()]
    p = p_V ** (1 / serving.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if serving.top_k is not None:
        p[order[serving.top_k :]] = 0
        p /= p.sum()
    if serving.top_p is not None:
        total = 0.0
        for v in order:
            if total >= serving.top_p:
                p[v] = 0
            total += p[v]
        p /= p.sum()
    return p


def expected(made: Any, serving: Serving) -> torch.Tensor:
    """[R, V] the served laws of a batch's rows, from the chain itself."""
    last = made.tokens.flatten()[(made.law_row.flatten() >= 0).nonzero().squeeze(1)]
    return torch.tensor(np.stack([slow(chain()[t].copy(), serving) for t in last.tolist()]))


Z = torch.randn(400, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "serving", [law(0), law(0.7, 3), law(1.5, 6), law(1, None, 0.5), law(0.6, 5, 0.8)]
)
def test_terms_of_a_truncated_cache_are_those_of_the_served_full_law(serving: Serving) -> None:
    made, exact = serve_batch(collate([record("a", num_tokens=60)], LAYOUT), serving, V)
    p_RV = expected(made, serving)
    assert made.law is not None
    z = Z[: len(p_RV)]
    found = terms(z, made.law)
    truth = terms(z, DenseLaw(p_RV.log()))
    # top-k and nuclei within the six kept ids; stored p is rounded to steps of sqrt(p)
    assert exact.float().mean() > 0.6
    assert exact.all() or serving.top_p is not None
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a[exact], b[exact], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("serving", [law(0), law(0.7), law(1.4), law(0.8, 9), law(0.6, 5, 0.8)])
def test_a_full_cache_is_served_exactly_at_any_temperature(serving: Serving) -> None:
    made, exact = serve_batch(collate([record("a", layout=FULL)], FULL), serving, V)
    assert exact.all()
    assert isinstance(made.law, DenseLaw)
    p_RV = expected(made, serving)
    torch.testing.assert_close(made.law.logp.double().exp(), p_RV, rtol=0.05, atol=2e-3)
    z = Z[: len(p_RV)].clone().requires_grad_()
    kl, alpha = terms(z, made.law)
    (kl.sum() + alpha.sum()).backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(z.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_a_temperature_alone_is_estimated_and_its_rows_are_counted(temperature: float) -> None:
    serving = law(temperature)
    errors = []
    for draw in range(30):
        plain = collate([record("x", num_tokens=40, samples=12, seed=draw)], LAYOUT)
        (made,), (bounded, rows) = serve_all([plain], serving, vocab_size=V)
        assert bounded == rows == plain.law.num_rows  # type: ignore[union-attr]
        assert isinstance(made.law, SparseLaw)
        assert plain.law is not None
        sampled = plain.law.bucket == 0  # type: ignore[union-attr]
        p_RV = expected(made, serving)
        z = Z[: len(p_RV)]
        both = zip(terms(z, made.law), terms(z, DenseLaw(p_RV.log())), strict=True)
        errors.append(torch.stack([(a - b)[sampled].mean() for a, b in both]))
    kl, alpha = torch.stack(errors).mean(0).tolist()
    assert abs(alpha) < 5e-3
    assert abs(kl) < 4e-2


def test_batches_are_served_one_by_one_and_their_source_is_closed() -> None:
    plain, closed = collate([record("a")], LAYOUT), []

    def source():  # type: ignore[no-untyped-def]
        try:
            yield plain
            yield plain
        finally:
            closed.append(True)

    stream = served(source(), law(0.5, 2), vocab_size=V)
    first = next(stream)
    assert isinstance(first.law, SparseLaw)
    assert int(first.law.entry_start.diff().max()) == 2
    assert torch.equal(first.token_logp, plain.token_logp)
    stream.close()
    assert closed
    assert list(served(source(), None, vocab_size=V))[1] is plain
    assert serve_all([plain], None, vocab_size=V) == ([plain], (0, 0))


def run(folder: Path, **over: Any) -> Any:
    inputs = inputs_of("lm", folder)
    draft = inputs.fresh(0)
    fitted = fit_from_cache(
        draft,
        inputs,
        loss=loss_of("kl"),
        config=FitConfig(**{**FIT, "steps": 60, "lr": 2e-2, "batch_sequences": 4, **over}),
        seed=0,
        stage="train",
        cell="lm",
    )
    return draft, fitted


def test_a_draft_learns_the_law_that_is_served(tmp_path: Path) -> None:
    write_cache(tmp_path / "train.zarr", num_sequences=12)
    plain, fitted = run(tmp_path)
    assert "heldout_bounded" not in fitted.metrics
    sharp, cold = run(tmp_path, target_law={"temperature": 0.5, "top_k": 4, "top_p": None})
    assert cold.metrics["heldout_bounded"] == 0
    batch = collate([record("x", num_tokens=200, num_prompt=2)], LAYOUT)
    wanted, _ = serve_batch(batch, law(0.5, 4), V)
    assert wanted.law is not None
    with torch.no_grad():
        alphas = [
            terms(next(iter(d.training_logits(batch, 1))), wanted.law.take(batch.pairs(0).row))[1]
            for d in (plain, sharp)
        ]
    assert alphas[1].mean() > alphas[0].mean() + 0.05
    _, warm = run(tmp_path, steps=2, target_law={"temperature": 1.2, "top_k": None, "top_p": None})
    assert warm.metrics["heldout_bounded"] == 1


def test_a_normaliser_without_samples_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    records = [record(f"{i}", samples=0) for i in range(4)]
    (tmp_path / "train.zarr").mkdir()
    cut = plan_parts([24] * 4, part_tokens=1000)
    parts = [
        write_part(tmp_path / "train.zarr", n, records[a:b], LAYOUT) for n, (a, b) in enumerate(cut)
    ]
    seal(tmp_path / "train.zarr", layout=LAYOUT, parts=parts, source={"target": "t"}, params={})
    assert not is_sampled(Cache.open(tmp_path / "train.zarr"))
    sentence = (
        r"train\.target_law: temperature 0\.7 without top_k on a truncated cache without tail "
        r"samples; expected something that tells the tail's share of the normaliser; set "
        r"capture\.tail_samples, which captures again, or give target_law a top_k"
    )
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path, target_law={"temperature": 0.7, "top_k": None, "top_p": None})
    _, fitted = run(tmp_path, steps=1, target_law={"temperature": 0.7, "top_k": 4, "top_p": None})
    assert fitted.metrics["heldout_bounded"] == 0
    for serving in (None, law(1), law(0), law(0.7, 20), law(1, None, 0.9)):
        require_tail("train", serving, sampled=False)
        assert not needs_tail(serving)


def test_caches_that_tell_their_tails_are_known(tmp_path: Path) -> None:
    write_cache(tmp_path / "a.zarr", num_sequences=3)
    write_cache(tmp_path / "b.zarr", layout=FULL, num_sequences=3)
    assert is_sampled(Cache.open(tmp_path / "a.zarr"))
    assert is_sampled(Cache.open(tmp_path / "b.zarr"))


def test_check_refuses_what_no_cache_of_these_parameters_will_tell(
    request: pytest.FixtureRequest,
) -> None:
    params = read_params(request.config.rootpath / "params.yaml")
    params["train"]["target_law"] = {"temperature": 0.7, "top_k": None, "top_p": 0.9}
    check_params(params)
    params["capture"]["tail_samples"] = 0
    with pytest.raises(ConfigError, match=r"train\.target_law: temperature 0\.7 without top_k"):
        check_params(params)
    params["train"]["target_law"]["top_k"] = 50
    check_params(params)


def test_a_loss_of_whole_laws_is_refused_where_the_served_law_is_cut() -> None:
    config = find("reverse_kl").Config(kind="reverse_kl")
    assert [cuts(x) for x in (None, law(1), law(0.7), law(1, None, 1.0))] == [False] * 4
    assert all(cuts(x) for x in (law(0), law(1, 5), law(1, None, 0.9)))
    require_law("r", config, "full", cut=False)
    sentence = (
        r"objective r \(loss reverse_kl\) with a train\.target_law that cuts; expected a law with "
        r"no id of probability 0.*; give target_law a temperature alone, or train kl"
    )
    with pytest.raises(ConfigError, match=sentence):
        require_law("r", config, "full", cut=True)
    require_law("kl", find("kl").Config(kind="kl"), "topk", cut=True)


def test_a_serving_law_is_read_strictly() -> None:
    config = {**FIT, "target_law": {"temperature": 0.7, "top_k": 20}}
    with pytest.raises(ConfigError, match=re.escape("train.target_law.top_p is missing")):
        parse("train", config, FitConfig)
