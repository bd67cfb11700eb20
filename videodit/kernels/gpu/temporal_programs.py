"""The Triton programs of `temporal_attention`: what one of them computes, forward and backward.

Legend: t latent frames, s tokens of a frame, h heads, e channels of a head. A program's tile is rows (positions x
frames, padded) of one clip and head. It holds the even and the odd channels of its rows apart, so that a rotation is
four products and scores are the sum of two matrix products.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(T: tl.constexpr, T_PAD: tl.constexpr, POSITIONS: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr):
    """The tile of this program: its rows' tokens, which of them are not padding, their positions, clip and head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    block = program // HEADS
    blocks = (S + POSITIONS - 1) // POSITIONS
    clip = block // blocks
    row = tl.arange(0, POSITIONS * T_PAD)
    position = row // T_PAD
    frame = row % T_PAD
    place = (block % blocks) * POSITIONS + position
    inside = (frame < T) & (place < S)
    return frame * S + place, inside, position, clip, head


@triton.jit
def _load(
    ptr, token, inside, clip, head, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PAD: tl.constexpr
):
    """Rows of a (b, t, s, h, e) buffer as even and odd channels, each (rows, pairs), in the buffer's dtype."""
    places, valid = _places(token, inside, clip, head, TOKENS, HEADS, PAIRS, PAD)
    return tl.split(tl.load(ptr + places, mask=valid, other=0.0))


@triton.jit
def _store(
    ptr,
    even,
    odd,
    token,
    inside,
    clip,
    head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAD: tl.constexpr,
):
    places, valid = _places(token, inside, clip, head, TOKENS, HEADS, PAIRS, PAD)
    tl.store(ptr + places, tl.join(even, odd).to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def _places(
    token, inside, clip, head, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PAD: tl.constexpr
):
    pair = tl.arange(0, PAD)[None, :, None]
    side = tl.arange(0, 2)[None, None, :]
    start = ((clip * TOKENS + token) * HEADS + head) * (2 * PAIRS)
    return start[:, None, None] + 2 * pair + side, inside[:, None, None] & (pair < PAIRS) & (side < 2)


@triton.jit
def _pair_weights(ptr, PAIRS: tl.constexpr, PAD: tl.constexpr):
    pair = tl.arange(0, PAD)[None, :]
    even = tl.load(ptr + 2 * pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
    odd = tl.load(ptr + 2 * pair + 1, mask=pair < PAIRS, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def _angles(table_ptr, token, inside, TOKENS: tl.constexpr, PAIRS: tl.constexpr, PAD: tl.constexpr):
    pair = tl.arange(0, PAD)[None, :]
    places = token[:, None] * (2 * PAIRS) + 2 * pair
    valid = inside[:, None] & (pair < PAIRS)
    cos = tl.load(table_ptr + places, mask=valid, other=0.0)
    sin = tl.load(table_ptr + TOKENS * (2 * PAIRS) + places, mask=valid, other=0.0)
    return cos, sin


@triton.jit
def _normalize(even, odd, NORM: tl.constexpr, PAIRS: tl.constexpr, eps):
    """x / rms(x), or x, in float32; and 1 / rms(x), (rows, 1)."""
    even = even.to(tl.float32)
    odd = odd.to(tl.float32)
    rstd = tl.full([even.shape[0], 1], 1.0, tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1, keep_dims=True) / (2 * PAIRS) + eps)
        even *= rstd
        odd *= rstd
    return even, odd, rstd


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a b in float32. UPCAST is for Triton's interpreter, which does not multiply bfloat16; the product is the same."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _product(a_even, a_odd, b_even, b_odd, UPCAST: tl.constexpr):
    """a b^T over all channels, in float32."""
    return _dot(a_even, tl.trans(b_even), UPCAST) + _dot(a_odd, tl.trans(b_odd), UPCAST)


@triton.jit
def _softmax(scores, inside, position):
    """Over the columns of a row's own position; rows of padding are anything finite."""
    seen = (position[:, None] == position[None, :]) & inside[None, :]
    scores = tl.where(seen, scores, -1e30)
    weights = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
    return weights / tl.sum(weights, axis=1, keep_dims=True)


@triton.jit
def forward(
    query_ptr,
    key_ptr,
    value_ptr,
    query_weight_ptr,
    key_weight_ptr,
    table_ptr,
    out_ptr,
    softmax_scale,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    UPCAST: tl.constexpr,
    T: tl.constexpr,
    T_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAD: tl.constexpr,
):
    token, inside, position, clip, head = _rows(T, T_PAD, POSITIONS, S, HEADS)
    q_even, q_odd = _load(query_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    k_even, k_odd = _load(key_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    dtype = q_even.dtype
    q_even, q_odd, _ = _normalize(q_even, q_odd, NORM, PAIRS, eps)
    k_even, k_odd, _ = _normalize(k_even, k_odd, NORM, PAIRS, eps)
    if NORM:
        even, odd = _pair_weights(query_weight_ptr, PAIRS, PAD)
        q_even, q_odd = q_even * even, q_odd * odd
        even, odd = _pair_weights(key_weight_ptr, PAIRS, PAD)
        k_even, k_odd = k_even * even, k_odd * odd
    if ROTATE:
        cos, sin = _angles(table_ptr, token, inside, T * S, PAIRS, PAD)
        q_even, q_odd = q_even * cos - q_odd * sin, q_even * sin + q_odd * cos
        k_even, k_odd = k_even * cos - k_odd * sin, k_even * sin + k_odd * cos
    scores = _product(q_even.to(dtype), q_odd.to(dtype), k_even.to(dtype), k_odd.to(dtype), UPCAST) * softmax_scale
    weights = _softmax(scores, inside, position).to(dtype)
    v_even, v_odd = _load(value_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    out_even = _dot(weights, v_even, UPCAST)
    out_odd = _dot(weights, v_odd, UPCAST)
    _store(out_ptr, out_even, out_odd, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)


@triton.jit
def _unrotated(even, odd, cos, sin, ROTATE: tl.constexpr):
    if ROTATE:
        even, odd = even * cos + odd * sin, odd * cos - even * sin
    return even, odd


@triton.jit
def _unnormed(g_even, g_odd, u_even, u_odd, w_even, w_odd, rstd, PAIRS: tl.constexpr):
    """Gradients of x and of the weight where w * u was computed from u = x / rms(x), given that of w * u."""
    p_even, p_odd = g_even * u_even, g_odd * u_odd
    mean = tl.sum(p_even * w_even + p_odd * w_odd, axis=1, keep_dims=True) / (2 * PAIRS)
    dx_even = (g_even * w_even - u_even * mean) * rstd
    dx_odd = (g_odd * w_odd - u_odd * mean) * rstd
    return dx_even, dx_odd, tl.sum(p_even, axis=0), tl.sum(p_odd, axis=0)


@triton.jit
def backward(
    query_ptr,
    key_ptr,
    value_ptr,
    query_weight_ptr,
    key_weight_ptr,
    table_ptr,
    grad_ptr,
    dquery_ptr,
    dkey_ptr,
    dvalue_ptr,
    parts_ptr,
    softmax_scale,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    UPCAST: tl.constexpr,
    T: tl.constexpr,
    T_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAD: tl.constexpr,
):
    token, inside, position, clip, head = _rows(T, T_PAD, POSITIONS, S, HEADS)
    q_even, q_odd = _load(query_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    k_even, k_odd = _load(key_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    dtype = q_even.dtype
    q_even, q_odd, q_rstd = _normalize(q_even, q_odd, NORM, PAIRS, eps)
    k_even, k_odd, k_rstd = _normalize(k_even, k_odd, NORM, PAIRS, eps)
    rq_even, rq_odd, rk_even, rk_odd = q_even, q_odd, k_even, k_odd
    if NORM:
        qw_even, qw_odd = _pair_weights(query_weight_ptr, PAIRS, PAD)
        kw_even, kw_odd = _pair_weights(key_weight_ptr, PAIRS, PAD)
        rq_even, rq_odd = q_even * qw_even, q_odd * qw_odd
        rk_even, rk_odd = k_even * kw_even, k_odd * kw_odd
    cos, sin = q_rstd, q_rstd  # not used unless there is a rotation
    if ROTATE:
        cos, sin = _angles(table_ptr, token, inside, T * S, PAIRS, PAD)
        rq_even, rq_odd = rq_even * cos - rq_odd * sin, rq_even * sin + rq_odd * cos
        rk_even, rk_odd = rk_even * cos - rk_odd * sin, rk_even * sin + rk_odd * cos
    rq_even, rq_odd, rk_even, rk_odd = rq_even.to(dtype), rq_odd.to(dtype), rk_even.to(dtype), rk_odd.to(dtype)
    weights = _softmax(_product(rq_even, rq_odd, rk_even, rk_odd, UPCAST) * softmax_scale, inside, position)

    g_even, g_odd = _load(grad_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    turned = tl.trans(weights).to(dtype)
    dv_even = _dot(turned, g_even, UPCAST)
    dv_odd = _dot(turned, g_odd, UPCAST)
    _store(dvalue_ptr, dv_even, dv_odd, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)

    v_even, v_odd = _load(value_ptr, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    dweights = _product(g_even, g_odd, v_even, v_odd, UPCAST)
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1, keep_dims=True)) * softmax_scale
    ds = dscores.to(dtype)
    dq_even = _dot(ds, rk_even, UPCAST)
    dq_odd = _dot(ds, rk_odd, UPCAST)
    turned = tl.trans(dscores).to(dtype)
    dk_even = _dot(turned, rq_even, UPCAST)
    dk_odd = _dot(turned, rq_odd, UPCAST)
    dq_even, dq_odd = _unrotated(dq_even, dq_odd, cos, sin, ROTATE)
    dk_even, dk_odd = _unrotated(dk_even, dk_odd, cos, sin, ROTATE)
    if NORM:
        dq_even, dq_odd, qw_even, qw_odd = _unnormed(dq_even, dq_odd, q_even, q_odd, qw_even, qw_odd, q_rstd, PAIRS)
        dk_even, dk_odd, kw_even, kw_odd = _unnormed(dk_even, dk_odd, k_even, k_odd, kw_even, kw_odd, k_rstd, PAIRS)
        pair = tl.arange(0, PAD)
        parts = parts_ptr + tl.program_id(0).to(tl.int64) * 4 * PAIRS + 2 * pair
        tl.store(parts, qw_even, mask=pair < PAIRS)
        tl.store(parts + 1, qw_odd, mask=pair < PAIRS)
        tl.store(parts + 2 * PAIRS, kw_even, mask=pair < PAIRS)
        tl.store(parts + 2 * PAIRS + 1, kw_odd, mask=pair < PAIRS)
    _store(dquery_ptr, dq_even, dq_odd, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
    _store(dkey_ptr, dk_even, dk_odd, token, inside, clip, head, T * S, HEADS, PAIRS, PAD)
