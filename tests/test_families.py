"""Every family of the paper, and two more, through the real stages with every draft.

One tiny project a family: pinned from a saved folder, generated, captured, verified, every draft
warmed up, trained, replayed, decoded and exported in every format that fits, each by its stage's
own `main` in this process.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.check import check_params
from pipeline.config import read_params
from pipeline.export import find_format
from pipeline.features import encode_bf16
from pipeline.target import Target, load_target, read_interface, read_spec
from stages import capture, evaluate, export, generate, target, train, verify, warmup
from storage.reader import Cache
from storage.record import Record, supervised
from storage.tables import PROMPTS, ROUNDS, SEQUENCES, read_table, write_table
from tests.targets import (
    DEEPSEEK_MTP,
    FAMILIES,
    ROOT,
    assert_assisted_alike,
    member,
    mtp_tensors,
    prompts,
    tokenizer,
)

SCALE = {"lr_scale": 1.0, "steps_scale": 1.0}
DRAFTS: dict[str, dict[str, Any]] = {
    "lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24},
    "medusa": {"num_heads": 2, "num_layers": 1},
    "mlp": {"num_heads": 2, "inner_size": 16, "tie_weights": False, "scale_input": True},
    "eagle3": {
        "depth": 2,
        "num_heads": 4,
        "intermediate_size": 32,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "draft_vocab_size": 200,
    },
    "mtp": {
        "depth": 2,
        "init": "fresh",
        "attention": "step0",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": None,
        "intermediate_size": 32,
        "qk_norm": True,
        "qkv_bias": False,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
    },
}
FORMATS = {
    "lm": ["transformers"],
    "medusa": ["medusa"],
    "mlp": ["mlp_speculator"],
    "eagle3": ["speculators", "sglang"],
    "mtp": ["speculators"],
}
# 2, n//2, n-3 of its n = 7: what readers of the original EAGLE layout take without being told
LAYERS = {"llama-3.1-8b": [2, 3, 4]}
STEPS, NEW, GAMMA = 8, 12, 3
# float32 on both sides: other kernels for other shapes of a batch, on logits up to 22
CLOSE = 1e-4


def formats(family: str) -> dict[str, list[str]]:
    """Draft -> every format that fits a target of this family."""
    own = {
        "llama-3.1-8b": {"eagle3": ["speculators", "sglang", "eagle"]},
        "deepseek-v3": {"mtp": ["native"]},
    }
    return {**FORMATS, **own.get(family, {})}


def params_of(family: str) -> dict[str, Any]:
    """The project's own parameters, small, every draft under one loss."""
    params: dict[str, Any] = read_params(ROOT / "params.yaml")
    params["target"] = {
        "kind": "pretrained",
        "model": "model",
        "revision": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "threads": 1,
    }
    fit = {"batch_sequences": 4, "heldout_sequences": 4, "lr_warmup_steps": 2, "threads": 1}
    small: dict[str, dict[str, Any]] = {
        "generate": {"max_prompt_tokens": 12, "max_new_tokens": NEW, "batch_sequences": 6},
        "capture": {"part_tokens": 160, "hidden_layers": LAYERS.get(family, [1, 2, 3])},
        "verify": {"sequences": 2},
        "warmup": {**fit, "steps": STEPS, "log_every": STEPS},
        "train": {**fit, "steps": STEPS // 2, "log_every": STEPS},
        "evaluate": {
            "depth": GAMMA,
            "decode_gamma": GAMMA,
            "decode_prompts": 4,
            "decode_new_tokens": NEW,
            "trace_prompts": 1,
        },
        "report": {"gammas": [GAMMA]},
        "export": {"num_assistant_tokens": GAMMA},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    for name, values in small.items():
        params[name].update(values)
    params["drafts"] = {kind: {"kind": kind, **own, **SCALE} for kind, own in DRAFTS.items()}
    if family == "deepseek-v3":  # the family that brings a module of its own
        params["drafts"]["mtp"] = DEEPSEEK_MTP
    params["drafts"]["lm"]["steps_scale"] = 6.0  # it begins with nothing of the target's
    params["starts"], params["arms"], params["exports"] = {}, {}, {}
    for kind, forms in formats(family).items():
        cell = {"draft": kind, "kind": kind}
        start, arm = f"{kind}-0", f"{kind}-lk_lambda-0"
        params["starts"][start] = {**cell, "seed": 0, "objectives": ["lk_lambda"]}
        cell |= {"objective": "lk_lambda", "start": start}
        params["arms"][arm] = {**cell, "loss": "lk_lambda", "seed": 0}
        for index, form in enumerate(forms):
            params["exports"][f"{arm}-{form}" if index else arm] = {**cell, "format": form}
    return params


def run(stage: Any, *argv: str) -> None:
    """A stage's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage.__name__, *argv])
        stage.main()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def project(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished project of that family; tests run inside it."""
    folder = tmp_path_factory.mktemp(family)
    model, weights = member(family), folder / "model" / "model.safetensors"
    model.save_pretrained(folder / "model")
    if family == "deepseek-v3":
        both = {**load_file(weights), **mtp_tensors(model)}
        save_file(both, weights, metadata={"format": "pt"})
    tokenizer().save_pretrained(folder / "model")
    rows = [*prompts("train", 10), *prompts("heldout", 6)]
    write_table(folder / "data" / "prompts.parquet", PROMPTS, rows)
    params = params_of(family)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        check_params(params)
        patch.setattr("pipeline.config.read_params", cache(read_params))  # half of all the time
        for stage in (target, generate, capture, verify):
            run(stage)
        for stage, cells in ((warmup, "starts"), (train, "arms"), (evaluate, "starts")):
            for key in params[cells]:
                run(stage, key)
        for key in params["exports"]:
            run(export, key)
        yield folder


@pytest.fixture(scope="module")
def loaded(project: Path) -> Target:
    return load_target(Path("target"))


@pytest.fixture(scope="module")
def records(project: Path) -> list[Record]:
    """The held-out sequences as they were captured, in batches with others."""
    held = Cache.open(Path("cache/heldout.zarr"))
    return held.records(range(held.num_sequences))


def test_laws_have_a_chat_models_entropy(project: Path) -> None:
    """Of one to two nats, so that an acceptance says something."""
    found = json.loads(Path("metrics/capture.json").read_text())
    assert 1.0 < found["train"]["mean_entropy"] < 2.0


def test_captured_states_are_those_that_hooks_see(loaded: Target, records: list[Record]) -> None:
    """Index k is the stream after k layers, 0 the embedding as it enters; the last is normed."""
    model, seen = loaded.model, {}
    body = model.get_decoder()

    def keep(k: int | str) -> Any:
        return lambda module, args, out: seen.update({k: out if torch.is_tensor(out) else out[0]})

    hooks = [layer.register_forward_hook(keep(k + 1)) for k, layer in enumerate(body.layers)]
    hooks += [module.register_forward_hook(keep(name)) for name, module in
              ((0, body.embed_tokens), ("normed", body.norm))]  # fmt: skip
    layers = Cache.open(Path("cache/heldout.zarr")).layout.hidden_layers
    for record in records[:3]:
        tokens = torch.from_numpy(record.tokens.astype("int64"))[None]
        own = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(own[0], seen[0])
        assert torch.equal(own[-1], seen["normed"])
        for place, k in enumerate(layers):
            assert torch.equal(own[k], seen[k])
            assert record.hidden is not None
            same_bf16(record.hidden[:, place], seen[k][0])
        assert record.last_hidden is not None
        same_bf16(record.last_hidden, seen["normed"][0])
    for hook in hooks:
        hook.remove()


def same_bf16(bits: Any, x: Tensor) -> None:
    """Equal but for float32 noise, which may move a number to the next bfloat16."""
    found = torch.from_numpy(bits.copy()).view(torch.int16).view(torch.bfloat16).float()
    assert (
        encode_bf16(x).view(torch.bfloat16).float().sub(found).abs().max() <= 2**-7 * x.abs().max()
    )
    torch.testing.assert_close(found, x, rtol=2**-8, atol=CLOSE)


def test_company_and_padding_change_no_law(loaded: Target, records: list[Record]) -> None:
    """A captured batch pads to the right; alone, and padded to the left, a law is the same."""
    longest = max(len(record.tokens) for record in records)
    for record in records:
        tokens = torch.from_numpy(record.tokens.astype("int64"))
        alone = loaded.model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
        rows = torch.from_numpy(supervised(record.turn)).nonzero()[:, 0]
        logp = alone[rows, tokens[rows + 1]]
        captured = torch.tensor(record.token_logp)[rows]
        torch.testing.assert_close(captured, logp, rtol=0.0, atol=CLOSE)
        pad = longest - len(tokens)
        padded = torch.cat([torch.full((pad,), 7), tokens])[None]
        mask = (torch.arange(longest) >= pad).long()[None]
        features = loaded.forward(
            padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        )
        left = loaded.logits(features.last_hidden[0, pad:]).log_softmax(-1)
        torch.testing.assert_close(left, alone, rtol=0.0, atol=5 * CLOSE)


def test_greedy_text_is_that_of_transformers(loaded: Target) -> None:
    """Generated with our ragged cache; theirs rolls sliding windows and compresses MLA."""
    for row in read_table(Path("sequences/greedy.parquet"), SEQUENCES):
        split = row["turn"].index(0)
        prompt = torch.tensor([row["tokens"][:split]])
        own = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert own[0].tolist() == row["tokens"]


@pytest.mark.parametrize("kind", DRAFTS)
def test_decoding_is_lossless_and_counts_what_replay_predicts(project: Path, kind: str) -> None:
    """At T = 0: the target's greedy text, and tokens, rounds and acceptances prompt by prompt."""
    metrics = json.loads(Path(f"results/{kind}-0/metrics.json").read_text())["lk_lambda"]
    assert metrics["greedy_identical"] == 1
    rows = read_table(Path(f"results/{kind}-0/arms/lk_lambda.rounds.parquet"), ROUNDS)
    greedy = [row for row in rows if row["temperature"] == 0]
    measured = {row["prompt"]: row for row in greedy if row["instrument"] == "decode"}
    predicted = {row["prompt"]: row for row in greedy if row["instrument"] == "replay_decode"}
    assert len(measured) == 4
    for prompt, row in measured.items():
        for column in ("tokens", "rounds", "drafted", "accepted"):
            assert row[column] == predicted[prompt][column]


def test_every_format_that_fits_opens_again(family: str, project: Path) -> None:
    """`export` compared logits bit for bit; here: the folders are there, ids as engines count."""
    interface, opened = read_interface(Path("target")), 0
    layers = LAYERS.get(family, [1, 2, 3])
    for key, cell in read_params(Path("params.yaml"))["exports"].items():
        folder = Path("export") / key / cell["format"]
        form = find_format(cell["kind"], cell["format"])
        assert form.read(folder, interface).config.kind == cell["kind"]
        assert all(x.isfinite().all() for x in load_file(folder / "model.safetensors").values())
        card = (folder / "README.md").read_text()
        assert read_spec(Path("target")).fingerprint in card
        assert "| decode | T = 0 |" in card
        described = json.loads((folder / "config.json").read_text())
        ids = described.get("eagle_config", described).get("eagle_aux_hidden_state_layer_ids")
        if cell["format"] == "sglang":
            assert ids == [k - 1 for k in layers]
        elif cell["kind"] == "eagle3" and cell["format"] == "speculators":
            assert ids == layers
        opened += 1
    assert opened == sum(len(forms) for forms in formats(family).values())


def test_assisted_generation_accepts_what_our_decoder_counts(loaded: Target) -> None:
    """From the exported folder in transformers, sliding windows and all."""
    folder = Path("export/lm-lk_lambda-0/transformers")
    for row in read_table(Path("sequences/greedy.parquet"), SEQUENCES)[:2]:
        prompt = row["tokens"][: row["turn"].index(0)]
        assert_assisted_alike(loaded, folder, prompt, gamma=GAMMA, new_tokens=14)
