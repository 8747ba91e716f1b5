"""Values of command-line options."""

from __future__ import annotations

import json

import pytest
import typer

from benchmarks.common.options import parse_compressor, parse_environment, parse_rate


@pytest.mark.parametrize(("text", "expected"), [("1gbit", 1000.0), ("2.5gbit", 2500.0), ("100mbit", 100.0)])
def test_rates_are_mbit_per_second(text: str, expected: float) -> None:
    assert parse_rate(text) == expected


def test_none_leaves_links_unshaped() -> None:
    assert parse_rate("none") is None


@pytest.mark.parametrize("text", ["fast", "gbit", "0mbit", "-1gbit", "10"])
def test_invalid_rates_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="invalid rate"):
        parse_rate(text)


def test_compressors_become_the_mapping_of_a_config() -> None:
    assert parse_compressor("dense") == {"name": "dense"}
    assert parse_compressor("topk:ratio=0.01,mode=x") == {"name": "topk", "ratio": 0.01, "mode": "x"}
    rules = [{"match": "*.bias", "use": "dense"}, {"use": "bf16"}]
    text = f"efsign:whiten={json.dumps({'band': 8, 'bound': 16})},rules={json.dumps(rules)},dense_steps=3"
    nested = {"whiten": {"band": 8, "bound": 16}, "rules": rules, "dense_steps": 3}
    assert parse_compressor(text) == {"name": "efsign", **nested}
    with pytest.raises(typer.BadParameter, match="expected field=value"):
        parse_compressor("topk:ratio")


def test_environment_variables_become_pairs() -> None:
    assert parse_environment(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(typer.BadParameter, match="expected NAME=VALUE"):
        parse_environment(["A"])
