"""Replay equals the verification algorithms themselves, enumerated and simulated."""

import itertools
from functools import cache
from time import process_time

import numpy as np
import pytest

from pipeline.replay import block_survival, replay, token_survival

V = 2
KINDS = ("any", "equal", "disjoint", "pruned", "sharp")


class Laws:
    """Random p(prefix) and q(depth, prefix) over `V` tokens, for prefixes up to `longest`."""

    def __init__(self, kind: str, *, longest: int, depths: int, seed: int, vocab: int = V) -> None:
        rng = np.random.default_rng(seed)
        self.vocab = vocab
        self.p = [rng.dirichlet(np.ones(vocab), vocab**n) for n in range(longest)]
        self.q = [
            [self._draft(kind, rng, p) if kind != "equal" else p for p in self.p]
            for _ in range(depths)
        ]
        if kind == "disjoint":  # p on the first token, q on the others
            self.p = [np.eye(vocab)[np.zeros(len(p), int)] for p in self.p]

    def _draft(self, kind: str, rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
        q = rng.dirichlet(np.full(self.vocab, 0.2 if kind == "sharp" else 1.0), len(p))
        if kind == "pruned":
            q[:, -1] = 0
        if kind == "disjoint":
            q[:, 0] = 0
        return q / q.sum(1, keepdims=True)

    def code(self, prefix: tuple[int, ...]) -> int:
        return int(sum(x * self.vocab**i for i, x in enumerate(prefix)))

    def target(self, prefix: tuple[int, ...]) -> np.ndarray:
        return self.p[len(prefix)][self.code(prefix)]

    def draft(self, depth: int, prefix: tuple[int, ...]) -> np.ndarray:
        return self.q[depth][len(prefix)][self.code(prefix)]

    def logr(self, path: tuple[int, ...]) -> np.ndarray:
        """[S, N] log q/p of the path's own tokens."""
        out = np.full((len(self.q), len(path)), -np.inf)
        for k, s in itertools.product(range(len(self.q)), range(len(path))):
            if s + k < len(path):
                with np.errstate(divide="ignore"):
                    before, x = path[: s + k], path[s + k]
                    out[k, s] = np.log(self.draft(k, before)[x]) - np.log(self.target(before)[x])
        return out


def token_outcomes(laws: Laws, prefix: tuple[int, ...], drafts: tuple[int, ...]):
    """(probability, a, law of the next token) of token verification, as published."""
    alive = 1.0
    for i, x in enumerate(drafts):
        p, q = laws.target(prefix + drafts[:i]), laws.draft(i, prefix + drafts[:i])
        keep = min(1.0, p[x] / q[x])
        residual = np.maximum(p - q, 0)
        if keep < 1:
            yield alive * (1 - keep), i, residual / residual.sum()
        alive *= keep
    yield alive, len(drafts), laws.target(prefix + drafts)


def block_outcomes(laws: Laws, prefix: tuple[int, ...], drafts: tuple[int, ...]):
    """The same of block verification: Sun et al. 2024, algorithm 2."""
    weight, hit, after = 1.0, [1.0], []
    for i in range(len(drafts) + 1):
        p = laws.target(prefix + drafts[:i])
        if i > 0:
            x = drafts[i - 1]
            before = prefix + drafts[: i - 1]
            weight = min(1.0, weight * laws.target(before)[x] / laws.draft(i - 1, before)[x])
        if i == len(drafts):
            hit.append(weight)
            after.append(p)
            break
        residual = np.maximum(weight * p - laws.draft(i, prefix + drafts[:i]), 0)
        total = residual.sum()
        if i > 0:
            hit.append(total / (total + 1 - weight) if total + 1 - weight > 0 else 1.0)
        after.append(residual / total if total > 0 else p)
    if len(drafts) == 0:
        hit = [1.0]
    for a in range(len(drafts) + 1):
        yield hit[a] * np.prod([1 - h for h in hit[a + 1 :]]), a, after[a]


def enumerate_rounds(laws: Laws, *, num_tokens: int, gamma: int, outcomes):
    """path -> (its probability as an output, E[rounds | path], E[accepted | path])."""

    @cache
    def ahead(prefix: tuple[int, ...]) -> dict[tuple[int, ...], np.ndarray]:
        if len(prefix) >= num_tokens:
            return {prefix[:num_tokens]: np.array([1.0, 0.0, 0.0])}
        found: dict[tuple[int, ...], np.ndarray] = {}
        for drafts in itertools.product(range(laws.vocab), repeat=gamma):
            said = np.prod([laws.draft(i, prefix + drafts[:i])[x] for i, x in enumerate(drafts)])
            if said == 0:
                continue
            for chance, a, law in outcomes(laws, prefix, drafts):
                accepted = min(a, num_tokens - len(prefix))
                for y, py in enumerate(law):
                    mass = said * chance * py
                    if mass == 0:
                        continue
                    for path, (m, r, k) in ahead(prefix + drafts[:a] + (y,)).items():
                        add = mass * np.array([m, m + r, m * accepted + k])
                        found[path] = found.get(path, 0) + add
        return found

    return {
        path: (mass, rounds / mass, accepted / mass)
        for path, (mass, rounds, accepted) in ahead(()).items()
        if mass > 1e-12
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("instrument", ["token", "block"])
def test_every_rollout_replays_as_enumerated(kind: str, instrument: str) -> None:
    outcomes = {"token": token_outcomes, "block": block_outcomes}[instrument]
    survival = {"token": token_survival, "block": block_survival}[instrument]
    num_tokens, depths = 4, 3
    laws = Laws(kind, longest=num_tokens + depths + 1, depths=depths, seed=5)
    for gamma in range(1, depths + 1):
        truth = enumerate_rounds(laws, num_tokens=num_tokens, gamma=gamma, outcomes=outcomes)
        assert sum(mass for mass, _, _ in truth.values()) == pytest.approx(1, abs=1e-12)
        for path, (mass, rounds, accepted) in truth.items():
            law = np.prod([laws.target(path[:i])[x] for i, x in enumerate(path)])
            assert mass == pytest.approx(law, rel=1e-9)  # the enumerated algorithm is lossless
            found = replay(survival(laws.logr(path)[None]), np.array([num_tokens]))
            assert found.rounds[0, gamma - 1] == pytest.approx(rounds, rel=1e-9)
            assert found.accepted[0, gamma - 1] == pytest.approx(accepted, rel=1e-9, abs=1e-12)


def simulate(laws: Laws, *, runs: int, num_tokens: int, gamma: int, seed: int):
    """Token verification by real draws: outputs [runs, N], rounds and accepted tokens [runs]."""
    rng = np.random.default_rng(seed)
    vocab = laws.vocab
    code, length = np.zeros(runs, int), np.zeros(runs, int)
    path = np.zeros((runs, num_tokens + gamma + 1), int)
    rounds, accepted = np.zeros(runs, int), np.zeros(runs, int)

    def rows(table: list[np.ndarray], length: np.ndarray, code: np.ndarray) -> np.ndarray:
        out = np.zeros((len(code), vocab))
        for n in np.unique(length):
            out[length == n] = table[n][code[length == n]]
        return out

    def pick(law: np.ndarray) -> np.ndarray:
        return (law.cumsum(1) < rng.random((len(law), 1)) * law.sum(1, keepdims=True)).sum(1)

    while (active := np.flatnonzero(length < num_tokens)).size:
        rounds[active] += 1
        alive = active
        for k in range(gamma):
            q = rows(laws.q[k], length[alive], code[alive])
            p = rows(laws.p, length[alive], code[alive])
            x = pick(q)
            row = np.arange(len(alive))
            keep = rng.random(len(alive)) < p[row, x] / q[row, x]
            x = np.where(keep, x, pick(np.maximum(p - q, 0) + 1e-300 * p))
            accepted[alive] += keep & (length[alive] < num_tokens)
            path[alive, length[alive]] = x
            code[alive] += x * vocab ** length[alive]
            length[alive] += 1
            alive = alive[keep]
        x = pick(rows(laws.p, length[alive], code[alive]))
        path[alive, length[alive]] = x
        code[alive] += x * vocab ** length[alive]
        length[alive] += 1
    return path[:, :num_tokens], rounds, accepted


@pytest.mark.parametrize("kind", ["any", "equal", "disjoint", "pruned"])
def test_replay_is_what_simulated_decoding_gives(kind: str) -> None:
    """At least 10⁵ rounds; rounds and accepted tokens within 3 standard errors of the mean."""
    num_tokens, gamma, runs = 6, 3, 50_000
    laws = Laws(kind, longest=num_tokens + gamma + 1, depths=gamma, seed=9, vocab=3)
    path, rounds, accepted = simulate(laws, runs=runs, num_tokens=num_tokens, gamma=gamma, seed=4)
    assert rounds.sum() >= 1e5
    seen, which = np.unique(path, axis=0, return_inverse=True)
    logr = np.stack([laws.logr(tuple(int(x) for x in row)) for row in seen])
    found = replay(token_survival(logr), np.full(len(seen), num_tokens))
    for simulated, replayed in ((rounds, found.rounds), (accepted, found.accepted)):
        excess = simulated - replayed[which, gamma - 1]
        assert abs(excess.mean()) <= 3 * excess.std() / np.sqrt(runs) + 1e-12


def test_greedy_replay_walks_the_matches() -> None:
    rng = np.random.default_rng(0)
    match = rng.random((5, 4, 30)) < 0.7
    remaining = np.array([30, 29, 7, 1, 0])
    with np.errstate(divide="ignore"):
        logr = np.log(match.astype(float))
    for survival in (token_survival(logr), block_survival(logr)):
        found = replay(survival, remaining)
        for e, gamma in itertools.product(range(5), range(1, 5)):
            s = rounds = accepted = 0
            while s < remaining[e]:
                a = int(match[e, :gamma, s].cumprod()[: remaining[e] - s].sum())
                rounds, accepted, s = rounds + 1, accepted + a, s + a + 1
            assert found.rounds[e, gamma - 1] == rounds
            assert found.accepted[e, gamma - 1] == accepted
            assert found.drafted[e, gamma - 1] == gamma * rounds


def test_padding_and_company_change_nothing() -> None:
    rng = np.random.default_rng(1)
    logr = rng.normal(-0.5, 1.0, (3, 5, 12))
    remaining = np.array([12, 4, 8])
    together = replay(token_survival(logr), remaining)
    for e, n in enumerate(remaining):
        alone = replay(token_survival(logr[e : e + 1, :, :n]), np.array([n]))
        np.testing.assert_allclose(together.rounds[e], alone.rounds[0], rtol=1e-12)
        np.testing.assert_allclose(together.kept[e], alone.kept[0], rtol=1e-12)


def test_block_verification_never_keeps_less() -> None:
    logr = np.random.default_rng(2).normal(-0.3, 1.0, (40, 7, 25))
    token, block = token_survival(logr), block_survival(logr)
    assert np.all(block >= token - 1e-12)
    assert block.mean() > token.mean() + 0.05
    # the first depth is one token either way
    np.testing.assert_array_equal(block[:, 0], token[:, 0])


def test_remaining_tokens_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit a survival of"):
        replay(np.ones((2, 3, 4)), np.array([4, 5]))


def test_a_million_anchors_and_depths_replay_in_a_second_of_one_core() -> None:
    """The best of three, in processor time, so that a busy machine does not decide."""
    logr = np.random.default_rng(3).normal(-0.5, 1.0, (256, 7, 95))
    took = []
    for _ in range(3):
        began = process_time()
        replay(token_survival(logr), np.full(256, 95))
        took.append(process_time() - began)
    assert logr.size / min(took) >= 1e6
