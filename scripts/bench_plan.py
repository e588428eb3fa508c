"""Hold what a plan expects of each linear against what rounding it alone does: the order, and the sums by kind.

A plan weighs bits by a loss that it expects of each linear: squared gradients times squared inputs times what rounding
to nearest changes, summed over input features. Here each linear is rounded so, in groups of 64 at 4 bits, with all
others in full precision, and the mean KL on held-out text is measured. Both numbers are of the same rounding.

    python scripts/bench_plan.py --model work/smollm2-135m --samples 32 --gradient-samples 16
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from demo_models import DEMO, model_directory, results_directory

from accullm_cli.config import Config
from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.source import open_source
from accullm_cli.model.text import validation_windows
from accullm_cli.pipeline import run_stage
from accullm_cli.quant.grid import minmax_grid, row_chunks
from accullm_cli.run import RunDirectory
from accullm_cli.stages.gradients import load_sensitivities
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.losses import feature_losses
from accullm_cli.stages.profile import load_stats
from accullm_cli.stages.streams import POSITIONS, advance

BITS, GROUP_SIZE = 4, 64


def expected(job: Job, decoder: Decoder) -> dict[str, float]:
    """The loss that a plan expects of each linear, in nats a token but for a common factor."""
    losses = feature_losses(load_stats(job, decoder), GROUP_SIZE, load_sensitivities(job, len(decoder.block_names)))
    return {name: float(loss.double().sum()) for name, loss in losses.items()}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """To nearest, each group's range its own: float32 [N, K]."""
    grids = ((rows, minmax_grid(rows, BITS, GROUP_SIZE, symmetric=False)) for rows in row_chunks(weight))
    return torch.cat([grid.values(grid.round_to_nearest(rows)) for rows, grid in grids])


def measured(decoder: Decoder, ids: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean KL(original || original with one linear rounded), nats a token, by linear. The model is read once."""
    decoder.load_outside()
    plain, copies = decoder.embed_all(ids), {}
    decoder.release_outside()
    for index, slots in enumerate(decoder.slots):
        block = decoder.load_block(index)
        for stream in copies.values():
            advance(decoder, index, block, stream)
        for slot in slots:
            if slot.name in names:
                weight = slot.read(block).clone()
                slot.write(block, rounded(weight))
                copies[slot.name] = advance(decoder, index, block, plain.clone())
                slot.write(block, weight)
        advance(decoder, index, block, plain)
        decoder.release_block(index)
        print(f"block {index + 1}/{len(decoder.slots)}", file=sys.stderr, flush=True)
    decoder.load_outside()
    sums = dict.fromkeys(copies, 0.0)
    for rows in torch.arange(ids.numel()).split(POSITIONS):
        of_original = log_probabilities(decoder, plain, rows)
        for name, stream in copies.items():
            change = of_original - log_probabilities(decoder, stream, rows)
            sums[name] += float((of_original.exp() * change).sum())
    return {name: total / ids.numel() for name, total in sums.items()}


def log_probabilities(decoder: Decoder, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Float64 [P, vocabulary] of some positions of all windows together."""
    return decoder.logits(stream.flatten(0, 1)[rows][None])[0].double().log_softmax(-1)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values none of which are equal."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def table(expected: Mapping[str, float], measured: Mapping[str, float]) -> Iterator[str]:
    """By kind of linear: shares of both sums, their ratio, and how far the order within the kind agrees."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in measured:
        kinds[name.rpartition(".")[2]].append(name)
    of_all = sum(expected[name] for name in measured), sum(measured.values())
    yield "| linears | number | share of the expected | of the measured | measured / expected | rank correlation |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for kind, names in [*kinds.items(), ("all", list(measured))]:
        own = [expected[name] for name in names], [measured[name] for name in names]
        shares = [sum(values) / whole for values, whole in zip(own, of_all, strict=True)]
        order = f"{rank_correlation(*own):.2f}" if len(names) > 2 else ""
        yield f"| {kind} | {len(names)} | {shares[0]:.1%} | {shares[1]:.1%} | {shares[1] / shares[0]:.2f} | {order} |"


def configuration(model: Path, run: Path, options: argparse.Namespace) -> Config:
    sets = [f"calibration.samples={options.samples}", f"calibration.gradient_samples={options.gradient_samples}"]
    sets += ["plan.bits=4.4", f"machine.run={run}", f"machine.threads={options.threads}"]
    return load_config(str(model), sets=[*sets, *options.set])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--run", type=Path, help="run directory (work/bench/MODEL/plan.run)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--gradient-samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="held-out windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of each of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as accullm's own")
    options = parser.parse_args(arguments)
    try:
        model = model_directory(str(options.model))
        run = options.run or results_directory(options.model) / "plan.run"
        config = configuration(model, run, options)
        run_stage("calibrate", config)
        source = open_source(config.model, run)
        job = Job(config, RunDirectory(run), source, lambda event: None)
        decoder = open_decoder(job)
        text = validation_windows("default", job.tokenizer, options.windows, options.seq_len, config.machine.seed)
        foreseen = expected(job, decoder)
        with torch.inference_mode(), job.compute.products():
            found = measured(decoder, text.ids, list(foreseen))
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(f"{model.name}, {text.description}\n")
    print("\n".join(table(foreseen, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
