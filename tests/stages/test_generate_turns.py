"""The stage generate where the target answers every user turn, with both engines."""

import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import pipeline.generate
from pipeline.chat import prompt_tokens
from pipeline.provenance import run
from stages.generate import main
from storage.errors import ConfigError, DataError, TargetError
from storage.tables import CONVERSATIONS, PROMPTS, SEQUENCES, read_table, write_table
from storage.workspace import tree_digest
from tests.pipeline.test_server import Fake
from tests.stages.test_generate_served import SERVER, Drawing
from tests.targets import WORDS, copy_project, prompts, tokenizer, write_params, write_project

CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LIMITS = {"max_prompt_tokens": 120, "max_new_tokens": 24}
SPLITS = ("train", "heldout", "greedy")
COUNT = {"train": 12, "heldout": 6}


def talkative(model: Any) -> Any:
    """A model of bigrams: after the prompt it says three words and ends, or wanders off.

    Its state is its last token's embedding, and a part that all embeddings share, by which the head
    prefers some words and letters: words are read as they were written, letters may join.
    """
    import torch

    words = tokenizer()
    single = [ids[0] for w in dict.fromkeys(WORDS) if len(ids := words(" " + w)["input_ids"]) == 1]
    liked = [0, *single, *words("abcde" + ":")["input_ids"][:-1]]
    colon, generator = words(":")["input_ids"][0], torch.Generator().manual_seed(0)
    embed = torch.randn(300, 32, generator=generator)
    shared = torch.randn(32, generator=generator)
    model.model.embed_tokens.weight.copy_(embed + shared)
    head = torch.randn(300, 32, generator=generator) * 0.1
    head[liked] += 5 * shared / (shared @ shared)
    for before, after in pairwise([colon, *single[:3], 0]):
        head[after] += 4 * embed[before] / (embed[before] @ embed[before])
    model.lm_head.weight.copy_(head)
    return model


@pytest.fixture(scope="module")
def chat_project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    write_project(folder, talkative(tiny_model(vocab_size=300)), chat_template=CHAT)
    rows, talks = [], []
    for split, count in COUNT.items():
        for i, row in enumerate(prompts(split, count)):
            said = [row["text"], *(WORDS[(i + j) % len(WORDS)] for j in range(i % 4))]
            turns = [
                {"role": role, "content": text}
                for asked in said
                for role, text in (("user", asked), ("assistant", "the data's own"))
            ]
            rows.append(row)
            talks.append(
                {"split": split, "id": row["id"], "messages": json.dumps(turns), "tools": "[]"}
            )
    write_table(folder / "data/prompts.parquet", PROMPTS, rows)
    write_table(folder / "data/conversations.parquet", CONVERSATIONS, talks)
    return folder


@pytest.fixture
def here(chat_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_project(chat_project, tmp_path))
    write_params(tmp_path, generate={"turns": "every", **LIMITS})
    return tmp_path


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {s: read_table(folder / f"sequences/{s}.parquet", SEQUENCES) for s in SPLITS}


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics/generate.json").read_text())
    return found


def messages(folder: Path, split: str) -> dict[str, list[dict[str, str]]]:
    rows = read_table(folder / "data/conversations.parquet", CONVERSATIONS)
    return {row["id"]: json.loads(row["messages"]) for row in rows if row["split"] == split}


def test_every_turn_is_asked_behind_the_targets_own_replies(here: Path) -> None:
    main()
    found, metrics, words = tables(here), told(here), tokenizer()
    words.chat_template = CHAT
    for split in ("heldout", "greedy"):
        replies: dict[str, list[str]] = {}
        for row in found[split]:
            name, _, turn = row["id"].partition("#")
            said = replies.setdefault(name, [])
            assert int(turn or 0) == len(said)
            talk = []
            for asked, answered in zip(
                messages(here, "heldout")[name][::2], [*said, ""], strict=False
            ):
                talk += [asked, {"role": "assistant", "content": answered}]
            start = row["turn"].index(0)
            assert row["turn"] == [-1] * start + [0] * (len(row["tokens"]) - start)
            assert row["tokens"][:start] == prompt_tokens(words, talk[:-1], name="x")
            own = row["tokens"][start : -1 if row["finished"] else None]
            said.append(words.decode(own))
        assert max(map(len, replies.values())) > 1
    assert [row["id"] for row in found["heldout"]] == [row["id"] for row in found["greedy"]]
    turns = metrics["train"]["turns"]
    assert turns["conversations"] == 12
    assert turns["turns"] > 18
    # a random target spells words letter by letter: some of it is read in other tokens
    assert turns["retokenised"] > 0
    rows = found["train"]
    assert sum(max(row["turn"]) + 1 for row in rows) == turns["turns"]
    assert any(max(row["turn"]) > 0 for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    asked = sum(len(m) // 2 for m in messages(here, "train").values())
    assert turns["turns"] + sum(turns["dropped"].values()) == asked
    assert {row["law"] for row in rows} == {"T=1"}


def test_first_turns_are_those_of_a_run_that_asks_for_one(here: Path) -> None:
    """A prompt of one turn draws what it draws without `turns: every`."""
    main()
    every = tables(here)
    write_params(here, generate={**LIMITS})
    main()
    for split in SPLITS:
        single = {row["id"] for row in tables(here)[split][::4]}  # of one turn, by construction
        mine = [row for row in every[split] if row["id"] in single]
        assert mine == [row for row in tables(here)[split] if row["id"] in single]
        assert "turns" not in told(here)[split]


def test_who_shares_a_batch_changes_no_reply(here: Path) -> None:
    main()
    found = tables(here)
    for size in (1, 64):
        write_params(here, generate={"turns": "every", **LIMITS, "batch_sequences": size})
        main()
        assert tables(here) == found


def test_a_run_that_was_stopped_goes_on_within_its_turns(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main()
    whole = tree_digest(here / "sequences")
    write_params(here, generate={"turns": "every", **LIMITS, "seed": 1})
    main()
    write_params(here, generate={"turns": "every", **LIMITS})
    sampled, plain = [], pipeline.generate.sample
    at = {"stop": 8}

    def stops(target: Any, some: Any, **options: Any) -> Any:
        if len(sampled) == at["stop"]:
            os.kill(os.getpid(), signal.SIGTERM)
        sampled.extend([some])
        return plain(target, some, **options)

    monkeypatch.setattr("sys.argv", ["stage"])
    monkeypatch.setattr(pipeline.generate, "sample", stops)
    with pytest.raises(SystemExit, match="143"):
        run("generate", main)
    assert any("#" in prompt.id for some in sampled for prompt in some)
    done = sorted(here.glob(".scratch/generate/*/batches/*turn1*.json"))
    assert done
    # a batch that another first turn led to is not believed
    value = json.loads(done[0].read_text())
    value["asked"] = "others"
    value["responses"] = [[[1, 2, 3], False] for _ in value["responses"]]
    done[0].write_text(json.dumps(value))
    at["stop"] = -1
    kept = len(sampled)
    main()
    assert tree_digest(here / "sequences") == whole
    again = {prompt.id for some in sampled[kept:] for prompt in some}
    assert again
    assert "train-0" not in again


@pytest.fixture
def fake(here: Path) -> Iterator[Fake]:
    made = Fake(Drawing(here))
    made.models = {"data": [{"id": "tiny"}]}
    yield made
    made.close()


def test_a_server_answers_every_turn_and_is_asked_once(here: Path, fake: Fake) -> None:
    main()
    own = tables(here)["greedy"]
    engine = {**SERVER, "url": fake.url}
    write_params(here, generate={"turns": "every", **LIMITS, "engine": engine})
    main()
    found, metrics = tables(here), told(here)
    # held-out turns are those that T = 1 has too: what both runs kept is the same text
    mine = {row["id"]: row for row in own}
    both = [row for row in found["greedy"] if row["id"] in mine]
    assert both == [mine[row["id"]] for row in both]
    assert any("#" in row["id"] for row in both)
    assert metrics["server"] == {"failed": {split: [] for split in SPLITS}, "drifted": 0}
    assert metrics["train"]["turns"]["turns"] > 12
    before, asked = tree_digest(here / "sequences"), len(fake.bodies)
    prompts_asked = [tuple(body["prompt"]) for body in fake.bodies]
    for row in found["train"]:
        for turn in range(max(row["turn"]) + 1):
            assert tuple(row["tokens"][: row["turn"].index(turn)]) in prompts_asked
    # the same work from the journal, whoever stands at the URL
    nobody = {**engine, "url": "http://127.0.0.1:9"}
    write_params(here, generate={"turns": "every", **LIMITS, "engine": nobody, "threads": 2})
    main()
    assert (tree_digest(here / "sequences"), len(fake.bodies)) == (before, asked)


def test_the_data_trains_and_held_out_talks_go_on_with_the_targets_replies(here: Path) -> None:
    main()
    own, metrics = tables(here), told(here)
    write_params(here, generate={"turns": "every", "train_responses": "data", **LIMITS})
    main()
    found = tables(here)
    assert {row["law"] for row in found["train"]} == {"data"}
    assert [max(row["turn"]) + 1 for row in found["train"]] == [
        len(said) // 2 for said in messages(here, "train").values()
    ]
    for split in ("heldout", "greedy"):
        assert found[split] == own[split]
        assert told(here)[split] == metrics[split]
    assert "turns" not in told(here)["train"]


def test_a_server_of_texts_answers_every_turn_and_its_replies_only_train(
    here: Path, fake: Fake
) -> None:
    ids, words = fake.reply, tokenizer()

    def texts(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = words(body["prompt"], add_special_tokens=False)["input_ids"]
        status, value = ids(path, body | {"prompt": prompt})
        drawn = value["choices"][0]["token_ids"]
        text = words.decode(drawn, skip_special_tokens=True)
        reason = value["choices"][0]["finish_reason"]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(drawn)}
        return status, {"choices": [{"text": text, "finish_reason": reason}], "usage": usage}

    fake.reply = texts
    law = here / "sequences/served/T=0.7,top_k=9.parquet"  # not asked of a server
    section = {"turns": "every", **LIMITS, "laws": [law.stem]}
    write_params(here, generate=section)
    main()
    own, own_law = tables(here), read_table(law, SEQUENCES)
    write_params(
        here, generate={**section, "engine": {**SERVER, "url": fake.url, "protocol": "text"}}
    )
    main()
    found = tables(here)
    assert read_table(law, SEQUENCES) == own_law
    # one request a turn of training
    assert len(fake.bodies) == told(here)["train"]["turns"]["turns"]
    assert {row["law"] for row in found["train"]} == {"data"}
    assert {split: found[split] == own[split] for split in SPLITS} == {
        "train": False,
        "heldout": True,
        "greedy": True,
    }
    assert told(here)["server"]["failed"] == {"train": []}
    assert told(here)["train"]["turns"]["turns"] > 12
    # encoded again a reply is in the tokens that the next turn reads
    assert told(here)["train"]["turns"]["retokenised"] == 0
    assert any(max(row["turn"]) > 0 for row in found["train"])


def test_a_turn_without_an_answer_is_listed_and_ends_its_talk(here: Path, fake: Fake) -> None:
    engine = {**SERVER, "url": fake.url, "max_failures": 9}
    write_params(here, generate={"turns": "every", **LIMITS, "engine": engine})
    main()
    whole = tables(here)
    third = next(row for row in whole["heldout"] if row["id"].endswith("#1"))
    first = whole["train"][0]
    assert isinstance(fake.reply, Drawing)
    fake.reply.down = {
        tuple(row["tokens"][: row["turn"].index(0)]) for row in (third, first)
    }  # the first prompt of train is heldout's too
    for answers in here.glob(".scratch/generate-server/*/answers.jsonl"):
        answers.unlink()
    write_params(here, generate={"turns": "every", **LIMITS, "engine": engine, "threads": 2})
    main()
    failed = told(here)["server"]["failed"]
    assert third["id"] in failed["heldout"]
    assert failed["heldout"] == failed["greedy"]
    assert first["id"] in failed["train"]
    kept = {row["id"] for row in tables(here)["heldout"]}
    assert third["id"] not in kept
    assert third["id"].partition("#")[0] in kept
    # failures of all turns count together
    for answers in here.glob(".scratch/generate-server/*/answers.jsonl"):
        answers.unlink()
    few = {**engine, "max_failures": 1}
    write_params(here, generate={"turns": "every", **LIMITS, "engine": few})
    with pytest.raises(TargetError, match=r"2 prompts got no answer .* at most .* 1; see to the"):
        main()


def test_what_cannot_be_carried_on_is_refused_before_a_model_loads(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.generate.resident_target", load)
    write_params(here, generate={"turns": "every", **LIMITS, "max_new_tokens": 250})
    with pytest.raises(DataError, match=r"conversations of up to 370 tokens; .* context of 256"):
        main()
    write_params(here, generate={"turns": "all"})
    with pytest.raises(ConfigError, match=r"generate.turns is 'all'; expected input should be 'la"):
        main()
    # a target without a template reads one turn, and says so of what has more
    words = tokenizer()
    words.save_pretrained(here / "target")
    (here / "target/chat_template.jinja").unlink(missing_ok=True)
    write_params(here, generate={"turns": "every", **LIMITS})
    monkeypatch.setattr("stages.generate.has_template", lambda _: False)
    with pytest.raises(DataError, match=r"'train-1' of 4 messages .* the target has no chat templ"):
        main()
