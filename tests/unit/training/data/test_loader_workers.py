"""Processes that load data and cannot start, die or hang end a run with one line, and are gone with it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from disttrain.comm import SingleProcess
from disttrain.errors import UserError
from disttrain.training.data import loading as data
from tests.support.runs import make_config


class Failing(Dataset[Any]):
    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if get_worker_info() is not None and index == 3:
            match self.how:
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(600)
                case "raises":
                    raise RuntimeError("a bad sample")
        return torch.zeros(1)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_dies_or_hangs_is_one_line(tmp_path: Path, how: str) -> None:
    config = make_config(tmp_path, loader_workers=1, timeout=2.0, evaluation={"batch_size": 2})
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=r"has died, or has sent no batch within timeout=2 s .*loader_workers=0"):
        list(data.eval_batches(config, Failing(how), SingleProcess()))
    for child in set(multiprocessing.active_children()) - before:
        child.join(10)
        assert not child.is_alive()


def test_what_a_dataset_raises_is_shown_as_it_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, loader_workers=1, evaluation={"batch_size": 2})
    with pytest.raises(RuntimeError, match="a bad sample"):
        list(data.eval_batches(config, Failing("raises"), SingleProcess()))


def test_a_folder_of_temporary_files_with_a_long_path_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.check_loader_workers()
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(long))
    with pytest.raises(UserError, match="set TMPDIR to a folder with a short path, such as /tmp, or loader_workers=0"):
        data.check_loader_workers()
