"""One section of `params.yaml` -> one frozen, strict model.

Knows no section's content: every model stands beside its owner (`CaptureConfig` in `capture.py`).
An unknown or missing key, a wrong type and a value out of bounds are `ConfigError`s that name the
file, the key, what was found and what was expected. YAML 1.2 through ruamel.yaml, as DVC reads it
(PyYAML takes `1e-4` for a string).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from storage.errors import ConfigError

PARAMS = Path("params.yaml")
LARGEST = 2**63 - 1  # of a whole number, as torch and numpy count
T = TypeVar("T")

# More than any machine or draft has; a slip of the keyboard is told before hours are spent on it.
Threads = Annotated[int, Field(ge=1, le=1024)]
"""Of one process."""
Processes = Annotated[int, Field(ge=1, le=1024)]
Gamma = Annotated[int, Field(ge=1, le=64)]
"""γ, and how far a draft is unrolled."""
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
"""Sequences or prompts at once."""
BatchTokens = Annotated[int, Field(ge=1, le=2**31)]
"""Of a batch or a part."""


class Strict(BaseModel):
    """Base of every section's model: frozen, no unknown key, no silent conversion, finite numbers.

    An infinite tolerance would pass every check, and digests know no JSON for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """All sections of a parameter file as plain values; `ConfigError` if it is no mapping.

    The file is read at every call and parsed once for each content; the values are the caller's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            found=f"no {path} in {Path.cwd()}",
            expected="the project's parameter file",
            todo="run from the project's root, where dvc.yaml lies",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            found=f"{path} is not UTF-8 (byte {error.start})",
            expected="a YAML 1.2 mapping of sections in UTF-8",
            todo=f"save {path} as UTF-8",
        ) from None
    try:
        params = deepcopy(_parsed(text))
    except YAMLError as error:
        raise ConfigError(
            found=f"{path} is not YAML: {_told(error)}",
            expected="a YAML 1.2 mapping of sections",
            todo=f"mend {path}",
        ) from None
    if not isinstance(params, dict):
        raise ConfigError(
            found=f"{path} is empty" if params is None else f"{path} holds {type(params).__name__}",
            expected="a mapping of sections",
            todo=f"mend {path}, or write it anew with lkcache use PRESET",
        )
    return params


@lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """Kept, as a stage loads several sections: parsing takes 40 ms, a copy a quarter of one."""
    return YAML(typ="safe", pure=True).load(text)


def parse(section: str, value: object, model: type[T] | Any, *, path: Path = PARAMS) -> T:
    """Validate one section's value; `model` is a pydantic model or any annotated type of them."""
    if large := next(_large(value), None):
        keys, number = large
        raise ConfigError(
            found=f"{path}: {'.'.join([section, *keys])} is {number:.3g}",
            expected=f"a whole number between -2^63 and 2^63, {LARGEST:.2g}",
            todo=f"correct it in {path}",
        )
    adapter = TypeAdapter(model)
    try:
        parsed: T = adapter.validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        where = ".".join([section, *_keys(first, value)])
        meant = _meant(first, found, adapter)
        raise ConfigError(**_sentence(where, first, len(found), path, meant)) from None
    return parsed


def near(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one most likely stands for; empty where none is near."""
    return next(iter(get_close_matches(name, list(known), n=1)), "")


def _told(error: YAMLError) -> str:
    """What is wrong with a file and where, without the parser's advice on its own options."""
    text = " ".join(str(error).split()).replace(' in "<unicode string>",', " at")
    return text.partition(" To suppress this check")[0]


def _large(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """The whole numbers that no tensor's size and no generator's seed can be."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _large(inner, (*keys, str(key)))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _large(inner, (*keys, str(place)))
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield keys, value


def _meant(unknown: Any, found: Sequence[Any], adapter: TypeAdapter[Any]) -> str:
    """The parameter that an unknown one most likely stands for: one that misses, else any."""
    if unknown["type"] != "extra_forbidden":
        return ""
    *parents, name = unknown["loc"]
    missing = [
        str(one["loc"][-1])
        for one in found
        if one["type"] == "missing" and [*one["loc"][:-1]] == parents
    ]
    schema = adapter.json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    return near(str(name), missing) or near(
        str(name), sorted({key for model in models for key in model.get("properties", {})})
    )


def load(section: str, model: type[T] | Any, *, path: Path = PARAMS) -> T:
    """Read and validate one section of `params.yaml`, by dotted name (`drafts.lm`)."""
    value: Any = read_params(path)
    for depth, key in enumerate(section.split(".")):
        if not isinstance(value, Mapping) or key not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no keys"
            parent = ".".join(section.split(".")[:depth]) or str(path)
            raise ConfigError(
                found=f"{path} has no {section}",
                expected=f"one of the keys of {parent}: {known}",
                todo=f"add {section} to {path} or correct the name",
            )
        value = value[key]
    return parse(section, value, model, path=path)


def _keys(error: Any, value: Any) -> list[str]:
    """The finding's place as keys of the user's file.

    A discriminated union puts its tag into pydantic's location; the file does not have it.
    """
    keys = []
    for depth, part in enumerate(error["loc"], start=1):
        inside = isinstance(part, int) or (isinstance(value, Mapping) and part in value)
        if inside:
            value = value[part] if isinstance(value, Mapping | list | tuple) else None
        if inside or (depth == len(error["loc"]) and error["type"] == "missing"):
            keys.append(str(part))
    return keys


def _sentence(where: str, error: Any, count: int, path: Path, meant: str) -> dict[str, str]:
    """The three parts of a `ConfigError` from the first of pydantic's findings."""
    more = f" (and {count - 1} more)" if count > 1 else ""
    if error["type"] == "missing":
        found, expected = f"{path}: {where} is missing", "a value for every parameter"
        todo = f"add {where} to {path}"
    elif error["type"] == "extra_forbidden":
        found, expected = f"{path}: {where} is unknown", "only parameters that a stage reads"
        todo = f"remove {where} from {path} or correct its spelling"
        if meant:
            todo += f" (is it {meant}?)"
    else:
        message = str(error["msg"]).removeprefix("Value error, ")
        is_section = isinstance(error["input"], Mapping) and error["type"] == "value_error"
        value = "not consistent" if is_section else repr(error["input"])
        found = f"{path}: {where} is {value}"
        expected = message[0].lower() + message[1:]
        todo = f"correct {where} in {path}"
    return {"found": found + more, "expected": expected, "todo": todo}
