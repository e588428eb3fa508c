"""How far one model's next-token distributions are from another's, accumulated window by window."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.measure.statistics import bootstrap_mean, bootstrap_quantile

# Logits in one float32 temporary (4 MB, which caches hold): a vocabulary of 150,000 is taken 6 positions at a time.
_CHUNK_ELEMENTS = 1 << 20

_LENGTHS = "logits and tokens must be of one length of at least 2, logits of one width"

# Upper edges of the histogram's bins in nats: 1e-6 to 10, four per decade.
HISTOGRAM_EDGES = tuple(10 ** (-6 + step / 4) for step in range(29))


class Divergence:
    """Accumulates per-token measures of an artifact against its original.

    KL divergence is KL(original || artifact) in nats. Exponentials and products run in float32, every sum, over the
    vocabulary and over tokens, in float64. A KL is never negative but for that rounding, which can leave a zero some
    1e-8 below it: such values count as 0, and nothing else is clamped.
    """

    def __init__(self) -> None:
        # One tensor per window, on the CPU.
        self._kl: list[torch.Tensor] = []  # float64 [T]
        self._floor_kl: list[torch.Tensor] = []  # float64 [T]
        self._agrees: list[torch.Tensor] = []  # float64 [T], 1 where both put the same token first
        self._nll_original: list[torch.Tensor] = []  # float64 [T - 1], nats
        self._nll_artifact: list[torch.Tensor] = []  # float64 [T - 1], nats

    @property
    def windows(self) -> int:
        return len(self._kl)

    def add(
        self,
        original_logits: torch.Tensor,
        artifact_logits: torch.Tensor,
        token_ids: torch.Tensor,
        floor_logits: torch.Tensor | None = None,
    ) -> None:
        """Add one window, as `add_parts` does, whose logits are all there.

        Args:
            original_logits: [T, V], any float dtype.
            artifact_logits: [T, V].
            token_ids: integer [T].
            floor_logits: [T, V], or None.
        """
        self.add_parts([(original_logits, artifact_logits, floor_logits)], token_ids)

    def add_parts(
        self, parts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], token_ids: torch.Tensor
    ) -> None:
        """Add one window, whose logits come some positions at a time: all of them may take more memory than a model.

        Args:
            parts: of successive positions, together T, the logits [t, V] in any float dtype: of the original, of the
                artifact, and of the original with one bfloat16 rounding per block, for the noise floor of the KL;
                windows without the last (None) take no part in it.
            token_ids: integer [T], T >= 2: position t predicts token t + 1, and the last position has no target.

        Raises:
            AccullmError: the vocabularies differ, a token lies outside of them, or logits are not finite.
        """
        where = f"validation window {self.windows + 1}"
        targets, behind, scratch = token_ids[1:], 0, None
        kl, floor_kl, agrees, nll_original, nll_artifact = [], [], [], [], []
        for original_logits, artifact_logits, floor_logits in parts:
            _check(original_logits, artifact_logits, token_ids, floor_logits, where)
            own = targets[behind : behind + len(original_logits)]
            behind += len(original_logits)
            scratch = scratch or _Scratch(original_logits)
            for rows in _chunks(*original_logits.shape):
                original = _Distribution(original_logits[rows], scratch, 0)
                artifact = _Distribution(artifact_logits[rows], scratch, 1)
                kl.append(_kl(original, artifact, scratch))
                agrees.append((original.argmax == artifact.argmax).double().cpu())
                nll_original.append(_negative_log_likelihood(original, own[rows]))
                nll_artifact.append(_negative_log_likelihood(artifact, own[rows]))
                if floor_logits is not None:  # in the place of the artifact's
                    floor_kl.append(_kl(original, _Distribution(floor_logits[rows], scratch, 1), scratch))
                # One NaN or infinite logit makes its row's KL so: a look at t sums instead of t * V logits.
                if not torch.isfinite(torch.cat(kl[-1:] + floor_kl[-1:])).all():
                    raise _not_finite(original_logits, artifact_logits, where)
        if len(token_ids) < 2 or behind != len(token_ids):
            raise ValueError(f"{where}: {_LENGTHS}")
        self._kl.append(torch.cat(kl))
        self._agrees.append(torch.cat(agrees))
        self._nll_original.append(torch.cat(nll_original))
        self._nll_artifact.append(torch.cat(nll_artifact))
        if floor_logits is not None:
            self._floor_kl.append(torch.cat(floor_kl))

    def finish(self, text: str, seed: int) -> Fidelity:
        """Everything that was measured, with 95% confidence intervals from resampling whole windows.

        Args:
            text: what the windows were cut from: "default" or a path.
            seed: of the resampling.

        Raises:
            AccullmError: there are fewer than two windows.
            ValueError: no window came with `floor_logits`; a KL is not reported without its noise floor.
        """
        if self.windows < 2:
            raise AccullmError(
                f"a confidence interval needs at least 2 windows of text, not {self.windows}",
                text,
                "give more text or shorter windows",
            )
        if not self._floor_kl:
            raise ValueError("no window came with floor_logits, and a KL is not reported without its noise floor")
        values = torch.cat(self._kl)
        return Fidelity(
            text=text,
            windows=self.windows,
            tokens=len(values),
            perplexity_original=_perplexity(bootstrap_mean(self._nll_original, seed)),
            perplexity=_perplexity(bootstrap_mean(self._nll_artifact, seed)),
            mean_kl=bootstrap_mean(self._kl, seed),
            kl_p99=bootstrap_quantile(self._kl, 0.99, seed),
            kl_p999=bootstrap_quantile(self._kl, 0.999, seed),
            kl_max=values.max().item(),
            top1_agreement=bootstrap_mean(self._agrees, seed),
            mean_kl_floor=bootstrap_mean(self._floor_kl, seed),
            kl_of_window=tuple(window.mean().item() for window in self._kl),
            kl_histogram=histogram(values),
        )


def histogram(values: torch.Tensor) -> tuple[tuple[float, int], ...]:
    """Count tokens by KL: (upper edge in nats, tokens with a KL above the previous edge and up to this one).

    The first bin holds everything up to 1e-6. Where a KL exceeds 10, one more bin ends at the largest: the counts
    always sum to the tokens.
    """
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1).tolist()
    bins = list(zip(HISTOGRAM_EDGES, counts[:-1], strict=True))
    if counts[-1]:
        bins.append((values.max().item(), counts[-1]))
    return tuple(bins)


def _rows(vocabulary: int) -> int:
    return max(1, _CHUNK_ELEMENTS // vocabulary)


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    step = _rows(vocabulary)
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


class _Scratch:
    """Memory for one chunk of positions, taken again for the next: freed and asked for again, blocks of this size leave
    holes that none of them fits into, of gigabytes in all.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        shape = (_rows(logits.shape[-1]), logits.shape[-1])
        self._double = logits.new_empty(shape, dtype=torch.float64)
        self.shifted = logits.new_empty((2, *shape), dtype=torch.float32)
        self.exponentials = torch.empty_like(self.shifted)
        self.difference = torch.empty_like(self.shifted[0])

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Over the vocabulary, in float64."""
        return self._double[: len(values)].copy_(values).sum(-1)


class _Distribution:
    """Next-token distributions of some positions: p = exponentials / sum, log p = shifted - log(sum).

    torch.log_softmax sums its exponentials in float32, which gives the KL of two near models of 50,000 tokens an error
    of 1e-6, too near the noise floors that are measured here. Summed in float64 it is 1e-8, at the same speed.
    """

    def __init__(self, logits: torch.Tensor, scratch: _Scratch, place: int) -> None:
        # argmax is the first of tied logits; the shift could tie more of them by rounding, so it comes after.
        self.argmax = logits.argmax(-1)  # int64 [t]
        shifted, exponentials = scratch.shifted[place, : len(logits)], scratch.exponentials[place, : len(logits)]
        self.shifted = shifted.copy_(logits).sub_(logits.amax(-1, keepdim=True))  # float32 [t, V]
        self.exponentials = torch.exp(self.shifted, out=exponentials)  # float32 [t, V]
        self.sum = scratch.summed(self.exponentials)  # float64 [t]


def _kl(original: _Distribution, other: _Distribution, scratch: _Scratch) -> torch.Tensor:
    """KL(original || other): float64 [t] on the CPU."""
    difference = scratch.difference[: len(original.shifted)]
    torch.sub(original.shifted, other.shifted, out=difference).mul_(original.exponentials)
    expected = scratch.summed(difference) / original.sum
    return (expected - original.sum.log() + other.sum.log()).clamp(min=0).cpu()


def _negative_log_likelihood(distribution: _Distribution, targets: torch.Tensor) -> torch.Tensor:
    """Of `targets`, one for each leading row (the window's last row has none): float64 on the CPU."""
    count = len(targets)
    at_target = distribution.shifted[:count].gather(1, targets.to(distribution.shifted.device).long().unsqueeze(1))
    return (distribution.sum[:count].log() - at_target.squeeze(1)).cpu()


def _perplexity(nll: Estimate) -> Estimate:
    """exp(mean negative log-likelihood). Beyond 709 nats per token it is the largest float, as JSON has no infinity."""
    largest = math.log(sys.float_info.max)
    return Estimate(*(math.exp(min(figure, largest)) for figure in (nll.value, nll.low, nll.high)))


def _check(
    original: torch.Tensor, artifact: torch.Tensor, token_ids: torch.Tensor, floor: torch.Tensor | None, where: str
) -> None:
    vocabulary = original.shape[-1]
    if artifact.shape[-1] != vocabulary:
        raise AccullmError(
            f"the artifact's vocabulary has {artifact.shape[-1]} tokens, the original's {vocabulary}",
            where,
            "compare an artifact with the model that it was made from",
        )
    if len(artifact) != len(original) or (floor is not None and floor.shape != original.shape):
        raise ValueError(f"{where}: {_LENGTHS}")
    outside = token_ids.max().item()
    if outside >= vocabulary:
        raise AccullmError(
            f"token {outside} lies outside the vocabulary of {vocabulary}",
            where,
            "use the tokenizer that came with the model",
        )


def _not_finite(original: torch.Tensor, artifact: torch.Tensor, where: str) -> AccullmError:
    """The refusal for logits of which some are NaN or infinite; the original is looked at first."""
    if not torch.isfinite(original.float()).all():
        return AccullmError("the original's logits hold NaN or Inf", where, "look for damaged weights in the source")
    if not torch.isfinite(artifact.float()).all():
        return AccullmError("the artifact's logits hold NaN or Inf", where, "run accullm verify on the artifact")
    return AccullmError(
        "the logits of the original rounded to bfloat16 hold NaN or Inf",
        where,
        "look for damaged weights in the source",
    )
