"""The embedded target: a byte-level BPE and a small Llama, trained from scratch on the documents.

A recipe in four steps, each a function: `train_tokenizer`, `encode`, `fit`, `sharpen`. It stands
for a model that one would download; nothing here is meant to train a useful one. Sharpening divides
the law's temperature by folding it into the final norm (logits · 1/`sharpen`), so that a few
minutes' model has the entropy of a better one (DESIGN §9); it is said in `target.json`.

Dims: B sequences, T tokens, N rows, V vocabulary, D width. Losses and entropies are nats a token.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import BatchSize, Strict, Threads
from pipeline.provenance import Progress
from pipeline.seeds import generator
from pipeline.target import quiet
from storage.errors import DataError

END = "<|end|>"
# 256 bytes, the end token, and room for at least one merge
MIN_VOCAB = 258
BETAS, WEIGHT_DECAY, CLIP, WARMUP_STEPS, LR_FINAL = (0.9, 0.95), 0.1, 1.0, 20, 0.05
NUM_LOGS = 20
# windows of each domain on which the finished target is measured; a tenth as many along the way
HELDOUT_WINDOWS = 32

Count = Annotated[int, Field(ge=1)]


class EmbeddedConfig(Strict):
    """Section `target` for the target that the pipeline trains itself."""

    kind: Literal["embedded"]
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB)]
    hidden_size: Count
    num_layers: Annotated[int, Field(ge=2)]
    num_heads: Count
    intermediate_size: Count
    context_tokens: Annotated[int, Field(ge=16)]
    steps: Count
    batch_sequences: BatchSize
    sequence_tokens: Annotated[int, Field(ge=8)]
    lr: Annotated[float, Field(gt=0)]
    sharpen: Annotated[float, Field(gt=0, le=1)]
    """Temperature folded into the final norm; 1 leaves the target as it was trained."""
    seed: Annotated[int, Field(ge=0)]
    threads: Threads

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_heads (rotary pairs)")
        if self.sequence_tokens > self.context_tokens:
            raise ValueError("sequence_tokens must not exceed context_tokens")
        return self


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, context_tokens: int) -> Any:
    """A byte-level BPE of exactly `vocab_size` tokens with one special, `END`, whose id is 0.

    Digits stand alone, so that sums are spelled the same way everywhere. `DataError` where the
    texts have too few distinct pairs for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise DataError(
            found=f"the training documents give {bpe.get_vocab_size()} BPE tokens",
            expected=f"target.vocab_size {vocab_size}",
            todo="lower target.vocab_size or give prepare.source more text",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """[N] int64: all texts in order, an end token after each."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    end = tokenizer.eos_token_id
    return torch.tensor([i for one in encoded for i in (*one.ids, end)], dtype=torch.int64)


def build_model(config: EmbeddedConfig, eos_id: int) -> Any:
    """A Llama with tied embeddings and no BOS, initialised from `config.seed` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.context_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos_id,
            pad_token_id=None,
        )
    )
    drawn = generator(config.seed, "target", "init")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            # what adds to the residual stream starts smaller, as in GPT-2
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * config.num_layers) ** -0.5 if adds else 1.0
            # 1/sqrt(D), 0.072 by default, is 0.25 nats ahead of the usual 0.02 after 120 steps
            std = scale * config.hidden_size**-0.5
            weight.normal_(0.0, std, generator=drawn)
    return model


def windows(tokens_N: Tensor, starts_B: Tensor, length: int) -> Tensor:
    """[B, length] int64: the pieces of a packed text that begin at the given places."""
    return tokens_N[starts_B[:, None] + torch.arange(length)]


def spread(tokens_N: Tensor, count: int, length: int) -> Tensor:
    """[≤ count, length] windows at equal distances; never random, so that losses compare."""
    last = len(tokens_N) - length
    count = min(count, last // length + 1)
    return windows(tokens_N, torch.arange(count) * (last // max(count - 1, 1)), length)


def learning_rate(step: int, config: EmbeddedConfig) -> float:
    """Linear warm-up, then a cosine to `LR_FINAL` of the peak at the last step."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    turn = 0.5 * (1 + math.cos(math.pi * step / max(config.steps - 1, 1)))
    return config.lr * warm * (LR_FINAL + (1 - LR_FINAL) * turn)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _loss(model: Any, tokens_BT: Tensor) -> Tensor:
    hidden = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
    # a chunked loss with its gradient in closed form was no faster here: the step is bound by GEMM
    return cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens_BT[:, 1:].flatten())


def fit(
    model: Any, train_N: Tensor, heldout_BT: Tensor, *, config: EmbeddedConfig
) -> list[dict[str, float]]:
    """Train in place; the curve's rows: step, loss (mean since the row before), heldout_loss."""
    length = config.sequence_tokens + 1
    drawn = generator(config.seed, "target", "windows")
    optimizer = _optimizer(model)
    curve: list[dict[str, float]] = []
    losses: list[Tensor] = []
    every = max(1, config.steps // NUM_LOGS)
    with Progress(config.steps, "target", unit="step") as line:
        for step in range(config.steps):
            starts = torch.randint(
                len(train_N) - length + 1, (config.batch_sequences,), generator=drawn
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            loss = _loss(model, windows(train_N, starts, length))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) % every == 0 or step + 1 == config.steps:
                with torch.no_grad():
                    heldout = _loss(model, heldout_BT).item()
                row = {"step": step + 1, "loss": torch.stack(losses).mean().item()}
                curve.append({**row, "heldout_loss": heldout})
                line.add(len(losses), loss=f"{row['loss']:.3f}", heldout=f"{heldout:.3f}")
                losses.clear()
    return curve


@torch.no_grad()
def sharpen(model: Any, temperature: float) -> None:
    """Divide the final norm's weight, and with it every logit, by the temperature."""
    model.model.norm.weight.div_(temperature)


@torch.no_grad()
def measure(model: Any, tokens_BT: Tensor) -> dict[str, float]:
    """Means over the windows' predictions: loss, the law's entropy and its largest probability."""
    hidden = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
    sums = torch.zeros(3, dtype=torch.float64)
    for rows_TD, next_T in zip(hidden, tokens_BT[:, 1:], strict=True):
        logp_TV = model.lm_head(rows_TD).float().log_softmax(-1)
        sums += torch.stack(
            [
                -logp_TV.gather(1, next_T[:, None]).sum(),
                -(logp_TV.exp() * logp_TV).sum(),
                logp_TV.amax(1).exp().sum(),
            ]
        )
    loss, entropy, top = (sums / tokens_BT[:, 1:].numel()).tolist()
    return {"loss": loss, "entropy": entropy, "top_probability": top}


def train_embedded(
    documents: Sequence[Mapping[str, str]], config: EmbeddedConfig
) -> tuple[Any, Any, dict[str, Any], list[dict[str, float]]]:
    """(model, tokenizer, metrics, curve) from `DOCUMENTS` rows; the model is sharpened already.

    `DataError` where a split is too short for one window.
    """
    train = [row["text"] for row in documents if row["split"] == "train"]
    tokenizer = train_tokenizer(train, config.vocab_size, context_tokens=config.context_tokens)
    train_N = encode(tokenizer, train)
    heldout = {
        domain: encode(
            tokenizer,
            (r["text"] for r in documents if r["split"] != "train" and r["domain"] == domain),
        )
        for domain in sorted({r["domain"] for r in documents if r["split"] != "train"})
    }
    length = config.sequence_tokens + 1
    heldout = {domain: tokens for domain, tokens in heldout.items() if len(tokens) >= length}
    _require_text(train_N, heldout, length)
    model = build_model(config, tokenizer.eos_token_id).train()
    few = _each(heldout, lambda tokens: spread(tokens, max(1, HELDOUT_WINDOWS // 10), length))
    curve = fit(model, train_N, torch.cat(list(few.values())), config=config)
    model.eval()
    many = _each(heldout, lambda tokens: spread(tokens, HELDOUT_WINDOWS, length))
    trained = _each(many, lambda windows_BT: measure(model, windows_BT))
    sharpen(model, config.sharpen)
    sharpened = _each(many, lambda windows_BT: measure(model, windows_BT))
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train_N),
        "characters_per_token": sum(map(len, train)) / len(train_N),
        "heldout": _mean(trained),
        "heldout_by_domain": trained,
        "sharpened": _mean(sharpened),
        "sharpened_by_domain": sharpened,
    }
    return model, tokenizer, metrics, curve


def _each(values: Mapping[str, Any], apply: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: apply(value) for key, value in values.items()}


def _mean(by_domain: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over domains, each weighing the same, as prompts are balanced."""
    keys = next(iter(by_domain.values()))
    return {key: math.fsum(d[key] for d in by_domain.values()) / len(by_domain) for key in keys}


def _require_text(train_N: Tensor, heldout: Mapping[str, Tensor], length: int) -> None:
    for split, longest in (
        ("train", len(train_N)),
        ("held-out", max(map(len, heldout.values()), default=0)),
    ):
        if longest < length:
            raise DataError(
                found=f"the {split} documents are shorter than one window of {length} tokens",
                expected="text for at least one",
                todo="lower target.sequence_tokens or give prepare.source more text",
            )
