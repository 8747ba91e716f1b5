from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.comm import simulate
from disttrain.training.run import launches
from tests.support.runs import make_config, stop_run, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("environ", [{"TORCHELASTIC_RUN_ID": "none"}, {"HOROVOD_ELASTIC": "1"}])
def test_a_launch_is_known_by_its_launcher_where_that_starts_workers_again(environ: dict[str, str]) -> None:
    found = launches.launch_id(environ)
    assert found is not None
    assert found == launches.launch_id(environ)
    assert launches.launch_id({}) is None


@pytest.mark.parametrize("step", [0, 5])
def test_restarted_workers_resume_regardless_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first checkpoint and after it; in the second launch an agent has joined the first's."""
    whole = simulate(2, lambda comm: train(make_config(tmp_path / "whole"), comm))
    config = make_config(tmp_path, checkpoint={"every_steps": 2})
    monkeypatch.setattr(launches, "launch_id", lambda: "a")
    stop_run(config, 2, step)
    agents = iter(["b", "a"])
    monkeypatch.setattr(launches, "launch_id", lambda: next(agents))
    for (summary, weights), (expected, expected_weights) in zip(
        simulate(2, lambda comm: train(config, comm)), whole, strict=True
    ):
        assert summary["metrics"] == expected["metrics"]
        assert all(weights[name].equal(value) for name, value in expected_weights.items())
    assert (config.directory / ".launch").read_text() == "a\nb\n"
    assert not config.directory.with_name("test.1").exists()


def test_another_launch_starts_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 2})
    for name in ("a", "b"):
        monkeypatch.setattr(launches, "launch_id", lambda name=name: name)
        stop_run(config, 2, 5)
    assert config.directory.with_name("test.1").exists()
