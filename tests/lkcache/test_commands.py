"""`diff`, `compare`, `estimate` and others as a user meets them: output, exit codes, sentences."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from lkcache.clean import clean
from lkcache.compare import compare
from lkcache.diff import diff
from lkcache.estimate import estimate
from lkcache.main import VERBS, _load
from lkcache.matrix import matrix
from lkcache.repair import repair
from lkcache.use import use
from lkcache.words import age, duration, num_bytes
from pipeline.estimate import MODES
from storage.errors import CacheError, ConfigError, MissingManifest, ResultError, WorkspaceError
from storage.record import supervised
from storage.workspace import read_json, write_json
from tests.pipeline.synthetic import World, write_project
from tests.storage.samples import TOPK, make_records, write_cache
from tests.storage.test_scratch import leave

ROOT = Path(__file__).parents[2]
WORLD = World(
    prompts=24,
    decoded=0,
    depth=4,
    temperatures=(1.0,),
    drafts={"lm": ("lm", 3, ("kl", "tv")), "medusa": ("medusa", 1, ("kl",))},
)
ALL_VERBS = """
import sys
for name in ("torch", "transformers", "dask", "distributed", "dvc"):
    sys.modules[name] = None
from importlib import import_module
from pathlib import Path
from lkcache.main import VERBS, _load
for verb in VERBS:
    getattr(import_module(f"lkcache.{verb}"), verb)
from lkcache.inspect import inspect
from lkcache.diff import diff
from lkcache.repair import repair
from storage.errors import CacheError
cache = Path(sys.argv[1])
inspect(cache, Path(sys.argv[2]), html=True)
assert diff(cache, cache, as_json=True) == 0
try:
    repair(cache)
except CacheError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of the same texts, one log-probability apart."""
    folder = tmp_path_factory.mktemp("caches")
    left = make_records(TOPK, [20, 15])
    logp = left[0].token_logp.copy()
    logp[np.flatnonzero(supervised(left[0].turn))[0]] -= 0.5
    right = [replace(left[0], token_logp=logp), left[1]]
    return write_cache(folder / "a.zarr", TOPK, left), write_cache(folder / "b.zarr", TOPK, right)


def test_no_verb_needs_torch_or_transformers(caches: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALL_VERBS, caches[0], tmp_path / "page.html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert "lies in no project (no dvc.yaml and params.yaml above it)" in done.stdout


def test_diff_says_equal_and_different(
    caches: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    a, b = map(str, caches)
    assert diff(a, a) == 0
    assert "equal byte for byte, as their manifests say" in " ".join(
        capsys.readouterr().out.split()
    )
    assert diff(a, b) == 1
    said = capsys.readouterr().out
    assert "identity: equal in" in said
    assert "1 have the same tokens and other stored numbers: sequence-0-é" in said
    assert "token_logp" in said
    assert "they differ" in said
    assert diff(a, b, every=True, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["identity"]) == (False, {})
    assert found["values"]["gaps"]["token_logp"]["largest"] == pytest.approx(0.5)
    assert found["values"]["unequal"] == ["sequence-0-é"]


def test_diff_refuses_what_is_no_cache(caches: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingManifest, match="expected a finished cache"):
        diff(str(caches[0]), str(tmp_path / "none.zarr"))
    with pytest.raises(ConfigError, match="--sequences 0; expected at least 1"):
        diff(*map(str, caches), sequences=0)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two projects of the same rollouts; the second one's `tv` drafts need 5 % fewer rounds."""
    folder = tmp_path_factory.mktemp("projects")
    for name in ("a", "b"):
        write_project(folder / name, WORLD, resamples=300)
        records = read_json(folder / name / "cache-report/report.json")
        for source in records["source"].values():
            source["capture"] = "cc" * 32
        write_json(folder / name / "cache-report/report.json", records)
    from storage.tables import ROUNDS, read_table, write_table

    for path in (folder / "b").glob("results/*/arms/tv.rounds.parquet"):
        rows = read_table(path, ROUNDS)
        write_table(path, ROUNDS, [row | {"rounds": row["rounds"] / 1.05} for row in rows])
    return folder / "a", folder / "b"


def test_compare_gives_the_reports_verdicts(
    projects: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    a, b = map(str, projects)
    compare(a, b)
    said = capsys.readouterr().out
    assert "+ lm tv of B is 5.00 % [5.00, 5.00] longer than that of A at T = 1 over 3 seeds" in said
    assert "= lm kl takes the same rounds in A and B on every prompt at T = 1" in said
    assert "no records of target" not in said
    compare(b, a, gamma=2, as_json=True)
    found = json.loads(capsys.readouterr().out)
    rows = {(row["draft"], row["objective"]): row for row in found["comparisons"]}
    assert (found["gamma"], found["prompts"]) == (2, 24)
    assert rows["lm", "tv"]["direction"] == "shorter"
    assert rows["lm", "tv"]["over_seeds"]["estimate"] == pytest.approx(1 / 1.05 - 1)
    assert rows["medusa", "kl"]["over_seeds"] is None
    compare(str(projects[0] / "results"), str(projects[0]))
    assert "every arm takes the same rounds in A and B" in capsys.readouterr().out


def test_results_without_their_project_are_compared_by_rollouts(
    projects: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.symlink_to(projects[1] / "results", target_is_directory=True)
    compare(str(projects[0]), str(bare))
    said = " ".join(capsys.readouterr().out.split())
    assert "no records of target and cache beside it" in said
    assert "longer than that of A" in said


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (
            "target/target.json",
            {"fingerprint": "99" * 32},
            r"is of target 3f2a3f2a3f2a… and .*/c of target 999999999999…; expected one target",
        ),
        (
            "cache-report/report.json",
            {"source": {"heldout": {"sequences": "88" * 32, "capture": "cc" * 32}}},
            r"of prompts 777777777777… 777777777777… and .*/c of prompts 888888888888…",
        ),
        (
            "cache-report/report.json",
            {
                "source": {
                    split: {"sequences": "77" * 32, "capture": "dd" * 32}
                    for split in ("train", "heldout", "greedy")
                }
            },
            r"of cache cccccccccccc… and .*/c of cache dddddddddddd…; .*pass --across-caches",
        ),
    ],
    ids=["target", "prompts", "cache"],
)
def test_results_of_different_origin_are_refused(
    projects: tuple[Path, Path], tmp_path: Path, file: str, change: dict[str, Any], sentence: str
) -> None:
    other = tmp_path / "c"
    other.mkdir()
    for name in ("results", "params.yaml", "target", "cache-report"):
        (other / name).symlink_to(projects[1] / name)
    folder = (other / file).parent
    folder.unlink()
    write_json(other / file, read_json(projects[1] / file) | change)
    with pytest.raises(ResultError, match=sentence):
        compare(str(projects[0]), str(other))
    if "capture" in str(change) and "dd" in str(change):
        compare(str(projects[0]), str(other), across_caches=True)


def test_what_is_no_result_is_refused(
    projects: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = str(projects[0])
    with pytest.raises(ConfigError, match="no folder nowhere; expected a project, its results"):
        compare(a, "nowhere")
    with pytest.raises(ResultError, match="holds no results; expected <start>/arms"):
        compare(a, str(tmp_path))
    with pytest.raises(ResultError, match="no replay at γ = 9 in both; expected"):
        compare(a, a, gamma=9)
    monkeypatch.setitem(sys.modules, "dvc.api", None)
    with pytest.raises(ConfigError, match="no dvc in this environment; expected it, to take"):
        compare(a, "HEAD~1:.")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match="no scipy in this environment"):
        compare(a, a)


AT_A_REVISION = """
import subprocess, sys
from pathlib import Path
from dvc.repo import Repo
git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
subprocess.run([*git, "init", "-q"], check=True)
with Repo.init() as repo:
    repo.add(["results"])
subprocess.run([*git, "add", "-A"], check=True)
subprocess.run([*git, "commit", "-qm", "before"], check=True)
import lkcache.compare as verb
from storage.errors import ResultError
verb.compare("HEAD:.", sys.argv[1], as_json=True)
for name in ("nonsense:.", "HEAD:none"):
    try:
        verb.compare(name, sys.argv[1])
    except ResultError as error:
        print(error, file=sys.stderr)
"""


def test_a_revision_is_taken_through_dvc(projects: tuple[Path, Path], tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(projects[0], here)
    done = subprocess.run(
        [sys.executable, "-c", AT_A_REVISION, projects[1]],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    rows = {(row["draft"], row["objective"]): row["direction"] for row in found["comparisons"]}
    assert rows == {("lm", "kl"): "same", ("lm", "tv"): "longer", ("medusa", "kl"): "same"}
    assert "nonsense:. cannot be taken (" in done.stderr
    assert "HEAD:none cannot be taken (" in done.stderr


def test_clean_lists_first_and_removes_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(WorkspaceError, match=r"no dvc.yaml in .*; expected the project's root"):
        clean()
    (tmp_path / "dvc.yaml").touch()
    clean()
    assert "no partial work under .scratch" in capsys.readouterr().out
    stale, latest = leave(tmp_path, "a"), leave(tmp_path, "b")
    capsys.readouterr()
    clean()
    said = capsys.readouterr().out
    assert "a" * 16 in said
    assert "--yes removes 1 folder, 3 B" in said
    assert stale.exists()
    clean(yes=True)
    assert "removed 1 folder, 3 B" in capsys.readouterr().out
    assert (stale.exists(), latest.exists()) == (False, True)
    clean(yes=True, every=True)
    assert not latest.exists()


def test_estimate_shows_every_mode_and_what_would_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    assert estimate() == 0
    said = capsys.readouterr().out
    for mode in MODES:
        assert f"in mode {mode}" in said
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert estimate(tflops=300) == 2
    said = capsys.readouterr().out
    assert "the disk will not hold the cache" in said
    assert "1 kB free" in said
    assert "capture.last_hidden: false" in said
    with pytest.raises(ConfigError, match="--tflops 0; expected a rate above 0"):
        estimate(tflops=0)
    Path("params.yaml").write_text("capture: {}\n")
    with pytest.raises(ConfigError, match=r"params.yaml has no section target"):
        estimate()


def test_estimate_generates_held_out_responses_alone_where_the_data_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    hours = {}
    for whose in ("target", "data"):
        changed = text.replace("generate:\n", f"generate:\n  train_responses: {whose}\n")
        Path("params.yaml").write_text(changed, encoding="utf-8")
        monkeypatch.setattr("lkcache.estimate.duration", str)  # in full
        assert estimate() == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "generating" in x]
        assert ("held-out responses" in line) == (whose == "data")
        hours[whose] = float(line.split("│")[2])
    # 256 prompts at T = 1 and at T = 0, beside 1,792 that train
    assert hours["data"] / hours["target"] == pytest.approx(512 / 2304, rel=1e-6)


def test_every_verb_has_a_summary_and_a_text() -> None:
    from importlib import import_module

    for verb in VERBS:
        text = getattr(import_module(f"lkcache.{verb}"), verb).__doc__
        assert len(text) > 40, verb
        assert VERBS[verb].endswith(".")


def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "page.html")

    monkeypatch.setattr("lkcache.clean.clean", refused)
    with pytest.raises(typer.Exit) as done:
        _load("clean")()
    assert done.value.exit_code == 2
    assert "lkcache clean: page.html: permission denied; expected a file" in capsys.readouterr().err


def test_sizes_and_times_are_written_short() -> None:
    assert [num_bytes(x) for x in (0, 999, 1e6, 53.66e6, 2.5e13)] == [
        "0 B", "999 B", "1 MB", "53.7 MB", "25 TB"
    ]  # fmt: skip
    assert [age(x) for x in (5, 200, 7200, 1e6)] == [
        "5 seconds ago", "3 minutes ago", "2 hours ago", "12 days ago"
    ]  # fmt: skip
    assert [duration(x) for x in (9.64, 90, 7200)] == ["9.64 s", "1.5 min", "2 h"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("vocab_size: 1024", "vocab_size: [1]", r"target\.vocab_size is \[1\]; expected"),
        ("max_new_tokens: 96", "max_new_tokens: .inf", r"generate\.max_new_tokens is inf"),
        ("medusa: {kind: medusa, ", "medusa: {", r"draft kind 'None'; expected one of eagle3"),
    ],
)
def test_estimate_names_a_value_of_which_nothing_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, sentence: str
) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        estimate()
    monkeypatch.setitem(sys.modules, "pipeline.check", None)  # where torch is not installed
    with pytest.raises(ConfigError, match=r"no estimate can be made \(.*python -m stages\.check"):
        estimate()


def test_verbs_outside_a_project_say_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no presets in .*; run from the project's root, or lay"):
        use("smoke")
    with pytest.raises(ConfigError, match=r"no params\.yaml in .*; run from the project's root"):
        matrix(["lm:0:kl"])
    Path("params.yaml").write_text("drafts: {}\nlosses: [1]\n")
    with pytest.raises(
        ConfigError, match=r"params\.yaml has no mapping losses; expected the whole"
    ):
        matrix(["lm:0:kl"])
    with pytest.raises(
        CacheError, match=r"s3:/bucket/c\.zarr, which lies in a store; expected a fol"
    ):
        repair(Path("s3://bucket/c.zarr"))
