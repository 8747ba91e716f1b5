"""The benchmark of the mean's bits, on small gradients. It checks by itself that exchanges give what it computes."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import mean_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_more_bits_are_more_bytes_and_a_smaller_error(monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 4 * 4096
    monkeypatch.setattr(mean_bits, "NUM_ELEMENTS", numel)
    all_gather, *two_stage = mean_bits.measure(mean_bits.Gradients(6), 4, 6)
    signs = numel // 8 + 16 * 4
    assert all_gather["received_bytes"] == 3 * (numel // 8 + 16)
    assert all_gather["step_error"] == all_gather["sum_error"] == 0
    assert two_stage[0]["received_bytes"] == 2 * 3 * signs // 4
    for row in two_stage[1:]:
        scales = 4 * numel // 256 * (2 if row["mean_bits"] == 2 else 1)
        assert row["received_bytes"] == 3 * (signs + numel * row["mean_bits"] // 8 + scales) // 4
    for key in ("step_error", "sum_error"):
        errors = [row[key] for row in two_stage]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] > 0
    text = mean_bits.summarize_result({"rows": [all_gather, *two_stage]})
    assert text.startswith("4 workers, error of a step and of the sum by bits of the mean: as gradients: ")
