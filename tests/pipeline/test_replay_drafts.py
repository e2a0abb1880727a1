"""Replay against brute force for every kind of draft: 10⁵ simulated rounds and more each.

Target and draft are the project's own, of three tokens, so that every law along every text can be
tabulated; the simulation then draws drafts and verdicts from the tables, in blocks and token by
token, under the target's law and under a served one, with sampled and with greedy drafts.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.replay import block_survival, replay, token_survival
from pipeline.serve import Serving, serve_logits
from pipeline.target import Target
from tests.pipeline.test_replay import Laws
from tests.pipeline.test_speculate import LAYERS, make_draft, make_target

V, NUM_TOKENS, GAMMA, RUNS = 3, 4, 3, 100_000
LONGEST = NUM_TOKENS + GAMMA
KINDS = ("lm", "medusa", "eagle3", "mlp", "mtp")
START = [1, 2, 0, 2]  # the prompt and the response's first token


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """Every continuation of LONGEST tokens; its row is its code in base V, first digit lowest."""
    code = torch.arange(V**LONGEST)
    digits = torch.stack([code // V**i % V for i in range(LONGEST)], dim=1)
    return torch.cat([torch.tensor(START).expand(len(code), -1), digits], dim=1)


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    return make_target(tiny_model(vocab_size=V, num_layers=2))


@pytest.fixture(scope="module")
def batch(target: Target, texts: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """The texts with the target's states, and its logits at each token."""
    with torch.no_grad():
        found = target.forward(texts, layers=LAYERS[:1] * 2)
        logits = target.logits(found.last_hidden.flatten(0, 1)).unflatten(0, texts.shape)
    turn = torch.full_like(texts, -1)
    turn[:, len(START) - 1 :] = 0
    zeros = torch.zeros_like(texts)
    whole = Batch(
        ids=("",) * len(texts),
        domains=("",) * len(texts),
        tokens=texts,
        length=torch.full((len(texts),), texts.shape[1]),
        turn=turn,
        token_logp=zeros.float(),
        law_row=zeros,
        law=None,
        hidden=found.hidden,
        last_hidden=found.last_hidden,
    )
    return whole, logits


def tables(
    batch: tuple[Batch, torch.Tensor], target: Target, kind: str, serving: Serving, *, greedy: bool
) -> Laws:
    """p and q of every prefix, as `Laws` keeps them; drawn from no distribution of its own."""
    whole, logits = batch
    draft = make_draft(kind, target)
    laws = Laws("any", longest=LONGEST, depths=GAMMA, seed=0, vocab=V)
    last = len(START) - 1  # the place of the last token before the continuation

    def served(x: torch.Tensor) -> NDArray[Any]:
        return serve_logits(x, serving).exp().numpy()

    with torch.no_grad():
        produced = list(draft.training_logits(whole, 1 if draft.shifts else GAMMA))
    for n in range(LONGEST):
        laws.p[n] = served(logits[: V**n, last + n])
        for k in range(min(GAMMA, n + 1)):
            depth = 0 if draft.shifts else k
            rows = whole.pairs(depth).anchor
            anchor = torch.arange(V**n) * whole.tokens.shape[1] + last - 1 + n - depth
            found = produced[depth][torch.searchsorted(rows, anchor)]
            q = served(found)
            laws.q[k][n] = np.eye(V)[found.argmax(-1).numpy()] if greedy else q
    return laws


def pick(law: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    return (law.cumsum(1) <= rng.random((len(law), 1)) * law.sum(1, keepdims=True)).sum(1)


def simulate(laws: Laws, *, block: bool, seed: int) -> tuple[NDArray[Any], ...]:
    """Outputs [RUNS, N], rounds and accepted tokens [RUNS], one real round after the other."""
    rng = np.random.default_rng(seed)
    path = np.zeros((RUNS, LONGEST), int)
    code, length = np.zeros(RUNS, int), np.zeros(RUNS, int)
    rounds, accepted = np.zeros(RUNS, int), np.zeros(RUNS, int)

    def rows(table: list[Any], length: NDArray[Any], code: NDArray[Any]) -> NDArray[Any]:
        out = np.zeros((len(code), V))
        for n in np.unique(length):
            out[length == n] = table[n][code[length == n]]
        return out

    while (here := np.flatnonzero(length < NUM_TOKENS)).size:
        rounds[here] += 1
        size = len(here)
        drawn, p, q = [], [], []
        at, n = code[here].copy(), length[here].copy()
        for k in range(GAMMA):
            p.append(rows(laws.p, n, at))
            q.append(rows(laws.q[k], n, at))
            drawn.append(pick(q[-1], rng))
            at += drawn[-1] * V**n
            n += 1
        p.append(rows(laws.p, n, at))
        index, u = np.arange(size), rng.random((GAMMA + 1, size))
        kept, weight = np.zeros(size, int), np.ones(size)
        following = np.maximum(p[0] - q[0], 0)
        for k in range(GAMMA):
            chance = p[k][index, drawn[k]] / q[k][index, drawn[k]]
            if block:  # Sun et al. 2024, algorithm 2: the last i whose own verdict is positive
                weight = np.minimum(1, weight * chance)
                rest = p[k + 1] * weight[:, None]
                rest = rest if k == GAMMA - 1 else np.maximum(rest - q[k + 1], 0)
                total = rest.sum(1)
                both = np.maximum(total + 1 - weight, 1e-300)
                hit = weight if k == GAMMA - 1 else np.where(weight < 1, total / both, 1.0)
            else:
                hit = np.where(kept == k, chance, 0)
                rest = p[k + 1] if k == GAMMA - 1 else np.maximum(p[k + 1] - q[k + 1], 0)
            positive = u[k] < hit
            kept = np.where(positive, k + 1, kept)
            following = np.where(positive[:, None], rest, following)
        # p = q leaves no residual, and is then never refused but by rounding
        law = np.stack(p)[kept, index]
        following = np.where(following.sum(1, keepdims=True) > 0, following, law)
        token = pick(following, rng)
        for k in range(GAMMA + 1):
            x = np.where(kept == k, token, drawn[min(k, GAMMA - 1)])
            going = kept >= k
            mine = here[going]
            accepted[mine] += (k < kept[going]) & (length[mine] < NUM_TOKENS)
            path[mine, length[mine]] = x[going]
            code[mine] += x[going] * V ** length[mine]
            length[mine] += 1
    return path[:, :NUM_TOKENS], rounds, accepted


AT_ONE = Serving(temperature=1.0, top_k=None, top_p=None)
CUT = Serving(temperature=1.3, top_k=None, top_p=0.85)
CASES = [
    *((kind, AT_ONE, False, block) for kind in KINDS for block in (False, True)),
    ("eagle3", CUT, False, False),
    ("medusa", CUT, False, True),
    ("lm", AT_ONE, True, False),
    ("mlp", CUT, True, False),
    ("mtp", CUT, True, True),
]


@pytest.mark.parametrize(
    ("kind", "serving", "greedy", "block"),
    CASES,
    ids=[
        f"{kind}{' block' if block else ''}{' cut' if serving == CUT else ''}"
        f"{' greedy' if greedy else ''}"
        for kind, serving, greedy, block in CASES
    ],
)
def test_replay_is_what_simulated_rounds_give(
    batch: tuple[Batch, torch.Tensor],
    target: Target,
    kind: str,
    serving: Serving,
    greedy: bool,
    block: bool,
) -> None:
    """Rounds and accepted tokens within 3 standard errors, text by text; the texts follow p."""
    laws = tables(batch, target, kind, serving, greedy=greedy)
    path, rounds, accepted = simulate(laws, block=block, seed=11)
    assert rounds.sum() >= 1e5
    seen, which, times = np.unique(path, axis=0, return_inverse=True, return_counts=True)
    which = which.ravel()
    logr = np.stack([laws.logr(tuple(map(int, row))) for row in seen])
    survival = block_survival(logr) if block else token_survival(logr)
    found = replay(survival, np.full(len(seen), NUM_TOKENS))
    for simulated, replayed in ((rounds, found.rounds), (accepted, found.accepted)):
        excess = simulated - replayed[which, GAMMA - 1]
        assert abs(excess.mean()) <= 3 * excess.std() / np.sqrt(RUNS) + 1e-9
    law = [
        np.prod([laws.target(tuple(row[:i]))[row[i]] for i in range(NUM_TOKENS)])
        for row in itertools.product(range(V), repeat=NUM_TOKENS)
    ]
    share = np.zeros(V**NUM_TOKENS)
    share[[int(sum(x * V ** (NUM_TOKENS - 1 - i) for i, x in enumerate(row))) for row in seen]] = (
        times / RUNS
    )
    off = np.abs(share - law) / np.sqrt(np.maximum(law, 1e-12) * RUNS) * RUNS
    assert off[np.array(law) > 20 / RUNS].max() < 4.5  # 81 texts
    assert share[np.array(law) == 0].sum() == 0
