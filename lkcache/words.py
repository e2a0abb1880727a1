"""Sizes, times and counts as the verbs print them."""


def counted(number: int, noun: str) -> str:
    """`1 part`, `1,024 parts`: nouns that take an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def num_bytes(value: float) -> str:
    """Three significant digits: `53.7 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def age(seconds: float) -> str:
    """`5 minutes ago`, in the largest unit that fits twice."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} seconds ago"


def duration(seconds: float) -> str:
    """Three significant digits in the largest unit that fits: `9.64 s`, `3.2 h`."""
    for size, unit in ((3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
