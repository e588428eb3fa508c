"""What a linear loses on other text by how feedback is damped, and which damping a conversion would choose.

Of some blocks of the original, one linear for each distinct input is rounded to 4 bits in groups of 64 with 0.5%
outlier features, towards its own weight. Its Hessian is of all calibration windows but some, on whose inputs the loss
is measured. The choice knows nothing of these either: it is made on windows of its own.

    python scripts/bench_damping.py --model work/gemma3-270m --blocks 2 9 15
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_models import DEMO, model_directory, results_directory

from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.source import open_source
from accullm_cli.quant.feedback import DAMPINGS, damping_for
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import TARGET_DAMPING, RoundingOptions, round_linears
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.run import RunDirectory
from accullm_cli.stages.block_rounding import held_out_windows
from accullm_cli.stages.calibrate import PROBE_TOKENS
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.streams import advance
from accullm_cli.stages.texts import calibration_of

BITS, GROUP_SIZE, OUTLIERS = 4, 64, 0.005


@dataclass(frozen=True)
class Row:
    """losses: on windows that nothing was rounded for, by damping; chosen: what a conversion would take."""

    name: str
    losses: dict[float, float]
    chosen: float


class Inputs:
    """Of one linear: the Gram matrix of what it is rounded for, with rows to choose by, and that of other windows."""

    def __init__(self, features: int) -> None:
        self.known, self.other = GramMatrices(features), GramMatrices(features)

    def add(self, rows: torch.Tensor, is_held_out: bool, is_other: bool) -> None:
        if is_other:
            self.other.add(rows)
        else:
            self.known.add(rows, held_out=torch.arange(len(rows)) if is_held_out else None)


def measured(decoder: Decoder, ids: torch.Tensor, blocks: Sequence[int]) -> Iterator[Row]:
    """The rows of these blocks; the model is read once, up to the last of them."""
    count = len(held_out_windows(*ids.shape))
    # The windows that a conversion draws, and as many others.
    drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, other = set(drawn[:count]), set(drawn[count : 2 * count])
    decoder.load_outside()
    decoder.embed(ids[:1, :PROBE_TOKENS])  # a trace takes a call of that shape
    stream = decoder.embed_all(ids)
    decoder.release_outside()
    for index in range(max(blocks) + 1):
        block = decoder.load_block(index)
        if index not in blocks:
            advance(decoder, index, block, stream)
        else:
            trace = decoder.trace(index, block, stream[:1, :PROBE_TOKENS])
            slot_of = {slot.name: slot for slot in decoder.slots[index]}
            firsts = [group[0] for step in trace.steps for group in step if slot_of[group[0]].expert is None]
            inputs = {name: Inputs(slot_of[name].in_features) for name in firsts}
            for windows in decoder.batches(stream):
                read: dict[str, torch.Tensor] = {}
                output = decoder.run_capturing(index, block, stream[windows], read.__setitem__)
                assert output is not None
                stream[windows] = output
                for name, own in inputs.items():
                    of_windows = read[name].reshape(len(output), ids.shape[1], -1)
                    for window, rows in zip(range(windows.start, windows.stop), of_windows, strict=True):
                        own.add(rows, window in held_out, window in other)
            for name, own in inputs.items():
                yield row(name, slot_of[name].read(block), own)
        decoder.release_block(index)


def row(name: str, weight: torch.Tensor, inputs: Inputs) -> Row:
    held_out, hessian, other = inputs.known.take_held_out(), inputs.known.take_hessian(), inputs.other.take_hessian()
    assert held_out is not None
    assert hessian is not None
    assert other is not None
    score = hessian.diagonal() * weight.square().sum(0)
    outliers = tuple(sorted(score.topk(round(OUTLIERS * len(score))).indices.tolist()))
    plan = LinearPlan(name, *weight.shape, BITS, GROUP_SIZE, False, outliers, scale_bits=6)
    losses = {}
    for damping in DAMPINGS:
        options = RoundingOptions(target="original", damping=damping)
        found = round_linears({name: weight}, {name: plan}, options, torch.bfloat16, hessian)[name]
        error = weight - found.linear.dequantize(torch.float32)
        losses[damping] = float(((error @ other) * error).sum(dtype=torch.float64))
    return Row(name, losses, damping_for(hessian, held_out, outliers))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Losses over those of the damping that is taken where nothing can be chosen; the last line has their means."""
    yield f"| linear | {' | '.join(f'{damping:g}' for damping in DAMPINGS)} | chosen | its loss |"
    yield "| --- |" + " --- |" * (len(DAMPINGS) + 2)
    relative = [{damping: loss / row.losses[TARGET_DAMPING] for damping, loss in row.losses.items()} for row in rows]
    for own, of_row in zip(relative, rows, strict=True):
        losses = " | ".join(f"{own[damping]:.3f}" for damping in DAMPINGS)
        yield f"| {of_row.name} | {losses} | {of_row.chosen:g} | {own[of_row.chosen]:.3f} |"
    means = " | ".join(f"{sum(own[damping] for own in relative) / len(rows):.3f}" for damping in DAMPINGS)
    chosen = sum(own[of_row.chosen] for own, of_row in zip(relative, rows, strict=True)) / len(rows)
    yield f"| mean | {means} | | {chosen:.3f} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--run", type=Path, help="run directory (work/bench/MODEL/damping.run)")
    parser.add_argument("--blocks", type=int, nargs="+", required=True, help="numbers of blocks, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as accullm's own")
    options = parser.parse_args(arguments)
    try:
        model = model_directory(str(options.model))
        run = options.run or results_directory(options.model) / "damping.run"
        config = load_config(str(model), sets=[f"machine.run={run}", *options.set])
        job = Job(config, RunDirectory(run), open_source(config.model, run), lambda event: None)
        text = calibration_of(job)
        with torch.no_grad():
            rows = list(measured(open_decoder(job), text.ids, options.blocks))
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(f"{model.name}, {text.description}\n")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
