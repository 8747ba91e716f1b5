import os
import stat

import pytest

from disttrain.cli import doctor
from disttrain.collectives import AllGather, AllReduce
from disttrain.comm import simulate
from disttrain.errors import UserError

LAUNCHER_PREFIXES = ("HOROVOD_", "OMPI_", "PMI", "MPI_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def snippets(monkeypatch, horovod, mpi):
    monkeypatch.setattr(doctor, "_HOROVOD", horovod)
    monkeypatch.setattr(doctor, "_MPI", mpi)
    return {finding.name: finding for finding in doctor.examine_engines()}


def test_missing_and_broken_engines_come_with_the_command_that_installs_them(monkeypatch):
    found = snippets(monkeypatch, "import no_such_package", "raise ImportError('libmpi.so: cannot open')")
    assert found["horovod"] == doctor.Finding("horovod", "missing", "", "launch/install-horovod.sh")
    assert found["mpi"].state == "broken"
    assert found["mpi"].note.startswith("ImportError: libmpi.so: cannot open; ")
    assert "pip install 'disttrain[mpi]'" in found["mpi"].note
    assert found["torch"].state == "ready"
    assert "gloo" in found["torch"].note


def test_where_compiled_loops_are_kept(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (found,) = doctor.examine_kernels()
    assert (found.name, found.state) == ("numba", "ready")
    assert found.note.startswith(f"compiled loops are kept in {tmp_path}")


def test_engine_that_crashes_or_hangs_on_import_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_IMPORT_SECONDS", 1.0)
    found = snippets(monkeypatch, "import os; os.abort()", "import time; time.sleep(60)")
    assert (found["horovod"].state, found["mpi"].state) == ("broken", "broken")
    assert "exit code -6" in found["horovod"].note
    assert "over 1 s" in found["mpi"].note


def test_ready_engine_tells_its_version(monkeypatch):
    ready = "print('noise'); print('[\"1.2\", \"built with Gloo\"]')"
    assert snippets(monkeypatch, ready, ready)["horovod"] == doctor.Finding(
        "horovod", "ready", "1.2", "built with Gloo"
    )


def test_launchers_are_looked_up_and_asked_for_their_version(monkeypatch, tmp_path):
    for name, script in {
        "mpirun": "echo 'mpirun (Open MPI) 9.8.7'",
        "srun": "echo 'fatal: no cluster' >&2; exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {finding.name: (finding.state, finding.version, finding.note) for finding in doctor.examine_launchers()} == {
        "torchrun": ("missing", "", "comes with torch"),
        "horovodrun": ("missing", "", "launch/install-horovod.sh"),
        "mpirun": ("ready", "9.8.7", str(tmp_path / "mpirun")),
        "srun": ("broken", "", f"{tmp_path / 'srun'}: fatal: no cluster"),
    }


@pytest.fixture
def engines_at_hand(monkeypatch):
    monkeypatch.setattr(doctor, "examine_engines", lambda: [doctor.Finding("horovod", "missing", "", "install [it]")])


@pytest.mark.usefixtures("engines_at_hand")
def test_report_shows_machine_interfaces_and_launcher(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    assert doctor.run(probe=False) == 0
    report = capsys.readouterr().out
    for text in ("127.0.0.1", "cores", "torchrun", "0 of 4", "0 of 2", "node-a:29500", "install [it]"):
        assert text in report


@pytest.mark.usefixtures("engines_at_hand")
def test_only_rank_0_reports(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert doctor.run(probe=False) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("engines_at_hand")
def test_probe_of_one_process_says_how_to_start_more(capsys):
    assert doctor.run(probe=True) == 0
    assert "torchrun --standalone --nproc-per-node 2 -m disttrain doctor --probe" in capsys.readouterr().out


def test_inconsistent_launcher_is_the_users_error(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK=3 must be below WORLD_SIZE=2"):
        doctor.run(probe=False)


@pytest.mark.parametrize("collective", [AllReduce, AllGather])
def test_all_ranks_report_the_time_of_the_slowest(collective):
    times = simulate(3, lambda comm: doctor.seconds(comm, collective, 10))
    assert times[0] > 0
    assert times == [times[0]] * 3
