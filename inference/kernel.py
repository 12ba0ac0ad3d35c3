"""
FP8 arithmetic of DeepSeek-V3 (V3 paper, 3.3): quantisation in blocks and the GEMM that undoes it while it sums.

Each operation is three neighbours: `op_ref`, its equation in plain torch; `op_kernel`, the same in Triton; `op`, which
runs the kernel on a GPU and the reference elsewhere. With TRITON_INTERPRET=1 the kernels run on the CPU.

e4m3 is `torch.float8_e4m3fn` (largest value 448). Dimension letters: M tokens, N out features, K in features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from config import BLOCK_SIZE

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # keeps the scale of an all-zero group away from 0
UE8M0 = "ue8m0"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether to launch Triton kernels on `x`."""
    return x.is_cuda or triton.knobs.runtime.interpret


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_of_ref(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """s = max(amax, 1e-4) / 448, for ue8m0 rounded up to a power of two: s = 2 ** ceil(log2 s)."""
    # A tensor divisor: torch divides by a Python number on CUDA through its reciprocal, which rounds differently.
    scale = amax.clamp(min=MIN_AMAX) / torch.full_like(amax, E4M3_MAX)
    if scale_fmt == UE8M0:
        bits = scale.view(torch.int32)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)
    return scale


@triton.jit
def scale_of(amax, MIN_AMAX: tl.constexpr, E4M3_MAX: tl.constexpr, UE8M0: tl.constexpr):
    scale = tl.math.div_rn(tl.maximum(amax, MIN_AMAX), E4M3_MAX)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return scale


# --- activations: one scale per token and 128 channels ----------------------------------------------------------------


def act_quant_ref(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> e4m3 [..., K] and s [..., ceil(K / 128)] with s = scale_of(max|x_group|), y = e4m3(x / s)."""
    K = x.shape[-1]
    groups = F.pad(x.float(), (0, -K % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE))
    scale = scale_of_ref(groups.abs().amax(-1), scale_fmt)
    return (groups / scale[..., None]).flatten(-2)[..., :K].to(E4M3), scale


@triton.jit
def act_quant_kernel(
    x_ptr, y_ptr, s_ptr, M, K, MIN_AMAX: tl.constexpr, E4M3_MAX: tl.constexpr, UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens of one group. Reads 2 bytes and writes 1 for each element."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    cols = group * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), 1), MIN_AMAX, E4M3_MAX, UE8M0)
    y = tl.math.div_rn(x, scale[:, None] + tl.zeros_like(x))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(s_ptr + rows * tl.cdiv(K, BLOCK_K) + group, scale, mask=rows < M)


def act_quant(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See act_quant_ref."""
    if not on_gpu(x):
        return act_quant_ref(x, scale_fmt)
    x = x.contiguous()
    K = x.shape[-1]
    M = x.numel() // K
    y = torch.empty_like(x, dtype=E4M3)
    scale = x.new_empty(*x.shape[:-1], cdiv(K, BLOCK_SIZE), dtype=torch.float32)
    block_m = 1 if M < 64 else 16
    grid = (cdiv(M, block_m), cdiv(K, BLOCK_SIZE))
    act_quant_kernel[grid](x, y, scale, M, K, MIN_AMAX, E4M3_MAX, scale_fmt == UE8M0, block_m, BLOCK_SIZE)
    return y, scale


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
    w_ptr, y_ptr, s_ptr, N, K, MIN_AMAX: tl.constexpr, E4M3_MAX: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(w)), MIN_AMAX, E4M3_MAX, UE8M0)
    y = tl.math.div_rn(w, scale + tl.zeros_like(w))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(s_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


def weight_quant(w: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See weight_quant_ref."""
    if not on_gpu(w):
        return weight_quant_ref(w, scale_fmt)
    w = w.contiguous()
    N, K = w.shape
    grid = (cdiv(N, BLOCK_SIZE), cdiv(K, BLOCK_SIZE))
    y, scale = torch.empty_like(w, dtype=E4M3), w.new_empty(grid, dtype=torch.float32)
    weight_quant_kernel[grid](w, y, scale, N, K, MIN_AMAX, E4M3_MAX, scale_fmt == UE8M0, BLOCK_SIZE)
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
    if not on_gpu(w):
        return weight_dequant_ref(w, scale, dtype)
    y = torch.empty(N, K, dtype=dtype, device=w.device)
    weight_dequant_kernel[grid](w.contiguous(), scale.contiguous(), y, N, K, BLOCK_SIZE)
    return y


# --- GEMM -------------------------------------------------------------------------------------------------------------


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
def fp8_gemm_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M, N, K, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """
    One program: a BLOCK_M x BLOCK_N tile of c. BLOCK_N divides 128, so a tile has one weight scale per slice of K.

    Small M is bound by reading b (N * K bytes), large M by the tensor cores (2 * M * N * K operations).
    """
    n_slices = tl.cdiv(K, BLOCK)
    n_tile = tl.program_id(0)
    rows = (tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    cols = (n_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK)
    a_ptrs = a_ptr + rows[:, None] * K + k[None, :]
    b_ptrs = b_ptr + cols[None, :] * K + k[:, None]
    a_scale_ptrs = a_scale_ptr + rows * n_slices
    b_scale_ptrs = b_scale_ptr + (n_tile * BLOCK_N // BLOCK) * n_slices
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(n_slices):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < K - g * BLOCK)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(k < K - g * BLOCK)[:, None], other=0.0)
        acc += tl.dot(a, b) * (tl.load(a_scale_ptrs + g)[:, None] * tl.load(b_scale_ptrs + g))
        a_ptrs += BLOCK
        b_ptrs += BLOCK
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(c_ptr.dtype.element_ty), mask=inside)


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
    c = torch.empty(M, N, dtype=dtype, device=a.device)
    # Small M: narrow tiles so that every multiprocessor reads a part of b, and many loads in flight.
    block_m, block_n, stages = (64, 128, 4) if M > 64 else (max(16, triton.next_power_of_2(M)), 32, 6)
    fp8_gemm_kernel[(cdiv(N, block_n), cdiv(M, block_m))](
        a.contiguous(), a_scale.contiguous(), b.contiguous(), b_scale.contiguous(), c, M, N, K,
        BLOCK_SIZE, block_m, block_n, K % BLOCK_SIZE == 0, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return c


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, scale_fmt: str | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K] -> x @ weight.T [..., N]. With a scale the weight is e4m3, and so is x on the way."""
    if scale is None:
        return F.linear(x, weight)
    y, y_scale = act_quant(x.flatten(0, -2), scale_fmt)
    return fp8_gemm(y, y_scale, weight, scale, x.dtype).unflatten(0, x.shape[:-1])


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K], weight [N, K] -> x @ weight.T [M, N] in fp32, never rounded to the inputs' type."""
    if x.is_cuda and weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
