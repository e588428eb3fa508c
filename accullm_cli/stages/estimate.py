"""What a conversion will take: size exactly or at most, memory and time from counting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from accullm_cli.formats import FORMATS, NATIVE
from accullm_cli.formats.adapters import linear_bytes
from accullm_cli.model.blocks import TOKENS_PER_BATCH, Decoder
from accullm_cli.model.source import IMPORTS
from accullm_cli.quant.feedback import DAMPINGS
from accullm_cli.quant.plan import Plan
from accullm_cli.stages.answers import JUDGED, SEARCHED, most_written, questions_of, wants_tasks
from accullm_cli.stages.asking import PORTION, bytes_of, fits
from accullm_cli.stages.block_rounding import GRAM_BYTES, held_out_windows
from accullm_cli.stages.calibrate import measured_windows
from accullm_cli.stages.job import Job
from accullm_cli.stages.model_shape import source_dtype
from accullm_cli.stages.reading import loads_whole
from accullm_cli.stages.streams import POSITIONS
from accullm_cli.stages.texts import SEARCH, shape_of, texts_of, windows_of

FLOAT = 4
# Passes through the blocks in quantize. The original's stream goes through each once. The rounded one comes up to each
# of a Llama block's four distinct inputs and to its end, but for what is known already: 0, 0.25, 0.09, 0.84 and 0.34 of
# a block's products.
PASSES_OF_THE_ORIGINAL = 1.0
PASSES_OF_THE_ROUNDED = 1.5
# Windows with gradients go through each block once more in calibrate, and back through it there and in quantize.
PASSES_OF_GRADIENTS = 3.0
# Of a large matrix product's speed (250 GFLOP/s a core), what is left between attention, norms and a block's products.
# With it error feedback on a Llama of 135M parameters, 128 windows of 512 tokens, is said to take 5 min 14 s on two
# cores; without the text of another kind, which the estimate holds, it took 4 min 25 s.
SHARE_OF_FULL_SPEED = 0.5
# What rounding takes for each weight, in operations at that speed: the search for scales and the loop over columns wait
# for memory rather than for arithmetic. With the products below, one core takes 21 s for that Llama's 106 million
# weights (16 s without search).
OPERATIONS_PER_WEIGHT = 6_500
# Products of a weight with the Hessian or its factor, at full speed, in multiplications and additions for each of its
# input features: for the corrected target 2, for feedback 1, for the error that is reported 4; and where scales are
# fitted to codes and these to them, feedback once more, and five whole products.
PRODUCTS_OF_FEEDBACK, PRODUCTS_OF_FIT = 7, 11
# A token that a model writes waits for all of its weights to come from memory: as long as so many operations on each.
# A Llama of 135M parameters took as long as 22 on one busy core.
OPERATIONS_PER_WEIGHT_READ = 20
# Of the items on which whole answers are compared, how many the original is thought to get wrong and has to write.
SHARE_WRITTEN = 0.5
# What rounding holds beside a weight [N, K], the Hessian [K, K] and its factor, in sizes of the weight: its target, the
# same in the order of rounding, errors, codes twice, and a half in parts. With 4096 x 4096 it took 4.4 of them.
WEIGHTS_BESIDE = 4.5
# Of as many positions as pass an output head at once, logits that are held: in validate of original, artifact and noise
# floor, those of the positions before, and one's softmax; in calibrate the softmax, gradients and what is drawn of it.
LOGITS_HELD = 7
# What calibrate keeps of each input feature of a linear: its damage for four group sizes, and three statistics.
STATISTICS_PER_FEATURE = 7
# Of each token of a text that is measured on, beside hidden states: its id, twice, and its likelihood.
BYTES_PER_TOKEN = 20
BYTES_OF_AN_ID = 8
# Pages, plans, manifests, indexes and the headers of tensors: in all, and for each linear. A Llama of 84 linears left
# 490 KB of them, and one of 210 linears 1.15 MB.
FILES, FILES_PER_LINEAR = 120_000, 4_900
# The interpreter, torch, transformers, numba's loops, and what these compile: a Llama of 64 features took 0.59 GB, with
# the default validation or tasks 0.62 to 0.64 GB.
BASE_BYTES = 600_000_000


@dataclass(frozen=True)
class Estimated:
    """What a conversion takes.

    bits_per_weight: everything stored for the linears in the job's format, over their weights.
    artifact_bytes: its tensors and the tokenizer files beside them. size_is_exact: both are exact; otherwise they are
    the most that the plan, which calibration decides, may come to. peak_bytes: resident memory. disk_bytes: files of
    the run and its artifact at their largest. seconds: wall clock of all stages.
    """

    bits_per_weight: float
    artifact_bytes: int
    size_is_exact: bool
    peak_bytes: int
    disk_bytes: int
    seconds: float


def estimate(job: Job, decoder: Decoder, plan: Plan) -> Estimated:
    """Size, peak memory and time of converting with `plan`."""
    calibration = job.config.calibration
    tokens = calibration.samples * calibration.seq_len
    tied = set(decoder.model.all_tied_weights_keys)
    parameters = {name: value for name, value in decoder.model.named_parameters() if name not in tied}
    all_weights = sum(parameter.numel() for parameter in parameters.values())
    source_bytes = sum(value.numel() * decoder.weights.dtype(name).itemsize for name, value in parameters.items())
    in_blocks = [
        sum(parameter.numel() for parameter in decoder.model.get_submodule(name).parameters())
        for name in decoder.block_names
    ]
    outside = all_weights - sum(in_blocks)
    planned = [*plan.linears.values(), *plan.embeddings.values()]
    unquantized = source_bytes - sum(linear.weights * linear.source_itemsize for linear in planned)
    format = FORMATS[job.format]
    of_linears = sum(linear_bytes(format, linear, source_dtype(job)) for linear in plan.linears.values())
    linear_weights = sum(linear.weights for linear in plan.linears.values())
    bits_per_weight = 8 * of_linears / linear_weights
    if (most := _largest_average(job)) is not None:
        bits_per_weight, of_linears = most, int(most * linear_weights / 8)
    stored = unquantized + of_linears
    stored += sum(format.linear_bytes(embedding, source_dtype(job)) for embedding in plan.embeddings.values())
    stored += sum(path.stat().st_size for path in job.source.companions.values())
    stored += sum(job.source.tensors[name].end - job.source.tensors[name].begin for name in job.source.kept)
    widest = max(linear.in_features for linear in plan.linears.values())
    vocabulary, hidden = decoder.model.get_input_embeddings().weight.shape
    longest = max(shape_of(job, text)[1] for text in texts_of(job))
    logits = LOGITS_HELD * POSITIONS * vocabulary
    if plan.embeddings:  # beside its own head, the artifact has that of the original
        logits += vocabulary * hidden
    # Two of the calibration text in quantize; or in calibrate its measured part, and two of each other text.
    beside = 2 * sum(windows_of(job, text).ids.numel() for text in texts_of(job))
    streams = hidden * max(2 * tokens, measured_windows(job, decoder) * calibration.seq_len + beside)
    # What surrounds the blocks, together with a block and its stored form or with logits; or the block with a Hessian,
    # its factor, and what is as large as the weight that is rounded (while Gram matrices grow, two, and activations),
    # and a byte for each weight that is rounded already.
    block = max(in_blocks)
    one = WEIGHTS_BESIDE * max(linear.weights for linear in plan.linears.values())
    rounding = 1.25 * block + _gram_elements(decoder) + one
    rounding += (_held_out_tokens(job) or 0) * widest + _fisher_elements(job, decoder)
    largest = max(outside + 1.5 * block, outside + logits, rounding)
    if loads_whole(job):
        # It maps the source into memory. Experts are stored one by one: those of a stack are there beside it. Of Qwen's
        # 0.5B parameters this says 3.60 GB, and it took 3.65 GB; of a block of Mixtral's, halved, 4.5 and 4.43 GB.
        stacks = (s.experts * s.out_features * s.in_features for slots in decoder.slots for s in slots if s.experts > 1)
        largest = max(largest, all_weights + source_bytes / FLOAT + max(stacks, default=0))
    operations = _operations(job, decoder, plan, vocabulary * hidden)
    if wants_tasks(job):
        asked = _Asked.of(job)
        longest = max(longest, asked.longest)
        streams = max(streams, hidden * max(PORTION, asked.longest))
        if asked.written and _may_write(job, decoder):
            largest = max(largest, all_weights)
        operations += asked.operations(job, decoder, linear_weights, hidden, vocabulary)
    peak = BASE_BYTES + FLOAT * (largest + streams)
    peak += FLOAT * 4 * max(TOKENS_PER_BATCH, longest) * widest
    seconds = operations / (SHARE_OF_FULL_SPEED * _operations_per_second(job))
    disk = _disk_bytes(job, decoder, plan, stored, of_linears)
    return Estimated(bits_per_weight, stored, most is None, int(peak), disk, round(seconds, 1))


def _disk_bytes(job: Job, decoder: Decoder, plan: Plan, stored: int, of_linears: float) -> int:
    """Files of a conversion to the job's format, when there are most of them.

    What calibrate leaves, the linears' shards in the run directory, and then either, while the last block is rounded,
    the streams (twice, as new ones are written beside the old) and what the original made of it, or the artifact, which
    in the native format links to the shards. Or, before any of that, the streams of calibrate and of references, one
    of them twice. A GGUF file is there as a checkpoint of 16 bits from the beginning.
    """
    calibration, rounding = job.config.calibration, job.config.rounding
    tokens = calibration.samples * calibration.seq_len
    hidden = decoder.model.get_input_embeddings().weight.shape[1]
    artifact = stored - (of_linears if job.format == NATIVE else 0)
    best = stored if job.config.search.golden else 0  # the best plan so far, beside the one that is tried
    texts = [windows * length for windows, length in (shape_of(job, text) for text in texts_of(job))]
    references = sum(texts) * 2 * FLOAT * hidden
    ids = sum(texts) * BYTES_PER_TOKEN + tokens * BYTES_OF_AN_ID
    imported = job.source.weight_bytes if job.source.directory.parent.name == IMPORTS else 0
    always = best + imported + ids + FILES + FILES_PER_LINEAR * len(plan.linears)
    statistics = STATISTICS_PER_FEATURE * FLOAT * sum(linear.in_features for linear in plan.linears.values())
    # Of each block in bfloat16. On the way back, what went into the blocks that are still to come takes no more.
    gradients = (len(decoder.block_names) + 1) * 2 * hidden * job.config.gradient_samples * calibration.seq_len
    working = 0
    if rounding.method != "nearest":
        reads_original = rounding.target == "corrected" or job.config.gradient_samples > 0
        working = 2 * FLOAT * (1 + reads_original) * hidden * tokens
        # What is not computed twice, the inputs of attention's and MLP's last linears; and for targets that make up for
        # earlier losses, what the original had as their first ones' inputs and made of the residual stream.
        dense = ([slot for slot in slots if slot.expert is None] for slots in decoder.slots)
        inputs = ({(slot.name.rpartition(".")[0], slot.in_features) for slot in slots} for slots in dense)
        last = max(sum(width for _, width in distinct) - hidden for distinct in inputs)
        itemsize = 2 if job.compute.precision == "bfloat16" else FLOAT
        working += tokens * (itemsize * last + FLOAT * 4 * hidden * (rounding.target == "corrected"))
    passing = [measured_windows(job, decoder) * calibration.seq_len, *(2 * tokens for tokens in texts)]
    calibrating = FLOAT * hidden * (sum(passing) + max(passing))
    rounded = of_linears + references + max(working, artifact)
    return int(always + statistics + gradients + max(calibrating, rounded))


def _largest_average(job: Job) -> float | None:
    """The bits per weight that the plan will stay below; None where they are known already."""
    options = job.config
    if options.search.golden:
        return options.search.max_bits_per_weight
    if options.plan.file_size is not None:
        return None
    return options.plan.bits if options.plan.is_average else None


def _fisher_elements(job: Job, decoder: Decoder) -> int:
    """Elements of the Fisher matrices of a block, all of which wait until its linears are rounded."""
    if not job.config.gradient_samples:
        return 0
    return max(sum(slot.out_features**2 for slot in slots if slot.expert is None) for slots in decoder.slots)


def _gram_elements(decoder: Decoder) -> int:
    """Elements of the Hessians that are there at once, and of a factor: one of a dense input, of experts several."""
    found = []
    for slot in (slot for slots in decoder.slots for slot in slots):
        square = slot.in_features**2
        together = 1 if slot.expert is None else max(1, min(slot.experts, GRAM_BYTES // (2 * FLOAT * square)))
        found.append((together + 1) * square)
    return max(found)


def _held_out_tokens(job: Job) -> int | None:
    """Of the calibration text, those that damping is chosen on; None where it is not."""
    calibration, rounding = job.config.calibration, job.config.rounding
    if rounding.method == "nearest" or rounding.damping is not None:
        return None
    return len(held_out_windows(calibration.samples, calibration.seq_len)) * calibration.seq_len or None


def _operations(job: Job, decoder: Decoder, plan: Plan, head_weights: int) -> float:
    """Multiplications and additions of all stages."""
    calibration, rounding = job.config.calibration, job.config.rounding
    tokens = calibration.samples * calibration.seq_len
    shapes = (shape_of(job, text) for text in texts_of(job) if text is not SEARCH)
    held_out = sum(windows * length for windows, length in shapes)
    weights = sum(linear.weights for linear in plan.linears.values())
    with_gradient = job.config.gradient_samples * calibration.seq_len
    measured = measured_windows(job, decoder) * calibration.seq_len
    # Calibrate runs the held-out text and its noise floor, validate the artifact.
    formats = len(job.config.export.format)
    passes = measured + (2 + formats) * held_out + PASSES_OF_GRADIENTS * with_gradient
    grams, chosen = 0.0, _held_out_tokens(job)
    if rounding.method != "nearest":
        corrected = rounding.target == "corrected"
        passes += formats * tokens * (PASSES_OF_THE_ROUNDED + corrected * PASSES_OF_THE_ORIGINAL)
        # The Hessian of each distinct input, and as large a matrix of its drift from the original's.
        inputs = {(name.rpartition(".")[0], linear.in_features) for name, linear in plan.linears.items()}
        grams = 2 * (1 + corrected) * tokens * sum(features**2 for _, features in inputs)
        grams += 2 * with_gradient * sum(linear.out_features**2 for linear in plan.linears.values())
        products = PRODUCTS_OF_FEEDBACK + PRODUCTS_OF_FIT * (rounding.grid == "fit" and rounding.method != "stochastic")
        grams += SHARE_OF_FULL_SPEED * products * sum(own.weights * own.in_features for own in plan.quantized.values())
        factors = (1 if chosen is None else len(DAMPINGS) + 1 + corrected) / 3  # Cholesky's, of each input
        solved = 0 if chosen is None else len(DAMPINGS) * chosen
        grams += SHARE_OF_FULL_SPEED * sum(factors * features**3 + solved * features**2 for _, features in inputs)
    # Calibrate's likelihoods, and in validate the original, the artifact and the noise floor.
    head = 2 * head_weights * 4 * held_out
    rounded = sum(linear.weights for linear in plan.quantized.values())
    return 2 * weights * passes + formats * (grams + OPERATIONS_PER_WEIGHT * rounded) + head


@dataclass(frozen=True)
class _Asked:
    """What exact tasks ask of the original and of each artifact, those of a search for the smallest plan included.

    tokens: of all rows; squares: of their lengths, for attention; longest: of them. places: that go through the head.
    written: tokens that the original writes, if it is wrong on all items.
    """

    tokens: int
    squares: int
    longest: int
    places: int
    written: int

    @staticmethod
    def of(job: Job) -> _Asked:
        purposes = (JUDGED, SEARCHED) if job.config.search.golden else (JUDGED,)
        questions = [question for purpose in purposes for question in questions_of(job, purpose)[1]]
        lengths = [len(question.prompt) + len(row) for question in questions for row in question.rows]
        return _Asked(
            tokens=sum(lengths),
            squares=sum(length**2 for length in lengths),
            longest=max(lengths),
            places=sum(len(question.nodes) for question in questions),
            written=sum(most_written(job, purpose) for purpose in purposes),
        )

    def operations(self, job: Job, decoder: Decoder, weights: int, hidden: int, vocabulary: int) -> float:
        """Multiplications and additions of the original and of all artifacts."""
        models = 1 + len(job.config.export.format)
        attention = 2 * hidden * len(decoder.block_names) * self.squares  # causal: half of all pairs, twice
        asked = models * (2 * weights * self.tokens + attention + 2 * hidden * vocabulary * self.places)
        if not _may_write(job, decoder):
            return asked
        return asked + SHARE_WRITTEN * self.written * OPERATIONS_PER_WEIGHT_READ * (weights + hidden * vocabulary)


def _may_write(job: Job, decoder: Decoder) -> bool:
    free = job.compute.free_memory()
    return free is None or fits(bytes_of(decoder), free)


def _operations_per_second(job: Job) -> float:
    """What a float32 matrix product reaches where the job computes, measured in a moment."""
    device = job.compute.device
    rows, columns = (512, 1024) if device.type == "cpu" else (8192, 8192)
    left, right = torch.ones(rows, columns, device=device), torch.ones(columns, columns, device=device)
    with job.compute.products("float32"):
        float((left @ right)[0, 0])  # waits for a GPU
        started = time.perf_counter()
        for _ in range(10):
            product = left @ right
        float(product[0, 0])
        return 10 * 2.0 * rows * columns * columns / (time.perf_counter() - started)
