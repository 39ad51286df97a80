"""Seconds per stage and step: on the host's time line, and on a GPU's that is played here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vapi_fast.runtime.clock import STAGES, StageClock


class Stream:
    """A GPU played on the CPU: work is put in line at once, and done when `run_until` says so."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0  # milliseconds of work
        self.events = 0

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds


class Event:
    stream: Stream

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        self.stream.events += 1

    def record(self, stream: Stream) -> None:
        assert stream is self.stream
        self.at = stream.queued

    def query(self) -> bool:
        return self.at <= self.stream.done

    def synchronize(self) -> None:
        self.stream.done = max(self.stream.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "an event was read before the GPU had reached it"
        return end.at - self.at


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(Event, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def test_stages_add_up_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr("vapi_fast.runtime.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = StageClock("cpu")
    for seconds in (0.25, 0.5):
        with clock("decode"):
            now[0] += seconds
        now[0] += 2.0
        with clock("lpips"):
            now[0] += 0.125
        clock.end_step()
        now[0] += 100.0
    clock.add("startup", 7.0)
    seconds = clock.seconds()
    assert list(seconds.items()) == [("startup", 7.0), ("decode", 0.75), ("lpips", 0.25)]
    assert clock.step_seconds() == [2.375, 2.625]


def test_gpu_stages_are_read_when_the_gpu_has_reached_them(stream: Stream) -> None:
    clock = StageClock(torch.device("cuda", 0))
    with clock("decode"):
        stream.work(30)
    with clock("lpips"):
        stream.work(5)
    clock.end_step()
    assert clock.seconds() == {}
    assert clock.step_seconds() == []
    stream.done = 30
    assert clock.seconds() == {"decode": pytest.approx(0.030)}
    assert stream.done == 30  # nothing waited
    assert clock.seconds(wait=True) == {"decode": pytest.approx(0.030), "lpips": pytest.approx(0.005)}
    assert stream.done == 35
    assert clock.step_seconds() == [pytest.approx(0.035)]


def test_a_step_holds_the_gaps_between_its_stages_and_none_between_steps(stream: Stream) -> None:
    clock = StageClock("cuda")
    for _ in range(2):
        with clock("encode"):
            stream.work(10)
        stream.work(1)
        with clock("forward"):
            stream.work(20)
        clock.end_step()
        stream.work(1000)  # a snapshot
    assert clock.step_seconds(wait=True) == [pytest.approx(0.031)] * 2
    assert clock.seconds() == {"encode": pytest.approx(0.020), "forward": pytest.approx(0.040)}


def test_events_are_used_again(stream: Stream) -> None:
    clock = StageClock("cuda")
    for step in range(100):
        for stage in STAGES:
            with clock(stage):
                stream.work(1)
        stream.done = stream.queued - 3  # the GPU lags behind
        clock.end_step()
        assert len(clock.pending) <= 5, step
    assert stream.events <= 2 * (2 * len(STAGES) + 2)
    assert clock.seconds(wait=True) == {stage: pytest.approx(0.1) for stage in STAGES}
    assert clock.step_seconds() == [pytest.approx(len(STAGES) / 1e3)] * 100


def test_stages_do_not_nest_and_a_failed_one_is_not_counted() -> None:
    clock = StageClock("cpu")
    message = "stage 'lpips' was started inside stage 'decode'"
    with pytest.raises(RuntimeError, match=message), clock("decode"), clock("lpips"):
        pass
    assert clock.seconds() == {}
    with clock("lpips"):
        pass
    assert list(clock.seconds()) == ["lpips"]


def test_a_step_without_stages_is_none() -> None:
    clock = StageClock("cpu")
    clock.end_step()
    assert clock.step_seconds() == []


@pytest.mark.gpu
def test_gpu_time_is_that_of_its_kernels() -> None:
    clock = StageClock("cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with clock("decode"):
        torch.cuda._sleep(4_000_000_000)  # cycles: two seconds, in which the host gets far ahead
    end.record()
    clock.end_step()
    assert clock.step_seconds() == []
    assert clock.seconds(wait=True)["decode"] == pytest.approx(start.elapsed_time(end) / 1e3, rel=0.01)
