"""The mutants that `mutants.py` applies: edits that make the code wrong, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One edit: `old`, which occurs once in `file`, becomes `new`; one of `tests` must fail."""

    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ROUNDING = "accullm_cli/quant/rounding.py"
FEEDBACK = "accullm_cli/quant/feedback.py"
COMPILED = "accullm_cli/quant/compiled.py"
GRID = "accullm_cli/quant/grid.py"
PACKING = "accullm_cli/quant/packing.py"
EMBEDDINGS = "accullm_cli/stages/embedding_rounding.py"
RUN = "accullm_cli/run.py"
QUANTIZE = "accullm_cli/stages/quantize.py"
RESUME = "tests/end_to_end/test_resume.py"
GEMV = "cuda/hybrid_gemv.cu"
GEMM = "cuda/hybrid_gemm.cu"
ROUND_EMBEDDINGS = "tests/stages/test_embedding_rounding.py"
PRODUCTS = ("tests/kernels/test_launch.py",)

MUTANTS = (
    # -- rounding ------------------------------------------------------------------------------------------
    Mutant(
        "errors of earlier blocks of columns are not fed on",
        FEEDBACK,
        "fed = error[part, :start] @ feedback[:start]",
        "fed = 0 * (error[part, :start] @ feedback[:start])",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the error of the column just before is not fed on",
        COMPILED,
        "for j in range(k + 1, columns):",
        "for j in range(k + 2, columns):",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "a column's error is taken against what was fed to it",
        COMPILED,
        "lost = wanted[n, k] - (code - offset) * step",
        "lost = wanted[n, k] + feedback - (code - offset) * step",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "a row passes on its errors without what was fed to it",
        COMPILED,
        "row_fed[n, k] += weight * (error[m, k] + fed[m, k])",
        "row_fed[n, k] += weight * error[m, k]",
        ("tests/quant/test_row_feedback.py",),
    ),
    Mutant(
        "rows of earlier blocks pass nothing on",
        FEEDBACK,
        "(down[:top].T @ carried[:top, columns], down[top:])",
        "(0 * (down[:top].T @ carried[:top, columns]), down[top:])",
        ("tests/quant/test_row_feedback.py",),
    ),
    Mutant(
        "compensating columns do not see the errors of earlier blocks",
        FEEDBACK,
        "fed = torch.addmm(wanted[:, start:end], error[:, :start], feedback[:start])",
        "fed = wanted[:, start:end].clone()",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the loss is that of the text's tokens, not of drawn ones",
        "accullm_cli/stages/gradients.py",
        'loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")',
        'loss = nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")',
        ("tests/stages/test_gradients.py",),
    ),
    Mutant(
        "a gradient is not taken back through its block",
        "accullm_cli/stages/gradients.py",
        "found.append(torch.autograd.grad(output, inputs, gradient[rows].float())[0])",
        "torch.autograd.grad(output, inputs, gradient[rows].float()); found.append(gradient[rows].float())",
        ("tests/stages/test_gradients.py",),
    ),
    Mutant(
        "all linears matter alike",
        "accullm_cli/stages/profile.py",
        "losses = {name: sensitivity_of[name] * loss_of[name] for name in linears if name in reached}",
        "losses = {name: loss_of[name] for name in linears if name in reached}",
        ("tests/stages/test_profile.py",),
    ),
    Mutant(
        "an outlier is charged half its bits",
        "accullm_cli/quant/budget.py",
        "of_an_outlier = price * 8 * (plan.source_itemsize * plan.out_features + 4)",
        "of_an_outlier = price * 4 * (plan.source_itemsize * plan.out_features + 4)",
        ("tests/quant/test_budget.py",),
    ),
    Mutant(
        "columns come in rising order",
        FEEDBACK,
        "by_size = torch.argsort(diagonal, descending=True, stable=True)",
        "by_size = torch.argsort(diagonal, descending=False, stable=True)",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "untouched outliers enlarge the damping of the rest",
        FEEDBACK,
        "mean = float(diagonal[order].mean())",
        "mean = float(diagonal.mean())",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "compensating outliers are stored in the order of rounding",
        ROUNDING,
        "kept = compensating[:, torch.argsort(factor.order[rounded_features:])].to(source_dtype)",
        "kept = compensating.to(source_dtype)",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the target moves the wrong way",
        FEEDBACK,
        "rows[:, reverse] += torch.linalg",
        "rows[:, reverse] -= torch.linalg",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "weights near the grid's end get all of their feedback",
        COMPILED,
        "received = min(max(fed * share, -limit), limit)",
        "received = fed",
        ("tests/quant/test_stochastic.py",),
    ),
    Mutant(
        "Philox stops a round early",
        "accullm_cli/quant/philox.py",
        "_ROUNDS = 10",
        "_ROUNDS = 9",
        ("tests/quant/test_stochastic.py",),
    ),
    Mutant(
        "other random numbers, and so other bytes, under the same version",
        ROUNDING,
        "zlib.crc32(plan.name.encode())",
        "zlib.adler32(plan.name.encode())",
        ("tests/test_pinned.py",),
    ),
    # -- packing, grids, statistics, outliers --------------------------------------------------------------
    Mutant(
        "nibbles are swapped",
        PACKING,
        "torch.stack((packed & 15, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 15), dim=-1)",
        ("tests/quant/test_packing.py",),
    ),
    Mutant(
        "the last, partly filled byte is cut off",
        PACKING,
        "return (count * bits + 7) // 8",
        "return max(1, count * bits // 8)",
        ("tests/quant/test_packing.py",),
    ),
    Mutant(
        "an asymmetric range need not include 0",
        GRID,
        "return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0), size",
        "return padded.amin(-1), padded.amax(-1).clamp(min=0), size",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the search keeps the worst range",
        GRID,
        "better = error < best_error",
        "better = error > best_error",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the largest scale overflows in bfloat16",
        GRID,
        ".clamp(max=65280.0)",
        ".clamp(max=65536.0)",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the drift has the wrong sign",
        "accullm_cli/quant/stats.py",
        "original_rows.to(rows.dtype) - rows",
        "rows - original_rows.to(rows.dtype)",
        ("tests/quant/test_stats.py",),
    ),
    Mutant(
        "the lower half of the Hessian stays empty",
        "accullm_cli/quant/stats.py",
        "hessian[end:, start:end] = hessian[start:end, end:].T",
        "pass",
        ("tests/quant/test_stats.py",),
    ),
    Mutant(
        "the residual stream's error pulls the wrong way",
        "accullm_cli/stages/block_rounding.py",
        'captures.read(batch, f"sum {name}") - _as_rows(value)',
        '_as_rows(value) - captures.read(batch, f"sum {name}")',
        ("tests/stages/test_quantize.py::test_each_input_is_that_of_the_model_rounded_so_far",),
    ),
    Mutant(
        "an activation of a product passes for a sum with the residual stream",
        "accullm_cli/model/slots.py",
        'elif result.data_ptr() != address or func.__name__.endswith("_"):  # no mere view of it',
        "elif result is argument:",
        ("tests/model/test_slots.py",),
    ),
    Mutant(
        "a fitted scale is kept where it costs",
        GRID,
        "gains = difference * (difference * curvature - 2 * slope) < 0",
        "gains = difference * (difference * curvature - 2 * slope) > 0",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "a fitted scale is forgotten when the next group's is fitted",
        GRID,
        "error[:, columns] -= difference[:, None] * own",
        "error[:, columns] -= 0 * own",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the features that lose least become outliers",
        "accullm_cli/quant/outliers.py",
        "torch.argsort(loss, descending=True, stable=True)",
        "torch.argsort(loss, descending=False, stable=True)",
        ("tests/quant/test_outliers.py",),
    ),
    # -- embedding and output head ---------------------------------------------------------------------------
    Mutant(
        "a tied matrix is moved away from the rows that are looked up",
        EMBEDDINGS,
        'corrected = job.config.rounding.target == "corrected" and not slot.is_looked_up',
        'corrected = job.config.rounding.target == "corrected"',
        (f"{ROUND_EMBEDDINGS}::test_a_head_is_rounded_for_what_the_rounded_models_final_norm_makes",),
    ),
    Mutant(
        "blocks behind a rounded embedding are rounded for the original's",
        QUANTIZE,
        "                self.rounded = self._embed(ids)\n",
        "",
        (f"{ROUND_EMBEDDINGS}::test_blocks_behind_a_rounded_embedding_are_rounded_for_it",),
    ),
    Mutant(
        "the original is measured by the quantized head",
        "accullm_cli/stages/validate.py",
        "originals_head = _head_weight(job) if artifact.plan.embeddings else None",
        "originals_head = None",
        ("tests/stages/test_validate.py::test_the_originals_logits_are_those_of_its_own_head",),
    ),
    # -- run directory and resume --------------------------------------------------------------------------
    Mutant(
        "a file appears before its content is on the disk",
        RUN,
        "os.fsync(file.fileno())",
        "file.flush()",
        ("tests/test_run.py",),
    ),
    Mutant(
        "an input that came or went is no change",
        RUN,
        "before.keys() | now.keys()",
        "before.keys() & now.keys()",
        ("tests/test_run.py",),
    ),
    Mutant(
        "an output that is gone is not missed",
        RUN,
        "if not self.file(name).exists():",
        "if self.file(name).is_dir():",
        ("tests/test_run.py",),
    ),
    Mutant(
        "a rounding option is not part of a block's key",
        QUANTIZE,
        '        **section_inputs("rounding", job.config.rounding),\n',
        "",
        (f"{RESUME}::test_a_new_rounding_option_reruns_from_quantize_and_says_why",),
    ),
    Mutant(
        "a block's key forgets the block before",
        QUANTIZE,
        '"input:block before": previous,',
        '"input:block before": "",',
        ("tests/end_to_end/test_block_chain.py",),
    ),
    Mutant(
        "a damaged shard passes for a finished block",
        QUANTIZE,
        "if not reason.runs and file_sha256(shard_path(job, unit.name)) != record.sha256:",
        "if reason.runs and file_sha256(shard_path(job, unit.name)) != record.sha256:",
        (f"{RESUME}::test_a_damaged_shard_is_made_again",),
    ),
    Mutant(
        "restored streams are behind one block too few",
        "accullm_cli/stages/streams.py",
        "keys.index(key) + 1",
        "keys.index(key)",
        ("tests/stages/test_streams.py",),
    ),
    # -- what judges ---------------------------------------------------------------------------------------
    Mutant(
        "a limit that is just reached is not met",
        "accullm_cli/measure/contract.py",
        '"<=": operator.le,',
        '"<=": operator.lt,',
        ("tests/measure/test_contract.py",),
    ),
    Mutant(
        "the upper bound of an interval is its value",
        "accullm_cli/measure/contract.py",
        '"high": figure.high}',
        '"high": figure.value}',
        ("tests/measure/test_contract.py",),
    ),
    Mutant(
        "a position is judged by its own token",
        "accullm_cli/measure/divergence.py",
        "targets = token_ids[1:]",
        "targets = token_ids[:-1]",
        ("tests/measure/test_divergence.py",),
    ),
    Mutant(
        "the divergence is weighted by the artifact",
        "accullm_cli/measure/divergence.py",
        "kl.append(_kl(original, artifact))",
        "kl.append(_kl(artifact, original))",
        ("tests/measure/test_divergence.py",),
    ),
    # -- formats -------------------------------------------------------------------------------------------
    Mutant(
        "zero points are packed along the groups",
        "accullm_cli/formats/compressed_tensors.py",
        "_words(pack(linear.zeros.T, linear.bits)).T.contiguous()",
        "_words(pack(linear.zeros, linear.bits))",
        ("tests/formats/test_compressed_tensors.py",),
    ),
    Mutant(
        "a tensor of another shape passes",
        "accullm_cli/formats/stored.py",
        "if info.shape != wanted.shape:",
        "if len(info.shape) != len(wanted.shape):",
        ("tests/formats/test_accullm.py",),
    ),
    Mutant(
        "an index may point outside its directory",
        "accullm_cli/formats/shards.py",
        'if Path(file).name != file or file in ("", ".", ".."):',
        'if file in ("", ".", ".."):',
        ("tests/formats/test_accullm.py",),
    ),
    # -- CUDA kernels, run on the CPU ------------------------------------------------------------------------
    Mutant(
        "a tile's third register is made of the first nibbles again",
        "cuda/layout.cuh",
        "a[2] = subtract_half2(and_or<0x000F000F, 0x64006400>(next), pair.zero_low);",
        "a[2] = subtract_half2(and_or<0x000F000F, 0x64006400>(word), pair.zero_low);",
        PRODUCTS,
    ),
    Mutant(
        "bfloat16 weights are made of scales rounded to bfloat16",
        "cuda/layout.cuh",
        "a[i] = fma_bfloat2(q, upper ? pair.scale_high : pair.scale_low, rest);",
        "a[i] = fma_bfloat2(q, upper ? pair.scale_high : pair.scale_low, MINUS_ZERO);",
        (f"{PRODUCTS[0]}::test_every_code_zero_point_and_scale_becomes_the_weight_of_the_format",),
    ),
    Mutant(
        "a tile is read before it has landed",
        GEMV,
        "        wait_for_copies<STAGES - 2>();\n        const u8* const stage",
        "        wait_for_copies<STAGES>();\n        const u8* const stage",
        PRODUCTS,
    ),
    Mutant(
        "warps do not wait for each other's sums",
        GEMV,
        "    }\n    __syncthreads();\n    u32* const flag",
        "    }\n    u32* const flag",
        PRODUCTS,
    ),
    Mutant(
        "a stage is filled while other warps still read it",
        GEMM,
        "        __syncthreads();\n        fetch(shared + before);\n        const u8* const stage",
        "        fetch(shared + before);\n        __syncthreads();\n        const u8* const stage",
        PRODUCTS,
    ),
    Mutant(
        "outliers are gathered over those that are still multiplied",
        GEMM,
        "            __syncthreads();  // all are done with the outliers gathered before\n",
        "",
        PRODUCTS,
    ),
    Mutant(
        "the last of several parts of K is not added",
        "cuda/pieces.cuh",
        "for (int split = 0; split < splits; split++) value +=",
        "for (int split = 0; split < splits - 1; split++) value +=",
        PRODUCTS,
    ),
    Mutant(
        "the counter of arrivals is left as it is",
        "cuda/pieces.cuh",
        "        if (threadIdx.x == 0) *arrived = 0;  // for the next launch\n",
        "",
        PRODUCTS,
    ),
    Mutant(
        "outlier columns are not written over what their codes stand for",
        "cuda/repack.cu",
        "out[static_cast<u64>(feature) * weight.in_features + k] = outliers[place];",
        "",
        ("tests/kernels/test_repack.py",),
    ),
    Mutant(
        "the next column of a block is not told the error",
        "cuda/feedback_round.cu",
        "if (column > k && column < block.columns)",
        "if (column > k + 1 && column < block.columns)",
        ("tests/kernels/test_feedback.py::test_the_codes_are_those_of_the_cpu",),
    ),
    Mutant(
        "the kernel draws another row's random number",
        "cuda/philox.cuh",
        "const u32 which = row % 4;",
        "const u32 which = (row + 1) % 4;",
        ("tests/kernels/test_feedback.py::test_the_codes_are_those_of_the_cpu",),
    ),
)
