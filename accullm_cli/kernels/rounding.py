"""The inner loops of rounding on a GPU: the launches of cuda/feedback_round.cu, cuda/descend.cu and cuda/trellis.cu.

Their sums are those of the CPU's compiled loops, term for term, so that the same arguments give the same codes. What
differs between the devices are the matrix products and factorizations around them, which torch computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.launch import Launch
from accullm_cli.quant import loops
from accullm_cli.quant.loops import Descent, Loops, Tile
from accullm_cli.quant.trellis import SEGMENT
from accullm_cli.quant.wavefront import round_chained

REALS = {torch.float32: "float", torch.float64: "double"}
# A warp holds a row's columns in registers, four per lane.
MOST_COLUMNS = 128
ROWS_PER_BLOCK = 8
# What a block of cuda/descend.cu has, and what it keeps in shared memory before the slope.
DESCENT_THREADS = 256
TURN_BYTES = 16
# What a block of cuda/trellis.cu keeps in shared memory, but for two working numbers for each row of a segment.
COLUMN_BYTES = SEGMENT * (4 * 8 + 4 + 2) + 2 * 4


class TileStruct(ctypes.Structure):
    """`Tile` of cuda/feedback_round.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("wanted", "fed", "upper", "scale", "zero", "group", "levels")),
        *((name, ctypes.c_void_p) for name in ("share", "features", "codes", "error")),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "largest_code")),
    )


class DescentStruct(ctypes.Structure):
    """`Descent` of cuda/descend.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "error", "slope", "hessian", "curvature", "scale", "levels")),
        *((name, ctypes.c_void_p) for name in ("product", "fisher")),
        ("ridge", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "columns_per_group", "largest_code")),
        *((name, ctypes.c_int) for name in ("sweeps", "slope_is_shared")),
    )


class ChainsStruct(ctypes.Structure):
    """`Tile` of cuda/trellis.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("wanted", "fed", "upper", "scale", "group", "levels", "codes", "error")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "levels_count")),
    )


class ChainDescentStruct(ctypes.Structure):
    """`Descent` of cuda/trellis.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "error", "product", "hessian", "curvature", "scale", "levels")),
        ("ridge", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "columns_per_group", "levels_count")),
        ("sweeps", ctypes.c_int),
    )


def cuda_loops(device: torch.device, launch: Callable[[Launch, torch.device], None], shared_bytes: int) -> Loops:
    """The loops of a GPU.

    Tiles whose rows feed each other are rounded by torch, see quant.wavefront; a block of rows that feed each other is
    one chain in descent, which one block of threads goes through. Those of a trellis go through the CPU.

    Args:
        launch: `kernels.device.launch`.
        shared_bytes: that one block of the device may have.
    """

    def round_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        if tile.trellis and tile.rows is not None:
            return loops.round_tile(tile)
        if tile.rows is not None:
            return round_chained([tile])[0]
        own = _contiguous(tile)
        codes, error = torch.empty_like(own.wanted, dtype=torch.uint8), torch.empty_like(own.wanted)
        launch((chains_launch if tile.trellis else tile_launch)(own, codes, error), device)
        return codes, error

    def descend(descent: Descent) -> None:
        if descent.chain is not None:
            loops.descend(descent)
            return
        grid = replace(descent.grid, scale=descent.grid.scale.contiguous())
        rows = None if descent.rows is None else (descent.rows[0], descent.rows[1].contiguous())
        own = replace(descent, hessian=descent.hessian.contiguous(), grid=grid, rows=rows)
        curvature = curvature_of(own)  # a launch holds addresses alone
        if descent.trellis:
            launch(chain_descent_launch(own, curvature), device)
        else:
            launch(descent_launch(own, curvature, shared_bytes), device)

    return Loops(device, round_tile, descend, round_chained)


def tile_launch(tile: Tile, codes: torch.Tensor, error: torch.Tensor) -> Launch:
    """The launch that rounds a tile, all of whose tensors are contiguous.

    Args:
        codes: uint8 [N, C]; written, as is error [N, C].

    Raises:
        AccullmError: more than 128 columns, or a working dtype other than float32 and float64.
    """
    rows, columns = tile.wanted.shape
    if columns > MOST_COLUMNS:
        raise AccullmError(f"no CUDA kernel rounds {columns} columns at once: {MOST_COLUMNS} at most")
    chance = tile.chance
    arguments = TileStruct(
        *(tensor.data_ptr() for tensor in (tile.wanted, tile.fed, tile.upper, tile.scale, tile.zero, tile.group)),
        None if tile.levels is None else tile.levels.data_ptr(),
        None if chance is None else chance.share.data_ptr(),
        None if chance is None else chance.features.data_ptr(),
        codes.data_ptr(),
        error.data_ptr(),
        0 if chance is None else chance.seed,
        0 if chance is None else chance.stream,
        rows,
        columns,
        tile.scale.shape[1],
        tile.largest_code,
    )
    return Launch(
        source="feedback_round.cu",
        kernel="feedback_round",
        defines=_defines(tile.wanted.dtype),
        grid=(-(-rows // ROWS_PER_BLOCK), 1, 1),
        threads=ROWS_PER_BLOCK * 32,
        shared_bytes=0,
        arguments=(arguments,),
    )


def chains_launch(tile: Tile, codes: torch.Tensor, error: torch.Tensor) -> Launch:
    """The launch that rounds a tile of a trellis; as for `tile_launch`, of any number of columns."""
    assert tile.levels is not None, "a trellis has levels"
    rows, columns = tile.wanted.shape
    tensors = (tile.wanted, tile.fed, tile.upper, tile.scale, tile.group, tile.levels, codes, error)
    sizes = rows, columns, tile.scale.shape[1], len(tile.levels)
    return _trellis_launch("trellis_round", tile.wanted.dtype, ChainsStruct(*(_at(own) for own in tensors), *sizes))


def chain_descent_launch(descent: Descent, curvature: torch.Tensor) -> Launch:
    """The launch that moves whole columns of a trellis; as for `descent_launch`."""
    assert descent.levels is not None, "a trellis has levels"
    grid = descent.grid
    tensors = (
        descent.codes, descent.error, descent.slope, descent.hessian, curvature, grid.scale, descent.levels,
    )  # fmt: skip
    sizes = *descent.codes.shape, grid.scale.shape[1], grid.columns_per_group, len(descent.levels), descent.sweeps
    arguments = ChainDescentStruct(*(_at(own) for own in tensors), descent.ridge, *sizes)
    return _trellis_launch("trellis_descend", descent.slope.dtype, arguments)


def _trellis_launch(kernel: str, dtype: torch.dtype, arguments: ChainsStruct | ChainDescentStruct) -> Launch:
    defines = _defines(dtype)
    return Launch(
        source="trellis.cu",
        kernel=kernel,
        defines=defines,
        grid=(-(-arguments.rows // SEGMENT), 1, 1),
        threads=SEGMENT,
        shared_bytes=COLUMN_BYTES + 2 * SEGMENT * dtype.itemsize,
        arguments=(arguments,),
    )


def _at(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def curvature_of(descent: Descent) -> torch.Tensor:
    """The diagonal of H + ridge, and 0 in columns whose codes stay as they are: [K]."""
    return (descent.hessian.diagonal() + descent.ridge).masked_fill(~descent.movable, 0)


def descent_launch(descent: Descent, curvature: torch.Tensor, shared_bytes: int) -> Launch:
    """The launch that moves codes, whose tensors are all contiguous.

    A row's slope is kept in shared memory where `shared_bytes` are enough for it.

    Args:
        curvature: [K], from `curvature_of`.

    Raises:
        AccullmError: a working dtype other than float32 and float64.
    """
    count, columns = descent.codes.shape
    wanted = TURN_BYTES + columns * descent.slope.element_size()
    fits = wanted <= shared_bytes
    grid = descent.grid
    tensors = (descent.codes, descent.error, descent.slope, descent.hessian, curvature, grid.scale)
    arguments = DescentStruct(
        *(tensor.data_ptr() for tensor in tensors),
        None if descent.levels is None else descent.levels.data_ptr(),
        *((None, None) if descent.rows is None else (tensor.data_ptr() for tensor in descent.rows)),
        descent.ridge,
        count,
        columns,
        grid.scale.shape[1],
        grid.columns_per_group,
        grid.largest_code,
        descent.sweeps,
        fits,
    )
    return Launch(
        source="descend.cu",
        kernel="descend",
        defines=_defines(descent.slope.dtype),
        grid=(count if descent.rows is None else 1, 1, 1),
        threads=DESCENT_THREADS,
        shared_bytes=wanted if fits else TURN_BYTES,
        arguments=(arguments,),
    )


def _defines(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype not in REALS:
        raise AccullmError(f"no CUDA kernel rounds in {dtype}: float32 or float64")
    return (f"REAL={REALS[dtype]}",)


def _contiguous(tile: Tile) -> Tile:
    """The same tile, whose `fed` is so already: it is written in place."""
    assert tile.fed.is_contiguous(), "what is fed is written in place"
    chance = tile.chance
    if chance is not None:
        chance = replace(chance, share=chance.share.contiguous(), features=chance.features.contiguous())
    return replace(
        tile,
        wanted=tile.wanted.contiguous(),
        upper=tile.upper.contiguous(),
        scale=tile.scale.contiguous(),
        zero=tile.zero.contiguous(),
        group=tile.group.contiguous(),
        chance=chance,
    )
