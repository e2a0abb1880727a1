"""A traced decoding as plain text and numbers: what the report shows of it, and stores as JSON.

Knows rounds and a tokenizer, nothing of arms or files. A token is shown alone, so that a byte of a
longer character reads as the replacement sign; the whole text stands beside it.
"""

from typing import Any

from torch import Tensor

from pipeline.speculate import Decoded, Drafted, Round, Rules

DIGITS = 4  # of a probability: what a reader can use, and equal on machines that agree that far


def trace_row(decoded: Decoded, prompt: Tensor, rules: Rules, tokenizer: Any) -> dict[str, Any]:
    """One prompt's trace: temperature, gamma, the texts, and a list of rounds."""
    first = decoded.tokens[: len(decoded.tokens) - sum(r.emitted for r in decoded.trace)]
    return {
        "temperature": float(rules.temperature),
        "gamma": rules.gamma,
        "prompt_text": tokenizer.decode(prompt.tolist()),
        "text": tokenizer.decode(decoded.tokens),
        "first": [tokenizer.decode([token]) for token in first],
        "rounds": [_round(r, tokenizer) for r in decoded.trace],
    }


def _round(r: Round, tokenizer: Any) -> dict[str, Any]:
    return {
        "start": r.start,
        "drafts": [_draft(draft, tokenizer) for draft in r.drafts],
        "token": tokenizer.decode([r.token]),
        "p": round(r.p, DIGITS),
        "emitted": r.emitted,
    }


def _draft(draft: Drafted, tokenizer: Any) -> dict[str, Any]:
    numbers = {"p": draft.p, "q": draft.q, "alpha": draft.alpha, "u": draft.uniform}
    shown = {k: None if v is None else round(v, DIGITS) for k, v in numbers.items()}
    return {"token": tokenizer.decode([draft.token]), "kept": draft.kept, **shown}
