"""Prompts -> responses of a server of the target: vLLM, SGLang, or any with OpenAI's completions.

    with Journal(folder, lock=path) as journal:
        responses, tally = ask(asks, server=config, reader=reader, journal=journal)

A server is trusted with nothing that its reply can show. Its ids are taken as they come (`vllm`,
`sglang`) or its text is encoded again (`text`), and then the counts of tokens that it reports must
agree; its defaults (top-k, penalties) are switched off by name in every request; a reply that ends
before its limit without an end-of-sequence token is an error. A lost connection, a timeout, 429 and
5xx are tried again with growing pauses. What was answered stands in a journal by the digest of
prompt, law and seed, so that no prompt is paid for twice, whoever stops or moves the server.
Knows no split, no file of a stage and no model.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import urllib3
from filelock import FileLock, Timeout
from pydantic import Field

from pipeline.config import BatchSize, Strict
from pipeline.provenance import Progress
from pipeline.sampling import Prompt, Response, compact
from storage.errors import LkcacheError, TargetError, WorkspaceError
from storage.workspace import digest

BACKOFF_S, BACKOFF_MAX_S, JITTER_S = 0.5, 60.0, 0.5
CONNECT_S = 10.0
RETRIED = (408, 425, 429, 500, 502, 503, 504)
NAMED = 20  # failed prompts that a message lists; the metrics list all


class ServerConfig(Strict):
    """`generate.engine` of kind server."""

    kind: Literal["server"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")]
    """The server's root, as http://127.0.0.1:8000; a trailing /v1 is understood."""
    protocol: Literal["vllm", "sglang", "text"]
    """`text` for any server of /v1/completions: it answers the training prompts alone, and what is
    held out, to be replayed, is sampled by transformers."""
    model: str | None
    """The name under which the server has the target; null where it serves one model."""
    temperature: Annotated[float, Field(ge=0)]
    """Of training responses; the held-out prompts are answered at T = 1 and T = 0."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    concurrency: BatchSize
    retries: Annotated[int, Field(ge=0)]
    timeout_s: Annotated[float, Field(gt=0)]
    max_failures: Annotated[int, Field(ge=0)]
    """Prompts that may go without an answer; they are left out, counted and listed."""
    api_key: str | None
    """Name of the environment variable that holds the key; null for none."""

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def law(self) -> str:
        """The law of a training response, as `storage.tables.SEQUENCES` names it."""
        law = f"T={self.temperature:g}"
        return law if self.top_p == 1 else f"{law},top_p={self.top_p:g}"


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: Prompt
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int

    @property
    def key(self) -> str:
        """Digest of all that the response may depend on, beside the target."""
        law = [self.temperature, self.top_p, self.seed, self.max_new_tokens]
        return digest({"tokens": list(self.prompt.tokens), "law": law})


@dataclass
class Tally:
    """What asking took, and what it could not get."""

    failed: dict[str, str] = field(default_factory=dict)
    """Key of an ask that was given up -> why."""
    drifted: int = 0
    """Texts whose encoding has another number of tokens than the server counted."""
    asked: int = 0
    """Of them all, those that the journal did not answer."""
    seconds: float = 0.0
    """From request to reply, summed over requests."""


@dataclass(frozen=True)
class Reader:
    """What it takes to read a reply: the target's vocabulary and its ends."""

    tokenizer: Any
    vocab_size: int
    eos_ids: Sequence[int]
    longrope_tokens: int | None = None
    """A longer context of the server itself gives its sequences other rotary angles; None: none."""


@dataclass(frozen=True)
class _Reply:
    """A reply before it is believed."""

    tokens: list[int]
    ended: str
    """`stop` | `length` | whatever else the server says."""
    matched: Any
    """What stopped it: a token id, or a string of the server's own."""
    drifted: bool = False


@dataclass(frozen=True)
class _Protocol:
    """One way to ask: where, with which body, and how the reply reads."""

    path: str
    body: Callable[[Ask, Reader], dict[str, Any]]
    """All but the model's name."""
    read: Callable[[Any, Ask, Reader], _Reply]


class Journal:
    """Answers by key, one JSON line each; a line that a kill tore is as if it were not there."""

    def __init__(self, folder: Path, *, lock: Path) -> None:
        """`folder` is made; the lock keeps a second process out."""
        self._path = folder / "answers.jsonl"
        self._lock = FileLock(lock, timeout=0)
        self._write = threading.Lock()
        self._known: dict[str, tuple[Response, bool]] = {}

    def __enter__(self) -> "Journal":
        """Read what is known, and open the file for more."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise WorkspaceError(
                found=f"another process writes {self._path}",
                expected="one generation at a time",
                todo="wait for it, or stop it",
            ) from None
        self._known = dict(_journal_lines(self._path))
        self._file = self._path.open("a+b")
        if self._file.tell() and not _ends_whole(self._path):
            self._file.write(b"\n")  # a torn line must not spoil the next one
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush to the disk."""
        with self._write:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._lock.release()

    def get(self, key: str) -> tuple[Response, bool] | None:
        """The answer of a key and whether its text drifted, if one is known."""
        return self._known.get(key)

    def put(self, key: str, response: Response, *, drifted: bool) -> None:
        """Note an answer; after this returns a kill of the process cannot lose it."""
        row = [key, list(response.tokens), response.finished, drifted]
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with self._write:
            self._known[key] = response, drifted
            self._file.write(line)
            self._file.flush()


def _journal_lines(path: Path) -> Iterator[tuple[str, tuple[Response, bool]]]:
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                key, tokens, finished, drifted = json.loads(line)
            except ValueError:  # torn
                continue
            yield key, (Response(compact(tokens), finished), drifted)


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def ask(
    asks: Sequence[Ask],
    *,
    server: ServerConfig,
    reader: Reader,
    journal: Journal,
    tally: Tally | None = None,
) -> tuple[list[Response | None], Tally]:
    """The response of each ask in order, None where the server gave none in `retries` + 1 tries.

    `tally` goes on from earlier asks of the same run, whose failures count too.

    `TargetError`: the server cannot be reached, does not serve the model, refuses a request,
    returns what the target cannot have written, or fails on more than `max_failures` prompts.
    """
    tally = Tally() if tally is None else tally
    left = {one.key: one for one in asks if journal.get(one.key) is None}
    if left:
        with _Connection(server) as call:
            _ask_all(call, list(left.values()), server, reader, journal, tally)
    known = [journal.get(one.key) for one in asks]
    tally.drifted += sum(answer[1] for answer in known if answer is not None)
    return [None if answer is None else answer[0] for answer in known], tally


class _Connection:
    """A pool of connections to one server, shared by all threads."""

    def __init__(self, server: ServerConfig) -> None:
        self._root = server.root
        self._pool = urllib3.PoolManager(
            maxsize=server.concurrency,
            block=True,
            headers={"Content-Type": "application/json", **_key(server)},
            timeout=urllib3.Timeout(connect=CONNECT_S, read=server.timeout_s),
            retries=urllib3.Retry(
                total=server.retries,
                status_forcelist=RETRIED,
                allowed_methods=None,  # a POST too: asking again is idempotent here
                backoff_factor=BACKOFF_S,
                backoff_max=BACKOFF_MAX_S,
                backoff_jitter=JITTER_S,
            ),
        )

    def __call__(self, path: str, body: Any = None) -> Any:
        """The JSON of a reply; `urllib3.exceptions.HTTPError` after the last try."""
        method = "GET" if body is None else "POST"
        data = None if body is None else json.dumps(body).encode()
        reply = self._pool.request(method, self._root + path, body=data)
        if reply.status != 200:
            raise TargetError(
                found=f"{self._root}{path} refuses with {reply.status}: {_excerpt(reply.data)}",
                expected="a reply to the request",
                todo="correct generate.engine (protocol, model, api_key) or the server's options",
            )
        try:
            return json.loads(reply.data)
        except ValueError:
            raise TargetError(
                found=f"{self._root}{path} replies {_excerpt(reply.data)}",
                expected="JSON",
                todo="set generate.engine.url to the root of a vLLM, SGLang or OpenAI-compatible "
                "server",
            ) from None

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()


def _key(server: ServerConfig) -> dict[str, str]:
    if server.api_key is None:
        return {}
    value = os.environ.get(server.api_key)
    if not value:
        raise TargetError(
            found=f"no environment variable {server.api_key}",
            expected="the server's key in it, as generate.engine.api_key says",
            todo=f"export {server.api_key}, or set generate.engine.api_key to null",
        )
    return {"Authorization": f"Bearer {value}"}


def _excerpt(data: bytes) -> str:
    return repr(" ".join(data.decode("utf-8", "replace").split())[:200])


def _served_model(
    call: _Connection, server: ServerConfig, reader: Reader, asks: Sequence[Ask]
) -> str:
    """The name to ask for; checks that the server answers, has it, and has room for each ask."""
    if server.protocol == "text" and server.model is not None:
        return server.model  # such servers may list nothing and load a model when asked
    try:
        listed = call("/v1/models")
        models = {str(model["id"]): model for model in listed["data"]}
    except urllib3.exceptions.HTTPError as error:
        raise TargetError(
            found=f"no server answers at {server.root}: {_cause(error)}",
            expected="the server that generate.engine names",
            todo="start it or correct generate.engine.url, and run dvc repro; answers are kept",
        ) from None
    except (KeyError, TypeError):
        raise TargetError(
            found=f"{server.root}/v1/models lists no models",
            expected="a list as OpenAI's API gives it",
            todo="set generate.engine.url to the root of a vLLM, SGLang or OpenAI-compatible "
            "server",
        ) from None
    name = server.model
    if name is None:
        if len(models) != 1:
            raise TargetError(
                found=f"the server at {server.root} lists {len(models)} models",
                expected="one, where generate.engine.model is null",
                todo=f"name the target's: {', '.join(sorted(models)) or 'none is listed'}",
            )
        name = next(iter(models))
    elif name not in models:
        raise TargetError(
            found=f"the server at {server.root} does not list {name!r}",
            expected=f"one of {', '.join(sorted(models)) or '(none is listed)'}",
            todo="correct generate.engine.model",
        )
    limit = models.get(name, {}).get("max_model_len")
    longest = max(len(one.prompt.tokens) + one.max_new_tokens for one in asks)
    if isinstance(limit, int) and longest > limit:
        raise TargetError(
            found=f"the server at {server.root} has a context of {limit} tokens",
            expected=f"the {longest} of the longest prompt with its response",
            todo="start it with a longer context, or lower generate.max_prompt_tokens or "
            "generate.max_new_tokens",
        )
    short = reader.longrope_tokens
    if server.protocol == "vllm" and short is not None and isinstance(limit, int) and limit > short:
        raise TargetError(
            found=f"the server at {server.root} has a context of {limit} tokens",
            expected=f"at most {short}, up to which a longrope target has one law: vLLM takes the "
            "angles of long sequences for all of them where its context is longer",
            todo=f"start it with --max-model-len {short}",
        )
    return name


def _ask_all(
    call: _Connection,
    asks: Sequence[Ask],
    server: ServerConfig,
    reader: Reader,
    journal: Journal,
    tally: Tally,
) -> None:
    """Keep `concurrency` requests under way until all are answered or too many have failed."""
    model = _served_model(call, server, reader, asks)
    protocol = PROTOCOLS[server.protocol]
    waiting = iter(asks)

    def answer(one: Ask) -> float:
        started = time.perf_counter()
        value = call(protocol.path, {"model": model, **protocol.body(one, reader)})
        reply = protocol.read(value, one, reader)
        response = _believed(reply, one, reader)
        journal.put(one.key, response, drifted=reply.drifted)
        return time.perf_counter() - started

    pool = ThreadPoolExecutor(server.concurrency, "ask")
    running: dict[Future[float], Ask] = {}
    try:
        with Progress(len(asks), "generate", unit="sequence") as line:
            for one in _first(waiting, server.concurrency):
                running[pool.submit(answer, one)] = one
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    one = running.pop(future)
                    tally.asked += 1
                    try:
                        tally.seconds += future.result()
                    except (urllib3.exceptions.HTTPError, _NoAnswer) as error:
                        tally.failed[one.key] = f"{one.prompt.id}: {_cause(error)}"
                        _require_few(tally, server)
                    line.add(failed=str(len(tally.failed)))
                for one in _first(waiting, len(done)):
                    running[pool.submit(answer, one)] = one
    finally:
        # requests under way end on their own, and what they bring is still noted
        pool.shutdown(wait=True, cancel_futures=True)


class _NoAnswer(Exception):
    """The server ended a request for a reason of its own."""


def _first(values: Iterator[Ask], count: int) -> Iterable[Ask]:
    return [one for _, one in zip(range(count), values, strict=False)]


def _cause(error: BaseException) -> str:
    """What is behind urllib3's account of its tries."""
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split())


def _require_few(tally: Tally, server: ServerConfig) -> None:
    if len(tally.failed) > server.max_failures:
        causes = list(tally.failed.values())
        more = f" and {len(causes) - NAMED} more" if len(causes) > NAMED else ""
        raise TargetError(
            found=f"{len(causes)} prompts got no answer in {server.retries + 1} tries "
            f"({'; '.join(causes[:NAMED])}{more})",
            expected=f"at most generate.engine.max_failures, {server.max_failures}",
            todo="see to the server and run dvc repro; the answers so far are kept",
        )


def _believed(reply: _Reply, one: Ask, reader: Reader) -> Response:
    """The reply as a response of the target; `TargetError` where it cannot be one."""

    def refuse(found: str, todo: str) -> LkcacheError:
        return TargetError(
            found=f"to prompt {one.prompt.id!r} the server {found}",
            expected="a response of the pinned target, ended by its end-of-sequence token or after "
            f"generate.max_new_tokens ({one.max_new_tokens}) tokens",
            todo=todo,
        )

    tokens = list(reply.tokens)
    if reply.ended not in ("stop", "length"):
        raise _NoAnswer(f"ended with {reply.ended!r}")
    outside = [token for token in tokens if not 0 <= token < reader.vocab_size]
    if outside:
        raise refuse(
            f"returned the id {outside[0]} of a vocabulary of {reader.vocab_size}",
            "serve the target that params.yaml names",
        )
    finished = bool(tokens) and tokens[-1] in reader.eos_ids
    if reply.ended == "stop" and not finished:
        if isinstance(reply.matched, int) and reply.matched in reader.eos_ids:
            tokens.append(reply.matched)
        else:
            raise refuse(
                f"stopped at {reply.matched!r}", "start it without stop strings of its own"
            )
        finished = True
    if any(token in reader.eos_ids for token in tokens[:-1]):
        raise refuse("went on after an end-of-sequence token", "start it without ignore_eos")
    cut = len(tokens) < one.max_new_tokens and not finished and not reply.drifted
    if cut or len(tokens) > one.max_new_tokens:
        raise refuse(
            f"ended after {len(tokens)} tokens",
            "start it with a longer context and no limit of its own",
        )
    return Response(compact(tokens), finished)


def _require_prompt(counted: Any, one: Ask) -> None:
    """`TargetError` where the server read another prompt than it was given."""
    if counted is not None and counted != len(one.prompt.tokens):
        raise TargetError(
            found=f"the server read prompt {one.prompt.id!r} of {len(one.prompt.tokens)} tokens as "
            f"{counted}",
            expected="the same tokens, none cut off and none put before them",
            todo="give it the target's own tokenizer and a context that holds the prompt",
        )


def _malformed(value: Any, error: Exception) -> TargetError:
    return TargetError(
        found=f"the server replies {_excerpt(json.dumps(value).encode())} "
        f"({type(error).__name__}: {error})",
        expected="the reply of generate.engine.protocol",
        todo="correct generate.engine.protocol",
    )


def _vllm_body(one: Ask, reader: Reader) -> dict[str, Any]:
    """Ids in, ids out; what the model's generation_config.json would add is switched off."""
    return {
        "prompt": list(one.prompt.tokens),
        "max_tokens": one.max_new_tokens,
        "temperature": one.temperature,
        "top_p": one.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": one.seed,
        "stop_token_ids": list(reader.eos_ids),
        "return_token_ids": True,
    }


def _read_vllm(value: Any, one: Ask, reader: Reader) -> _Reply:
    try:
        choice = value["choices"][0]
        tokens, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
        counted = (value.get("usage") or {}).get("prompt_tokens")
        ended, matched = choice["finish_reason"], choice.get("stop_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _malformed(value, error) from None
    if tokens is None:
        raise TargetError(
            found="the server returns no token ids (token_ids of a choice)",
            expected="them, as vLLM gives them from 0.10.2 on where return_token_ids asks for them",
            todo="serve with a newer vLLM, or set generate.engine.protocol to text, whose "
            "responses train and are never replayed",
        )
    _require_prompt(counted, one)
    if echoed is not None and list(echoed) != list(one.prompt.tokens):
        _require_prompt("other ids", one)
    return _Reply(list(tokens), ended, _stop_id(matched, reader))


def _stop_id(matched: Any, reader: Reader) -> Any:
    """The end that a reply leaves unsaid: the only one there is, where no stop is named."""
    return reader.eos_ids[0] if matched is None and len(reader.eos_ids) == 1 else matched


def _sglang_body(one: Ask, reader: Reader) -> dict[str, Any]:
    return {
        "input_ids": list(one.prompt.tokens),
        "stream": False,
        "sampling_params": {
            "max_new_tokens": one.max_new_tokens,
            "temperature": one.temperature,
            "top_p": one.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": one.seed,
            "stop_token_ids": list(reader.eos_ids),
        },
    }


def _read_sglang(value: Any, one: Ask, reader: Reader) -> _Reply:
    try:
        tokens, meta = list(value["output_ids"]), value["meta_info"]
        ended, counted = meta["finish_reason"], meta.get("prompt_tokens")
        kind, matched = ended["type"], ended.get("matched")
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(value, error) from None
    _require_prompt(counted, one)
    return _Reply(tokens, kind, _stop_id(matched, reader))


def _text_body(one: Ask, reader: Reader) -> dict[str, Any]:
    """Only what OpenAI's own API knows; a server's further defaults stand, as the law says."""
    return {
        "prompt": _text_of(one.prompt, reader.tokenizer),
        "max_tokens": one.max_new_tokens,
        "temperature": one.temperature,
        "top_p": one.top_p,
        "seed": one.seed,
    }


def _text_of(prompt: Prompt, tokenizer: Any) -> str:
    """Text that encodes to the prompt's ids, with or without the token that begins a text."""
    whole = list(prompt.tokens)
    for tokens in (whole, whole[1:]):
        text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        if list(tokenizer(text)["input_ids"]) == whole:
            return text
    raise TargetError(
        found=f"no text encodes to the tokens of prompt {prompt.id!r}",
        expected="one, for generate.engine.protocol: text",
        todo="raise generate.max_prompt_tokens, so that no prompt is cut inside a character, or "
        "serve with vLLM or SGLang, which take token ids",
    )


def _read_text(value: Any, one: Ask, reader: Reader) -> _Reply:
    try:
        choice, usage = value["choices"][0], value.get("usage") or {}
        text, ended = str(choice["text"]), choice["finish_reason"]
        counted, wrote = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _malformed(value, error) from None
    _require_prompt(counted, one)
    tokens = list(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = ended == "stop" and not _ends(tokens, reader)
    ends = list(reader.eos_ids[:1]) if whole else []
    drifted = wrote is not None and wrote not in (len(tokens), len(tokens) + len(ends))
    # another split into tokens may be longer than the limit; what is over it is cut
    tokens = [*tokens, *ends][: one.max_new_tokens]
    return _Reply(tokens, "stop" if _ends(tokens, reader) else "length", None, drifted)


def _ends(tokens: Sequence[int], reader: Reader) -> bool:
    return bool(tokens) and tokens[-1] in reader.eos_ids


PROTOCOLS: Mapping[str, _Protocol] = {
    "vllm": _Protocol("/v1/completions", _vllm_body, _read_vllm),
    "sglang": _Protocol("/generate", _sglang_body, _read_sglang),
    "text": _Protocol("/v1/completions", _text_body, _read_text),
}
