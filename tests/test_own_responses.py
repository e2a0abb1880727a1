"""A user's own conversations, replies and all: trained on, measured, exported, by every stage."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.config import read_params
from pipeline.target import load_target
from stages import (
    capture,
    check,
    evaluate,
    export,
    generate,
    prepare,
    report,
    target,
    train,
    verify,
    warmup,
)
from storage.reader import Cache
from storage.tables import CONVERSATIONS, SEQUENCES, read_table
from tests.targets import ROOT, WORDS, assert_assisted_alike, member, tokenizer

CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ARM, NEW, GAMMA = "lm-lk_lambda-0", 12, 3
FIT = {"batch_sequences": 4, "heldout_sequences": 4, "lr_warmup_steps": 2, "threads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "prepare": {
        "source": {"kind": "jsonl", "train": "chats.jsonl", "heldout": None, "layout": "auto"},
        "train_prompts": 24,
        "heldout_prompts": 8,
        "heldout_fraction": 0.25,
    },
    "generate": {
        "train_responses": "data",
        "max_prompt_tokens": 76,
        "max_new_tokens": NEW,
        "batch_sequences": 8,
    },
    "capture": {"part_tokens": 400},
    "verify": {"sequences": 2},
    "warmup": {**FIT, "steps": 30, "log_every": 30},
    "train": {**FIT, "steps": 10, "log_every": 10},
    "evaluate": {
        "depth": GAMMA,
        "decode_gamma": GAMMA,
        "decode_prompts": 4,
        "decode_new_tokens": NEW,
        "trace_prompts": 1,
    },
    "report": {"gammas": [GAMMA], "resamples": 200},
    "export": {"num_assistant_tokens": GAMMA},
    "cluster": {"workers": 1, "device": "cpu"},
}


def sharegpt(count: int) -> Iterator[str]:
    """Conversations of one or two turns as ShareGPT has them."""
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choices(WORDS, k=5))

    for i in range(count):
        turns = [{"from": who, "value": text()} for who in ("human", "gpt") * (1 + i % 2)]
        yield json.dumps({"id": f"c{i}", "conversations": turns}) + "\n"


def params() -> dict[str, Any]:
    found: dict[str, Any] = read_params(ROOT / "params.yaml")
    for name, values in SMALL.items():
        found[name].update(values)
    found["target"] = {
        "kind": "pretrained",
        "model": "model",
        "revision": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "threads": 1,
    }
    found["drafts"] = {"lm": found["drafts"]["lm"] | {"hidden_size": 16, "intermediate_size": 24}}
    cell = {"draft": "lm", "kind": "lm"}
    losses = ("kl", "lk_lambda")
    found["starts"] = {"lm-0": {**cell, "seed": 0, "objectives": list(losses)}}
    found["arms"] = {
        f"lm-{loss}-0": {**cell, "objective": loss, "loss": loss, "seed": 0, "start": "lm-0"}
        for loss in losses
    }
    cell |= {"objective": "lk_lambda", "start": "lm-0"}
    found["exports"] = {ARM: {**cell, "format": "transformers"}}
    return found


def run(stage: Any, *argv: str) -> None:
    """A stage's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage.__name__, *argv])
        stage.main()


def test_from_a_file_of_responses_to_a_measured_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    member("qwen3-8b").save_pretrained("model")
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained("model")
    Path("chats.jsonl").write_text("".join(sharegpt(40)), encoding="utf-8")
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params(), file)
    for stage in (check, prepare, target, generate, capture, verify):
        run(stage)
    assert "goes without" not in capsys.readouterr().err
    run(warmup, "lm-0")
    for arm in params()["arms"]:
        run(train, arm)
    run(evaluate, "lm-0")
    run(report)
    run(export, ARM)

    # the training split is the file's, every reply of it supervised
    talks = {
        talk["id"]: [m for m in json.loads(talk["messages"]) if m["role"] == "assistant"]
        for talk in read_table(Path("data/conversations.parquet"), CONVERSATIONS)
    }
    rows = read_table(Path("sequences/train.parquet"), SEQUENCES)
    assert len(rows) == 24
    for row in rows:
        turns = [
            words.decode([t for t, n in zip(row["tokens"], row["turn"], strict=True) if n == k])
            for k in range(max(row["turn"]) + 1)
        ]
        assert turns == [f"{reply['content']}<|end|>" for reply in talks[row["id"]]]
    laws = {s: Cache.open(Path(f"cache/{s}.zarr")).source["law"] for s in ("train", "heldout")}
    assert laws == {"train": "data", "heldout": "T=1"}
    # τ is of the target's own samples, and decoding agrees with the target's greedy text
    metrics = json.loads(Path("results/lm-0/metrics.json").read_text())["lk_lambda"]
    assert metrics["greedy_identical"] == 1
    told = json.loads(Path("metrics/report.json").read_text())
    assert 1 < told["lm"]["lk_lambda"]["T1"]["tau"] < 1 + GAMMA
    # the exported draft assists the target in transformers as it did here
    folder = Path("export") / ARM / "transformers"
    row = read_table(Path("sequences/greedy.parquet"), SEQUENCES)[0]
    prompt = row["tokens"][: row["turn"].index(0)]
    loaded = load_target(Path("target"), device="cpu")
    assert_assisted_alike(loaded, folder, prompt, gamma=GAMMA, new_tokens=NEW)
