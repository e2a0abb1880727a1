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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse
from pipeline.corpus import SHARES, split_docstrings, stdlib_documents
from pipeline.duplicates import exact_duplicates, near_duplicates, overlaps
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
from pipeline.sources import check_source
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


def filters(**over: Any) -> dict[str, Any]:
    return {**STDLIB["filters"], **over}


def talk(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, **more}


def test_filters_drop_by_length_turns_and_language_and_count_all(lines: Any) -> None:
    rows = [talk(text_of(12, i), "well", language="en", id=i) for i in range(6)]
    rows += [
        talk("hi", "ho", language="en"),
        talk(text_of(90, 90), "well", language="en"),
        talk(text_of(12, 91), "a", text_of(12, 92), "b", language="en"),
        talk(text_of(12, 93), "well", language="ko"),
        talk(text_of(12, 94), "well"),
    ]
    wanted = filters(min_chars=20, max_chars=300, max_turns=1, languages=["en"])
    done = prepare(jsonl(lines(*rows), filters=wanted))
    assert {p.id for p in done.prompts} == {str(i) for i in range(6)}
    assert done.metrics["dropped"] == {
        "too few characters": 1,
        "too many characters": 1,
        "too many turns": 1,
        "another language": 2,
    }
    assert sum(sum(done.metrics["prompts"][s].values()) for s in ("train", "heldout")) == 6


def test_a_filter_that_drops_nothing_says_so_and_none_says_nothing(lines: Any) -> None:
    rows = [{"prompt": text_of(12, i)} for i in range(6)]
    assert prepare(jsonl(lines(*rows), filters=filters(min_chars=1))).metrics["dropped"] == {
        "too few characters": 0
    }
    assert "dropped" not in prepare(jsonl(lines(*rows))).metrics


def test_filters_that_drop_everything_are_named(lines: Any) -> None:
    path = lines({"prompt": "hi"}, {"prompt": "ho"})
    with pytest.raises(DataError, match=r"no usable document \(dropped: 2 too few characters\); ."):
        prepare(jsonl(path, filters=filters(min_chars=20)))


def test_no_row_holds_an_evaluation_prompt(lines: Any) -> None:
    question, later, short = text_of(30, 500), text_of(30, 501), "Say hello."
    sets = [
        lines({"question_id": 1, "category": "x", "turns": [question, later]}, name="q.jsonl"),
        lines({"question": short, "answer": "4"}, name="g.jsonl"),
    ]
    rows = [talk(text_of(12, i), "well", id=f"good-{i}") for i in range(6)]
    rows += [
        talk(text_of(80, 600) + " " + question + " " + text_of(80, 601), "well"),
        talk(text_of(12, 602), "well", " ".join(later.split()[:-6]), "well"),
        talk(text_of(12, 603), "well", short, "well"),
        talk(short + " And goodbye to you, to all of us.", "well", id="good-6"),
    ]
    done = prepare(jsonl(lines(*rows), filters=filters(evaluation_prompts=sets)))
    assert {p.id for p in done.prompts} == {f"good-{i}" for i in range(7)}
    assert done.metrics["dropped"] == {"an evaluation prompt": 3}
    with pytest.raises(DataError, match=r"no\.jsonl; .*that prepare\.filters\.evaluation_prompts "):
        prepare(jsonl(lines(*rows), filters=filters(evaluation_prompts=["no.jsonl"])))


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=2, max_size=7),
    threshold=st.sampled_from([0.3, 0.5, 1.0]),
)
def test_overlaps_are_those_of_the_obvious_algorithm(
    seeds: list[tuple[int, int]], threshold: float
) -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}

    texts = [
        " ".join([*text_of(60, seed).split()[cut:], *text_of(cut, seed + 10 * cut).split()])
        for seed, cut in seeds
    ]
    reference, rows = texts[:2], [[text, text_of(9, i)] for i, text in enumerate(texts[2:])]
    expected = set()
    for index, row in enumerate(rows):
        mine = set().union(*map(shingles, row))
        held = [len(shingles(r) & mine) / len(shingles(r)) for r in reference]
        if max(held) >= threshold:
            expected.add(index)
    assert overlaps(rows, reference, threshold) == expected


def test_parts_of_a_mix_take_turns_by_weight_and_name_their_rows(lines: Any) -> None:
    chat = lines(*(talk(text_of(12, i), "well", id=i) for i in range(60)), name="chat.jsonl")
    code = lines(*({"prompt": text_of(12, 100 + i), "domain": "python"} for i in range(60)),
                 name="code.jsonl")  # fmt: skip
    few = lines(*({"prompt": text_of(12, 200 + i)} for i in range(4)), name="few.jsonl")
    parts = {
        name: {"weight": weight, "source": {"kind": "jsonl", "train": path, "heldout": None}}
        for name, weight, path in (("chat", 3.0, chat), ("code", 1.0, code), ("few", 1.0, few))
    }
    done = prepare(
        config(source={"kind": "mix", "parts": parts}, train_prompts=40, heldout_prompts=5)
    )
    train = [p for p in done.prompts if p.split == "train"]
    # `few` has three training rows; the others go on in their own proportion
    assert done.metrics["prompts_by_part"]["train"] == {"chat": 28, "code": 9, "few": 3}
    first = Counter(p.source for p in train[:10])
    assert first == {"chat": 6, "code": 2, "few": 2}
    assert {p.domain for p in train} == {"chat", "python", "few"}
    assert all(p.id.startswith(f"{p.source}/") for p in train)
    assert len(done.prompts) == 45


def test_rows_that_nobody_can_use_are_counted(lines: Any) -> None:
    human, gpt = {"from": "human", "value": "how"}, {"from": "gpt", "value": "so"}
    rows = [{"conversations": [{**human, "value": text_of(12, i)}, gpt]} for i in range(5)]
    done = prepare(jsonl(lines(*rows, {"conversations": []}, {"conversations": [gpt, human]})))
    assert done.metrics["dropped"] == {"a reply before the first question": 1, "no turn": 1}


HUB = {"kind": "hub", "revision": None, "subset": None, "train": "train", "heldout": None}


@pytest.fixture
def dataset(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A folder that the datasets library reads: a parquet and a JSON-lines split."""
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [talk(text_of(12, i), "well", prompt_id=f"p{i}") for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    held = [talk(text_of(12, 50 + i), "well", prompt_id=f"h{i}") for i in range(3)]
    pq.write_table(pa.Table.from_pylist(held), folder / "test-00000-of-00001.parquet")
    return str(folder)


def test_a_hub_data_set_reads_from_a_folder(dataset: str) -> None:
    done = prepare(config(source={**HUB, "id": dataset, "train": "train[:6]", "heldout": "test"}))
    assert {p.id for p in done.prompts if p.split == "train"} == {f"p{i}" for i in range(6)}
    assert {p.id for p in done.prompts if p.split == "heldout"} == {"h0", "h1", "h2"}
    assert done.prompts[0].messages[1] == {"role": "assistant", "content": "well"}


def test_a_split_that_the_data_set_has_not_is_named(dataset: str) -> None:
    with pytest.raises(DataError, match=r"cannot read the split 'nope' of .*set: .*; expected a d"):
        prepare(config(source={**HUB, "id": dataset, "train": "nope"}))


def test_a_data_set_or_revision_out_of_reach_is_named(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    gone = {**HUB, "id": "org/name", "revision": COMMIT}
    with pytest.raises(
        DataError, match=rf"split 'train' of org/name at {COMMIT}: .*; correct prepa"
    ):
        prepare(config(source=gone))


def test_a_row_of_a_data_set_is_named_by_its_number(dataset: str, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"messages": [{"role": "who", "content": "a"}]}\n')
    with pytest.raises(DataError, match=r"bad, row 1 has messages\[0\]\.role 'who'; .*remove the "):
        prepare(config(source={**HUB, "id": str(folder)}))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({**HUB, "id": "org/name"}, r"revision None for the hub's org/name; expected a commit of "),
        ({**HUB, "id": "org/name", "revision": "main"}, r"revision 'main' for the hub's org/name"),
        ({**HUB, "id": "./gone"}, r"names \./gone, which is no folder; expected a folder with dat"),
        ({**HUB, "id": "tests", "revision": COMMIT}, r"for the local folder tests; expected null"),
        ({"kind": "jsonl", "train": "no.json", "heldout": None}, r"names no\.json, which is no fi"),
    ],
)
def test_a_source_that_cannot_be_is_refused_before_anything_runs(
    source: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.find_spec", lambda _: True)
    for whole in (source, {"kind": "mix", "parts": {"a": {"weight": 1.0, "source": source}}}):
        with pytest.raises(ConfigError, match=sentence):
            check_source(config(source=whole).source)


def test_a_hub_source_without_the_datasets_library_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.sources.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'is not installed; .*pip install "lkcache\[data\]"'):
        check_source(config(source={**HUB, "id": "tests"}).source)


def test_a_mix_needs_parts_and_weights() -> None:
    part = {"weight": 0.0, "source": {"kind": "stdlib", "max_chars": 10_000}}
    with pytest.raises(ConfigError, match=r"parts\.a\.weight is 0\.0; expected .*greater than 0"):
        config(source={"kind": "mix", "parts": {"a": part}})
    with pytest.raises(ConfigError, match=r"prepare\.source\.parts is .*at least 1"):
        config(source={"kind": "mix", "parts": {}})
