import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage.layout
from storage.layout import (
    ARRAYS,
    BITSHUFFLED,
    CODE_LEVEL,
    ENTRY_CHUNK,
    GROUP,
    MODES,
    NARROW_LEVEL,
    TABLE,
    TOKEN_CHUNK,
    VERSION,
    WIDE_LEVEL,
    Layout,
    chunk_length,
)
from tests.storage.samples import EIGHT, FULL, REBUILD, TOPK

FORMAT = (Path(storage.layout.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


def test_the_specification_lists_exactly_the_arrays_of_the_code() -> None:
    rows = re.findall(r"^\| `\w+` \|.*\|$", FORMAT, flags=re.MULTILINE)
    stated = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows]
    assert stated == [
        (f"`{a.name}`", ", ".join(a.dims), a.dtype, a.meaning, a.encoding) for a in TABLE
    ]


def test_the_specification_states_the_version_and_the_chunks_of_the_code() -> None:
    assert f"# The cache format, version {VERSION}\n" in FORMAT
    assert f"{TOKEN_CHUNK:,} tokens" in FORMAT
    assert f"{ENTRY_CHUNK:,} entries" in FORMAT
    assert f"G = ceil(D / {GROUP})" in FORMAT
    levels = f"level\n{WIDE_LEVEL} in arrays of more than one dim, {CODE_LEVEL} in `topk_p`"
    assert f"{levels} and {NARROW_LEVEL} elsewhere" in FORMAT
    assert all(f"`{name}`" in FORMAT for name in BITSHUFFLED)
    assert all(f"`{mode}`" in FORMAT for mode in MODES)


def test_a_layout_survives_its_json_form() -> None:
    for layout in (TOPK, FULL, REBUILD, EIGHT):
        assert Layout.from_dict(layout.as_dict()) == layout
    # caches written before there was a choice keep their bytes
    assert "hidden_dtype" not in TOPK.as_dict()


def test_a_layout_names_the_arrays_it_stores() -> None:
    names = {array.name for array in TOPK.arrays()}
    assert {"hidden", "last_hidden"} <= names
    assert "logits" not in names
    assert {"logits"} == {a.name for a in FULL.arrays()} - names
    eight = {a.name for a in EIGHT.arrays()}
    assert names - eight == {"hidden", "last_hidden"}
    features = ("hidden_int8", "hidden_scale", "last_hidden_int8", "last_hidden_scale")
    assert eight - names == set(features)
    assert [EIGHT.width(ARRAYS[name]) for name in features] == [(2, 200), (2, 2), (200,), (2,)]
    rebuilt = replace(REBUILD, hidden_dtype="int8")  # the laws come from last_hidden: it stays
    assert {a.name for a in rebuilt.arrays()} >= {"hidden_int8", "hidden_scale", "last_hidden"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sparse", 64, 8, (), False), "mode 'sparse'; expected one of topk, full, rebuild"),
        (("topk", 0, 8, (), False), "vocabulary of 0"),
        (("topk", 2**32, 8, (), False), "expected 1 to 4294967295"),
        (("topk", 64, 0, (), False), "hidden_size 0"),
        (("topk", 64, 8, (), False, "int4"), "hidden_dtype 'int4'; expected one of bfloat16, int8"),
        (("rebuild", 64, 8, (), False), "mode rebuild without last_hidden"),
    ],
)
def test_an_impossible_layout_is_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Layout(*arguments)


@given(st.sampled_from(TABLE), st.integers(0, 10**7), st.integers(1, 10**7))
def test_a_chunk_holds_a_row_and_no_more_than_a_mebibyte_of_wide_ones(
    array: storage.layout.Array, length: int, row_bytes: int
) -> None:
    chunk = chunk_length(array, length, row_bytes=row_bytes)
    assert 1 <= chunk <= max(1, length)
    assert len(array.dims) == 1 or chunk == 1 or chunk * row_bytes <= 1 << 20
