"""The batch scripts under a real Slurm of two nodes: results, resumption, lost workers, bad input."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.lab.slurm import Cluster, cluster, why_not
from tests.support.workers import BIN, CONFIG, LAUNCHERS, ROOT, run, train_records, worker_environment

reason = why_not()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.timeout(400),
    pytest.mark.skipif(reason is not None, reason=reason or ""),
]

NUM_STEPS = 300
SAVING = (f"max_steps={NUM_STEPS}", "compressor.name=topk", "compressor.ratio=0.1", "num_threads=1")
ENGINES = {"torch": "torch", "mpi": "mpi4py", "horovod": "horovod"}


@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    with cluster() as lab:
        yield lab


class Job:
    """A batch script, submitted from the repository's root as its comment says."""

    def __init__(self, lab: Cluster, directory: Path, engine: str, *overrides: str) -> None:
        if importlib.util.find_spec(ENGINES[engine]) is None:
            pytest.skip(f"{ENGINES[engine]} is not installed")
        if engine != "torch" and not (BIN / "mpirun").exists() and shutil.which("mpirun") is None:
            pytest.skip("mpirun is not installed")
        self.lab, self.directory = lab, directory
        (directory / "config.yaml").write_text(CONFIG)
        # The environment that runs the tests may be another one than the repository's .venv.
        environ = {"CONFIG": str(directory / "config.yaml"), "VIRTUAL_ENV": str(BIN.parent)}
        environ["PYTHONPATH"] = worker_environment()["PYTHONPATH"]
        environ["PATH"] = f"{BIN}:{lab.environ['PATH']}"
        script = [f"--output={directory}/output", f"slurm/{engine}.sbatch", "name=run", f"output={directory}"]
        self.id = lab.sbatch(*script, *overrides, env={**lab.environ, **environ}, cwd=ROOT)

    @property
    def output(self) -> str:
        path = self.directory / "output"
        return path.read_text() if path.exists() else ""

    def records(self) -> list[dict[str, float]]:
        return train_records(self.directory / "run")

    def wait(self, timeout: float = 300) -> str:
        return self.lab.wait(self.id, timeout)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while not any(record["step"] >= step for record in self.records()):
            assert self.lab.job_state(self.id) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.output
            assert time.monotonic() < deadline, f"step {step} was not made\n{self.output}"
            time.sleep(0.2)

    def workers(self) -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.process_iter():
            try:
                command, environ = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if f"output={self.directory}" in command and "train" in command and command[0].endswith("python"):
                found[int(environ.get("OMPI_COMM_WORLD_RANK") or environ["SLURM_PROCID"])] = process
        return found


@pytest.fixture(scope="module")
def model_of_two_workers(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The model of an uninterrupted run on this host; the same for all engines, as they add two numbers identically."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "config.yaml").write_text(CONFIG)
    command = [*LAUNCHERS["torch"][0](2), "-m", "disttrain", "train", directory / "config.yaml", f"output={directory}"]
    done = run([*command, "name=run", *SAVING, f"checkpoint.every_steps={NUM_STEPS}"], timeout=200)
    assert done.returncode == 0, done.stderr
    return load_file(checkpoint_of(directory))


def checkpoint_of(directory: Path) -> Path:
    return directory / f"run/checkpoints/step-{NUM_STEPS:08d}/model.safetensors"


# What --signal=B:USR1@60 does in time, and what a pre-emption with a time of grace begins with. The latter signals the
# tasks of srun, and would end the daemons of mpirun.
TIME_LIMIT, PREEMPTION = ("--signal=USR1", "--batch"), ("--signal=TERM",)


@pytest.mark.parametrize(("engine", "signal"), [("torch", PREEMPTION), ("mpi", TIME_LIMIT), ("horovod", TIME_LIMIT)])
def test_two_nodes_train_to_the_bit_as_one_does_though_the_job_is_told_to_end_and_requeued(
    lab, tmp_path, engine, signal, model_of_two_workers
):
    job = Job(lab, tmp_path, engine, *SAVING, "checkpoint.every_steps=1000000")
    job.wait_for_step(8)
    lab.run("scancel", *signal, job.id)
    lab.wait(job.id, 60, states=("PENDING",))
    assert re.search(r"interrupted after step \d+ by \S+ on rank \d", " ".join(job.output.split())), job.output
    assert job.wait() == "COMPLETED", job.output
    assert "Restarts=1" in lab.run("scontrol", "show", "job", job.id).stdout
    assert not (tmp_path / "run.1").exists()  # the same run went on
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["world_size"]) == (engine, 2)
    assert [record["step"] for record in job.records()] == list(range(1, NUM_STEPS + 1))
    for name, value in load_file(checkpoint_of(tmp_path)).items():
        assert model_of_two_workers[name].equal(value), name


def test_canceled_job_is_not_requeued(lab, tmp_path):
    job = Job(lab, tmp_path, "torch", "max_steps=1000000")
    job.wait_for_step(2)
    workers = job.workers().values()
    lab.run("scancel", job.id)
    assert job.wait() == "CANCELLED"
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert lab.job_state(job.id) == "CANCELLED"


@pytest.mark.parametrize(("engine", "victim"), [("torch", 0), ("mpi", 1)])
def test_killed_worker_ends_the_job_and_is_named(lab, tmp_path, engine, victim):
    job = Job(lab, tmp_path, engine, "max_steps=1000000")
    job.wait_for_step(3)
    workers = job.workers()
    workers[victim].kill()
    assert job.wait(60) == "FAILED"
    message = rf"error: rank {victim} \(host n{victim + 1}, pid {workers[victim].pid}\) was lost"
    assert re.search(message, job.output), job.output
    _, alive = psutil.wait_procs(workers.values(), timeout=20)
    assert alive == []


def test_bad_config_is_one_line_and_fails_the_job(lab, tmp_path):
    job = Job(lab, tmp_path, "torch", "batch_size=63")
    assert job.wait() == "FAILED"
    assert re.fullmatch(r"error: batch_size=63 .*2.*\n", job.output), job.output
    assert "ExitCode=2:0" in lab.run("scontrol", "show", "job", job.id).stdout


DETECT = "import dataclasses, json; from disttrain.comm import detect; print(json.dumps(dataclasses.asdict(detect())))"


def environments(lab: Cluster, *command: str) -> list[dict[str, object]]:
    found = lab.run(*command, sys.executable, "-c", DETECT, cwd=ROOT, timeout=100)
    assert found.returncode == 0, found.stderr
    return sorted((json.loads(line) for line in found.stdout.splitlines()), key=lambda one: one["rank"])


def test_tasks_of_srun_know_their_places(lab):
    tasks = environments(lab, "srun", "--nodes=2", "--ntasks=3")
    assert [(one["launcher"], one["rank"], one["world_size"]) for one in tasks] == [("srun", n, 3) for n in range(3)]
    assert [(one["local_rank"], one["local_size"], one["num_hosts"]) for one in tasks] == [
        (0, 2, 2),
        (1, 2, 2),
        (0, 1, 2),
    ]
    assert {(one["master_addr"], one["master_port"]) for one in tasks} == {("n1", tasks[0]["master_port"])}


def test_plain_python_in_an_allocation_is_one_process(lab):
    assert [(one["launcher"], one["world_size"]) for one in environments(lab, "salloc", "--ntasks=2")] == [("none", 1)]


def test_plain_python_in_a_batch_script_is_one_process(lab, tmp_path):
    wrapped = f"--wrap={sys.executable} -c '{DETECT}'"
    job = lab.sbatch("--nodes=2", "--ntasks=2", f"--output={tmp_path}/output", wrapped, cwd=ROOT)
    assert lab.wait(job, 60) == "COMPLETED"
    assert json.loads((tmp_path / "output").read_text())["world_size"] == 1


def test_srun_with_pmix_starts_the_mpi_engine(lab, tmp_path):
    pytest.importorskip("mpi4py")
    probe = lab.run("srun", "--mpi=pmix", "true")
    if probe.returncode != 0:
        pytest.skip("this Slurm cannot load PMIx (Debian: libpmix-dev)")
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks=2", sys.executable, "-m", "disttrain", "train"]
    done = lab.run(*command, str(tmp_path / "config.yaml"), "name=run", f"output={tmp_path}", cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["world_size"]) == ("mpi", 2)
