"""
FP8: the references against float64 and tables, the Triton kernels against the references.

`python test_kernel.py` with TRITON_INTERPRET=1 runs the kernels on the CPU, through Triton's interpreter; that has to
be set before triton is imported, so a test does it in a process of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import kernel
from config import ModelArgs
from gpu import cdiv, counters
from interpreter import interpret, needs_interpreter
from kernel import (
    E4M3,
    Quantised,
    act_quant,
    act_quant_ref,
    fp8_gemm,
    fp8_gemm_ref,
    launch_gemm,
    library_gemm,
    linear,
    linear_fp32,
    weight_dequant,
    weight_dequant_ref,
    weight_quant,
    weight_quant_ref,
)
from kernel_parts import quantise_groups, scale_of_ref
from model import Linear, Transformer
from one_token import Rows, launch_one_token
from parallel import Parallel
from tiles import Tiles, are_few, choose_tiles

SCALE_FMTS = [None, "ue8m0"]
ODD_SHAPES = [(1, 128), (3, 200), (129, 130), (256, 384), (300, 72)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose size varies over rows and columns, so that neither scale can stand in for the other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    sizes = [torch.exp2(torch.randint(-6, 7, (n, 1), generator=generator).float()) for n in shape[-2:]]
    x = x * sizes[-1].T
    return (x * sizes[0] if x.dim() > 1 else x).to(dtype)


def blocks_of(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each block's scale at each of its elements."""
    return torch.kron(scale, torch.ones(128, 128, device=scale.device))[: shape[0], : shape[1]]


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """By a table of all the values: the nearest, of two equally near the one with an even last bit."""
    table = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 ... 448, in order
    magnitude = x.double().abs().clamp(max=448)
    above = torch.searchsorted(table, magnitude).clamp(1, 126)
    to_above, to_below = table[above] - magnitude, magnitude - table[above - 1]
    code = torch.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, above - 1)
    return torch.where(x < 0, -table[code], table[code])


def awkward(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """[M, K] inputs with what a quantiser may get wrong, M and K mostly not multiples of anything."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.cat([values, (values[1:] + values[:-1]) / 2])  # with 448 among them the scale is 1
    ties = torch.cat([F.pad(part, (0, 128 - part.numel() - 1)) for part in torch.cat([ties, -ties]).split(120)])
    ties = torch.cat([ties.view(-1, 127), torch.full((ties.numel() // 127, 1), 448.0)], 1)
    return {
        "random": random(131, 456, dtype=dtype),
        "one row": random(1, 7168, dtype=dtype),
        "huge": (random(17, 300) * 2.0**100).to(dtype),
        "tiny": (random(17, 300) * 2.0**-120).to(dtype),
        "zeros": torch.zeros(5, 257, dtype=dtype),
        "one element": F.pad(torch.tensor([[0.3]]), (100, 155, 2, 60)).to(dtype),
        "ties": ties.to(dtype),
        "largest": torch.full((3, 129), torch.finfo(torch.bfloat16).max, dtype=dtype),
        "powers of two": torch.exp2(torch.arange(-20.0, 20)).repeat_interleave(128).view(8, -1).to(dtype),
    }


def before_nans(x: torch.Tensor) -> torch.Tensor:
    """A copy that is followed in memory by NaN: what a kernel should not read, it should not read even times zero."""
    memory = torch.full((x.nbytes + 4096,), 0xFF, dtype=torch.uint8, device=x.device)
    copy = memory[: x.nbytes].view(x.dtype).view(x.shape)
    return copy.copy_(x)


def equal_bits(x: torch.Tensor, wanted: torch.Tensor) -> bool:
    if (x.dtype, x.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*(t.cpu().reshape(-1).view(torch.uint8) for t in (x, wanted)))


@triton.jit
def quotients_kernel(x_ptr, y_ptr, UE8M0: tl.constexpr):
    """One program: a group of 128."""
    at = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
    tl.store(y_ptr + at, quantise_groups(tl.load(x_ptr + at), UE8M0)[0])


def check_quotients(device: str, most: float) -> None:
    """What is rounded to e4m3: x / s, its relative error at most `most`, zeros with their sign."""
    x = torch.cat([awkward(torch.bfloat16)["ties"].float(), random(200, 128), random(200, 128).bfloat16().float()])
    x[:, 3::5] = torch.where(x[:, 3::5] < 0, -0.0, 0.0)
    for scale_fmt in SCALE_FMTS:
        y = torch.empty_like(x, device=device)
        quotients_kernel[(len(x),)](x.to(device), y, scale_fmt == "ue8m0")
        wanted, y = x / scale_of_ref(x.abs().amax(1, keepdim=True), scale_fmt), y.cpu()
        assert torch.equal(y.signbit(), wanted.signbit()), scale_fmt
        assert ((y - wanted).abs() <= most * wanted.abs()).all(), scale_fmt


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """DeepGEMM's measure: about half the squared relative error."""
    x, y = x.double(), y.double()
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def product(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """Of the quantised operands, in float64."""
    a_scale = a_scale.double().repeat_interleave(128, 1)[:, : a.shape[1]]
    return (a.double() * a_scale) @ (b.double() * blocks_of(b_scale, b.shape).double()).T


def relative(x: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((x.double() - wanted).norm() / wanted.norm()).item()


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("case", awkward(torch.float32))
def test_act_quant_by_table(case, scale_fmt):
    x = awkward(torch.float32)[case]
    y, scale = act_quant(x, scale_fmt)
    assert y.shape == x.shape and y.dtype == E4M3 and scale.shape == (x.shape[0], -(-x.shape[1] // 128))
    for g, group in enumerate(x.split(128, 1)):
        s = scale[:, g : g + 1]
        plain = (group.double().abs().amax(1, keepdim=True).clamp(min=1e-4) / 448).float()
        if scale_fmt:
            mantissa, _ = torch.frexp(s)
            assert (mantissa == 0.5).all() and (s >= plain).all() and (s < 2 * plain).all()
        else:
            assert torch.allclose(s, plain, rtol=2e-7, atol=0)
        assert torch.equal(y[:, g * 128 : (g + 1) * 128].double(), nearest_e4m3(group / s))


def test_act_quant_of_known_values():
    x = torch.zeros(2, 3, 256)
    x[1, 2, :3] = torch.tensor([448.0, -1.0625, 17.5])
    x[1, 2, 200] = 896.0
    y, scale = act_quant(x)
    assert scale.shape == (2, 3, 2) and scale[1, 2].tolist() == [1.0, 2.0]
    assert y[1, 2, [0, 1, 2, 200]].float().tolist() == [448.0, -1.0, 18.0, 448.0]
    assert not y[0].float().any() and torch.equal(scale[0], torch.full((3, 2), 1e-4) / torch.tensor(448.0))
    # 1e-4 / 448 lies between 2^-23 and 2^-22; 448 / 448 is a power of two and stays what it is.
    assert act_quant(x, "ue8m0")[1][1, 2].tolist() == [1.0, 2.0]
    assert act_quant(x, "ue8m0")[1][0].unique().tolist() == [2.0**-22]


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_groups_of_a_row_do_not_mix(scale_fmt):
    x = random(4, 384)
    y, scale = act_quant(x, scale_fmt)
    x[2, 128:256] *= 1000
    changed, changed_scale = act_quant(x, scale_fmt)
    others = torch.ones(4, 3, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(changed_scale[others], scale[others]) and changed_scale[2, 1] > 400 * scale[2, 1]
    assert equal_bits(changed.view(4, 3, 128)[others], y.view(4, 3, 128)[others])


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_weight_quant_and_back(shape, scale_fmt):
    w = random(*shape)
    y, scale = weight_quant(w, scale_fmt)
    assert y.shape == w.shape and scale.shape == tuple(-(-n // 128) for n in shape)
    for i, rows in enumerate(w.split(128, 0)):
        for j, block in enumerate(rows.split(128, 1)):
            plain = block.abs().max() / 448
            if scale_fmt:
                assert torch.frexp(scale[i, j])[0] == 0.5 and plain <= scale[i, j] < 2 * plain
            else:
                assert scale[i, j].item() == pytest.approx(plain.item(), rel=2e-7)
    spread = blocks_of(scale, w.shape)
    assert torch.equal(y.double(), nearest_e4m3(w / spread))

    back = weight_dequant(y, scale, torch.float32)
    assert torch.equal(back, (y.double() * spread.double()).float())
    # Half a step: 2^-4 of a normal number, 2^-10 of the scale below them.
    assert ((back - w).abs() <= torch.maximum(w.abs() * 2.0**-4, spread * 2.0**-10) * (1 + 1e-5)).all()
    assert equal_bits(weight_dequant(y, scale), back.bfloat16())
    if scale_fmt:
        again, same_scale = weight_quant(back, scale_fmt)
        assert torch.equal(same_scale, scale) and equal_bits(again, y)


def test_zero_weight():
    y, scale = weight_quant(torch.zeros(130, 5))
    assert not y.float().any() and (scale > 0).all() and not weight_dequant(y, scale).any()


GEMM_SHAPES = [(1, 128, 128), (3, 130, 200), (65, 129, 384), (7, 576, 640), (33, 64, 100), (128, 256, 1152)]


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize(("M", "N", "K"), GEMM_SHAPES)
def test_gemm_against_float64(M, N, K, scale_fmt):
    x, w = random(M, K), random(N, K, seed=1)
    operands = *act_quant(x, scale_fmt), *weight_quant(w, scale_fmt)
    exact = product(*operands)
    terms = product(operands[0].float().abs().to(E4M3), operands[1], operands[2].float().abs().to(E4M3), operands[3])
    in_fp32 = fp8_gemm(*operands, torch.float32)
    # Sums of up to 1152 terms in fp32, and for bf16 one rounding of half a step, 2^-8, on top.
    assert ((in_fp32 - exact).abs() <= terms * 2.0**-20).all()
    in_bf16 = fp8_gemm(*operands)
    assert in_bf16.dtype == torch.bfloat16
    assert ((in_bf16 - exact).abs() <= exact.abs() * 2.0**-8 * 1.001 + terms * 2.0**-20).all()
    smooth = torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    found = fp8_gemm(*act_quant(smooth, scale_fmt), *weight_quant(weight, scale_fmt))
    assert calc_diff(found, smooth.double() @ weight.double().T) < 1e-3


def test_shapes_that_do_not_belong_together():
    a, a_scale = act_quant(random(3, 200))
    b, b_scale = weight_quant(random(130, 200))
    good = (a, a_scale, b, b_scale)
    assert fp8_gemm(*good).shape == (3, 130)
    short = b_scale.T[:1]
    for i, wrong in ((0, a[:2]), (0, a[:, :128]), (1, a_scale[:, :1]), (2, b[:, :100]), (3, b_scale[:1]), (3, short)):
        operands = list(good)
        operands[i] = wrong
        with pytest.raises(ValueError, match="shape"):
            fp8_gemm(*operands)
    for wrong in (b_scale[:1], b_scale[:, :1], b_scale.flatten(), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="shape"):
            weight_dequant(b, wrong)


def test_linear():
    x, w = random(6, 256, dtype=torch.bfloat16), random(130, 256)
    assert torch.equal(linear(x, w.bfloat16()), F.linear(x, w.bfloat16()))
    for scale_fmt in SCALE_FMTS:
        y, scale = weight_quant(w, scale_fmt)
        found = linear(x, y, scale, scale_fmt)
        assert found.dtype == x.dtype and found.shape == (6, 130)
        assert torch.equal(found, fp8_gemm(*act_quant(x, scale_fmt), y, scale))
        assert linear(x.float(), y, scale, scale_fmt).dtype == torch.float32
        # What is quantised already is not quantised again; its own form is for products that are not in FP8.
        other = torch.full_like(x, torch.nan)
        assert torch.equal(linear(Quantised(other, *act_quant(x, scale_fmt)), y, scale), found)
        assert torch.equal(linear(Quantised(None, *act_quant(x, scale_fmt)), y, scale), found)
        assert torch.equal(linear(Quantised(x, *act_quant(other, scale_fmt)), w.bfloat16()), linear(x, w.bfloat16()))


def check_linear_fp32(device: str) -> None:
    x, w = (random(50, 384, dtype=torch.bfloat16, seed=seed).to(device) for seed in (0, 1))
    exact = x.double() @ w.double().T
    found = linear_fp32(x, w)
    assert found.dtype == torch.float32
    assert relative(found, exact) < 1e-6 < relative(exact.bfloat16(), exact)
    assert relative(linear_fp32(x.float(), w.float()), exact) < 1e-6


def test_linear_fp32():
    check_linear_fp32("cpu")


# --- the kernels through Triton's interpreter -------------------------------------------------------------------------


@pytest.mark.parametrize("K", [128, 256, 512, 1152, 2304, 7168])
@pytest.mark.parametrize("M", [65, 68, 4096])
def test_the_library_takes_these_scales(M, K):
    """By its own checks of shapes and strides, which PyTorch makes of tensors without data too."""
    a, b = torch.empty(M, K, dtype=E4M3, device="meta"), torch.empty(384, K, dtype=E4M3, device="meta")
    a_scale, b_scale = torch.empty(M, K // 128, device="meta"), torch.empty(3, K // 128, device="meta")
    assert library_gemm(a, a_scale, b, b_scale).shape == (M, 384)


@pytest.mark.parametrize("format", ["wide", "w8a16", "fp8"])
def test_tiles_fit(format):
    """In an H200's 227 KiB of shared memory for the operands, and 128 registers a thread for the sums."""
    for tokens, gated, grouped, inter in itertools.product((1, 8, 16, 33, 64, 128, 999), (0, 1), (0, 1), (176, 2048)):
        if grouped and tokens == 999:
            continue
        N, m_tiles = inter * (1 if gated else 3), 200 if grouped else cdiv(tokens, 64)
        tiles = choose_tiles(tokens, m_tiles, N, 32, bool(gated), format, bool(grouped))
        few = are_few(tokens, bool(grouped))
        row_of_w = 256 if few and format == "wide" else 128  # bytes that a step along K takes
        row_of_x = max(row_of_w, 256 if format == "w8a16" else 128)
        stage = tiles.block_m * row_of_x + (1 + gated) * tiles.block_n // tiles.pieces * row_of_w
        assert stage * tiles.stages * tiles.unroll <= 227 << 10, (tokens, gated, grouped, tiles)
        assert (1 + gated) * tiles.block_m * tiles.block_n <= 128 * 32 * tiles.warps, (tokens, gated, grouped, tiles)


def test_a_gpu_without_e4m3_dequantises_by_the_reference(monkeypatch):
    """Triton has no such type for an A100, and an A100 runs FP8 checkpoints too."""
    monkeypatch.setattr(kernel, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernel, "has_e4m3", lambda device: False)
    w = random(200, 300)
    y, scale = weight_quant(w)
    assert torch.equal(weight_dequant(y, scale), weight_dequant_ref(*weight_quant_ref(w)))


@needs_interpreter
def test_kernels_in_the_interpreter():
    assert interpret(__file__) == "interpreted"


def interpreted() -> None:
    def near(y: torch.Tensor, wanted: torch.Tensor) -> bool:
        # The interpreter's cast to e4m3 rounds ties up, is wrong for subnormals (codes below 8), and where rounding
        # carries into the exponent loses the carry (124.3 gives 64; the code then ends in 000). GPU tests are exact.
        y, wanted = y.view(torch.uint8).int(), wanted.view(torch.uint8).int()
        off = (y - wanted).abs()[(wanted & 0x78 != 0) & (wanted & 7 != 0)]
        return off.max() <= 1 and off.float().mean() < 0.05

    torch.set_num_threads(1)
    check_quotients("cpu", 2.0**-23)  # it rounds a fused multiply-add twice
    for scale_fmt in SCALE_FMTS:
        for M, K in ((1, 128), (3, 200), (66, 300)):
            for x in map(before_nans, (random(M, K), random(M, K, dtype=torch.bfloat16))):
                (y, scale), (wanted, wanted_scale) = act_quant(x, scale_fmt), act_quant_ref(x, scale_fmt)
                assert torch.equal(scale, wanted_scale) and near(y, wanted), (scale_fmt, M, K, x.dtype)
        for N, K in ((128, 128), (129, 130), (3, 300)):
            w = before_nans(random(N, K))
            (y, scale), (wanted, wanted_scale) = weight_quant(w, scale_fmt), weight_quant_ref(w, scale_fmt)
            assert torch.equal(scale, wanted_scale) and near(y, wanted), (scale_fmt, N, K)
            exact = weight_dequant_ref(wanted, scale, torch.float32)
            assert equal_bits(weight_dequant(wanted, scale, torch.float32), exact)
            # It cuts bf16 off instead of rounding it.
            assert ((weight_dequant(wanted, scale) - exact).abs() <= exact.abs() * 2.0**-7).all()
        for M, N, K in ((1, 128, 128), (3, 130, 200), (66, 129, 384), (130, 40, 256)):
            operands = *act_quant_ref(random(M, K), scale_fmt), *weight_quant_ref(random(N, K, seed=1), scale_fmt)
            for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):
                found = fp8_gemm(*map(before_nans, operands), dtype)
                assert relative(found, product(*operands)) < most, (scale_fmt, M, N, K, dtype)
    interpreted_gemm()
    wide, w = random(5, 300), random(40, 130, seed=1)
    y = torch.full((5, 40), torch.nan)
    launch_gemm(wide[:, 100:230], None, w, None, y)  # a part of something wider, as a latent is of a cache's entry
    assert relative(y, wide[:, 100:230].double() @ w.double().T) < 1e-6
    print("interpreted")


def interpreted_gemm() -> None:
    """Products cut for one, few and many tokens, in one part and in several, in three formats."""
    few, many = Tiles(16, 64, 1, 4, 3, True), Tiles(64, 128, 1, 4, 3, False)
    cases = [
        (1, 128, 128, few),
        (1, 128, 640, few._replace(split=5)),  # a slice each
        (3, 130, 2000, few._replace(split=3)),  # 16 slices, the last of 80: 6, 6 and 4
        (16, 65, 1100, few._replace(block_n=128, split=4)),  # 9 slices: 3, 3, 3 and none
        (17, 129, 1000, few._replace(block_m=32, split=2)),
        (66, 129, 456, many),
        (130, 40, 256, many._replace(block_m=128)),
        (65, 200, 700, many._replace(split=2)),
        (5, 200, 700, few._replace(block_n=128, pieces=2)),
        (16, 65, 1100, few._replace(block_n=128, split=2, pieces=2)),  # the second piece has one output
        (3, 129, 300, few._replace(block_n=128, pieces=4)),  # some have none
        (1, 128, 1024, Rows(16, 1, 1, 96)),
        (1, 130, 2000, Rows(4, 3, 2, 96)),  # 6, 6 and 4 slices, of which a step takes 4 in FP8
        (1, 65, 1100, Rows(8, 1, 4, 96)),
        (1, 33, 200, None),
        (7, 33, 200, None),
        (40, 129, 3000, None),
    ]
    for M, N, K, tiles in cases:
        x, w = random(M, K), random(N, K, seed=1)
        a, a_scale, b, b_scale = *act_quant_ref(x), *weight_quant_ref(w)
        column_major = a_scale.t().contiguous().t()
        wanted = {
            "fp8": product(a, a_scale, b, b_scale),
            "w8a16": x.double() @ weight_dequant_ref(b, b_scale, torch.float32).double().T,
            "wide": x.double() @ w.double().T,
        }
        inputs = {
            "fp8": [(a, a_scale, b, b_scale), (a, column_major, b, b_scale)],
            "w8a16": [(x, None, b, b_scale)],
            "wide": [(x, None, w, None)],
        }
        if isinstance(tiles, Rows):
            del inputs["w8a16"]
        for kind, alike in inputs.items():
            for operands in alike:
                y = before_nans(torch.full((M, N), torch.nan))
                operands = [None if t is None else strided_before_nans(t) for t in operands]
                if isinstance(tiles, Rows):
                    launch_one_token(*operands, y, cut=tiles)
                else:
                    launch_gemm(*operands, y, tiles=tiles)
                assert relative(y, wanted[kind]) < 1e-6, (kind, M, N, K, tiles)
                assert (y._base[y.nbytes :] == 0xFF).all()  # what lies behind it is as it was
                assert not counters(y.device).any(), (kind, M, N, K, tiles)


def strided_before_nans(x: torch.Tensor) -> torch.Tensor:
    """before_nans of a matrix that may be laid out by columns."""
    return before_nans(x) if x.is_contiguous() else before_nans(x.t()).t()


# --- the kernels on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_quotients():
    check_quotients("cuda", 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu_quantisation_bit_for_bit(dtype, scale_fmt):
    for case, x in awkward(dtype).items():
        for quantise, reference in ((act_quant, act_quant_ref), (weight_quant, weight_quant_ref)):
            (y, scale), (wanted, wanted_scale) = quantise(before_nans(x.cuda()), scale_fmt), reference(x, scale_fmt)
            assert y.is_cuda and equal_bits(scale, wanted_scale), (case, quantise)
            assert equal_bits(y, wanted), (case, quantise)
            on_gpu = reference(x.cuda(), scale_fmt)
            assert equal_bits(on_gpu[0], wanted) and equal_bits(on_gpu[1], wanted_scale), (case, reference)
    x = random(2, 3, 456, dtype=dtype).transpose(0, 1)
    assert equal_bits(act_quant(x.cuda(), scale_fmt)[0], act_quant_ref(x, scale_fmt)[0].contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (7168, 2112)], ids=str)
def test_gpu_weight_dequant_bit_for_bit(shape):
    w, scale = weight_quant_ref(random(*shape))
    for dtype in (torch.float32, torch.bfloat16):
        assert equal_bits(weight_dequant(w.cuda(), scale.cuda(), dtype), weight_dequant_ref(w, scale, dtype))


def linear_shapes() -> dict[str, list[tuple[int, int]]]:
    """[N, K] of the plain linears of the released models on one rank, and on a rank of 4 and of 8."""
    shapes: dict[str, list[tuple[int, int]]] = {}
    for config in sorted((Path(__file__).parents[1] / "configs").glob("*.json")):
        args = ModelArgs.load(config)
        args = replace(args, n_layers=args.n_dense_layers + 1, n_mtp_layers=0)
        for mp in (1, 4, 8):
            with torch.device("meta"):
                model = Transformer(args, Parallel(0, mp))
            linears = (module for module in model.modules() if isinstance(module, Linear))
            found = {tuple(module.weight.shape) for module in linears if module.weight.dim() == 2}
            found -= {tuple(model.head.weight.shape), tuple(model.layers[0].attn.wkv_b.weight.shape)}  # never in FP8
            shapes.setdefault(config.stem, []).extend(sorted(found))
    return shapes


ALL_M = (1, 2, 7, 8, 16, 33, 64, 65, 130, 1000, 4096)
ALL_SHAPES = sorted({shape for shapes in linear_shapes().values() for shape in shapes})
# A kernel is compiled for each: those with all numbers of tokens, and three of them for every other shape.
WITH_ALL_M = [(2176, 7168), (3072, 1536), (7168, 2048)]
M_OF_SHAPE = {shape: [ALL_M[(i + j) % len(ALL_M)] for j in (0, 4, 7)] for i, shape in enumerate(ALL_SHAPES)}
M_OF_SHAPE |= {shape: ALL_M for shape in [*WITH_ALL_M, (129, 456)]}


def test_shapes_are_the_models():
    assert set(WITH_ALL_M) < set(ALL_SHAPES) and {M for some in M_OF_SHAPE.values() for M in some} == set(ALL_M)
    assert linear_shapes()["config_671B"] == linear_shapes()["config_v3.1"]
    assert len(ALL_SHAPES) > 20


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), M_OF_SHAPE)
def test_gpu_gemm(N, K):
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(N, K, device="cuda", generator=generator)
    all_x = torch.randn(max(M_OF_SHAPE[N, K]), K, device="cuda", generator=generator)
    unquantised = all_x.double() @ w.double().T
    for scale_fmt in SCALE_FMTS:
        w_operands = weight_quant(w, scale_fmt)
        all_exact = product(*act_quant(all_x, scale_fmt), *w_operands)
        for M in M_OF_SHAPE[N, K]:
            operands, exact = (*act_quant(all_x[:M], scale_fmt), *w_operands), all_exact[:M]
            torch.full((M, N), torch.nan, dtype=torch.bfloat16, device="cuda")  # freed: the output gets this memory
            found = fp8_gemm(*operands)
            assert calc_diff(found, unquantised[:M]) < 1e-3, (M, scale_fmt)
            rounding = relative(exact.bfloat16(), exact)
            assert relative(found, exact) <= 1.05 * rounding, (M, scale_fmt, relative(found, exact), rounding)
            row_errors = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
            assert row_errors.max() < 2.0**-7, (M, scale_fmt)  # none of the rows is wrong
            if M in (7, 1000) and (N, K) in WITH_ALL_M:
                assert relative(fp8_gemm(*operands, torch.float32), exact) < 1e-3, (M, scale_fmt)
    assert not counters(w.device).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(2176, 7168), (576, 2048), (129, 456)])
def test_gpu_linear_in_bf16_and_with_fp8_weights(N, K):
    """Few tokens by gemm_kernel, more by the library; e4m3 weights under bf16 activations, in one part and several."""
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(N, K, device="cuda", generator=generator)
    quantised, scale = weight_quant(w)
    dequantised = weight_dequant_ref(quantised, scale, torch.float64)
    for M in (1, 8, 16, 33, 130):
        x = torch.randn(M, K, device="cuda", generator=generator).bfloat16()
        exact = x.double() @ w.bfloat16().double().T
        # The library may add parts of K that it has rounded.
        most = (1.05 if M <= 16 else 2) * relative(exact.bfloat16(), exact)
        assert relative(linear(x, w.bfloat16()), exact) <= most, M
        part = torch.cat([x, x.flip(0)], 1)[:, :K]  # its rows lie further apart than they are long
        assert torch.equal(linear(part, w.bfloat16()), linear(x, w.bfloat16())), M
        found = torch.full((M, N), torch.nan, dtype=torch.bfloat16, device="cuda")
        launch_gemm(x, None, quantised, scale, found)
        exact = x.double() @ dequantised.T
        assert relative(found, exact) <= 1.05 * relative(exact.bfloat16(), exact), M
    assert not counters(w.device).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "N", "K"), GEMM_SHAPES)
def test_gpu_gemm_of_uneven_scales(M, N, K):
    """Sizes that vary by powers of two over rows and columns: a scale of a neighbouring block would show."""
    operands = *act_quant_ref(random(M, K)), *weight_quant_ref(random(N, K, seed=1))
    found = fp8_gemm(*(before_nans(operand.cuda()) for operand in operands), torch.float32).cpu()
    assert relative(found, product(*operands)) < 1e-3
    assert relative(fp8_gemm_ref(*(operand.cuda() for operand in operands), torch.float32).cpu(), found.double()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("K", [128, 1100, 1408, 2048])
def test_gpu_two_slices_at_a_time(K, split):
    """The same sums as one by one, also of odd numbers of slices, the last of which is not whole; and in two pieces."""
    operands = *act_quant(random(5, K).cuda()), *weight_quant(random(200, K, seed=1).cuda())
    operands = [before_nans(operand) for operand in operands]
    exact = product(*(operand.cpu() for operand in operands))
    for unroll, pieces in ((1, 1), (2, 1), (1, 2), (2, 2)):
        found = torch.full((5, 200), torch.nan, device="cuda")
        launch_gemm(*operands, found, tiles=Tiles(16, 128, split, 4, 3, True, unroll=unroll, pieces=pieces))
        assert relative(found.cpu(), exact) < 1e-3, (unroll, pieces)
        if unroll == pieces == 1:
            first = found
        assert relative(found, first.double()) < 1e-6, (unroll, pieces)
    assert not counters(found.device).any()


@pytest.mark.gpu
def test_gpu_linear():
    check_linear_fp32("cuda")
    x, w = random(15, 384, dtype=torch.bfloat16), random(200, 384)
    for scale_fmt in SCALE_FMTS:
        y, scale = weight_quant_ref(w, scale_fmt)
        found, wanted = linear(x.cuda(), y.cuda(), scale.cuda(), scale_fmt), linear(x, y, scale, scale_fmt)
        assert found.shape == (15, 200) and relative(found.cpu(), wanted.double()) < 2.0**-8


if __name__ == "__main__":
    interpreted()
