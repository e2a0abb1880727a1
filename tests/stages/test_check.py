"""`check` refuses a bad parameter file in one sentence; a good one gives constant bytes."""

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.check import check_params
from pipeline.config import read_params
from stages import check
from storage.errors import ConfigError, DraftError, TargetError

GOOD = read_params()


def broken(path: str, value: Any) -> dict[str, Any]:
    """The default parameters with one value replaced, by dotted name."""
    params = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place: Any = params
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("train.lr", -1.0, r"train\.lr is -1\.0; expected .*greater than 0"),
        ("train.lr", "1e-4", r"train\.lr is '1e-4'; expected .*number"),
        ("train.rate", 1.0, r"train\.rate is unknown; .*remove train\.rate"),
        ("train.lr", None, r"train\.lr is missing; .*add train\.lr"),
        ("training", {}, r"section 'training' is unknown; expected one of prepare, target"),
        ("drafts.lm.lr_scale", -1.0, r"drafts\.lm\.lr_scale is -1\.0; expected .*greater than 0"),
        ("drafts.lm.steps_scale", 0.0, r"drafts\.lm\.steps_scale is 0\.0; expected .*greater"),
        ("verify.max_logp_error", float("inf"), r"verify\.max_logp_error is inf; .*finite"),
        ("evaluate.threads", 10**18, r"evaluate\.threads is 1000000000000000000; .* 1024"),
        ("train.threads", 1025, r"train\.threads is 1025; .* 1024"),
        ("train.batch_sequences", 10**12, r"train\.batch_sequences is 10{12}; .* 1048576"),
        ("capture.batch_tokens", 10**12, r"capture\.batch_tokens is 10{12}; .* 2147483648"),
        ("generate.batch_sequences", 10**12, r"generate\.batch_sequences is 10{12}; .*1048576"),
        ("evaluate.depth", 65, r"evaluate\.depth is 65; .* 64"),
        ("report.gammas", [4, 700], r"report\.gammas\.1 is 700; .* 64"),
        ("drafts.medusa.num_heads", 400, r"drafts\.medusa\.num_heads is 400; .* 64"),
        ("cluster.workers", 10**6, r"cluster\.workers is 1000000; .* 1024"),
        ("evaluate.decode_seeds", [0, 7], r"names 7, the seed of no start; .*: 0, 1, 2; or \[\]"),
        ("train.depth_weights", "survival", r"expected depth_decay 1\.0 with depth_weights surv"),
        ("train.depth_weights", "focal", r"train\.depth_weights is 'focal'; .*'survival'"),
        ("verify", None, r"section verify is missing"),
        ("drafts.lm.kind", "llm", r"draft kind 'llm'; expected one of eagle3, lm, medusa"),
        (
            "losses.tv.kind",
            "hinge",
            r"loss 'hinge'; expected one of e2e_tv, jsd, kl, lk_alpha, lk_fixed",
        ),
        ("arms.lm-kl-0.start", "lm-9", r"arms\.lm-kl-0.*'lm-9'"),
        ("arms.lm-kl-0.loss", "tv", r"arms\.lm-kl-0.*'tv' for loss; expected 'kl'"),
        ("starts.lm-0.objectives", ["kl"], r"starts\.lm-0 has \['kl'\] for objectives"),
        ("exports.lm-lk_lambda-0.format", "gguf", r"export format 'gguf'.*transformers"),
        ("capture.hidden_layers", [1], r"capture\.hidden_layers names 1 layers; expected 3"),
        ("capture.hidden_layers", [1, 2, 4], r"layer 4; expected indices from 0 to 3"),
        ("capture.last_hidden", False, r"capture\.last_hidden is false; expected true.*medusa"),
        (
            "capture.top_p",
            0.9,
            r"capture is not consistent; expected null for top_p, which mode topk",
        ),
        ("capture.keep", "best", r"capture\.keep is 'best'; expected .*threshold"),
        ("generate.engine", "none", r"generate\.engine is 'none'; .* train_responses: data\)"),
        ("generate.train_responses", "mine", r"'mine'; expected input should be 'target' or 'data"),
        ("generate.max_new_tokens", 500, r"sequences of 564 tokens; .*context_tokens, 512"),
        (
            "generate.laws",
            ["T=0.7"],
            r"generate\.laws names T=0\.7; expected laws that evaluate\.laws names too: T=0, T=1",
        ),
        (
            "evaluate.prompt_sets",
            {"own": {"path": "nowhere.jsonl", "layout": "auto", "max_prompts": None}},
            r"evaluate\.prompt_sets\.own\.path names nowhere\.jsonl, which is no file",
        ),
        (
            "evaluate.prompt_sets",
            {"own": {"path": "x.jsonl", "layout": "alpaca", "max_prompts": None}},
            r"evaluate\.prompt_sets\.own\.layout is 'alpaca'; expected input should be 'auto'",
        ),
        ("report.baseline", "ce", r"report\.baseline is 'ce'; expected one of kl, tv"),
        ("report.gammas", [4, 9], r"report\.gammas asks for 9; expected at most evaluate\.depth"),
        ("cluster.workers", 0, r"cluster\.workers is 0; expected .*greater than"),
        (
            "prepare.source",
            {"kind": "jsonl", "train": "nowhere.jsonl", "heldout": None},
            r"names nowhere\.jsonl, which is no file",
        ),
        (
            "prepare.filters.evaluation_prompts",
            ["question.jsonl"],
            r"evaluation_prompts names question\.jsonl, which is no file; .*project's root",
        ),
        ("prepare.filters.languages", [], r"filters\.languages is \[\]; expected .*at least 1"),
    ],
)
def test_bad_parameter_is_refused_by_name(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_params(broken(path, value))


def test_good_parameters_give_constant_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path("params.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    written = []
    for text in (source, source.replace("lr: 3.0e-3", "lr: 1.0e-3")):
        Path("params.yaml").write_text(text, encoding="utf-8")
        check.main()
        written.append(Path("checked/params.json").read_bytes())
    assert written[0] == written[1]


def test_what_only_the_draft_can_say_is_checked_before_anything_runs() -> None:
    """A start that is not there, and an export that its engine could not serve."""
    params = copy.deepcopy(GOOD)
    params["drafts"]["lm"]["start"] = {"folder": "nowhere", "sha256": "0" * 64}
    with pytest.raises(DraftError, match=r"no config\.json in nowhere, which a draft is to start"):
        check_params(params)
    params = copy.deepcopy(GOOD)
    params["drafts"]["eagle3"]["norm_output"] = True
    arm = {k: params["arms"]["eagle3-kl-0"][k] for k in ("start", "draft", "kind", "objective")}
    params["exports"]["eagle3-kl-0"] = {**arm, "format": "sglang"}
    with pytest.raises(ConfigError, match="an eagle3 draft with norm_output for the format sglang"):
        check_params(params)


def test_a_refusal_leaves_the_out_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path("params.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(source, encoding="utf-8")
    check.main()
    Path("params.yaml").write_text(source.replace("mode: topk", "mode: top"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"capture\.mode is 'top'"):
        check.main()
    assert Path("checked/params.json").is_file()


@pytest.mark.parametrize(
    ("model", "revision", "sentence"),
    [
        ("org/name", None, "target.revision is null for org/name, which is no folder here"),
        ("org/name", "main", "target.revision 'main' for org/name.*; expected a commit of 40 hex"),
        ("tests", "0" * 40, "'0{40}' for the local folder tests; expected null"),
        ("../nowhere", "0" * 40, "no folder ../nowhere; expected a folder of transformers"),
    ],
)
def test_a_place_that_is_none_is_refused_before_dvc_gives_up_the_target(
    model: str, revision: str | None, sentence: str
) -> None:
    params = copy.deepcopy(GOOD)
    params["target"] = {
        "kind": "pretrained",
        "model": model,
        "revision": revision,
        "dtype": "float32",
        "trust_remote_code": False,
        "threads": 1,
    }
    with pytest.raises((ConfigError, TargetError), match=sentence):
        check_params(params)


def test_a_section_that_is_nearly_one_is_told_which() -> None:
    params = {("generat" if name == "generate" else name): v for name, v in GOOD.items()}
    with pytest.raises(ConfigError, match=r"section 'generat' is unknown; .*\(is it generate\?\)"):
        check_params(params)
