"""What the paper reports is kept as it stands there: its own means follow from our rows."""

import pytest

from pipeline.literature import BY_KIND, EAGLE3, KL, Loss, loss_of


@pytest.mark.parametrize(
    ("kind", "loss", "temperature", "percent"),
    [
        ("eagle3", Loss("lk_lambda", 3.0), 1, 3.8),
        ("eagle3", Loss("lk_alpha"), 1, 3.3),
        ("eagle3", Loss("tv"), 1, -22),
        ("eagle3", Loss("tv"), 0, -27),
        ("eagle3", Loss("lk_fixed", 0.5), 1, 0.7),
        ("medusa", Loss("lk_lambda", 10.0), 1, 7.8),
        ("mlp", Loss("lk_lambda", 3.0), 1, 8.3),
        ("mlp", Loss("lk_lambda", 3.0), 0, 6.6),
        ("mtp", Loss("lk_lambda", 3.0), 1, 5.6),
    ],
)
def test_gains_are_those_of_the_paper_s_summary(
    kind: str, loss: Loss, temperature: float, percent: float
) -> None:
    """Its Table 2 and headline, which it rounds on its own."""
    gain = BY_KIND[kind].gain(loss, temperature)
    assert gain is not None
    assert 100 * gain == pytest.approx(percent, abs=0.5 if abs(percent) > 20 else 0.2)


def test_a_row_that_the_paper_lacks_has_no_gain() -> None:
    assert BY_KIND["medusa"].gain(Loss("lk_lambda", 3.0), 1) is None
    assert EAGLE3.gain(Loss("jsd"), 1) is None
    assert EAGLE3.gain(KL, 0.5) is None
    assert EAGLE3.gain(KL, 1) == 0


def test_a_loss_is_told_by_its_kind_and_setting() -> None:
    assert loss_of({"kind": "lk_lambda", "eta": 10, "scope": "depth"}) == Loss("lk_lambda", 10.0)
    assert loss_of({"kind": "lk_fixed", "weight": 0.5}) == Loss("lk_fixed", 0.5)
    assert loss_of({"kind": "tv"}) == Loss("tv")
