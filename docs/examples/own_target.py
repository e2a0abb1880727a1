"""Write a small chat model and conversations, to rehearse a run on a target of one's own.

    python own_target.py FOLDER

leaves FOLDER/models/my-target, a Llama of 1 M parameters with a tokenizer and a ChatML template
of its own, and FOLDER/chats.jsonl, ShareGPT conversations on which it was trained. The text is
made of phrases drawn at random, so that a law has something to be unsure of. `--tags` writes the
template with generation tags; most models ship one without.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WRITTEN = "message['content'] + '<|im_end|>'"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    f"{{{{ {WRITTEN} }}}}"
    "{{ '\n' }}{% endfor %}" + ASKED
)
TAGGED = PLAIN.replace(
    f"{{{{ {WRITTEN} }}}}",
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ {WRITTEN} }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ {WRITTEN} }}}}{{% endif %}}",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SOFTEN = 0.8  # of the final norm: a target of 1 to 2 nats a token, as large ones have
LENGTH, ROWS, RATE = 128, 16, 3e-3

TOPICS = ["bread", "chess", "the moon", "rain", "coffee", "the sea", "a violin", "ice", "glass"]
ASKS = ["Tell me about {}.", "What should I know of {}?", "Write two sentences on {}."]
MORE = ["Can you say more?", "And then?", "Why is that?", "Is that all?"]
OPENERS = ["Well,", "In short,", "Many say that", "It is known that", "I think"]
VERBS = ["is", "has always been", "can be", "was once", "seems"]
WHATS = [
    "older than most towns",
    "harder to make than it looks",
    "found in every country",
    "a matter of patience",
    "loved by those who work early",
    "best shared with friends",
]
LINKS = ["because", "although", "and", "while"]
WHYS = [
    "nobody has counted all of it",
    "water and time do most of the work",
    "the first rule is to wait",
    "winter changes everything",
    "children learn it by watching",
]


def sentence(rng: random.Random, topic: str) -> str:
    """One of 3,000 sentences on a topic."""
    opener, verb, what = rng.choice(OPENERS), rng.choice(VERBS), rng.choice(WHATS)
    return f"{opener} {topic} {verb} {what}, {rng.choice(LINKS)} {rng.choice(WHYS)}."


def conversation(rng: random.Random, number: int) -> dict[str, Any]:
    """A ShareGPT row of one to three rounds; the number keeps rows from being repeats."""
    topic = rng.choice(TOPICS)
    texts = []
    for turn in range(rng.randint(1, 3)):
        texts.append(rng.choice(MORE) if turn else f"{rng.choice(ASKS).format(topic)} No. {number}")
        texts.append(" ".join(sentence(rng, topic) for _ in range(rng.randint(1, 3))))
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": f"chat-{number}", "conversations": turns}


def tokenizer_of(chats: Sequence[dict[str, Any]], template: str) -> Any:
    """A byte-level BPE of at most 1,024 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((t["value"] for c in chats for t in c["conversations"]), trainer)
    ends = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    words.chat_template = template
    return words


def train(tokenizer: Any, chats: Sequence[dict[str, Any]], given: argparse.Namespace) -> Any:
    """A Llama trained on the conversations as the template writes them."""
    roles = {"human": "user", "gpt": "assistant"}
    stream = [
        token
        for chat in chats
        for token in tokenizer.apply_chat_template(
            [{"role": roles[t["from"]], "content": t["value"]} for t in chat["conversations"]]
        )["input_ids"]
    ]
    tokens = torch.tensor(stream)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.width,
        intermediate_size=3 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=given.steps)
    for step in range(given.steps):
        at = torch.randint(len(tokens) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH)
        loss = model(tokens[at], labels=tokens[at]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 49:
            print(f"step {step + 1}: {loss.item():.2f} nats a token", flush=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(SOFTEN)
    return model


def main() -> None:
    """Write the conversations, then the model."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tags", action="store_true", help="a template with generation tags")
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)  # noqa: S311  no secret
    chats = [conversation(rng, number) for number in range(given.conversations)]
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(chat)}\n" for chat in chats)
    (given.folder / "chats.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = tokenizer_of(chats, TAGGED if given.tags else PLAIN)
    model = train(tokenizer, chats, given)
    home = given.folder / "models" / "my-target"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    print(f"{home}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
