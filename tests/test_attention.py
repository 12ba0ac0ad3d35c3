"""
Attention: the references against plain loops in float64, the Triton kernels against the references.

`python test_attention.py` with TRITON_INTERPRET=1 runs the kernels on the CPU, through Triton's interpreter; that has
to be set before triton is imported, so a test does it in a process of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention import (
    MOST_SPLITS,
    LatentConfig,
    PrefillConfig,
    Splits,
    latent_attention,
    latent_attention_kernel,
    latent_attention_ref,
    latent_config,
    latent_splits,
    launch_latent,
    launch_prefill,
    padded,
    prefill_attention,
    prefill_attention_ref,
)
from gpu import cdiv, on_hopper
from interpreter import interpret, needs_interpreter
from latent import merge_ref
from many_queries import takes


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(x: torch.Tensor, wanted: torch.Tensor) -> float:
    x, wanted = x.double().cpu(), wanted.double().cpu()
    return ((x - wanted).norm() / wanted.norm()).item()


def whole(found: torch.Tensor | Splits) -> torch.Tensor:
    """The attention over all keys."""
    return merge_ref(found).to(found.parts.dtype) if isinstance(found, Splits) else found


def latent_case(
    starts: list[int], S: int, H: int, C: int, R: int, dtype: torch.dtype, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    q, cache, rows, positions: row b's S queries stand at starts[b], .., and all that no query sees is NaN: what lies
    past them, other rows of the cache and the memory between its rows. Scores have a deviation of 3 times the scale.
    """
    B, n_rows = len(starts), len(starts) + 2
    q = randn(B, S, H, C + R, seed=1) * 30 / (C + R) ** 0.5
    memory = torch.full((n_rows, length + 3, C + R), torch.nan)
    rows = torch.randperm(n_rows, generator=torch.Generator().manual_seed(2))[:B]
    for row, start in zip(rows.tolist(), starts, strict=True):
        seen = min(start + S, length)
        memory[row, :seen] = randn(seen, C + R, seed=3 + row) / 10
    positions = torch.tensor(starts)[:, None] + torch.arange(S)
    return q.to(dtype), memory.to(dtype)[:, :length], rows, positions


def latent_exact(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, scale: float, C: int
) -> torch.Tensor:
    """Query by query, in float64."""
    out = q.new_zeros(*q.shape[:3], C, dtype=torch.float64)
    for b, row in enumerate(rows.tolist()):
        for s, position in enumerate(positions[b].tolist()):
            kv = cache[row, : position + 1].double()
            out[b, s] = (q[b, s].double() @ kv.T * scale).softmax(-1) @ kv[:, :C]
    return out


def prefill_case(
    starts: list[int], S: int, T: int, H: int, D_k: int, D_v: int, dtype: torch.dtype, garbage: float = torch.nan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    q, k, v, positions, with garbage past each row's last position. k and v are laid out heads first, with a gap
    between heads, and seen through a transposition.
    """
    B = len(starts)
    q, k, v = (randn(B, H, n, D, seed=n + D) for n, D in ((S, D_k), (T + 3, D_k), (T + 3, D_v)))
    for row, start in enumerate(starts):
        k[row, :, start + S :], v[row, :, start + S :] = garbage, garbage
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k[:, :, :T], v[:, :, :T]))
    return q, k, v, torch.tensor(starts)[:, None] + torch.arange(S)


def prefill_exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Query by query, in float64."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for s, position in enumerate(positions[b].tolist()):
            keys, values = (x[b, : position + 1].double() for x in (k, v))
            weights = (torch.einsum("hd,thd->ht", q[b, s].double(), keys) * scale).softmax(-1)
            out[b, s] = torch.einsum("ht,thd->hd", weights, values)
    return out


def poison_new_memory(patch) -> None:
    """Outputs and workspaces start as NaN: what a kernel leaves unwritten, or reads unwritten, shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor, *shape, **options) -> torch.Tensor:
        made = new_empty(x, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    patch(torch.Tensor, "new_empty", poisoned)


# --- references and choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 3])
def test_latent_reference(S):
    q, cache, rows, positions = latent_case([4, 0, 17], S, 3, 5, 2, torch.float32, 25)
    exact = latent_exact(q, cache, rows, positions, 0.3, 5)
    # The reference reads all of a row's first kv_len entries, so here what lies past the end must be finite.
    found = latent_attention(q, cache.nan_to_num(7.0), rows, positions, 17 + S, 0.3, 5)
    assert found.shape == (3, S, 3, 5) and found.dtype == torch.float32 and relative(found, exact) < 1e-6


def test_prefill_reference():
    q, k, v, positions = prefill_case([4, 0, 9], 6, 15, 3, 5, 2, torch.float32, garbage=7.0)
    exact = prefill_exact(q, k, v, positions, 0.3)
    found = prefill_attention(q, k, v, positions, 0.3)
    assert found.shape == (3, 6, 3, 2) and found.dtype == torch.float32 and relative(found, exact) < 1e-6


def test_latent_splits():
    for tiles in (1, 2, 16, 63, 2560):
        # Few programs fill the GPU once.
        for blocks in (1, 5, 64, 66, 131, 132):
            n = latent_splits(blocks, tiles, 132)
            assert 1 <= n <= min(tiles, MOST_SPLITS) and blocks * n <= 132
            assert n == min(tiles, MOST_SPLITS) or blocks * (n + 1) > 132
        # A few more than it holds at a time do not take twice the time.
        n = latent_splits(133, tiles, 132)
        assert n == 1 == tiles or cdiv(133 * n, 132) / n <= 1.5
        assert latent_splits(5000, tiles, 132) == 1


def test_what_many_queries_takes(monkeypatch):
    """On Hopper, the released models' keys in bf16, if 16 bytes can be copied wherever a key begins."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    monkeypatch.setattr("many_queries.capability", lambda _: (9, 0))
    q, memory = zeros(1, 1, 64, 576), zeros(3, 40, 1200)
    cache = memory[..., :576]
    assert takes(q, cache, 512) and takes(q, cache[1:, :7], 512)
    between_rows = zeros(3, 40 * 576 + 8)[:, : 40 * 576].unflatten(1, (40, 576))
    for other in (cache.float(), memory[..., 1:577], memory[..., :1152:2], zeros(3, 40, 580)[..., :576], between_rows):
        assert other.shape == cache.shape and not takes(q, other, 512), other.stride()
    assert not takes(q, memory[..., :192], 128) and not takes(q.float(), cache, 512)
    for capability in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr("many_queries.capability", lambda _, found=capability: found)
        assert not takes(q, cache, 512)


@pytest.mark.parametrize(("arch", "hopper", "most"), [(89, False, 101_376), (90, True, 232_448), (100, True, 232_448)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_latent_attention_fits(dtype, arch, hopper, most):
    """What the compiler asks for, of the shared memory that a GPU gives a program, at the released models' sizes."""
    sizes = itertools.product((1, 8, 64), (16, 32, 128, 512), (2048, 4096))
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    configs = {latent_config(B, queries, kv_len, torch_dtype, hopper) for B, queries, kv_len in sizes}
    for config, (C, R) in [*itertools.product(configs, [(512, 64)]), (min(configs), (40, 5))]:
        tensors = dict.fromkeys(("q_ptr", "cache_ptr", "out_ptr"), f"*{dtype}") | {"lse_ptr": "*fp32", "scale": "fp32"}
        types = dict.fromkeys(latent_attention_kernel.arg_names[:14], "i32") | tensors
        types |= {"rows_ptr": "*i64", "positions_ptr": "*i64"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name not in ("S", "scale")}
        fixed = {"C": C, "R": R, "C_PAD": padded(C), "R_PAD": padded(R), "BLOCK_M": config.block_m}
        fixed |= {"BLOCK_T": config.block_t, "H": 16, "SPLIT": True, "PDL": hopper}
        types |= dict.fromkeys(fixed, "constexpr")
        source = ASTSource(latent_attention_kernel, types, fixed, aligned)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": hopper}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert compiled.metadata.shared <= most, (config, compiled.metadata.shared)


# --- the kernels through Triton's interpreter -------------------------------------------------------------------------


@needs_interpreter
def test_kernels_in_the_interpreter():
    assert interpret(__file__) == "interpreted"


def interpreted() -> None:
    torch.set_num_threads(1)
    poison_new_memory(setattr)
    # fp32: sums of up to 70 terms. fp16, as the interpreter multiplies no bf16: the weights' rounding and the result's,
    # 2^-11 of each element at most.
    most = {torch.float32: 1e-6, torch.float16: 2.0**-10}
    for starts, S, H, C, R, length, splits in (
        ([0, 15, 16, 40], 1, 3, 40, 5, 45, 1),  # one key; a whole tile; one more; several
        ([0, 15, 16, 40], 1, 3, 40, 5, 45, 3),  # fewer tiles than splits in some rows
        ([37, 2], 3, 7, 32, 16, 70, 2),  # drafts: 21 queries, which a tile of 16 does not hold
        ([14, 66], 4, 5, 32, 16, 70, 5),  # drafts on both sides of a tile's edge, and up to the cache's end
        ([67, 68], 4, 5, 32, 16, 70, 7),  # drafts past the cache's end
    ):
        for dtype in most:
            q, cache, rows, positions = latent_case(starts, S, H, C, R, dtype, length)
            exact = latent_exact(q, cache, rows, positions, 0.5, C)
            config = LatentConfig(16, 16, num_warps=4, num_stages=1)
            found = launch_latent(q, cache, rows, positions, 0.5, C, config, splits)
            assert isinstance(found, Splits) == (splits > 1)
            found = whole(found)
            assert found.dtype == dtype and found.shape == (*q.shape[:3], C)
            assert relative(found, exact) < most[dtype], (starts, dtype, config, relative(found, exact))
    # More queries than a tile has keys: the first of them see none of the last tile.
    q, cache, rows, positions = latent_case([3, 30], 40, 1, 32, 16, torch.float32, 70)
    config = LatentConfig(64, 16, num_warps=4, num_stages=1)
    found = whole(launch_latent(q, cache, rows, positions, 0.5, 32, config, 2))
    assert relative(found, latent_exact(q, cache, rows, positions, 0.5, 32)) < most[torch.float32]
    q, cache, rows, positions = latent_case([14, 66], 4, 5, 32, 16, torch.float32, 70)
    wide = torch.full((2, 4, 6, 50), torch.nan)  # queries that are a part of something larger
    wide[:, :, :5, :48] = q
    wanted = latent_attention_ref(q, cache.nan_to_num(7.0), rows, positions, 70, 0.5, 32)
    for kv_len in (70, 1000):
        found = whole(latent_attention(wide[:, :, :5, :48], cache, rows, positions, kv_len, 0.5, 32))
        assert relative(found, wanted) < most[torch.float32]

    for starts, S, T, H, D_k, D_v in (
        ([0, 0], 20, 20, 2, 24, 16),
        ([0, 30, 13], 20, 50, 2, 40, 24),  # ragged starts; heads of 32 + 8
        ([3], 1, 4, 1, 16, 5),
        ([31, 32, 33], 16, 60, 1, 48, 32),  # around a tile's edge
    ):
        for dtype in most:
            q, k, v, positions = prefill_case(starts, S, T, H, D_k, D_v, dtype)
            exact = prefill_exact(q, k, v, positions, 0.3)
            for config in (PrefillConfig(16, 32, 4, 1), PrefillConfig(32, 16, 4, 1)):
                found = launch_prefill(q, k, v, positions, 0.3, config)
                assert found.dtype == dtype and found.shape == (*q.shape[:3], D_v)
                assert relative(found, exact) < most[dtype], (starts, dtype, config, relative(found, exact))
            shared = k[:, :, :1].expand_as(k)  # one key head for all
            found = prefill_attention(q, shared, v, positions, 0.3)
            assert relative(found, prefill_exact(q, shared, v, positions, 0.3)) < most[dtype]
    # A row whose padding runs past the cache's end: T ends before its last positions.
    q, k, v, positions = prefill_case([0, 9], 12, 16, 2, 16, 16, torch.float32)
    wanted = prefill_attention_ref(q, k.nan_to_num(), v.nan_to_num(), positions, 0.3)
    assert relative(prefill_attention(q, k, v, positions, 0.3), wanted) < most[torch.float32]
    print("interpreted")


# --- the kernels on a GPU ---------------------------------------------------------------------------------------------


def check_latent(found: torch.Tensor, exact: torch.Tensor) -> None:
    """FlashMLA's own tolerances, for values of deviation 0.1: bf16 weights and one rounding of the result."""
    found, exact = found.double(), exact.double()
    off = (found - exact).abs()
    assert ((off < 8e-4) | (off < exact.abs() * 2.01 / 128)).all(), off.max()
    assert 1 - 2 * (found * exact).sum() / (found**2 + exact**2).sum() < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 2, 4])
@pytest.mark.parametrize("H", [16, 32, 128])
@pytest.mark.parametrize("B", [1, 8, 64])
def test_gpu_latent_attention(B, H, S, monkeypatch):
    poison_new_memory(monkeypatch.setattr)
    C, R, length = 512, 64, 4096
    starts = [(length - S) * (b + 1) // B - 37 * (b % 3 > 0) for b in range(B)]  # ragged, some past 4,000
    q, cache, rows, positions = (x.cuda() for x in latent_case(starts, S, H, C, R, torch.bfloat16, length))
    exact = latent_attention_ref(q.float(), cache.nan_to_num(7.0), rows, positions, length, 0.7, C)
    for kv_len in (length, 10**6):
        check_latent(whole(latent_attention(q, cache, rows, positions, kv_len, 0.7, C)), exact)
    # One split and many, whatever B asks for; and the same answer each time.
    many = takes(q, cache, C)
    config = latent_config(B, S * H, length, q.dtype, on_hopper(q.device), many)
    assert config.many == (many and S * H > 16 and B * S * H > 512)
    for splits in (1, 7, MOST_SPLITS):
        found = whole(launch_latent(q, cache, rows, positions, 0.7, C, config, splits))
        check_latent(found, exact)
        assert torch.equal(whole(launch_latent(q, cache, rows, positions, 0.7, C, config, splits)), found)


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("B", "queries"), [(1, 16), (5, 16), (5, 64)])
def test_gpu_latent_attention_each_way(B, queries, hopper, monkeypatch):
    """Every way to run the kernel that latent_config may choose, on queries that fill no tile."""
    poison_new_memory(monkeypatch.setattr)
    starts, S, H = [0, 63, 64, 1000, 2043], 3, 7
    q, cache, rows, positions = (x.cuda() for x in latent_case(starts, S, H, 128, 32, torch.bfloat16, 2045))
    exact = latent_attention_ref(q.float(), cache.nan_to_num(7.0), rows, positions, 2045, 0.7, 128)
    config = latent_config(B, queries, 2045, q.dtype, hopper)
    for splits in (1, 6):
        check_latent(whole(launch_latent(q, cache, rows, positions, 0.7, 128, config, splits)), exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("S", "H"), [(1, 64), (3, 7), (2, 128), (4, 33)])
@pytest.mark.parametrize("length", [2045, 20])
def test_gpu_many_queries(length, S, H, monkeypatch):
    """
    The kernel for many queries, also where they fill no tile, or the cache is shorter than one; NaN past and before a
    row's keys; no race.
    """
    poison_new_memory(monkeypatch.setattr)
    starts = [start for start in (0, 1, 15, 62, 63, 64, 65, 127, 128, 1000, 2040) if start + S <= length]
    case = latent_case(starts, S, H, 512, 64, torch.bfloat16, length)
    q, cache, rows, positions = (x.cuda() for x in case)
    if not takes(q, cache, 512):
        pytest.skip("Hopper's alone")
    exact = latent_attention_ref(q.float(), cache.nan_to_num(7.0), rows, positions, length, 0.7, 512)
    config = latent_config(len(starts), 10**6, length, q.dtype, True, True)
    assert config.many
    for splits in (1, 2, 40):
        found = whole(launch_latent(q, cache, rows, positions, 0.7, 512, config, splits))
        check_latent(found, exact)
        for _ in range(20):
            assert torch.equal(whole(launch_latent(q, cache, rows, positions, 0.7, 512, config, splits)), found)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "C", "R"), [(8, 128, 32), (4, 128, 32), (2, 128, 32), (3, 40, 5), (16, 512, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu_latent_attention_of_other_sizes(dtype, H, C, R, monkeypatch):
    poison_new_memory(monkeypatch.setattr)
    q, cache, rows, positions = (x.cuda() for x in latent_case([0, 200, 33], 2, H, C, R, dtype, 201))
    exact = latent_exact(q, cache, rows, positions, 0.7, C)
    found = whole(latent_attention(q, cache, rows, positions, 201, 0.7, C))
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert relative(found, exact) < 1e-5
    else:
        check_latent(found, exact)


@pytest.mark.gpu
def test_gpu_latent_attention_in_a_graph():
    """Replayed for longer rows than it was captured with: lengths are read on the device."""
    q, cache, rows, positions = (x.cuda() for x in latent_case([900, 4000], 2, 16, 512, 64, torch.bfloat16, 4096))
    exact = latent_attention_ref(q.float(), cache.nan_to_num(7.0), rows, positions, 4096, 0.7, 512)
    moving = torch.zeros_like(positions)
    latent_attention(q, cache, rows, moving, 4096, 0.7, 512)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = latent_attention(q, cache, rows, moving, 4096, 0.7, 512)
    for positions_now in (positions, positions // 2, positions):
        moving.copy_(positions_now)
        graph.replay()
    check_latent(whole(found), exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("D_k", "D_v"), [(192, 128), (128, 64), (96, 64), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu_prefill_attention(dtype, D_k, D_v, monkeypatch):
    """Prompts from their start, and chunks at any position over more keys than they may see."""
    poison_new_memory(monkeypatch.setattr)
    # fp32: sums of a thousand terms. bf16: the weights' rounding and the result's, 2^-9 of each element at most.
    most = 1e-5 if dtype == torch.float32 else 2.0**-8
    cases = ([0, 0], 333, 333), ([0], 1, 1), ([0, 500, 129], 300, 800), ([700, 20], 1, 701), ([511], 512, 1023)
    for starts, S, T in cases:
        q, k, v, positions = (x.cuda() for x in prefill_case(starts, S, T, 4, D_k, D_v, dtype))
        finite = (x.float().nan_to_num(7.0) for x in (q, k, v))
        wanted = prefill_attention_ref(*finite, positions, 0.1)
        found = prefill_attention(q, k, v, positions, 0.1)
        assert found.dtype == dtype and relative(found, wanted) < most, (starts, relative(found, wanted))


@pytest.mark.gpu
def test_gpu_prefill_attention_of_many_heads():
    """A long second chunk of all of V3's heads."""
    q, k, v, positions = (x.cuda() for x in prefill_case([0, 1500, 777], 1000, 2500, 128, 192, 128, torch.bfloat16))
    found = prefill_attention(q, k, v, positions, 192**-0.5)
    for h in range(0, 128, 31):
        heads = (x[:, :, h : h + 1].nan_to_num(7.0) for x in (q, k, v))
        wanted = prefill_attention_ref(*heads, positions, 192**-0.5)
        assert relative(found[:, :, h : h + 1], wanted) < 2.0**-8, h


if __name__ == "__main__":
    interpreted()
