"""`lkcache estimate`: bytes, hours and free disk, before anything runs."""

from rich.console import Console
from rich.table import Table

from pipeline.config import read_params
from pipeline.estimate import Line
from pipeline.estimate import estimate as lines_of

# 2 cores of a laptop reach 0.15 TFLOP/s in fp32 (measured on the embedded target's training)
LAPTOP_TFLOPS = 0.15
EXIT_TOO_SMALL = 2


def estimate(tflops: float = LAPTOP_TFLOPS) -> int:
    """Print the estimate; returns an exit code, not 0 where the disk will not hold the cache."""
    lines = lines_of(read_params(), tflops=tflops)
    table = Table(title="capture, by params.yaml")
    for column in ("what", "how much", "label"):
        table.add_column(column, justify="right" if column == "how much" else "left")
    for line in lines:
        table.add_row(line.what, _show(line), line.label)
    console = Console()
    console.print(table)
    need = next(line.value for line in lines if line.what == "cache")
    free = next(line.value for line in lines if line.what == "free disk here")
    if need > free:
        console.print(
            f"the disk will not hold the cache: {_bytes(need)} needed, {_bytes(free)} free. What "
            "shrinks it: fewer capture.hidden_layers, last_hidden: false (each draft says which "
            "it needs), fewer prompts, a larger capture.min_prob, mode: topk."
        )
        return EXIT_TOO_SMALL
    return 0


def _show(line: Line) -> str:
    if line.unit == "B":
        return _bytes(line.value)
    if line.unit == "tokens":
        return f"{line.value:,.0f}"
    return f"{line.value:.3g} {line.unit}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
