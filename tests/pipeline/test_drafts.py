"""Every kind under the contract, its options too; what is special to one stands below it."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.draft import Context, find, kinds
from storage.errors import ConfigError, DraftError
from tests.contracts.draft import (
    ALIGNED,
    SHAPE,
    DraftContract,
    T,
    V,
    by_anchor,
    interface,
    vocabulary,
)

EAGLE3 = {
    "depth": 2,
    "num_heads": 2,
    "intermediate_size": 12,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "norm_output": False,
}
PRUNED = (
    ({"draft_vocab_size": 24}, r"a draft vocabulary of 24 ids; expected from 1 to the target's 23"),
    ({"draft_vocab_size": 9}, r"no map of draft ids; expected one for each of the 9"),
)


class TestLM(DraftContract):
    kind = "lm"
    params: ClassVar = {
        "hidden_size": 12,
        "num_layers": 2,
        "num_heads": 3,
        "intermediate_size": 20,
    }
    misfits = (
        ({"num_heads": 5}, "hidden_size 12 with num_heads 5; expected heads of an even number"),
        ({"num_heads": 4}, "hidden_size 12 with num_heads 4; expected heads of an even number"),
    )

    def test_pruned_vocabulary_is_refused(self) -> None:
        with pytest.raises(DraftError, match="pruned draft vocabulary for a draft of kind lm"):
            find("lm").Model.build(self.config(), SHAPE, None, 0, d2t=torch.arange(5))

    def test_accepted_drafts_are_not_fed_again(self) -> None:
        draft, data = self.make(), self.data()
        fed: list[int] = []
        feed = draft._feed

        def spy(state: Any, token_BQ: Any, **rest: Any) -> Any:
            fed.append(token_BQ.shape[1])
            return feed(state, token_BQ, **rest)

        draft._feed = spy
        state = draft.open(1, T)
        for length in (5, 8):  # γ = 3: two of the drafts were cached, all three accepted
            n = torch.tensor([length])
            context = Context(data.tokens[:1], n, None, None)
            draft.propose(state, context, 3, lambda k, z, n=n: data.tokens[:1, int(n) + k])
        assert fed == [5, 1, 1, 1, 1, 1]


class TestMedusa(DraftContract):
    kind = "medusa"
    params: ClassVar = {"num_heads": 3, "num_layers": 2}
    misfits = PRUNED

    def test_every_head_starts_as_the_targets_head(self) -> None:
        draft = find("medusa").Model.build(self.config(), SHAPE, interface(), 0).double()
        data = self.data()
        assert data.last_hidden is not None
        target = data.last_hidden @ interface().lm_head.double().T
        for found in by_anchor(draft, data, 3):
            for (b, j), row in found.items():
                torch.testing.assert_close(row, target[b, j], **ALIGNED)

    def test_no_deeper_than_its_heads(self) -> None:
        draft, data = self.make(), self.data()
        with pytest.raises(DraftError, match="depth 4 for a medusa draft of 3 heads"):
            next(iter(draft.training_logits(data, 4)))
        context = Context(data.tokens, torch.tensor([4, 4, 4]), None, data.last_hidden)
        with pytest.raises(DraftError, match="depth 4 for a medusa draft of 3 heads"):
            draft.propose(draft.open(3, T), context, 4, lambda k, z: z.argmax(-1))


class TestMedusaTrainedHeads(DraftContract):
    kind = "medusa"
    params: ClassVar = {"num_heads": 4, "num_layers": 1, "train_heads": True}


class TestMedusaPruned(DraftContract):
    kind = "medusa"
    params: ClassVar = {"num_heads": 3, "num_layers": 1, "draft_vocab_size": 9}


class TestEagle3(DraftContract):
    kind = "eagle3"
    params: ClassVar = EAGLE3
    misfits = (
        *PRUNED,
        ({"num_heads": 3}, "num_heads 3 on a target of width 8; expected heads of an even number"),
        ({"num_heads": 8}, "num_heads 8 on a target of width 8; expected heads of an even number"),
    )

    def test_embedding_and_head_stay_the_targets(self) -> None:
        draft = find("eagle3").Model.build(self.config(), SHAPE, interface(), 0)
        frozen = {name: p for name, p in draft.named_parameters() if not p.requires_grad}
        assert frozen.keys() == {"embed", "head"}
        assert torch.equal(frozen["embed"], interface().embed)
        assert torch.equal(frozen["head"], interface().lm_head)

    def test_it_is_the_equations_written_out(self) -> None:
        draft, data = self.make(), self.data()
        assert_is_reference(draft, data, self.depths())

    def test_a_cache_with_other_layers_is_refused(self) -> None:
        draft, data = self.make(fused_layers=2), self.data()
        with pytest.raises(DraftError, match=r"3 hidden layers .* expected the 2 that it fuses"):
            next(iter(draft.training_logits(data, 1)))


class TestEagle31(DraftContract):
    """The options of EAGLE-3.1, all on."""

    kind = "eagle3"
    params: ClassVar = {
        **EAGLE3,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "norm_output": True,
        "train_head": True,
        "fused_layers": 2,
        "depth": 3,
    }

    def test_it_is_the_equations_written_out(self) -> None:
        draft, data = self.make(), self.data()
        assert_is_reference(draft, data, self.depths())


class TestEagle3Pruned(DraftContract):
    kind = "eagle3"
    params: ClassVar = {**EAGLE3, "draft_vocab_size": 9}


def assert_is_reference(draft: Any, data: Batch, depth: int) -> None:
    """EAGLE-3 as draft_training.md §3.1 writes it: S·T columns, the first T causal, every later
    block diagonal; rotary positions j + k. Compared where a pair is supervised."""
    config, assert_close = draft.config, torch.testing.assert_close
    found = by_anchor(draft, data, depth)
    for b, row in enumerate(data.tokens):
        assert data.hidden is not None
        num_tokens = len(row)
        g = data.hidden[b].flatten(1)
        f = (rms(g, draft.fc_norm.weight) if config.norm_before_fc else g) @ draft.fc.weight.T
        keys, values = [], []
        for k in range(depth):
            token = row[(torch.arange(num_tokens) + 1 + k).clamp(max=num_tokens - 1)]
            e = rms(draft.embed[token], draft.input_norm.weight)
            h = rms(f, draft.hidden_norm.weight)
            q, key, value = (torch.cat([e, h], -1) @ draft.attention.qkv.weight.T).chunk(3, -1)
            heads = config.num_heads
            q, key = (turn(x, torch.arange(num_tokens) + k, heads=heads) for x in (q, key))
            keys.append(key)
            values.append(value.view(num_tokens, heads, -1))
            causal = torch.ones(num_tokens, num_tokens).tril().bool()
            mask = torch.cat([causal, *[torch.eye(num_tokens).bool()] * k], dim=1)
            scores = torch.einsum("qhc,khc->hqk", q, torch.cat(keys)) / q.shape[-1] ** 0.5
            weight = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            attended = torch.einsum("hqk,khc->qhc", weight, torch.cat(values)).flatten(1)
            residual = h if config.norm_before_residual else f
            r = residual + attended @ draft.attention.out.weight.T
            gate, up = (rms(r, draft.post_norm.weight) @ draft.mlp.gate_up.weight.T).chunk(2, -1)
            out = r + (gate * gate.sigmoid() * up) @ draft.mlp.down.weight.T
            normed = rms(out, draft.norm.weight)
            logits = normed @ draft.head.T
            f = normed if config.norm_output else out
            for (at, j), ours in found[k].items():
                if at == b:
                    assert_close(ours, logits[j], **ALIGNED)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, position: Tensor, *, heads: int) -> Tensor:
    """Rotate channels (c, c + C/2) of every head as complex numbers."""
    x = x.view(len(x), heads, -1)
    half = x.shape[-1] // 2
    # angles are float32 by convention, whatever the model's dtype
    angle = position[:, None].float() * 10_000.0 ** -(torch.arange(half).float() / half)
    unit = torch.complex(angle.cos().double(), angle.sin().double())
    turned = torch.complex(x[..., :half], x[..., half:]) * unit.unsqueeze(1)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_every_kind_is_under_the_contract() -> None:
    covered = {c.kind for c in DraftContract.__subclasses__()}
    assert covered == set(kinds())


def test_unknown_kind_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"draft kind 'lstm'; expected one of eagle3, lm, medusa"):
        find("lstm")


def test_vocabulary_is_that_of_the_target_unless_pruned() -> None:
    assert vocabulary(TestEagle3().make()) == V
    assert vocabulary(TestEagle3Pruned().make()) == 9
