"""Documents and prompts: domains, duplicates, splits, cuts, and what is refused."""

import ast
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse
from pipeline.corpus import SHARES, split_docstrings, stdlib_documents
from pipeline.duplicates import exact_duplicates, near_duplicates
from pipeline.layouts import read_rows
from pipeline.problems import problem_set
from pipeline.prompts import (
    Piece,
    PrepareConfig,
    Prepared,
    cut_prompts,
    drop_duplicates,
    prepare,
    split_documents,
)
from pipeline.seeds import rng
from storage.errors import ConfigError, DataError

STDLIB: dict[str, Any] = {
    "source": {"kind": "stdlib", "max_chars": 400_000},
    "filters": {
        "min_chars": None,
        "max_chars": None,
        "max_turns": None,
        "languages": None,
        "evaluation_prompts": [],
    },
    "seed": 0,
    "heldout_fraction": 0.2,
    "near_duplicate": 0.5,
    "train_prompts": 120,
    "heldout_prompts": 30,
    "prompt_chars": 110,
}


def config(**over: Any) -> PrepareConfig:
    parsed: PrepareConfig = parse("prepare", {**STDLIB, **over}, PrepareConfig)
    return parsed


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(config())


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """Write a JSON-lines file; a row is an object or raw bytes."""

    def write(*rows: Any, name: str = "train.jsonl") -> str:
        encoded = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        (tmp_path / name).write_bytes(b"\n".join(encoded) + b"\n")
        return str(tmp_path / name)

    return write


def jsonl(train: str, heldout: str | None = None, **over: Any) -> PrepareConfig:
    source = {"kind": "jsonl", "train": train, "heldout": heldout}
    return config(source=source, **over)


def text_of(words: int, seed: int) -> str:
    return " ".join(map(str, rng(seed, "words").integers(0, 10_000, words)))


def test_domains_stand_in_proportion_and_within_the_limit(prepared: Prepared) -> None:
    sizes: Counter[str] = Counter()
    for document in prepared.documents:
        sizes[document.domain] += len(document.text)
    for domain, share in SHARES.items():
        assert sizes[domain] == pytest.approx(share * 400_000, rel=0.6)


def test_split_domains_share_no_document(prepared: Prepared) -> None:
    for domain in SHARES:
        by_split = [
            {d.id for d in prepared.documents if d.domain == domain and d.split == split}
            for split in ("train", "heldout")
        ]
        assert all(by_split)
        assert not by_split[0] & by_split[1]


def test_prompts_come_from_their_own_split_and_are_distinct(prepared: Prepared) -> None:
    texts = {
        split: "\n\n".join(d.text for d in prepared.documents if d.split == split)
        for split in ("train", "heldout")
    }
    assert all(prompt.text in texts[prompt.split] for prompt in prepared.prompts)
    assert len({" ".join(p.text.split()) for p in prepared.prompts}) == len(prepared.prompts)
    assert len({p.id for p in prepared.prompts}) == len(prepared.prompts)


def test_prompts_are_balanced_over_domains_from_the_first_on(prepared: Prepared) -> None:
    for split, count in (("train", 120), ("heldout", 30)):
        domains = [p.domain for p in prepared.prompts if p.split == split]
        assert Counter(domains) == dict.fromkeys(SHARES, count // 3)
        assert set(domains[:3]) == set(SHARES)


def test_prompts_have_their_length_and_begin_at_a_natural_place(prepared: Prepared) -> None:
    whole = {split: "\n" + "\n\n".join(d.text for d in prepared.documents if d.split == split)
             for split in ("train", "heldout")}  # fmt: skip
    for prompt in prepared.prompts:
        assert 0.8 * 110 <= len(prompt.text) <= 110
        before = whole[prompt.split][: whole[prompt.split].index(prompt.text)]
        assert before.endswith(("\n", ". ", "! ", "? "))


def test_same_parameters_give_the_same_rows_and_another_seed_others(prepared: Prepared) -> None:
    small = {"source": {"kind": "stdlib", "max_chars": 60_000}, "train_prompts": 9}
    few = {**small, "heldout_prompts": 6}
    assert prepare(config(**few)) == prepare(config(**few))
    assert prepare(config(**few)).prompts != prepare(config(**few, seed=1)).prompts


def test_docstrings_leave_the_code_and_become_prose() -> None:
    lines = ['"""Module."""', "import os", "class A(B):", '    """Only é."""', "def f():"]
    lines += ['    "Doc."', "    # kept", '    return "text"']
    source = "\n".join(lines).encode()
    code, prose = split_docstrings(source)
    ast.parse(code)
    assert prose == "Module.\n\nA\nOnly é.\n\nf\nDoc."
    assert code.split() == (
        'import os class A(B): pass def f(): # kept return "text"'.split()  # noqa: SIM905
    )


@pytest.mark.parametrize("module", ["json/decoder.py", "textwrap.py", "dataclasses.py"])
def test_stripped_library_code_still_parses_and_holds_no_docstring(module: str) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    code, prose = split_docstrings((library / module).read_bytes())
    tree = ast.parse(code)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    assert all(ast.get_docstring(n) is None for n in ast.walk(tree) if isinstance(n, owners))
    assert len(prose) > 100


def test_a_file_that_is_not_utf8_or_does_not_parse_gives_no_text() -> None:
    assert split_docstrings(b"x = '\xff'") == ("", "")
    assert split_docstrings(b"def") == ("", "")


def test_solutions_of_problems_are_right() -> None:
    """Every `a op b … = c` that a solution states holds."""
    stated = re.compile(r"(?<![\d/=] )(?<![\d.])((?:\d+ [-+*] )+\d+) = (-?\d+)(?![\d/]| [-+*])")
    checked = 0
    for number in range(20):
        for left, right in stated.findall(problem_set(rng(0, number))):
            value = eval(left)  # digits and operators only, by the pattern
            assert value == int(right), f"{left} = {right}"
            checked += 1
    assert checked > 300


def test_documents_stay_below_the_limit_by_at_most_one_each() -> None:
    few = stdlib_documents(30_000, 0)
    assert {d.domain for d in few} == set(SHARES)
    for domain, share in SHARES.items():
        sizes = [len(d.text) for d in few if d.domain == domain]
        assert sum(sizes) - sizes[-1] < share * 30_000


def brute_jaccard(a: str, b: str) -> float:
    sets = []
    for text in (a, b):
        words = text.split()
        sets.append({tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=2, max_size=9),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_near_duplicates_are_those_of_the_obvious_algorithm(
    seeds: list[tuple[int, int]], threshold: float
) -> None:
    texts = []
    for seed, cut in seeds:  # pieces of the same four texts overlap to every degree
        words = text_of(60, seed).split()
        texts.append(" ".join([*words[cut:], *text_of(cut, seed + 10 * cut).split()]))
    kept: list[int] = []
    expected = {}
    for later, text in enumerate(texts):
        repeat = next((k for k in kept if brute_jaccard(texts[k], text) >= threshold), None)
        if repeat is None:
            kept.append(later)
        else:
            expected[later] = repeat
    assert near_duplicates(texts, threshold) == expected


def test_texts_below_eight_words_repeat_only_when_equal() -> None:
    assert near_duplicates(["a b", "a c", "a b"], 0.5) == {2: 0}
    assert exact_duplicates(["a  b", "a c", "a b\n"]) == {2: 0}


def test_dropped_duplicates_are_counted_by_kind() -> None:
    long = text_of(50, 0)
    texts = [long, long + " ", long + " and one more", text_of(50, 1)]
    kept, removed = drop_duplicates([Piece(str(i), "x", "", t) for i, t in enumerate(texts)], 0.5)
    assert [d.id for d in kept] == ["0", "3"]
    assert removed == {"exact": 1, "near": 1}


def test_a_domain_of_one_document_trains() -> None:
    split = split_documents([Piece("only", "x", "", "text")], fraction=0.5, seed=0)
    assert [d.split for d in split] == ["train"]


def test_a_domain_that_runs_out_is_filled_up_by_the_others() -> None:
    made = [Piece(f"{d}{i}", d, "train", f"{d} {i}", whole=True)
            for d, n in (("a", 2), ("b", 9)) for i in range(n)]  # fmt: skip
    chosen = cut_prompts(made, "train", set(), config=config(train_prompts=8))
    assert Counter(p.domain for p in chosen) == {"a": 2, "b": 6}


def test_jsonl_prompts_are_kept_whole_with_their_ids_and_responses(lines: Any) -> None:
    rows = [{"prompt": f"{text_of(12, i)}?", "id": i, "domain": "qa", "response": "so", "more": 1}
            for i in range(10)]  # fmt: skip
    done = prepare(jsonl(lines(*rows)))
    assert {p.id for p in done.prompts} == {str(i) for i in range(10)}
    assert {p.text for p in done.prompts} == {r["prompt"] for r in rows}
    assert {p.response for p in done.prompts} == {"so"}
    assert done.metrics["prompts"] == {"heldout": {"qa": 2}, "train": {"qa": 8}}


def test_jsonl_texts_are_cut_and_a_heldout_file_is_its_own_split(lines: Any) -> None:
    train = lines(*({"text": "\n".join(text_of(20, 10 * i + j) for j in range(9))}
                    for i in range(3)))  # fmt: skip
    held = lines({"text": "\n".join(text_of(20, 900 + j) for j in range(9))}, name="held.jsonl")
    done = prepare(jsonl(train, held))
    assert done.metrics["documents"] == {"train": {"all": 3}, "heldout": {"all": 1}}
    assert all(len(p.text) <= 110 for p in done.prompts)


LINE = r"train.jsonl, line 2 "
GOOD = {"prompt": "What is this?"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (b'{"prompt": "\xff"}', LINE + "is not UTF-8 at byte 12; expected UTF-8 text; mend or"),
        (b'{"prompt": ', LINE + r"is not JSON \(.*\); expected one JSON object a line; mend"),
        (b"[1]", LINE + "holds a list; expected one JSON object a line; mend or remove the line"),
        ({"q": "x"}, LINE + "has neither prompt nor text; expected .*; mend or remove the line"),
        ({"prompt": "a", "text": "b"}, LINE + "has both prompt and text; expected"),
        ({"prompt": " "}, LINE + "has prompt ' '; expected text that is not blank; mend"),
        ({"prompt": 7}, LINE + "has prompt 7; expected text that is not blank; mend"),
        ({"text": "a", "domain": ["x"]}, LINE + r"has domain \['x'\]; expected text that is not"),
        ({"prompt": "a", "id": "train-1"}, LINE + "repeats the id 'train-1'; expected ids of"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(lines: Any, row: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_rows(Path(lines(GOOD, row)))


def test_a_source_that_is_missing_or_empty_is_refused(lines: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*none\.jsonl; expected the JSON-lines file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl is empty; expected at least one row"):
        read_rows(Path(lines(b"", b"  ")))


def test_a_heldout_row_that_repeats_a_training_row_is_refused(lines: Any) -> None:
    text = text_of(40, 0)
    for again in (text, text + " and a little more"):
        train = lines({"text": text}, {"text": text_of(40, 1)})
        held = lines({"text": again, "id": "h"}, name="held.jsonl")
        with pytest.raises(
            DataError,
            match=r"1 held-out rows of .* repeat training rows \(row 'h' is row 'train-1'",
        ):
            prepare(jsonl(train, held))


def test_too_few_places_for_prompts_are_refused(lines: Any) -> None:
    with pytest.raises(DataError, match=r"0 places for a heldout prompt .* in 0 documents; expect"):
        prepare(jsonl(lines({"text": "short"})))
    few = config(source={"kind": "stdlib", "max_chars": 10_000}, heldout_prompts=5000)
    with pytest.raises(DataError, match=r"places for a heldout prompt .*; expected at least 5000;"):
        prepare(few)


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"source": {"kind": "stdlib", "max_chars": 1}}, r"prepare\.source\.max_chars is 1; expec"),
        ({"source": {"kind": "web"}}, r"prepare\.source is .*'stdlib', 'jsonl', 'hub', 'mix'"),
        ({"heldout_fraction": 1.0}, r"prepare\.heldout_fraction is 1\.0; expected .* less than 1"),
        ({"near_duplicate": 0.0}, r"prepare\.near_duplicate is 0\.0; expected .* greater than 0"),
        ({"train_prompts": 0}, r"prepare\.train_prompts is 0; expected .* 1"),
        ({"prompt_chars": "x"}, r"prepare\.prompt_chars is 'x'; expected .*integer"),
        ({"more": 1}, r"prepare\.more is unknown"),
    ],
)
def test_bad_parameters_are_named(over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**over)


def test_shingle_hashes_spread() -> None:
    """Texts of small numbers, the worst case for a product of ids, do not collide."""
    texts = [" ".join(map(str, row)) for row in np.ndindex(4, 4, 4, 4)]
    assert near_duplicates([f"{t} {t}" for t in texts], 1.0) == {}
