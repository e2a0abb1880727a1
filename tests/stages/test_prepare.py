"""The stage `prepare`: tables, counts, equal bytes, and no output where it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import prepare
from storage.errors import ConfigError, DataError
from storage.tables import CONVERSATIONS, DOCUMENTS, PROMPTS, read_table
from storage.workspace import tree_digest

SECTION: dict[str, Any] = {
    "source": {"kind": "stdlib", "max_chars": 60_000},
    "filters": {
        "min_chars": None,
        "max_chars": None,
        "max_turns": None,
        "languages": None,
        "evaluation_prompts": [],
    },
    "seed": 0,
    "heldout_fraction": 0.3,
    "near_duplicate": 0.5,
    "train_prompts": 12,
    "heldout_prompts": 6,
    "prompt_chars": 60,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(SECTION)
    return tmp_path


def write(section: dict[str, Any]) -> None:
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump({"prepare": section}, file)


def test_tables_and_counts_agree(project: Path) -> None:
    prepare.main()
    documents = read_table(project / "data/documents.parquet", DOCUMENTS)
    prompts = read_table(project / "data/prompts.parquet", PROMPTS)
    metrics = json.loads((project / "metrics/prepare.json").read_text())
    for rows, name in ((documents, "documents"), (prompts, "prompts")):
        for split, by_domain in metrics[name].items():
            for domain, count in by_domain.items():
                same = [r for r in rows if (r["split"], r["domain"]) == (split, domain)]
                assert len(same) == count
    assert sum(metrics["prompts"]["train"].values()) == 12
    assert sum(len(d["text"]) for d in documents) == sum(
        count for split in metrics["characters"].values() for count in split.values()
    )


def test_a_source_that_holds_fewer_prompts_than_asked_for_is_said(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chats.jsonl").write_text(
        "".join(f'{{"prompt": "number {i} of {i} prompts"}}\n' for i in range(10))
    )
    source = {"kind": "jsonl", "train": "chats.jsonl", "heldout": None, "layout": "auto"}
    write({**SECTION, "source": source, "near_duplicate": 1.0, "heldout_prompts": 3})
    prepare.main()
    said = capsys.readouterr().err
    assert "train has 7 prompts, fewer than the 12 of prepare.train_prompts" in said
    assert "heldout_prompts" not in said


def test_a_second_run_writes_the_same_bytes(project: Path) -> None:
    prepare.main()
    first = tree_digest(project / "data")
    prepare.main()
    assert tree_digest(project / "data") == first


def test_responses_of_the_data_reach_the_prompts(project: Path) -> None:
    rows = [{"prompt": f"Question number {n} of many?", "response": f"{n}"} for n in range(8)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write({**SECTION, "source": {"kind": "jsonl", "train": "mine.jsonl", "heldout": None}})
    prepare.main()
    prompts = read_table(project / "data/prompts.parquet", PROMPTS)
    assert {(p["text"], p["response"]) for p in prompts} == {
        (r["prompt"], r["response"]) for r in rows
    }


def test_conversations_stand_beside_their_prompts(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": ""}, {"role": "assistant", "content": "é"}]
    rows = [[{**talk[0], "content": f"Question number {n} of many?"}, talk[1]] for n in range(8)]
    sharegpt = [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in row]} for row in rows
    ]
    Path("mine.json").write_text(json.dumps([*sharegpt, {"conversations": []}]))
    write({**SECTION, "source": {"kind": "jsonl", "train": "mine.json", "heldout": None}})
    prepare.main()
    prompts = read_table(project / "data/prompts.parquet", PROMPTS)
    talks = read_table(project / "data/conversations.parquet", CONVERSATIONS)
    assert [(t["split"], t["id"]) for t in talks] == [(p["split"], p["id"]) for p in prompts]
    assert sorted(json.loads(t["messages"])[0]["content"] for t in talks) == sorted(
        row[0]["content"] for row in rows
    )
    assert "prepare: left out 1 row: 1 with no turn." in capsys.readouterr().err
    write(SECTION)
    prepare.main()
    assert not (project / "data/conversations.parquet").exists()


def test_a_refused_source_leaves_the_outputs_as_they_were(project: Path) -> None:
    prepare.main()
    before = tree_digest(project / "data")
    Path("mine.jsonl").write_bytes(b'{"prompt": "good"}\nnot json\n')
    write({**SECTION, "source": {"kind": "jsonl", "train": "mine.jsonl", "heldout": None}})
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2 is not JSON"):
        prepare.main()
    write({**SECTION, "seed": -1})
    with pytest.raises(ConfigError, match=r"prepare\.seed is -1"):
        prepare.main()
    assert tree_digest(project / "data") == before
