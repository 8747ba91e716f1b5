"""Fixtures that several folders of tests use."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's own threads off: what is small is faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that run within the test process set up logging, which the next test should not see."""
    logger = logging.getLogger("disttrain")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = handlers, level
