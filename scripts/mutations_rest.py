"""Mutants of everything around the mathematics; see mutations.py."""

from __future__ import annotations

from mutations import Mutant

ROUNDING = "accullm_cli/quant/rounding.py"
SCALES = "accullm_cli/quant/scales.py"
SEARCH = "accullm_cli/search.py"
EMBEDDINGS = "accullm_cli/stages/embedding_rounding.py"
RUN = "accullm_cli/run.py"
QUANTIZE = "accullm_cli/stages/quantize.py"
RESUME = "tests/end_to_end/test_resume.py"
GEMV = "cuda/hybrid_gemv.cu"
GEMM = "cuda/hybrid_gemm.cu"
ROUND_EMBEDDINGS = "tests/stages/test_embedding_rounding.py"
PRODUCTS = ("tests/kernels/test_launch.py",)
PACKED = "accullm_cli/kernels/packed.py"
PACKED_PRODUCTS = ("tests/kernels/test_packed.py",)

OF_THE_REST = (
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
        "accullm_cli/stages/two_streams.py",
        "                self.rounded = decoder.embed_all(ids)\n",
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
        "changed or sorted(before.keys() ^ now.keys())",
        "changed",
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
        'section_inputs("rounding", rounding, "outlier_mode", "target", "damping")',
        "{}",
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
        ("tests/formats/test_accullm_refusals.py",),
    ),
    Mutant(
        "an index may point outside its directory",
        "accullm_cli/formats/shards.py",
        'if Path(file).name != file or file in ("", ".", ".."):',
        'if file in ("", ".", ".."):',
        ("tests/formats/test_accullm_refusals.py",),
    ),
    # -- products on a CPU -----------------------------------------------------------------------------------
    Mutant(
        "weights in the middle between two of bfloat16 are rounded up",
        PACKED,
        "np.uint32(0x7FFF)",
        "np.uint32(0x8000)",
        PACKED_PRODUCTS,
    ),
    Mutant("outlier features are left out", PACKED, "y += rows[:,", "y += 0 * rows[:,", PACKED_PRODUCTS),
    Mutant(
        "the last group of a row is left out where it is short",
        PACKED,
        "range(min(half, octets - begin))",
        "range(half if half <= octets - begin else 0)",
        PACKED_PRODUCTS,
    ),
    Mutant(
        "the last row of each thread is left out where there is one token",
        PACKED,
        "y[0, n] = total",
        "y[0, n] = total if n + 1 < last else y[0, n]",
        PACKED_PRODUCTS,
    ),
    Mutant(
        "the fourth of four tokens is the third",
        PACKED,
        "sum_d += low * even[d, j]",
        "sum_d += low * even[c, j]",
        PACKED_PRODUCTS,
    ),
    Mutant(
        "gradients are lost in products of few tokens",
        PACKED,
        "and not needs_gradient",
        "",
        ("tests/test_hf_on_cpu.py",),
    ),
    # -- speed -----------------------------------------------------------------------------------------------
    Mutant(
        "the run that compiles is timed, too",
        "accullm_cli/stages/speed.py",
        "statistics.median(prefills[1:])",
        "statistics.median(prefills)",
        ("tests/stages/test_speed.py",),
    ),
    Mutant(
        "single tokens are read without those before",
        "accullm_cli/stages/speed.py",
        "use_cache=True, **cache)",
        "use_cache=True)",
        ("tests/stages/test_speed.py",),
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
        "if (column > k && column < tile.columns)",
        "if (column > k + 1 && column < tile.columns)",
        ("tests/kernels/test_rounding.py::test_a_tile_is_that_of_the_compiled_loop_bit_for_bit",),
    ),
    Mutant(
        "the kernel's sums are not those of the CPU",
        "cuda/feedback_round.cu",
        "fed[later] += error * row_of_upper[column]",
        "fed[later] = fma(error, row_of_upper[column], fed[later])",
        ("tests/kernels/test_rounding.py",),
    ),
    Mutant(
        "descent on a GPU leaves out the column behind one that moved",
        "cuda/descend.cu",
        "start = mover + 1;",
        "start = mover + 2;",
        ("tests/kernels/test_rounding.py",),
    ),
    Mutant(
        "descent on a GPU asks for the first mover before all have answered",
        "cuda/descend.cu",
        "            __syncthreads();\n            const int mover",
        "            const int mover",
        ("tests/kernels/test_rounding.py",),
    ),
    Mutant(
        "descent on a GPU moves codes of outlier features",
        "accullm_cli/kernels/rounding.py",
        ".masked_fill(~rows.movable, 0)",
        "",
        ("tests/kernels/test_rounding.py",),
    ),
    Mutant(
        "a tensor of rounding is made on the CPU, wherever the weights are",
        "accullm_cli/quant/feedback.py",
        "torch.zeros(target.shape, dtype=torch.uint8, device=target.device)",
        "torch.zeros(target.shape, dtype=torch.uint8)",
        ("tests/quant/test_devices.py",),
    ),
    Mutant(
        "the kernel draws another row's random number",
        "cuda/philox.cuh",
        "const u32 which = row % 4;",
        "const u32 which = (row + 1) % 4;",
        ("tests/kernels/test_rounding.py::test_a_tile_is_that_of_the_compiled_loop_bit_for_bit",),
    ),
    Mutant(
        "a scale is rounded to the next lower one of its table",
        SCALES,
        "(table[1:] * table[:-1]).sqrt()",
        "table[1:]",
        ("tests/quant/test_scales.py",),
    ),
    Mutant(
        "a table does not reach down to what the search may come to",
        ROUNDING,
        "smallest = SEARCHED_RANGES[-1] if searches else 1.0",
        "smallest = 4.0 if searches else 1.0",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the table of scales is not counted",
        "accullm_cli/quant/plan.py",
        "table = 0 if self.scale_bits == 16 else 2 * 2**self.scale_bits",
        "table = 0",
        ("tests/quant/test_plan.py",),
    ),
    Mutant(
        "all group sizes are expected to lose alike",
        "accullm_cli/stages/profile.py",
        "measured = _nearest_group_size(group_size)",
        "measured = _nearest_group_size(64)",
        ("tests/stages/test_profile.py",),
    ),
    Mutant(
        "a search is content with the value where the interval's worse end misses",
        "accullm_cli/measure/contract.py",
        'return [\n        replace(requirement, bound="high"',
        'return [\n        replace(requirement, bound=""',
        ("tests/test_search.py",),
    ),
    Mutant(
        "a search goes on although a smaller plan promises nothing",
        SEARCH,
        "if good is not None and guess > good - RESOLUTION:",
        "if good is not None and guess > good:",
        ("tests/test_search.py",),
    ),
    Mutant(
        "the last plan that was tried is exported, not the best",
        SEARCH,
        "chosen = replace(_plan_job(job, best.bits, shared)",
        "chosen = replace(_plan_job(job, measured[-1].bits, shared)",
        ("tests/test_search.py",),
    ),
    Mutant(
        "a search begins anew where another contract was searched for before",
        SEARCH,
        "known = [] if job.fresh else _load(job, key)",
        "known = []",
        ("tests/test_search.py",),
    ),
    Mutant(
        "the search's windows are those that the contract is judged on",
        "accullm_cli/model/text.py",
        "_, (found, origin) = _held_out(",
        "(found, origin), _ = _held_out(",
        ("tests/model/test_text.py",),
    ),
    Mutant(
        "figures on other text are those of the contract's",
        "accullm_cli/pipeline.py",
        "other=load_fidelity(job, format_name, OTHER) if",
        "other=load_fidelity(job, format_name) if",
        ("tests/pipeline/test_convert.py",),
    ),
)
