"""How far one model's next-token distributions are from another's, accumulated window by window."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.measure.statistics import bootstrap_mean, bootstrap_quantile

# Logits in one float32 temporary (4 MB, which caches hold): a vocabulary of 150,000 is taken 6 positions at a time.
_CHUNK_ELEMENTS = 1 << 20

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
        """Add one window.

        Args:
            original_logits: [T, V], any float dtype.
            artifact_logits: [T, V].
            token_ids: integer [T], T >= 2: position t predicts token t + 1, and the last position has no target.
            floor_logits: [T, V] of the original with one bfloat16 rounding per block, for the noise floor of the KL;
                windows without them take no part in it.

        Raises:
            AccullmError: the vocabularies differ, a token lies outside of them, or logits are not finite.
        """
        where = f"validation window {self.windows + 1}"
        _check(original_logits, artifact_logits, token_ids, floor_logits, where)
        targets = token_ids[1:]
        kl, floor_kl, agrees, nll_original, nll_artifact = [], [], [], [], []
        for rows in _chunks(*original_logits.shape):
            original = _Distribution(original_logits[rows])
            artifact = _Distribution(artifact_logits[rows])
            kl.append(_kl(original, artifact))
            agrees.append((original.argmax == artifact.argmax).double().cpu())
            nll_original.append(_negative_log_likelihood(original, targets[rows]))
            nll_artifact.append(_negative_log_likelihood(artifact, targets[rows]))
            if floor_logits is not None:
                floor_kl.append(_kl(original, _Distribution(floor_logits[rows])))
        # One NaN or infinite logit makes its row's KL so: a look at T sums instead of T * V logits.
        if not torch.isfinite(torch.cat(kl + floor_kl)).all():
            raise _not_finite(original_logits, artifact_logits, where)
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


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


class _Distribution:
    """Next-token distributions of some positions: p = exponentials / sum, log p = shifted - log(sum).

    torch.log_softmax sums its exponentials in float32, which gives the KL of two near models of 50,000 tokens an error
    of 1e-6, too near the noise floors that are measured here. Summed in float64 it is 1e-8, at the same speed.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        logits = logits.float()
        # argmax is the first of tied logits; the shift could tie more of them by rounding, so it comes after.
        self.argmax = logits.argmax(-1)  # int64 [t]
        self.shifted = logits - logits.amax(-1, keepdim=True)  # float32 [t, V]
        self.exponentials = self.shifted.exp()  # float32 [t, V]
        self.sum = self.exponentials.sum(-1, dtype=torch.float64)  # float64 [t]


def _kl(original: _Distribution, other: _Distribution) -> torch.Tensor:
    """KL(original || other): float64 [t] on the CPU."""
    difference = (original.shifted - other.shifted).mul_(original.exponentials)
    expected = difference.sum(-1, dtype=torch.float64) / original.sum
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
    lengths = {len(token_ids), *(len(logits) for logits in (original, artifact, floor) if logits is not None)}
    if len(lengths) > 1 or len(token_ids) < 2 or (floor is not None and floor.shape != original.shape):
        raise ValueError(f"{where}: logits and tokens must be of one length of at least 2, logits of one width")
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
