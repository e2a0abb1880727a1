"""`lkcache estimate`: bytes, hours and free disk, before anything runs."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from lkcache.words import duration, num_bytes
from pipeline.budget import training
from pipeline.config import PARAMS, read_params
from pipeline.estimate import Line, reductions, target_shape
from pipeline.estimate import estimate as lines_of
from storage.errors import ConfigError

# 2 cores of a laptop reach 0.15 TFLOP/s in fp32 (measured on the embedded target's training)
LAPTOP_TFLOPS = 0.15
EXIT_TOO_SMALL = 2
REDUCTIONS = 3
BLOCKS = ("starts", "arms")


def estimate(
    tflops: Annotated[
        float,
        Option(
            help="What the machine sustains: 0.15 on 2 laptop cores, 200-400 on an H100 in bf16."
        ),
    ] = LAPTOP_TFLOPS,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Capture 32 sequences and measure; needs target/ and sequences/."),
    ] = False,
) -> int:
    """Print what capture will take by params.yaml; exits with 2 where the disk will not hold it.

    Each figure says whether it is assumed from the parameters, counted from sequences/ or measured:
    on this disk, and with --dry-run by the real capture of 32 sequences, in a folder that is
    removed. Run from the project's root.
    """
    if not tflops > 0:
        raise ConfigError(
            found=f"--tflops {tflops:g}",
            expected="a rate above 0, in 10^12 floating-point operations a second",
            todo="correct it",
        )
    params = read_params()
    _check(params)
    with _named(params):
        lines = lines_of(params, tflops=tflops)
        hours = _hours(params, lines, tflops)
        savings = reductions(params)
    if dry_run:
        lines = _measured(lines)
        with _named(params):
            hours = _hours(params, lines, tflops)
    lines += hours
    table = Table(title=f"capture in mode {params['capture']['mode']}, by params.yaml")
    for column in ("what", "how much", "label"):
        table.add_column(column, justify="right" if column == "how much" else "left")
    for line in lines:
        table.add_row(Text(line.what), _show(line), line.label)
    console = Console()
    console.print(table)
    need = next(line.value for line in lines if line.what == "cache")
    free = min(line.value for line in lines if line.what.startswith("free disk"))
    if need > free:
        console.print(
            f"the disk will not hold the cache: {num_bytes(need)} needed, {num_bytes(free)} free. "
            "What would save how much:"
        )
        for line in savings:
            console.print(Text(f"  {num_bytes(line.value):>8}  {line.what}"))
        return EXIT_TOO_SMALL
    if 2 * need > free:
        console.print(
            f"room for the cache ({num_bytes(need)} of {num_bytes(free)} free) but not for DVC's "
            "copy beside it: `dvc config cache.type reflink,hardlink,copy` avoids one"
        )
    told = [f"{num_bytes(line.value)} by {line.what}" for line in savings[:REDUCTIONS]]
    console.print(Text(f"what would save most: {'; '.join(told)}"))
    return 0


@contextmanager
def _named(params: dict[str, Any]) -> Iterator[None]:
    """Name the value that no estimate can be made of, as `check` does where torch is there."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        with suppress(ImportError):
            import_module("pipeline.check").check_params(params)
        raise ConfigError(
            found=f"{PARAMS} with a value of which no estimate can be made "
            f"({type(error).__name__}: {error})",
            expected="parameters as presets/embedded.yaml has them",
            todo="run python -m stages.check, which names it, and correct it",
        ) from None


def _measured(lines: list[Line]) -> list[Line]:
    """The estimate with what a trial found in place of what was assumed."""
    try:
        from pipeline.trial import trial
    except ImportError as error:
        raise ConfigError(
            found=f"--dry-run without the pipeline's packages ({error})",
            expected="torch and transformers, which pass sequences through the target",
            todo="pip install lkcache[pipeline], or estimate without --dry-run",
        ) from None
    tokens = sum(line.value for line in lines if line.unit == "tokens")
    found = trial(Path(), num_tokens=round(tokens))
    cache = next(line for line in found if line.what == "cache")
    kept = [line for line in lines if line.what != "cache" and line.unit not in ("B/token", "h")]
    twice = [
        replace(line, value=2 * cache.value, label=cache.label) if "own copy" in line.what else line
        for line in kept
    ]
    return [*twice[:3], *found, *twice[3:]]


def _hours(params: dict[str, Any], lines: list[Line], tflops: float) -> list[Line]:
    """GPU-hours beside capture's: generating, about as much again, and training."""
    shape = target_shape(params)
    tokens, label = next((line.value, line.label) for line in lines if line.what == "tokens, train")
    forward = next(line.value for line in lines if line.unit == "h")
    found = [_generating(params, lines, Line("", forward, "h", label))]
    costs = training(
        params, vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, tokens=int(tokens)
    )
    for draft, operations in costs:
        hours = operations / (tflops * 1e12) / 3600
        found.append(Line(f"training {draft}, all its losses and seeds", hours, "h", label))
    total = forward + sum(line.value for line in found)
    return [*found, Line("all of it, evaluation apart", total, "h", label)]


def _generating(params: dict[str, Any], lines: list[Line], forward: Line) -> Line:
    """What a good engine takes to answer: the forward pass again, of the splits that it answers."""
    what = "generating, about as much again by a good engine"
    if params["generate"].get("train_responses") != "data":
        return replace(forward, what=what)
    named = {line.what: line.value for line in lines if line.unit == "tokens"}
    train, *held = (named[f"tokens, {split}"] for split in ("train", "heldout", "greedy"))
    share = sum(held) / max(train + sum(held), 1)
    what = "generating held-out responses, the others being the data's"
    return replace(forward, what=what, value=share * forward.value)


def _check(params: dict[str, object]) -> None:
    needed = ("target", "prepare", "generate", "capture", "warmup", "train", "drafts", *BLOCKS)
    for section in needed:
        if not isinstance(params.get(section), dict):
            raise ConfigError(
                found=f"params.yaml has no section {section}",
                expected="the whole parameter file of a project",
                todo="run from the project's root, or lkcache use PRESET",
            )


def _show(line: Line) -> str:
    if line.unit == "B":
        return num_bytes(line.value)
    if line.unit == "tokens":
        return f"{line.value:,.0f}"
    if line.unit == "h":
        return duration(3600 * line.value)
    return f"{line.value:.3g} {line.unit}"
