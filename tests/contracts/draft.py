"""What every draft promises: subclass `DraftContract`, give a config, inherit every check.

The batch is ragged, with two turns in one row and padding of its own; features are random, in
float64, so that an index off by one cannot hide in a tolerance.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.draft import Context, Draft, find
from pipeline.interface import Interface, Shape
from pipeline.unroll import Unrolled
from storage.errors import ConfigError, DraftError

V, D, T, DEPTH = 23, 8, 14, 3
SHAPE = Shape(vocab_size=V, hidden_size=D)
TURNS = (
    (-1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1),
    (-1, -1, -1, -1, 0, 0, 0, 0),
)
EXACT = {"rtol": 0.0, "atol": 1e-12}  # the same arithmetic in another shape, float64
ALIGNED = {"rtol": 0.0, "atol": 1e-9}  # other kernels on the same path, float64 (issue 4)


def interface(seed: int = 7) -> Interface:
    """A target's embedding, head and norm, random."""
    g = torch.Generator().manual_seed(seed)
    embed, head = (torch.randn(V, D, generator=g) for _ in range(2))
    return Interface(embed=embed, lm_head=head, norm=torch.ones(D), norm_eps=1e-6)


def batch(num_layers: int, *, turns: tuple[tuple[int, ...], ...] = TURNS, pad: int = 0) -> Batch:
    """A ragged float64 batch with random tokens and features; `pad` more columns of padding."""
    width = max(map(len, turns)) + pad
    g = torch.Generator().manual_seed(11)
    rows = [torch.randint(V, (T,), generator=g) for _ in turns]
    hidden = [torch.randn(T, num_layers, D, generator=g, dtype=torch.float64) for _ in turns]
    last = [torch.randn(T, D, generator=g, dtype=torch.float64) for _ in turns]

    def stack(parts: list[Tensor], fill: float) -> Tensor:
        out = torch.full((len(turns), width, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)
        for b, part in enumerate(parts):
            out[b, : len(turns[b])] = part[: len(turns[b])]
        return out

    return Batch(
        ids=tuple(map(str, range(len(turns)))),
        domains=("",) * len(turns),
        tokens=stack(rows, 0),
        length=torch.tensor([len(t) for t in turns]),
        turn=stack([torch.tensor(t) for t in turns], -1),
        token_logp=torch.zeros(len(turns), width),
        law_row=torch.zeros(len(turns), width, dtype=torch.int64),
        law=None,
        hidden=stack(hidden, 0.0) if num_layers else None,
        last_hidden=stack(last, 0.0),
    )


def vocabulary(draft: Draft) -> int:
    """Vd."""
    return V if draft.d2t is None else len(draft.d2t)


def by_anchor(draft: Draft, data: Batch, depth: int) -> list[dict[tuple[int, int], Tensor]]:
    """[depth] of (row, j) -> logits [Vd], whatever the padding of the batch."""
    width = data.tokens.shape[1]
    found = []
    with torch.no_grad():
        for k, logits in enumerate(draft.training_logits(data, depth)):
            anchors = data.pairs(k).anchor.tolist()
            assert logits.shape == (len(anchors), vocabulary(draft))
            found.append({divmod(a, width): row for a, row in zip(anchors, logits, strict=True)})
    return found


class Forced:
    """A `choose` that picks the tokens that really follow, and counts that it was asked."""

    def __init__(self, tokens: Tensor, length: Tensor) -> None:
        self.tokens, self.length, self.asked = tokens, length, 0

    def __call__(self, depth: int, logits: Tensor) -> Tensor:
        assert depth == self.asked
        self.asked += 1
        at = (self.length + depth).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens.gather(1, at[:, None])[:, 0]


class DraftContract:
    """Subclass with `kind` and `params` (a section of `drafts:` that fits V = 23, D = 8)."""

    kind: str
    params: dict[str, Any]
    misfits: tuple[tuple[dict[str, Any], str], ...] = ()
    """Changes of `params` that do not fit the target, and the sentence that says so."""

    def config(self, **over: Any) -> Any:
        params = {"kind": self.kind, "lr_scale": 1.0, "steps_scale": 1.0, **self.params, **over}
        return parse("drafts.x", params, find(self.kind).Config)

    def d2t(self, config: Any) -> Tensor | None:
        size = getattr(config, "draft_vocab_size", None)
        return None if size is None else torch.arange(size) * 2

    def make(self, *, seed: int = 0, **over: Any) -> Draft:
        """A float64 draft whose every trainable matrix is far from zero."""
        config = self.config(**over)
        d2t = self.d2t(config)
        draft: Draft = find(self.kind).Model.build(config, SHAPE, interface(), seed, d2t=d2t)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in draft.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=g) * 0.3)
        return draft.double()

    def needs(self) -> Any:
        return find(self.kind).Model.needs(self.config())

    def data(self, **over: Any) -> Batch:
        return batch(self.needs().num_layers, **over)

    def depths(self) -> int:
        """How deep the checks unroll: beyond the training depth where the draft may."""
        limit = find(self.kind).Model.max_depth(self.config())
        return DEPTH if limit is None else min(DEPTH, limit)

    def expected(self, draft: Draft, data: Batch) -> list[dict[tuple[int, int], Tensor]]:
        """Training logits of every depth; a shifting draft's deeper ones are its own shifted."""
        found = by_anchor(draft, data, self.depths())
        if not draft.shifts:
            return found
        return [
            {(b, j - k): row for (b, j), row in found[0].items() if j - k >= 0}
            for k in range(self.depths())
        ]

    def rounds(
        self, draft: Draft, data: Batch, rows: list[int], steps: list[list[int]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Propose at successive committed lengths; yields the anchors and the logits [B, γ, V].

        What is not yet known to the target is spoiled: tokens from `length` on, features from
        `length` − 1 on.
        """
        gamma, width = self.depths(), data.tokens.shape[1]
        state = draft.open(len(rows), width + gamma)
        index = torch.tensor(rows)
        for lengths in steps:
            length = torch.tensor(lengths)
            position = torch.arange(width)
            tokens = data.tokens[index].clone()
            tokens[position >= length[:, None]] = V - 1
            unknown = position >= length[:, None] - 1

            def spoil(x: Tensor | None, unknown: Tensor = unknown) -> Tensor | None:
                if x is None:
                    return None
                mask = unknown.view(*unknown.shape, *([1] * (x.ndim - 2)))
                return x[index].masked_fill(mask, torch.nan)

            context = Context(tokens, length, spoil(data.hidden), spoil(data.last_hidden))
            forced = Forced(data.tokens[index], length)
            logits = draft.propose(state, context, gamma, forced)
            assert forced.asked == gamma
            assert logits.shape == (len(rows), gamma, vocabulary(draft))
            yield [n - 2 for n in lengths], logits

    def assert_aligned(self, draft: Draft, rows: list[int], steps: list[list[int]]) -> None:
        data = self.data()
        expected = self.expected(draft, data)
        compared = 0
        for anchors, logits in self.rounds(draft, data, rows, steps):
            for i, (b, j) in enumerate(zip(rows, anchors, strict=True)):
                for k in range(self.depths()):
                    if (b, j) in expected[k]:
                        torch.testing.assert_close(logits[i, k], expected[k][b, j], **ALIGNED)
                        compared += 1
        assert compared >= len(steps)

    # decoding equals training

    def test_decode_logits_equal_training_logits_at_every_anchor(self) -> None:
        draft = self.make()
        for length in range(3, T):
            self.assert_aligned(draft, [0], [[length]])

    def test_decode_logits_equal_across_rounds_of_ragged_rows(self) -> None:
        # accepted counts 0 … γ, other in every row; a row that has finished stands still
        steps = [[4, 3, 6], [5, 4, 7], [8, 8, 7], [9, 9, 7], [12, 10, 7]]
        self.assert_aligned(self.make(), [0, 1, 2], steps)

    def test_decode_logits_equal_after_rows_are_selected(self) -> None:
        draft, data = self.make(), self.data()
        expected, gamma = self.expected(draft, data), self.depths()
        state = draft.open(3, T + gamma)
        first = torch.tensor([8, 7, 6])
        context = Context(data.tokens, first, data.hidden, data.last_hidden)
        wrong = torch.full((3,), V - 1)  # every draft is rejected
        draft.propose(state, context, gamma, lambda depth, logits: wrong)
        rows = torch.tensor([1, 0])
        state.select(rows)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        length = torch.tensor([9, 9])
        context = Context(data.tokens[rows], length, pick(data.hidden), pick(data.last_hidden))
        forced = Forced(data.tokens[rows], length)
        logits = draft.propose(state, context, gamma, forced)
        torch.testing.assert_close(logits[0, 0], expected[0][1, 7], **ALIGNED)
        for k in range(gamma):
            torch.testing.assert_close(logits[1, k], expected[k][0, 7], **ALIGNED)

    def test_what_stands_beyond_the_committed_tokens_is_never_taken_for_fed(self) -> None:
        # the caller's buffer may already hold the truth there; γ = 1 feeds none of its drafts
        draft, data = self.make(), self.data()
        expected, state = self.expected(draft, data), draft.open(1, T)
        for n in (5, 7, 9):
            length = torch.tensor([n])
            context = Context(
                data.tokens[:1], length, _first(data.hidden), _first(data.last_hidden)
            )
            logits = draft.propose(state, context, 1, Forced(data.tokens[:1], length))
            torch.testing.assert_close(logits[0, 0], expected[0][0, n - 2], **ALIGNED)

    # what a logit may depend on

    def test_no_logit_sees_a_later_token_or_feature(self) -> None:
        draft, data = self.make(), self.data()
        before = by_anchor(draft, data, self.depths())
        for spoiled in range(3, T):
            after = by_anchor(draft, _spoil(data, spoiled), self.depths())
            for k, (a, b) in enumerate(zip(before, after, strict=True)):
                # depth k at anchor j reads tokens up to j + 1 + k and features up to j
                for row, j in a:
                    if j + 1 + k < spoiled:
                        torch.testing.assert_close(a[row, j], b[row, j], **EXACT)

    def test_no_logit_sees_a_feature_behind_its_anchor(self) -> None:
        draft, data = self.make(), self.data()
        before = by_anchor(draft, data, self.depths())
        for spoiled in range(3, T):
            changed = replace(_spoil(data, spoiled), tokens=data.tokens)
            after = by_anchor(draft, changed, self.depths())
            for a, b in zip(before, after, strict=True):
                for row, j in a:
                    if j < spoiled:
                        torch.testing.assert_close(a[row, j], b[row, j], **EXACT)

    def test_batch_composition_and_padding_change_nothing(self) -> None:
        draft = self.make()
        whole = by_anchor(draft, self.data(), self.depths())
        padded = by_anchor(draft, self.data(pad=5), self.depths())
        data = self.data()
        for k in range(len(whole)):
            assert whole[k].keys() == padded[k].keys()
            for key in whole[k]:
                torch.testing.assert_close(whole[k][key], padded[k][key], **EXACT)
        for b in range(len(TURNS)):
            alone = by_anchor(draft, _rows(data, [b]), self.depths())
            for k in range(len(whole)):
                for (_, j), row in alone[k].items():
                    torch.testing.assert_close(row, whole[k][b, j], **EXACT)

    def test_sequences_packed_into_a_row_see_nothing_of_each_other(self) -> None:
        draft = self.make()
        # the second row's first token is supervised: it has no anchor, packed or not
        data = self.data(turns=(TURNS[0], (0, 0, 0, 0, 0, 0, 0), *TURNS[1:]))
        alone = by_anchor(draft, data, self.depths())
        packed, slots = _packed(data, pad=3)
        together = by_anchor(draft, packed, self.depths())
        for one, joined in zip(alone, together, strict=True):
            moved = {(0, slots[b] + j): row for (b, j), row in one.items()}
            assert moved.keys() == joined.keys()
            for key, row in moved.items():
                torch.testing.assert_close(joined[key], row, **ALIGNED)

    # gradients and parameters

    def test_activations_made_again_change_no_gradient(self) -> None:
        draft, data = self.make(), self.data()
        depth = find(self.kind).Model.loss_depth(self.config())
        found, kept = [], []
        for recompute in (False, True):
            draft.recompute = recompute
            draft.zero_grad()
            bytes_kept = Kept()
            with bytes_kept:
                total = sum((x * x).sum() for x in draft.training_logits(data, depth))
            assert isinstance(total, Tensor)
            total.backward()
            found.append([p.grad for p in draft.parameters() if p.requires_grad])
            kept.append(bytes_kept.total)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        assert kept[1] <= kept[0]
        if isinstance(draft, Unrolled):
            assert kept[1] < 0.8 * kept[0]

    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        draft = self.make()
        depth = find(self.kind).Model.loss_depth(self.config())
        g = torch.Generator().manual_seed(5)
        total = torch.zeros((), dtype=torch.float64)
        for logits in draft.training_logits(self.data(), depth):
            weight = torch.randn(logits.shape, generator=g, dtype=torch.float64)
            total = total + (logits * weight).sum()
        total.backward()
        for name, p in draft.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                assert p.grad.abs().sum() > 0, name
            else:
                assert p.grad is None, name

    def test_build_is_a_function_of_the_seed_alone(self) -> None:
        config = self.config()
        build = find(self.kind).Model.build
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        one = build(config, SHAPE, interface(), 4, d2t=self.d2t(config)).state_dict()
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(2)
        two = build(config, SHAPE, interface(), 4, d2t=self.d2t(config)).state_dict()
        for name in one:
            assert torch.equal(one[name], two[name]), name

    def test_trainable_state_carries_the_whole_draft(self) -> None:
        draft = self.make()
        config = self.config()
        other = find(self.kind).Model.build(config, SHAPE, interface(), 9, d2t=self.d2t(config))
        other.double()
        stored = draft.trainable()
        missing, unexpected = other.load_state_dict(stored, strict=False)
        assert not unexpected
        assert not set(missing) & set(other.trainable())
        data = self.data()
        for a, b in zip(
            by_anchor(draft, data, self.depths()),
            by_anchor(other, data, self.depths()),
            strict=True,
        ):
            assert all(torch.equal(a[key], b[key]) for key in a)

    def test_frozen_parameters_are_not_stored(self) -> None:
        draft = self.make()
        frozen = {name for name, p in draft.named_parameters() if not p.requires_grad}
        assert not frozen & set(draft.trainable())

    def test_a_pruned_head_is_the_rows_of_the_whole_one(self) -> None:
        config = self.config()
        d2t = self.d2t(config)
        build = find(self.kind).Model.build
        whole = self.config(draft_vocab_size=None) if d2t is not None else config
        data, depth = self.data(), self.depths()
        pruned = build(config, SHAPE, interface(), 1, d2t=d2t).double()
        full = build(whole, SHAPE, interface(), 1).double()
        kept = torch.arange(V) if d2t is None else d2t
        for a, b in zip(by_anchor(pruned, data, depth), by_anchor(full, data, depth), strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key][kept], **EXACT)

    def test_training_never_writes_into_the_interface(self) -> None:
        config, shared = self.config(), interface()
        draft = find(self.kind).Model.build(config, SHAPE, shared, 0, d2t=self.d2t(config))
        with torch.no_grad():
            for p in draft.parameters():
                if p.requires_grad:
                    p.add_(1.0)
        assert torch.equal(shared.embed, interface().embed)
        assert torch.equal(shared.lm_head, interface().lm_head)

    # edges

    def test_depth_of_one_is_the_first_of_many(self) -> None:
        draft, data = self.make(), self.data()
        one = by_anchor(draft, data, 1)
        many = by_anchor(draft, data, self.depths())
        assert len(one) == 1
        assert len(many) == (1 if draft.shifts else self.depths())
        for key, row in one[0].items():
            torch.testing.assert_close(row, many[0][key], **EXACT)

    def test_a_batch_without_supervision_has_no_logits(self) -> None:
        data = self.data(turns=((-1,) * 6, (-1, -1, -1)))
        for logits in self.make().training_logits(data, self.depths()):
            assert logits.shape[0] == 0

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        for over, sentence in self.misfits:
            config = self.config(**over)
            with pytest.raises(DraftError, match=sentence):
                find(self.kind).Model.build(config, SHAPE, interface(), 0)

    def test_another_targets_interface_is_refused(self) -> None:
        if self.needs().interface:
            other = replace(interface(), lm_head=torch.zeros(V, D + 2))
            with pytest.raises(DraftError, match=r"LM head of shape \[23, 10\].*\[23, 8\]"):
                find(self.kind).Model.build(self.config(), SHAPE, other, 0)
            with pytest.raises(DraftError, match=f"no target interface .* kind {self.kind}"):
                find(self.kind).Model.build(self.config(), SHAPE, None, 0)
        else:
            config = self.config()
            build = find(self.kind).Model.build
            assert build(config, SHAPE, None, 0, d2t=self.d2t(config)) is not None

    def test_features_that_the_cache_lacks_are_named(self) -> None:
        draft, data = self.make(), self.data()
        if self.needs().num_layers:
            with pytest.raises(DraftError, match=r"set capture\.hidden_layers"):
                next(iter(draft.training_logits(replace(data, hidden=None), 1)))
        if self.needs().last_hidden:
            with pytest.raises(DraftError, match=r"set capture\.last_hidden"):
                next(iter(draft.training_logits(replace(data, last_hidden=None), 1)))
        without = replace(
            data,
            hidden=data.hidden if self.needs().num_layers else None,
            last_hidden=data.last_hidden if self.needs().last_hidden else None,
        )
        assert len(by_anchor(draft, without, 1)) == 1  # and it reads nothing that it does not name

    def test_an_unknown_parameter_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"drafts\.x\.wings is unknown"):
            self.config(wings=2)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for its backward, each storage once."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.held: list[Tensor] = []
        super().__init__(self._keep, lambda x: x)

    def _keep(self, x: Tensor) -> Tensor:
        self.held.append(x)  # so that no address is used twice
        self.seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    @property
    def total(self) -> int:
        return sum(self.seen.values())


def _packed(data: Batch, *, pad: int) -> tuple[Batch, list[int]]:
    """All sequences of a batch in one row, and where each begins in it."""
    lengths = data.length.tolist()
    slots = [sum(lengths[:b]) for b in range(len(lengths))]
    width = sum(lengths) + pad

    def join(x: Tensor | None, fill: float) -> Any:
        if x is None:
            return None
        out = torch.full((1, width, *x.shape[2:]), fill, dtype=x.dtype)
        for b, (at, n) in enumerate(zip(slots, lengths, strict=True)):
            out[0, at : at + n] = x[b, :n]
        return out

    first = torch.arange(width)[None].clone()
    turn = data.turn.clone()
    for b, (at, n) in enumerate(zip(slots, lengths, strict=True)):
        first[0, at : at + n] = at
        turn[b] += 10 * b * (turn[b] >= 0)
    return replace(
        data,
        tokens=join(data.tokens, 0),
        length=data.length.sum()[None],
        turn=join(turn, -1),
        token_logp=join(data.token_logp, 0.0),
        law_row=join(data.law_row, 0),
        hidden=join(data.hidden, 0.0),
        last_hidden=join(data.last_hidden, 0.0),
        first=first,
    ), slots


def _first(x: Tensor | None) -> Tensor | None:
    """Row 0 alone."""
    return None if x is None else x[:1]


def _spoil(data: Batch, start: int) -> Batch:
    """The batch with other tokens and features from position `start` on."""
    g = torch.Generator().manual_seed(start)
    tokens = data.tokens.clone()
    tokens[:, start:] = torch.randint(V, tokens[:, start:].shape, generator=g)

    def other(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.clone()
        x[:, start:] = torch.randn(x[:, start:].shape, generator=g, dtype=x.dtype)
        return x

    return replace(
        data, tokens=tokens, hidden=other(data.hidden), last_hidden=other(data.last_hidden)
    )


def _rows(data: Batch, rows: list[int]) -> Batch:
    """The batch of these rows, cut to the longest of them."""
    width = int(data.length[rows].max())

    def cut(x: Tensor | None) -> Any:
        return None if x is None else x[rows, :width]

    return replace(
        data,
        ids=tuple(data.ids[r] for r in rows),
        domains=tuple(data.domains[r] for r in rows),
        tokens=cut(data.tokens),
        length=data.length[rows],
        turn=cut(data.turn),
        token_logp=cut(data.token_logp),
        law_row=cut(data.law_row),
        hidden=cut(data.hidden),
        last_hidden=cut(data.last_hidden),
    )
