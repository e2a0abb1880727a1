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
from storage.tables import PROMPTS, SEQUENCES, read_table, write_table
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


def test_the_data_answers_without_an_engine(here: Path) -> None:
    write_params(here, generate={"engine": "none"})
    rows = [{**row, "response": "the cat went home"} for row in prompts("train", 3)]
    rows += [{**row, "response": "seven apples"} for row in prompts("heldout", 2)]
    write_table(here / "data/prompts.parquet", PROMPTS, rows)
    main()
    rows = read_table(here / "sequences/greedy.parquet", SEQUENCES)
    assert [row["law"] for row in rows] == ["data", "data"]
    text = tokenizer().decode(rows[0]["tokens"][rows[0]["turn"].index(0) :])
    assert text == "seven apples<|end|>"


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
    write_params(here)
    write_table(here / "data/prompts.parquet", PROMPTS, prompts("train", 3))
    with pytest.raises(DataError, match="no prompt of the split 'heldout'"):
        main()
    assert tree_digest(here / "sequences") == before
