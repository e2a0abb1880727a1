"""The three blocks of cells agree with each other, or the entry that does not is named."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import read_params
from pipeline.matrix import Arm, Export, Start, cell, check_matrix
from storage.errors import ConfigError

PARAMS: dict[str, Any] = {
    "drafts": {"lm": {"kind": "lm"}, "wide": {"kind": "lm"}},
    "losses": {"kl": {"kind": "kl"}, "lk10": {"kind": "lk_lambda"}},
    "starts": {"lm-0": {"draft": "lm", "kind": "lm", "seed": 0, "objectives": ["lk10"]}},
    "arms": {
        "lm-lk10-0": {
            "draft": "lm",
            "kind": "lm",
            "objective": "lk10",
            "loss": "lk_lambda",
            "seed": 0,
            "start": "lm-0",
        }
    },
    "exports": {
        "lm-lk10-0": {
            "start": "lm-0",
            "draft": "lm",
            "kind": "lm",
            "objective": "lk10",
            "format": "transformers",
        }
    },
}


def changed(block: str, key: str, **over: Any) -> dict[str, Any]:
    return {**PARAMS, block: {key: {**PARAMS[block][key], **over}}}


def test_the_shipped_matrix_agrees(request: pytest.FixtureRequest) -> None:
    check_matrix(read_params(request.config.rootpath / "params.yaml"))
    check_matrix(PARAMS)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (
            {**PARAMS, "starts": {"lm-1": PARAMS["starts"]["lm-0"]}},
            r"starts\.lm-1 has 'lm-1' for its key; expected 'lm-0'",
        ),
        (changed("starts", "lm-0", draft="big"), r"the name big refers to 'big', which drafts"),
        (changed("starts", "lm-0", kind="medusa"), r"starts\.lm-0 has 'medusa' for kind; .*'lm'"),
        (changed("starts", "lm-0", objectives=[]), r"has \[\] for objectives; expected \['lk10'\]"),
        (changed("starts", "lm-0", seed=-1), r"starts\.lm-0\.seed is -1; expected"),
        (changed("starts", "lm-0", draft="l-m"), r"starts\.lm-0\.draft is 'l-m'; .* pattern"),
        (
            changed("arms", "lm-lk10-0", seed=1),
            r"arms\.lm-lk10-0 .* for its key; expected 'lm-lk10-1'",
        ),
        (changed("arms", "lm-lk10-0", loss="kl"), r"has 'kl' for loss; expected 'lk_lambda'"),
        (changed("arms", "lm-lk10-0", start="wide-0"), r"has 'wide-0' for start; expected 'lm-0'"),
        (
            {**PARAMS, "starts": {}},
            r"arms\.lm-lk10-0\.start refers to 'lm-0', which starts does not",
        ),
        (changed("arms", "lm-lk10-0", extra=1), r"arms\.lm-lk10-0\.extra is unknown"),
        (
            changed("exports", "lm-lk10-0", objective="kl"),
            r"exports\.lm-lk10-0 has 'kl' for objective",
        ),
        (
            {**PARAMS, "exports": {"lm-kl-0": PARAMS["exports"]["lm-lk10-0"]}},
            r"exports\.lm-kl-0 refers to 'lm-kl-0', which arms does not",
        ),
        (
            {**PARAMS, "exports": {"lm-lk10-0-sglang": PARAMS["exports"]["lm-lk10-0"]}},
            r"exports\.lm-lk10-0-sglang refers to 'lm-lk10-0-sglang', which arms does not",
        ),
        (
            {
                **PARAMS,
                "exports": dict.fromkeys(
                    ("lm-lk10-0", "lm-lk10-0-transformers"), PARAMS["exports"]["lm-lk10-0"]
                ),
            },
            r"exports\.lm-lk10-0 and exports\.lm-lk10-0-transformers are both lm-lk10-0 as tr",
        ),
        ({k: v for k, v in PARAMS.items() if k != "starts"}, r"starts is None; expected"),
    ],
)
def test_what_does_not_agree_is_named(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_matrix(params)


def test_an_arm_is_exported_in_several_formats() -> None:
    first = PARAMS["exports"]["lm-lk10-0"]
    second = {**first, "format": "gguf"}
    check_matrix({**PARAMS, "exports": {"lm-lk10-0": first, "lm-lk10-0-gguf": second}})
    assert Export(**first).arm("lm-lk10-0") == Export(**second).arm("lm-lk10-0-gguf") == "lm-lk10-0"


def test_a_cell_is_read_by_the_key_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(
        "starts:\n  lm-0: {draft: lm, kind: lm, seed: 0, objectives: []}\n"
    )
    key, start = cell("starts", ["stages/warmup.py", "lm-0"], Start)
    assert (key, start.seed, start.key) == ("lm-0", 0, "lm-0")
    with pytest.raises(ConfigError, match=r"no starts\.lm-7; expected one of the keys .* lm-0"):
        cell("starts", ["stages/warmup.py", "lm-7"], Start)
    with pytest.raises(ConfigError, match=r"0 arguments; expected one key of arms in params\.yaml"):
        cell("arms", ["stages/train.py"], Arm)
