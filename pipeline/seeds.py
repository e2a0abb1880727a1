"""One seed of `params.yaml` -> independent generators, found by name.

A stage never shares one stream between two purposes or two units of work: what is drawn for
sequence 17 must not depend on how many workers there are or on what was drawn before. So every
draw names its purpose and its unit, `generator(config.seed, "tail", "heldout", 17)`, and the names
are hashed with the seed into a stream of its own.
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def _entropy(seed: int, names: tuple[object, ...]) -> int:
    """256 bits from the seed and the names; JSON keeps ("a", "b") apart from ("ab",)."""
    named = json.dumps([seed, *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(named.encode("utf-8")).digest(), "little")


def generator(seed: int, *names: object) -> torch.Generator:
    """A torch generator on the CPU.

    Its Mersenne twister keeps 32 bits of its seed: two of n names meet with a probability of about
    n²/2³³, so for one stream a sequence among millions take `uniforms`.
    """
    made = torch.Generator(device="cpu")
    made.manual_seed(_entropy(seed, names) & (2**63 - 1))
    return made


def rng(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator (PCG64) seeded with all 256 bits."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, names)))


def uniforms(seed: int, *names: object, n: int) -> Tensor:
    """[n] float64 in [0, 1); the first m of n are the m of a shorter call."""
    return torch.from_numpy(rng(seed, *names).random(n))
