from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from disttrain import cli
from disttrain.errors import USER_ERROR_EXIT_CODE
from tests.support import odd_tasks, tiny_task  # noqa: F401 - code that is imported already is not announced
from tests.support.workers import ROOT, worker_environment

CONFIG = """
task: {name: tests.support.tiny_task:Tiny}
batch_size: 24
epochs: 1
optimizer: {name: sgd, lr: 0.1}
schedule: {name: cosine}
compressor: {name: powersgd, rank: 2}
"""


class Exit(BaseException):
    """What ``os._exit`` is in these tests."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config's path relative to the current directory, which is its own."""

    def leave(code: int) -> NoReturn:
        raise Exit(code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "_exit", leave)
    (tmp_path / "digits.yaml").write_text(CONFIG)
    return "digits.yaml"


def call(*arguments: str) -> int:
    """The command line's exit code."""
    argv, sys.argv = sys.argv, ["disttrain", *arguments]
    try:
        cli.main()
    except Exit as ended:
        return int(ended.args[0])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv


# Overrides (or another file), and what the one line has to say.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "misspelt section": (["optimzer.lr=0.1"], "unknown key 'optimzer.lr' (given 0.1); did you mean 'optimizer.lr'?"),
    "misspelt key": (["optimizer.momntum=0.9"], "'optimizer.momntum' (given 0.9); did you mean 'optimizer.momentum'?"),
    "misspelt top key": (["epoch=3"], "unknown key 'epoch' (given 3); did you mean 'epochs'?"),
    "key without its section": (["lr=0.1"], "unknown key 'lr' (given 0.1); did you mean 'optimizer.lr'?"),
    "misspelt nested key": (["checkpoint.kep=1"], "'checkpoint.kep' (given 1); did you mean 'checkpoint.keep'?"),
    "key of another compressor": (["compressor.ratio=0.1"], "unknown key 'compressor.ratio' (given 0.1)"),
    "key of another optimizer": (["optimizer.betas=[0.9,0.99]"], "unknown key 'optimizer.betas'"),
    "key of the task": (["task.num_sample=3"], "did you mean 'task.num_samples'?"),
    "two mistakes": (["batch_size=-1", "epoch=3"], "did you mean 'epochs'?"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr='fast' should be a valid number"),
    "fraction": (["epochs=1.5"], "epochs=1.5 should be a valid integer"),
    "truth value": (["batch_size=true"], "batch_size=True should be a number"),
    "not a number": (["optimizer.lr=.nan"], "optimizer.lr=nan should be a finite number"),
    "negative": (["optimizer.lr=-0.1"], "optimizer.lr=-0.1 should be greater than 0"),
    "zero": (["batch_size=0"], "batch_size=0 should be greater than or equal to 1"),
    "null": (["batch_size=null"], "batch_size=None should be a valid integer"),
    "out of bounds": (
        ["compressor.name=topk", "compressor.ratio=2.0"],
        "compressor.ratio=2.0 should be less than or eq",
    ),
    "unknown compressor": (["compressor.name=topkk"], "unknown compressor 'topkk'; did you mean 'topk'?"),
    "unknown compressor, far off": (["compressor=zip"], "unknown compressor 'zip'; choose from bf16, blockwise4"),
    "ratio of nothing": (["compressor.name=topk", "compressor.ratio=0"], "compressor.ratio=0 should be greater than 0"),
    "too many bits": (
        ["compressor.name=qsgd", "compressor.bits=9"],
        "compressor.bits=9 should be less than or equal to",
    ),
    "negative warmup": (["compressor.dense_steps=-1"], "compressor.dense_steps=-1 should be greater than or equal to"),
    "misspelled warmup": (["compressor.dense_step=1"], "(given 1); did you mean 'compressor.dense_steps'?"),
    "ramp of another compressor": (["compressor.ratio_ramp.start=1"], "unknown key 'compressor.ratio_ramp'; did you"),
    "ramp without its steps": (["compressor.rank_ramp.start=1"], "missing key 'compressor.rank_ramp.steps': committed"),
    "key of a section, for the policy": (["min_numel=3"], "did you mean 'compressor.min_numel'?"),
    "rules that are no list": (
        ["compressor.rules=3"],
        "compressor.rules=3 should be a list of rules, such as [{match:",
    ),
    "rule that is no section": (["compressor.rules=[topk]"], "compressor.rules.0='topk' should be a section with keys"),
    "misspelt key in a rule": (
        ["compressor.rules=[{mach: '0.*', use: dense}]"],
        "unknown key 'compressor.rules.0.mach' (given '0.*'); did you mean 'compressor.rules.0.match'?",
    ),
    "unknown compressor in a rule": (
        ["compressor.rules=[{match: '0.*', use: topkk}]"],
        "unknown compressor 'topkk'; did you mean 'topk'?",
    ),
    "out of bounds in a rule": (
        ["compressor.rules=[{match: '0.*', use: {name: topk, ratio: 0}}]"],
        "compressor.rules.0.use.ratio=0 should be greater than 0",
    ),
    "unknown optimizer": (["optimizer.name=admw"], "unknown optimizer 'admw'; did you mean 'adamw'?"),
    "unknown schedule": (["schedule.name=cosin"], "unknown schedule 'cosin'; did you mean 'cosine'?"),
    "unknown engine": (["engine=horovd"], "unknown engine 'horovd'; did you mean 'horovod'?"),
    "unknown dtype": (["dtype=float16"], "unknown dtype 'float16'; did you mean 'float"),
    "unknown task": (["task.name=digit"], "unknown task 'digit'; did you mean 'digits'?"),
    "task's module is not there": (["task.name=nowhere.mine:Mine"], "no module 'nowhere' in"),
    "task's class is not there": (["task.name=tests.support.tiny_task:Tini"], "has no 'Tini'; its tasks are: Tiny"),
    "task is no task": (["task.name=json:JSONDecoder"], "JSONDecoder must be a subclass of disttrain.tasks.Task"),
    "task without a colon": (["task.name=a.b.C"], "'a.b.C' must have a colon before the class: 'a.b:C'"),
    "required key": (["optimizer.name=adamw"], "missing key 'optimizer.lr': learning rate"),
    "no end": (["epochs=null"], "set epochs, max_steps or both"),
    "warmup longer than the run": (
        ["schedule.warmup_steps=9", "max_steps=5"],
        "less than the run's 5 steps: lower it",
    ),
    "two warmups": (["schedule.warmup_steps=1", "schedule.warmup_epochs=1"], "clash: set one of them"),
    "one cycle and a warmup": (
        ["schedule.name=one_cycle", "schedule.warmup_steps=1"],
        "schedule.name='one_cycle' cannot have a warmup, since",
    ),
    "milestones out of order": (
        ["schedule.name=multi_step", "schedule.milestones=[5,2]"],
        "schedule.milestones=[5, 2] must be increasing and at least 1: use [2, 5]",
    ),
    "milestone after the end": (
        ["schedule.name=multi_step", "schedule.milestones=[2,9]", "max_steps=5"],
        "schedule.milestones=[2, 9]: step 9 is never reached, the run has 5 steps",
    ),
    "milestone in the warmup": (
        ["schedule.name=multi_step", "schedule.milestones=[2]", "schedule.warmup_steps=3", "max_steps=5"],
        "schedule.milestones=[2] start within the warmup of 3 steps",
    ),
    "parts that are no list": (["schedule.name=sequence", "schedule.parts=3"], "schedule.parts=3 should be a list of"),
    "parts without a length": (
        ["schedule.name=sequence", "schedule.parts=[constant,cosine]"],
        "missing key 'schedule.parts.0.steps': all parts but the last",
    ),
    "parts longer than the run": (
        ["schedule.name=sequence", "schedule.parts=[{name: constant, steps: 9}, cosine]", "max_steps=5"],
        "schedule.parts last 9 steps without the last one, but the run has 5",
    ),
    "parts shorter than the run": (
        ["schedule.name=sequence", "schedule.parts=[{name: constant, steps: 3}]", "max_steps=5"],
        "schedule.parts last 3 steps, but the run has 5: change their lengths",
    ),
    "warmup longer than its part": (
        ["schedule.name=sequence", "schedule.parts=[{name: cosine, steps: 2, warmup_steps: 2}, cosine]", "max_steps=5"],
        "schedule.parts.0.warmup_steps=2 must be less than the part's 2 steps",
    ),
    "warmup of a sequence": (
        ["schedule.name=sequence", "schedule.parts=[cosine]", "schedule.warmup_steps=2"],
        "schedule.warmup_steps belongs to the parts of a sequence: set schedule.parts.0.warmup_steps",
    ),
    "plateau in a sequence": (
        ["schedule.name=sequence", "schedule.parts=[reduce_on_plateau]"],
        "schedule.parts.0.name='reduce_on_plateau' cannot be part of a sequence",
    ),
    "plateau of what is never measured": (
        ["schedule.name=reduce_on_plateau", "schedule.metric=error", "evaluation.every_epochs=null"],
        "schedule.metric='error' needs evaluations: set evaluation.every_epochs",
    ),
    "base batch size without scaling": (
        ["optimizer.base_batch_size=32"],
        "optimizer.base_batch_size=32 and optimizer.lr_scaling='none': set both",
    ),
    "scaling without a base": (
        ["optimizer.lr_scaling=linear"],
        "=None and optimizer.lr_scaling='linear'",
    ),
    "norm bounds that fall": (
        ["optimizer.name=lamb", "optimizer.lr=0.1", "optimizer.norm_bounds=[3,1]"],
        "optimizer.norm_bounds=[3.0, 1.0] must be increasing and at least 0",
    ),
    "rules of layers that are no list": (["layers.rules=3"], "layers.rules=3 should be a list of rules, such as"),
    "rule of layers that says nothing": (["layers.rules=[{match: '0.*'}]"], "layers.rules ('0.*') sets nothing: add"),
    "rule of layers that clashes": (
        ["layers.rules=[{match: '0.*', freeze: true, lr_factor: 2}]"],
        "layers.rules ('0.*') has freeze and lr_factor, which clash",
    ),
    "misspelt key in a rule of layers": (
        ["layers.rules=[{match: '0.*', frieze: true}]"],
        "unknown key 'layers.rules.0.frieze' (given True); did you mean 'layers.rules.0.freeze'?",
    ),
    "trust ratio of sgd": (["layers.rules=[{match: '0.*', adapt: true}]"], "sets adapt, which is for trust ratios"),
    "decay above 1": (["layers.decay=1.1"], "layers.decay=1.1 should be less than or equal to 1"),
    "order without decay": (
        ["layers.order=['*']"],
        "layers.order=['*'] has no effect without layers.decay: set that below 1",
    ),
    "accumulation does not divide": (
        ["accumulation=7"],
        "batch_size=24 does not divide evenly among 1 worker x accumu",
    ),
    "needs another": (["optimizer.nesterov=true"], "optimizer.nesterov=true needs momentum"),
    "malformed override": (["foo"], "override 'foo' should be key=value"),
    "override without a key": (["=3"], "override '=3' should be key=value"),
    "override with a bad key": (["optimizer..lr=3"], "override 'optimizer..lr=3' should be key=value"),
    "override that is no YAML": (["seed={"], "overrides 'seed={'"),
    "below a value": (["optimizer.lr.x=1"], "optimizer.lr={'x': 1} should be a valid number"),
    "value for a section": (["evaluation=3"], "evaluation=3 should be a section with keys every_epochs, every_steps"),
    "section for a name": (["optimizer=[1]"], "optimizer=[1] should be a name or a section with a name: adadelta"),
    "unset interpolation": (["seed=${foo}"], "Interpolation key 'foo' not found"),
    "name with a slash": (["name=../x"], "name='../x' should be the name of a folder"),
    "missing file": (["digit.yaml"], "config 'digit.yaml' does not exist; did you mean 'digits.yaml'?"),
    "missing folder": (["config/digits.yaml"], "does not exist; did you mean 'digits.yaml'?"),
    "a folder": (["."], "config '.' is a folder"),
    "not YAML": (["bad.yaml"], "config 'bad.yaml' is not valid YAML"),
    "not a mapping": (["list.yaml"], "config 'list.yaml' should be a mapping"),
    "not text": (["binary.yaml"], "config 'binary.yaml' cannot be read"),
}
# What shows only when training starts.
LATE_MISTAKES: dict[str, tuple[list[str], str]] = {
    "engine not installed": (
        ["engine=mpi"],
        "engine 'mpi' needs the package mpi4py, which is not installed: run pip ins",
    ),
    "no such checkpoint": (["resume=runs/other"], "resume='runs/other': there is no complete checkpoint"),
    "warmup longer than the epochs": (["schedule.warmup_steps=9"], "must be less than the run's 3 steps"),
    "metric that is not there": (
        ["schedule.name=reduce_on_plateau", "schedule.metric=eror"],
        "schedule.metric='eror' is not a metric of the task; did you mean 'error'?",
    ),
    "warmup longer than the epochs, in epochs": (
        ["schedule.warmup_epochs=1"],
        "schedule.warmup_epochs=1 is 3 steps and must be less than the run's 3 steps",
    ),
    "milestone after the last epoch": (
        ["schedule.name=multi_step", "schedule.milestones=[1]", "schedule.by=epoch"],
        "schedule.milestones=[1]: epoch 1 is never reached, the run has 1 epochs",
    ),
    "rule of layers that matches nothing": (
        ["layers.rules=[{match: 'fc.*', freeze: true}]"],
        "layers.rules.0 ('fc.*') matches no parameter; the nearest name is '",
    ),
    "rule of layers that never decides": (
        ["layers.rules=[{lr_factor: 2}, {match: '0.*', freeze: true}]"],
        "layers.rules.1 ('0.*') has no effect: earlier patterns match all of its parameters",
    ),
    "everything frozen": (
        ["layers.rules=[{freeze: true}]"],
        "layers.rules freeze every parameter: at step 0 there is nothing to train",
    ),
    "order that leaves one out": (
        ["layers.decay=0.5", "layers.order=['0.*']"],
        "layers.order has no layer for '3.weight': add a pattern that matches it",
    ),
    "rule that matches nothing": (
        ["compressor.rules=[{match: 'fc.*', use: dense}]"],
        "compressor.rules.0 ('fc.*') matches no trained parameter; the nearest name is '",
    ),
    "rank above all matrices": (
        ["compressor.rank=7", "compressor.min_numel=1"],
        "rank=7 exceeds the rows or columns of every matrix (at most 6)",
    ),
    "no data": (["task.num_samples=0"], "TensorData is empty"),
    "held-out data without a sample": (
        ["task.name=tests.support.odd_tasks:NothingHeldOut"],
        "held-out data: TensorData is empty: the task's data has no samples; to evaluate nothing, let eval_data return",
    ),
    "lazy modules": (
        ["task.name=tests.support.odd_tasks:Lazy"],
        "Lazy.build_model: '0.weight' is of a lazy module and has no shape yet: run one forward pass on a batch before",
    ),
    "output cannot be written": (["output=digits.yaml"], "write to the run's directory 'digits.yaml/run': Not a"),
}


def check_one_line(capsys: pytest.CaptureFixture[str], code: int, message: str) -> None:
    captured = capsys.readouterr()
    assert code == USER_ERROR_EXIT_CODE
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]*\n", captured.err), captured.err
    assert message in captured.err


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["config", "train"])
def test_a_mistake_is_one_clear_line(
    config: str, capsys: pytest.CaptureFixture[str], command: str, mistake: str
) -> None:
    arguments, message = MISTAKES[mistake]
    Path("bad.yaml").write_text("a: {b\nc: ]")
    Path("list.yaml").write_text("[1, 2]")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    if not arguments[0].endswith(".yaml") and arguments[0] != ".":
        arguments = [config, *arguments]
    check_one_line(capsys, call(command, *arguments), message)


@pytest.mark.parametrize("mistake", LATE_MISTAKES)
def test_a_mistake_that_shows_late_is_one_line_too(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr("disttrain.comm.engines.Engine.is_installed", property(lambda row: row.package != "mpi4py"))
    arguments, message = LATE_MISTAKES[mistake]
    check_one_line(capsys, call("train", config, *arguments), message)


def test_a_world_size_that_does_not_divide(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = "batch_size=24 does not divide evenly among 7 workers: use batch_size=21 or 28"
    check_one_line(capsys, call("config", config, "--workers", "7"), message)


def test_only_one_of_the_ranks_prints_it(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert call("train", config, "epoch=1") == USER_ERROR_EXIT_CODE
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first on another host, whose files may differ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert call("train", config, "epoch=1") == USER_ERROR_EXIT_CODE
    assert "did you mean 'epochs'" in capsys.readouterr().err


def test_debug_shows_the_traceback(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", config, "--debug", "epoch=1") == USER_ERROR_EXIT_CODE
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_its_own_numbers_end_is_one_line_and_a_code_of_its_own(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call("train", config, "task.bad_step=1", "health.max_skipped=1", "max_steps=3")
    assert code == 14
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error")] == errors[-1:]
    assert "step 2 is the last of 1 consecutive steps with a non-finite gradient, on rank 0" in errors[-1]


def test_a_defect_keeps_its_traceback(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*args: object) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr("disttrain.training.config.load", defect)
    assert call("train", config) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_config_prints_what_it_would_read_again(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", config, "compressor.name=topk", "optimizer.lr=1e-5") == 0
    first = capsys.readouterr().out
    assert "ratio: 0.01" in first
    assert "rank: 2" not in first, "keys of the file's own compressor went with it"
    Path("again.yaml").write_text(first)
    assert call("config", "again.yaml") == 0
    assert capsys.readouterr().out == first


def test_train_shows_a_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", config) == 0
    out = capsys.readouterr().out
    for words in ("held-out error", "samples/s", "bytes sent", "bytes if dense fp32"):
        assert words in out
    assert (Path("runs/run/summary.json")).exists()


def run_real(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disttrain", *arguments]
    return subprocess.run(command, cwd=cwd, env=worker_environment(), capture_output=True, text=True, timeout=100)


def test_the_real_program(tmp_path: Path) -> None:
    shown = run_real("--version", cwd=tmp_path)
    assert re.fullmatch(r"disttrain \d+\.\d+\.\d+\n", shown.stdout), shown
    wrong = run_real("train", str(ROOT / "configs/digits.yaml"), "optimzer.lr=0.1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown key 'optimzer.lr' (given 0.1); did you mean 'optimizer.lr'?\n"


def test_a_users_task_is_found_in_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tests.support.tiny_task import Tiny\n\nclass Mine(Tiny):\n    pass\n")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("tests.support.tiny_task:Tiny", "mine:Mine"))
    program = "import sys; sys.path = [p for p in sys.path if p]; from disttrain.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", program, "train", "config.yaml"],
        cwd=tmp_path,
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    announced = f"INFO: task.name=mine:Mine runs code of {tmp_path}/mine.py"  # the terminal may wrap it
    assert "".join(done.stdout.split()).startswith(announced.replace(" ", "")), done.stdout
