"""Triton kernels for decoding on a GPU: a product with the norm before it and the addition after it, and attention of one token.

A decode step reads every weight once and computes next to nothing with it. A layer is some twenty operations of torch's, which at two
microseconds each take longer than the reading; here it is five kernels, each of which begins to fetch its weights while the
kernel before it still ends (`gdc_wait` is where it waits for that one's results). Inference only. Owns the arithmetic on
pointers; which tensors, and when these kernels are used at all, is `engine/gpu.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def linear_kernel(
    x, norm, w, bias, add, low, b, choice, owner, out, rows, N, R, eps,
    K: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    LOW: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (rows, N) = [silu(gate) * up of] rms_norm(x (rows, K)) @ w (N or 2N, K)^T [+ adapters] [+ bias] [+ add (rows, N)], BN columns a program.

    Sums are float32. The norm's factor is one number a row, so it is multiplied in at the end, and w is read in one pass. low (rows, R):
    x times every adapter's A; b (R, N or 2N): every adapter's B; choice (rows,), owner (R,): column r counts in a row of that adapter.
    """
    m, n, k = tl.arange(0, M), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row_in, col_in = m < rows, n < N
    at_w = w + n[:, None].to(tl.int64) * K + k[None, :]
    now_in = col_in[:, None] & (k < K)[None, :]
    now = tl.load(at_w, mask=now_in, other=0.0)
    if GATED:
        now_up = tl.load(at_w + N * K, mask=now_in, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros((M, BN), tl.float32)
    y_up = tl.zeros((M, BN), tl.float32)
    squares = tl.zeros((M,), tl.float32)
    for at in tl.static_range(0, K, BK):
        here = at + k < K
        if NORM:
            factor = tl.load(norm + at + k, mask=here, other=0.0).to(tl.float32)
        for row in tl.static_range(M):  # one by one: in three dimensions the weights would have to change threads
            xs = tl.load(x + row * K + at + k, mask=here & (row < rows), other=0.0).to(tl.float32)  # (BK,)
            if NORM:
                squares += tl.where(m == row, tl.sum(xs * xs, 0), 0.0)
                xs *= factor
            mine = (m == row)[:, None]
            y += tl.where(mine, tl.sum(xs[None, :] * now.to(tl.float32), 1)[None, :], 0.0)
            if GATED:
                y_up += tl.where(mine, tl.sum(xs[None, :] * now_up.to(tl.float32), 1)[None, :], 0.0)
        if at + BK < K:
            next_in = col_in[:, None] & (at + BK + k < K)[None, :]
            now = tl.load(at_w + at + BK, mask=next_in, other=0.0)
            if GATED:
                now_up = tl.load(at_w + N * K + at + BK, mask=next_in, other=0.0)
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        y *= scale
        y_up *= scale
    if LOW:
        adapter = tl.load(choice + m, mask=row_in, other=-1)
        for at in range(0, R, 16):
            r = at + tl.arange(0, 16)
            own = adapter[:, None] == tl.load(owner + r, mask=r < R, other=-2)[None, :]
            h = tl.where(own, tl.load(low + m[:, None] * R + r[None, :], mask=row_in[:, None] & (r < R)[None, :], other=0.0), 0.0)
            at_b, b_in = b + r[None, :] * (2 * N if GATED else N) + n[:, None], col_in[:, None] & (r < R)[None, :]  # (BN, 16)
            y += tl.sum(h[:, None, :] * tl.load(at_b, mask=b_in, other=0.0).to(tl.float32)[None, :, :], 2)
            if GATED:
                y_up += tl.sum(h[:, None, :] * tl.load(at_b + N, mask=b_in, other=0.0).to(tl.float32)[None, :, :], 2)
    if BIAS:
        y += tl.load(bias + n, mask=col_in, other=0.0).to(tl.float32)[None, :]
        if GATED:
            y_up += tl.load(bias + N + n, mask=col_in, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y = y * tl.sigmoid(y) * y_up
    spot, here = m[:, None] * N + n[None, :], row_in[:, None] & col_in[None, :]
    if ADD:
        y += tl.load(add + spot, mask=here, other=0.0).to(tl.float32)
    tl.store(out + spot, y, mask=here)


@triton.jit
def rotated(at, cos, sin, norm, i, turned, inside, D: tl.constexpr, eps, NORM: tl.constexpr):
    """Rows of vectors at pointers `at` (G, 1), normed if asked to, then turned by their position: (G, d) float32.

    i, turned: (d,) the numbers of a vector, and each one's partner half a vector on (`decoder.rotate`).
    """
    x = tl.load(at + i[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + turned[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= scale * tl.load(norm + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
        y *= scale * tl.load(norm + turned, mask=i < D, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
    return x * c + y * s


@triton.jit
def attend_kernel(
    qkv, cos, sin, q_norm, k_norm, keys, values, lengths, out, row_stride, head_stride, eps, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One new token a row attends to what its row has cached and to itself; its key and value join the cache. Program: a row, a key head.

    qkv (rows, heads + 2 kv_heads, D); cos, sin (rows, D); keys, values: the first row, of (rows, kv_heads, length, D); lengths (rows,): tokens
    cached; out (rows, heads, D). Softmax as it goes along (Milakov & Gimelshein 2018), the new token first.
    """
    row, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g, i = tl.arange(0, BG), tl.arange(0, BD)
    turned = (i + D // 2) % D
    inside = (g < GROUP)[:, None] & (i < D)[None, :]
    here = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lengths + row)
    vector = qkv + row * (GROUP + 2) * kv_heads * D
    cos, sin = cos + row * D, sin + row * D
    kind = keys.dtype.element_ty
    q = rotated(vector + (head * GROUP + g)[:, None] * D, cos, sin, q_norm, i, turned, inside, D, eps, NORM).to(kind)
    one = tl.zeros((1, 1), tl.int32)
    own = (i < D)[None, :]
    k = rotated(vector + (GROUP * kv_heads + head + one) * D, cos, sin, k_norm, i, turned, own, D, eps, NORM).to(kind)  # (1, BD)
    v = tl.load(vector + ((GROUP + 1) * kv_heads + head + one) * D + i[None, :], mask=own, other=0.0)
    new = here + length * D + i[None, :]
    tl.store(keys + new, k, mask=own)
    tl.store(values + new, v, mask=own)

    top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale  # (BG,)
    weight = tl.full((BG,), 1.0, tl.float32)
    total = tl.zeros((BG, BD), tl.float32) + v.to(tl.float32)
    for at in range(0, length, BS):
        s = at + tl.arange(0, BS)
        cached = here + s[:, None] * D + i[None, :]
        seen = (s < length)[:, None] & (i < D)[None, :]
        ks = tl.load(keys + cached, mask=seen, other=0.0)  # (BS, BD)
        vs = tl.load(values + cached, mask=seen, other=0.0)
        scores = tl.where((s < length)[None, :], tl.dot(q, tl.trans(ks), input_precision="ieee") * scale, float("-inf"))  # (BG, BS)
        higher = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        weight, top = weight * shrink + tl.sum(p, 1), higher
        total = total * shrink[:, None] + tl.dot(p.to(kind), vs, input_precision="ieee")
    tl.store(out + (row * kv_heads * GROUP + head * GROUP + g)[:, None] * D + i[None, :], total / weight[:, None], mask=inside)
