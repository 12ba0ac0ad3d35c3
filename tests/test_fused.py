"""
The small steps of fused.py and latent.py: their references against equations in float64, their kernels against the
references.

`python test_fused.py` with TRITON_INTERPRET=1 runs the kernels on the CPU, as in test_kernel.py.
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from attention import Splits, cache_write
from fused import add_rms_norm, add_rms_norm_ref, argmax, own_groups, silu_mul, silu_mul_ref, sum_terms
from gpu import counters
from interpreter import interpret, needs_interpreter
from kernel import E4M3, Quantised, act_quant_ref
from latent import (
    absorb_beside_latents,
    absorb_query,
    absorb_query_ref,
    apply_rotary_ref,
    expand_value,
    expand_value_ref,
    join_keys,
    join_keys_ref,
    latents,
    latents_ref,
    rotate_query,
    rotate_query_ref,
)

SCALE_FMTS = [None, "ue8m0"]
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotation_of(M: int, R: int, seed: int = 5) -> torch.Tensor:
    angle = random(M, R // 2, seed=seed) * 100
    return torch.stack([angle.cos(), angle.sin()], -1)


def turned(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x [M, heads, R] with each pair as a complex number, in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(rotation.double())[:, None]).flatten(-2)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@contextlib.contextmanager
def poisoned():
    """What torch.empty gives is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, case=None, roundings: float = 1.0) -> None:
    """
    Every element, fp32: to the rounding of a few operations. bf16: to half a step, 2^-9 of the next power of two, for
    each time it was rounded; Triton's interpreter cuts off instead, up to a whole one.
    """
    assert found.dtype != torch.float64 and found.shape == wanted.shape, case
    found, dtype = found.double(), found.dtype
    step = 2e-6 if dtype == torch.float32 else roundings * (2.0**-7 if triton.knobs.runtime.interpret else 2.0**-8)
    off = (found - wanted).abs() - step * wanted.abs()
    assert (off <= 1e-6 * wanted.abs().mean()).all(), (case, off.max())


def assert_quantised(found: Quantised, x: torch.Tensor, scale_fmt: str | None, case=None) -> None:
    """`found` is the e4m3 form of x, bit for bit but for the interpreter's cast (see test_kernel.py)."""
    values, scale = act_quant_ref(x, scale_fmt)
    assert found.values.dtype == E4M3 and torch.equal(found.scale, scale), case
    values, found_values = (y.view(torch.uint8).int() for y in (values, found.values))
    if triton.knobs.runtime.interpret:
        off = (found_values - values).abs()[(values & 0x78 != 0) & (values & 7 != 0)]
        assert off.max() <= 1 and off.float().mean() < 0.05, case
    else:
        assert torch.equal(found_values, values), case


def check_op(op, check, case=None) -> None:
    """op(quantise, scale_fmt, keep) gives x, of which check(x) holds, x with its e4m3 form, or that form alone."""
    with poisoned():
        check(op(False, None, True))
    for scale_fmt in SCALE_FMTS:
        with poisoned():
            kept, alone = op(True, scale_fmt, True), op(True, scale_fmt, False)
        check(kept.x)
        assert alone.x is None
        for found in (kept, alone):
            assert_quantised(found, kept.x, scale_fmt, (case, scale_fmt))


# --- each operation, on any device ------------------------------------------------------------------------------------


def check_add_rms_norm(device: str, M: int, D: int, P: int | None, dtype: torch.dtype) -> None:
    case = (M, D, P, dtype)
    x, weight = random(M, D, dtype=dtype).to(device), random(D, dtype=dtype, seed=1).to(device)
    delta = None if P is None else random(M, P, D, dtype=dtype, seed=2).to(device)
    if P == 1:
        delta = delta[:, 0]
    with poisoned():
        total, _ = add_rms_norm(x, delta, weight, EPS)
    if delta is None:
        assert total is x
    elif triton.knobs.runtime.interpret:
        assert_near(total, add_rms_norm_ref(x.float(), delta.float(), weight.float(), EPS)[0], case)
    else:
        assert torch.equal(total, add_rms_norm_ref(x, delta, weight, EPS)[0]), case
    wanted = norm(total, weight)
    check_op(lambda *how: add_rms_norm(x, delta, weight, EPS, *how)[1], lambda h: assert_near(h, wanted, case), case)
    assert torch.equal(add_rms_norm(x, delta, weight, EPS, True, None, False)[0], total), case


def check_sum_terms(device: str, M: int, P: int, D: int, dtype: torch.dtype) -> None:
    terms = random(M, P, D, dtype=dtype).to(device)
    with poisoned():
        assert_sum(sum_terms(terms), terms.double().sum(1), (M, P, D, dtype))


def check_rotate_query(device: str, M: int, H: int, N: int, R: int, dtype: torch.dtype) -> None:
    q, rotation = random(M, H, N + R, dtype=dtype).to(device), rotation_of(M, R).to(device)
    found = q.clone()
    assert rotate_query(found, rotation) is found
    beside = torch.full((M, H * (N + R) + 9), 7.0, dtype=dtype, device=device)  # heads that are a part of each row
    beside[:, : H * (N + R)] = q.flatten(1)
    for x in (found, rotate_query(beside[:, : H * (N + R)].unflatten(1, (H, -1)), rotation)):
        assert torch.equal(x[..., :N], q[..., :N])
        assert_near(x[..., N:], turned(q[..., N:], rotation), (M, H, N, R, dtype))
    assert (beside[:, H * (N + R) :] == 7).all()


def check_latents(device: str, B: int, S: int, Q: int, C: int, R: int, dtype: torch.dtype, cached: bool = True) -> None:
    case = (B, S, Q, C, R, dtype)
    M, gap, length = B * S, 3, 11
    y = random(M, Q + gap + C + R + 2, dtype=dtype).to(device)
    y[:, Q : Q + gap] = torch.nan
    y[:, -2:] = torch.nan
    q_weight = random(Q, dtype=dtype, seed=1).to(device) if Q else None
    kv_weight, rotation = random(C, dtype=dtype, seed=2).to(device), rotation_of(M, R).to(device)
    layers = random(2, B + 2, length, C + R, dtype=dtype, seed=3).to(device)
    rows = torch.randperm(B + 2, generator=torch.Generator().manual_seed(0))[:B].to(device)
    positions = (torch.arange(B)[:, None] * 3 % length + torch.arange(S)).to(device)  # of some rows past the end
    found_layers = layers.clone()
    inputs = y, q_weight, kv_weight, rotation, found_layers[1] if cached else None, rows, positions
    options = {"kv_at": Q + gap, "eps": EPS}
    with poisoned():
        q, kv = latents(*inputs, **options)
    y_kv = y[:, Q + gap :]
    assert_near(kv[:, :C], norm(y_kv[:, :C], kv_weight), case)
    assert_near(kv[:, C:], turned(y_kv[:, None, C : C + R], rotation)[:, 0], case)
    if cached:
        cache_write(layers[1], kv.view(B, S, -1), rows, positions)
    assert torch.equal(found_layers, layers), case
    if not Q:
        assert q is None and latents(*inputs, **options, quantise=True)[0] is None
        return

    def query(*how):
        return latents(*inputs, **options, **dict(zip(("quantise", "scale_fmt", "keep"), how, strict=True)))[0]

    check_op(query, lambda q: assert_near(q, norm(y[:, :Q], q_weight), case), case)


def check_halves(device: str, M: int, H: int, N: int, V: int, C: int, R: int, dtype: torch.dtype) -> None:
    """absorb_query and expand_value, each with only its own half of wkv_b to read."""
    case = (M, H, N, V, C, R, dtype)
    w, rotation = random(H, N + V, C, dtype=dtype).to(device), rotation_of(M, R).to(device)
    q, o = (random(*shape, dtype=dtype, seed=shape[-1]).to(device) for shape in ((M, H, N + R), (M, 1, H, C)))
    w_k, w_v = w.clone(), w.clone()
    w_k[:, N:] = torch.nan
    w_v[:, :N] = torch.nan
    with poisoned():
        absorbed = absorb_query(q, w_k[:, :N], rotation)
    assert_sum(absorbed[..., :C], torch.einsum("mhn,hnc->mhc", q[..., :N].double(), w[:, :N].double()), case)
    assert_near(absorbed[..., C:], turned(q[..., N:], rotation), case)
    wanted = torch.einsum("mshc,hvc->mshv", o.double(), w[:, N:].double()).flatten(1)
    check_op(lambda *how: expand_value(o, w_v[:, N:], *how), lambda x: assert_sum(x, wanted, case), case)


def check_beside_latents(device: str, B: int, S: int, H: int, N: int, C: int, R: int, dtype: torch.dtype) -> None:
    """To the bit what its two parts make, from queries and latents that stand in one row."""
    M, gap, length = B * S, 3, 11
    y = random(M, H * (N + R) + gap + C + R + 2, dtype=dtype).to(device)
    w_uk, kv_weight = (random(*shape, dtype=dtype, seed=len(shape)).to(device) for shape in ((H, N, C), (C,)))
    rotation, rows = rotation_of(M, R).to(device), torch.arange(B).flip(0).to(device)
    positions = (torch.arange(B)[:, None] * 3 % length + torch.arange(S)).to(device)  # of some rows past the end
    cache = random(B, length, C + R, dtype=dtype, seed=3).to(device)
    wanted_cache, options = cache.clone(), {"kv_at": H * (N + R) + gap, "eps": EPS}
    with poisoned():
        found = absorb_beside_latents(y, w_uk, kv_weight, rotation, cache, rows, positions, **options)
    latents(y, None, kv_weight, rotation, wanted_cache, rows, positions, **options)
    assert torch.equal(cache, wanted_cache)
    assert torch.equal(found, absorb_query(y[:, : H * (N + R)].unflatten(1, (H, -1)), w_uk, rotation))


def check_expand_splits(device: str, B: int, splits: int, S: int, H: int, V: int, C: int, dtype: torch.dtype) -> None:
    """expand_value of what attention left unmerged: splits of very different weights, others empty."""
    case = (B, splits, S, H, V, C, dtype)
    w, parts = random(H, V, C, dtype=dtype).to(device), random(B, splits, S, H, C, dtype=dtype, seed=1).to(device)
    lse = random(B, splits, S, H, seed=2).to(device) * 5 - 40
    empty = (torch.arange(B * splits).view(B, splits) % 3 == 1).to(device) & (splits > 1)
    weight = (lse.double() * np.log(2)).masked_fill(empty[:, :, None, None], -torch.inf).softmax(1)
    wanted = torch.einsum("bnsh,bnshc,hvc->bshv", weight, parts.double(), w.double()).flatten(2).flatten(0, 1)
    lse[empty], parts[empty] = -torch.inf, 0
    check_op(lambda *how: expand_value(Splits(parts, lse), w, *how), lambda x: assert_sum(x, wanted, case), case)


def assert_sum(found: torch.Tensor, wanted: torch.Tensor, case) -> None:
    """A sum of products, added in fp32 and rounded once."""
    error = (found.double() - wanted).abs()
    step = 0 if found.dtype == torch.float32 else 2.0**-7 if triton.knobs.runtime.interpret else 2.0**-8
    assert (error <= step * wanted.abs() + 1e-5 * wanted.abs().mean()).all(), (case, error.max())


def check_silu_mul(device: str, M: int, inter: int, dtype: torch.dtype) -> None:
    case = (M, inter, dtype)
    y = random(M, 2, inter, dtype=dtype).to(device) * 3
    gate, up = y.double().unbind(1)
    wanted = gate * gate.sigmoid() * up
    check_op(lambda *how: silu_mul(y, *how), lambda x: assert_near(x, wanted, case, roundings=2.01), case)


def check_join_keys(device: str, M: int, H: int, N: int, V: int, R: int, dtype: torch.dtype) -> None:
    kv, k_pe = random(M, H, N + V, dtype=dtype).to(device), random(M, 7 + R, dtype=dtype).to(device)[:, 7:]
    assert torch.equal(join_keys(kv, k_pe, N), join_keys_ref(kv, k_pe, N)), (M, H, N, V, R, dtype)


def check_argmax(device: str, B: int, V: int) -> None:
    """Of equal numbers the first, wherever the programs' chunks end."""
    x = random(B, V).to(device)
    x[0, V // 3], x[0, V - 1] = 9.0, 9.0
    x[-1, -1] = 10.0
    assert argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()], (B, V)
    assert not counters(x.device).any()


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_references(dtype):
    for M, D, P in itertools.product((1, 5), (128, 200), (None, 1, 3)):
        check_add_rms_norm("cpu", M, D, P, dtype)
    check_sum_terms("cpu", 3, 4, 40, dtype)
    check_rotate_query("cpu", 3, 5, 24, 12, dtype)
    check_latents("cpu", 5, 3, 136, 40, 12, dtype)
    check_latents("cpu", 2, 3, 0, 40, 12, dtype, cached=False)
    check_beside_latents("cpu", 2, 3, 5, 24, 40, 12, dtype)
    check_halves("cpu", 3, 5, 24, 16, 40, 12, dtype)
    check_halves("cpu", 3, 2, 24, 128, 40, 12, dtype)
    check_expand_splits("cpu", 2, 5, 3, 2, 128, 40, dtype)
    check_silu_mul("cpu", 3, 300, dtype)


def test_roundings():
    """Where bf16 is rounded: the sum before the norm, each factor of the gate, and nowhere in between."""
    x, delta = random(3, 256, dtype=torch.bfloat16), random(3, 2, 256, dtype=torch.bfloat16, seed=1)
    weight = random(256, dtype=torch.bfloat16, seed=2)
    total, h = add_rms_norm_ref(x, delta, weight, EPS)
    assert torch.equal(total, (x.double() + delta.double().sum(1)).bfloat16())
    assert torch.equal(h, norm(total, weight).bfloat16())
    y = random(3, 2, 256, dtype=torch.bfloat16, seed=3)
    silu = (y[:, 0].double() * y[:, 0].double().sigmoid()).bfloat16()
    assert torch.equal(silu_mul_ref(y), (silu.double() * y[:, 1].double()).bfloat16())


def test_rotary_is_a_complex_product():
    x, angle = random(7, 3, 64), random(7, 32, seed=1) * 1000
    rotation = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    wanted = torch.view_as_real(pairs * rotation[:, None]).flatten(-2)
    assert torch.equal(apply_rotary_ref(x, torch.view_as_real(rotation)), wanted)


# --- the kernels through Triton's interpreter -------------------------------------------------------------------------


@needs_interpreter
def test_kernels_in_the_interpreter():
    assert interpret(__file__) == "interpreted"


def interpret_bf16_dots() -> None:
    """The interpreter's own tl.dot multiplies the bits of bf16 as if they were integers."""
    plain = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)


def interpreted() -> None:
    torch.set_num_threads(1)
    interpret_bf16_dots()
    for dtype in DTYPES:
        for M, D, P in itertools.product((1, 3), (128, 200, 640, 2100), (None, 1, 9)):
            check_add_rms_norm("cpu", M, D, P, dtype)
        check_sum_terms("cpu", 3, 9, 1030, dtype)
        check_rotate_query("cpu", 3, 5, 24, 12, dtype)
        check_rotate_query("cpu", 2, 35, 8, 32, dtype)
        for B, S, Q in ((1, 1, 256), (5, 3, 136), (2, 2, 0)):
            check_latents("cpu", B, S, Q, 40, 12, dtype)
        check_latents("cpu", 2, 3, 136, 128, 32, dtype, cached=False)
        for M, H, N, V, C, R in ((1, 2, 128, 128, 512, 64), (3, 5, 24, 16, 40, 12), (17, 2, 16, 128, 72, 16)):
            check_halves("cpu", M, H, N, V, C, R, dtype)
        check_beside_latents("cpu", 1, 1, 2, 16, 200, 16, dtype)
        check_beside_latents("cpu", 3, 6, 2, 24, 40, 12, dtype)
        for B, splits, S, H, V, C in (
            (1, 2, 1, 2, 128, 72),
            (1, 33, 1, 2, 16, 40),
            (3, 7, 2, 2, 128, 40),
            (1, 3, 3, 1, 40, 40),
        ):
            check_expand_splits("cpu", B, splits, S, H, V, C, dtype)
        for M, inter in ((1, 128), (3, 300), (7, 640)):
            check_silu_mul("cpu", M, inter, dtype)
        for M, H, N, V, R in ((1, 3, 24, 16, 8), (3, 17, 128, 128, 64)):
            check_join_keys("cpu", M, H, N, V, R, dtype)
    for B, V in ((2, 5), (1, 2049), (3, 5000)):
        check_argmax("cpu", B, V)
    print("interpreted")


@pytest.mark.parametrize("slots", [None, 1, 108, 132])
@pytest.mark.parametrize("quantise", [False, True])
def test_parts_of_a_norm(quantise, slots):
    """Whole powers of two, as a kernel's blocks are; and no more programs than run at a time."""
    for M, groups in itertools.product(range(1, 300), (1, 2, 8, 16, 32, 64)):
        own = own_groups(M, groups, quantise, slots)
        assert 1 <= own <= groups and own & (own - 1) == 0, (M, groups)
        assert slots is None or own == groups or M * (groups // own) <= slots, (M, groups)
    assert own_groups(1, 64, True, slots) < 64 or slots == 1


# --- the kernels on a GPU ---------------------------------------------------------------------------------------------

GPU_M = [1, 2, 5, 6, 7, 9, 16, 64, 65, 1000, 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", GPU_M)
def test_gpu_add_rms_norm(M, dtype):
    for D in (7168, 2048, 256, 200):
        for P in (None, 1) if M > 100 else (None, 1, 3, 9):
            check_add_rms_norm("cuda", M, D, P, dtype)
        check_sum_terms("cuda", M, 9, D, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", GPU_M)
def test_gpu_rotary_and_latents(M, dtype):
    for B, S in ((M, 1), (1, M)):
        for Q, C, R in ((1536, 512, 64), (0, 512, 64), (128, 128, 32)):
            check_latents("cuda", B, S, Q, C, R, dtype)
    for H, N, R in ((128 if M < 1000 else 16, 128, 64), (8, 64, 32), (5, 24, 12)):
        check_rotate_query("cuda", M, H, N, R, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", [1, 2, 7, 16, 17, 64, 65, 256])
def test_gpu_halves(M, dtype):
    for H, N, V, C, R in ((128, 128, 128, 512, 64), (16, 128, 128, 512, 64), (8, 64, 64, 128, 32), (5, 24, 16, 40, 12)):
        check_halves("cuda", M, H, N, V, C, R, dtype)
        B, S = (M // 2, 2) if M % 2 == 0 else (M, 1)
        check_beside_latents("cuda", B, S, H, N, C, R, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("B", "splits", "S"),
    [(1, 2, 1), (1, 16, 1), (1, 100, 1), (1, 17, 2), (3, 5, 2), (8, 17, 1), (64, 2, 1), (33, 3, 2)],
)
def test_gpu_expand_splits(B, splits, S, dtype):
    for H, V, C in ((128, 128, 512), (16, 128, 512), (8, 64, 128), (5, 16, 40)):
        check_expand_splits("cuda", B, splits, S, H, V, C, dtype)
    parts, w = random(B, splits, S, 128, 512, dtype=dtype).cuda(), random(128, 128, 512, dtype=dtype, seed=1).cuda()
    left = Splits(parts, random(B, splits, S, 128, seed=2).cuda())
    first = expand_value(left, w)
    for _ in range(20):
        assert torch.equal(expand_value(left, w), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", [*GPU_M, 9, 36864])
def test_gpu_silu_mul(M, dtype):
    for inter in (2048, 256, 200) if M > 1000 else (18432, 10944, 2048, 1408, 512, 256, 200):
        check_silu_mul("cuda", M, inter, dtype)


@pytest.mark.gpu
def test_gpu_join_keys_and_argmax():
    for dtype in DTYPES:
        for M in (1, 7, 1000):
            check_join_keys("cuda", M, 128, 128, 128, 64, dtype)
            check_join_keys("cuda", M, 3, 24, 16, 8, dtype)
    for B, V in ((2, 5), (1, 129280), (64, 102400), (3, 5000)):
        check_argmax("cuda", B, V)


@pytest.mark.gpu
def test_gpu_references():
    """They run on a GPU too, and agree with themselves on the CPU."""
    x, weight, rotation = random(5, 256), random(256, seed=1), rotation_of(5, 32)
    assert_near(add_rms_norm_ref(x.cuda(), None, weight.cuda(), EPS)[1], norm(x, weight).cuda())
    assert_near(silu_mul_ref(x.view(5, 2, 128).cuda()), silu_mul_ref(x.view(5, 2, 128)).double().cuda())
    q, w = random(5, 4, 96), random(4, 80, 128)
    for found, wanted in (
        (rotate_query_ref(q.cuda(), rotation.cuda()), rotate_query_ref(q.clone(), rotation)),
        (absorb_query_ref(q.cuda(), w[:, :64].cuda(), rotation.cuda()), absorb_query_ref(q, w[:, :64], rotation)),
        (expand_value_ref(q[:, None].cuda(), w[:, :, :96].cuda()), expand_value_ref(q[:, None], w[:, :, :96])),
    ):
        assert_sum(found.cpu(), wanted.double(), found.shape)
    place = torch.zeros(2, 5, 256 + 32), torch.arange(1), torch.arange(5)[None]
    y = random(5, 256 + 256 + 32)
    found = latents_ref(*(t.cuda() for t in (y, weight, weight, rotation, *place)), kv_at=256, eps=EPS)
    wanted = latents_ref(y, weight, weight, rotation, *place, kv_at=256, eps=EPS)
    for part in range(2):
        assert_sum(found[part].cpu(), wanted[part].double(), part)


if __name__ == "__main__":
    interpreted()
