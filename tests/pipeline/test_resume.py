"""A killed run goes on where it was saved: to the same bits, from what is whole, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import resume
from pipeline.ranks import Ranks
from pipeline.resume import STATE, Keeper
from pipeline.train import FitConfig, fit_from_cache
from storage.workspace import read_json
from tests.caches import write_cache
from tests.golden.curves import inputs_of, loss_of
from tests.stages.training import FIT

CONFIG = {**FIT, "steps": 9, "log_every": 2, "batch_sequences": 4, "micro_batch_sequences": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache, and a checkpoint after every step."""
    write_cache(tmp_path / "train.zarr", num_sequences=10)
    monkeypatch.setattr(resume, "EVERY_S", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)
    return tmp_path


def run(folder: Path, *, loss: Any = None, kind: str = "lm", keep: bool = True) -> dict[str, Any]:
    inputs = inputs_of(kind, folder)
    draft = inputs.fresh(0)
    fitted = fit_from_cache(
        draft,
        inputs,
        loss=loss or loss_of("lk_lambda", eta=3.0),
        config=FitConfig(**CONFIG),
        seed=0,
        stage="train",
        cell=kind,
        resume=folder / "state" if keep else None,
    )
    weights = {name: tensor.flatten().tolist() for name, tensor in draft.trainable().items()}
    return {"curve": fitted.curve, "metrics": fitted.metrics, "weights": weights}


def stopping(passes: int, loss: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A loss that is interrupted in a pass."""
    count, inner = iter(range(1000)), loss or loss_of("lk_lambda", eta=3.0)

    def stops(*terms: Tensor) -> Tensor:
        if next(count) == passes:
            raise InterruptedError
        return inner(*terms)

    return stops


@pytest.mark.parametrize(("kind", "passes"), [("lm", 2), ("lm", 11), ("medusa", 8), ("eagle3", 7)])
def test_an_interrupted_run_ends_at_the_same_bits(folder: Path, kind: str, passes: int) -> None:
    unbroken = run(folder, kind=kind, keep=False)
    with pytest.raises(InterruptedError):
        run(folder, kind=kind, loss=stopping(passes))
    state = read_json(folder / "state" / STATE)
    assert state["loop"]["step"] == passes // 2
    assert run(folder, kind=kind) == unbroken


def test_what_a_loss_draws_goes_on_from_the_saved_generator(folder: Path) -> None:
    def noisy(kl: Tensor, alpha: Tensor, mask: Tensor) -> Tensor:
        return kl * (1 + torch.rand(()))

    torch.manual_seed(1)
    unbroken = run(folder, loss=noisy, keep=False)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(folder, loss=stopping(9, noisy))
    torch.manual_seed(2)
    assert run(folder, loss=noisy) == unbroken


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_not_used(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    unbroken = run(folder, keep=False)
    with pytest.raises(InterruptedError):
        run(folder, loss=stopping(6))
    file = folder / "state" / read_json(folder / "state" / STATE)["file"]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    capsys.readouterr()
    assert run(folder) == unbroken
    assert "is damaged and not used: training starts from its first" in capsys.readouterr().err


def test_a_kill_while_saving_leaves_the_older_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, write = run(folder, keep=False), resume.write_json

    def killed(path: Path, value: dict[str, Any]) -> None:
        if value["loop"]["step"] == 4:
            raise InterruptedError
        write(path, value)

    monkeypatch.setattr(resume, "write_json", killed)
    with pytest.raises(InterruptedError):
        run(folder)
    assert len(list((folder / "state").glob("step-*.safetensors"))) == 2
    assert read_json(folder / "state" / STATE)["loop"]["step"] == 3
    monkeypatch.setattr(resume, "write_json", write)
    assert run(folder) == unbroken
    assert len(list((folder / "state").glob("step-*.safetensors"))) == 1


def test_a_short_run_saves_nothing_and_slow_disks_are_asked_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])

    def slow(*_: Any) -> None:
        now[0] += 10.0

    monkeypatch.setattr(resume, "_write", slow)
    keeper = Keeper(tmp_path, Ranks())
    now[0] += resume.EVERY_S - 1
    assert not keeper.due()
    now[0] += 1
    assert keeper.due()
    keeper.save({}, {"step": 1})
    now[0] += 10 * resume.SHARE - 1
    assert not keeper.due()
    now[0] += 1
    assert keeper.due()
    assert not Keeper(None, Ranks()).due()
