"""From runs to the table: targets, seconds to them, ratios to DDP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.common.options import describe_compressor
from benchmarks.common.results import make_table
from benchmarks.common.statistics import ratio_to_baseline
from benchmarks.time_to_loss.composition import (
    BASELINE,
    OWN_DENSE,
    Variant,
    cumulate,
    find_kinds,
    first_step_at,
    median_seconds,
    seconds_at,
    seconds_by_turn,
)
from benchmarks.time_to_loss.curves import CurveStore, decode_runs, encode_runs

Run = dict[str, Any]
Times = Mapping[str, Sequence[Sequence[float]]]


def describe_real_runs(
    rate: str, variants: Sequence[Variant], seed: int, trained: Sequence[dict[str, Any]], tolerance: float
) -> list[Run]:
    """Return a record of each run over the links. The target follows from the final loss of DDP without a hook."""
    target = find_target(trained[list(variants).index(BASELINE)]["evaluations"], tolerance)
    runs = []
    for variant, run in zip(variants, trained, strict=True):
        step = first_step_at(run["evaluations"], target)
        steps, seconds = zip(*((step, seconds) for step, seconds, _ in run["evaluations"]), strict=True)
        kinds = find_kinds(variant, run["dense_fractions"])
        runs.append(
            {
                **_describe(rate, "real", variant, seed, target, step, run["evaluations"], run["sent_bytes"], kinds),
                "seconds": None if step is None else float(np.interp(step, steps, seconds)),
            }
        )
    return runs


def compose_runs(
    rate: str,
    variants: Sequence[Variant],
    seeds: int,
    store: CurveStore,
    timed: Sequence[Times],
    tolerance: float,
) -> list[Run]:
    """Return a record of each curve with the seconds that its steps take over the links.

    Some share a curve (``Variant.trains_as``). ``turn_seconds`` are the seconds by the times of each turn alone.
    """
    runs = []
    own_dense = timed[list(variants).index(OWN_DENSE)]
    num_turns = max(len(turns) for turns in own_dense.values())
    dense_seconds = [median_seconds(own_dense)] * num_turns
    for variant, seed in itertools.product(variants, range(seeds)):
        times = timed[list(variants).index(variant)]
        target = find_target(store.get(OWN_DENSE, seed)["evaluations"], tolerance)
        curve = store.get(variant.trains_as, seed)
        sent, fractions = (decode_runs(curve[key]) for key in ("sent_bytes", "dense_fractions"))
        if variant.trains_as.setting["name"] != variant.setting["name"]:
            # Only the losses are those of dense training. All its steps are of one kind.
            sent, fractions = [None] * len(sent), [0.0] * len(sent)
        kinds = find_kinds(variant, fractions)
        by_turn = seconds_by_turn(times, kinds, dense_seconds)
        its = {kind: median_seconds(times).get(kind, by_turn[0][kind]) for kind in by_turn[0]}
        total = cumulate(kinds, its)
        evaluations = [[step, round(float(total[step]), 4), loss] for step, loss in curve["evaluations"]]
        step = first_step_at(curve["evaluations"], target)
        runs.append(
            {
                **_describe(rate, "composed", variant, seed, target, step, evaluations, sent, kinds),
                "seconds": None if step is None else seconds_at(kinds, its, step),
                "turn_seconds": None if step is None else [seconds_at(kinds, turn, step) for turn in by_turn],
                "step_seconds": {kind: round(seconds, 5) for kind, seconds in its.items()},
                "not_timed": sorted(set(kinds) - set(times)),
            }
        )
    return runs


def find_target(evaluations: Sequence[Sequence[float | None]], tolerance: float) -> float:
    """Return the last loss plus the tolerance.

    Raises:
        typer.BadParameter: the loss is not finite.
    """
    if (loss := evaluations[-1][-1]) is None:
        raise typer.BadParameter("dense training diverges: lower --lr, or raise --lr-warmup")
    return loss + tolerance


def make_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row for each link, mode and variant, the mean over seeds; None for what is not reached by all."""
    groups: dict[tuple[str, str], dict[Variant, list[Run]]] = {}
    for run in runs:
        variant = Variant.of(run["who"], run["setting"])
        groups.setdefault((run["rate"], run["mode"]), {}).setdefault(variant, []).append(run)
    rows = []
    for (rate, mode), by_variant in groups.items():
        baseline = by_variant[BASELINE]
        for variant, its in by_variant.items():
            row = {"rate": rate, "mode": mode, "who": variant.who, "setting": variant.setting, "seeds": len(its)}
            row["reached"] = sum(run["seconds"] is not None for run in its)
            losses = [run["evaluations"][-1][-1] for run in its]
            row["final_loss"] = None if None in losses else float(np.mean(losses))
            row["final_seconds"] = float(np.mean([run["evaluations"][-1][1] for run in its]))
            is_reached = row["reached"] == len(its) and all(run["seconds"] is not None for run in baseline)
            for name in ("steps", "seconds", "sent_bytes"):
                values = [run[name] for run in its]
                row[name] = float(np.mean(values)) if is_reached and None not in values else None
            row |= _ratios(its, baseline) if is_reached else dict.fromkeys(("ratio", "ratio_low", "ratio_high"))
            rows.append(row)
    return rows


def tabulate(rows: Sequence[dict[str, Any]], result: Mapping[str, Any]) -> Table:
    recipe = result["recipe"]
    return make_table(
        f"Seconds to dense training's final loss + {result['tolerance']:g} bits per byte; {result['workers']} workers, "
        f"AdamW, GPT {recipe['width']} x {recipe['layers']}, context {recipe['context']}, {recipe['steps']} steps",
        ("link", "mode", "who", "with"),
        ("steps", "seconds", "of DDP's", "interval", "MB sent", "final loss"),
        (
            (
                row["rate"],
                row["mode"],
                row["who"],
                describe_compressor(row["setting"]),
                *_format(row),
                "not finite" if row["final_loss"] is None else f"{row['final_loss']:.3f}",
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the smallest and the largest ratio to DDP's seconds, by link and mode, and what was not reached."""
    texts = []
    for (rate, mode), group in itertools.groupby(result["rows"], key=lambda row: (row["rate"], row["mode"])):
        ours = [row for row in group if row["who"] == "disttrain"]
        reached = sorted((row for row in ours if row["ratio"] is not None), key=lambda row: float(row["ratio"]))
        ends = [f"{row['ratio']:.3f} ({describe_compressor(row['setting'])})" for row in reached]
        missed = [describe_compressor(row["setting"]) for row in ours if row["ratio"] is None]
        text = f"{' to '.join(dict.fromkeys([ends[0], ends[-1]]))} of DDP's seconds" if ends else "none reached"
        link = f"{rate} links" if rate != "none" else "unshaped links"
        texts.append(f"{link}, {mode}: {text}{'; not reached: ' + ', '.join(missed) if missed else ''}")
    return "; ".join(texts)


def _describe(
    rate: str,
    mode: str,
    variant: Variant,
    seed: int,
    target: float,
    step: float | None,
    evaluations: Sequence[Sequence[float | None]],
    sent: Sequence[int | None],
    kinds: Sequence[str],
) -> Run:
    counted = [number for number in sent[: round(step or 0)] if number is not None]
    return {
        "rate": rate,
        "mode": mode,
        "who": variant.who,
        "setting": variant.setting,
        "seed": seed,
        "target": target,
        "steps": step,
        "sent_bytes": sum(counted) if counted else None,
        "kinds": encode_runs(kinds),
        "evaluations": evaluations,
    }


def _ratios(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, float]:
    """Return the ratio to the baseline's seconds, and its interval.

    Composed: the median over turns, with its 95 % interval. Real: the ratio of the means, and the extremes over seeds.
    """
    if "turn_seconds" in runs[0]:
        ours, theirs = (np.mean([run["turn_seconds"] for run in its], axis=0) for its in (runs, baseline))
        ratio = ratio_to_baseline(ours, theirs)
        values = {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    else:
        pairs = [(run["seconds"], other["seconds"]) for run, other in zip(runs, baseline, strict=True)]
        ratios = [seconds / other for seconds, other in pairs]
        mean = sum(seconds for seconds, _ in pairs) / sum(other for _, other in pairs)
        values = {"ratio": mean, "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return {name: round(value, 4) for name, value in values.items()}


def _format(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["ratio"] is None:
        seeds = f" ({row['reached']} of {row['seeds']})" if row["seeds"] > 1 else ""
        return "", f"not reached{seeds}", "", "", ""
    return (
        f"{row['steps']:.0f}",
        f"{row['seconds']:.1f}",
        f"{row['ratio']:.3f}",
        f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}" if row["ratio_low"] < row["ratio_high"] else "",
        "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.1f}",
    )
