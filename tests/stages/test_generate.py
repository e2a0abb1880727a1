"""The stage generate on a tiny project."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.provenance import run
from stages.generate import main
from storage.errors import ConfigError, DataError
from storage.tables import CONVERSATIONS, PROMPTS, SEQUENCES, read_table, write_table
from storage.workspace import tree_digest
from tests.targets import copy_project, prompts, tokenizer, write_params, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_project(project, tmp_path))
    return tmp_path


def test_every_prompt_is_answered_in_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main()
    for split, source in (("train", "train"), ("heldout", "heldout"), ("greedy", "heldout")):
        rows = read_table(here / f"sequences/{split}.parquet", SEQUENCES)
        wanted = prompts(source, len(rows))
        assert [row["id"] for row in rows] == [prompt["id"] for prompt in wanted]
        assert {row["law"] for row in rows} == {"T=0" if split == "greedy" else "T=1"}
        for row, prompt in zip(rows, wanted, strict=True):
            start = row["turn"].count(-1)
            assert row["turn"] == [-1] * start + [0] * (len(row["tokens"]) - start)
            assert row["tokens"][:start] == tokenizer()(prompt["text"])["input_ids"][-12:]
            assert 0 < len(row["tokens"]) - start <= 10
            assert row["finished"] == (row["tokens"][-1] == 0)
    metrics = json.loads((here / "metrics/generate.json").read_text())
    assert metrics["train"]["sequences"] == 14
    assert metrics["heldout"]["tokens"] > 0
    assert set(metrics["train"]["mean_response_tokens_by_domain"]) == {"code", "prose"}
    assert json.loads((here / "timings/generate.json").read_text())["tokens_per_s"] > 0
    before = tree_digest(here / "sequences")
    capsys.readouterr()
    main()
    assert "sequences/ is complete, of these parameters and inputs" in capsys.readouterr().out
    assert tree_digest(here / "sequences") == before


def test_a_pre_empted_run_goes_on_where_it_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main()
    whole = tree_digest(here / "sequences")
    write_params(here, generate={"seed": 1})
    main()
    assert tree_digest(here / "sequences") != whole
    write_params(here)
    import pipeline.generate

    sampled, plain = [], pipeline.generate.sample

    def stops(target: Any, some: Any, **options: Any) -> Any:
        if len(sampled) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # pre-empted
        sampled.append([prompt.id for prompt in some])
        return plain(target, some, **options)

    monkeypatch.setattr("sys.argv", ["stage"])
    monkeypatch.setattr(pipeline.generate, "sample", stops)
    with pytest.raises(SystemExit, match="143"):
        run("generate", main)
    torn = sorted(here.glob(".scratch/generate/*/batches/*.json"))[0]
    torn.write_bytes(b"")
    sampled.clear()
    sampled.append([])  # room for two more batches, then it stops again
    with pytest.raises(SystemExit, match="143"):
        run("generate", main)
    monkeypatch.setattr(pipeline.generate, "sample", plain)
    main()
    assert tree_digest(here / "sequences") == whole


def test_the_data_trains_and_the_target_answers_what_is_held_out(here: Path) -> None:
    rows = [{**row, "response": "the cat went home"} for row in prompts("train", 3)]
    rows += [{**row, "response": "seven apples"} for row in prompts("heldout", 2)]
    write_table(here / "data/prompts.parquet", PROMPTS, rows)
    law = "T=0.7,top_p=0.9"
    write_params(here, generate={"laws": [law]})
    main()
    own = tables(here, law)
    write_params(here, generate={"train_responses": "data", "laws": [law]})
    main()
    found = tables(here, law)
    assert [row["law"] for row in found["train"]] == ["data"] * 3
    for row, prompt in zip(found["train"], prompts("train", 3), strict=True):
        start = row["turn"].index(0)
        assert row["tokens"][:start] == tokenizer()(prompt["text"])["input_ids"][-12:]
        reply = tokenizer()("the cat went home<|end|>")["input_ids"]
        assert row["tokens"][start:] == reply[:10]
        assert row["finished"] == (len(reply) <= 10)
    # what is held out is the target's, as if it had answered every prompt
    assert own.pop("train") != found.pop("train")
    assert own == found
    assert {row["law"] for row in found[law]} == {law}
    metrics = json.loads((here / "metrics/generate.json").read_text())
    drawn = sum(metrics[split]["response_tokens"] for split in ("heldout", "greedy", law))
    times = json.loads((here / "timings/generate.json").read_text())
    assert times["tokens_per_s"] == pytest.approx(drawn / times["worker_seconds"], rel=0.02)


def tables(folder: Path, *laws: str) -> dict[str, list[dict[str, Any]]]:
    names = {split: split for split in ("train", "heldout", "greedy")}
    names |= {law: f"served/{law}" for law in laws}
    return {s: read_table(folder / f"sequences/{n}.parquet", SEQUENCES) for s, n in names.items()}


def test_held_out_prompts_need_no_response_of_the_data(here: Path) -> None:
    write_params(here, generate={"train_responses": "data"})
    held = prompts("heldout", 2)
    rows = [{**row, "response": "went home"} for row in prompts("train", 2)]
    write_table(here / "data/prompts.parquet", PROMPTS, [*rows, *held])
    main()
    assert [row["law"] for row in tables(here)["greedy"]] == ["T=0", "T=0"]
    write_table(here / "data/prompts.parquet", PROMPTS, [*prompts("train", 2), *held])
    with pytest.raises(DataError, match=r"'train-0' has no response of its own; expected one with"):
        main()


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on a mat"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "went home"},
]


@pytest.fixture(scope="module")
def chat_project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_project(folder, tiny_model(vocab_size=300), chat_template=CHAT)
    return folder


@pytest.fixture
def chat(chat_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chat target; of three conversations of a split the last is far too long."""
    monkeypatch.chdir(copy_project(chat_project, tmp_path))
    rows, talks = [], []
    for split in ("train", "heldout"):
        for row, talk in zip(prompts(split, 3), (TALK, TALK[:2], LONG), strict=True):
            rows.append(row)
            talks.append({"split": split, "id": row["id"], "messages": json.dumps(talk)})
    write_table(tmp_path / "data/prompts.parquet", PROMPTS, rows)
    table = [{**talk, "tools": "[]"} for talk in talks]
    write_table(tmp_path / "data/conversations.parquet", CONVERSATIONS, table)
    return tmp_path


LONG = [{"role": "user", "content": "seven red apples " * 60}, TALK[1]]


def test_every_reply_of_the_data_is_a_turn(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"max_prompt_tokens": 30, "max_new_tokens": 60}
    write_params(chat, generate={"train_responses": "data", **sizes})
    main()
    rows = read_table(chat / "sequences/train.parquet", SEQUENCES)
    assert [row["id"] for row in rows] == ["train-0", "train-1"]
    assert {row["law"] for row in rows} == {"data"}
    words = tokenizer()
    turns = [
        [t for t, turn in zip(rows[0]["tokens"], rows[0]["turn"], strict=True) if turn == n]
        for n in (0, 1)
    ]
    assert [words.decode(turn) for turn in turns] == [" sat on a mat<|end|>", " went home<|end|>"]
    assert [row["finished"] for row in rows] == [True, True]
    metrics = json.loads((chat / "metrics/generate.json").read_text())
    assert metrics["train"]["left_out"] == {"no reply within the limit": 1}
    assert "train goes without 1 with no reply within the limit" in capsys.readouterr().err
    short = {"max_prompt_tokens": 20, "max_new_tokens": 2}  # the other held-out prompt is longer
    write_params(chat, generate={"train_responses": "data", **short})
    main()
    (cut, *_) = read_table(chat / "sequences/train.parquet", SEQUENCES)
    assert (len(cut["tokens"]), cut["finished"]) == (22, False)
    assert cut["tokens"] == rows[0]["tokens"][:22]


@pytest.mark.parametrize("whose", ["target", "data"])
def test_the_target_answers_the_last_user_turn(chat: Path, whose: str) -> None:
    write_params(chat, generate={"max_prompt_tokens": 80, "train_responses": whose})
    main()
    laws = {split: {row["law"] for row in rows} for split, rows in tables(chat).items()}
    train = "data" if whose == "data" else "T=1"
    assert laws == {"train": {train}, "heldout": {"T=1"}, "greedy": {"T=0"}}
    rows = read_table(chat / "sequences/heldout.parquet", SEQUENCES)
    assert [row["id"] for row in rows] == ["heldout-0", "heldout-1"]
    start = rows[0]["turn"].index(0)
    asked = "user: the cat<|end|>assistant: sat on a mat<|end|>user: and then<|end|>assistant:"
    assert rows[0]["tokens"][:start] == tokenizer()(asked)["input_ids"]
    assert set(rows[0]["turn"][start:]) == {0}
    metrics = json.loads((chat / "metrics/generate.json").read_text())
    assert metrics["heldout"]["left_out"] == {"a long prompt": 1}


def test_conversations_that_cannot_be_told_are_refused(chat: Path) -> None:
    sizes = {"max_prompt_tokens": 2, "max_new_tokens": 2}
    write_params(chat, generate={"train_responses": "data", **sizes})
    with pytest.raises(DataError, match="no conversation of a split has a reply within 4 tokens"):
        main()
    write_params(chat, generate={"train_responses": "data", "max_new_tokens": 250})
    with pytest.raises(DataError, match=r"conversations of up to 262 tokens; .*context of 256 tok"):
        main()
    (chat / "data/conversations.parquet").unlink()
    write_params(chat, generate={"train_responses": "data"})
    with pytest.raises(DataError, match="prompt 'train-0' has no response of its own; expected"):
        main()


def test_bad_inputs_cost_nothing(here: Path) -> None:
    main()
    before = tree_digest(here / "sequences")
    write_params(here, generate={"max_new_tokens": 250})
    with pytest.raises(
        DataError, match=r"prompt 'train-\d+' of \d+ tokens and a response of up to"
    ):
        main()
    write_params(here, generate={"engine": "vllm"})
    with pytest.raises(ConfigError, match=r"generate.engine is 'vllm'; expected"):
        main()
    write_params(here, generate={"engine": "none"})
    with pytest.raises(ConfigError, match=r"'none'; expected .*responses: train_responses: data\)"):
        main()
    write_params(here)
    write_table(here / "data/prompts.parquet", PROMPTS, prompts("train", 3))
    with pytest.raises(DataError, match="no prompt of the split 'heldout'"):
        main()
    assert tree_digest(here / "sequences") == before
