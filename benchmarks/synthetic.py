"""Laws of a made-up target at V = 128,256, in the regimes that the rate of a cache is quoted for.

    for laws in documents("c14", num_documents=8, seed=0):   # [ROWS, V] float32 each
        ...
    records(kept_laws("c14", num_documents=8, seed=0, rule=rule), lengths=[...], seed=0)

After reference/offline_caches.md §4.1: scores of a low-rank factor model plus a Zipf-Mandelbrot
unigram; a document's topic and an autoregressive context move the factors; each token's temperature
is solved so that its entropy is the one drawn for it (nearly certain, or gamma distributed); and a
broad background law of lognormal weight, over other ids each time, lies under all of it. The
reference does not state the parameters of these draws, it states what its regimes lose and keep
(§4.1, §4.3): the parameters here are fitted to that, and `main` prints both side by side. `c14` was
tuned there to what a real 30 B model loses at K = 32, 64 and 128; `c06` (chat) and `c20` (hard)
have no such anchor. Token ids are random, so nothing here says what ordering or context could gain
on real text.

    python -m benchmarks.synthetic        # prints the regimes beside the reference's figures
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.topk import Kept, Rule, truncate
from storage.codecs import encode_p
from storage.layout import Layout
from storage.record import Record

V, RANK, DOCUMENT_TOKENS = 128_256, 96, 1024
ROWS = 32
"""Tokens worked on at a time: 16 MB of float32 scores."""


@dataclass(frozen=True)
class Regime:
    """What a regime draws for each token."""

    certain: float
    """Share of tokens that are nearly certain: entropy exponential with mean 0.05."""
    shape: float
    """Of the gamma distribution of the others' entropies, nats."""
    scale: float
    background: float
    """Median weight of the broad law."""
    spread: float
    """Of the logarithm of that weight."""


REGIMES = {
    "c06": Regime(0.68, 2.0, 0.88, 0.0002, 0.9),
    "c14": Regime(0.45, 2.4, 0.98, 0.0006, 0.9),
    "c20": Regime(0.32, 2.2, 1.28, 0.0012, 0.9),
}
REFERENCE = {
    "c06": "0.62 (0.11)   1.62 1.09 0.72   15.6, 1.02",
    "c14": "1.34 (0.63)   5.9  4.3  3.0    39.7, 3.08",
    "c20": "1.92          10.4 7.8  5.7    62,   5.2",
}
"""What `main` prints of a regime, as the reference states it."""


class Model:
    """The factors and the unigram that all documents of a seed share."""

    def __init__(self, seed: int, vocab_size: int = V) -> None:
        rng = np.random.default_rng((seed, 0))
        self.factors = rng.standard_normal((RANK, vocab_size), dtype=np.float32)
        rank = rng.permutation(vocab_size)
        self.unigram = (-0.25 * np.log(rank + 2.7)).astype(np.float32)
        broad = (rank + 2.7) ** -0.95
        self.background = np.tile((broad / broad.sum()).astype(np.float32), 2)

    def scores(self, context: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, V] of contexts [T, RANK]."""
        return context @ self.factors + self.unigram

    def backgrounds(self, rng: np.random.Generator, num: int) -> NDArray[np.float32]:
        """[num, V] broad laws, each over other ids: what is unlikely differs from token to token.

        One broad law for all would put the same ids into the tail of every top 128.
        """
        size = len(self.unigram)
        starts = rng.integers(size, size=num).tolist()
        return np.stack([self.background[start : start + size] for start in starts])


def documents(
    regime: str, *, num_documents: int, seed: int, vocab_size: int = V
) -> Iterator[NDArray[np.float32]]:
    """[ROWS, V] laws, float32, document after document of DOCUMENT_TOKENS tokens."""
    model, drawn = Model(seed, vocab_size), REGIMES[regime]
    for number in range(num_documents):
        rng = np.random.default_rng((seed, 1, number))
        context = _contexts(rng, DOCUMENT_TOKENS)
        certain = rng.random(DOCUMENT_TOKENS) < drawn.certain
        entropy = np.where(
            certain,
            rng.exponential(0.05, DOCUMENT_TOKENS),
            rng.gamma(drawn.shape, drawn.scale, DOCUMENT_TOKENS),
        ).clip(1e-3, 8.0)
        weight = drawn.background * np.exp(drawn.spread * rng.standard_normal(DOCUMENT_TOKENS))
        # what is certain of its next token is so of what is not
        weight = np.where(certain, 0.1 * weight, weight).clip(0, 0.5)
        for at in range(0, DOCUMENT_TOKENS, ROWS):
            rows = slice(at, at + ROWS)
            law = _sharpen(model.scores(context[rows]), entropy[rows])
            mixed = weight[rows, None].astype(np.float32)
            yield (1 - mixed) * law + mixed * model.backgrounds(rng, len(law))


def _contexts(rng: np.random.Generator, num_tokens: int) -> NDArray[np.float32]:
    """[T, RANK]: a topic, and around it an AR(1) path, of variance 1 / RANK each."""
    topic = rng.standard_normal(RANK)
    path = np.empty((num_tokens, RANK))
    path[0] = rng.standard_normal(RANK)
    steps = rng.standard_normal((num_tokens, RANK))
    for t in range(1, num_tokens):
        path[t] = 0.7 * path[t - 1] + np.sqrt(1 - 0.49) * steps[t]
    return ((0.6 * topic + 0.8 * path) / np.sqrt(RANK) * 2).astype(np.float32)


def _sharpen(scores: NDArray[np.float32], entropy: NDArray[np.float64]) -> NDArray[np.float32]:
    """[T, V] softmax(scores / τ) with τ per row such that its entropy is as asked, by bisection."""
    scores = scores - scores.max(-1, keepdims=True)
    low, high = np.full(len(scores), np.log(1e-3)), np.full(len(scores), np.log(3.0))
    for _ in range(11):  # of log τ: to 0.4 %
        middle = (low + high) / 2
        scaled = scores * np.exp(-middle)[:, None].astype(np.float32)
        power = np.exp(scaled)
        total = power.sum(-1, dtype=np.float64)
        found = np.log(total) - np.einsum("tv,tv->t", power, scaled, dtype=np.float64) / total
        low, high = np.where(found < entropy, middle, low), np.where(found < entropy, high, middle)
    return (power / total[:, None]).astype(np.float32)


def kept_laws(regime: str, *, num_documents: int, seed: int, rule: Rule) -> list[Kept]:
    """What capture would keep of every token of the documents, ROWS tokens an item."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for law in documents(regime, num_documents=num_documents, seed=seed):
        logp = torch.from_numpy(law).log()
        # the token that follows is drawn from the law itself
        following = torch.multinomial(torch.from_numpy(law), 1, generator=generator)[:, 0]
        uniform = torch.rand(len(law), rule.tail_samples, generator=generator, dtype=torch.float64)
        kept.append(truncate(logp, following, rule=rule, uniform_NM=uniform))
    return kept


def records(kept: Sequence[Kept], *, lengths: Sequence[int], seed: int) -> Iterator[Record]:
    """Sequences of the given lengths, cut from the documents in a circle, all of them supervised.

    Every turn around the circle renames the ids by another affine map of the vocabulary: what is
    read twice is not the same bytes.
    """
    joined = {
        name: torch.cat([getattr(k, name) for k in kept]).numpy()
        for name in ("kept", "ids", "p", "tail_logp_mass", "tail_kept", "tail_ids", "tail_logp")
    }
    entry, sample = (np.append(0, joined[n].cumsum()) for n in ("kept", "tail_kept"))
    num_tokens, rng = len(joined["kept"]), np.random.default_rng(seed)
    at, step, shift = num_tokens, 1, 0
    for number, length in enumerate(lengths):
        if at + length > num_tokens:
            at, step, shift = 0, 2 * int(rng.integers(V // 4)) + 1, int(rng.integers(V))
            while np.gcd(step, V) != 1:
                step += 2
        rows = slice(at, at + length - 1)  # the last token has no law
        entries = slice(entry[rows.start], entry[rows.stop])
        samples = slice(sample[rows.start], sample[rows.stop])
        at += length

        def renamed(ids: NDArray[np.int64], step: int = step, shift: int = shift) -> NDArray:
            return ((ids * step + shift) % V).astype(np.uint32)

        def last(name: str, dtype: str, rows: slice = rows) -> NDArray:
            return np.append(joined[name][rows], 0).astype(dtype)

        yield Record(
            id=f"synthetic-{number}",
            domain="synthetic",
            tokens=rng.integers(0, V, length).astype(np.uint32),
            turn=np.zeros(length, dtype=np.int32),
            token_logp=last("tail_logp_mass", "float32"),  # any plausible numbers
            kept=last("kept", "uint16"),
            topk_ids=renamed(joined["ids"][entries]),
            topk_p=encode_p(joined["p"][entries]),
            tail_logp_mass=last("tail_logp_mass", "float32"),
            tail_kept=last("tail_kept", "uint8"),
            tail_ids=renamed(joined["tail_ids"][samples]),
            tail_logp=joined["tail_logp"][samples].astype(np.float16),
        )


def layout() -> Layout:
    """Of a cache of such records."""
    return Layout("topk", V, 8, (), False)


def main() -> None:
    """Print what each regime draws: entropy, what K = 32, 64, 128 and a threshold lose."""
    print("       mean H (median)   lost at K = 32, 64, 128, %   p >= 5e-4: K, lost, %")
    for regime in REGIMES:
        rows = []
        for law in documents(regime, num_documents=2, seed=0):
            top = -np.sort(-np.partition(law, V - 1024, -1)[:, -1024:], -1)
            entropy = -(law * np.log(law, where=law > 0, out=np.zeros_like(law))).sum(-1)
            kept = top >= 5e-4
            lost = [1 - top[:, :k].sum(-1) for k in (32, 64, 128)]
            rows.append(np.stack([entropy, *lost, kept.sum(-1), 1 - (top * kept).sum(-1)]))
        h, a, b, c, kept, lost = np.concatenate(rows, -1)
        print(
            f"{regime}   {h.mean():.2f} ({np.median(h):.2f})   {100 * a.mean():.2f} "
            f"{100 * b.mean():.2f} {100 * c.mean():.2f}   {kept.mean():.1f}, "
            f"{100 * lost.mean():.2f}"
        )
        print(f"       reference: {REFERENCE[regime]}")


if __name__ == "__main__":
    main()
