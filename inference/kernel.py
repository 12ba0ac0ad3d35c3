"""
FP8 arithmetic of DeepSeek-V3 (V3 paper, 3.3): quantisation in blocks and the GEMM that undoes it while it sums.

Each operation is three neighbours: `op_ref`, its equation in plain torch; `op_kernel`, the same in Triton; `op`, which
runs the kernel on a GPU and the reference elsewhere. With TRITON_INTERPRET=1 the kernels run on the CPU.

e4m3 is `torch.float8_e4m3fn` (largest value 448). Dimension letters: M tokens, N out features, K in features.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from config import BLOCK_SIZE, UE8M0
from gpu import capability, cdiv, counters, has_e4m3, on_hopper, pdl_options
from kernel_parts import E4M3, prefetch, quantise_groups, scale_of, scale_of_ref, silu_times
from one_token import launch_one_token, takes_token
from tiles import Tiles, are_few, choose_tiles, medium_tiles

W8A16 = "w8a16"  # in place of a scale format: activations are not quantised
FROM_THREADS = threading.Lock()  # two threads that launch a kernel for the first time would both compile and load it


def on_gpu(x: torch.Tensor | Quantised) -> bool:
    """Whether to launch Triton kernels on `x`. They have no gradients: a trainer's activations go another way."""
    x = x.values if isinstance(x, Quantised) else x
    return (x.is_cuda or triton.knobs.runtime.interpret) and not x.requires_grad


class Quantised(NamedTuple):
    """
    An activation x [..., K] with what the FP8 GEMM reads of it: values [..., K] in e4m3, scale [..., ceil(K / 128)].
    x is None where only the GEMM reads it, and was bf16.
    """

    x: torch.Tensor | None
    values: torch.Tensor
    scale: torch.Tensor


# --- activations: one scale per token and 128 channels ----------------------------------------------------------------


def act_quant_ref(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> e4m3 [..., K] and s [..., ceil(K / 128)] with s = scale_of(max|x_group|), y = e4m3(x / s)."""
    K = x.shape[-1]
    groups = F.pad(x.float(), (0, -K % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE))
    scale = scale_of_ref(groups.abs().amax(-1), scale_fmt)
    return (groups / scale[..., None]).flatten(-2)[..., :K].to(E4M3), scale


@triton.jit
def act_quant_kernel(
    x_ptr, y_ptr, s_ptr, M, K, UE8M0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """
    One program: BLOCK_M tokens of one group. Reads 2 bytes and writes 1 for each element: at about 83 % of an H200's
    bandwidth for 8,192 tokens.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    cols = group * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y, scale = quantise_groups(x, UE8M0)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(s_ptr + group.to(tl.int64) * M + rows, scale, mask=rows < M)


def act_quant(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See act_quant_ref. On a GPU the scales of a channel group lie side by side, as cuBLASLt wants them."""
    if not on_gpu(x):
        return act_quant_ref(x, scale_fmt)
    x = x.contiguous()
    K = x.shape[-1]
    M = x.numel() // K
    y = torch.empty_like(x, dtype=E4M3)
    scale = x.new_empty(cdiv(K, BLOCK_SIZE), M, dtype=torch.float32)
    block_m = 1 if M < 64 else 16
    grid = (cdiv(M, block_m), cdiv(K, BLOCK_SIZE))
    act_quant_kernel[grid](x, y, scale, M, K, scale_fmt == UE8M0, block_m, BLOCK_SIZE)
    return y, scale.t().unflatten(0, x.shape[:-1])


# --- weights: one scale per 128 x 128 block ---------------------------------------------------------------------------


def weight_quant_ref(w: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] -> e4m3 [N, K] and s [ceil(N / 128), ceil(K / 128)]; blocks at the edge count as padded with zeros."""
    N, K = w.shape
    padded = F.pad(w.float(), (0, -K % BLOCK_SIZE, 0, -N % BLOCK_SIZE))
    blocks = padded.view(padded.shape[0] // BLOCK_SIZE, BLOCK_SIZE, padded.shape[1] // BLOCK_SIZE, BLOCK_SIZE)
    scale = scale_of_ref(blocks.abs().amax((1, 3)), scale_fmt)
    return (blocks / scale[:, None, :, None]).view_as(padded)[:N, :K].to(E4M3).contiguous(), scale


@triton.jit
def weight_quant_kernel(
    w_ptr, y_ptr, s_ptr, N, K, UE8M0: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(w)), UE8M0)
    y = tl.math.div_rn(w, scale + tl.zeros_like(w))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(s_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


def weight_quant(w: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See weight_quant_ref."""
    if not on_gpu(w) or not has_e4m3(w.device):
        return weight_quant_ref(w, scale_fmt)
    w = w.contiguous()
    N, K = w.shape
    grid = (cdiv(N, BLOCK_SIZE), cdiv(K, BLOCK_SIZE))
    y, scale = torch.empty_like(w, dtype=E4M3), w.new_empty(grid, dtype=torch.float32)
    with FROM_THREADS:
        weight_quant_kernel[grid](w, y, scale, N, K, scale_fmt == UE8M0, BLOCK_SIZE)
    return y, scale


def weight_dequant_ref(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """w [N, K] e4m3, scale [ceil(N / 128), ceil(K / 128)] -> w * scale [N, K]: the product in fp32, rounded once."""
    N, K = w.shape
    spread = scale.repeat_interleave(BLOCK_SIZE, 0)[:N].repeat_interleave(BLOCK_SIZE, 1)[:, :K]
    return (w.float() * spread).to(dtype)


@triton.jit
def weight_dequant_kernel(w_ptr, s_ptr, y_ptr, N, K, BLOCK: tl.constexpr):
    """One program: one block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    scale = tl.load(s_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (w * scale).to(y_ptr.dtype.element_ty), mask=inside)


def weight_dequant(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """See weight_dequant_ref. Raises ValueError when the scales' shape is not that of the weight's blocks."""
    N, K = w.shape
    grid = (cdiv(N, BLOCK_SIZE), cdiv(K, BLOCK_SIZE))
    if tuple(scale.shape) != grid:
        raise ValueError(f"{tuple(w.shape)=} has {grid} blocks, but {tuple(scale.shape)=}")
    if not on_gpu(w) or not has_e4m3(w.device):
        return weight_dequant_ref(w, scale, dtype)
    y = torch.empty(N, K, dtype=dtype, device=w.device)
    with FROM_THREADS:
        weight_dequant_kernel[grid](w.contiguous(), scale.contiguous(), y, N, K, BLOCK_SIZE)
    return y


# --- matrix products --------------------------------------------------------------------------------------------------


def fp8_gemm_ref(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """
    a [M, K] e4m3 with a_scale [M, ceil(K / 128)], b [N, K] e4m3 with b_scale [ceil(N / 128), ceil(K / 128)] -> [M, N]:

        c[m, n] = sum over slices g of K:  a_scale[m, g] * b_scale[n // 128, g] * sum(a[m, k] * b[n, k] for k in g)

    The outer sum in fp32. Hopper's FP8 units keep about 14 bits in the inner one, so slices of 128 stay accurate.
    """
    N = b.shape[0]
    out = a.new_zeros(a.shape[0], N, dtype=torch.float32)
    for g, (a_g, b_g) in enumerate(zip(a.split(BLOCK_SIZE, 1), b.split(BLOCK_SIZE, 1), strict=True)):
        b_scale_g = b_scale[:, g].repeat_interleave(BLOCK_SIZE)[:N]
        out += (a_g.float() @ b_g.float().T) * a_scale[:, g, None] * b_scale_g
    return out.to(dtype)


@triton.jit
def e4m3_to_fp32(u):
    """
    e4m3 bits (uint8) -> fp32 with integer operations, for GPUs without e4m3. The 7 bits below the sign, moved to fp32's
    exponent and mantissa, are the number divided by 2^120, subnormal ones too. e4m3's NaN becomes 480.
    """
    bits = u.to(tl.uint32)
    small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1.329227995784916e36  # 2^120


@triton.jit
def add_product(acc, x, w, scale, FORMAT: tl.constexpr, SWAP: tl.constexpr):
    """acc + scale * x w^T for x [BLOCK_M, BLOCK_K], w [BLOCK_N, BLOCK_K]; transposed, [BLOCK_N, BLOCK_M], with SWAP."""
    if FORMAT == "w8a16":
        w = e4m3_to_fp32(w).to(x.dtype)
    if FORMAT == "wide":
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    elif SWAP:
        acc += tl.dot(w, tl.trans(x), input_precision="ieee") * scale[None, :]
    else:
        acc += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[:, None]
    return acc


@triton.jit
def slice_scale(x_scale_ptrs, w_scale_ptrs, g, x_scale_g, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a slice's products [BLOCK_M tokens, BLOCK_N] are multiplied by: one weight scale, times the tokens'."""
    scale = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if FORMAT != "wide":
        scale *= tl.load(w_scale_ptrs + g)
    if FORMAT == "fp8":
        scale *= tl.load(x_scale_ptrs + g * x_scale_g)
    return scale


@triton.jit
def gemm_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, y_scale_ptr, partial_ptr, counter_ptr,
    order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, pair_weight_ptr,
    M, N, K, x_scale_m, x_scale_g, y_scale_m, y_scale_g,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr,
    FORMAT: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    SHARED: tl.constexpr, EVEN_K: tl.constexpr,
    QUANTISE: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, SWAP: tl.constexpr,
    UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    y = x w^T for every linear of the model: a program multiplies for one of PIECES parts of a BLOCK_M x BLOCK_N tile,
    over one of SPLIT parts of K, UNROLL slices of which are fetched at a time.

    FORMAT "fp8": x and w in e4m3, each slice of 128 of K scaled as it is summed in fp32. "w8a16": w in e4m3 and x in
    bf16. "wide": neither in e4m3. HALVES = 2: w is [2, N, K] and y = silu(x w[0]^T) * (x w[1]^T); QUANTISE writes it in
    e4m3 with its scales, a tile being one group. TOP_K > 0: w is stacked per expert and a tile has one expert's
    (token, choice) pairs, order[start:stop]. Rows of x and y stand in that order; but with GATHER x has a row a token,
    and with SCATTER y a row a pair, which is multiplied by the pair's weight. The first SHARED experts have all tokens:
    their tiles, the first, are known before the routing is, and wait for it only with their results, which may take
    memory that it still reads.

    Few tokens: bound by reading w, once. So K is split until every multiprocessor has several programs with loads in
    flight, and w is the left operand (SWAP), whose tile is never padded, while the tokens fill 16 columns. The program
    that finishes a tile last sums the parts, in order. Many tokens: bound by the tensor cores.

    On an H200, one token: 31.6 us for 7168 x 16384, 86 % of the bandwidth, but 4.8 for 3072 x 1536, 23 %: launching,
    waiting for the first bytes and summing the parts take 3 to 7 us of any product.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    n_slices = tl.cdiv(K, BLOCK)
    per_part = tl.cdiv(n_slices, SPLIT)
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // (SPLIT * PIECES)
    n_tile = tile % n_tiles
    m_tile = tile // n_tiles
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    first_own = n_tile * BLOCK_N + tl.program_id(0) // SPLIT % PIECES * WIDTH
    own = first_own + tl.arange(0, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if TOP_K == 0 and SWAP:  # the weights are known: on their way while the kernels before this one finish
            LINES: tl.constexpr = BLOCK * w_ptr.dtype.element_ty.primitive_bitwidth // 1024  # of 128 bytes, of a slice
            row = tl.minimum(own, N - 1).to(tl.int64)
            column = tl.minimum(part * per_part * BLOCK + tl.arange(0, LINES) * (BLOCK // LINES), K - 1)
            first_slice = w_ptr + row[:, None] * K + column[None, :]
            prefetch(first_slice)
            if HALVES == 2:
                prefetch(first_slice + tl.cast(N, tl.int64) * K)
        if SHARED == 0:
            tl.extra.cuda.gdc_wait()
    slots = tl.arange(0, BLOCK_M)
    expert = 0
    first_row = m_tile * BLOCK_M
    if TOP_K > 0:
        per_expert = tl.cdiv(M, BLOCK_M)
        shared = m_tile < SHARED * per_expert
        if shared:
            expert = m_tile // per_expert
            first_row = expert * M + m_tile % per_expert * BLOCK_M
            last_row = (expert + 1) * M
        else:
            if PDL and SHARED > 0:
                tl.extra.cuda.gdc_wait()
            expert = tl.load(tile_expert_ptr + m_tile)
            first_row = tl.load(tile_start_ptr + m_tile)
            last_row = tl.load(tile_stop_ptr + m_tile)
        if expert < 0:
            return
        place = first_row + slots
        live = place < last_row
        pair = tl.load(order_ptr + place, mask=live & ~shared, other=0)
        x_row = place
        if GATHER:
            x_row = tl.where(shared, place - expert * M, pair // TOP_K)
        y_row = pair if SCATTER else place
    else:
        y_row = first_row + slots
        live = y_row < M
        x_row = y_row
    x_row = tl.where(live, x_row, 0).to(tl.int64)
    first_out = expert * HALVES * N + first_own
    k = tl.arange(0, BLOCK)
    if not TMA_X:
        x_ptrs = x_ptr + x_row[:, None] * K + k[None, :]
    if not TMA_W:
        w_row = expert * HALVES * N + tl.where(own < N, own, 0)
        w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * K + k[None, :]
        up_ptrs = w_ptrs + tl.cast(N, tl.int64) * K
    scale_rows = tl.cdiv(N, BLOCK)
    w_scale_ptrs = w_scale_ptr + (expert * HALVES * scale_rows + n_tile * BLOCK_N // BLOCK) * n_slices
    up_scale_ptrs = w_scale_ptrs + scale_rows * n_slices
    x_scale_ptrs = x_scale_ptr + x_row * x_scale_m

    acc = tl.zeros((WIDTH, BLOCK_M) if SWAP else (BLOCK_M, WIDTH), dtype=tl.float32)
    up = acc
    first = tl.minimum(part * per_part, n_slices - 1)
    # The scales of the next slice are fetched while this one is multiplied.
    scale = slice_scale(x_scale_ptrs, w_scale_ptrs, first, x_scale_g, FORMAT, BLOCK_M)
    up_scale = scale
    if HALVES == 2:
        up_scale = slice_scale(x_scale_ptrs, up_scale_ptrs, first, x_scale_g, FORMAT, BLOCK_M)
    end = tl.minimum((part + 1) * per_part, n_slices)
    for g in tl.range(part * per_part, end, loop_unroll_factor=UNROLL):
        following = tl.minimum(g + 1, n_slices - 1)
        next_scale = slice_scale(x_scale_ptrs, w_scale_ptrs, following, x_scale_g, FORMAT, BLOCK_M)
        if TMA_X:
            x = x_ptr.load([first_row, g * BLOCK])
        elif EVEN_K:
            x = tl.load(x_ptrs + g * BLOCK, mask=live[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + g * BLOCK, mask=live[:, None] & (k < K - g * BLOCK)[None, :], other=0.0)
        if TMA_W:
            w = w_ptr.load([first_out, g * BLOCK])
        elif EVEN_K:
            w = tl.load(w_ptrs + g * BLOCK)
        else:
            w = tl.load(w_ptrs + g * BLOCK, mask=(k < K - g * BLOCK)[None, :], other=0.0)
        acc = add_product(acc, x, w, scale, FORMAT, SWAP)
        if HALVES == 2:
            next_up_scale = slice_scale(x_scale_ptrs, up_scale_ptrs, following, x_scale_g, FORMAT, BLOCK_M)
            if TMA_W:
                w = w_ptr.load([first_out + N, g * BLOCK])
            elif EVEN_K:
                w = tl.load(up_ptrs + g * BLOCK)
            else:
                w = tl.load(up_ptrs + g * BLOCK, mask=(k < K - g * BLOCK)[None, :], other=0.0)
            up = add_product(up, x, w, up_scale, FORMAT, SWAP)
            up_scale = next_up_scale
        scale = next_scale
    if SWAP:
        acc = tl.trans(acc)
        up = tl.trans(up)

    cols = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = live[:, None] & (cols < N)[None, :]
    if PDL and SHARED > 0:
        tl.extra.cuda.gdc_wait()
    if SPLIT * PIECES > 1:
        partials = partial_ptr + tile.to(tl.int64) * (SPLIT * HALVES * BLOCK_M * BLOCK_N)
        mine = part * (HALVES * BLOCK_M * BLOCK_N) + slots[:, None] * BLOCK_N + (own - n_tile * BLOCK_N)[None, :]
        here = live[:, None] & (own < N)[None, :]
        tl.store(partials + mine, acc, mask=here)
        if HALVES == 2:
            tl.store(partials + BLOCK_M * BLOCK_N + mine, up, mask=here)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < SPLIT * PIECES - 1:
            return
        tl.store(counter_ptr + tile, 0)
        at = slots[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = acc
        for i in tl.range(SPLIT, loop_unroll_factor=4 if BLOCK_M == 16 else 1):
            others = partials + i * (HALVES * BLOCK_M * BLOCK_N) + at
            acc += tl.load(others, mask=inside, other=0.0, cache_modifier=".cg")
            if HALVES == 2:
                up += tl.load(others + BLOCK_M * BLOCK_N, mask=inside, other=0.0, cache_modifier=".cg")

    dtype: tl.constexpr = tl.bfloat16 if QUANTISE else y_ptr.dtype.element_ty
    if HALVES == 2:
        acc = silu_times(acc, up, dtype)
    if SCATTER:
        acc *= tl.load(pair_weight_ptr + pair, mask=live, other=0.0)[:, None]
    y_ptrs = y_ptr + y_row.to(tl.int64)[:, None] * N + cols[None, :]
    if QUANTISE:
        acc = tl.where(inside, acc.to(dtype).to(tl.float32), 0.0)
        y, y_scale = quantise_groups(acc, UE8M0)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_scale_ptr + y_row * y_scale_m + n_tile * y_scale_g, y_scale, mask=live)
    else:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


def launch_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    y: torch.Tensor,
    y_scale: torch.Tensor | None = None,
    scale_fmt: str | None = None,
    *,
    gated: bool = False,
    gathered: bool = False,
    routing: tuple[torch.Tensor, ...] | None = None,
    top_k: int = 0,
    block: int = 0,
    n_shared: int = 0,
    pair_weights: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """
    Run gemm_kernel: x [.., K], w [.., N, K] -> y [.., N], and y_scale when y is in e4m3. `gated`: w has two halves. For
    one row of x, and tiles of one pair, run one_token_kernel where it is faster.

    routing: order, tile_expert, tile_start, tile_stop, for tiles of `block` pairs, `top_k` a token: x has a row a token
    unless `gathered`, and y, with pair_weights, a row a pair. n_shared: of the first experts, which all tokens share
    (see experts.py's `experts`), unless `gathered`.
    """
    x = x.contiguous()  # the kernel reads whole rows; a latent is a part of a cache's entry
    M, K = x.shape
    N = w.shape[-2]
    wide = w.dtype != E4M3
    format = "wide" if wide else "w8a16" if x_scale is None else "fp8"
    alone = tiles is None and (block == 1 if routing else M == 1) and not gathered and format != "w8a16"
    if alone and takes_token(N, K, gated, format == "fp8"):
        options = {"gated": gated, "routing": routing, "top_k": top_k, "n_shared": n_shared}
        launch_one_token(x, x_scale, w, w_scale, y, y_scale, scale_fmt, **options)
        return
    tokens = block if routing else M
    # 256 bytes of each weight's row at a time, not 128: V2-Lite's step of 64 rows 9.07 -> 8.99 ms.
    longer = x.element_size() == 2 and are_few(tokens, routing is not None) and on_hopper(x.device)
    block_k = BLOCK_SIZE if longer or not wide else 128 // x.element_size()
    gather = routing is not None and not gathered
    if tiles is None:
        m_tiles = routing[1].numel() if routing else cdiv(M, 64)
        tiles = choose_tiles(tokens, m_tiles, N, cdiv(K, block_k), gated, format, routing is not None)
        copies = K % 16 == 0 and on_hopper(x.device)
        if copies and format == "fp8" and 32 < tokens <= 64 and not gated and routing is None:
            tiles = medium_tiles(N, cdiv(K, block_k))
        if copies and not tiles.swap:
            tiles = tiles._replace(tma_x=not gather, tma_w=True)
        if not on_hopper(x.device):  # as little as 99 KiB of shared memory
            tiles = tiles._replace(stages=min(tiles.stages, 4 if tiles.swap else 3), unroll=1)
    m_tiles = routing[1].numel() if routing else cdiv(M, tiles.block_m)
    n_tiles = m_tiles * cdiv(N, tiles.block_n)
    count = counters(x.device)
    if n_tiles > count.numel():
        tiles = tiles._replace(split=1, pieces=1)
    whole = tiles.split == tiles.pieces == 1
    size = 0 if whole else n_tiles * tiles.split * (1 + gated) * tiles.block_m * tiles.block_n
    partial = x.new_empty(size, dtype=torch.float32)
    order, tile_expert, tile_start, tile_stop = routing or (count, count, count, count)
    w_bits = w.view(torch.uint8) if format == "w8a16" else w
    w_box = [tiles.block_n // tiles.pieces, block_k]
    # Of programs of 4 warps three share one of Hopper's multiprocessors if they take at most 168 registers a thread.
    registers = {"maxnreg": 168} if format == "fp8" and tiles.tma_w and tiles.warps == 4 else {}
    gemm_kernel[(n_tiles * tiles.split * tiles.pieces,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, block_k]) if tiles.tma_x else x,
        x if x_scale is None else x_scale,
        TensorDescriptor.from_tensor(w_bits.flatten(0, -2), w_box) if tiles.tma_w else w_bits,
        w if w_scale is None else w_scale, y, y if y_scale is None else y_scale, partial, count,
        order, tile_expert, tile_start, tile_stop, y if pair_weights is None else pair_weights,
        M, N, K, *((0, 0) if x_scale is None else x_scale.stride()), *((0, 0) if y_scale is None else y_scale.stride()),
        tiles.tma_x, tiles.tma_w, format, 1 + gated, top_k, gather, pair_weights is not None, n_shared,
        K % block_k == 0, y_scale is not None, scale_fmt == UE8M0, block_k,
        tiles.block_m, tiles.block_n, tiles.split, tiles.pieces, tiles.swap, tiles.unroll,
        num_warps=tiles.warps, num_stages=tiles.stages, **registers, **pdl_options(x.device),
    )  # fmt: skip


@functools.lru_cache
def has_block_scaled_library(device: torch.device) -> bool:
    """Whether cuBLASLt multiplies with these scales here: on Hopper only, from CUDA 12.9 on."""
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return capability(device) == (9, 0) and cuda >= (12, 9)


def library_gemm(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """fp8_gemm by cuBLASLt, for N and K in whole blocks: 1.0 to 1.3 PFLOPS at large M, where Triton reaches 0.8."""
    M = a.shape[0]
    if M % 4:  # its copies need rows of scales of 16 bytes
        a = F.pad(a.view(torch.uint8), (0, 0, 0, -M % 4)).view(E4M3)
        a_scale = F.pad(a_scale, (0, 0, 0, -M % 4))
    a_scale = a_scale.t().contiguous().t()  # column-major, as norms and gates write it: no copy then
    b_scale = F.pad(b_scale, (0, -b_scale.shape[1] % 4))  # for every 512 of K
    rows, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a, b.t(), a_scale, rows, b_scale.t(), blocks, output_dtype=torch.bfloat16)[:M]


def fp8_gemm(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """See fp8_gemm_ref. Raises ValueError when the shapes do not belong together."""
    (M, K), (N, K_b) = a.shape, b.shape
    wanted = (M, cdiv(K, BLOCK_SIZE)), (cdiv(N, BLOCK_SIZE), cdiv(K, BLOCK_SIZE))
    if K_b != K or (tuple(a_scale.shape), tuple(b_scale.shape)) != wanted:
        shapes = f"{tuple(a.shape)=} {tuple(a_scale.shape)=} {tuple(b.shape)=} {tuple(b_scale.shape)=}"
        raise ValueError(f"{shapes}: the scales should be {wanted}")
    if not on_gpu(a):
        return fp8_gemm_ref(a, a_scale, b, b_scale, dtype)
    a, b, b_scale = a.contiguous(), b.contiguous(), b_scale.contiguous()
    whole = N % BLOCK_SIZE == K % BLOCK_SIZE == 0
    if M > 64 and whole and dtype == torch.bfloat16 and has_block_scaled_library(a.device):
        return library_gemm(a, a_scale, b, b_scale)
    c = torch.empty(M, N, dtype=dtype, device=a.device)
    launch_gemm(a, a_scale, b, b_scale, c)
    return c


def quantised(x: torch.Tensor | Quantised, scale_fmt: str | None = None) -> Quantised:
    return x if isinstance(x, Quantised) else Quantised(x, *act_quant(x, scale_fmt))


def linear(
    x: torch.Tensor | Quantised, weight: torch.Tensor, scale: torch.Tensor | None = None, scale_fmt: str | None = None
) -> torch.Tensor:
    """
    x [M, K], weight [N, K] -> x @ weight.T [M, N]. With a scale the weight is e4m3, and so is x on the way unless
    scale_fmt is W8A16.
    """
    if scale is not None and scale_fmt == W8A16:
        if not on_gpu(x):
            return F.linear(x.float(), weight_dequant_ref(weight, scale, torch.float32)).to(x.dtype)
        y = x.new_empty(x.shape[0], weight.shape[0])
        launch_gemm(x, None, weight, scale, y)
        return y
    if scale is not None:
        x, values, x_scale = quantised(x, scale_fmt)
        return fp8_gemm(values, x_scale, weight, scale, torch.bfloat16 if x is None else x.dtype)
    x = x.x if isinstance(x, Quantised) else x
    # cuBLAS reads large weights at 4 TB/s on an H200, but 3072 x 2048 at 1.9, and needs tokens to be many.
    if on_gpu(x) and x.dtype == torch.bfloat16 and x.shape[0] <= 16 and weight.numel() < 2**25:
        y = x.new_empty(x.shape[0], weight.shape[0])
        launch_gemm(x, None, weight, None, y)
        return y
    return F.linear(x, weight)


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K], weight [N, K] -> x @ weight.T [M, N] in fp32, never rounded to the inputs' type."""
    if on_gpu(x) and weight.dtype != torch.float32 and x.shape[0] == 1:
        y = x.new_empty(1, weight.shape[0], dtype=torch.float32)
        launch_gemm(x, None, weight, None, y)
        return y
    if x.is_cuda and weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    x = x.float()
    return torch.cat([F.linear(x, part.float()) for part in weight.split(max(2**19 // weight.shape[1], 1))], dim=1)
