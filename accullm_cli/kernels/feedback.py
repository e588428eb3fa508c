"""The launch of cuda/feedback_round.cu: the columns of one block, one after the other, for all rows at once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.launch import Launch

# A warp holds a row's columns in registers, four per lane.
MOST_COLUMNS = 128
ROWS_PER_BLOCK = 8
SOURCE_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REALS = {torch.float32: "float", torch.float64: "double"}


@dataclass(frozen=True)
class ColumnBlock:
    """C columns of N rows, in the order of rounding; K features in all. All contiguous, in the working dtype."""

    fed: torch.Tensor  # [C, N], the targets with what earlier blocks feed forward
    wanted: torch.Tensor  # [C, N], the targets
    feedback: torch.Tensor  # U [C, C], unit upper triangular; rows may lie apart
    scale: torch.Tensor  # [G, N]
    zero: torch.Tensor  # [G, N]
    group: torch.Tensor  # int32 [C]
    feature: torch.Tensor  # int32 [C], the input feature that each column is
    share: torch.Tensor | None  # [C, N], for stochastic rounding
    codes: torch.Tensor  # uint8 [K, N], written at the rows `feature`
    error: torch.Tensor  # [C, N], written
    kept: torch.Tensor  # [C - rounded, N], written
    rounded: int  # columns from here on keep the source's format
    largest_code: int
    source_dtype: torch.dtype
    generator: tuple[int, int] = (0, 0)  # seed and stream


class BlockStruct(ctypes.Structure):
    """`Block` of cuda/feedback_round.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("fed", "wanted", "feedback", "scale", "zero", "group", "feature")),
        *((name, ctypes.c_void_p) for name in ("share", "codes", "error", "kept")),
        ("feedback_stride", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("rows", "columns", "rounded", "largest_code", "source_format")),
    )


def feedback_launch(block: ColumnBlock) -> Launch:
    """The launch that rounds a block.

    Raises:
        AccullmError: more than 128 columns, a working dtype other than float32 and float64, or a source dtype other
            than float32, float16 and bfloat16.
    """
    columns, rows = block.fed.shape
    if columns > MOST_COLUMNS:
        raise AccullmError(f"no CUDA kernel rounds {columns} columns at once: {MOST_COLUMNS} at most")
    if block.fed.dtype not in REALS:
        raise AccullmError(f"no CUDA kernel rounds in {block.fed.dtype}: float32 or float64")
    if block.source_dtype not in SOURCE_FORMATS:
        raise AccullmError(f"no CUDA kernel rounds to {block.source_dtype}: float32, float16 or bfloat16")
    seed, stream = block.generator
    arguments = BlockStruct(
        *(tensor.data_ptr() for tensor in (block.fed, block.wanted, block.feedback, block.scale, block.zero)),
        block.group.data_ptr(),
        block.feature.data_ptr(),
        None if block.share is None else block.share.data_ptr(),
        *(tensor.data_ptr() for tensor in (block.codes, block.error, block.kept)),
        block.feedback.stride(0),
        seed,
        stream,
        rows,
        columns,
        block.rounded,
        block.largest_code,
        SOURCE_FORMATS[block.source_dtype],
    )
    return Launch(
        source="feedback_round.cu",
        kernel="feedback_round",
        defines=(f"REAL={REALS[block.fed.dtype]}",),
        grid=(-(-rows // ROWS_PER_BLOCK), 1, 1),
        threads=ROWS_PER_BLOCK * 32,
        shared_bytes=0,
        arguments=(arguments,),
    )
