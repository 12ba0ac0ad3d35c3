"""
How a matrix product is cut into programs of gemm_kernel (kernel.py): measured on an H200, product by product, inside
the step; benchmarks/README.md has what was tried. N out features, K in features.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from gpu import cdiv


class Tiles(NamedTuple):
    """How gemm_kernel cuts its work: tokens and outputs of a tile, parts of K; and a program's warps and stages."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    swap: bool  # weights as the left operand
    unroll: int = 1  # slices of K that are fetched at a time
    pieces: int = 1  # programs that share a tile's outputs
    tma_x: bool = False  # through descriptors, by Hopper's copy engine
    tma_w: bool = False


def parts(slices: int, most: int) -> int:
    """Into how many parts to cut `slices` of K, `most` at most, so that none is empty."""
    return cdiv(slices, cdiv(slices, min(max(most, 1), slices)))


def are_few(tokens: int, grouped: bool) -> bool:
    """Whether a product with so many tokens is bound by reading its weights."""
    return tokens <= (63 if grouped else 64)


def choose_tiles(tokens: int, m_tiles: int, N: int, slices: int, gated: bool, format: str, grouped: bool) -> Tiles:
    """
    tokens: at most so many are multiplied with a weight. m_tiles: tiles along them. slices: steps along K. format: as
    in gemm_kernel.

    Few tokens: about two programs for each of an H200's 132 multiprocessors, of 8 slices at least, or narrower ones
    where that many cannot be had. For one or two tokens about three: in FP8 so many fit at a time.
    """
    wide = format == "wide"
    if not are_few(tokens, grouped):
        block_m = min(tokens, 128) if grouped else 64
        if wide:  # two programs a multiprocessor, one of which multiplies while the other writes: 553 -> 522 us, down
            return Tiles(block_m, 64 if gated else 128, 1, 4, 3, False)
        return Tiles(block_m, 128, 1, 8 if gated else 4, 3, False)
    block_m = max(16, triton.next_power_of_2(tokens))
    wide_tiles = m_tiles * cdiv(N, 128)
    if gated and wide:
        programs = m_tiles * cdiv(N, 64)
        return Tiles(block_m, 64, parts(slices, min(3, 300 // programs)), 4, 3, True)
    if gated and grouped and format == "fp8" and block_m == 16 and wide_tiles > 1000:
        # Reading 256 bytes of each weight's row at a time, three programs a multiprocessor: 64 rows 1,566 -> 1,482 us.
        return Tiles(block_m, 128, 1, 4, 2, True, unroll=2, pieces=2)
    if gated:  # five parts; of many tokens or tiles three at most; more to give each multiprocessor a program
        most = 5 if tokens <= 16 and wide_tiles <= 2400 else min(3, 560 // wide_tiles)
        return Tiles(block_m, 128, parts(slices, max(132 // wide_tiles, most)), 8, 3, True)
    if grouped and wide and block_m == 16 and wide_tiles > 1200:  # V2-Lite's step of 64 rows: 8.545 -> 8.500 ms
        return Tiles(block_m, 128, 1, 4, 2, True)
    if grouped and wide:
        return Tiles(block_m, 64, 1, 4, 4 if wide_tiles < 600 else 3, True)
    if grouped:  # where the tiles are many, 256 bytes of each weight's row at a time: 13.22 -> 13.19 ms for 64 rows
        return Tiles(block_m, 128, 1, 4, 3, True, unroll=2 if block_m == 16 and wide_tiles > 2000 and slices > 8 else 1)
    if wide_tiles < 20 or slices <= 16:
        split = parts(slices, min(240 // (m_tiles * cdiv(N, 64)), slices // (8 if wide else 3)))
        return Tiles(block_m, 64, split, 4, 4 if wide else 5, True)
    split = parts(slices, min((396 if tokens <= 2 else 240) // wide_tiles, slices // 8))
    if 2 < tokens <= 16:
        return Tiles(block_m, 128, split, 8, 3 if wide else 5, True)
    return Tiles(block_m, 128, split, 4, 3 if wide else 4, True)


def medium_tiles(N: int, slices: int) -> Tiles:
    """
    choose_tiles for 33 to 64 tokens in FP8 on Hopper, whose copy engine brings both operands: 15.1 -> 12.5 us for
    24576 x 1536, 47.2 -> 41.7 us for 7168 x 16384, 18.3 -> 12.7 us for 2176 x 7168.
    """
    block_n, programs = (128, 240) if N >= 4096 and slices >= 64 else (64, 150)
    return Tiles(64, block_n, parts(slices, programs // cdiv(N, block_n)), 4, 4, False)
