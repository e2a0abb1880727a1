"""Memory that ran out, as a sentence that names the parameters to lower; torch-free.

CUDA's allocator, the CPU's, Python and numpy each have an error of their own; what they share is
known here by type or message, so that `report` may ask without loading torch.
"""

import errno
import re

from storage.errors import WorkspaceError

# of torch's CPU allocator, CUDA's libraries and the operating system
MESSAGES = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|can(?:'|no)t allocate memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
SHOWN_CHARACTERS = 120
WORKERS = "or cluster.workers where workers share the memory"
SPREAD = "or spread the target over devices (cluster.parallel, target.tensor_parallel)"
FITTED = ("warmup", "train")
FIT = (
    "lower {0}.micro_batch_sequences (null is all of {0}.batch_sequences) or {0}.pack_tokens, set "
    "{0}.checkpoint_depths: true or {0}.dtype: bfloat16, or share a pass ({0}.ranks)"
)

# stage -> what is to fit, and what makes it smaller, the first to try first
ADVICE = {
    "prepare": ("the documents and prompts", "lower prepare.source.max_chars"),
    "target": (
        "the target and a batch that it trains on",
        "lower target.batch_sequences, or take a machine that holds a pretrained target",
    ),
    "generate": (
        "the target and a batch of responses",
        f"lower generate.batch_sequences, generate.max_new_tokens, {WORKERS}, {SPREAD}",
    ),
    "capture": (
        "the target and a batch of sequences",
        f"lower capture.batch_tokens, capture.part_tokens, {WORKERS}, {SPREAD}",
    ),
    "verify": (
        "the target and its longest sequence",
        f"free the device, lower cluster.workers where workers share the memory, {SPREAD}",
    ),
    "evaluate": (
        "the target, a draft and a batch of prompts",
        f"lower evaluate.batch_sequences (a replay's), evaluate.decode_batch, {WORKERS}, {SPREAD}",
    ),
    "report": ("all tables of results", "lower report.resamples"),
    **{stage: ("the draft and the activations of a pass", FIT.format(stage)) for stage in FITTED},
}


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError is a RuntimeError; so is what its CPU allocator raises
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or bool(MESSAGES.search(str(error)))
    )


def told(error: BaseException) -> str:
    """What an allocator said, on one line and cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} …"


def memory_error(error: BaseException, stage: str, at: str = "") -> WorkspaceError | None:
    """What a user can mend about memory that ran out, as a sentence; None for any other error.

    `at` is the unit at work, if one is known: `step 12 of 160`.
    """
    if not is_memory_error(error):
        return None
    what, todo = ADVICE.get(stage, ("this stage's work", "take a machine with more memory"))
    return WorkspaceError(
        found=f"memory ran out{f' at {at}' if at else ''} ({told(error)})",
        expected=f"room for {what}",
        todo=f"{todo}, and run dvc repro: what is finished is kept (a stage whose own parameters "
        "change starts anew)",
    )
