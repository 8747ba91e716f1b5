"""What ranks record of their activity, and which rank the watchdog names."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, comm
from disttrain.collectives import AllGather, AllReduce
from disttrain.comm import Communicator, SimulatedCommunicator, SimulatedWorld, simulate
from disttrain.comm.engines.torch_distributed import TorchCommunicator
from disttrain.comm.liveness.activity import Activity, Report
from disttrain.comm.liveness.watchdog import _CONFIRMING_BEATS, _SLOW_BEATS, _STALL_ADVICE, _UNEVEN_ADVICE, Watchdog

NAMES = ["rank 0 (a)", "rank 1 (b)", "rank 2 (c)", "rank 3 (d)"]


def waiting(number: int, seconds: float = 70.0) -> Report:
    return Report(5, "optimizer step", seconds, number, number, f"all_reduce {number - 100} (bucket 2: topk)")


def loading(started: int, seconds: float = 61.0) -> Report:
    return Report(5, "data loading", seconds, started, 0, "")


def judge(reports: list[Report], beats: int = _CONFIRMING_BEATS, **options: Any) -> list[str]:
    watchdog = Watchdog(NAMES[: len(reports)], **{"stall": 60.0, **options})
    found = []
    for _ in range(beats):
        for rank, report in enumerate(reports):
            watchdog.update(rank, json.loads(json.dumps(report)))
        found.append(watchdog.check_stalled())
    return [message for message in found if message is not None]


@pytest.mark.parametrize("late", range(4))
def test_the_rank_that_is_late_is_named(late: int) -> None:
    reports = [waiting(107)] * 4
    reports[late] = loading(106)
    assert judge(reports) == [
        f"{NAMES[late]} has been in step 5's data loading for 61 s; other ranks are waiting in all_reduce 7 "
        f"(bucket 2: topk) of step 5's optimizer step: {_STALL_ADVICE}"
    ]
    assert judge(reports, beats=_CONFIRMING_BEATS - 1) == [], "one report may be older than the other"
    assert len(judge(reports, beats=20)) == 1, "reported once"
    assert judge(reports, stall=None) == []
    assert judge(reports, stall=71.0) == []


def test_the_rank_farthest_behind_is_named_and_the_others_are_counted() -> None:
    reports = [waiting(107), loading(106), waiting(102, 65.0), loading(101)]
    (message,) = judge(reports)
    assert message.startswith(
        "rank 3 (d) has been in step 5's data loading for 61 s; rank 2 is waiting in all_reduce 2 "
    )
    reports = [waiting(107), waiting(107), loading(105), loading(101)]
    (message,) = judge(reports)
    assert message.startswith("rank 3 (d) has been in step 5's data loading for 61 s (1 more rank is behind); ")


def test_a_stall_in_a_collective_that_all_ranks_started_is_blamed_on_the_network() -> None:
    (message,) = judge([waiting(107)] * 3)
    assert message == (
        "all_reduce 7 (bucket 2: topk) of step 5's optimizer step has not completed in 70 s although all ranks "
        "have started it: the network or the engine is stuck"
    )


def test_progress_is_not_a_stall() -> None:
    watchdog = Watchdog(NAMES[:2], stall=60.0)
    for number in range(101, 120):  # each wait is long, but ends
        watchdog.update(0, waiting(number))
        watchdog.update(1, loading(number - 1))
        assert watchdog.check_stalled() is None


def test_lateness_is_reported_before_a_stall() -> None:
    watchdog = Watchdog(NAMES[:2], stall=60.0, late=10.0)
    found = []
    for seconds in range(0, 90, 5):
        watchdog.update(0, waiting(107, seconds))
        watchdog.update(1, loading(106, seconds))
        messages = {"late": watchdog.check_late(), "stalled": watchdog.check_stalled()}
        found += [(seconds, kind) for kind, message in messages.items() if message]
    beats = 5 * (_CONFIRMING_BEATS - 1)
    assert found == [(10 + beats, "late"), (60 + beats, "stalled")]


def test_a_finished_rank_is_named_within_a_few_beats_if_others_wait_for_it() -> None:
    watchdog = Watchdog(NAMES[:3], stall=None)
    for beat in range(6):
        watchdog.update(0, waiting(107, beat))
        watchdog.update(1, loading(106, beat))
        watchdog.update(2, waiting(107, beat))
        assert watchdog.check_finished() is None, "it has not finished"
    watchdog.mark_finished(1)
    messages = [watchdog.check_finished() for _ in range(2 * _CONFIRMING_BEATS)]
    expected = (
        "rank 1 (b) has finished; other ranks are waiting in all_reduce 7 (bucket 2: topk) of step 5's optimizer step: "
        f"{_UNEVEN_ADVICE}"
    )
    assert messages == [None] * (_CONFIRMING_BEATS - 1) + [expected] + [None] * _CONFIRMING_BEATS


def test_an_engine_failure_reports_a_finished_rank_at_once() -> None:
    watchdog = Watchdog(NAMES[:2])
    watchdog.update(0, waiting(107, 0.0))
    watchdog.update(1, loading(106))
    watchdog.mark_raised(0)
    assert watchdog.check_finished() is None, "no rank has finished: the failure has another cause"
    watchdog.mark_finished(1)
    assert "rank 1 (b) has finished; rank 0 is waiting in all_reduce 7" in str(watchdog.check_finished())


def test_a_finished_rank_that_started_all_collectives_is_not_blamed() -> None:
    watchdog = Watchdog(NAMES[:2])
    watchdog.update(0, waiting(107))
    watchdog.update(1, loading(107))
    watchdog.mark_finished(1)
    watchdog.mark_raised(0)
    assert [watchdog.check_finished() for _ in range(2 * _CONFIRMING_BEATS)] == [None] * 2 * _CONFIRMING_BEATS


def test_invalid_reports_are_ignored() -> None:
    watchdog = Watchdog(NAMES)
    for strange in (None, [], [1, 2], "a report", {"step": 1}):
        watchdog.update(1, strange)
    assert watchdog.last_activity(1) == ""
    assert watchdog.slowest() is None


@pytest.mark.parametrize("slow", range(3))
def test_a_straggler_is_reported_once_and_again_after_a_recovery(slow: int) -> None:
    watchdog = Watchdog(NAMES[:3], straggler_factor=2.0)

    def beat(seconds: float) -> str | None:
        for rank in range(3):
            watchdog.update(rank, Report(step=9, compute_seconds=seconds if rank == slow else 0.2))
        return watchdog.check_slow()

    messages = [beat(0.5) for _ in range(3 * _SLOW_BEATS)]
    assert watchdog.slowest() == (slow, pytest.approx(2.5))
    assert [index for index, message in enumerate(messages) if message] == [_SLOW_BEATS - 1]
    assert messages[_SLOW_BEATS - 1] == (
        f"{NAMES[slow]} is slow: excluding waits, its steps take 0.5 s, 2.5 times the median of the other ranks"
    )
    assert beat(0.3) is None
    assert [bool(beat(0.5)) for _ in range(_SLOW_BEATS)] == [False] * (_SLOW_BEATS - 1) + [True]


def test_ranks_agree_on_the_numbers_of_collectives_and_their_buckets() -> None:
    """This includes collectives among groups of ranks, which are started by the same method."""

    def run(comm: Communicator) -> tuple[list[str], Report]:
        model = nn.Linear(40, 40)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            comm=comm,
            compressor={"name": "topk", "min_numel": 1, "hierarchical": True},
        )
        calls, start_call = [], comm.activity.start_call

        def watched(kind: str, account: object) -> Any:
            calls.append(str(call := start_call(kind, account)))
            return call

        comm.activity.start_call = watched  # type: ignore[method-assign]
        for _ in range(2):
            model(torch.ones(3, 40)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return calls, comm.activity.report()

    results = simulate(4, run, local_size=2)
    for calls, report in results:
        # A rank that owns no part of a bucket starts empty collectives of another kind in its place.
        assert [call.partition(" ")[2] for call in calls] == [call.partition(" ")[2] for call in results[0][0]]
        assert calls[: len(calls) // 2] == calls[len(calls) // 2 :], "numbered within the step"
        assert calls[0] == "all_to_all 1 (bucket 0: dense)", "the bias"
        assert calls[1] == "all_to_all 2 (bucket 1: topk)"
        assert any("agreement" in call for call in calls)
        assert (report.step, report.waiting_for, report.num_started) == (3, 0, results[0][1].num_started)
        assert report.compute_seconds > 0


def test_waiting_does_not_count_as_compute_time() -> None:
    def run(comm: Communicator) -> Report:
        activity = comm.activity
        activity.begin_step(1)
        for _ in range(5):
            time.sleep(0.05 if comm.rank == 1 else 0.0)
            comm.all_reduce(torch.ones(1))
            activity.end_step()
        return activity.report()

    quick, slow = simulate(2, run)
    assert slow.compute_seconds >= 0.05
    assert quick.compute_seconds < slow.compute_seconds / 2
    watchdog = Watchdog(NAMES[:2])
    watchdog.update(0, quick)
    watchdog.update(1, slow)
    assert watchdog.slowest() is not None
    assert watchdog.slowest()[0] == 1  # type: ignore[index]


def test_the_activity_shows_where_an_error_occurred() -> None:
    places = {}

    def run(comm: Communicator) -> None:
        comm.activity.begin_step(3, "optimizer step")
        try:
            if comm.rank == 0:
                comm.start(AllReduce(torch.ones(2)), account="bucket 0: dense").wait()
            else:
                comm.start(AllGather(torch.ones(2), same_size=True)).wait()
        finally:
            places[comm.rank] = comm.activity.report().activity

    with pytest.raises(RuntimeError, match="disagree"):
        simulate(2, run)
    assert "step 3's optimizer step, waiting in all_reduce 1 (bucket 0: dense)" in places.values() or (
        "step 3's optimizer step, waiting in all_gather 1" in places.values()
    )


@pytest.mark.parametrize("on_stall", ["end", "warn"])
def test_the_config_reaches_the_guard(monkeypatch: pytest.MonkeyPatch, on_stall: Any) -> None:
    communicator = SimulatedCommunicator(SimulatedWorld(2), 0)
    given: dict[str, Any] = {}
    patiences = []

    def join(environment: Any, device: Any, *, timeout: float, patience: float) -> Communicator:
        patiences.append(patience)
        return communicator

    monkeypatch.setattr(TorchCommunicator, "join", join)
    monkeypatch.setattr(comm, "Guard", lambda _, **options: given.update(options))
    watch = {"silence_seconds": 5, "grace_seconds": 2, "stall_seconds": None, "late_seconds": 7, "straggler_factor": 3}
    comm.init("torch", "cpu", watch=comm.Watch(on_stall=on_stall, **watch))
    assert patiences == [math.inf], "an engine must not give up before the guard"
    assert given == {
        "silence": 5,
        "grace": 2,
        "stall": None,
        "late": 7,
        "straggler_factor": 3,
        "end_on_stall": on_stall == "end",
        "activity": communicator.activity,
    }


def test_activity_before_the_first_step() -> None:
    activity = Activity()
    assert activity.report().activity == ""
    activity.start_call("Broadcast", None)
    assert activity.report().activity == "setup"
    activity.enter("evaluation", 7)
    assert activity.report().activity == "step 7's evaluation"
