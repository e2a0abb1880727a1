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


class TestEagle3SharedKeys(DraftContract):
    """Shared key heads, heads that do not fill the width, a norm a captured layer."""

    kind = "eagle3"
    params: ClassVar = {
        **EAGLE3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "rope_theta": 500.0,
        "norm_eps": 1e-3,
        "fc_norm": True,
    }
    misfits = (
        ({"num_kv_heads": 3}, "num_kv_heads 3 for num_heads 4; expected a divisor"),
        ({"head_size": 5}, "head_size 5; expected heads of an even number of channels; correct"),
    )

    def test_it_is_the_equations_written_out(self) -> None:
        draft, data = self.make(), self.data()
        assert_is_reference(draft, data, self.depths())

    def test_two_norms_before_fc_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="norm_before_fc and fc_norm exclude each other"):
            self.config(norm_before_fc=True)


class TestEagle3Pruned(DraftContract):
    kind = "eagle3"
    params: ClassVar = {**EAGLE3, "draft_vocab_size": 9}


class TestMLP(DraftContract):
    kind = "mlp"
    params: ClassVar = {
        "num_heads": 3,
        "inner_size": 10,
        "tie_weights": False,
        "scale_input": True,
    }
    misfits = PRUNED

    def test_it_is_the_equations_written_out(self) -> None:
        assert_is_mlp(self.make(), self.data())

    def test_no_deeper_than_its_heads(self) -> None:
        draft, data = self.make(), self.data()
        with pytest.raises(DraftError, match="depth 4 for a mlp draft of 3 heads"):
            next(iter(draft.training_logits(data, 4)))
        context = Context(data.tokens, torch.tensor([4, 4, 4]), None, data.last_hidden)
        with pytest.raises(DraftError, match="depth 4 for a mlp draft of 3 heads"):
            draft.propose(draft.open(3, T), context, 4, lambda k, z: z.argmax(-1))


class TestMLPTied(DraftContract):
    kind = "mlp"
    params: ClassVar = {
        "num_heads": 4,
        "inner_size": 6,
        "tie_weights": True,
        "scale_input": False,
        "draft_vocab_size": 9,
    }

    def test_it_is_the_equations_written_out(self) -> None:
        assert_is_mlp(self.make(), self.data())


def assert_is_mlp(draft: Any, data: Batch) -> None:
    """draft_training.md §3.3, stage by stage and anchor by anchor."""
    config, found = draft.config, by_anchor(draft, data, draft.config.num_heads)
    n, inner, tied = config.num_heads, config.inner_size, config.tie_weights
    state_weight = 0.5 ** (0.5 / n)
    token_weight = ((1 - state_weight**2) * inner / 2) ** 0.5
    assert data.last_hidden is not None
    for b, j in found[0]:
        s = data.last_hidden[b, j]
        if config.scale_input:
            s = rms(s, torch.ones(())) / 2**0.5
        for k in range(n):
            at = 0 if tied else k
            p = draft.first if k == 0 else draft.later[0 if tied else k - 1]
            if j + 1 + k >= len(data.tokens[b]):
                break
            token = draft.embed[at][data.tokens[b, j + 1 + k]]
            z = p @ s + token_weight / state_weight * token
            z = rms(z, draft.norm_weight[at]) + draft.norm_bias[at]
            s = z * 0.5 * (1 + torch.erf(z / 2**0.5))
            if (b, j) in found[k]:
                torch.testing.assert_close(found[k][b, j], draft.head[at] @ s, **ALIGNED)


MTP = {
    "depth": 2,
    "init": "fresh",
    "attention": "step0",
    "num_heads": 2,
    "num_kv_heads": None,
    "head_size": None,
    "intermediate_size": 12,
    "qk_norm": False,
    "qkv_bias": False,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-6,
}


class TestMTP(DraftContract):
    kind = "mtp"
    params: ClassVar = MTP
    misfits = (
        *PRUNED,
        ({"num_heads": 3}, "num_heads 3 on a target of width 8; expected heads of an even number"),
        ({"init": "target"}, "a target without a multi-token-prediction module .* set init: fresh"),
    )

    def test_it_is_the_equations_written_out(self) -> None:
        draft, data = self.make(), self.data()
        assert_is_mtp(draft, data, self.depths())

    def test_embedding_and_head_stay_the_targets(self) -> None:
        draft = find("mtp").Model.build(self.config(), SHAPE, interface(), 0)
        assert {n for n, p in draft.named_parameters() if not p.requires_grad} == {"embed", "head"}

    def test_a_causal_pass_a_step_trains_otherwise_beyond_depth_0(
        self,
    ) -> None:
        draft, data = self.make(), self.data()
        ours = by_anchor(draft, data, self.depths())
        draft.config = self.config(attention="per_step")
        theirs = by_anchor(draft, data, self.depths())
        assert_is_mtp(draft, data, self.depths())
        for key, row in ours[0].items():
            torch.testing.assert_close(row, theirs[0][key], **ALIGNED)
        assert any((ours[1][key] - theirs[1][key]).abs().max() > 1e-3 for key in ours[1])


class TestMTPQwen3(DraftContract):
    """As Qwen3 has it: normed q and k, shared keys, heads wider than the model; biases as Qwen2."""

    kind = "mtp"
    params: ClassVar = {
        **MTP,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "qk_norm": True,
        "qkv_bias": True,
        "rope_theta": 300.0,
        "norm_eps": 1e-3,
        "draft_vocab_size": 9,
    }

    def test_it_is_the_equations_written_out(self) -> None:
        draft, data = self.make(), self.data()
        assert_is_mtp(draft, data, self.depths())


class TestMTPDeepSeek(DraftContract):
    """Latent attention, keys and values of different size, and routed experts."""

    kind = "mtp"
    params: ClassVar = {
        **MTP,
        "intermediate_size": None,
        "latent": {
            "query_rank": 6,
            "key_rank": 5,
            "rotary_size": 4,
            "plain_size": 3,
            "value_size": 5,
            "interleaved": True,
        },
        "experts": {
            "count": 6,
            "per_token": 2,
            "groups": 3,
            "groups_per_token": 2,
            "inner_size": 5,
            "shared": 2,
            "scale": 1.5,
            "normed": True,
        },
    }


def assert_is_mtp(draft: Any, data: Batch, depth: int) -> None:
    """draft_training.md §3.4 with every index as a query: the first T columns causal, later blocks
    diagonal, or each step's own causal block alone."""
    config, found = draft.config, by_anchor(draft, data, depth)
    eps, own = config.norm_eps, config.attention == "per_step"
    for b, row in enumerate(data.tokens):
        assert data.last_hidden is not None
        h, num_tokens = data.last_hidden[b], len(row)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for k in range(depth):
            token = row[(torch.arange(num_tokens) + 1 + k).clamp(max=num_tokens - 1)]
            e = rms(draft.embed[token], draft.token_norm.weight, eps=eps)
            both = torch.cat([e, rms(h, draft.hidden_norm.weight, eps=eps)], -1)
            u = both @ draft.project.weight.T
            x = rms(u, draft.input_norm.weight, eps=eps)
            position = torch.arange(num_tokens) + (0 if own else k)
            q, key, value = project(draft, x, position)
            if own:
                keys, values = [], []
            keys.append(key)
            values.append(value)
            causal = torch.ones(num_tokens, num_tokens).tril().bool()
            blocks = [causal, *[torch.eye(num_tokens).bool()] * (len(keys) - 1)]
            scores = torch.einsum("qhc,khc->hqk", q, torch.cat(keys)) / q.shape[-1] ** 0.5
            weight = scores.masked_fill(~torch.cat(blocks, dim=1), -torch.inf).softmax(-1)
            attended = torch.einsum("hqk,khc->qhc", weight, torch.cat(values)).flatten(1)
            r = u + attended @ draft.attention.out.weight.T
            h = rms(
                r + swiglu(draft, rms(r, draft.post_norm.weight, eps=eps)),
                draft.norm.weight,
                eps=eps,
            )
            logits = h @ draft.head.T
            for (at, j), ours in found[k].items():
                if at == b:
                    torch.testing.assert_close(ours, logits[j], **ALIGNED)


def assert_is_reference(draft: Any, data: Batch, depth: int) -> None:
    """EAGLE-3 as draft_training.md §3.1 writes it: S·T columns, the first T causal, every later
    block diagonal; rotary positions j + k. Compared where a pair is supervised."""
    config, assert_close = draft.config, torch.testing.assert_close
    found = by_anchor(draft, data, depth)
    for b, row in enumerate(data.tokens):
        assert data.hidden is not None
        num_tokens = len(row)
        g = data.hidden[b].flatten(1)
        if config.norm_before_fc:
            g = rms(g, draft.fused_norm.weight, eps=config.norm_eps)
        if config.fc_norm:
            parts = zip(data.hidden[b].unbind(1), draft.layer_norms, strict=True)
            g = torch.cat([rms(x, norm.weight, eps=config.norm_eps) for x, norm in parts], -1)
        f = g @ draft.fc.weight.T
        keys, values = [], []
        for k in range(depth):
            token = row[(torch.arange(num_tokens) + 1 + k).clamp(max=num_tokens - 1)]
            e = rms(draft.embed[token], draft.input_norm.weight, eps=config.norm_eps)
            h = rms(f, draft.hidden_norm.weight, eps=config.norm_eps)
            q, key, value = project(draft, torch.cat([e, h], -1), torch.arange(num_tokens) + k)
            keys.append(key)
            values.append(value)
            causal = torch.ones(num_tokens, num_tokens).tril().bool()
            mask = torch.cat([causal, *[torch.eye(num_tokens).bool()] * k], dim=1)
            scores = torch.einsum("qhc,khc->hqk", q, torch.cat(keys)) / q.shape[-1] ** 0.5
            weight = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            attended = torch.einsum("hqk,khc->qhc", weight, torch.cat(values)).flatten(1)
            residual = h if config.norm_before_residual else f
            r = residual + attended @ draft.attention.out.weight.T
            out = r + swiglu(draft, rms(r, draft.post_norm.weight, eps=config.norm_eps))
            normed = rms(out, draft.norm.weight, eps=config.norm_eps)
            logits = normed @ draft.head.T
            f = normed if config.norm_output else out
            for (at, j), ours in found[k].items():
                if at == b:
                    assert_close(ours, logits[j], **ALIGNED)


def project(draft: Any, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, H, C] of every head, shared keys repeated."""
    config, weight = draft.config, draft.attention.qkv.weight
    heads, shared = config.num_heads, config.num_kv_heads or config.num_heads
    size = config.head_size or x.shape[-1] // (heads * (1 if config.kind == "mtp" else 2))
    rows = x @ weight.T + (0 if draft.attention.qkv.bias is None else draft.attention.qkv.bias)
    q, k, v = (
        part.view(len(x), -1, size)
        for part in rows.split([heads * size, shared * size, shared * size], -1)
    )
    if draft.attention.q_norm is not None:
        q = rms(q, draft.attention.q_norm.weight, eps=config.norm_eps)
        k = rms(k, draft.attention.k_norm.weight, eps=config.norm_eps)
    q, k = (turn(part, position, theta=config.rope_theta) for part in (q, k))
    serves = [h * shared // heads for h in range(heads)]
    return q, k[:, serves], v[:, serves]


def swiglu(draft: Any, x: Tensor) -> Tensor:
    gate, up = (x @ draft.mlp.gate_up.weight.T).chunk(2, -1)
    out: Tensor = (gate * gate.sigmoid() * up) @ draft.mlp.down.weight.T
    return out


def rms(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, position: Tensor, *, theta: float) -> Tensor:
    """Rotate channels (c, c + C/2) of every head as complex numbers."""
    half = x.shape[-1] // 2
    # angles are float32 by convention, whatever the model's dtype
    angle = position[:, None].float() * theta ** -(torch.arange(half).float() / half)
    unit = torch.complex(angle.cos().double(), angle.sin().double())
    turned = torch.complex(x[..., :half], x[..., half:]) * unit.unsqueeze(1)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_every_kind_is_under_the_contract() -> None:
    covered = {c.kind for c in DraftContract.__subclasses__()}
    assert covered == set(kinds())


def test_unknown_kind_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="'lstm'; expected one of eagle3, lm, medusa, mlp, mtp"):
        find("lstm")


def test_vocabulary_is_that_of_the_target_unless_pruned() -> None:
    assert vocabulary(TestEagle3().make()) == V
    assert vocabulary(TestEagle3Pruned().make()) == 9
