"""How products are computed: what may round where, and that it ends."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from accullm_cli.pipeline import convert
from accullm_cli.quant.feedback import factor_hessian
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.stages import precision
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.precision import Bfloat16Products, Precision, onednn_rounds, products
from tests.streaming import short_config
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


def product_error() -> float:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(300, 512, generator=generator)
    right = torch.randn(512, 200, generator=generator)
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def test_float32_is_float32_whatever_computes_it() -> None:
    with products("float32"):
        assert product_error() < 2e-6
    assert product_error() < 2e-6


def test_rounding_is_what_was_measured() -> None:
    """On a CPU without AMX nothing rounds."""
    with products("bfloat16"):
        assert (product_error() > 1e-4) == onednn_rounds()


def test_the_setting_ends_with_an_error_too() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(RuntimeError), products("bfloat16"):
        raise RuntimeError(setting.fp32_precision)
    assert setting.fp32_precision == before


def test_linears_and_sums_multiply_bfloat16_and_add_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(140, 300, generator=generator), torch.randn(40, 300, generator=generator)
    bias = torch.randn(40, generator=generator)
    with Bfloat16Products():
        found = nn.functional.linear(x, weight, bias)
        without_bias = nn.functional.linear(x, weight)
        total = torch.ones(300, 300).addmm_(x.T, x)
        untouched = x @ weight.T
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    size = x.double().abs() @ weight.double().abs().T
    unit = 2.0**-8  # of one rounding to bfloat16; sums in float32 add next to nothing
    assert found.dtype == torch.float32
    assert bool(((found - bias - exact).abs() <= unit * (exact.abs() + 2 * bias.abs()) + 1e-6 * size).all())
    assert bool(((without_bias - exact).abs() <= unit * exact.abs() + 1e-6 * size).all())
    gram = x.bfloat16().double().T @ x.bfloat16().double()
    assert bool(((total - 1 - gram).abs() <= unit * gram.abs() + 1e-6 * (x.abs().T @ x.abs() + 1)).all())
    assert torch.equal(untouched, x @ weight.T)


@pytest.mark.parametrize("rows", [1, 2, 127, 128])
def test_the_hessian_of_an_expert_that_few_tokens_reach_can_be_factored(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(rows, 512, generator=generator) * torch.randn(512, generator=generator).mul(1.5).exp()
    gram = GramMatrices(512)
    with Bfloat16Products():
        gram.add(inputs)
    hessian = gram.take_hessian()
    assert hessian is not None
    least = torch.linalg.eigvalsh(hessian.double()).min()
    assert float(least / hessian.diagonal().mean()) > -0.02
    assert not factor_hessian(hessian, 0.03).is_raised


def test_gradients_pass_rounded_products() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    with Bfloat16Products():
        nn.functional.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    wanted = weight.bfloat16().double().sum(0)
    assert bool(((x.grad - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-4).all())


@pytest.mark.parametrize(("multiplies", "rounded"), [(True, True), (False, False)])
def test_what_the_cpu_multiplies_faster_is_rounded(
    multiplies: bool, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "onednn_rounds", lambda: False)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: multiplies)
    x, weight = torch.full((1, 32), 1 + 2.0**-12), torch.ones(1, 32)
    with products("bfloat16"):
        assert (float(nn.functional.linear(x, weight)) == 32) == rounded
    with products("float32"):
        assert float(nn.functional.linear(x, weight)) > 32


@pytest.mark.parametrize(("rounds", "wanted", "used"), [(True, "float32", "none"), (False, "float32", "bf16")])
def test_where_onednn_rounds_float32_does_without_it(
    rounds: bool, wanted: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "onednn_rounds", lambda: rounds)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    with products(wanted):
        assert torch.backends.mkldnn.matmul.fp32_precision == used


@pytest.mark.parametrize(("wanted", "used"), [("tf32", "tf32"), ("float32", "ieee")])
def test_a_gpu_rounds_where_it_may(wanted: Precision, used: str) -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    with products(wanted, torch.device("cuda")):
        assert [setting.fp32_precision for setting in settings] == [used, used]
    assert [setting.fp32_precision for setting in settings] == before


def test_an_older_torch_computes_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_onednn", lambda: False)
    precision.onednn_rounds.cache_clear()
    assert not precision.onednn_rounds()
    with products("bfloat16"):
        assert product_error() < 2e-6
    precision.onednn_rounds.cache_clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(module, precision) of all that is computed; the products themselves stay float32."""
    found: set[tuple[str, str]] = set()

    def watched(compute: Compute, wanted: Precision | None = None) -> AbstractContextManager[None]:
        module = sys._getframe(1).f_globals["__name__"].rpartition(".")[2]
        found.add((module, wanted or compute.precision))
        return nullcontext()

    monkeypatch.setattr(Compute, "products", watched)
    return found


@pytest.mark.parametrize("wanted", ["auto", "float32"])
@pytest.mark.parametrize(("rounds", "multiplies"), [(True, False), (False, True), (False, False)])
def test_validation_is_float32_and_rounding_what_was_asked_for(
    rounds: bool,
    multiplies: bool,
    wanted: str,
    seen: set[tuple[str, str]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "onednn_rounds", lambda: rounds)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: multiplies)
    convert(short_config(llama, tmp_path / "out", machine__precision=wanted))
    everything = {("calibrate", "float32"), ("quantize", "float32"), ("validate", "float32")}
    own = "bfloat16" if (rounds or multiplies) and wanted == "auto" else "float32"
    assert seen == everything | {(name, own) for name in ("calibrate", "block_rounding")}


def test_another_precision_rounds_anew(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "onednn_rounds", lambda: True)
    convert(short_config(llama, tmp_path / "out", machine__precision="auto"))
    report = convert(short_config(llama, tmp_path / "out", machine__precision="float32"))
    reasons = {stage.name: stage.reason for stage in report.stages}
    assert [name for name, reason in reasons.items() if reason == "up to date"][:2] == ["reading", "reference"]
    assert reasons["calibrate"] == reasons["quantize"] == "machine changed (precision)"
    assert "precision" not in reasons["validate accullm"]
