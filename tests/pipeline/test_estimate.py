"""Estimates are arithmetic over shapes and lengths, and say where each figure comes from."""

import copy
import json
from pathlib import Path

import pytest

from pipeline import draft
from pipeline.config import parse, read_params
from pipeline.estimate import (
    HIDDEN_RATIO,
    INT8_BYTES,
    LAST_READ_BY,
    LAYERS_READ_BY,
    Line,
    bytes_per_token,
    estimate,
    reductions,
    target_shape,
    token_counts,
)
from storage.errors import ConfigError
from storage.tables import CONVERSATIONS, PROMPTS, SEQUENCES, write_table

PARAMS = read_params()


def find(lines: list[Line], what: str) -> Line:
    return next(line for line in lines if line.what == what)


def test_without_sequences_the_limits_are_assumed(tmp_path: Path) -> None:
    lines = estimate(PARAMS, tflops=1.0, root=tmp_path)
    tokens = find(lines, "tokens, train")
    longest = PARAMS["generate"]["max_prompt_tokens"] + PARAMS["generate"]["max_new_tokens"]
    assert tokens.value == PARAMS["prepare"]["train_prompts"] * longest
    assert tokens.label == "assumed"
    hidden = find(lines, "3 hidden layers")
    assert hidden.value == pytest.approx(3 * 2 * PARAMS["target"]["hidden_size"] * HIDDEN_RATIO)


def test_every_user_turn_is_counted_once_the_data_is_prepared(tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    params["generate"]["turns"] = "every"
    params["prepare"]["source"] = {"kind": "jsonl", "train": "x.jsonl", "heldout": None}
    once = estimate(params, tflops=1.0, root=tmp_path)
    told = find(once, "user turns answered, train (more once prepare has run and they are counted)")
    assert (told.value, told.label) == (1, "assumed")
    params["prepare"]["filters"]["max_turns"] = 4
    most = find(estimate(params, tflops=1.0, root=tmp_path), "tokens, heldout").value
    assert most == 4 * find(once, "tokens, heldout").value

    prompt = {"domain": "d", "text": "a", "response": None}
    rows = [{"id": i, "split": s, **prompt} for s in ("train", "heldout") for i in ("a", "b")]
    write_table(tmp_path / "data/prompts.parquet", PROMPTS, rows)
    said = [{"role": role, "content": "x"} for role in ("user", "assistant") * 3]
    talk = {"id": "a", "messages": json.dumps(said), "tools": "[]"}
    write_table(tmp_path / "data/conversations.parquet", CONVERSATIONS, [talk | {"split": "train"}])
    lines = estimate(params, tflops=1.0, root=tmp_path)
    turns = find(lines, "user turns answered, train")
    assert (turns.value, turns.label) == (2, "counted")  # three of one, one of the other
    assert find(lines, "tokens, train").value == 2 * find(once, "tokens, train").value
    assert find(lines, "tokens, heldout").value == find(once, "tokens, heldout").value


def test_sequences_are_counted(tmp_path: Path) -> None:
    for split in ("train", "heldout", "greedy"):
        row = {"id": "a", "domain": "code", "tokens": [1, 2, 3], "turn": [-1, 0, 0], "law": "T=1"}
        write_table(tmp_path / f"sequences/{split}.parquet", SEQUENCES, [row | {"finished": True}])
    tokens = find(estimate(PARAMS, tflops=1.0, root=tmp_path), "tokens, train")
    assert (tokens.value, tokens.label) == (3, "counted")


def test_full_logits_cost_their_vocabulary(tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    params["capture"]["mode"] = "full"
    lines = estimate(params, tflops=1.0, root=tmp_path)
    assert find(lines, "full logits (bf16)").value == 2 * params["target"]["vocab_size"]


def test_twice_the_throughput_is_half_the_time(tmp_path: Path) -> None:
    slow, fast = (estimate(PARAMS, tflops=x, root=tmp_path)[-1].value for x in (1.0, 2.0))
    assert slow == pytest.approx(2 * fast)


def test_a_target_that_is_not_here_is_refused(tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    params["target"] = {"kind": "pretrained", "model": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match=r"no .*config\.json; expected a local target folder"):
        estimate(params, tflops=1.0, root=tmp_path)


def test_a_target_in_shards_takes_a_share_of_each_device(tmp_path: Path) -> None:
    shape = {"vocab_size": 100, "hidden_size": 8, "num_layers": 4, "intermediate_size": 16}
    shape |= {"num_parameters": 8e9, "active_parameters": 1e9}
    params = copy.deepcopy(PARAMS)
    params["target"] = {"kind": "pretrained", "model": "org/name", "shape": shape}
    whole = estimate(params, tflops=1.0, root=tmp_path)
    params["target"]["tensor_parallel"] = 4
    shards = estimate(params, tflops=1.0, root=tmp_path)
    what = "the target's weights in bfloat16 on each of 4 devices, if all were cut"
    assert find(shards, what).value == 4e9
    assert [line for line in shards if line.what != what] == whole


def sizes_of(tmp_path: Path, **capture: object) -> dict[str, float]:
    params = copy.deepcopy(PARAMS)
    params["capture"] |= capture
    lines = estimate(params, tflops=1.0, root=tmp_path)
    return {line.what: line.value for line in lines if line.unit == "B/token"}


def test_each_mode_and_rule_costs_what_it_stores(tmp_path: Path) -> None:
    size = PARAMS["target"]["hidden_size"]
    plain = sizes_of(tmp_path)
    rebuild = sizes_of(tmp_path, mode="rebuild", hidden_dtype="int8")
    assert not {"kept ids and probabilities", "tail samples", "full logits (bf16)"} & set(rebuild)
    assert rebuild["last hidden"] == pytest.approx(2 * size * HIDDEN_RATIO)  # stays in bfloat16
    assert rebuild["3 hidden layers"] == pytest.approx(3 * size * INT8_BYTES)
    assert sizes_of(tmp_path, hidden_dtype="int8")["last hidden"] < plain["last hidden"]
    kept = "kept ids and probabilities"
    fixed = sizes_of(tmp_path, keep="fixed", max_kept=128)[kept]
    assert fixed == pytest.approx(plain[kept] * 128 / 40)
    assert plain[kept] < sizes_of(tmp_path, keep="nucleus", max_kept=1024)[kept] < fixed
    assert sizes_of(tmp_path, keep="nucleus", max_kept=16)[kept] == pytest.approx(fixed / 8)


def test_hidden_states_that_no_draft_reads_are_named_as_savings(tmp_path: Path) -> None:
    """Standalone drafts need none; the kinds are those of the drafts' own needs."""
    params = copy.deepcopy(PARAMS)
    params["starts"] = {k: s for k, s in PARAMS["starts"].items() if s["kind"] == "lm"}
    asked = bytes_per_token(params, target_shape(params))
    tokens = sum(token_counts(params, tmp_path)[0].values())
    found = {line.what: line.value for line in reductions(params, root=tmp_path)}
    unread = "capture.hidden_layers: [], since no draft of starts reads them"
    assert found[unread] == pytest.approx(tokens * asked["3 hidden layers"])
    assert "capture.last_hidden: false, since no draft of starts reads it" in found
    found = {line.what: line.value for line in reductions(PARAMS, root=tmp_path)}
    assert {"each layer less in capture.hidden_layers", "capture.last_hidden: false"} <= set(found)
    for name, row in PARAMS["drafts"].items():
        module = draft.find(row["kind"])
        needs = module.Model.needs(parse(name, row, module.Config))
        assert (row["kind"] in LAYERS_READ_BY) == (needs.num_layers > 0)
        assert (row["kind"] in LAST_READ_BY) == needs.last_hidden
