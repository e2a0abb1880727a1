"""What training the drafts of a parameter file will cost, by shapes alone; torch-free.

    rows = training(params, vocab_size=V, hidden_size=D, tokens=…)     # [(what, operations)]

The model of the cost: a step of a sequence of T tokens takes 6 · W · T operations, 2 forward and 4
backward, where W counts every weight as often as a token is multiplied by it: the layer of a draft
that is unrolled S times, S times. Left out: attention over the context, norms, the terms, and that
a frozen matrix has no gradient of its own. Sequences have the mean length of the training split;
every token is taken as supervised.
"""

from collections.abc import Callable, Mapping
from typing import Any

Section = Mapping[str, Any]


def _layer(size: int, section: Section, *, in_size: int | None = None) -> int:
    """Weights of attention and SwiGLU on width D; queries, keys and values from `in_size`."""
    heads = section["num_heads"]
    head_size = section.get("head_size") or size // heads
    groups = section.get("num_kv_heads") or heads
    read = (in_size or size) * (heads + 2 * groups) * head_size
    return read + heads * head_size * size + 3 * size * section["intermediate_size"]


def _kept(section: Section, vocab: int) -> int:
    return section.get("draft_vocab_size") or vocab


def _eagle3(section: Section, vocab: int, size: int) -> int:
    step = _layer(size, section, in_size=2 * size) + size * _kept(section, vocab)
    return section.get("fused_layers", 3) * size * size + section["depth"] * step


def _medusa(section: Section, vocab: int, size: int) -> int:
    head = section["num_layers"] * size * size + size * _kept(section, vocab)
    return section["num_heads"] * head


def _mlp(section: Section, vocab: int, size: int) -> int:
    inner, heads = section["inner_size"], section["num_heads"]
    states = size * inner + (heads - 1) * inner * inner
    return states + heads * inner * _kept(section, vocab)


def _mtp(section: Section, vocab: int, size: int) -> int:
    step = 2 * size * size + _layer(size, section) + size * _kept(section, vocab)
    return section["depth"] * step


def _lm(section: Section, vocab: int, _size: int) -> int:
    own = section["hidden_size"]
    return section["num_layers"] * _layer(own, section) + own * vocab


# W by kind of draft; a kind without a row is left out of the estimate, which says so
WEIGHTS: Mapping[str, Callable[[Section, int, int], int]] = {
    "eagle3": _eagle3,
    "medusa": _medusa,
    "mlp": _mlp,
    "mtp": _mtp,
    "lm": _lm,
}


def training(
    params: Mapping[str, Any], *, vocab_size: int, hidden_size: int, tokens: int
) -> list[tuple[str, float]]:
    """Operations of each draft's starts and arms, all seeds and objectives; drafts in order."""
    found: dict[str, float] = {}
    generate = params["generate"]
    mean_tokens = tokens / max(1, params["prepare"]["train_prompts"])
    if generate.get("turns") == "every":  # a conversation may be several sequences
        longest = generate["max_prompt_tokens"] + generate["max_new_tokens"]
        mean_tokens = min(mean_tokens, longest)
    for block, stage in (("starts", "warmup"), ("arms", "train")):
        for cell in params[block].values():
            section, fit = params["drafts"][cell["draft"]], params[stage]
            if section["kind"] not in WEIGHTS:
                continue
            steps = fit["steps"] * section["steps_scale"]
            weights = WEIGHTS[section["kind"]](section, vocab_size, hidden_size)
            seen = steps * fit["batch_sequences"] * mean_tokens
            found[cell["draft"]] = found.get(cell["draft"], 0.0) + 6.0 * weights * seen
    return list(found.items())
