"""Forwards timed in turn: in what order, how often, how long, and what is made of the times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dsm_tune.measuring.latency import (
    BRIEF_MS,
    Lap,
    Timing,
    interleave,
    summarise,
    timer_for,
    when_warm,
)


class Machine:
    """A made-up clock; forwards write their name and take as long as they are told."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def forward(self, name: str, ms: float) -> Callable[[], object]:
        def run() -> None:
            self.calls += name
            self.now += ms / 1e3

        return run

    def timed(self, call: Callable[[], object]) -> Lap:
        start = self.now
        call()
        return Lap((self.now - start) * 1e3)

    def clock(self) -> float:
        return self.now


def test_long_forwards_are_run_in_turn_once_each() -> None:
    machine = Machine()
    forwards = [machine.forward(name, 2 * BRIEF_MS) for name in "abc"]
    found = interleave(
        forwards, machine.timed, seconds=1e-9, warmup=0, least=4, clock=machine.clock
    )
    assert machine.calls == "abc" + "abc" * 4
    assert [len(timing.ms) for timing in found] == [4, 4, 4]
    assert found[0].ms == pytest.approx([2 * BRIEF_MS] * 4)


def test_brief_forwards_are_run_once_more_before_each_timing() -> None:
    machine = Machine()
    forwards = [machine.forward(name, 1.0) for name in "ab"]
    interleave(forwards, machine.timed, seconds=1e-9, warmup=0, least=3, clock=machine.clock)
    assert machine.calls == "ab" + "aabb" * 3


def test_of_a_brief_call_the_second_run_counts() -> None:
    machine = Machine()
    times = iter([5.0, 7.0, 3.0, 8.0, 4.0])

    def call() -> None:
        machine.now += next(times) / 1e3

    timing = when_warm(call, machine.timed)
    assert [timing().ms, timing().ms] == pytest.approx([3.0, 4.0])


def test_timing_goes_on_until_the_limit_while_the_times_scatter_and_ends_when_they_do_not() -> None:
    machine = Machine()
    steady = interleave(
        [machine.forward("a", 30.0)], machine.timed, seconds=1e9, clock=machine.clock
    )
    assert len(steady[0].ms) == 10
    machine = Machine()
    slow = machine.forward("b", 60.0)
    fast = machine.forward("c", 30.0)

    def scattered() -> None:
        (slow if len(machine.calls) % 2 else fast)()

    found = interleave([scattered], machine.timed, seconds=9.0, clock=machine.clock)
    assert 9.0 <= sum(found[0].ms) / 1e3 < 10.0


@given(st.lists(st.floats(1.0, 50.0), min_size=2, max_size=40), st.floats(0.25, 4.0))
def test_a_candidate_that_takes_a_constant_multiple_of_dense_has_that_ratio(
    dense: list[float], factor: float
) -> None:
    candidate = Timing(tuple(factor * ms for ms in dense))
    found = summarise(candidate, Timing(tuple(dense)), stat="p50", predicted=3.0)
    assert found.ratio_to_dense == pytest.approx(factor)
    assert found.predicted == 3.0
    assert found.p50 is not None
    assert found.p90 is not None
    assert found.p99 is not None
    assert min(candidate.ms) <= found.p50 <= found.p90 <= found.p99 <= max(candidate.ms)


@pytest.mark.parametrize("stat", ["p50", "p90", "p99"])
def test_the_interval_is_that_of_the_statistic_that_is_bounded(stat: str) -> None:
    ms = tuple(float(value) for value in range(1, 201))
    found = summarise(Timing(ms), Timing(ms), stat=stat)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= getattr(found, stat) <= found.high
    assert found.high - found.low < 40


class MadeUpEvent:
    """An event of a device whose clock runs ten times as fast as its log grows."""

    def __init__(self, log: list[str], *, enable_timing: bool) -> None:
        assert enable_timing
        self.log, self.at = log, -1

    def record(self) -> None:
        self.log.append("event")
        self.at = len(self.log)

    def elapsed_time(self, last: MadeUpEvent) -> float:
        assert self.log[-1] == "wait", "the device has not finished"
        return 10.0 * (last.at - self.at)


class MadeUpCuda:
    """Offers what the timer needs of ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: torch.device) -> None:
        self.log.append("wait")

    def Event(self, *, enable_timing: bool) -> MadeUpEvent:
        return MadeUpEvent(self.log, enable_timing=enable_timing)


def test_on_cuda_a_forward_is_timed_by_host_and_by_events_with_the_device_idle_before() -> None:
    cuda = MadeUpCuda()
    timed = timer_for(torch.device("cuda"), cuda=cuda)
    lap = timed(lambda: cuda.log.append("forward"))
    assert cuda.log == ["wait", "event", "forward", "event", "wait"]
    assert lap.device_ms == 20.0
    assert 0 < lap.ms < 1000


def test_on_a_cpu_there_is_no_device_time() -> None:
    assert timer_for(torch.device("cpu"))(lambda: None).device_ms is None


def test_the_median_of_the_device_stands_beside_the_hosts_statistics() -> None:
    laps = [Lap(float(ms), ms / 2) for ms in range(1, 8)]
    found = summarise(Timing.of(laps), Timing.of(laps), stat="p50")
    assert (found.p50, found.device_p50) == (4.0, 2.0)
    host_only = Timing.of([Lap(1.0), Lap(2.0)])
    assert host_only.device_ms == ()
    assert summarise(host_only, host_only, stat="p50").device_p50 is None
