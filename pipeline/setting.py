"""The law that tokens are served by and how drafts are drawn, under one name: `T=0.7,top_p=0.9`.

A name is what parameters say and results are keyed by: `T=` first, then `top_k=`, `top_p=` and
`drafts=greedy` where they stand, in the order in which they act. Every law has one name only:
what cuts nothing or says T = 0 in other words is refused. `T=1` and `T=0` are *plain*, as is any
temperature alone; cuts and greedy drafts are not. Torch-free: a report reads names too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

FORM = (
    "a name of T=<temperature>, then top_k=<at least 2>, top_p=<between 0 and 1>, drafts=greedy "
    "where wanted, joined by commas; T=0 stands alone"
)


@dataclass(frozen=True)
class Setting:
    """A served law of the target, and how the draft draws from its own (served alike)."""

    temperature: float
    """0: the likeliest token, of target and draft."""
    top_k: int | None = None
    top_p: float | None = None
    drafts: Literal["sampled", "greedy"] = "sampled"
    """`greedy`: always argmax q, kept with p(argmax q)."""

    def __post_init__(self) -> None:
        """Refuse a second name of a law; `ValueError` says what a name looks like."""
        whole = 0 <= self.temperature < float("inf")
        cuts = self.top_k is not None or self.top_p is not None
        if self.top_k is not None and self.top_k < 2:
            whole = False
        if self.top_p is not None and not 0 < self.top_p < 1:
            whole = False
        if self.temperature == 0 and (cuts or self.drafts == "greedy"):
            whole = False
        if not whole:
            raise ValueError(FORM)

    @classmethod
    def parse(cls, name: str) -> "Setting":
        """The setting of a name; `ValueError` says what a name looks like."""
        readers: dict[str, Callable[[str], float | int | str]] = {
            "T": float,
            "top_k": int,
            "top_p": float,
            "drafts": str,
        }
        found: dict[str, float | int | str] = {}
        order = list(readers)
        for piece in name.split(","):
            key, equals, text = piece.partition("=")
            late = key in readers and all(order.index(k) < order.index(key) for k in found)
            if not equals or not late:
                raise ValueError(FORM)
            try:
                found[key] = readers[key](text)
            except ValueError:
                raise ValueError(FORM) from None
        if "T" not in found or found.get("drafts", "greedy") != "greedy":
            raise ValueError(FORM)
        return cls(temperature=found.pop("T"), **found)  # type: ignore[arg-type]

    @property
    def law(self) -> str:
        """The name of the served law alone: what rollouts are samples of."""
        pieces = [f"T={self.temperature:.12g}"]
        pieces += [] if self.top_k is None else [f"top_k={self.top_k}"]
        pieces += [] if self.top_p is None else [f"top_p={self.top_p:.12g}"]
        return ",".join(pieces)

    @property
    def name(self) -> str:
        """`T=0.7,top_k=50,top_p=0.9,drafts=greedy`."""
        return self.law + (",drafts=greedy" if self.drafts == "greedy" else "")

    @property
    def words(self) -> str:
        """`T = 0.7, top-k 50, top-p 0.9, greedy drafts`."""
        pieces = [f"T = {self.temperature:.12g}"]
        pieces += [] if self.top_k is None else [f"top-k {self.top_k}"]
        pieces += [] if self.top_p is None else [f"top-p {self.top_p:.12g}"]
        pieces += ["greedy drafts"] if self.drafts == "greedy" else []
        return ", ".join(pieces)

    @property
    def plain(self) -> bool:
        """A temperature alone, drafts sampled."""
        return self == Setting(self.temperature)

    @property
    def served(self) -> "Setting":
        """The law alone, whatever the drafts."""
        return replace(self, drafts="sampled")

    @property
    def order(self) -> tuple[float, float, float, bool]:
        """Rises with the temperature and with what the cuts leave; greedy drafts come first."""
        top_k = float("inf") if self.top_k is None else float(self.top_k)
        top_p = 1.0 if self.top_p is None else self.top_p
        return (self.temperature, top_k, top_p, self.drafts == "sampled")


def _known(name: str) -> str:
    return Setting.parse(name).name


def _once(names: Sequence[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("each law once")
    return list(names)


Name = Annotated[str, AfterValidator(_known)]
"""In a section of `params.yaml`; read into its one spelling (`T=1.0` is `T=1`)."""
Names = Annotated[list[Name], AfterValidator(_once)]
SomeNames = Annotated[list[Name], Field(min_length=1), AfterValidator(_once)]
