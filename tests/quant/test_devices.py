"""Rounding happens on the device of its loops: all is sent and made there, and comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accullm_cli.quant.loops import COMPILED
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.wavefront import round_fed
from tests.quant.elsewhere import THERE, Elsewhere, as_if_there_were_a_gpu
from tests.quant.references import correlated_problem

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no stand-in")

# Those of the CPU, to which what lies there comes and from which it goes back.
LOOPS = replace(COMPILED, device=THERE, round_fed=round_fed)


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_if_there_were_a_gpu(monkeypatch) as there:
        moved = there(torch.arange(6.0))
        assert moved.is_cuda
        assert isinstance(torch.ones(6, device=moved.device) + moved, Elsewhere)
        assert type((2 * moved).cpu()) is torch.Tensor
        with pytest.raises(AssertionError, match=r"aten::add: tensors of the CPU, \[\(6,\)\], meet those of a GPU"):
            moved + torch.ones(6)


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("method", ["nearest", "feedback", "stochastic"])
@pytest.mark.parametrize("scale_bits", [6, 16])
def test_rounding_follows_its_weights(
    method: str, mode: str, with_fisher: bool, scale_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = correlated_problem(20, 150, 400, seed=1)
    plan = LinearPlan("a", 20, 150, 4, 64, False, (3, 70, 149), scale_bits=scale_bits)
    gradients = torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    weight, hessian, pull = problem.weight.float(), problem.hessian.float(), problem.pull.float()
    fishers = {"a": gradients.T @ gradients / 60} if with_fisher else {}
    options = RoundingOptions(method, mode)  # type: ignore[arg-type]
    here = round_linears({"a": weight}, {"a": plan}, options, torch.bfloat16, hessian, {"a": pull}, fishers=fishers)[
        "a"
    ]
    with as_if_there_were_a_gpu(monkeypatch):
        found = round_linears(
            {"a": weight}, {"a": plan}, options, torch.bfloat16, hessian, {"a": pull}, fishers=fishers, loops=LOOPS
        )["a"]
    assert found.relative_error == here.relative_error
    for suffix, tensor in here.linear.to_tensors().items():
        back = found.linear.to_tensors()[suffix]
        assert type(back) is torch.Tensor, f"{suffix} stayed there"
        assert torch.equal(back, tensor), suffix


def test_rounding_without_data_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plan = torch.randn(5, 70), LinearPlan("a", 5, 70, 4, 32, True, (3,))
    options = RoundingOptions("feedback")
    here = round_linears({"a": weight}, {"a": plan}, options, torch.bfloat16)["a"]
    with as_if_there_were_a_gpu(monkeypatch):
        found = round_linears({"a": weight}, {"a": plan}, options, torch.bfloat16, loops=LOOPS)["a"]
    assert found.records == here.records
    assert torch.equal(found.linear.codes, here.linear.codes)
    assert torch.equal(found.linear.scales, here.linear.scales)
