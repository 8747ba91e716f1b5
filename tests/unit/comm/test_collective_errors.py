from __future__ import annotations

import pytest

from disttrain.comm import Communicator, simulate
from disttrain.comm.collective_errors import CollectiveError, collective_errors
from disttrain.errors import UserError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no data"), r"^no data \(on rank 2, host .+\)$"),
        (FileNotFoundError(2, "No such file", "a.txt"), r"^No such file: a.txt \(on rank 2, host .+\)$"),
        (OSError("disk"), r"^disk \(on rank 2, host .+\)$"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(error: Exception, message: str) -> None:
    def block(comm: Communicator) -> None:
        with collective_errors(comm):
            if comm.rank == 2:
                raise error

    def run(comm: Communicator) -> str:
        with pytest.raises(CollectiveError, match=message) as caught:
            block(comm)
        return str(caught.value)

    assert len(set(simulate(3, run))) == 1


def test_an_error_on_all_ranks_names_no_rank() -> None:
    def run(comm: Communicator) -> None:
        with collective_errors(comm):
            raise UserError("wrong")

    with pytest.raises(CollectiveError, match=r"^wrong$"):
        simulate(2, run)


def test_other_exceptions_pass_through() -> None:
    def run(comm: Communicator) -> None:
        with collective_errors(comm):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulate(2, run)


def test_without_errors_the_block_completes() -> None:
    def run(comm: Communicator) -> int:
        with collective_errors(comm):
            pass
        return comm.rank

    assert simulate(3, run) == [0, 1, 2]
