"""SIGKILL a capture at random points, resume it, compare its caches with an unbroken run's.

`python -m benchmarks.kills [KILLS [SEED]]`, from the project's root; 200 kills, seed 0 and a table
in `kills.md` by default.

The driver imports all packages once and forks per run: a run's time is the capture's own. A trial
starts from nothing, is killed one to three times, and then runs to its end. Three kills of four are
uniform over the time of an unbroken run; each fourth one is at a random file operation from the
first seal on, half of these among the last ones: seals and publication are short. Kept means: a
part that was whole at a kill is the same folder (inode) in the finished cache.
"""

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401  loaded before the forks, as what follows
import torch
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lkcache.presets import yaml
from stages import capture, generate
from storage.workspace import file_digest, file_names
from tests.targets import write_params, write_project

KILLS, SEED, MOST = 200, 0, 3
OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")
OUTS = [*capture.CACHES.values(), capture.METRICS]
PHASES = ("before the first part", "between parts", "seal and sync", "renames", "all in place")
LAST = 80  # of the file operations: the renames, and what is removed after them


def tiny_llama() -> Any:
    """A random target of 300 ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def start(function: Callable[[], None], project: Path) -> int:
    """Run a function in a forked process of the project; its output goes to `log` there."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(project)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["capture"]
        function()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def finish(pid: int, project: Path) -> None:
    """Wait for a run that must end well."""
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"status {status}: {(project / 'log').read_text(encoding='utf-8')}")


def setup(project: Path) -> None:
    """A project with sequences; in a fork, so that the driver stays free of threads."""
    write_project(project, tiny_llama())
    write_params(project, capture={"part_tokens": 60})
    params = yaml().load(project / "params.yaml")
    used = {name: params[name] for name in ("generate", "capture", "cluster")}
    yaml().dump(used, project / "params.yaml")  # to parse the rest takes a third of a run
    generate.main()


def dying(operation: int) -> None:
    """Capture, and die before the n-th file operation from the first seal on; never for -1."""
    count, plain_seal = [0], capture.seal_cache

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return plain(*args, **options)

        return call

    def seal(*args: Any, **options: Any) -> Any:
        if capture.seal_cache is seal:
            capture.seal_cache = plain_seal
            Path("sealed").touch()
            for name in OPERATIONS:
                setattr(os, name, counted(getattr(os, name)))
        return plain_seal(*args, **options)

    capture.seal_cache = seal
    capture.main()
    Path("operations").write_text(f"{count[0]}", encoding="utf-8")


def timed(project: Path) -> tuple[float, float]:
    """Seconds of an unbroken run until its first seal, and in all."""
    started = time.time()
    finish(start(lambda: dying(-1), project), project)
    ended = time.time()
    return (project / "sealed").stat().st_mtime - started, ended - started


def reset(project: Path) -> None:
    """Before the first capture."""
    for name in ("cache", "metrics", "timings", ".scratch", "runs"):
        shutil.rmtree(project / name, ignore_errors=True)


def digests(project: Path) -> dict[str, str]:
    """Of every file that the capture writes and that no clock may change."""
    found = {}
    for out in OUTS:
        path = project / out
        for name in file_names(path) if path.is_dir() else [""]:
            found[f"{out}/{name}"] = file_digest(path / name if name else path)
    return found


def parts(project: Path) -> dict[str, int]:
    """Inode of every whole part, wherever it lies: a part appears by rename."""
    found = {}
    for out in capture.CACHES.values():
        for root in (project, *(project / ".scratch" / "capture").glob("*")):
            for part in (root / out).glob("part-*"):
                found[f"{out}/{part.name}"] = part.stat().st_ino
    return found


def phase(project: Path) -> str:
    """Where a killed run was, from what it left."""
    state = project / ".scratch"
    if (state / "capture.journal.json").exists():
        return PHASES[3]
    if (state / "capture.stamp.json").exists():
        return PHASES[4]
    if any(state.glob("capture/*/cache/*.zarr/zarr.json")):
        return PHASES[2]
    return PHASES[1 if parts(project) else 0]


def campaign(kills: int, *, seed: int = SEED) -> dict[str, Any]:
    """Run trials until `kills` kills fell; what they did."""
    rng = random.Random(seed)  # noqa: S311  no secret
    counts: Counter[str] = Counter()
    trials = kept = again = identical = number = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        finish(start(lambda: setup(project), project), project)
        runs = []
        for _ in range(3 if kills >= KILLS else 1):
            reset(project)
            runs.append(timed(project))
        seal_s, whole_s = (statistics.median(times) for times in zip(*runs, strict=True))
        wanted = digests(project)
        operations = int((project / "operations").read_text(encoding="utf-8"))
        while number < kills:
            reset(project)
            trials += 1
            seen: dict[str, int] = {}
            for _ in range(min(rng.randint(1, MOST), kills - number)):
                if number % 4 == 3:
                    last = rng.choice(
                        [rng.randrange(operations), operations - rng.randint(1, LAST)]
                    )
                    pid = start(lambda last=last: dying(last), project)
                else:
                    pid = start(capture.main, project)
                    time.sleep(rng.uniform(0, whole_s))
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                counts[phase(project)] += 1
                number += 1
                seen |= parts(project)
            finish(start(capture.main, project), project)
            identical += digests(project) == wanted
            final = parts(project)
            kept += sum(final[name] == inode for name, inode in seen.items())
            again += sum(final[name] != inode for name, inode in seen.items())
            print(f"\r{number} kills, {trials} trials, {identical} identical", end="", flush=True)
    print()
    return {
        "kills": number,
        "trials": trials,
        "identical": identical,
        "phases": {name: counts[name] for name in PHASES},
        "kept": kept,
        "again": again,
        "files": len(wanted),
        "seconds": (seal_s, whole_s),
        "operations": operations,
    }


def table(found: dict[str, Any]) -> str:
    """The result, for people."""
    seal_s, whole_s = found["seconds"]
    lines = [
        "# Kills",
        "",
        f"`python -m benchmarks.kills {found['kills']}`: {found['kills']} SIGKILLs of a tiny",
        f"capture in {found['trials']} trials of one to {MOST} kills each; {os.cpu_count()} cores,",
        f"one worker. An unbroken run took {whole_s:.2f} s, its parts the first {seal_s:.2f} s.",
        f"Each fourth kill is at a random one of the {found['operations']} file operations after",
        f"them, or of the last {LAST}.",
        "",
        f"- finished caches equal to the unbroken run's, all {found['files']} files byte for byte:",
        f"  **{found['identical']} of {found['trials']}**",
        f"- parts that were whole at a kill: {found['kept'] + found['again']}; kept as they were:",
        f"  {found['kept']}; written again: {found['again']}",
        "",
        "| killed | kills |",
        "| --- | ---: |",
        *(f"| {name} | {count} |" for name, count in found["phases"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the campaign, print its table, keep it; 1 where a resumed cache differs."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    found = campaign(kills, seed=int(sys.argv[2]) if len(sys.argv) > 2 else SEED)
    text = table(found)
    print(text)
    if kills >= KILLS:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    return int(found["identical"] != found["trials"] or found["again"] > 0)


if __name__ == "__main__":
    sys.exit(main())
