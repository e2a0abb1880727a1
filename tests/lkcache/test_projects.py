"""`init`, `use`, `matrix`, `estimate`: parameter files and projects, without torch."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lkcache.init import init
from lkcache.matrix import matrix
from lkcache.presets import changes, compose, dump, write_cells, yaml
from lkcache.use import use
from pipeline.check import check_params
from pipeline.config import read_params
from storage.errors import ConfigError, TargetError, WorkspaceError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    init(tmp_path / "project", "smoke")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_init_lays_out_what_dvc_needs(project: Path) -> None:
    for name in ("dvc.yaml", "params.yaml", "stages/check.py", "storage", "presets", ".dvc/config"):
        assert (project / name).exists(), name
    assert not list(project.rglob("__pycache__"))
    check_params(read_params(project / "params.yaml"))


def test_init_refuses_a_folder_with_files_in_it(project: Path) -> None:
    with pytest.raises(WorkspaceError, match="is not empty; expected a new or an empty folder"):
        init(project)


def test_use_says_what_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use("embedded")
    said = capsys.readouterr().out
    steps = read_params(project / "params.yaml")["train"]["steps"]
    assert f"train.steps: 20 -> {steps}" in said
    assert (project / "params.yaml").read_bytes() == Path("presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("preset", ["ablation", "smoke", "first-try"])
def test_one_blank_line_stands_before_a_section(project: Path, preset: str) -> None:
    use(preset)
    matrix(["lm:0:kl"] if preset != "first-try" else ["medusa:0:kl"])
    for written in (compose(project / "presets", preset), yaml().load(Path("params.yaml"))):
        dump(written, Path("params.yaml"))
        text = Path("params.yaml").read_text(encoding="utf-8")
        assert "\n\n\n" not in text
        assert all(f"\n\n{block}:" in text for block in ("starts", "arms", "exports"))


def test_a_blank_line_that_went_with_a_cell_is_written_again(project: Path) -> None:
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("\n\narms:", "\narms:").replace("\n\nexports:", "\nexports:"))
    matrix(["lm:0:kl"])
    text = path.read_text(encoding="utf-8")
    assert all(f"\n\n{block}:" in text for block in ("starts", "arms", "exports"))


def test_an_unknown_preset_lists_those_there_are(project: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"preset 'tiny'; expected one of .*embedded, .*full, .*smoke"
    ):
        compose(project / "presets", "tiny")


def test_matrix_writes_cells_that_check_accepts(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix(["lm:0,4:kl,tv", "medusa:1:kl"])
    params = read_params(project / "params.yaml")
    check_params(params)
    assert list(params["starts"]) == ["lm-0", "lm-4", "medusa-1"]
    assert params["arms"]["lm-tv-4"]["start"] == "lm-4"
    assert params["exports"] == {}
    assert "export of lm-lk_lambda-0 was dropped" in capsys.readouterr().out


def test_an_arm_keeps_its_several_formats(project: Path) -> None:
    params = yaml().load(Path("params.yaml"))
    lists = {"eagle3": {"seeds": [0], "objectives": ["kl"]}}
    write_cells(params, lists, {"eagle3-kl-0": ["speculators", "sglang"]})
    dump(params, Path("params.yaml"))
    keys = ["eagle3-kl-0", "eagle3-kl-0-sglang"]
    assert list(read_params()["exports"]) == keys
    matrix(["eagle3:0:kl,tv"])
    params = read_params()
    check_params(params)
    assert [cell["format"] for cell in params["exports"].values()] == ["speculators", "sglang"]
    assert list(params["exports"]) == keys


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("lm:0", "row 'lm:0'; expected DRAFT:SEEDS:OBJECTIVES"),
        ("lm:x:kl", "row 'lm:x:kl'; expected DRAFT:SEEDS:OBJECTIVES"),
        ("gru:0:kl", "'gru' is not in `drafts`"),
        ("lm:0:hinge", "'hinge' is not in `losses`"),
    ],
)
def test_a_bad_row_is_refused(project: Path, row: str, sentence: str) -> None:
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=sentence):
        matrix([row])
    assert (project / "params.yaml").read_bytes() == before


def test_use_says_what_a_preset_leaves_to_its_user(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use("first-try")
    said = capsys.readouterr().out
    assert "set target.revision to the commit of Qwen/Qwen3-0.6B, 40 hex digits" in said
    assert "put your prompts into prompts.jsonl, which prepare.source names" in said
    assert sorted(read_params()["drafts"]) == ["eagle3", "lm", "medusa"]
    use("smoke")
    assert "before `dvc repro`" not in capsys.readouterr().out


LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}


def model(config: dict[str, Any]) -> Path:
    folder = Path("models/own")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    Path("chats.jsonl").touch()
    return folder


@pytest.mark.parametrize("preset", ["first-try", "one-gpu-8b", "embedded"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_config"])
def test_a_preset_is_fitted_to_a_folder(project: Path, preset: str, nested: bool) -> None:
    use(preset, model({"text_config": LLAMA} if nested else LLAMA), Path("chats.jsonl"))
    params = read_params()
    check_params(params)
    assert params["capture"]["hidden_layers"] == [2, 8, 13]
    assert params["target"]["dtype"] == "bfloat16"
    assert "shape" not in params["target"]
    assert params["prepare"]["source"]["train"] == "chats.jsonl"
    eagle3 = params["drafts"]["eagle3"]
    assert (eagle3["num_heads"], eagle3["intermediate_size"]) == (32, 8192)
    if preset != "embedded":  # which gives its own draft no more than that
        assert [eagle3[k] for k in ("num_kv_heads", "head_size")] == [8, 64]
        assert [eagle3[k] for k in ("rope_theta", "norm_eps")] == [500000.0, 1e-5]
    if preset == "first-try":  # a quarter of the target's width, as in the preset
        lm = params["drafts"]["lm"]
        assert [lm[k] for k in ("hidden_size", "num_heads", "intermediate_size")] == [512, 8, 1536]
        assert eagle3["draft_vocab_size"] == 16000
    text = Path("params.yaml").read_text(encoding="utf-8")
    assert "\n\ngenerate:" in text
    assert "\n\n\ngenerate:" not in text


def test_a_small_model_takes_its_last_layers_and_all_of_its_vocabulary(project: Path) -> None:
    small = {"num_hidden_layers": 5, "vocab_size": 1000, "hidden_size": 64}
    use("first-try", model({**LLAMA, **small, "dtype": "float64"}), Path("chats.jsonl"))
    params = read_params()
    check_params(params)
    assert params["capture"]["hidden_layers"] == [2, 3, 4]
    assert {params["drafts"][d]["draft_vocab_size"] for d in ("eagle3", "medusa")} == {None}
    lm = params["drafts"]["lm"]
    assert [lm[k] for k in ("hidden_size", "num_heads", "intermediate_size")] == [16, 1, 48]


def test_a_folder_without_sizes_is_refused_and_nothing_written(project: Path) -> None:
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"no none/config\.json; .*hf download"):
        use("first-try", Path("none"))
    with pytest.raises(ConfigError, match=r"config\.json has no num_hidden_layers; expected"):
        use("first-try", model({"vocab_size": 9, "hidden_size": 8}))
    assert (project / "params.yaml").read_bytes() == before


def test_a_bad_model_is_refused_before_its_prompts_are_answered(project: Path) -> None:
    use("first-try", model(LLAMA), Path("chats.jsonl"))
    good = read_params()
    for section, key, value, sentence in (
        ("capture", "hidden_layers", [2, 8, 16], r"names layer 16; expected indices from 0 to 15"),
        ("drafts", "eagle3", {"draft_vocab_size": 200000}, r"drafts\.eagle3\.draft_vocab_size is"),
    ):
        params = deepcopy(good)
        old = params[section][key]
        params[section][key] = {**old, **value} if isinstance(value, dict) else value
        with pytest.raises(ConfigError, match=sentence):
            check_params(params)
    params = deepcopy(good)
    params["target"]["shape"] = compose(Path("presets"), "first-try")["target"]["shape"]
    with pytest.raises(TargetError, match=r"target\.shape\.vocab_size 151936; expected 128256"):
        check_params(params)
    params["target"] |= {"model": "org/name", "revision": "0" * 40}
    params["capture"]["hidden_layers"] = [2, 8, 28]
    with pytest.raises(ConfigError, match=r"names layer 28; expected indices from 0 to 27"):
        check_params(params)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["lm:0:kl", "lm:1:kl"], r"two rows of the draft lm; expected one, .* one row lm:SEEDS"),
        (["lm:0,0:kl"], r"the seeds of row 'lm:0,0:kl'; expected each of them once"),
        (["lm:-1:kl"], r"the seeds of row .* seeds from 0"),
        (["lm:0:kl,kl"], r"the objectives of row .* once"),
    ],
)
def test_rows_that_say_a_cell_twice_are_refused(
    project: Path, rows: list[str], sentence: str
) -> None:
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=sentence):
        matrix(rows)
    assert (project / "params.yaml").read_bytes() == before


def test_matrix_says_where_decoding_would_find_no_start(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix(["lm:3,5:kl,lk_lambda"])
    assert "decode_seeds names 0, the seed of no start: set it to seeds of 3, 5, or" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="decode_seeds names 0"):
        check_params(read_params())


def test_use_mends_a_broken_file_and_knows_a_misspelt_preset(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "params.yaml").write_text("")
    use("smoke")
    assert "replaced: params.yaml is empty\nparams.yaml is now the preset 'smoke': all changed" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"choose one \(is it smoke\?\), or add presets/smok\.ya"):
        use("smok")


def test_matrix_adds_an_export(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix(["lm:0:kl,lk_lambda"], ["lm-kl-0:transformers"])
    assert "1 start, 2 arms, 2 exports" in capsys.readouterr().out
    assert list(read_params()["exports"]) == ["lm-lk_lambda-0", "lm-kl-0"]
    check_params(read_params())
    before = (project / "params.yaml").read_bytes()
    for wrong, sentence in (
        ("lm-kl-0", "--export 'lm-kl-0'; expected ARM:FORMAT"),
        ("lm-tv-0:transformers", "export of arm 'lm-tv-0'; expected one of lm-kl-0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            matrix(["lm:0:kl"], [wrong])
    assert (project / "params.yaml").read_bytes() == before


def test_changes_name_what_comes_and_goes_in_one_line() -> None:
    old = {"arms": {"a": {"x": 1}, "b": {"x": 1}}, "target": {"kind": "one", "p": 1, "q": 2}}
    new = {"arms": {"a": {"x": 2}, "c": {}}, "target": {"kind": "two", "r": 3}}
    assert changes(old, new) == [
        "arms: without b",
        "arms: with c",
        "arms.a.x: 1 -> 2",
        "target: without p, q",
        "target.kind: one -> two",
        "target.r: absent -> 3",
    ]


def test_changes_tell_absent_from_null() -> None:
    assert changes({"a": None, "b": 1}, {"a": 2, "c": {"d": 3}}) == [
        "a: None -> 2",
        "b: 1 -> absent",
        "c: absent -> {'d': 3}",
    ]


def test_the_verbs_run_without_torch(project: Path) -> None:
    """A cache and a project open on a machine that has no torch."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from lkcache.estimate import estimate; from lkcache.use import use;"
        "use('full'); sys.exit(estimate())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "assumed" in done.stdout
