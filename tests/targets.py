"""A tiny target in memory, and a project with one on disk: what generate, capture, verify need."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.pin import Origin, pin
from pipeline.target import Target, TargetSpec
from storage.tables import PROMPTS, write_table

ROOT = Path(__file__).parents[1]
V = 300
SENTENCE = "the cat sat on a mat and then went home with seven red apples for old friends"
WORDS = SENTENCE.split()


def target_of(model: Any, *, eos_ids: Sequence[int] = (0,)) -> Target:
    """A target around a model that no file holds; it has no tokenizer."""
    config = model.config
    spec = TargetSpec(
        kind="embedded",
        model=".",
        revision=None,
        fingerprint="tiny",
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        eos_ids=list(eos_ids),
        bos_id=None,
        context_tokens=config.max_position_embeddings,
        dtype="float32",
        sharpen=1.0,
    )
    return Target(model=model, tokenizer=None, spec=spec)


def tokenizer() -> Any:
    """A byte-level BPE of V tokens; its end token is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def prompts(split: str, count: int) -> list[dict[str, Any]]:
    """Prompts of one to nine words in two domains."""
    return [
        {
            "id": f"{split}-{i}",
            "domain": ("prose", "code")[i % 2],
            "split": split,
            "text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + (5 * i) % 9)),
            "response": None,
        }
        for i in range(count)
    ]


def write_params(folder: Path, **sections: dict[str, Any]) -> None:
    """The project's own parameters, small, with these values in place of theirs."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    small: dict[str, dict[str, Any]] = {
        "generate": {"max_prompt_tokens": 12, "max_new_tokens": 10, "batch_sequences": 4},
        "capture": {"part_tokens": 120, "batch_tokens": 96, "hidden_layers": [1, 3]},
        "verify": {"sequences": 4},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    for changes in (small, sections):
        for name, values in changes.items():
            params[name].update(values)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def write_project(folder: Path, model: Any, *, chat_template: str | None = None) -> None:
    """`params.yaml`, `target/` and `data/prompts.parquet`; the model must have V tokens."""
    target = folder / "target"
    model.save_pretrained(target)
    words = tokenizer()
    words.chat_template = chat_template
    words.save_pretrained(target)
    pin(target, target, origin=Origin("embedded", "."))
    rows = [*prompts("train", 14), *prompts("heldout", 6)]
    write_table(folder / "data" / "prompts.parquet", PROMPTS, rows)
    write_params(folder)


def copy_project(source: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder
