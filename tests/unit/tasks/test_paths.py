"""``~`` is the home directory in every path of a user, never a directory of that name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttrain.errors import UserError
from disttrain.tasks import text_files
from disttrain.tasks.paths import expand_home, resolve
from disttrain.training.start_from import load_weights
from tests.unit.cli.test_cli import CONFIG, call
from tests.unit.cli.test_cli import config as _config

config = _config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    return path


def test_the_home_directory_is_expanded(home: Path) -> None:
    assert expand_home("~") == str(home)
    assert expand_home("~/x") == resolve("~/x", "task.path") == str(home / "x")
    for path in ("x", "./~", "a/~/b", "/x~", ""):
        assert expand_home(path) == path
    with pytest.raises(
        UserError, match=r"^'~nosuchuser/x' starts with the home directory of a user who does not exist"
    ):
        expand_home("~nosuchuser/x")


def test_a_run_with_every_path_in_the_home_directory(config: str, home: Path) -> None:
    (home / "digits.yaml").write_text(CONFIG + "output: ~/runs\n")
    assert call("train", "~/digits.yaml") == 0
    assert (home / "runs/run/summary.json").is_file()
    assert call("train", config, "output=~/more", "resume=~/runs/run", "max_steps=4", "epochs=2") == 0
    assert '"steps": 4' in (home / "more/run/summary.json").read_text()
    assert call("train", config, "output=~/more", "name=fine", "start_from.weights=~/runs/run") == 0
    assert call("checkpoints", "~/runs/run") == 0
    assert call("schedule", config, "--output", "~/rates.tsv") == 0
    assert (home / "rates.tsv").is_file()
    assert not Path("~").exists()


def test_data_and_weights_in_the_home_directory(home: Path) -> None:
    (home / "book.txt").write_text("to be or not to be " * 500)
    assert text_files.find("~/*.txt") == [("home/book.txt", home / "book.txt")]
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), home / "weights.pt")
    assert load_weights(model, "~/weights.pt").loaded == ["weight", "bias"]


def test_the_home_of_an_unknown_user_is_refused_in_one_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", config, "output=~nosuchuser/runs") == 2
    assert capsys.readouterr().err.startswith("error: '~nosuchuser/runs' starts with the home directory of a user who")
    assert not Path("~nosuchuser").exists()
