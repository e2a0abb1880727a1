"""Generators are named: equal names give equal draws, other names independent ones."""

import torch

from pipeline.seeds import generator, rng, uniforms


def test_equal_names_give_equal_draws() -> None:
    one, two = (torch.rand(5, generator=generator(3, "init", 7)) for _ in range(2))
    assert torch.equal(one, two)
    assert rng(3, "a").integers(1 << 60) == rng(3, "a").integers(1 << 60)


def test_every_part_of_the_name_and_the_seed_matter() -> None:
    names = [(0, "a", 1), (1, "a", 1), (0, "a", 2), (0, "b", 1), (0, "a"), (0, "a1"), (0, "a,", 1)]
    draws = {float(uniforms(seed, *rest, n=1)) for seed, *rest in names}
    assert len(draws) == len(names)


def test_uniforms_are_float64_in_the_unit_interval_and_extend_a_shorter_call() -> None:
    drawn = uniforms(0, "tail", "heldout", 17, n=10_000)
    assert drawn.dtype == torch.float64
    assert bool((drawn >= 0).all())
    assert bool((drawn < 1).all())
    assert abs(float(drawn.mean()) - 0.5) < 0.02  # 7 standard errors
    assert torch.equal(uniforms(0, "tail", "heldout", 17, n=4), drawn[:4])


def test_known_draw() -> None:
    """A change here changes every sample of every project."""
    assert uniforms(0, "golden", n=1).item() == 0.2625712709039012
