"""The shared layers against transformers and against their slow, obvious versions."""

import torch
from torch import Tensor

from pipeline.blocks import (
    KVCache,
    Layer,
    RMSNorm,
    SwiGLU,
    attend,
    attend_diagonal,
    draw,
    rope_table,
    rotate,
    span,
    take_rows,
    visible,
)

B, T, H, C = 2, 5, 3, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6) + 1.0)
    x = _random(4, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, **EXACT)


def test_rms_norm_of_half_precision_is_taken_in_float32() -> None:
    x = (_random(4, 64) * 3e3).half()  # squares overflow float16
    out = RMSNorm(64).half()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), RMSNorm(64)(x.float()), rtol=2e-3, atol=2e-3)


def test_rotation_depends_on_relative_position_only() -> None:
    q, k = _random(1, 1, 1, C), _random(1, 1, 1, C, seed=1)

    def score(i: int, j: int) -> Tensor:
        tables = (rope_table(torch.tensor([[p]]), C, dtype=torch.float64) for p in (i, j))
        rotated = [rotate(x, t) for x, t in zip((q, k), tables, strict=True)]
        return (rotated[0] * rotated[1]).sum()

    # angles are float32
    torch.testing.assert_close(score(7, 3), score(4, 0), rtol=0.0, atol=1e-5)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_rope_is_that_of_llama_in_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=H * C, num_attention_heads=H)
    position = torch.arange(T)[None]
    x = _random(1, T, H, C).float()
    cos, sin = LlamaRotaryEmbedding(config)(x, position)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    ours = rotate(x, rope_table(position, C, dtype=torch.float32))
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=0.0, atol=1e-6)


def test_swiglu_is_gated() -> None:
    mlp = SwiGLU(4, 6).double()
    draw(mlp, torch.Generator().manual_seed(0))
    x = _random(3, 4)
    gate, up = (x @ mlp.gate_up.weight.T).split(6, dim=-1)
    expected = (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), expected, **EXACT)


def test_take_rows_is_indexing() -> None:
    x, index = _random(7, 3), torch.tensor([[6, 0], [2, 2]])
    assert torch.equal(take_rows(x, index), x[index])


def test_diagonal_attention_equals_the_masked_matrix() -> None:
    n = 2
    q, k0, v0 = (_random(B, T, H, C, seed=s) for s in range(3))
    keys = [_random(B, T, H, C, seed=10 + s) for s in range(n)]
    values = [_random(B, T, H, C, seed=20 + s) for s in range(n)]
    causal = visible(torch.arange(T).expand(B, T), T)
    fast = attend_diagonal(q, (k0, v0), causal, own=(keys, values))
    # the slow, obvious form: S·T columns, the first T causal, every later block diagonal
    eye = torch.eye(T, dtype=torch.bool).expand(B, 1, T, T)
    mask = torch.cat([causal, *[eye] * n], dim=-1)
    slow = attend(q, torch.cat([k0, *keys], dim=1), torch.cat([v0, *values], dim=1), mask)
    torch.testing.assert_close(fast, slow, **EXACT)


def test_diagonal_attention_with_no_own_key_is_none_other() -> None:
    q, k, v = (_random(B, T, H, C, seed=s) for s in range(3))
    causal = visible(torch.arange(T).expand(B, T), T)
    torch.testing.assert_close(attend(q, k, v, causal), attend(q, k, v, None), **EXACT)


def test_span_pads_short_rows_with_the_spare_position() -> None:
    position = span(torch.tensor([2, 0]), torch.tensor([3, 3]), spare=9)
    assert position.tolist() == [[2, 9, 9], [0, 1, 2]]


def test_ragged_pieces_through_the_cache_equal_one_causal_pass() -> None:
    layer = Layer(H * C, H, inner_size=8).double()
    draw(layer, torch.Generator().manual_seed(0))
    x = _random(B, T, H * C)
    whole = layer(x, rope_table(torch.arange(T), C, dtype=x.dtype))
    cache = KVCache.empty(B, T, heads=(H, C), like=x)
    start = torch.zeros(B, dtype=torch.int64)
    for end in (torch.tensor([1, 3]), torch.tensor([4, 4]), torch.tensor([5, 5])):
        position = span(start, end, spare=cache.width)
        source = position.clamp(max=T - 1)
        piece = x[torch.arange(B)[:, None], source].clone()
        piece[position == cache.width] = torch.nan  # padding may hold anything
        table = rope_table(position, C, dtype=x.dtype)
        out = layer.extend(piece, table, cache=cache, position_BQ=position, width=int(end.max()))
        for b in range(B):
            count = int(end[b] - start[b])
            torch.testing.assert_close(out[b, :count], whole[b, start[b] : end[b]], **EXACT)
        start = end


def test_cache_keeps_the_selected_rows() -> None:
    cache = KVCache.empty(3, 2, heads=(H, C), like=torch.zeros(()))
    cache.write(torch.tensor([[0], [1], [2]]), _random(3, 1, H, C).float(), torch.ones(3, 1, H, C))
    before = cache.k.clone()
    cache.select(torch.tensor([2, 0]))
    assert torch.equal(cache.k, before[[2, 0]])


def test_draw_leaves_frozen_matrices_and_norms_alone() -> None:
    layer = Layer(H * C, H, inner_size=8)
    layer.mlp.down.weight.requires_grad_(False).zero_()
    draw(layer, torch.Generator().manual_seed(0))
    assert not layer.mlp.down.weight.any()
    assert bool((layer.input_norm.weight == 1).all())
    assert 0.24 < layer.attention.qkv.weight.std() < 0.34  # 12 ** -0.5 = 0.29
