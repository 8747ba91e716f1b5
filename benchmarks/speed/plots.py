"""Draw the figures of the documents from committed results.

pip install matplotlib
python -m benchmarks plot
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.machine import ROOT
from benchmarks.common.options import RESULTS, describe_compressor
from benchmarks.speed.frameworks import NO_EXCHANGE

FIGURE = ROOT / "docs" / "step_time.svg"
# The results that the figure is drawn from; docs/compressors.md has the same ones as a table.
SOURCES = [
    RESULTS / "step-time" / f"{name}.json"
    for name in ("2026-11-22-all-100mbit-2", "2026-11-22-all-1gbit-2", "2026-11-22-all-fast-2")
]
LINKS = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "10gbit": "10 Gbit/s", "none": "unshaped links"}
PEERS = {"ddp": "torch DDP", "horovod": "Horovod"}
OURS, THEIRS, LOWER_BOUND = "#2a6f97", "#a9a9a9", "#d8d8d8"


def main(
    results: Annotated[
        list[Path], typer.Argument(help="JSON files of step-time; by default those behind docs/step_time.svg.")
    ] = SOURCES,
    model: Annotated[str, typer.Option()] = "mlp",
    output: Annotated[Path, typer.Option(help="The SVG file.")] = FIGURE,
) -> None:
    """Draw step times: a panel for each link, bars of ratios to the peer without compression."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "disttrain"  # the same results give the same file
    from matplotlib import pyplot

    rows = [row for path in results for row in json.loads(path.read_text())["rows"] if row["model"] == model]
    if not rows:
        sys.exit(f"error: no rows for model {model!r} in {', '.join(map(str, results))}")
    peer = next(row["who"] for row in rows if row["who"] != "disttrain")
    rows = sorted((row for row in rows if row["setting"]["name"] != "none"), key=_order)
    links = sorted({row["rate"] for row in rows}, key=list(LINKS).index)
    names = list(dict.fromkeys(map(_name, rows)))
    figure, axes = pyplot.subplots(
        1, len(links), figsize=(2.2 + 2.4 * len(links), 0.8 + 0.24 * len(names)), sharey=True, squeeze=False
    )
    for axis, link in zip(axes[0], links, strict=True):
        for row in rows:
            if row["rate"] != link:
                continue
            place, ratio = names.index(_name(row)), row["ratio"]
            errors = [[max(0.0, ratio - row["ratio_low"])], [max(0.0, row["ratio_high"] - ratio)]]
            axis.barh(
                place, ratio, xerr=errors, color=_color(row), height=0.7, error_kw={"elinewidth": 0.8, "capsize": 1.5}
            )
            axis.text(row["ratio_high"], place, f" {ratio:.2f}", va="center", fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.6)
        axis.set_title(LINKS[link], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, 1.15 * max(1.0, *(row["ratio_high"] for row in rows if row["rate"] == link)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    caption = f"step time relative to {PEERS[peer]} without compression (below 1 is faster), with 95 % intervals"
    figure.supxlabel(caption, fontsize=8)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


def _name(row: dict[str, Any]) -> str:
    if row["setting"] == NO_EXCHANGE:
        return "no exchange"
    name = describe_compressor(row["setting"])
    return name if row["who"] == "disttrain" else f"{PEERS[row['who']]}, {name} hook"


def _order(row: dict[str, Any]) -> tuple[int, str]:
    """Compressors by name, then the peer's hooks, then the lower bound."""
    return (row["setting"] == NO_EXCHANGE) * 2 + (row["who"] != "disttrain"), _name(row)


def _color(row: dict[str, Any]) -> str:
    if row["setting"] == NO_EXCHANGE:
        return LOWER_BOUND
    return OURS if row["who"] == "disttrain" else THEIRS
