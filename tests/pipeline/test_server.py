"""Asking a server: what goes out, what is believed, what is tried again, what is kept."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import pipeline.server
from pipeline.generate import (
    GREEDY,
    HELDOUT,
    TRAIN,
    GenerateConfig,
    by_engine,
    law_of,
    without_failures,
)
from pipeline.sampling import Prompt, Response, compact
from pipeline.server import Ask, Journal, Reader, ServerConfig, Tally, ask
from storage.errors import DataError, TargetError, WorkspaceError
from tests.targets import tokenizer

V, EOS = 300, 0
Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Fake:
    """A server on localhost; `reply` answers (path, body) with (status, value)."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.bodies, self.headers = reply, [], []
        self.models: Any = {"data": [{"id": "tiny", "max_model_len": 64}]}
        self._busy, self.most = 0, 0
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, fake.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake._busy += 1
                    fake.most = max(fake.most, fake._busy)
                    fake.bodies.append(body)
                    fake.headers.append(dict(self.headers))
                status, value = fake.reply(self.path, body)
                with lock:
                    fake._busy -= 1
                if status == 0:
                    self.close_connection = True  # hangs up without a word
                    return
                self._send(status, value)

            def _send(self, status: int, value: Any) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Fake]]:
    monkeypatch.setattr(pipeline.server, "BACKOFF_S", 0.01)
    monkeypatch.setattr(pipeline.server, "JITTER_S", 0.0)
    open_ones: list[Fake] = []

    def start(reply: Reply) -> Fake:
        open_ones.append(Fake(reply))
        return open_ones[-1]

    yield start
    for one in open_ones:
        one.close()


def written(body: dict[str, Any]) -> list[int]:
    """What the made-up target writes: three ids of the prompt and the seed, then its end."""
    prompt = body.get("prompt", body.get("input_ids"))
    return [1 + (sum(prompt) + i) % 250 for i in range(3)] + [EOS]


def vllm(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    assert path == "/v1/completions"
    choice = {
        "token_ids": written(body),
        "prompt_token_ids": body["prompt"],
        "finish_reason": "stop",
        "stop_reason": None,
        "text": "",
    }
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 4}
    return 200, {"choices": [choice], "usage": usage}


def changed(**choice: Any) -> Reply:
    """vLLM's reply with other values in its choice."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        value = vllm(path, body)[1]
        value["choices"][0].update(choice)
        return 200, value

    return reply


def config(url: str, **values: Any) -> ServerConfig:
    given: dict[str, Any] = {
        "kind": "server",
        "url": url,
        "protocol": "vllm",
        "model": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "concurrency": 4,
        "retries": 2,
        "timeout_s": 5.0,
        "max_failures": 0,
        "api_key": None,
    }
    return ServerConfig(**{**given, **values})


ASKS = [Ask(Prompt(f"p{i}", "d", (5, 6, 7 + i)), 1.0, 1.0, 40 + i, 6) for i in range(9)]
READER = Reader(None, V, [EOS])


def asked(
    folder: Path, server: ServerConfig, asks: Any = ASKS, reader: Reader = READER
) -> tuple[list[Response | None], Tally]:
    with Journal(folder / "answers", lock=folder / "lock") as journal:
        return ask(asks, server=server, reader=reader, journal=journal)


def test_ids_go_in_and_come_out_in_the_order_of_the_prompts(serve: Any, tmp_path: Path) -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02 * (body["seed"] % 3))
        return vllm(path, body)

    fake = serve(slow)
    found, tally = asked(tmp_path, config(fake.url + "/v1/"))
    wanted = [Response(compact(written({"prompt": one.prompt.tokens})), True) for one in ASKS]
    assert found == wanted
    assert (tally.asked, tally.failed, tally.drifted) == (9, {}, 0)
    assert 1 < fake.most <= 4
    body = next(body for body in fake.bodies if body["seed"] == 41)
    # no default of the server's own bends the law
    assert body == {
        "model": "tiny",
        "prompt": [5, 6, 8],
        "max_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 41,
        "stop_token_ids": [EOS],
        "return_token_ids": True,
    }


def test_sglang_is_asked_in_its_own_words(serve: Any, tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/generate"
        assert body["sampling_params"]["top_k"] == -1
        tokens = written(body)[:-1]  # a server that leaves the end out, and names it
        ended = {"type": "stop", "matched": EOS}
        meta = {"prompt_tokens": len(body["input_ids"]), "finish_reason": ended}
        return 200, {"text": "", "output_ids": tokens, "meta_info": meta}

    found, _ = asked(tmp_path, config(serve(reply).url, protocol="sglang"))
    assert found == [
        Response(compact(written({"prompt": one.prompt.tokens})), True) for one in ASKS
    ]


def test_a_busy_server_is_asked_again(serve: Any, tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen[body["seed"]] = seen.get(body["seed"], 0) + 1
        if seen[body["seed"]] == 1:
            return (503, {"error": "busy"}) if body["seed"] % 2 else (0, None)
        return vllm(path, body)

    found, tally = asked(tmp_path, config(serve(reply).url))
    assert None not in found
    assert not tally.failed
    assert set(seen.values()) == {2}


def test_prompts_without_an_answer_are_named_and_the_others_kept(
    serve: Any, tmp_path: Path
) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {}) if body["seed"] in (42, 47) else vllm(path, body)

    fake = serve(reply)
    with pytest.raises(
        TargetError,
        match=r"1 prompts got no answer in 2 tries \(p2: too many 500 error responses\); expected "
        r"at most generate.engine.max_failures, 0; .* the answers so far are kept",
    ):
        asked(tmp_path, config(fake.url, retries=1, concurrency=1))
    fake.bodies.clear()
    found, tally = asked(tmp_path, config(fake.url, retries=1, max_failures=2))
    assert [one.prompt.id for one, r in zip(ASKS, found, strict=True) if r is None] == ["p2", "p7"]
    assert len(tally.failed) == 2
    assert {body["seed"] for body in fake.bodies} == set(range(42, 49))  # p0 and p1 were known


def test_no_prompt_is_paid_for_twice(serve: Any, tmp_path: Path) -> None:
    fake = serve(vllm)
    first, _ = asked(tmp_path, config(fake.url), ASKS[:5])
    file = tmp_path / "answers/answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # a kill in the middle of a line
    fake.bodies.clear()
    again, tally = asked(tmp_path, config(fake.url, concurrency=1))
    assert again[:5] == first
    assert tally.asked == len(fake.bodies) == 5  # the torn one and four new ones
    fake.bodies.clear()
    moved, tally = asked(tmp_path, config("http://127.0.0.1:9", concurrency=2))
    assert moved == again
    assert tally.asked == 0
    other = [Ask(one.prompt, 0.5, 1.0, one.seed, 6) for one in ASKS[:2]]
    asked(tmp_path, config(fake.url), other)
    assert len(fake.bodies) == 2  # another law is another answer


def test_two_generations_do_not_share_a_journal(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "answers", lock=tmp_path / "lock"),
        pytest.raises(WorkspaceError, match=r"another process writes .*answers.jsonl; expected"),
        Journal(tmp_path / "answers", lock=tmp_path / "lock"),
    ):
        pass


def short(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return changed(token_ids=[3, 4], finish_reason="length")(path, body)


def cut_prompt(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    value = vllm(path, body)[1]
    value["usage"]["prompt_tokens"] -= 1
    return 200, value


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (changed(token_ids=None), "the server returns no token ids .*newer vLLM"),
        (changed(token_ids=[3, V, EOS]), "'p0' the server returned the id 300 of a vocabulary of"),
        (short, r"'p0' the server ended after 2 tokens; .*max_new_tokens \(6\)"),
        (changed(token_ids=[3] * 7, finish_reason="length"), "the server ended after 7 tokens"),
        (changed(token_ids=[3, 4], stop_reason="###"), "the server stopped at '###'; .*stop str"),
        (
            changed(token_ids=[3, EOS, 4, EOS]),
            "went on after an end-of-sequence token; .*ignore_eos",
        ),
        (cut_prompt, "read prompt 'p0' of 3 tokens as 2; expected the same tokens"),
        (changed(prompt_token_ids=[1, 2, 3]), "read prompt 'p0' of 3 tokens as other ids"),
        (lambda *_: (400, {"error": "no"}), "/v1/completions refuses with 400: .*no.*protocol"),
        (lambda *_: (200, b"<html>"), "replies '<html>'; expected JSON"),
        (
            lambda *_: (200, {"data": 1}),
            "the server replies .*expected the reply of generate.engine",
        ),
        (changed(finish_reason="abort"), r"got no answer in 3 tries \(p0: ended with 'abort'\)"),
    ],
)
def test_what_the_target_cannot_have_written_is_refused(
    serve: Any, tmp_path: Path, reply: Reply, sentence: str
) -> None:
    with pytest.raises(TargetError, match=sentence):
        asked(tmp_path, config(serve(reply).url), ASKS[:1])
    assert (tmp_path / "answers/answers.jsonl").read_bytes() == b""


def test_a_server_that_cannot_serve_the_target_is_refused_at_once(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(vllm)
    with pytest.raises(TargetError, match=r"no server answers at http://127.0.0.1:9: .*refused"):
        asked(tmp_path, config("http://127.0.0.1:9", retries=0))
    with pytest.raises(TargetError, match="does not list 'big'; expected one of tiny"):
        asked(tmp_path, config(fake.url, model="big"))
    long = [Ask(Prompt("p", "d", (1,) * 60), 1.0, 1.0, 0, 6)]
    with pytest.raises(TargetError, match="has a context of 64 tokens; expected the 66 of"):
        asked(tmp_path, config(fake.url), long)
    short = Reader(None, V, [EOS], longrope_tokens=32)
    with (
        pytest.raises(TargetError, match=r"context of 64 tokens; expected at most 32, .*len 32"),
        Journal(tmp_path, lock=tmp_path / "longrope.lock") as journal,
    ):
        ask(ASKS, server=config(fake.url), reader=short, journal=journal)
    with pytest.raises(TargetError, match="no environment variable LKCACHE_TEST_KEY; expected"):
        asked(tmp_path, config(fake.url, api_key="LKCACHE_TEST_KEY"))
    monkeypatch.setenv("LKCACHE_TEST_KEY", "secret")
    asked(tmp_path, config(fake.url, api_key="LKCACHE_TEST_KEY"), ASKS[:1])
    assert fake.headers[-1]["Authorization"] == "Bearer secret"
    fake.models = {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(
        TargetError, match=r"lists 2 models; expected one, .*name the target's: a, b"
    ):
        asked(tmp_path / "x", config(fake.url))
    fake.models = {"detail": "?"}
    with pytest.raises(TargetError, match="/v1/models lists no models"):
        asked(tmp_path / "x", config(fake.url))
    assert len(fake.bodies) == 1


class Texts:
    """A server of text: it writes, and counts, as told."""

    def __init__(self, text: str, ended: str, wrote: int) -> None:
        self.value, self.wrote = {"text": text, "finish_reason": ended}, wrote

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        count = len(tokenizer()(body["prompt"])["input_ids"])
        usage = {"prompt_tokens": count, "completion_tokens": self.wrote}
        return 200, {"choices": [self.value], "usage": usage}


@pytest.mark.parametrize(
    ("text", "ended", "more", "drifted"),
    [
        (" the cat sat", "stop", 1, 0),
        (" the cat sat", "stop", 0, 0),  # a server that does not count the end
        (" the cat sat", "stop", 2, 1),  # fewer tokens now than were drawn
        (" the cat sat on a mat", "length", 0, 0),
        (" the cat", "length", 4, 1),
    ],
)
def test_texts_are_encoded_again_and_a_drift_is_counted(
    serve: Any, tmp_path: Path, text: str, ended: str, more: int, drifted: int
) -> None:
    ids = tokenizer()
    wrote = len(ids(text)["input_ids"]) + more
    prompt = Prompt("p", "d", tuple(ids("home with seven")["input_ids"]))
    limit = wrote if ended == "length" else 40
    reader = Reader(ids, V, [EOS])
    server = config(serve(Texts(text, ended, wrote)).url, protocol="text", model="tiny")
    [found], tally = asked(tmp_path, server, [Ask(prompt, 1.0, 1.0, 0, limit)], reader)
    assert found is not None
    assert tally.drifted == drifted
    assert ids.decode(list(found.tokens), skip_special_tokens=True) == text
    assert found.finished == (ended == "stop") == (found.tokens[-1] == EOS)


def test_a_prompt_that_no_text_encodes_to_is_named(serve: Any, tmp_path: Path) -> None:
    ids = tokenizer()
    half = Prompt("p", "d", tuple(ids("é")["input_ids"][-1:]))
    server = config(serve(Texts("", "stop", 1)).url, protocol="text", model="tiny")
    with pytest.raises(TargetError, match="no text encodes to the tokens of prompt 'p'"):
        asked(tmp_path, server, [Ask(half, 1.0, 1.0, 0, 6)], Reader(ids, V, [EOS]))


def test_a_law_is_named_by_what_was_asked_for() -> None:
    assert law_of(TRAIN, config("http://a")) == "T=1"
    assert law_of(TRAIN, config("http://a", temperature=0.7, top_p=0.95)) == "T=0.7,top_p=0.95"
    assert law_of(HELDOUT, config("http://a", temperature=0.7)) == "T=1"
    assert law_of(GREEDY, config("http://a")) == "T=0"
    assert law_of(TRAIN, config("http://a", protocol="text")) == "data"
    assert law_of(HELDOUT, config("http://a", protocol="text")) == "T=1"


def test_a_server_of_texts_is_asked_for_training_alone() -> None:
    texts, ids = config("http://a", protocol="text"), config("http://a")
    work = {TRAIN: [1], HELDOUT: [2], GREEDY: [3]}
    assert by_engine(work, texts) == [
        (texts, {TRAIN: [1]}),
        ("transformers", {HELDOUT: [2], GREEDY: [3]}),
    ]
    held = {HELDOUT: [2], GREEDY: [3]}
    assert by_engine(held, ids) == [(ids, held)]


def test_a_heldout_prompt_stays_only_with_all_its_responses() -> None:
    prompts = {split: [Prompt(f"{i}", "d", (1,)) for i in range(4)] for split in (HELDOUT, GREEDY)}
    prompts[TRAIN] = [Prompt("t0", "d", (1,)), Prompt("t1", "d", (1,))]
    r = Response([1], True)
    responses = {HELDOUT: [r, None, r, r], GREEDY: [r, r, r, None], TRAIN: [None, r]}
    kept, answered, failed = without_failures(prompts, responses)
    assert [p.id for p in kept[HELDOUT]] == [p.id for p in kept[GREEDY]] == ["0", "2"]
    assert answered[TRAIN] == [r]
    assert failed == {HELDOUT: ["1", "3"], GREEDY: ["1", "3"], TRAIN: ["t0"]}
    with pytest.raises(DataError, match="no prompt of the split 'train' was answered"):
        without_failures(prompts, {**responses, TRAIN: [None, None]})


@pytest.mark.parametrize(
    "values", [{"url": "localhost:8000"}, {"top_p": 0.0}, {"concurrency": 0}, {"protocol": "tgi"}]
)
def test_a_bad_server_is_refused_in_check(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        config(**{"url": "http://a", **values})


def test_an_engine_is_a_name_or_a_server() -> None:
    rest = {"max_prompt_tokens": 1, "max_new_tokens": 1, "batch_sequences": 1, "seed": 0}
    with pytest.raises(ValidationError, match="be transformers or a mapping of kind server"):
        GenerateConfig(engine={"kind": "cloud"}, threads=1, **rest)
