"""Seconds composed of curves and step times, targets and the table; no worker is started."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from benchmarks.time_to_loss.composition import (
    BASELINE,
    COMPRESSED,
    DENSE,
    OWN_DENSE,
    REFRESH,
    SHORT_WARMUP,
    Variant,
    compressed_by,
    find_kinds,
    first_step_at,
    forms_of,
    seconds_at,
    seconds_by_turn,
)
from benchmarks.time_to_loss.curves import CurveStore, decode_runs, encode_runs, simulate_run
from benchmarks.time_to_loss.recipe import Recipe
from benchmarks.time_to_loss.rows import compose_runs, describe_real_runs, make_rows, summarize_result, tabulate
from disttrain.compression import Policy

SIGN = Variant.of("disttrain", {"name": "efsign", "dense_steps": 2})
LOW_RANK = Variant.of("ddp", {"name": "powersgd", "start": 3})


def test_kinds_follow_from_what_was_sent() -> None:
    fractions = [1.0, 1.0, 0.0, 0.1, 1.0, 0.0]
    assert find_kinds(SIGN, fractions) == [DENSE, DENSE, COMPRESSED, COMPRESSED, REFRESH, COMPRESSED]
    assert find_kinds(OWN_DENSE, [1.0, 1.0]) == [DENSE, DENSE]


def test_compressors_of_rules_compress_too() -> None:
    rules = [{"match": "*.bias", "use": "dense"}, {"match": "a.*", "use": {"name": "topk", "ratio": 0.1}}]
    assert compressed_by({"name": "efsign", "rules": [*rules, {"use": "bf16"}]}) == {"efsign", "topk", "bf16"}
    assert compressed_by(OWN_DENSE.setting) == set()


def test_kinds_of_ddp_follow_from_its_hook() -> None:
    unknown = [None] * 4
    assert find_kinds(BASELINE, unknown) == [DENSE] * 4
    assert find_kinds(LOW_RANK, unknown) == [DENSE] * 3 + [COMPRESSED]
    assert find_kinds(Variant.of("ddp", {"name": "fp16"}), unknown) == [COMPRESSED] * 4


def test_a_variant_that_starts_dense_is_timed_in_two_forms() -> None:
    always, soon = forms_of(Variant.of("disttrain", {"name": "efsign", "dense_steps": 150}))
    assert always.setting["dense_steps"] > 1e6
    assert soon.setting["dense_steps"] < 10
    assert [form.setting["start"] > 1e6 for form in forms_of(LOW_RANK)] == [True, False]
    assert forms_of(BASELINE) == [BASELINE]
    always, soon = forms_of(Variant.of("disttrain", {"name": "efsign", "whiten": {"band": 8.0}}))
    assert always.setting["dense_steps"] > 1e6
    assert soon.setting["whiten"] == {"band": 8.0, "warmup_steps": SHORT_WARMUP, "refresh_growth": 0.5}
    assert soon.setting["dense_steps"] == 0
    for form in (always, soon):
        Policy.build(form.setting)


def test_the_target_is_reached_between_two_evaluations() -> None:
    evaluations = [[0, 8.0], [10, 4.0], [20, 2.0], [30, 3.0]]
    assert first_step_at(evaluations, 3.0) == 15
    assert first_step_at(evaluations, 8.0) == 0
    assert first_step_at(evaluations, 1.9) is None
    assert first_step_at([[0, 8.0], [10, None], [20, 2.0]], 3.0) == 20
    assert first_step_at([[0, 0.0, 8.0], [10, 5.0, 2.0]], 5.0) == 5


def test_seconds_are_those_of_the_kinds() -> None:
    kinds = [DENSE, DENSE, COMPRESSED, REFRESH]
    assert seconds_at(kinds, {DENSE: 4.0, COMPRESSED: 1.0, REFRESH: 10.0}, 4) == 19
    assert seconds_at(kinds, {DENSE: 4.0, COMPRESSED: 1.0, REFRESH: 10.0}, 1.5) == 6


def test_kinds_that_were_not_timed_take_the_time_of_dense_steps() -> None:
    dense = [{DENSE: 7.0}] * 2
    times = {COMPRESSED: [[1.0, 1.0, 5.0], []]}
    filled = {COMPRESSED: 1.0, DENSE: 7.0, REFRESH: 7.0}
    assert seconds_by_turn(times, [DENSE, COMPRESSED, REFRESH], dense) == [filled] * 2
    own = {DENSE: [[3.0], [4.0]], COMPRESSED: [[1.0], [2.0]]}
    assert seconds_by_turn(own, [DENSE, REFRESH], dense) == [
        {DENSE: 3.0, COMPRESSED: 1.0, REFRESH: 3.0},
        {DENSE: 4.0, COMPRESSED: 2.0, REFRESH: 4.0},
    ]


def test_runs_of_equal_values_are_decoded_as_they_were() -> None:
    for values in ([], [5, 5, 1, None, None, 5]):
        assert decode_runs(encode_runs(values)) == values


RECIPE = Recipe(None, 8, 1, 8, 4, steps=4, lr=0.01, warmup_steps=2)


def write_curves(path: Path, sign_loss: float) -> None:
    def curve(variant: Variant, sent: list[int], losses: list[float]) -> dict[str, Any]:
        return {
            "who": variant.who, "setting": variant.setting, "seed": 0, "sent_bytes": encode_runs(sent),
            "dense_fractions": encode_runs([float(number == 1000) for number in sent]),
            "evaluations": [[step, loss] for step, loss in zip((0, 2, 4), losses, strict=True)],
        }  # fmt: skip

    curves = [
        curve(OWN_DENSE, [1000] * 4, [8.0, 4.0, 3.0]),
        curve(SIGN, [1000, 1000, 30, 30], [8.0, 4.0, sign_loss]),
    ]
    header = {"recipe": {**vars(RECIPE)}, "workers": 2, "evaluate_every": 2}
    path.write_text(json.dumps({**header, "curves": curves}))


def compose(path: Path, sign_loss: float) -> list[dict[str, Any]]:
    write_curves(path, sign_loss)
    store = CurveStore(path, RECIPE, workers=2, evaluate_every=2)
    timed = [
        {DENSE: [[10.0], [20.0]]},
        {DENSE: [[10.0], [20.0]]},
        {DENSE: [[10.0], [20.0]], COMPRESSED: [[1.0], [2.0]]},
    ]
    runs = compose_runs("1gbit", [BASELINE, OWN_DENSE, SIGN], 1, store, timed, tolerance=0.5)
    return make_rows(runs)


def test_composed_seconds_come_from_the_curve_and_the_times(tmp_path: Path) -> None:
    baseline, dense, sign = compose(tmp_path / "curves.json", sign_loss=3.0)
    # The target, 3.5, is reached at step 3: three dense steps, or two dense and one compressed.
    assert (baseline["steps"], baseline["seconds"], baseline["ratio"]) == (3, 45, 1)
    assert (dense["seconds"], dense["ratio"], dense["sent_bytes"]) == (45, 1, 3000)
    assert (sign["seconds"], sign["ratio"], sign["sent_bytes"]) == (31.5, 0.7, 2030)
    assert (sign["ratio_low"], sign["ratio_high"]) == (0.7, 0.7)


def test_variants_with_the_same_arithmetic_share_a_curve(tmp_path: Path) -> None:
    write_curves(tmp_path / "curves.json", 3.0)
    store = CurveStore(tmp_path / "curves.json", RECIPE, workers=2, evaluate_every=2)
    cast = Variant.of("ddp", {"name": "fp16"})
    sign = Variant.of("disttrain", {**SIGN.setting, "overlap_step": True})
    timed = [
        {DENSE: [[10.0], [20.0]]},
        {DENSE: [[10.0], [20.0]]},
        {COMPRESSED: [[4.0], [6.0]]},
        {DENSE: [[10.0], [20.0]], COMPRESSED: [[1.0], [2.0]]},
    ]
    runs = compose_runs("1gbit", [BASELINE, OWN_DENSE, cast, sign], 1, store, timed, tolerance=0.5)
    assert [row["seconds"] for row in make_rows(runs)] == [45, 45, 15, 31.5]


def test_a_setting_that_never_reaches_the_target_says_so(tmp_path: Path) -> None:
    rows = compose(tmp_path / "curves.json", sign_loss=3.6)
    assert rows[2]["ratio"] is None
    result = {"rows": rows, "recipe": vars(RECIPE), "workers": 2, "tolerance": 0.5}
    out = io.StringIO()
    Console(file=out, width=160).print(tabulate(rows, result))
    assert out.getvalue().count("not reached") == 1
    assert summarize_result(result) == (
        "1gbit links, composed: 1.000 (dense) of DDP's seconds; not reached: efsign, dense_steps=2"
    )


def test_real_runs_are_compared_by_their_own_seconds() -> None:
    unknown = [None] * 10
    theirs = {"evaluations": [[0, 0.0, 8.0], [10, 20.0, 2.0]], "sent_bytes": unknown, "dense_fractions": unknown}
    ours = {"evaluations": [[0, 0.0, 8.0], [10, 5.0, 1.0]], "sent_bytes": [1000] * 10, "dense_fractions": [1.0] * 10}
    baseline, dense = make_rows(describe_real_runs("none", [BASELINE, OWN_DENSE], 0, [theirs, ours], tolerance=0.0))
    assert (baseline["seconds"], baseline["ratio"], baseline["sent_bytes"]) == (20, 1, None)
    assert dense["seconds"] == pytest.approx(5 * 6 / 7)
    assert dense["steps"] == pytest.approx(10 * 6 / 7)
    assert dense["ratio"] == pytest.approx(0.2143, abs=1e-4)


def test_a_run_that_diverges_is_not_reached_unless_it_is_the_dense_one() -> None:
    unknown = [None] * 10
    dense = {"evaluations": [[0, 0.0, 8.0], [10, 20.0, 2.0]], "sent_bytes": unknown, "dense_fractions": unknown}
    lost = {"evaluations": [[0, 0.0, 8.0], [10, 20.0, None]], "sent_bytes": unknown, "dense_fractions": unknown}
    variants = [BASELINE, LOW_RANK]
    rows = make_rows(describe_real_runs("none", variants, 0, [dense, lost], tolerance=0.0))
    assert [row["reached"] for row in rows] == [1, 0]
    out = io.StringIO()
    Console(file=out, width=160).print(tabulate(rows, {"recipe": vars(RECIPE), "workers": 2, "tolerance": 0.0}))
    assert "not finite" in out.getvalue()
    with pytest.raises(typer.BadParameter, match="dense training diverges"):
        describe_real_runs("none", variants, 0, [lost, dense], tolerance=0.0)


def test_curves_of_another_recipe_are_refused(tmp_path: Path) -> None:
    write_curves(tmp_path / "curves.json", 3.0)
    with pytest.raises(typer.BadParameter, match="has curves of"):
        CurveStore(tmp_path / "curves.json", RECIPE, workers=4, evaluate_every=2)
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(typer.BadParameter, match="not a file of loss curves"):
        CurveStore(tmp_path / "odd.json", RECIPE, workers=2, evaluate_every=2)


def test_all_numbers_of_workers_train_on_the_same_batches(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 10)
    recipe = Recipe(str(tmp_path / "text.txt"), 8, 1, 8, 4, steps=4, lr=0.01, warmup_steps=2)
    parts = [recipe.batches(rank, 2, seed=1) for rank in range(2)]
    alone = recipe.batches(0, 1, seed=1)
    for _ in range(100):  # more than an epoch
        both = torch.cat([next(part) for part in parts])
        assert sorted(both.tolist()) == sorted(next(alone).tolist())


def test_a_simulated_run_learns_and_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a simple text " * 300)
    recipe = Recipe(str(tmp_path / "text.txt"), 8, 1, 8, 4, steps=30, lr=0.01, warmup_steps=2)
    setting = {"name": "efsign", "whiten": {"warmup_steps": 10}, "dense_as": "bf16"}
    run = simulate_run(recipe, 2, setting, seed=0, evaluate_every=20)
    assert [step for step, _ in run["evaluations"]] == [0, 20, 30]
    assert run["evaluations"][-1][1] < run["evaluations"][0][1]
    variant = Variant.of("disttrain", setting)
    kinds = find_kinds(variant, run["dense_fractions"])
    assert kinds[:10] == [DENSE] * 10
    assert set(kinds) == {DENSE, COMPRESSED, REFRESH}
    assert run["sent_bytes"][kinds.index(COMPRESSED)] < run["sent_bytes"][kinds.index(REFRESH)]
