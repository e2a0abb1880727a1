"""The tree of failures that a user can mend.

    LkcacheError
    ├── ConfigError        params.yaml: unknown, missing, mistyped, out of range, inconsistent
    ├── DataError          prompts, documents, sequences
    ├── TargetError        the target model, its tokenizer, its weights
    ├── CacheError         the zarr cache
    │   ├── MissingManifest
    │   ├── NewerFormat
    │   ├── FingerprintMismatch
    │   └── CorruptPart
    ├── DraftError         a draft, its checkpoint, what it needs of the cache
    ├── ResultError        results that cannot be compared
    └── WorkspaceError     disk full, no permission, another process at work

Every message says what was found, what was expected and what to do. The shell of a stage
(`pipeline.provenance.run`) and of the command prints it without a traceback and exits with 2;
a broken invariant of our own is an `assert` or an ordinary exception and keeps its traceback.
"""


class LkcacheError(Exception):
    """Something that the user can mend; the message is one sentence in three parts."""

    def __init__(self, *, found: str, expected: str, todo: str) -> None:
        """Keep the three parts and join them: `found; expected …; todo.`"""
        self.found, self.expected, self.todo = found, expected, todo
        super().__init__(f"{found}; expected {expected}; {todo}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive a trip between processes: dask pickles what a worker raises."""
        return _rebuild, (type(self), self.found, self.expected, self.todo)


def _rebuild(kind: type[LkcacheError], found: str, expected: str, todo: str) -> LkcacheError:
    return kind(found=found, expected=expected, todo=todo)


class ConfigError(LkcacheError):
    """A parameter is unknown, missing, mistyped, out of range or inconsistent with another."""


class DataError(LkcacheError):
    """Prompts, documents or sequences cannot be used."""


class TargetError(LkcacheError):
    """The target's weights, tokenizer or configuration cannot be used."""


class CacheError(LkcacheError):
    """A cache cannot be read or written."""


class MissingManifest(CacheError):
    """A cache without its manifest: unfinished, or not a cache."""


class NewerFormat(CacheError):
    """A cache written by a newer format than this code reads."""


class FingerprintMismatch(CacheError):
    """Two artifacts of different origin meet."""


class CorruptPart(CacheError):
    """A part of a cache is missing, truncated, altered or misplaced."""


class DraftError(LkcacheError):
    """A draft, its checkpoint or what it needs of the cache does not fit."""


class ResultError(LkcacheError):
    """Results of different caches, prompts or targets in one comparison."""


class WorkspaceError(LkcacheError):
    """Disk full, no permission, or another process at work on the same output."""
