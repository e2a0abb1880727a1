"""Prompt sets that decoding is measured on: any file of prompts or conversations, as token ids.

Of a prompt of several turns the first is asked, or every one behind the target's own replies.
Layouts are `pipeline.layouts`' (MT-Bench, HumanEval, GSM8K and Spec-Bench as they are distributed,
JSON lines of one's own); a prompt's domain is its category. A set is decoded only: it has no
rollouts that could be replayed. Nothing is cut or left out silently: a prompt for which the
target's context has no room is refused before a model loads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.chat import has_template, prompt_tokens, turn_name
from pipeline.config import Strict
from pipeline.layouts import EvalPrompt, Layout, read_prompts
from pipeline.sampling import Prompt
from pipeline.turns import Talk
from storage.errors import DataError
from storage.workspace import file_digest

DECODE_SET = "decode:"
"""Before a set's name: the instrument that its results are of."""


class PromptSet(Strict):
    """One entry of `evaluate.prompt_sets`."""

    path: Annotated[str, Field(min_length=1)]
    """Relative to the project's root. Under the same name a changed file is not seen by DVC."""
    layout: Layout
    max_prompts: Annotated[int, Field(gt=0)] | None
    """As many of the first, spread evenly over the categories; null: all."""
    turns: Literal["first", "every"] = "first"
    """User turns that are asked: `every` goes on behind the target's own replies, as MT-Bench's and
    Spec-Bench's runs do."""


PromptSets = dict[Annotated[str, Field(pattern=r"^[a-z0-9_.-]+$")], PromptSet]


def read_set(name: str, given: PromptSet) -> list[EvalPrompt]:
    """The prompts of a set; `DataError` names the file and the line of what cannot be used."""
    return read_prompts(Path(given.path), given.layout, parameter=f"evaluate.prompt_sets.{name}")


def encode_set(
    name: str,
    prompts: list[EvalPrompt],
    tokenizer: Any,
    *,
    new_tokens: int,
    context_tokens: int,
) -> list[Prompt]:
    """Ids as the target reads the first user turn: through its chat template, or as text.

    `new_tokens` is what a response and its last round may take beside the prompt.
    """
    encoded = []
    for prompt in prompts:
        whole = f"{name}/{prompt.id}"
        if has_template(tokenizer):
            tokens = prompt_tokens(tokenizer, prompt.messages, name=whole)
        else:
            _require_one_turn(whole, prompt)
            tokens = list(tokenizer(prompt.text)["input_ids"])
        require_room(whole, len(tokens), new_tokens=new_tokens, context_tokens=context_tokens)
        encoded.append(Prompt(whole, prompt.category, tuple(tokens)))
    return encoded


def talks_of_set(
    name: str,
    prompts: list[EvalPrompt],
    tokenizer: Any,
    *,
    turns: Literal["first", "every"],
    reply_tokens: int,
    new_tokens: int,
    context_tokens: int,
) -> list[Talk]:
    """The prompts of a set with the turns that are asked; further user turns alone, no tools.

    `DataError` where the context has no room for a turn behind replies of `reply_tokens` each, or
    where the template does not take a further turn.
    """
    sizes = {"new_tokens": new_tokens, "context_tokens": context_tokens}
    firsts = encode_set(name, prompts, tokenizer, **sizes)
    talks = []
    for prompt, first in zip(prompts, firsts, strict=True):
        asks = [prompt.messages]
        if turns == "every" and prompt.later:
            if not has_template(tokenizer):
                raise DataError(
                    found=f"prompt {first.id!r} of {len(prompt.later) + 1} user turns",
                    expected="one, since the target has no chat template",
                    todo=f"choose a chat model, or set evaluate.prompt_sets.{name}.turns: first",
                )
            asks += [({"role": "user", "content": text},) for text in prompt.later]
            messages = list(asks[0])
            for turn, ask in enumerate(asks[1:], start=1):
                messages += [{"role": "assistant", "content": "."}, *ask]
                named = turn_name(first.id, turn)
                size = len(prompt_tokens(tokenizer, messages, name=named)) + turn * reply_tokens
                require_room(named, size, **sizes)
        talks.append(Talk(first, tuple(asks)))
    return talks


def require_room(name: str, num_tokens: int, *, new_tokens: int, context_tokens: int) -> None:
    """`DataError` unless a prompt has a token, and the context has room for what follows it."""
    if not num_tokens:
        raise DataError(
            found=f"prompt {name!r} has no token",
            expected="at least one",
            todo="remove it from its file",
        )
    if num_tokens + new_tokens > context_tokens:
        raise DataError(
            found=f"prompt {name!r} of {num_tokens} tokens, and up to {new_tokens} of a response "
            "and its last round",
            expected=f"at most the target's context of {context_tokens} tokens together",
            todo="remove the prompt from its file, or lower evaluate.decode_new_tokens",
        )


def _require_one_turn(name: str, prompt: EvalPrompt) -> None:
    roles = [message["role"] for message in prompt.messages]
    if roles != ["user"]:
        raise DataError(
            found=f"prompt {name!r} of {len(roles)} messages ({', '.join(roles)})",
            expected="one user turn, since the target has no chat template",
            todo="choose a chat model, or take the system message out of the file",
        )


def digests(sets: Mapping[str, PromptSet]) -> dict[str, str]:
    """What the files of the sets hold; `DataError` where one is not there."""
    found = {}
    for name, given in sets.items():
        if not Path(given.path).is_file():
            raise DataError(
                found=f"no file {given.path}",
                expected=f"the prompts that evaluate.prompt_sets.{name} names",
                todo="correct the path, which is relative to the project's root",
            )
        found[name] = file_digest(Path(given.path))
    return found
