"""The emulation that the kernels' tests rely on: it finds every kind of fault, and its numbers are the hardware's."""

from __future__ import annotations

import ctypes

import pytest
import torch

from accullm_cli.kernels.launch import Launch
from tests.cuda_emulation import BACKWARDS, FORWARDS, HERE, SHUFFLED, guarded, needs_compiler, poisoned, run

pytestmark = needs_compiler
NUMBERS = 64


def result_of(kernel: str, order: int) -> torch.Tensor:
    """What a kernel of faulty.cu makes of 0, 1, 2, ...; everything else is poisoned."""
    source = guarded(torch.arange(NUMBERS, dtype=torch.float32))
    target = poisoned(NUMBERS, dtype=torch.float32)
    arguments = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()))
    run(
        Launch(str(HERE / "faulty.cu"), kernel, (), (1, 1, 1), NUMBERS, 4 * NUMBERS, arguments), [source, target], order
    )
    return target


WANTED = 2 * torch.arange(NUMBERS, dtype=torch.float32)


@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS, SHUFFLED])
def test_a_right_kernel_is_right_in_every_order(order: int) -> None:
    assert torch.equal(result_of("right", order), WANTED)


def test_a_missing_barrier_shows_in_some_order_and_not_in_every_one() -> None:
    assert torch.equal(result_of("without_barrier", FORWARDS), WANTED)
    for order in (BACKWARDS, SHUFFLED):
        assert bool(result_of("without_barrier", order).isnan().any())


def test_a_copy_that_was_not_waited_for_is_there_only_where_copies_land_at_once() -> None:
    assert bool(result_of("without_wait", FORWARDS).isnan().all())
    assert torch.equal(result_of("without_wait", BACKWARDS), WANTED)
    shuffled = result_of("without_wait", SHUFFLED).isnan()
    assert bool(shuffled.any())
    assert not bool(shuffled.all())


def test_a_copy_over_what_is_still_read_shows_where_copies_land_at_once() -> None:
    assert torch.equal(result_of("copied_too_early", FORWARDS), WANTED)
    for order in (BACKWARDS, SHUFFLED):
        assert bool((result_of("copied_too_early", order) == 0)[1:].any())


def test_an_element_that_is_not_written_stays_poisoned() -> None:
    assert result_of("unfinished", FORWARDS).isnan().nonzero().tolist() == [[17]]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("beside_the_input", "beside_the_input: copy outside every buffer (thread 63)"),
        ("beside_the_output", "beside_the_output: wrote beside buffer 1"),
        ("beside_shared_memory", "beside_shared_memory: wrote behind the end of shared memory"),
        ("copies_beside_shared_memory", "copies_beside_shared_memory: copy outside shared memory (thread 63)"),
        ("unaligned", "unaligned: copy: source is not aligned (thread 0)"),
        ("barrier_for_some", "barrier_for_some: deadlock: threads wait for others that do not come"),
        ("two_barriers", "two_barriers: deadlock: threads wait for others that do not come"),
        ("shuffle_for_some", "shuffle_for_some: deadlock: threads wait for others that do not come"),
    ],
)
def test_every_other_fault_is_named(kernel: str, message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        result_of(kernel, FORWARDS)
    assert str(caught.value).splitlines()[0] == message
