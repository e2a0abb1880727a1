"""Exact expected rounds of speculative decoding on a cached rollout: no decoding, no target.

Pure: log-ratios in, expectations out; knows no draft, no cache, no prompt. float64 throughout.

Dims: E rollouts, S depths, N remaining tokens (padded), G numbers of drafted tokens γ = 1 … S.

**Positions.** A rollout is a response whose first token comes from the prefill and is not counted;
s = 0 … N_e − 1 indexes the remaining tokens, its end-of-sequence token included. A round at s
drafts the tokens s, s+1, …: depth k drafts the token s + k. `logr[e, k, s]` is log q/p of the
rollout's own token s + k, under the draft's law at depth k of a round that starts at s, given the
rollout up to there, and under the target's law. It is −inf where the draft cannot say the token
(a pruned vocabulary), and at T = 0 it is 0 where argmax q is the token and −inf elsewhere.

**Derivation** (DESIGN §7). Let the output x be distributed as the target's law p.

*Token verification* (Leviathan et al. 2023, Chen et al. 2023): the draft says x_i with probability
q(x_i), which is accepted with min(1, p/q), so x_i is emitted *as an accepted draft* with
min(q, p), and emitted at all with p. Given x, each token is therefore accepted with
a = min(1, q/p), independently of what came before, and i tokens in a row with Π_{l ≤ i} a_l.

*Block verification* (Sun et al. 2024): with P_0 = 1, P_i = min(1, P_{i−1} · p/q(X_i)) of the
drafted path X, the algorithm keeps at least i tokens with probability P_i given X_1 … X_i, so the
event "at least i kept, and they are x_1 … x_i" has probability Q_i = q(x_1 … x_i) · P_i. From it
the next token is x with q(x_1 … x_i) · min(q(x), P_i p(x)) as a kept draft and with
q(x_1 … x_i) · (P_i p(x) − q(x))₊ from the residual law: together Q_i p(x). Hence what follows the
event is distributed as p, and given x at least i tokens are kept with probability
    w_i = Q_i / p(x_1 … x_i) = Π_{l ≤ i} (q/p)_l · min_{j ≤ i} Π_{j < l ≤ i} (p/q)_l
        = min(1, min_{j ≤ i} Π_{l ≤ j} (q/p)_l).
It is never below the product of token verification, and depends on no γ ≥ i.

Either way the survival of a round given x depends on where the round starts and on nothing else:
the starts form a Markov chain, s → s + a + 1 after a accepted tokens and the corrected or bonus
one, and rounds, drafted and accepted tokens are sums over the visits of s. The last round counts
whole (γ drafted tokens, one target pass), while tokens beyond the end count nowhere:
τ = N / rounds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Replay:
    """Expectations over the draft's and the verifier's randomness, given each rollout."""

    rounds: Floats
    """[E, G] target passes after the prefill; column γ − 1 is γ."""
    kept: Floats
    """[E, G, S] rounds whose draft of depth k was accepted and emitted; 0 for k ≥ γ."""

    @property
    def drafted(self) -> Floats:
        """[E, G] drafted tokens, γ a round."""
        return self.rounds * np.arange(1, self.rounds.shape[1] + 1)

    @property
    def accepted(self) -> Floats:
        """[E, G] emitted tokens that were drafts."""
        total: Floats = self.kept.sum(-1)
        return total


def token_survival(logr_ESN: Floats) -> Floats:
    """[E, S, N] probability that depths 0 … k of a round at s are all accepted: Π min(1, q/p)."""
    survival: Floats = np.exp(np.cumsum(np.minimum(logr_ESN, 0.0), axis=1, dtype=np.float64))
    return survival


def block_survival(logr_ESN: Floats) -> Floats:
    """[E, S, N] the same under block verification: min(1, min_{j ≤ k} Π_{l ≤ j} q/p)."""
    path = np.cumsum(logr_ESN, axis=1, dtype=np.float64)
    survival: Floats = np.exp(np.minimum(np.minimum.accumulate(path, axis=1), 0.0))
    return survival


def replay(survival_ESN: Floats, remaining_E: Ints) -> Replay:
    """Expected rounds and accepted tokens for every γ = 1 … S at once.

    `survival` is that of `token_survival` or `block_survival`; entries whose token s + k lies at
    or beyond the end of the rollout (`remaining_E`, N_e ≤ N) are ignored.
    """
    num_rollouts, num_depths, num_tokens = survival_ESN.shape
    if remaining_E.shape != (num_rollouts,) or np.any(remaining_E > num_tokens):
        raise ValueError(
            f"remaining tokens {remaining_E.shape} up to {remaining_E.max(initial=0)} "
            f"do not fit a survival of {survival_ESN.shape}"
        )
    token_SN = np.arange(num_depths)[:, None] + np.arange(num_tokens)
    inside_ESN = token_SN < remaining_E[:, None, None]
    survival = np.where(inside_ESN, survival_ESN, 0.0)
    visits_EGN = _visits(survival, remaining_E)
    # a round at s with γ emits its draft of depth k < γ with the survival of (k, s)
    kept = np.einsum("egs,eks->egk", visits_EGN, survival, optimize=True)
    return Replay(rounds=visits_EGN.sum(-1), kept=np.tril(kept))


def _visits(survival_ESN: Floats, remaining_E: Ints) -> Floats:
    """[E, G, N] probability that a round starts at s, for each γ."""
    num_rollouts, num_depths, num_tokens = survival_ESN.shape
    ones = np.ones((num_rollouts, 1, num_tokens))
    # alive[:, a] = P(at least a accepted); exactly a with drop[:, a] for a < γ, γ with alive[:, γ]
    alive = np.concatenate([ones, survival_ESN], axis=1).transpose(2, 0, 1).copy()  # [N, E, S+1]
    drop = alive.copy()
    drop[..., :-1] -= alive[..., 1:]
    gamma_G, count_A = np.arange(1, num_depths + 1)[:, None], np.arange(num_depths + 1)
    short_GA, full_GA = (count_A < gamma_G).astype(np.float64), count_A == gamma_G
    starts = np.zeros((num_rollouts, num_depths, num_tokens + num_depths + 1))
    starts[:, :, 0] = 1.0
    for s in range(num_tokens):
        here_EG1 = starts[:, :, s, None] * (s < remaining_E)[:, None, None]
        exactly_EGA = np.where(full_GA, alive[s, :, None, :], drop[s, :, None, :] * short_GA)
        starts[:, :, s + 1 : s + num_depths + 2] += here_EG1 * exactly_EGA
    visits: Floats = starts[:, :, :num_tokens]
    return visits * (np.arange(num_tokens) < remaining_E[:, None])[:, None, :]
