"""The stage generate against `transformers serve` on localhost, and a server that draws as vLLM."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.sampling import Prompt, sample
from pipeline.seeds import uniforms
from pipeline.target import Target, load_target
from stages.generate import main
from storage.errors import ConfigError, TargetError
from storage.tables import PROMPTS, SEQUENCES, read_table, write_table
from storage.workspace import tree_digest
from tests.pipeline.test_server import Fake
from tests.targets import copy_project, tokenizer, write_params, write_project

SERVER = {
    "kind": "server",
    "protocol": "vllm",
    "model": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "concurrency": 3,
    "retries": 0,
    "timeout_s": 60.0,
    "max_failures": 0,
    "api_key": None,
}
SPLITS = ("train", "heldout", "greedy")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_project(project, tmp_path))
    return tmp_path


class Drawing:
    """The project's own target behind vLLM's API: prompt by prompt, from the request's seed."""

    def __init__(self, folder: Path) -> None:
        self.target: Target = load_target(folder / "target", device="cpu")
        self.down: set[tuple[int, ...]] = set()

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if tuple(body["prompt"]) in self.down:
            return 500, {}
        drawn = uniforms(body["seed"], n=body["max_tokens"])[None]
        [response] = sample(
            self.target,
            [Prompt("", "", tuple(body["prompt"]))],
            max_new_tokens=body["max_tokens"],
            uniform_BG=drawn if body["temperature"] else None,
        )
        reason = "stop" if response.finished else "length"
        choice = {"token_ids": response.tokens, "finish_reason": reason, "stop_reason": None}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}


@pytest.fixture
def fake(here: Path) -> Iterator[Fake]:
    made = Fake(Drawing(here))
    made.models = {"data": [{"id": "tiny"}]}
    yield made
    made.close()


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {s: read_table(folder / f"sequences/{s}.parquet", SEQUENCES) for s in SPLITS}


def test_a_servers_ids_become_the_targets_own_samples(here: Path, fake: Fake) -> None:
    main()
    own = tables(here)["greedy"]
    write_params(here, generate={"engine": {**SERVER, "url": fake.url, "temperature": 0.5}})
    main()
    found = tables(here)
    assert found["greedy"] == own
    laws = {split: {row["law"] for row in rows} for split, rows in found.items()}
    assert laws == {"train": {"T=0.5"}, "heldout": {"T=1"}, "greedy": {"T=0"}}
    told = json.loads((here / "metrics/generate.json").read_text())["server"]
    assert told == {"failed": {split: [] for split in SPLITS}, "drifted": 0}
    # the same work again, from what the server said the first time
    before, asked = tree_digest(here / "sequences"), len(fake.bodies)
    write_params(here, generate={"engine": {**SERVER, "url": fake.url, "temperature": 0.7}})
    main()
    assert len(fake.bodies) == asked + 14
    write_params(
        here, generate={"engine": {**SERVER, "url": "http://127.0.0.1:9", "temperature": 0.5}}
    )
    main()
    assert tree_digest(here / "sequences") == before


def test_what_a_server_never_answers_is_left_out_by_name(here: Path, fake: Fake) -> None:
    main()
    third = tables(here)["heldout"][2]
    assert isinstance(fake.reply, Drawing)
    fake.reply.down = {tuple(third["tokens"][: third["turn"].index(0)])}
    engine = {**SERVER, "url": fake.url}
    write_params(here, generate={"engine": engine})
    with pytest.raises(TargetError, match=r"1 prompts got no answer in 1 tries \(heldout-2: "):
        main()
    write_params(here, generate={"engine": {**engine, "max_failures": 3}})
    main()
    assert "heldout-2" not in {row["id"] for row in tables(here)["heldout"]}
    assert len(tables(here)["heldout"]) == len(tables(here)["greedy"]) == 5
    told = json.loads((here / "metrics/generate.json").read_text())["server"]
    # the same text is a prompt of both splits in this project
    out = ["heldout-2"]
    assert told["failed"] == {"train": ["train-2"], "heldout": out, "greedy": out}


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[str]:
    """`transformers serve` of the project's target; its URL."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", str(project / "target"), "--port", str(port), "--device", "cpu"]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    with (project / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, *command, "--host", "127.0.0.1"],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, server, project / "serve.log")
        yield url
    finally:
        server.terminate()
        server.wait(20)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


def test_transformers_serve_answers_and_its_texts_train_while_what_is_held_out_is_sampled(
    here: Path, served: str, project: Path
) -> None:
    main()
    own, text = tables(here), tokenizer()
    model = str(project / "target")
    engine = {**SERVER, "url": served, "protocol": "text", "model": model}
    write_params(here, generate={"engine": {**engine, "temperature": 0.0}})
    main()
    found = tables(here)
    assert {row["law"] for row in found["train"]} == {"data"}
    assert (found["heldout"], found["greedy"]) == (own["heldout"], own["greedy"])
    # a prompt of both splits has the same greedy reply, by the server as text
    greedy = {_prompt(row): row for row in own["greedy"]}
    both = [(row, greedy[_prompt(row)]) for row in found["train"] if _prompt(row) in greedy]
    assert both
    for row, mine in both:
        start = row["turn"].index(0)
        a, b = (text.decode(r["tokens"][start:], skip_special_tokens=True) for r in (row, mine))
        # what was drawn may be another split into tokens, and cut by the limit it is shorter
        assert b.startswith(a) or a == b
    told = json.loads((here / "metrics/generate.json").read_text())["server"]
    assert told["failed"] == {"train": []}
    # a random target writes bytes that are no text: the drift is seen
    assert told["drifted"] > 0


def _prompt(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["tokens"][: row["turn"].index(0)])


def test_the_data_trains_and_a_server_answers_what_is_held_out(here: Path, fake: Fake) -> None:
    rows = read_table(here / "data/prompts.parquet", PROMPTS)
    rows = [{**row, "response": "went home"} for row in rows]
    write_table(here / "data/prompts.parquet", PROMPTS, rows)
    engine = {**SERVER, "url": fake.url}
    write_params(here, generate={"engine": engine})
    main()
    own, asked = tables(here), len(fake.bodies)
    for answers in here.glob(".scratch/generate-server/*/answers.jsonl"):
        answers.unlink()
    write_params(here, generate={"engine": engine, "train_responses": "data"})
    main()
    found = tables(here)
    assert {row["law"] for row in found["train"]} == {"data"}
    assert (found["heldout"], found["greedy"]) == (own["heldout"], own["greedy"])
    # 6 held-out prompts at T = 1 and T = 0, and no training prompt
    assert len(fake.bodies) == asked + 12
    told = json.loads((here / "metrics/generate.json").read_text())["server"]
    assert told["failed"] == {"heldout": [], "greedy": []}


def test_a_server_answers_under_further_laws(here: Path, fake: Fake) -> None:
    law = "T=0.7,top_p=0.9"
    engine = {**SERVER, "url": fake.url}
    write_params(here, generate={"engine": engine, "laws": [law]})
    main()
    rows = read_table(here / f"sequences/served/{law}.parquet", SEQUENCES)
    assert {row["law"] for row in rows} == {law}
    assert [row["id"] for row in rows] == [row["id"] for row in tables(here)["heldout"]]
    asked = [b for b in fake.bodies if (b.get("temperature"), b.get("top_p")) == (0.7, 0.9)]
    assert len(asked) == len(rows)


@pytest.mark.parametrize(
    ("engine", "section", "sentence"),
    [
        ({}, {"laws": ["T=1,top_k=9"]}, "expected laws without top_k=, which no server is asked"),
        (
            {"protocol": "text"},
            {"train_responses": "data"},
            "expected engine transformers or another protocol than text, which only training pr",
        ),
    ],
)
def test_what_a_server_cannot_give_is_refused(
    here: Path, engine: dict[str, Any], section: dict[str, Any], sentence: str
) -> None:
    engine = {**SERVER, "url": "http://127.0.0.1:9", **engine}
    write_params(here, generate={"engine": engine, **section})
    with pytest.raises(ConfigError, match=sentence):
        main()
