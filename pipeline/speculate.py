"""Lossless speculative decoding of a chain of γ drafted tokens, batched over prompts.

A round drafts γ tokens, passes [last committed, d_1 … d_γ] through the target once, keeps a prefix
of the drafts and adds one token of the target's own (Leviathan et al. 2023, Chen et al. 2023; the
residual law (p − q)₊). p and q are laws as served: temperature, then top-k, then top-p, of the
target's logits and of the draft's alike; an argmax draft is a point mass q. The text follows the
served p whatever q is (MATHS (60)). The first response token is the target's own sample from the
prefill and belongs to no round. γ is the same for every round: the last one counts whole, as in
`pipeline.replay`, but nothing is emitted beyond an end-of-sequence token or the length limit.

Every random number comes in as `uniforms`, a row of them for each prompt, so that what a prompt
gets depends neither on the batch it shares nor on a global generator. Plain decoding is the same
loop with γ = 0. Probabilities are float64.

Dims: B rows, P prompt tokens, W width of a row, G = γ drafted tokens, V vocabulary, U uniforms of
a row. Knows no file, no cache and no kind of draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from pipeline.draft import Context, Draft, State
from pipeline.features import stored
from pipeline.serve import Serving, serve_logits
from pipeline.session import Session, Step
from pipeline.target import Target


@dataclass(frozen=True)
class Rules:
    """How to decode; equal rules and uniforms give equal text."""

    gamma: int
    """γ, 0 for plain decoding."""
    temperature: float
    """Of target and draft alike, as are the cuts below; 0 takes the argmax of both."""
    max_new_tokens: int
    """Length limit of a response, its first token included."""
    eos_ids: tuple[int, ...]
    top_k: int | None = None
    top_p: float | None = None
    drafting: Literal["sampled", "greedy"] = "sampled"
    """At T > 0: draft from q, or always argmax q (then q is a point mass)."""
    layers: tuple[int, ...] = ()
    """Layers whose hidden states the draft reads."""
    last_hidden: bool = False
    """Whether the draft reads the states after the final norm."""
    features: Literal["cache", "exact"] = "cache"
    """`cache`: hidden states pass through the dtype that the cache stores them in."""
    hidden_dtype: str = "bfloat16"
    last_hidden_dtype: str = "bfloat16"
    trace: bool = False
    """Keep what each round drafted and why it was kept or not (`Decoded.trace`)."""

    @property
    def num_uniforms(self) -> int:
        """U: one for the first token, then 2γ + 1 a round (γ drafts, γ verdicts, one token)."""
        return 1 + max(self.max_new_tokens - 1, 0) * (2 * self.gamma + 1)

    def law(self, logits: Tensor) -> Tensor:
        """[..., V] float64: the law that is served where the model's logits are these, T > 0."""
        if self.top_k is None and self.top_p is None:
            return probabilities(logits, self.temperature)
        serving = Serving(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return serve_logits(logits.flatten(0, -2), serving).exp().view(logits.shape)


@dataclass(frozen=True)
class Drafted:
    """One drafted token and its verdict."""

    token: int
    p: float
    """Under the target's law before it; at T = 0 under the law at T = 1, for reading."""
    q: float | None
    """Under the law that it was drawn from; None at T = 0."""
    alpha: float | None
    """Σ_v min(p_v, q_v) of those two laws, the chance to keep any draft; None at T = 0."""
    uniform: float | None
    """u: kept where u < p/q; None at T = 0, where it is kept if it is the target's argmax."""
    kept: bool


@dataclass(frozen=True)
class Round:
    """One target pass."""

    start: int
    """Response tokens before it."""
    drafts: tuple[Drafted, ...]
    token: int
    """The target's own, after the drafts that were kept."""
    p: float
    """Of that token, as in `Drafted`."""
    emitted: int
    """Tokens that the response took of it: fewer than kept + 1 where it ended."""


@dataclass
class Decoded:
    """One prompt's response and the rounds that made it."""

    tokens: list[int]
    """The response, its first token and its end-of-sequence token included."""
    rounds: int = 0
    drafted: int = 0
    kept: list[int] = field(default_factory=list)
    """[γ] rounds whose draft of depth k was accepted and emitted."""
    trace: list[Round] = field(default_factory=list)
    """Every round, where `Rules.trace` asks for it."""

    @property
    def accepted(self) -> int:
        """Emitted tokens that were drafts."""
        return sum(self.kept)

    @property
    def num_counted(self) -> int:
        """Response tokens after the first: the numerator of τ."""
        return len(self.tokens) - 1


@dataclass
class Timing:
    """Measured seconds of a batch; no result depends on them."""

    steps: int = 0
    """Rounds of the batch: passes of the target after the prefill."""
    draft_s: float = 0.0
    target_s: float = 0.0
    rounds_s: float = 0.0
    """All rounds, sampling and bookkeeping included; the prefill not."""


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) over the last dim, float64."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def sample(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] the token at quantile u of unnormalised weights; one of weight zero is never taken."""
    cdf_BV = weight_BV.cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    # u < 1, yet u · total may round up to total, beyond which there is no token
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    quantile_B1 = torch.minimum(uniform_B[:, None] * total_B1, below_B1)
    return torch.searchsorted(cdf_BV, quantile_B1, right=True)[:, 0]


def verify(
    p_BGV: Tensor, q_BGV: Tensor, drafted_BG: Tensor, uniforms_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """Token verification: how many drafts to keep and which token follows them, [B] and [B].

    p: [B, γ+1, V] the target's laws before each draft and after the last; q: [B, γ, V] the laws
    that the drafts were drawn from; drafted: [B, γ] int64; uniforms: [B, γ+1] in [0, 1), the last
    for the token that follows. All probabilities float64. Draft i is kept where u_i < p/q; the
    first that is not is replaced by a sample of (p − q)₊, and after γ kept comes one of p.
    """
    rows, gamma = len(drafted_BG), drafted_BG.shape[1]
    at_BG1 = drafted_BG[..., None]
    p_BG = p_BGV[:, :gamma].gather(2, at_BG1)[..., 0]
    q_BG = q_BGV.gather(2, at_BG1)[..., 0]
    # u < p/q without the division: q = 0 is never drafted, and p = 0 is never kept
    keep_BG = uniforms_BG[:, :gamma] * q_BG < p_BG
    accepted_B = keep_BG.long().cumprod(1).sum(1)
    row_B = torch.arange(rows, device=drafted_BG.device)
    law_BV = p_BGV[row_B, accepted_B]
    if gamma:
        refused_B1 = (accepted_B < gamma)[:, None]
        drafts_BV = q_BGV[row_B, accepted_B.clamp(max=gamma - 1)]
        residual_BV = torch.where(refused_B1, (law_BV - drafts_BV).clamp(min=0), law_BV)
        # p = q up to rounding leaves no residual; a refusal is then a rounding too
        law_BV = torch.where(residual_BV.sum(1, keepdim=True) > 0, residual_BV, law_BV)
    return accepted_B, sample(law_BV, uniforms_BG[:, gamma])


def verify_greedy(best_BG: Tensor, drafted_BG: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where p is a point mass at `best` ([B, γ+1]): exact match."""
    gamma = drafted_BG.shape[1]
    accepted_B = (best_BG[:, :gamma] == drafted_BG).long().cumprod(1).sum(1)
    return accepted_B, best_BG.gather(1, accepted_B[:, None])[:, 0]


def decode(
    target: Target,
    draft: Draft | None,
    prompts: Sequence[Tensor],
    rules: Rules,
    *,
    uniforms_BU: Tensor,
) -> tuple[list[Decoded], Timing]:
    """Decode every prompt ([P] int64 each, P ≥ 1); results in the order of the prompts.

    uniforms: [B, U] float64 in [0, 1), U = `rules.num_uniforms`. `draft` is None for γ = 0 only.
    `TargetError` where prompt, response and γ exceed the target's context.
    """
    if (draft is None) != (rules.gamma == 0):
        raise ValueError(f"gamma {rules.gamma} with {'no' if draft is None else 'a'} draft")
    if uniforms_BU.shape != (len(prompts), rules.num_uniforms):
        raise ValueError(
            f"uniforms {tuple(uniforms_BU.shape)} for {len(prompts)} prompts of "
            f"{rules.num_uniforms} each"
        )
    with torch.inference_mode():
        rows = _Rows(target, draft, prompts, rules, uniforms_BU.to(target.device))
        started = _now(target.device)
        while len(rows.index_B):
            rows.round()
        rows.timing.rounds_s = _now(target.device) - started
    target.settle()
    return rows.decoded, rows.timing


class _Rows:
    """The rows that are still decoding: buffers of width W, the session, the draft's state."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        prompts: Sequence[Tensor],
        rules: Rules,
        uniforms_BU: Tensor,
    ) -> None:
        """Prefill, and sample each response's first token."""
        self.target, self.draft, self.rules = target, draft, rules
        self.timing = Timing()
        device = target.device
        self.length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(self.length_B.max()) if prompts else 0
        width = longest + rules.max_new_tokens + rules.gamma
        self.tokens_BW = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens_BW[row, : len(prompt)] = prompt
        self.limit_B = self.length_B + rules.max_new_tokens
        self.index_B = torch.arange(len(prompts), device=device)
        self.uniforms_BU = uniforms_BU
        self.used = 1  # uniforms of each row so far
        self.eos = torch.tensor(rules.eos_ids, dtype=torch.int64, device=device)
        self.hidden: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self.decoded = [Decoded(tokens=[], kept=[0] * rules.gamma) for _ in prompts]
        if not prompts:
            return
        # the last round feeds γ tokens beyond the last that can be emitted before it
        self.session = Session(
            target, len(prompts), width - 1, layers=rules.layers, last_hidden=rules.last_hidden
        )
        self.state: State | None = draft.open(len(prompts), width) if draft else None
        step = self.session.extend(self.tokens_BW[:, :longest], self.length_B, which="last")
        self._remember(step, torch.zeros_like(self.length_B))
        if rules.temperature == 0:
            first_B = step.logits[:, -1].argmax(-1)
        else:
            first_B = sample(rules.law(step.logits[:, -1]), uniforms_BU[:, 0])
        self._emit(first_B[:, None], torch.ones_like(first_B))
        self._leave()

    def round(self) -> None:
        """Draft γ tokens, verify them in one pass of the target, emit, drop finished rows."""
        gamma, temperature = self.rules.gamma, self.rules.temperature
        draws = self.uniforms_BU[:, self.used : self.used + 2 * gamma + 1]
        self.used += 2 * gamma + 1
        begun = _now(self.target.device)
        drafted_BG, q_BGV = self._draft(draws[:, :gamma])
        proposed = _now(self.target.device)
        start_B = self.length_B - 1
        fed_BQ = torch.cat([self.tokens_BW.gather(1, start_B[:, None]), drafted_BG], dim=1)
        step = self.session.extend(fed_BQ, torch.full_like(start_B, gamma + 1))
        self.timing.draft_s += proposed - begun
        self.timing.target_s += _now(self.target.device) - proposed
        self.timing.steps += 1
        if temperature == 0:
            accepted_B, next_B = verify_greedy(step.logits.argmax(-1), drafted_BG)
        else:
            p_BGV = self.rules.law(step.logits)
            accepted_B, next_B = verify(p_BGV, q_BGV, drafted_BG, draws[:, gamma:])
        self._remember(step, start_B)
        # column a takes the target's own token, those beyond it are never emitted
        emitted_BQ = torch.cat([drafted_BG, next_B[:, None]], dim=1)
        emitted_BQ.scatter_(1, accepted_B[:, None], next_B[:, None])
        count_B = self._emit(emitted_BQ, accepted_B + 1)
        self.session.rollback(self.length_B - 1)
        if self.rules.trace:
            laws = (p_BGV if temperature > 0 else probabilities(step.logits, 1.0), q_BGV)
            self._trace(laws, emitted_BQ, drafted_BG, draws[:, gamma:], accepted_B, count_B)
        kept = torch.minimum(accepted_B, count_B).tolist()
        for index, num_kept in zip(self.index_B.tolist(), kept, strict=True):
            row = self.decoded[index]
            row.rounds += 1
            row.drafted += gamma
            for k in range(num_kept):
                row.kept[k] += 1
        self._leave()

    def _trace(
        self,
        laws: tuple[Tensor, Tensor],
        emitted_BQ: Tensor,
        drafted_BG: Tensor,
        uniforms_BQ: Tensor,
        accepted_B: Tensor,
        count_B: Tensor,
    ) -> None:
        """Append this round to every row's trace, in plain numbers."""
        p_BQV, q_BGV = laws
        gamma, sampled = self.rules.gamma, self.rules.temperature > 0
        p_BG = p_BQV[:, :gamma].gather(2, drafted_BG[..., None])[..., 0].tolist()
        own_B = emitted_BQ.gather(1, accepted_B[:, None])
        row_B = torch.arange(len(own_B), device=own_B.device)
        own_p_B = p_BQV[row_B, accepted_B].gather(1, own_B)[:, 0].tolist()
        if sampled:
            q_BG = q_BGV.gather(2, drafted_BG[..., None])[..., 0].tolist()
            alpha_BG = torch.minimum(p_BQV[:, :gamma], q_BGV).sum(-1).tolist()
        before_B = (self.length_B - count_B - self.limit_B + self.rules.max_new_tokens).tolist()
        drafted, uniform = drafted_BG.tolist(), uniforms_BQ.tolist()
        accepted, count = accepted_B.tolist(), count_B.tolist()
        for b, index in enumerate(self.index_B.tolist()):
            drafts = tuple(
                Drafted(
                    token=drafted[b][k],
                    p=p_BG[b][k],
                    q=q_BG[b][k] if sampled else None,
                    alpha=alpha_BG[b][k] if sampled else None,
                    uniform=uniform[b][k] if sampled else None,
                    kept=k < accepted[b],
                )
                for k in range(gamma)
            )
            own, start = int(own_B[b]), int(before_B[b])
            self.decoded[index].trace.append(Round(start, drafts, own, own_p_B[b], count[b]))

    def _draft(self, uniforms_BG: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts [B, γ] and, at T > 0, the laws they were drawn from [B, γ, V]."""
        vocab_size = self.target.spec.vocab_size
        rows, sampled = len(self.length_B), self.rules.temperature > 0
        drafted_BG = self.tokens_BW.new_zeros(rows, self.rules.gamma)
        q_BGV = uniforms_BG.new_zeros(rows, self.rules.gamma, vocab_size if sampled else 0)
        if self.draft is None:
            return drafted_BG, q_BGV
        d2t = self.draft.d2t

        def choose(k: int, logits_BV: Tensor) -> Tensor:
            """Draw depth k and keep the law it came from, in the target's vocabulary."""
            point_mass = not sampled or self.rules.drafting == "greedy"
            if point_mass:
                column_B = logits_BV.argmax(-1)
                q_BV = uniforms_BG.new_ones(rows, 1)
            else:
                q_BV = self.rules.law(logits_BV)
                column_B = sample(q_BV, uniforms_BG[:, k])
            token_B = column_B if d2t is None else d2t[column_B]
            if sampled and point_mass:
                q_BGV[:, k].scatter_(1, token_B[:, None], q_BV)
            elif sampled:
                q_BGV[:, k, slice(vocab_size) if d2t is None else d2t] = q_BV
            drafted_BG[:, k] = token_B
            return token_B

        context = Context(
            tokens=self.tokens_BW,
            length=self.length_B,
            hidden=self.hidden,
            last_hidden=self.last_hidden,
        )
        self.draft.propose(self.state, context, self.rules.gamma, choose)
        return drafted_BG, q_BGV

    def _remember(self, step: Step, start_B: Tensor) -> None:
        """Keep the features of the fed tokens, at positions start … of each row."""
        rules = self.rules
        self.hidden = self._stored(self.hidden, step.hidden, start_B, rules.hidden_dtype)
        self.last_hidden = self._stored(
            self.last_hidden, step.last_hidden, start_B, rules.last_hidden_dtype
        )

    def _stored(
        self, buffer: Tensor | None, new: Tensor | None, start_B: Tensor, dtype: str
    ) -> Tensor | None:
        if new is None:
            return None
        new = stored(new, dtype) if self.rules.features == "cache" else new.float()
        rows, width = self.tokens_BW.shape
        if buffer is None:
            buffer = new.new_zeros(rows, width, *new.shape[2:])
        slot_BQ = start_B[:, None] + torch.arange(new.shape[1], device=new.device)
        buffer[torch.arange(rows, device=new.device)[:, None], slot_BQ] = new
        return buffer

    def _emit(self, emitted_BQ: Tensor, count_B: Tensor) -> Tensor:
        """Commit up to count[b] tokens of row b, no further than its end; returns how many."""
        query_Q = torch.arange(emitted_BQ.shape[1], device=emitted_BQ.device)
        count_B = torch.minimum(count_B, self.limit_B - self.length_B)
        ends_BQ = torch.isin(emitted_BQ, self.eos) & (query_Q < count_B[:, None])
        after_BQ = torch.where(ends_BQ, query_Q + 1, emitted_BQ.shape[1])
        count_B = torch.minimum(count_B, after_BQ.amin(1))
        self.tokens_BW.scatter_(1, self.length_B[:, None] + query_Q, emitted_BQ)
        self.length_B = self.length_B + count_B
        self.done_B = ends_BQ.any(1) | (self.length_B >= self.limit_B)
        return count_B

    def _leave(self) -> None:
        """Hand out finished rows and keep the others."""
        if not bool(self.done_B.any()):
            return
        for b in self.done_B.nonzero()[:, 0].tolist():
            first = int(self.limit_B[b]) - self.rules.max_new_tokens
            response = self.tokens_BW[b, first : int(self.length_B[b])]
            self.decoded[int(self.index_B[b])].tokens = response.tolist()
        keep = (~self.done_B).nonzero()[:, 0]
        self.session.select(keep)
        if self.state is not None:
            self.state.select(keep)
        for name in ("tokens_BW", "length_B", "limit_B", "index_B", "uniforms_BU", "done_B"):
            setattr(self, name, getattr(self, name)[keep])
        self.hidden = None if self.hidden is None else self.hidden[keep]
        self.last_hidden = None if self.last_hidden is None else self.last_hidden[keep]


def _now(device: torch.device) -> float:
    """Seconds; what was queued on an accelerator has been done by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
