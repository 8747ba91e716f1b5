"""The studies of the convergence benchmark; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy.convergence import COMMON, RECOMMENDED, TASKS, Study, parse_variant
from benchmarks.accuracy.runs import METRIC, load_config
from disttrain.compression import Policy
from disttrain.optim.optimizers.sections import SGD, AdamW
from disttrain.tasks.text import Text


@pytest.mark.parametrize("study", Study)
def test_every_recommended_run_has_a_config(study: Study, tmp_path: Path) -> None:
    assert TASKS[study] in METRIC
    variants = [parse_variant(text) for text in RECOMMENDED[study]]
    assert len({str(variant) for variant in variants}) == len(variants)
    for variant in variants:
        config = load_config(TASKS[study].value, str(tmp_path), [*COMMON[study], *variant["settings"]])
        Policy.build(variant["compressor"])
        is_sgd = study is Study.DIGITS or bool(variant["settings"])
        assert isinstance(config.optimizer, SGD if is_sgd else AdamW)


def test_the_large_text_model_has_three_million_parameters(tmp_path: Path) -> None:
    task = load_config("text", str(tmp_path), COMMON[Study.TEXT_LARGE]).task
    assert isinstance(task, Text)
    assert sum(parameter.numel() for parameter in task.build_model().parameters()) > 3e6
