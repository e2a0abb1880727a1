"""`evaluate` on a tiny target with a real cache and drafts of every kind."""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.capture import CaptureConfig, layout_of
from pipeline.checkpoint import save_draft
from pipeline.config import read_params
from pipeline.dataset import collate
from pipeline.draft import find
from pipeline.interface import Shape
from pipeline.matrix import Arm
from pipeline.pin import Origin, pin
from pipeline.seeds import uniforms
from pipeline.setting import Setting
from pipeline.speculate import Rules, decode
from pipeline.target import Target, load_target, read_interface
from pipeline.teacher import Pass
from stages import evaluate
from storage.errors import ConfigError, DataError, DraftError, FingerprintMismatch, ResultError
from storage.reader import Cache
from storage.record import Record
from storage.tables import DEPTHS, ROUNDS, STRATA, read_table
from storage.writer import seal, write_part

V, NEW, NUM_PROMPTS = 64, 24, 60
SERVED = "T=0.9,top_p=0.8"
KINDS = {
    "lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
    "medusa": {"num_heads": 3, "num_layers": 1},
    "eagle3": {
        "depth": 3,
        "num_heads": 2,
        "intermediate_size": 32,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "draft_vocab_size": 48,
    },
}
ROOT = Path(__file__).parents[2]
PARAMS = read_params(ROOT / "params.yaml")


def write_target(folder: Path, model: Any) -> Target:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
    pin(folder, folder, origin=Origin("embedded", "."))
    return load_target(folder)


def roll_out(
    target: Target, temperature: float, *, seed: int = 2, **cuts: Any
) -> list[dict[str, Any]]:
    """The target's own responses, as the table of sequences has them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (NUM_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(1, V, (n,), generator=generator) for n in lengths]
    rules = Rules(gamma=0, temperature=temperature, max_new_tokens=NEW, eos_ids=(0,), **cuts)
    drawn = torch.stack([uniforms(seed, i, n=rules.num_uniforms) for i in range(NUM_PROMPTS)])
    decoded, _ = decode(target, None, prompts, rules, uniforms_BU=drawn)
    return [
        {
            "id": f"p{i}",
            "domain": ("code", "prose", "maths")[i % 3],
            "tokens": [*prompt.tolist(), *row.tokens],
            "turn": [-1] * len(prompt) + [0] * len(row.tokens),
        }
        for i, (prompt, row) in enumerate(zip(prompts, decoded, strict=True))
    ]


def write_cache(
    path: Path, target: Target, rows: list[dict[str, Any]], /, **source: str
) -> list[Record]:
    config = CaptureConfig(**PARAMS["capture"])
    layout = layout_of(target.spec, config)
    teacher = Pass(target, layout, rule=config.rule(), batch_tokens=4096, seed=0)
    records = teacher.records([{**row, "law": source["law"]} for row in rows])
    path.mkdir(parents=True)
    half = len(records) // 2
    parts = [
        write_part(path, index, some, layout)
        for index, some in enumerate((records[:half], records[half:]))
    ]
    given = {"target": target.spec.fingerprint, **source}
    seal(path, layout=layout, parts=parts, source=given, params={})
    return records


def write_draft(folder: Path, kind: str, target: Target, records: list[Record]) -> None:
    """A draft after a few steps of maximum likelihood, so that some of its tokens are accepted."""
    module, home = find(kind), folder.parents[3]
    section = {"kind": kind, "lr_scale": 1.0, "steps_scale": 1.0, **KINDS[kind]}
    config = module.Config(**section)
    shape = Shape(vocab_size=V, hidden_size=target.spec.hidden_size)
    d2t = torch.arange(48) if "draft_vocab_size" in section else None
    draft = module.Model.build(config, shape, read_interface(home / "target"), 0, d2t=d2t)
    layout = Cache.open(home / "cache/heldout.zarr").layout
    batch = collate(records[:40], layout)
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss = torch.zeros(())
        for k, logits in enumerate(draft.training_logits(batch, module.Model.loss_depth(config))):
            token = batch.pairs(k).token
            seen = token < logits.shape[1]
            loss = loss + cross_entropy(logits[seen], token[seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    meta = {"target": target.spec.fingerprint, "draft": kind, "objective": "kl"}
    save_draft(folder, draft, config=section, meta=meta, shape=shape)


def write_params(folder: Path, **evaluate: Any) -> None:
    params = deepcopy({name: PARAMS[name] for name in ("evaluate", "cluster")})
    params["evaluate"] |= {
        "depth": 5,
        "batch_sequences": 40,
        "decode_prompts": 45,
        "decode_new_tokens": 20,
        "decode_batch": 30,
        "trace_prompts": 3,
        "laws": ["T=0", "T=1"],
    } | evaluate
    params["cluster"]["workers"] = 1
    cell = {"seed": 0, "objectives": ["kl"]}
    params["starts"] = {f"{k}-0": {"draft": k, "kind": k, **cell} for k in KINDS}
    params["arms"] = {
        f"{k}-kl-0": {
            "draft": k,
            "kind": k,
            "objective": "kl",
            "loss": "kl",
            "seed": 0,
            "start": f"{k}-0",
        }
        for k in KINDS
    }
    # JSON is YAML, and quicker to write
    (folder / "params.yaml").write_text(json.dumps(params))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("project")
    target = write_target(folder / "target", tiny_model(seed=3))
    # a draft knows its training text too well: replayed on it, τ would be higher than decoded
    learned = roll_out(target, 1.0, seed=3)
    records = write_cache(folder / "cache/train.zarr", target, learned, law="T=1")
    write_cache(folder / "cache/heldout.zarr", target, roll_out(target, 1.0), law="T=1")
    write_cache(folder / "cache/greedy.zarr", target, roll_out(target, 0.0), law="T=0")
    served = roll_out(target, 0.9, top_p=0.8)
    write_cache(folder / f"cache/served/{SERVED}.zarr", target, served, law=SERVED)
    # what tells evaluate that the law was rolled out; generate writes it
    (folder / "sequences/served").mkdir(parents=True)
    (folder / f"sequences/served/{SERVED}.parquet").touch()
    for kind in KINDS:
        write_draft(folder / f"drafts/{kind}-0/kl/model", kind, target, records)
    write_params(folder)
    return folder


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    write_params(project)
    return project


def run_stage(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", f"{kind}-0"])
    evaluate.main()


@pytest.fixture(scope="module")
def scored(project: Path) -> Path:
    """The project after every start was evaluated once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(project)
        for kind in KINDS:
            run_stage(kind, monkeypatch)
    return project


@pytest.fixture
def apart(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, for runs whose results no other test should see."""
    copied = tmp_path / "apart"
    shutil.copytree(project, copied, ignore=shutil.ignore_patterns(".scratch", "results"))
    monkeypatch.chdir(copied)
    return copied


def rounds_of(kind: str, instrument: str, temperature: float) -> dict[str, dict[str, Any]]:
    rows = read_table(Path(f"results/{kind}-0/arms/kl.rounds.parquet"), ROUNDS)
    gamma = 3 if kind == "medusa" else 4
    return {
        row["prompt"]: row
        for row in rows
        if (row["instrument"], row["temperature"], row["gamma"]) == (instrument, temperature, gamma)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_counts_what_replay_predicts(scored: Path, kind: str) -> None:
    """Prompt by prompt and exactly: tokens, rounds, drafted and accepted."""
    predicted, measured = (rounds_of(kind, name, 0.0) for name in ("replay_decode", "decode"))
    assert len(measured) == 45
    assert predicted.keys() == measured.keys()
    for prompt, row in measured.items():
        for column in ("tokens", "rounds", "drafted", "accepted", "domain"):
            assert row[column] == predicted[prompt][column], (prompt, column)
    assert sum(row["accepted"] for row in measured.values()) > 20
    metrics = json.loads(Path(f"results/{kind}-0/metrics.json").read_text())["kl"]
    assert metrics["greedy_identical"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_decoding_agrees_with_replay(scored: Path, kind: str) -> None:
    """τ of other samples of the same prompts, within 3.3 standard errors (1 in 1000)."""
    tau, variance = [], 0.0
    for name in ("replay_decode", "decode"):
        rows = rounds_of(kind, name, 1.0)
        tokens, rounds = (
            np.array([rows[p][c] for p in sorted(rows)]) for c in ("tokens", "rounds")
        )
        tau.append(tokens.sum() / rounds.sum())
        variance += (tokens - tau[-1] * rounds).var() * len(rows) / rounds.sum() ** 2
    assert abs(tau[1] - tau[0]) <= 3.3 * variance**0.5
    assert tau[0] > 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_metrics_say_the_same(scored: Path, kind: str) -> None:
    metrics = json.loads(Path(f"results/{kind}-0/metrics.json").read_text())["kl"]
    depths = read_table(Path(f"results/{kind}-0/arms/kl.depths.parquet"), DEPTHS)
    assert {row["depth"] for row in depths} == set(range(3 if kind == "medusa" else 5))
    for t in (0.0, 1.0):
        rows = rounds_of(kind, "replay", t)
        assert len(rows) == NUM_PROMPTS
        tau = sum(r["tokens"] for r in rows.values()) / sum(r["rounds"] for r in rows.values())
        gamma = "3" if kind == "medusa" else "4"
        assert metrics[f"T={t:g}"]["tau"]["replay"][gamma] == pytest.approx(tau, abs=1e-6)
    for row in depths:
        assert row["survive"] <= row["accept"] + 1e-9 <= row["anchors"] + 1e-6
        if row["temperature"] == 0:
            assert row["alpha"] is row["alpha_lo"] is row["alpha_hi"] is None
        else:
            assert row["alpha_lo"] <= row["alpha_hi"]
    first = [row for row in depths if row["depth"] == 0 and row["temperature"] == 1]
    sums = {n: sum(r[n] for r in first) for n in ("alpha_lo", "alpha", "accept", "alpha_hi")}
    anchors = sum(row["anchors"] for row in first)
    assert sums["alpha_lo"] <= sums["alpha"] <= sums["alpha_hi"]
    # both estimate the same mean, the one by every token's law and the other by the token alone
    assert abs(sums["accept"] - sums["alpha"]) / anchors < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_strata_part_the_anchors_of_every_depth(scored: Path, kind: str) -> None:
    """By place and, at T = 1, by entropy: the sums of all strata are those of all prompts."""
    arms = Path(f"results/{kind}-0/arms")
    depths = read_table(arms / "kl.depths.parquet", DEPTHS)
    strata = read_table(arms / "kl.strata.parquet", STRATA)
    assert {(r["temperature"], r["by"]) for r in strata} == {
        *((0.0, "position"), (1.0, "position"), (1.0, "entropy"))
    }
    for t, name in ((0.0, "position"), (1.0, "position"), (1.0, "entropy")):
        for k in {row["depth"] for row in depths}:
            whole = [r for r in depths if (r["temperature"], r["depth"]) == (t, k)]
            mine = [r for r in strata if (r["temperature"], r["by"], r["depth"]) == (t, name, k)]
            for column in ("anchors", "accept", "survive", *(["alpha"] if t else [])):
                total = sum(row[column] for row in whole)
                assert sum(row[column] for row in mine) == pytest.approx(total, abs=1e-6)


def test_a_trace_tells_the_decoded_text_and_why(scored: Path) -> None:
    traces = json.loads(Path("results/eagle3-0/arms/kl.traces.json").read_text())["traces"]
    assert len(traces) == 6  # three prompts at two temperatures
    assert {row["domain"] for row in traces} == {"code", "prose", "maths"}
    for row in traces:
        told = list(row["first"])
        for r in row["rounds"]:
            assert r["start"] == len(told)
            kept = [d["token"] for d in r["drafts"] if d["kept"]]
            told += [*kept, r["token"]][: r["emitted"]]
            for k, d in enumerate(r["drafts"]):
                if d["q"] is None:
                    assert row["temperature"] == 0
                elif k <= len(kept):  # decided by u < p/q, up to the stored digits
                    assert (
                        d["kept"] == (d["u"] * d["q"] < d["p"])
                        or abs(d["u"] * d["q"] - d["p"]) < 2e-4
                    )
                    assert d["alpha"] <= 1
        assert " ".join(told).split() == row["text"].split()


def test_block_verification_is_replayed_beside(scored: Path) -> None:
    token, block = (rounds_of("eagle3", n, 1.0) for n in ("replay", "replay_block"))
    assert token.keys() == block.keys()
    assert sum(r["rounds"] for r in block.values()) < sum(r["rounds"] for r in token.values())
    assert not rounds_of("eagle3", "replay_block", 0.0)


def test_times_are_kept_out_of_results(scored: Path) -> None:
    times = json.loads(Path("timings/evaluate-eagle3-0.json").read_text())
    assert times["seconds"] > 0
    for name in ("plain T=0", "plain T=1", "kl T=0", "kl T=1"):
        assert times[f"{name} tokens_per_s"] > 0
        assert times[f"{name} target_step_s"] > 0
    assert times["kl T=1 draft_step_s"] > 0
    assert "_s" not in Path("results/eagle3-0/metrics.json").read_text()


def test_the_same_work_gives_the_same_bytes(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [p for p in Path("results/medusa-0").rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in names}
    assert len(before) == 5
    run_stage("medusa", monkeypatch)
    assert {p: p.read_bytes() for p in names} == before


def test_jobs_do_not_depend_on_their_order(scored: Path) -> None:
    from pipeline.evaluate import EvaluateConfig, run_job
    from pipeline.schedule import open_bench, plan

    config = EvaluateConfig(**read_params()["evaluate"])
    folders = [Path("drafts/lm-0/kl/model"), Path("drafts/eagle3-0/kl/model")]
    bench = open_bench(evaluate.TARGET, evaluate.CACHES, folders, config=config, device="cpu")
    jobs = plan(bench, folders, decode=True)[:6]
    forth = [run_job(bench, job).rounds for job in jobs]
    back = [run_job(bench, job).rounds for job in reversed(jobs)]
    assert forth == back[::-1]


def test_other_seeds_are_replayed_only(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(apart, decode_seeds=[1])
    run_stage("lm", monkeypatch)
    rows = read_table(Path("results/lm-0/arms/kl.rounds.parquet"), ROUNDS)
    assert {row["instrument"] for row in rows} == {"replay", "replay_block"}
    times = json.loads(Path("timings/evaluate-lm-0.json").read_text())
    assert list(times) == ["seconds"]


def test_a_law_without_rollouts_is_decoded_only(
    apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(apart, laws=["T=0.7"], decode_prompts=6)
    run_stage("medusa", monkeypatch)
    rows = read_table(Path("results/medusa-0/arms/kl.rounds.parquet"), ROUNDS)
    assert {(row["instrument"], row["temperature"]) for row in rows} == {("decode", 0.7)}
    assert {row["domain"] for row in rows} == {"code", "prose", "maths"}


LAWS = [SERVED, "T=1,drafts=greedy", f"{SERVED},drafts=greedy", "T=1.2,top_k=8"]


@pytest.fixture(scope="module")
def served(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, whose eagle3 was evaluated under laws that are not plain."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(project, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".scratch"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        write_params(folder, laws=["T=1", *LAWS])
        run_stage("eagle3", monkeypatch)
    return folder


def by_prompt(folder: Path, instrument: str, law: str, gamma: int = 4) -> list[dict[str, Any]]:
    rows = read_table(folder / "results/eagle3-0/arms/kl.rounds.parquet", ROUNDS)
    key = (instrument, law, gamma)
    mine = [r for r in rows if (r["instrument"], r["law"], r["gamma"]) == key]
    return sorted(mine, key=lambda r: str(r["prompt"]))


@pytest.mark.parametrize("law", LAWS[:3])
def test_a_served_law_is_replayed_and_decoded_alike(served: Path, law: str) -> None:
    """τ of other samples of the same prompts, within 3.3 standard errors (1 in 1000)."""
    tau, variance = [], 0.0
    for name in ("replay_decode", "decode"):
        rows = by_prompt(served, name, law)
        assert len(rows) == 45
        tokens, rounds = (np.array([r[c] for r in rows]) for c in ("tokens", "rounds"))
        tau.append(tokens.sum() / rounds.sum())
        variance += (tokens - tau[-1] * rounds).var() * len(rows) / rounds.sum() ** 2
    assert abs(tau[1] - tau[0]) <= 3.3 * variance**0.5
    assert tau[0] > 1.05
    assert len(by_prompt(served, "replay_block", law)) == NUM_PROMPTS


def test_a_law_that_was_not_rolled_out_is_decoded_only_beside_those_that_were(served: Path) -> None:
    assert len(by_prompt(served, "decode", LAWS[3])) == 45
    assert not by_prompt(served, "replay", LAWS[3])


def test_three_acceptances_are_named_apart(served: Path) -> None:
    """α, p(argmax q) with its bounds, and (at T = 0) the match: no name stands for another."""
    metrics = json.loads((served / "results/eagle3-0/metrics.json").read_text())["kl"]
    assert set(metrics) == {"T=1", *LAWS}
    for law in LAWS[:3]:
        greedy = law.endswith("drafts=greedy")
        name, other = ("p_argmax_q", "alpha") if greedy else ("alpha", "p_argmax_q")
        assert other not in metrics[law]
        for depth, value in metrics[law][name].items():
            lo, hi = metrics[law][f"{name}_lo"][depth], metrics[law][f"{name}_hi"][depth]
            assert lo - 1e-6 <= value <= hi + 1e-6
        # the mean over tokens that came estimates the same as the mean over whole laws
        assert abs(metrics[law]["accept"]["0"] - metrics[law][name]["0"]) < 0.05
    # argmax q meets the likelier tokens, a draw from q the overlap of the laws
    assert metrics["T=1,drafts=greedy"]["p_argmax_q"]["0"] != metrics["T=1"]["alpha"]["0"]


def test_a_greedy_draft_is_kept_where_it_is_the_token_that_came(served: Path) -> None:
    """Given the rollout, an argmax draft is kept just where argmax q is the rollout's token."""
    from pipeline.checkpoint import load_draft
    from pipeline.score import score

    cache = Cache.open(served / f"cache/served/{SERVED}.zarr")
    batch = collate(cache.records(range(5)), cache.layout)
    interface, shape = read_interface(served / "target"), Shape(vocab_size=V, hidden_size=32)
    draft = load_draft(served / "drafts/eagle3-0/kl/model", interface, shape)
    for name in (SERVED, "T=1"):
        setting = Setting.parse(f"{name},drafts=greedy")
        scores = score(draft, batch, depth=2, setting=setting, vocab_size=V)
        with torch.no_grad():
            logits = list(draft.training_logits(batch, 2))
        for k in range(2):
            pairs = batch.pairs(k)
            assert draft.d2t is not None
            match = draft.d2t[logits[k].argmax(-1)] == pairs.token
            accept = np.exp(np.minimum(scores.logr[k].ravel()[pairs.anchor.numpy()], 0))
            np.testing.assert_array_equal(accept, match.double().numpy())


def test_rollouts_of_a_served_law_carry_its_log_probabilities(served: Path) -> None:
    target = load_target(served / "target")
    record = Cache.open(served / f"cache/served/{SERVED}.zarr").records([3])[0]
    tokens = torch.from_numpy(record.tokens.astype(np.int64))
    with torch.no_grad():
        logits = target.logits(target.forward(tokens[None]).last_hidden[0]).double()
    for t in np.flatnonzero((record.turn[1:] >= 0) & (record.turn[:-1] == record.turn[1:])):
        p = torch.softmax(logits[t] / 0.9, -1)
        falling = p.sort(descending=True)
        size = int((falling.values.cumsum(0) < 0.8).sum()) + 1
        inside = falling.values[:size]
        assert int(tokens[t + 1]) in falling.indices[:size].tolist()
        wanted = float((p[tokens[t + 1]] / inside.sum()).log())
        assert record.token_logp[t] == pytest.approx(wanted, abs=1e-5)


def write_sets(folder: Path) -> dict[str, Any]:
    """A file in MT-Bench's layout and one of one's own; returns the parameter."""
    turns = [["w3 w4 w5", "w9"], ["w7"], ["w8 w2 w2 w6"], ["w11 w12"], ["w13"]]
    questions = [
        {"question_id": 81 + i, "category": ("writing", "math")[i % 2], "turns": given}
        for i, given in enumerate(turns)
    ]
    own = [{"prompt": f"w{i} w{i + 1}", "id": f"own-{i}", "domain": "shop"} for i in range(5, 9)]
    for name, rows in (("question", questions), ("own", own)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "mt_bench": {"path": "question.jsonl", "layout": "mt_bench", "max_prompts": 4},
        "own": {"path": "own.jsonl", "layout": "plain", "max_prompts": None},
    }


def test_prompt_sets_are_decoded_beside_the_heldout_prompts(
    apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = write_sets(apart)
    write_params(apart, prompt_sets=sets, decode_batch=3, decode_prompts=6, trace_prompts=0)
    run_stage("lm", monkeypatch)
    rows = read_table(Path("results/lm-0/arms/kl.rounds.parquet"), ROUNDS)
    for law in ("T=0", "T=1"):
        mt, own = (
            {r["prompt"]: r for r in rows if (r["instrument"], r["law"]) == (f"decode:{name}", law)}
            for name in sets
        )
        # four of five, the categories in turn
        assert sorted(mt) == [f"mt_bench/{n}" for n in (81, 82, 83, 84)]
        assert {r["domain"] for r in mt.values()} == {"writing", "math"}
        assert sorted(own) == [f"own/own-{i}" for i in range(5, 9)]
        assert {r["domain"] for r in own.values()} == {"shop"}
    assert sum(r["instrument"] == "decode" for r in rows) == 12
    metrics = json.loads(Path("results/lm-0/metrics.json").read_text())["kl"]
    for name in ("greedy_identical", "greedy_identical mt_bench", "greedy_identical own"):
        assert metrics[name] == 1
    assert metrics["T=1"]["tau"]["decode:mt_bench"]["4"] > 1
    times = json.loads(Path("timings/evaluate-lm-0.json").read_text())
    assert times["plain T=0 on own tokens_per_s"] > 0
    assert times["kl T=1 on mt_bench tokens_per_s"] > 0


def test_a_set_is_decoded_as_its_prompts_say(apart: Path) -> None:
    """The first turn's ids, through the target: the text of plain greedy decoding."""
    from pipeline.evaluate import EvaluateConfig, run_job
    from pipeline.schedule import open_bench, plan

    write_params(apart, prompt_sets=write_sets(apart), laws=["T=0"])
    config = EvaluateConfig(**read_params()["evaluate"])
    bench = open_bench(evaluate.TARGET, evaluate.CACHES, [], config=config, device="cpu")
    jobs = [job for job in plan(bench, [], decode=True) if job.prompt_set == "mt_bench"]
    texts = {name: text for job in jobs for name, text in run_job(bench, job).texts.items()}
    target = load_target(apart / "target")
    for name, ids in (("mt_bench/81", [3, 4, 5]), ("mt_bench/82", [7])):
        for token in texts[name]:
            with torch.no_grad():
                logits = target.logits(target.forward(torch.tensor([ids])).last_hidden[0, -1:])
            assert token == int(logits.argmax())
            ids = [*ids, token]


CHAT = (
    "{% for m in messages %}{{ 'w9 ' if m.role == 'user' else 'w10 ' }}{{ m.content }}"
    "{{ ' ' if m.role == 'user' else ' w0 ' }}{% endfor %}"
    "{% if add_generation_prompt %}w10 {% endif %}"
)


@pytest.fixture
def chatty(apart: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The target with a chat template, where the stage and its jobs find it."""
    target = load_target(apart / "target")
    target.tokenizer.chat_template = CHAT
    monkeypatch.setattr("pipeline.evaluate.resident_target", lambda *_, **__: target)
    monkeypatch.setattr("pipeline.schedule.load_tokenizer", lambda *_, **__: target.tokenizer)
    return target


def set_rows(kind: str, law: str) -> dict[str, dict[str, Any]]:
    rows = read_table(Path(f"results/{kind}-0/arms/kl.rounds.parquet"), ROUNDS)
    return {r["prompt"]: r for r in rows if (r["instrument"], r["law"]) == ("decode:mt_bench", law)}


def test_every_turn_of_a_set_is_decoded_behind_the_targets_own_reply(
    apart: Path, chatty: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evaluate import EvaluateConfig, run_job
    from pipeline.results import read_results
    from pipeline.schedule import open_bench, plan

    given = write_sets(apart)["mt_bench"] | {"turns": "every", "max_prompts": None}
    options: dict[str, Any] = {"decode_prompts": 6, "trace_prompts": 0, "decode_seeds": [0]}
    write_params(apart, prompt_sets={"mt_bench": given}, decode_batch=3, **options)
    run_stage("lm", monkeypatch)
    names = [f"mt_bench/{n}" for n in range(81, 86)] + ["mt_bench/81#1"]
    first = {law: set_rows("lm", law) for law in ("T=0", "T=1")}
    for rows in first.values():
        assert sorted(rows) == sorted(names)
        assert rows["mt_bench/81#1"]["domain"] == rows["mt_bench/81"]["domain"] == "writing"
        assert all(row["tokens"] > 0 for row in rows.values())
    metrics = json.loads(Path("results/lm-0/metrics.json").read_text())["kl"]
    assert metrics["greedy_identical mt_bench"] == 1
    assert "unasked_turns mt_bench" not in metrics
    times = json.loads(Path("timings/evaluate-lm-0.json").read_text())
    assert times["kl T=1 on mt_bench tokens_per_s"] > 0

    # plain greedy decoding, as a chat would go
    config = EvaluateConfig(**read_params()["evaluate"])
    bench = open_bench(evaluate.TARGET, evaluate.CACHES, [], config=config, device="cpu")
    jobs = [j for j in plan(bench, [], decode=True) if j.prompt_set and j.setting == Setting(0.0)]
    texts = {name: text for job in jobs for name, text in run_job(bench, job).texts.items()}
    said = " ".join(f"w{t}" for t in texts["mt_bench/81"] if t)
    ids = [int(w[1:]) for w in f"w9 w3 w4 w5 w10 {said} w0 w9 w9 w10".split()]
    for token in texts["mt_bench/81#1"]:
        with torch.no_grad():
            logits = chatty.logits(chatty.forward(torch.tensor([ids])).last_hidden[0, -1:])
        assert token == int(logits.argmax())
        ids = [*ids, token]
    assert first["T=0"]["mt_bench/81#1"]["tokens"] == len(texts["mt_bench/81#1"]) - 1

    # who shares a batch changes nothing
    write_params(apart, prompt_sets={"mt_bench": given}, decode_batch=64, **options)
    run_stage("lm", monkeypatch)
    for law, rows in first.items():
        assert set_rows("lm", law) == rows
    # first turns are those of a set that asks for no other
    single = given | {"turns": "first"}
    write_params(apart, prompt_sets={"mt_bench": single}, decode_batch=64, **options)
    run_stage("lm", monkeypatch)
    for law, rows in first.items():
        assert set_rows("lm", law) == {n: row for n, row in rows.items() if "#" not in n}

    # a turn that cannot be asked has a row that counts nothing, for every arm alike
    def refuses(*_: Any, **__: Any) -> Any:
        raise DataError(found="a reply", expected="another", todo="none")

    monkeypatch.setattr("pipeline.turns.prompt_tokens", refuses)
    write_params(apart, prompt_sets={"mt_bench": given}, decode_batch=3, **options)
    run_stage("lm", monkeypatch)
    row = set_rows("lm", "T=1")["mt_bench/81#1"]
    assert (row["tokens"], row["rounds"], row["kept"]) == (0, 0, [0, 0, 0, 0])
    metrics = json.loads(Path("results/lm-0/metrics.json").read_text())["kl"]
    assert metrics["unasked_turns mt_bench"] == 2  # of two laws
    assert metrics["greedy_identical mt_bench"] == 1
    arms = [Arm(**arm) for arm in read_params()["arms"].values() if arm["start"] == "lm-0"]
    found = read_results(Path("results"), arms)
    panel = found.panel([[k for k in found.rounds if k.instrument == "decode:mt_bench"][:1]])
    assert panel.tokens.shape == (1, 5)


@pytest.mark.parametrize(
    ("turns", "template", "sentence"),
    [
        (["w3", "w4"], None, r"'mine/m' of 2 user turns; expected one, since the .*turns: first"),
        (
            ["w3", "w4 " * 220],
            CHAT,
            r"prompt 'mine/m#1' of 247 tokens, and up to 23 of a response and its last round",
        ),
        (
            ["w3", "bad"],
            CHAT + "{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}",
            "no",
        ),
    ],
)
def test_turns_that_cannot_be_asked_are_refused_before_a_model_loads(
    apart: Path,
    chatty: Target,
    monkeypatch: pytest.MonkeyPatch,
    turns: list[str],
    template: str | None,
    sentence: str,
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.evaluate.resident_target", load)
    chatty.tokenizer.chat_template = template
    Path("set.jsonl").write_text(json.dumps({"question_id": "m", "category": "c", "turns": turns}))
    mine = {"path": "set.jsonl", "layout": "mt_bench", "max_prompts": None, "turns": "every"}
    write_params(apart, prompt_sets={"mine": mine})
    with pytest.raises(DataError, match=sentence):
        run_stage("lm", monkeypatch)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"set.jsonl is empty; expected at least one row; correct evaluate.prompt_sets.mine"),
        (
            json.dumps({"prompt": "w3 " * 240, "id": "long"}),
            (
                r"prompt 'mine/long' of 240 tokens, and up to 23 of a response and its last "
                "round; expected at most the target's context of 256 tokens together"
            ),
        ),
        (
            json.dumps({"messages": [{"role": r, "content": "w3"} for r in ("system", "user")]}),
            (
                r"prompt 'mine/.*' of 2 messages \(system, user\); expected one user turn, since "
                "the target has no chat template"
            ),
        ),
        ('{"prompt": 7}', r"set.jsonl, line 1 has prompt 7; expected text that is not blank"),
        (None, r"no file set.jsonl; expected the prompts that evaluate.prompt_sets.mine names"),
    ],
    ids=["empty", "long", "no template", "bad line", "no file"],
)
def test_prompts_that_cannot_be_decoded_are_refused_before_a_model_loads(
    apart: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, sentence: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.evaluate.resident_target", load)
    if text is not None:
        Path("set.jsonl").write_text(text)
    mine = {"path": "set.jsonl", "layout": "auto", "max_prompts": None}
    write_params(apart, prompt_sets={"mine": mine})
    with pytest.raises(DataError, match=sentence):
        run_stage("lm", monkeypatch)


def test_heldout_prompts_without_room_in_the_context_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = load_target(project / "target")
    tokens = torch.randint(1, V, (254,), generator=torch.Generator().manual_seed(0)).tolist()
    row = {"domain": "code", "tokens": tokens, "turn": [-1] * 240 + [0] * 14}
    rows = [row | {"id": name} for name in ("p0", "p1")]
    write_cache(tmp_path / "long.zarr", target, rows, law="T=1")
    monkeypatch.setitem(evaluate.CACHES, "T=1", tmp_path / "long.zarr")
    write_params(project, laws=["T=1"])
    with pytest.raises(DataError, match="prompt 'p0' of 240 tokens, and up to 23 of a response"):
        run_stage("lm", monkeypatch)


def test_joint_and_conditional_acceptance_are_counted_by_round(scored: Path) -> None:
    """At T = 0 the same of replay and decoding, prompt by prompt, and summed in the metrics."""
    predicted, measured = (rounds_of("eagle3", name, 0.0) for name in ("replay_decode", "decode"))
    for prompt, row in measured.items():
        assert row["kept"] == pytest.approx(predicted[prompt]["kept"], abs=1e-9)
        assert sum(row["kept"]) == row["accepted"]
    metrics = json.loads(Path("results/eagle3-0/metrics.json").read_text())["kl"]["T=0"]["kept"]
    assert metrics["decode"] == metrics["replay_decode"]
    joint, conditional = metrics["decode"]["joint"], metrics["decode"]["conditional"]
    rounds = sum(row["rounds"] for row in measured.values())
    product = 1.0
    for k in range(4):
        share = sum(row["kept"][k] for row in measured.values()) / rounds
        assert joint[str(k)] == pytest.approx(share, abs=1e-6)
        product *= conditional[str(k)]
        assert product == pytest.approx(share, abs=1e-5)


def test_a_replay_never_imports_transformers() -> None:
    code = "import sys, stages.evaluate; sys.exit('transformers' in sys.modules)"
    assert run_process([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_bad_sections_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, sentence in (
        (
            {"laws": []},
            r"evaluate.laws is \[\]; expected list should have at least 1",
        ),
        (
            {"laws": ["T=-1"]},
            r"evaluate.laws.0 is 'T=-1'; expected a name of T=<temperature>, then",
        ),
        ({"laws": ["T=1", "T=1.0"]}, "evaluate.laws is .*; expected each law once"),
        ({"depth": 3}, r"evaluate is not consistent; expected decode_gamma of at most depth \(3\)"),
        ({"decode_new_tokens": 1}, "evaluate.decode_new_tokens is 1; .* greater than 1"),
        ({"features": "bf16"}, "evaluate.features is 'bf16'; expected input should be 'cache'"),
    ):
        write_params(project, **bad)
        with pytest.raises(ConfigError, match=sentence):
            run_stage("lm", monkeypatch)


def test_a_response_longer_than_the_rollouts_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, decode_new_tokens=NEW + 1)
    with pytest.raises(
        ConfigError,
        match=r"decode_new_tokens is 25, but the rollout of p\d+ was cut at 24 tokens; expected at "
        r"most generate.max_new_tokens",
    ):
        run_stage("lm", monkeypatch)


def small_rows(turns: list[int]) -> list[dict[str, Any]]:
    tokens = list(range(1, 1 + len(turns)))
    return [{"id": f"p{i}", "domain": "code", "tokens": tokens, "turn": turns} for i in range(4)]


@pytest.mark.parametrize(
    ("law", "source", "turns", "error", "sentence"),
    [
        (
            "T=1",
            {"law": "data"},
            [-1, 0, 0],
            ResultError,
            "holds sequences of data; expected the pinned target's own samples at T=1, since",
        ),
        (
            "T=1",
            {"law": "T=1"},
            [-1, 0, 0],
            ResultError,
            r"no rollout of the prompt p\d+ at T = 1; expected rollouts of the same held-out",
        ),
        ("T=0", {"law": "T=0", "target": "other"}, [-1, 0, 0], FingerprintMismatch, "other"),
        (
            "T=0",
            {"law": "T=0"},
            [-1, 0, 0, 1, 1],
            ResultError,
            "sequence p0 is not one prompt with one response after it; expected a place",
        ),
    ],
    ids=["data's own text", "other prompts", "another target", "two turns"],
)
def test_caches_that_cannot_be_replayed_are_refused(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    law: str,
    source: dict[str, str],
    turns: list[int],
    error: type[Exception],
    sentence: str,
) -> None:
    target = load_target(project / "target")
    write_cache(tmp_path / "other.zarr", target, small_rows(turns), **source)
    monkeypatch.setitem(evaluate.CACHES, law, tmp_path / "other.zarr")
    with pytest.raises(error, match=sentence):
        run_stage("lm", monkeypatch)


def test_an_empty_cache_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = Cache.open(project / "cache/heldout.zarr").layout
    given = {"target": load_target(project / "target").spec.fingerprint, "law": "T=1"}
    (tmp_path / "empty.zarr").mkdir()
    seal(tmp_path / "empty.zarr", layout=layout, parts=[], source=given, params={})
    monkeypatch.setitem(evaluate.CACHES, "T=1", tmp_path / "empty.zarr")
    with pytest.raises(ResultError, match="holds no sequence; expected held-out rollouts; raise"):
        run_stage("lm", monkeypatch)


def test_a_draft_of_another_target_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project / "drafts/lm-0/kl/model/config.json"
    saved = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(saved), "source": {"target": "other"}}))
        with pytest.raises(DraftError, match="was trained for the target other; expected the pinn"):
            run_stage("lm", monkeypatch)
    finally:
        config.write_text(saved)


def test_prompts_are_balanced_over_domains() -> None:
    from pipeline.schedule import balanced

    domains = ["a"] * 10 + ["b"] * 3 + ["c"] * 7
    chosen = balanced(domains, 12)
    assert [sum(domains[i] == d for i in chosen) for d in "abc"] == [5, 3, 4]
    assert chosen == sorted(chosen)
    assert balanced(domains, 99) == list(range(20))


def test_a_rollout_is_replayed_as_the_decoder_would_cut_it(project: Path) -> None:
    """Shifts, pruning and cuts against the slow obvious way, on eagle3 and lm."""
    from pipeline.score import rollouts, score

    cache = Cache.open(project / "cache/heldout.zarr")
    batch = collate(cache.records(range(7)), cache.layout)
    from pipeline.checkpoint import load_draft

    shape = Shape(vocab_size=V, hidden_size=32)
    for kind in ("lm", "eagle3"):
        interface = read_interface(project / "target")
        draft = load_draft(project / f"drafts/{kind}-0/kl/model", interface, shape)
        with torch.no_grad():
            scores = score(draft, batch, depth=4, setting=Setting(1.0), vocab_size=V)
            logits = list(draft.training_logits(batch, 1 if kind == "lm" else 4))
        found = rollouts(scores, batch, max_new_tokens=9)
        assert found.remaining.tolist() == [
            min(int((batch.turn[b] == 0).sum()) - 1, 8) for b in range(7)
        ]
        for b in range(7):
            first = int((batch.turn[b] == 0).nonzero()[0])
            for s in range(int(found.remaining[b])):
                for k in range(min(4, int((batch.turn[b] == 0).sum()) - 1 - s)):
                    depth, shift = (0, k) if kind == "lm" else (k, 0)
                    anchor = b * batch.tokens.shape[1] + first - 1 + s + shift
                    row = int((batch.pairs(depth).anchor == anchor).nonzero())
                    token = int(batch.tokens[b, first + 1 + s + k])
                    logq = logits[depth][row].double().log_softmax(-1)
                    logp = float(batch.token_logp[b, first + s + k])
                    wanted = float(logq[token]) - logp if token < len(logq) else -np.inf
                    assert found.logr[b, k, s] == pytest.approx(wanted, abs=1e-5)


def test_unpruned_greedy_matches_take_the_lowest_of_a_tie() -> None:
    from pipeline.score import match_logr, token_logq

    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    d2t = torch.tensor([3, 5, 8])
    assert match_logr(logits, torch.tensor([5, 4]), d2t=d2t).tolist() == [0.0, -torch.inf]
    assert match_logr(logits, torch.tensor([2, 0]), d2t=None).tolist() == [-torch.inf, 0.0]
    assert token_logq(logits, torch.tensor([4, 9]), d2t=d2t).tolist() == [-torch.inf] * 2
