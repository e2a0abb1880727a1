"""Training for the law that is served: temperature, top-k and top-p on the cache's law of T = 1.

    batches = served(batches, serving, vocab_size=V)      # the same batches, their laws served

p of every term is the served law (MATHS (57)); q stays the draft's own law at T = 1: a draft that
is trained so is to be sampled as it is, not at the target's temperature again. What the law of a
truncated row leaves open is `pipeline.serving`'s: exact where it can be, else an estimate from the
tail samples, and counted: `heldout_bounded` in a run's metrics is the share of held-out rows that
are. Dense laws are served exactly.

Knows no draft and no loss.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor

from pipeline.batch import Batch
from pipeline.serve import Serving
from pipeline.serving import serve
from storage.errors import ConfigError
from storage.reader import Cache


def served(
    batches: Generator[Batch, None, None], serving: Serving | None, *, vocab_size: int
) -> Generator[Batch, None, None]:
    """Batches with their laws served; as they are where `serving` is None. Closes its source."""
    with closing(batches):
        for batch in batches:
            yield batch if serving is None else serve_batch(batch, serving, vocab_size)[0]


def serve_batch(batch: Batch, serving: Serving, vocab_size: int) -> tuple[Batch, Tensor]:
    """A batch with its law served, and [R] bool: the rows whose served law is exact.

    `token_logp` stays that of T = 1, which is what the rollout was drawn from.
    """
    assert batch.law is not None, "training reads the law"
    made = serve(batch.law, serving, vocab_size=vocab_size)
    return replace(batch, law=made.law), made.exact


def serve_all(
    batches: Sequence[Batch], serving: Serving | None, *, vocab_size: int
) -> tuple[list[Batch], tuple[int, int]]:
    """The same of batches in memory, and their rows: those only bounded, and all."""
    if serving is None:
        return list(batches), (0, 0)
    made = [serve_batch(batch, serving, vocab_size) for batch in batches]
    exact = [int(x.sum()) for _, x in made]
    num = sum(len(x) for _, x in made)
    return [batch for batch, _ in made], (num - sum(exact), num)


def needs_tail(serving: Serving | None) -> bool:
    """Whether the normaliser takes every id: a temperature of its own without a top-k."""
    return serving is not None and serving.temperature not in (0, 1) and serving.top_k is None


def cuts(serving: Serving | None) -> bool:
    """Whether ids with p > 0 have none in the served law."""
    if serving is None:
        return False
    return serving.temperature == 0 or serving.top_k is not None or serving.top_p not in (None, 1)


def require_tail(section: str, serving: Serving | None, *, sampled: bool) -> None:
    """`ConfigError` where the normaliser hangs on a tail that nothing was drawn from.

    With samples it is an estimate, bias O(1/M), whose rows are counted; without any it would be the
    middle of what may be, which no draft should learn.
    """
    if needs_tail(serving) and not sampled:
        assert serving is not None, "none needs no tail"
        raise ConfigError(
            found=f"{section}.target_law: temperature {serving.temperature:g} without top_k on a "
            "truncated cache without tail samples",
            expected="something that tells the tail's share of the normaliser",
            todo="set capture.tail_samples, which captures again, or give target_law a top_k",
        )


def is_sampled(cache: Cache) -> bool:
    """Whether a cache tells its tails: whole laws, all ids kept, or samples drawn."""
    counts, layout = cache.manifest.counts, cache.layout
    if layout.mode != "topk" or counts["sample"]:
        return True
    return counts["entry"] == counts["row"] * layout.vocab_size
