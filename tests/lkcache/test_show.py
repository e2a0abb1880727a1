"""`lkcache show`: what is supervised stands out, on a terminal and off it."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lkcache.show import Sample, _text, show
from storage.errors import ConfigError, DataError
from storage.tables import CONVERSATIONS, PROMPTS, SEQUENCES, write_table
from tests.lkcache.test_inspect import lkcache
from tests.targets import prompts, tokenizer

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat\non a mat"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "went home"},
]


def row(name: str, *spans: tuple[int, str]) -> dict[str, Any]:
    """A sequence of (turn, text) spans."""
    words = tokenizer()
    tokens = [words(text)["input_ids"] for _, text in spans]
    return {
        "id": name,
        "domain": "prose",
        "tokens": [token for some in tokens for token in some],
        "turn": [t for (t, _), some in zip(spans, tokens, strict=True) for _ in some],
        "law": "T=1",
        "finished": True,
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(tmp_path / "target")
    rows = [
        row("a", (-1, "the cat "), (0, "sat\non a mat"), (-1, " and"), (1, " went home")),
        row("b", (-1, "seven red")),
        row("c", (0, "apples")),
    ]
    write_table(tmp_path / "sequences/train.parquet", SEQUENCES, rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def test_supervised_spans_stand_between_brackets(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(mask=True, samples=1)
    shown = capsys.readouterr().out
    assert "the cat ⟦sat↵\non a mat⟧ and⟦ went home⟧\n" in shown
    assert "a · prose" in shown
    assert "in 2 turns" in shown
    show(samples=1)
    assert "the cat sat\non a mat and went home\n" in capsys.readouterr().out


def test_masks_that_are_empty_or_full_are_counted(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(mask=True, samples=9)
    told = capsys.readouterr().out
    assert "train: 3 sequences" in told
    assert "1 sequence with no supervised tokens; 1 sequence with only supervised tokens" in told
    assert "b · prose" in told


def test_a_terminal_shows_turns_in_colour() -> None:
    words = tokenizer().backend_tokenizer
    found = row("a", (-1, "the cat "), (0, "sat"), (1, " home"))
    sample = Sample("a", "prose", found["tokens"], found["turn"])
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(_text(sample, words, mask=True, colour=True))
    shown = capture.get()
    assert "\x1b[2mthe cat \x1b[0m\x1b[30;42msat\x1b[0m\x1b[30;46m home\x1b[0m" in shown


def test_sequences_are_shown_without_torch_or_transformers(project: Path) -> None:
    done = lkcache("show", "--mask", "--samples", 1, cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert "⟦ went home⟧" in done.stdout


def write_data(project: Path, talk: Any = None, response: str | None = None) -> None:
    rows = [{**prompts("train", 1)[0], "text": "the cat", "response": response}]
    write_table(project / "data/prompts.parquet", PROMPTS, rows)
    if talk:
        told = {"split": "train", "id": "train-0", "messages": json.dumps(talk), "tools": "[]"}
        write_table(project / "data/conversations.parquet", CONVERSATIONS, [told])


def test_conversations_of_the_data_go_through_the_template(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(project, TALK)
    show(mask=True, source="data")
    shown = capsys.readouterr().out
    assert "user: the cat<|end|>assistant:⟦ sat↵\non a mat<|end|>⟧user: and then<|end|>" in shown
    assert "train: 1 prompt, 1 with a reply of the data's own" in shown
    write_data(project, TALK[:1])
    show(mask=True, source="data")
    assert "user: the cat<|end|>assistant:\n" in capsys.readouterr().out


def test_before_the_target_stage_the_folder_of_the_parameters_is_asked(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(project, TALK)
    (project / "target").rename(project / "own")
    (project / "params.yaml").write_text("target: {kind: pretrained, model: own}\n")
    show(mask=True, source="data")
    assert "⟦ sat↵\non a mat<|end|>⟧" in capsys.readouterr().out


def test_prompts_of_the_data_are_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(project, response=" sat")
    show(mask=True, source="data")
    assert "the cat⟦ sat⟧" in capsys.readouterr().out
    with pytest.raises(DataError, match="no prompt of the split 'greedy' in data/; expected train"):
        show("greedy", source="data")


def test_what_cannot_be_shown_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file sequences/none\.parquet; .*run dvc repro"):
        show("none")
    with pytest.raises(ConfigError, match="--samples 0 --from sequences; expected at least one"):
        show(samples=0)
    with pytest.raises(ConfigError, match="--samples 3 --from cache; expected at least one sampl"):
        show(source="cache")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"other\.json cannot be read \(.*\); expected a tokenizer of"
    ):
        show(tokenizer=tmp_path / "other.json")
    with pytest.raises(
        DataError, match=r"no tokenizer at .*; expected a tokenizer\.json; run dvc re"
    ):
        show(tokenizer=tmp_path / "sequences")
    write_data(project, TALK)
    (project / "target/chat_template.jinja").unlink()
    with pytest.raises(DataError, match="and no chat template in target; expected a chat model"):
        show(source="data")
