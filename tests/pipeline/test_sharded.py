"""A target in shards: it says what the whole one says, and nobody waits for a failed rank."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from pipeline import cluster, sharded
from pipeline.capture import layout_of
from pipeline.check import check_params
from pipeline.config import read_params
from pipeline.group import Group
from pipeline.pin import Origin, pin
from pipeline.sampling import Prompt, sample
from pipeline.session import Session
from pipeline.sharded import ShardedTarget, load_shards, require_devices, resident_target
from pipeline.speculate import Rules, decode
from pipeline.target import PROBE, SPEC, Target, load_target, read_probe, read_spec
from pipeline.teacher import Pass
from pipeline.tp_plan import require_plan
from stages import capture, generate, target, verify
from storage.diff import diff
from storage.errors import ConfigError, TargetError, WorkspaceError
from storage.reader import Cache
from storage.record import Record
from storage.workspace import tree_digest
from tests.pipeline.test_capture import config_of, rows_of
from tests.targets import copy_project, member, tokenizer, write_params, write_project

SPLITS = ("train", "heldout", "greedy")
# float32 sums in another order, over a few layers; relative to an array's largest number
TOLERANCE = 1e-5
PRETRAINED: dict[str, Any] = {
    "kind": "pretrained",
    "model": ".",
    "revision": None,
    "dtype": "float32",
    "trust_remote_code": False,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    resident_target.cache_clear()
    if Group._open is not None:
        Group._open.close()


def pinned(folder: Path, model: Any, size: int = 2) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    pin(folder, folder, origin=Origin("embedded", ".", tensor_parallel=size))
    return folder


def off(found: Any, wanted: Any) -> float:
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-9))


def full_records(target: Target) -> list[Record]:
    """All that a cache of whole laws holds, hidden states too."""
    config = config_of(mode="full", hidden_layers=[0, 1, 3])
    layout = layout_of(target.spec, config)
    return Pass(target, layout, rule=None, batch_tokens=40, seed=0).records(rows_of())


@pytest.mark.parametrize("family", ["llama-3.1-8b", "qwen3-8b", "qwen3-235b-a22b"])
def test_shards_give_what_the_whole_target_gives(family: str, tmp_path: Path) -> None:
    folder = pinned(tmp_path / "target", member(family))
    whole, shards = load_target(folder), load_shards(folder, device="cpu")
    layers = list(range(whole.spec.num_layers))
    tokens = torch.arange(60).view(3, 20) * 4
    found, wanted = (t.forward(tokens, layers=layers) for t in (shards, whole))
    assert off(found.hidden, wanted.hidden) < TOLERANCE
    assert off(found.last_hidden, wanted.last_hidden) < TOLERANCE
    logits = [t.logits(wanted.last_hidden[0]) for t in (shards, whole)]
    assert off(*logits) < TOLERANCE
    assert shards.head_weight.to_local().shape[0] == whole.spec.vocab_size // 2
    assert not torch.equal(found.last_hidden, wanted.last_hidden), "added in one order?"
    tokens_T, last_hidden_TD, logits_TV = read_probe(folder)
    shards.check(tokens_T, last_hidden_TD, logits_TV)
    with pytest.raises(TargetError, match=r"the last hidden state of the target's 2 shards is .* "
                       r"away from the whole target's; expected at most 0\.001"):  # fmt: skip
        shards.check(tokens_T, last_hidden_TD.flip(-1), logits_TV)
    # what a cache stores: bfloat16 bits may round to the neighbour
    for one, other in zip(full_records(shards), full_records(whole), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert off(one.token_logp, other.token_logp) < TOLERANCE
        for name in ("hidden", "last_hidden", "logits"):
            bits = [(getattr(x, name).astype(np.uint32) << 16).view(np.float32)
                    for x in (one, other)]  # fmt: skip
            assert off(*bits) < 2**-7
    # and with a cache of keys and values on each rank, of rows that come and go
    sessions = [Session(t, 3, 24) for t in (shards, whole)]
    for piece, count, keep in ((tokens[:, :9], [9, 5, 7], [2, 0]), (tokens[:2, 9:11], [2, 1], [1])):
        steps = [s.extend(piece, torch.tensor(count)).logits for s in sessions]
        assert off(*(x[:, 0] for x in steps)) < TOLERANCE
        for session in sessions:
            session.rollback(session.length - 1)
            session.select(torch.tensor(keep))
    prompts = [Prompt(f"p{i}", "d", tuple(range(1, 4 + i))) for i in range(4)]
    answers = [sample(t, prompts, max_new_tokens=8, uniform_BG=None) for t in (shards, whole)]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    rules = Rules(gamma=0, temperature=1.0, max_new_tokens=8, eos_ids=(0,))
    drawn = torch.rand(4, rules.num_uniforms, dtype=torch.float64, generator=torch.manual_seed(0))
    asked = [torch.tensor(p.tokens) for p in prompts]
    decoded = [decode(t, None, asked, rules, uniforms_BU=drawn)[0] for t in (shards, whole)]
    assert [row.tokens for row in decoded[0]] == [row.tokens for row in decoded[1]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """A project whose target is in two shards, its caches captured."""
    folder = tmp_path_factory.mktemp("sharded")
    write_project(folder, tiny_model(vocab_size=300))
    home = folder / "target"
    pin(home, home, origin=Origin("embedded", ".", tensor_parallel=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generate.main()
        capture.main()
        verify.main()
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project before its capture."""
    monkeypatch.chdir(copy_project(project, tmp_path))
    for split in SPLITS:
        shutil.rmtree(f"cache/{split}.zarr")
    Path("metrics/capture.json").unlink()
    Path("timings/capture.json").unlink()
    resident_target.cache_clear()
    return tmp_path


def caches(folder: Path) -> dict[str, str]:
    return {split: tree_digest(folder / f"cache/{split}.zarr") for split in SPLITS}


def fails(patch: pytest.MonkeyPatch, how: str) -> None:
    patch.setattr(sharded, "FOLLOWER", "tests.failing_rank")
    patch.setenv("FAIL", how)


def test_a_rank_killed_within_a_part_is_named_and_the_next_run_gives_the_same_bytes(
    project: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "die:5")
    with pytest.raises(WorkspaceError, match=r"rank 1 of the 2 that share the target ended early "
                       r"\(SIGKILL\); expected .*finished units are kept"):  # fmt: skip
        capture.main()
    assert (here / "failed").exists()
    assert list((here / ".scratch").rglob("part-*"))[:1] or list((here / ".scratch").rglob("c"))
    capture.main()
    assert caches(here) == caches(project)
    assert json.loads(Path("metrics/capture.json").read_text()) == json.loads(
        (project / "metrics/capture.json").read_text()
    )


def test_memory_that_a_rank_lacks_halves_the_batch_of_all(
    project: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "memory:3")
    capture.main()
    metrics = json.loads(Path("metrics/capture.json").read_text())
    assert sum(metrics[split]["memory_halvings"] for split in SPLITS) == 1
    found = diff(Cache.open(Path("cache/train.zarr")), Cache.open(project / "cache/train.zarr"))
    assert found.values.compared == 14
    assert all(gap.largest < 2e-2 for gap in found.values.gaps.values())


def test_two_workers_of_two_shards_write_the_same_bytes(project: Path, here: Path) -> None:
    write_params(here, cluster={"workers": 2})
    capture.main()
    assert caches(here) == caches(project)


def test_the_number_of_shards_is_part_of_a_caches_identity(
    project: Path, tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, tiny_model(vocab_size=300))
    (tmp_path / "sequences").symlink_to(project / "sequences")
    capture.main()
    whole, shards = (Cache.open(f / "cache/train.zarr") for f in (tmp_path, project))
    assert "tensor_parallel" not in whole.source
    assert "tensor_parallel" not in (tmp_path / "target" / SPEC).read_text()
    found = diff(whole, shards)
    different = {row.what: (row.a, row.b) for row in found.identity if not row.equal}
    assert different.pop("source tensor_parallel") == ("absent", "2")
    assert set(different) == {"source target", "source capture"}
    assert found.values.gaps["token_logp"].largest < 1e-4


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("family", "changes", "size", "sentence"),
    [
        ("gpt-oss-20b", {}, 2, r"GptOssForCausalLM, of whose layers this transformers has no tens"),
        ("llama-3.3-70b", {}, 2, r"num_key_value_heads 1; expected a multiple of .*, 2; set "),
        ("qwen3-8b", {"intermediate_size": 63}, 2, r"layers\.0\.mlp\.gate_proj\.weight with 63 r"),
        ("qwen3-8b", {"quantization_config": {"quant_method": "fp8"}}, 2, r"quantised by fp8; exp"),
        ("qwen3-235b-a22b", {"num_key_value_heads": 4, "moe_intermediate_size": 18}, 4,
         r"experts\.gate_up_proj with 18 rows; expected a multiple of .*, 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_without_weights(
    family: str, changes: dict[str, Any], size: int, sentence: str, tmp_path: Path
) -> None:
    member(family).config.save_pretrained(tmp_path)
    config(tmp_path, **changes)
    with pytest.raises(TargetError, match=rf"target\.tensor_parallel {size} for .*{sentence}"):
        require_plan(tmp_path, size)


def test_more_shards_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices("cuda", 2)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 4, and a worker here has 2 CUDA"):
        require_devices("cuda", 4)
    with pytest.raises(ConfigError, match=r"is 2 on a CPU, where torch sees 2 CUDA devices"):
        require_devices("cpu", 2)


def test_a_worker_gets_a_device_for_each_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    where = cluster.ClusterConfig(
        workers=None, device="cuda", address=None, parallel=None, writers=None
    )
    assert cluster._visible(where, 2) == ["0,1", "2,3"]
    assert cluster.num_workers(where, threads=1, shards=2) == 2
    with pytest.raises(ConfigError, match=r"5 CUDA devices here, and target\.tensor_parallel is 8"):
        cluster._visible(where, 8)


def test_shards_and_layers_are_one_or_the_other() -> None:
    params = dict(read_params())
    params["target"] = {**PRETRAINED, "tensor_parallel": 2}
    check_params(params)
    spread = {"kind": "device_map", "devices": 2, "map": "auto"}
    params["cluster"] = {**params["cluster"], "parallel": spread}
    with pytest.raises(ConfigError, match=r"tensor_parallel is 2, and cluster\.parallel is of kin"):
        check_params(params)


def test_the_target_stage_pins_the_number_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = member("qwen3-8b")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    found = []
    for size in ({}, {"tensor_parallel": 1}, {"tensor_parallel": 2}):
        here = tmp_path / f"project-{len(found)}"
        here.mkdir()
        monkeypatch.chdir(here)
        write_params(here)
        yaml = YAML(typ="safe", pure=True)
        params = yaml.load(Path("params.yaml").read_text(encoding="utf-8"))
        params["target"] = {**PRETRAINED, "model": str(tmp_path / "model"), **size}
        with Path("params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        target.main()
        found.append(tree_digest(Path("target")))
        assert (Path("target") / PROBE).is_file() == (size == {"tensor_parallel": 2})
    assert found[0] == found[1] != found[2]
    assert read_spec(Path("target")).tensor_parallel == 2


def test_a_target_of_one_process_is_what_it_always_was(project: Path) -> None:
    spec = read_spec(project / "target")
    assert spec.tensor_parallel == 2
    assert spec.as_dict()["tensor_parallel"] == 2
    one = spec.model_copy(update={"tensor_parallel": 1})
    assert set(spec.as_dict()) - set(one.as_dict()) == {"tensor_parallel"}
    assert isinstance(load_target(project / "target"), Target)
    assert not isinstance(load_target(project / "target"), ShardedTarget)
