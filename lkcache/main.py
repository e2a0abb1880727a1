"""The command `lkcache`: a table of verbs, each a file and a function of the same name.

A verb's module is imported when that verb runs, so that `--help` and the light verbs start without
what the heavy ones need; `storage` and `pipeline`, of which each project has its own, only after
`lkcache.project` has found them. A `LkcacheError` is printed as its sentence, without a traceback,
and exits with 2; a verb may return an exit code of its own.
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import cleandoc
from typing import Annotated, Any

import typer

from lkcache.project import activate, installed

EXIT_MENDABLE = 2

VERBS = {
    "clean": "List partial work that killed stages left, and remove it.",
    "compare": "Do B's drafts accept more than A's? Two projects, or git revisions.",
    "diff": "What two caches differ in: identity, coverage, values.",
    "estimate": "Bytes, hours and free disk, before anything runs.",
    "init": "Lay out a project that dvc repro runs in.",
    "inspect": "Where a cache comes from, what it holds, and the text with its alternatives.",
    "matrix": "Write the cells of params.yaml from lists of drafts, seeds and losses.",
    "repair": "Drop a cache's bad parts, so that capture computes only them again.",
    "show": "Samples of the training text, what is supervised in colour.",
    "use": "Write params.yaml from a preset and say what changed.",
    "verify": "Re-hash every file of a cache and check its structure.",
}


def main() -> None:
    """Run the verb that the command line names."""
    activate()
    app = typer.Typer(
        help="The offline logits cache for speculative-decoding drafts.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_group)  # a group, even while a single verb is loaded
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    if called in VERBS:
        function = _load(called)
        app.command(called, help=f"{VERBS[called]}\n\n{_paragraphs(function)}")(function)
    else:
        for verb, summary in VERBS.items():
            app.command(verb, help=summary)(_no_options)
    app(prog_name="lkcache")


def _paragraphs(function: Callable[..., None]) -> str:
    """A verb's docstring without its line ends: the terminal wraps it anew."""
    text = cleandoc(function.__doc__ or "")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _no_options() -> None:
    """Stand in where only names and summaries are listed."""


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"lkcache {installed()}")
        raise typer.Exit


def _group(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version),
    ] = False,
) -> None:
    """Options before a verb."""


def _load(verb: str) -> Callable[..., None]:
    """The verb's function, its errors turned into sentences and its result into an exit code."""
    from storage.errors import LkcacheError

    function: Callable[..., Any] = getattr(import_module(f"lkcache.{verb}"), verb)

    @wraps(function)
    def run(*args: object, **options: object) -> None:
        try:
            code = function(*args, **options)
        except LkcacheError as error:
            print(f"lkcache {verb}: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_MENDABLE) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(
                f"lkcache {verb}: {where}{(error.strerror or str(error)).lower()}; expected a file "
                "or folder that can be used so; correct the path, its rights or the disk's room.",
                file=sys.stderr,
            )
            raise typer.Exit(EXIT_MENDABLE) from None
        raise typer.Exit(code or 0)

    return run


if __name__ == "__main__":
    main()
