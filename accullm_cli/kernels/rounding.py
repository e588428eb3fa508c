"""The inner loops of rounding on a GPU: the launches of cuda/feedback_round.cu, cuda/descend.cu and cuda/trellis.cu.

Their sums are those of the CPU's compiled loops, term for term, so that the same arguments give the same codes. What
differs between the devices are the matrix products and factorizations around them, which torch computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.launch import Launch
from accullm_cli.quant.loops import ChainDescent, ChainTile, CodeDescent, CodeTile, Descent, Loops, Tile
from accullm_cli.quant.trellis import SEGMENT
from accullm_cli.quant.wavefront import round_fed

REALS = {torch.float32: "float", torch.float64: "double"}
# A warp holds a row's columns in registers, four per lane.
MOST_COLUMNS = 128
ROWS_PER_BLOCK = 8
# What a block of cuda/descend.cu has, and what it keeps in shared memory before the slope.
DESCENT_THREADS = 256
TURN_BYTES = 16
# What a block of cuda/trellis.cu keeps in shared memory: bytes, and working numbers beside them; the same where rows
# feed each other, for so many levels at most.
COLUMN_ROOM = SEGMENT * (4 * 8 + 4 + 2) + 2 * 4, 2 * SEGMENT
FED_ROOM, MOST_LEVELS = (1080, 1600), 64


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
        *((name, ctypes.c_void_p) for name in ("row_fed", "row_upper", "row_weight")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "levels_count")),
    )


class ChainDescentStruct(ctypes.Structure):
    """`Descent` of cuda/trellis.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "error", "product", "hessian", "curvature", "scale", "levels")),
        *((name, ctypes.c_void_p) for name in ("row_slope", "row_upper", "row_weight")),
        ("ridge", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "columns_per_group", "levels_count")),
        ("sweeps", ctypes.c_int),
    )


def cuda_loops(device: torch.device, launch: Callable[[Launch, torch.device], None], shared_bytes: int) -> Loops:
    """The loops of a GPU.

    Tiles whose rows feed each other are rounded by torch, see quant.wavefront, and those of a trellis each by a block
    of threads. Rows that feed each other are one chain in descent, which one block of threads goes through.

    Args:
        launch: `kernels.device.launch`.
        shared_bytes: that one block of the device may have.
    """

    def round_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        if tile.rows is not None:
            return round_several([tile])[0]
        own, codes, error = with_results(tile)
        launch((chains_launch if isinstance(own, ChainTile) else tile_launch)(own, codes, error), device)
        return codes, error

    def round_several(tiles: Sequence[Tile]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if of_codes := [tile for tile in tiles if isinstance(tile, CodeTile)]:
            return round_fed(of_codes)
        own = [with_results(tile) for tile in tiles]
        structs = structs_of(own).to(tiles[0].wanted.device)  # a launch holds addresses alone
        launch(fed_chains_launch(structs, len(own), tiles[0].wanted.dtype), device)
        return [(codes, error) for _, codes, error in own]

    def descend(descent: Descent) -> None:
        own = contiguous(descent)
        curvature = curvature_of(own)  # a launch holds addresses alone
        if isinstance(own, CodeDescent):
            launch(descent_launch(own, curvature, shared_bytes), device)
        else:
            launch(chain_descent_launch(own, curvature), device)

    return Loops(device, round_tile, descend, round_several)


def tile_launch(tile: CodeTile, codes: torch.Tensor, error: torch.Tensor) -> Launch:
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


def chains_launch(tile: ChainTile, codes: torch.Tensor, error: torch.Tensor) -> Launch:
    """The launch that rounds a tile of a trellis; as for `tile_launch`, of any number of columns.

    Its rows do not feed each other.
    """
    blocks = -(-len(codes) // SEGMENT)
    return _trellis_launch("trellis_round", tile.wanted.dtype, blocks, _chains(tile, codes, error), COLUMN_ROOM)


def fed_chains_launch(structs: torch.Tensor, count: int, dtype: torch.dtype) -> Launch:
    """The launch that rounds so many tiles of a trellis, the rows of each of which feed each other.

    Args:
        structs: from `structs_of`, on the device.
    """
    return _trellis_launch("trellis_round_fed", dtype, count, ctypes.c_void_p(structs.data_ptr()), FED_ROOM)


def structs_of(tiles: Sequence[tuple[ChainTile, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What `trellis_round_fed` reads of tiles of at most one segment, with their codes and errors: uint8."""
    structs = (ChainsStruct * len(tiles))(*(_chains(*own) for own in tiles))
    return torch.frombuffer(bytearray(structs), dtype=torch.uint8)


def _chains(tile: ChainTile, codes: torch.Tensor, error: torch.Tensor) -> ChainsStruct:
    tensors = (tile.wanted, tile.fed, tile.upper, tile.scale, tile.group, tile.levels, codes, error)
    sizes = *codes.shape, tile.scale.shape[1], len(tile.levels)
    return ChainsStruct(*(_at(own) for own in tensors), *_rows(tile, len(codes)), *sizes)


def _rows(task: ChainTile | ChainDescent, count: int) -> tuple[int | None, int | None, int | None]:
    """Where what rows feed to each other lies; of `count` rows."""
    if task.rows is None:
        return None, None, None
    assert count <= SEGMENT, "rows of one segment feed each other"
    assert len(task.levels) <= MOST_LEVELS, "lanes have room for the levels of 5 bits"
    return _at(task.rows.fed), _at(task.rows.upper), _at(task.rows.weight)


def chain_descent_launch(descent: ChainDescent, curvature: torch.Tensor) -> Launch:
    """The launch that moves whole columns of a trellis; as for `descent_launch`."""
    grid = descent.grid
    tensors = (
        descent.codes, descent.error, descent.product, descent.hessian, curvature, grid.scale, descent.levels,
    )  # fmt: skip
    sizes = *descent.codes.shape, grid.scale.shape[1], grid.columns_per_group, len(descent.levels), descent.sweeps
    rows = _rows(descent, len(descent.codes))
    arguments = ChainDescentStruct(*(_at(own) for own in tensors), *rows, descent.ridge, *sizes)
    kernel, room = ("trellis_descend", COLUMN_ROOM) if descent.rows is None else ("trellis_descend_fed", FED_ROOM)
    return _trellis_launch(kernel, descent.product.dtype, -(-len(descent.codes) // SEGMENT), arguments, room)


def _trellis_launch(kernel: str, dtype: torch.dtype, blocks: int, arguments: Any, room: tuple[int, int]) -> Launch:
    """room: bytes of shared memory, and working numbers beside them."""
    return Launch(
        source="trellis.cu",
        kernel=kernel,
        defines=_defines(dtype),
        grid=(blocks, 1, 1),
        threads=SEGMENT,
        shared_bytes=room[0] + room[1] * dtype.itemsize,
        arguments=(arguments,),
    )


def _at(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def curvature_of(descent: Descent) -> torch.Tensor:
    """The diagonal of H + ridge, and 0 in columns whose codes stay as they are: [K]."""
    return (descent.hessian.diagonal() + descent.ridge).masked_fill(~descent.movable, 0)


def descent_launch(descent: CodeDescent, curvature: torch.Tensor, shared_bytes: int) -> Launch:
    """The launch that moves codes, whose tensors are all contiguous.

    A row's slope is kept in shared memory where `shared_bytes` are enough for it.

    Args:
        curvature: [K], from `curvature_of`.

    Raises:
        AccullmError: a working dtype other than float32 and float64.
    """
    count, columns = descent.codes.shape
    slope, fisher = descent.rows or (descent.product, None)
    wanted = TURN_BYTES + columns * slope.element_size()
    fits = wanted <= shared_bytes
    grid = descent.grid
    tensors = (descent.codes, descent.error, slope, descent.hessian, curvature, grid.scale)
    arguments = DescentStruct(
        *(tensor.data_ptr() for tensor in tensors),
        None if descent.levels is None else descent.levels.data_ptr(),
        *((None, None) if fisher is None else (descent.product.data_ptr(), fisher.data_ptr())),
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
        defines=_defines(slope.dtype),
        grid=(count if descent.rows is None else 1, 1, 1),
        threads=DESCENT_THREADS,
        shared_bytes=wanted if fits else TURN_BYTES,
        arguments=(arguments,),
    )


def _defines(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype not in REALS:
        raise AccullmError(f"no CUDA kernel rounds in {dtype}: float32 or float64")
    return (f"REAL={REALS[dtype]}",)


def with_results(tile: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tile, contiguous, and room for its codes and errors."""
    assert tile.fed.is_contiguous(), "what is fed is written in place"
    own = contiguous(tile)
    return own, torch.empty_like(own.wanted, dtype=torch.uint8), torch.empty_like(own.wanted)


def contiguous(task: Any) -> Any:
    """The same task, all of whose tensors are contiguous; those that are so already, such as all it changes, as is."""
    return with_tensors(task, torch.Tensor.contiguous)


def with_tensors(task: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A task with each of its tensors changed, those of its parts too."""
    if isinstance(task, torch.Tensor):
        return change(task)
    if isinstance(task, tuple):
        return tuple(with_tensors(part, change) for part in task)
    if not is_dataclass(task) or isinstance(task, type):
        return task
    return replace(task, **{own.name: with_tensors(getattr(task, own.name), change) for own in fields(task)})
