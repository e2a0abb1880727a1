"""The decoder's output law is the target's, whatever drafts; its counts are what happened."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pipeline.batch import Batch
from pipeline.draft import Choose, Context, Draft, Needs, find
from pipeline.features import stored
from pipeline.interface import Interface, Shape
from pipeline.speculate import Decoded, Rules, decode, sample, verify, verify_greedy
from pipeline.target import Target, TargetSpec
from storage.errors import TargetError

P_VALUE = 1e-3  # of a chi-square under fixed seeds: a correct sampler fails one seed in a thousand
V = 5
LAYERS = (1, 2)


class TableDraft(Draft):
    """q depends on the depth and on the last committed token: logits[k, x_{j+1}]."""

    def __init__(self, logits: Tensor, *, d2t: Tensor | None = None) -> None:
        super().__init__(d2t)
        self.logits = logits.float()

    @staticmethod
    def needs(config: Any) -> Needs:
        return Needs()

    @staticmethod
    def max_depth(config: Any) -> int | None:
        return None

    @staticmethod
    def loss_depth(config: Any) -> int:
        return 1

    @classmethod
    def build(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def training_states(self, batch: Batch, depth: int) -> Any:
        for k in range(depth):
            token = batch.tokens.flatten()[batch.pairs(k).anchor + 1]
            yield torch.eye(self.logits.shape[1])[token], self.logits[k].T

    def open(self, num_rows: int, width: int) -> Any:
        return find("medusa").State()

    def propose(self, state: Any, context: Context, gamma: int, choose: Choose) -> Tensor:
        last = context.tokens.gather(1, context.length[:, None] - 1)[:, 0]
        for k in range(gamma):
            choose(k, self.logits[k, last])
        return self.logits[:gamma, last].transpose(0, 1)


class EchoDraft(TableDraft):
    """q = p: the target itself, run on the whole text of each row."""

    def __init__(self, target: Target) -> None:
        super().__init__(torch.zeros(0))
        self.target = target

    def propose(self, state: Any, context: Context, gamma: int, choose: Choose) -> Tensor:
        rows, width = torch.arange(len(context.length)), context.tokens.shape[1]
        tokens, logits = context.tokens.clone(), []
        for k in range(gamma):
            last = self.target.forward(tokens).last_hidden[rows, context.length + k - 1]
            logits.append(self.target.logits(last))
            tokens[rows, (context.length + k).clamp(max=width - 1)] = choose(k, logits[-1])
        return torch.stack(logits, dim=1)


class HalfTarget(Target):
    """A target that never says a token of odd id."""

    def logits(self, last_hidden_ND: Tensor) -> Tensor:
        logits = super().logits(last_hidden_ND)
        logits[:, 1::2] = -torch.inf
        return logits


def make_target(model: Any, kind: type[Target] = Target) -> Target:
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
        eos_ids=[0],
        bos_id=None,
        context_tokens=config.max_position_embeddings,
        dtype="float32",
        sharpen=1.0,
    )
    return kind(model=model, tokenizer=None, spec=spec)


def make_draft(kind: str, target: Target, *, d2t: Tensor | None = None) -> Draft:
    """A draft of a kind of the project, or a table; noise makes its q unlike p."""
    model, size = target.model, target.spec.hidden_size
    generator = torch.Generator().manual_seed(3)
    if kind == "table":
        columns = target.spec.vocab_size if d2t is None else len(d2t)
        shape = (7, target.spec.vocab_size, columns)
        return TableDraft(torch.randn(shape, generator=generator) * 1.5, d2t=d2t)
    module = find(kind)
    common = {"kind": kind, "lr_scale": 1.0, "steps_scale": 1.0}
    pruned = {} if d2t is None else {"draft_vocab_size": len(d2t)}
    own: dict[str, Any] = {
        "lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16},
        "medusa": {"num_heads": 7, "num_layers": 1, **pruned},
        "eagle3": {
            "depth": 3,
            "num_heads": 2,
            "intermediate_size": 16,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "norm_output": False,
            "fused_layers": len(LAYERS),
            **pruned,
        },
        "mlp": {
            "num_heads": 7,
            "inner_size": 16,
            "tie_weights": True,
            "scale_input": True,
            **pruned,
        },
        "mtp": {
            "depth": 3,
            "init": "fresh",
            "attention": "step0",
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_size": None,
            "intermediate_size": 16,
            "qk_norm": True,
            "qkv_bias": False,
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            **pruned,
        },
    }[kind]
    interface = Interface(
        embed=model.get_input_embeddings().weight.detach().float(),
        lm_head=model.lm_head.weight.detach().float(),
        norm=model.model.norm.weight.detach().float(),
        norm_eps=1e-6,
    )
    shape_ = Shape(vocab_size=target.spec.vocab_size, hidden_size=size)
    draft: Draft = module.Model.build(
        module.Config(**common, **own), shape_, interface, seed=0, d2t=d2t
    )
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad and parameter.ndim >= 2:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return draft


def make_rules(draft: Draft | None, **over: Any) -> Rules:
    needs = draft.needs(getattr(draft, "config", None)) if draft else Needs()
    given: dict[str, Any] = {
        "gamma": 3 if draft else 0,
        "temperature": 1.0,
        "max_new_tokens": 4,
        "eos_ids": (0,),
        "layers": LAYERS if needs.num_layers else (),
        "last_hidden": needs.last_hidden,
    }
    return Rules(**{**given, **over})


def run(
    target: Target, draft: Draft | None, prompts: list[Tensor], rules: Rules, seed: int = 1
) -> list[Decoded]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), rules.num_uniforms)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
    return decode(target, draft, prompts, rules, uniforms_BU=uniforms)[0]


def slowly_served(logits_NV: Tensor, rules: Rules) -> Tensor:
    """Temperature, then top-k, then top-p, a row and a token at a time."""
    rows = []
    for row in torch.softmax(logits_NV.double() / rules.temperature, -1).tolist():
        falling = sorted(range(len(row)), key=lambda v: (-row[v], v))[: rules.top_k]
        goal = (rules.top_p or 1.0) * sum(row[v] for v in falling)
        kept: list[int] = []
        while falling and (not kept or sum(row[v] for v in kept) < goal):
            kept.append(falling.pop(0))
        total = sum(row[v] for v in kept)
        rows.append([row[v] / total if v in kept else 0.0 for v in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


def exact_law(target: Target, prompt: Tensor, rules: Rules) -> dict[tuple[int, ...], float]:
    """Every response of at most `max_new_tokens` tokens with its probability."""
    vocab, length = target.spec.vocab_size, rules.max_new_tokens
    paths = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    rows = torch.cat([prompt.expand(len(paths), -1), paths], dim=1)
    logits = target.logits(target.forward(rows).last_hidden[:, len(prompt) - 1 : -1].flatten(0, 1))
    p = slowly_served(logits, rules).unflatten(0, paths.shape)
    p = p.gather(2, paths[..., None])[..., 0]
    # a served law gives some paths no chance at all
    paths, p = paths[(p > 0).all(1)], p[(p > 0).all(1)]
    law: dict[tuple[int, ...], float] = {}
    for path, chances in zip(paths.tolist(), p.tolist(), strict=True):
        end = next((i + 1 for i, x in enumerate(path) if x in rules.eos_ids), length)
        law[tuple(path[:end])] = float(np.prod(chances[:end]))
    return law


def chi_square(decoded: list[Decoded], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the responses under the law; rare ones are pooled to 5 expected."""
    count = dict.fromkeys(law, 0)
    for row in decoded:
        count[tuple(row.tokens)] += 1
    order = sorted(law, key=lambda path: law[path])
    observed, expected = [0.0], [0.0]
    for path in order:
        if expected[-1] >= 5:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += count[path]
        expected[-1] += law[path] * len(decoded)
    assert sum(expected) == pytest.approx(len(decoded), rel=1e-6)
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 0)
    return float(stats.chi2.sf(statistic, len(expected) - 1))


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    return make_target(tiny_model(vocab_size=V, double=True))


PROMPT = torch.tensor([1, 4, 2])
PRUNED = torch.tensor([0, 2, 3])

CASES = {
    "lm": ("lm", None, {}),
    "medusa": ("medusa", None, {}),
    "eagle3": ("eagle3", None, {}),
    "mlp": ("mlp", None, {}),
    "mtp pruned": ("mtp", PRUNED, {}),
    "table": ("table", None, {}),
    "medusa pruned": ("medusa", PRUNED, {}),
    "eagle3 pruned": ("eagle3", PRUNED, {}),
    "table pruned to one token": ("table", torch.tensor([3]), {}),
    "gamma 1": ("table", None, {"gamma": 1}),
    "gamma beyond the rest": ("lm", None, {"gamma": 6}),
    "plain": ("none", None, {}),
    "greedy drafting": ("table", None, {"drafting": "greedy"}),
    "greedy drafting pruned": ("table", PRUNED, {"drafting": "greedy"}),
    "temperature 0.6": ("eagle3", None, {"temperature": 0.6}),
    "temperature 1.6": ("medusa", None, {"temperature": 1.6}),
    "top-k": ("eagle3", None, {"top_k": 3}),
    "top-p": ("mlp", None, {"top_p": 0.8}),
    "top-p pruned": ("mtp", PRUNED, {"top_p": 0.7, "temperature": 1.3}),
    "temperature, top-k and top-p": ("lm", None, {"temperature": 1.4, "top_k": 4, "top_p": 0.9}),
    "greedy drafting, top-p": ("medusa", None, {"drafting": "greedy", "top_p": 0.8}),
    "greedy drafting, temperature and top-k": (
        "lm",
        None,
        {"drafting": "greedy", "temperature": 0.7, "top_k": 3},
    ),
    "plain, top-p": ("none", None, {"temperature": 1.2, "top_p": 0.8}),
    "no end of sequence": ("table", None, {"eos_ids": (), "max_new_tokens": 3}),
    "two ends of sequence": ("table", None, {"eos_ids": (1, 3)}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_law_is_the_targets(target: Target, case: str) -> None:
    kind, d2t, over = CASES[case]
    draft = None if kind == "none" else make_draft(kind, target, d2t=d2t)
    rules = make_rules(draft, **over)
    decoded = run(target, draft, [PROMPT] * 2000, rules)
    assert chi_square(decoded, exact_law(target, PROMPT, rules)) > P_VALUE
    assert all(row.tokens[-1] in rules.eos_ids or len(row.tokens) == rules.max_new_tokens
               for row in decoded)  # fmt: skip
    if draft is not None:
        assert 0 < sum(row.accepted for row in decoded) < sum(row.drafted for row in decoded)


def test_the_chi_square_sees_a_lossy_verdict(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its power: a refused draft replaced by a sample of p instead of (p − q)₊ is found."""

    def lossy(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = verify(p, q, drafted, u)
        return accepted, sample(p[torch.arange(len(p)), accepted], u[:, -1])

    monkeypatch.setattr("pipeline.speculate.verify", lossy)
    draft = make_draft("table", target)
    decoded = run(target, draft, [PROMPT] * 3000, make_rules(draft))
    assert chi_square(decoded, exact_law(target, PROMPT, make_rules(draft))) < 1e-12


def test_a_draft_that_is_the_target_is_always_accepted(target: Target) -> None:
    rules = make_rules(EchoDraft(target), eos_ids=(), max_new_tokens=5)
    decoded = run(target, EchoDraft(target), [PROMPT] * 800, rules)
    # 4 tokens after the first: 3 drafts and a bonus token make one round
    assert {(row.rounds, row.accepted) for row in decoded} == {(1, 3)}
    short = replace(rules, max_new_tokens=3)
    decoded = run(target, EchoDraft(target), [PROMPT] * 800, short)
    assert {(row.rounds, row.drafted, row.accepted) for row in decoded} == {(1, 3, 2)}
    assert chi_square(decoded, exact_law(target, PROMPT, short)) > P_VALUE


def test_a_draft_on_disjoint_tokens_is_never_accepted(tiny_model: Any) -> None:
    half = make_target(tiny_model(vocab_size=V, double=True), HalfTarget)
    draft = make_draft("table", half, d2t=torch.tensor([1, 3]))
    rules = make_rules(draft, eos_ids=(0,))
    decoded = run(half, draft, [PROMPT] * 2000, rules)
    assert sum(row.accepted for row in decoded) == 0
    assert all(row.rounds == row.num_counted for row in decoded)
    assert chi_square(decoded, exact_law(half, PROMPT, rules)) > P_VALUE


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(1, 12, (60,), generator=generator).tolist()
    return [torch.randint(1, 64, (n,), generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def wide_target(tiny_model: Any) -> Target:
    return make_target(tiny_model(vocab_size=64, double=True))


@pytest.mark.parametrize("kind", ["lm", "medusa", "eagle3", "mlp", "mtp", "table"])
def test_greedy_text_is_the_targets_own(
    wide_target: Target, prompts: list[Tensor], kind: str
) -> None:
    draft = make_draft(kind, wide_target)
    plain = run(wide_target, None, prompts, make_rules(None, temperature=0.0, max_new_tokens=30))
    for gamma in (1, 4):
        rules = make_rules(draft, gamma=gamma, temperature=0.0, max_new_tokens=30)
        decoded = run(wide_target, draft, prompts, rules)
        assert [row.tokens for row in decoded] == [row.tokens for row in plain]
        assert sum(row.accepted for row in decoded) > 0
    assert all(row.rounds == row.num_counted for row in plain)


@pytest.mark.parametrize("kind", ["lm", "medusa", "eagle3", "mlp", "mtp"])
def test_company_in_the_batch_changes_nothing(
    wide_target: Target, prompts: list[Tensor], kind: str
) -> None:
    draft = make_draft(kind, wide_target)
    rules = make_rules(draft, max_new_tokens=20, features="exact")
    generator = torch.Generator().manual_seed(0)
    shape = (len(prompts), rules.num_uniforms)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
    together, _ = decode(wide_target, draft, prompts, rules, uniforms_BU=uniforms)
    for rows in (slice(7, 8), slice(20, 33)):
        apart, _ = decode(wide_target, draft, prompts[rows], rules, uniforms_BU=uniforms[rows])
        assert apart == together[rows]


@pytest.mark.parametrize(
    ("kind", "name"), [("eagle3", "hidden_dtype"), ("medusa", "last_hidden_dtype")]
)
def test_features_pass_through_the_dtype_of_the_cache(
    wide_target: Target,
    prompts: list[Tensor],
    kind: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, bool]] = []

    def spy(x: Tensor, dtype: str) -> Tensor:
        found = stored(x, dtype)
        seen.append((dtype, torch.equal(found, x.float())))
        return found

    monkeypatch.setattr("pipeline.speculate.stored", spy)
    draft = make_draft(kind, wide_target)
    run(wide_target, draft, prompts[:2], make_rules(draft, **{name: "int8"}))
    assert set(seen) == {("int8", False)}
    seen.clear()
    run(wide_target, draft, prompts[:2], make_rules(draft, features="exact", **{name: "int8"}))
    assert not seen


def test_counts_add_up(wide_target: Target, prompts: list[Tensor]) -> None:
    draft = make_draft("medusa", wide_target)
    rules = make_rules(draft, max_new_tokens=25)
    decoded = run(wide_target, draft, prompts, rules)
    for row in decoded:
        assert row.drafted == rules.gamma * row.rounds
        # every round adds its own token, but for the last, which a draft may have ended
        assert row.num_counted - row.accepted in (row.rounds, row.rounds - 1)
        assert row.kept == sorted(row.kept, reverse=True)


def test_an_end_of_sequence_in_the_first_token_needs_no_round(target: Target) -> None:
    rules = make_rules(None, eos_ids=tuple(range(V)))
    assert run(target, None, [PROMPT], rules)[0].num_counted == 0
    assert run(target, None, [PROMPT], make_rules(None, max_new_tokens=1))[0].rounds == 0


def test_no_prompts_give_no_responses(target: Target) -> None:
    assert run(target, None, [], make_rules(None)) == []


def test_a_response_beyond_the_context_is_refused(target: Target) -> None:
    with pytest.raises(TargetError, match="context of 256 tokens; ask for fewer prompt or"):
        run(target, None, [PROMPT], make_rules(None, max_new_tokens=300))


def test_arguments_that_do_not_fit_are_errors(target: Target) -> None:
    draft, none = make_draft("table", target), torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="gamma 0 with a draft"):
        decode(target, draft, [PROMPT], make_rules(None), uniforms_BU=none)
    with pytest.raises(ValueError, match=r"uniforms \(1, 1\) for 1 prompts of 4 each"):
        decode(target, None, [PROMPT], make_rules(None), uniforms_BU=none)


@pytest.mark.parametrize("laws", ["any", "equal", "disjoint", "sparse"])
def test_verified_blocks_follow_the_target(laws: str) -> None:
    """200,000 blocks: the first token, and the second where a draft was kept, follow p."""
    vocab, rows = 6, 200_000
    generator = torch.Generator().manual_seed(7)
    p = torch.rand(3, vocab, generator=generator, dtype=torch.float64) ** 3
    q = torch.rand(2, vocab, generator=generator, dtype=torch.float64) ** 3
    if laws == "disjoint":
        p[:, ::2], q[:, 1::2] = 0, 0
    if laws == "sparse":
        p[0, 1], p[1, 2], q[0, 3], q[1, 4] = 0, 0, 0, 0
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    if laws == "equal":
        p[:2] = q
    u = torch.rand(rows, 5, generator=generator, dtype=torch.float64)
    drafted = torch.stack([sample(q[k].expand(rows, -1), u[:, k]) for k in range(2)], dim=1)
    accepted, following = verify(p.expand(rows, -1, -1), q.expand(rows, -1, -1), drafted, u[:, 2:])
    emitted = torch.cat([drafted, following[:, None]], dim=1)
    emitted.scatter_(1, accepted[:, None], following[:, None])
    for depth in range(3):
        reached = emitted[accepted >= depth, depth]
        if not len(reached):
            assert laws == "disjoint"
            continue
        seen = torch.bincount(reached, minlength=vocab).numpy()
        wanted = p[depth].numpy() * len(reached)
        assert not seen[wanted == 0].any()
        some = wanted > 0
        statistic = ((seen[some] - wanted[some]) ** 2 / wanted[some]).sum()
        assert stats.chi2.sf(statistic, some.sum() - 1) > P_VALUE
    alpha = float(torch.minimum(p[0], q[0]).sum())
    share = float((accepted >= 1).double().mean())
    assert abs(share - alpha) <= 4 * (alpha * (1 - alpha) / rows) ** 0.5 + 1e-12
    assert laws != "equal" or bool((accepted == 2).all())


def test_greedy_verification_is_that_of_point_masses() -> None:
    generator = torch.Generator().manual_seed(0)
    best = torch.randint(3, (500, 4), generator=generator)
    drafted = torch.randint(3, (500, 3), generator=generator)
    point = torch.nn.functional.one_hot
    u = torch.rand(500, 4, generator=generator, dtype=torch.float64)
    law = verify(point(best, 3).double(), point(drafted, 3).double(), drafted, u)
    exact = verify_greedy(best, drafted)
    assert torch.equal(law[0], exact[0])
    assert torch.equal(law[1], exact[1])


def test_a_token_of_no_weight_is_never_sampled() -> None:
    weight = torch.tensor([[0.0, 0.3, 0.0, 0.1, 0.0]], dtype=torch.float64).expand(4, -1)
    last = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0).double())
    uniform = torch.tensor([0.0, 0.5, 0.76, float(last)], dtype=torch.float64)
    assert sample(weight, uniform).tolist() == [1, 1, 3, 3]
