"""A user's own chat model and ShareGPT file: laid out, fitted, run under DVC, served."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lkcache.presets import yaml
from pipeline.config import read_params
from storage.tables import CONVERSATIONS, read_table
from tests.projects import run

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "examples" / "own_target.py"
SERVE = ROOT / "docs" / "how-to" / "serve.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what keeps the run within a minute; every other value is the preset's, fitted to the model
SMALL: dict[str, dict[str, Any]] = {
    "prepare": {"train_prompts": 80, "heldout_prompts": 8},
    "generate": {"max_prompt_tokens": 96, "max_new_tokens": 32},
    "verify": {"sequences": 4},
    "drafts": {
        "lm": {
            "kind": "lm",
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 1,
            "intermediate_size": 96,
            "lr_scale": 1.0,
            "steps_scale": 1.0,
        }
    },
    "warmup": {
        "steps": 120,
        "lr": 5e-3,
        "lr_warmup_steps": 5,
        "heldout_sequences": 4,
        "threads": 1,
    },
    "train": {"steps": 10, "lr_warmup_steps": 2, "heldout_sequences": 4, "threads": 1},
    "evaluate": {"decode_prompts": 4, "decode_new_tokens": 16},
    "report": {"resamples": 200},
    "cluster": {"workers": 1, "device": "cpu"},
}


def lkcache(*words: str, cwd: Path) -> str:
    return run("lkcache", *words, cwd=cwd)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out and fitted as the how-to says; nothing has run."""
    folder = tmp_path_factory.mktemp("own") / "mine"
    lkcache("init", str(folder), cwd=folder.parent)
    shutil.copy(SCRIPT, folder)
    small = "--conversations 120 --steps 110 --width 64 --layers 4"
    run(sys.executable, "own_target.py", ".", *small.split(), cwd=folder)
    prompts = ("--prompts", "chats.jsonl")
    lkcache("use", "first-try", "--target", "models/my-target", *prompts, cwd=folder)
    return folder


def write(project: Path, **sections: dict[str, Any]) -> None:
    params = yaml().load(project / "params.yaml")
    for name, values in sections.items():
        params[name].update(values)
    yaml().dump(params, project / "params.yaml")


def test_the_preset_fits_the_model(project: Path) -> None:
    params = read_params(project / "params.yaml")
    assert params["target"]["model"] == "models/my-target"
    assert params["target"]["dtype"] == "float32"
    assert params["capture"]["hidden_layers"] == [1, 2, 3]
    eagle3 = params["drafts"]["eagle3"]
    shape = ("num_heads", "num_kv_heads", "head_size", "intermediate_size", "draft_vocab_size")
    assert [eagle3[name] for name in shape] == [4, 2, 16, 192, None]
    run(sys.executable, "-m", "stages.check", cwd=project)


def test_rows_that_are_no_conversation_are_counted_or_named(project: Path, tmp_path: Path) -> None:
    """A scrape's faults are dropped and said; what is no ShareGPT row stops with file and line."""
    here = shutil.copytree(project, tmp_path / "mine")
    good = (here / "chats.jsonl").read_text(encoding="utf-8")
    begins = {"conversations": [{"from": "gpt", "value": "Well, bread."}]}
    blank = {"conversations": [{"from": "human", "value": " "}]}
    faults = "".join(f"{json.dumps(row)}\n" for row in (begins, blank, {"conversations": []}))
    (here / "chats.jsonl").write_text(good + faults, encoding="utf-8")
    said = run(sys.executable, "-m", "stages.prepare", cwd=here)
    assert "prepare: left out 3 rows: " in said
    assert re.search(r"train has \d+ prompts, fewer than the 2000 of prepare.train_prompts", said)
    (here / "chats.jsonl").write_text(good + '{"conversations": "hello"}\n', encoding="utf-8")
    said = run(sys.executable, "-m", "stages.prepare", cwd=here, ok=False)
    assert "chats.jsonl, line 121" in said


def test_from_a_folder_and_a_sharegpt_file_to_assisted_generation(project: Path) -> None:
    row = "lm:0:kl,lk_lambda"
    lkcache("matrix", row, "--export", "lm-lk_lambda-0:transformers", cwd=project)
    write(project, **SMALL)
    assert "training lm, all its losses and seeds" in lkcache("estimate", cwd=project)
    said = run("dvc", "repro", "prepare", cwd=project)
    assert "fewer than" not in said
    shown = lkcache("show", "--mask", "--from", "data", cwd=project)
    talk = read_table(project / "data" / "conversations.parquet", CONVERSATIONS)[0]
    replies = [m["content"] for m in json.loads(talk["messages"]) if m["role"] == "assistant"]
    assert all(f"⟦{reply}<|im_end|>⟧" in shown.replace("↵", "") for reply in replies)
    run("dvc", "repro", cwd=project)
    serve(project)


def serve(project: Path) -> None:
    """The how-to's own code; what it says of itself is true."""
    code = PYTHON.findall(SERVE.read_text(encoding="utf-8"))[0]
    told = """
alone = target.generate(**inputs, **options)
assert alone.equal(assisted), (alone, assisted)
"""
    said = run(sys.executable, "-c", code + told, cwd=project)
    tokens, passes = map(int, re.findall(r"^(\d+) tokens in (\d+) passes", said, re.MULTILINE)[0])
    assert passes < tokens, "no drafted token was kept"
