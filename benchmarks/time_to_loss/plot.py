"""Draw held-out loss over seconds of training from results of time-to-loss.

pip install matplotlib
python -m benchmarks plot-time-to-loss benchmarks/results/time-to-loss/NAME.json
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.machine import ROOT
from benchmarks.common.options import describe_compressor
from benchmarks.speed.plots import LINKS, PEERS

FIGURE = ROOT / "docs" / "time_to_loss.svg"
THEIRS, TARGET = ("#333333", "#777777", "#aaaaaa", "#cccccc"), "#bbbbbb"


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files of time-to-loss.")],
    mode: Annotated[str, typer.Option(help="real or composed")] = "composed",
    seed: Annotated[int, typer.Option(help="The run to draw.")] = 0,
    output: Annotated[Path, typer.Option(help="The SVG file.")] = FIGURE,
) -> None:
    """Draw loss over seconds: a panel for each link, a line for each setting, the target as a horizontal line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "disttrain"  # the same results give the same file
    from matplotlib import pyplot, ticker

    runs = [
        run
        for path in results
        for run in json.loads(path.read_text())["runs"]
        if run["mode"] == mode and run["seed"] == seed
    ]
    if not runs:
        sys.exit(f"error: no {mode} runs with seed {seed} in {', '.join(map(str, results))}")
    order = list(LINKS)
    links = sorted(
        dict.fromkeys(run["rate"] for run in runs), key=lambda link: order.index(link) if link in LINKS else len(order)
    )
    colors = _choose_colors(runs, pyplot.get_cmap("tab10").colors)
    size = (1.0 + 3.2 * len(links), 3.6)
    figure, axes = pyplot.subplots(1, len(links), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, link in zip(axes[0], links, strict=True):
        its = [run for run in runs if run["rate"] == link]
        for run in its:
            name = _name(run)
            points = [(seconds, loss) for _, seconds, loss in run["evaluations"] if seconds > 0 and loss is not None]
            style = "--" if run["who"] != "disttrain" else "-"
            axis.plot(*zip(*points, strict=True), style, color=colors[name], linewidth=1.1, label=name)
            if run["seconds"] is not None:
                axis.plot(run["seconds"], run["target"], "o", color=colors[name], markersize=3)
        axis.set_ylim(top=min(axis.get_ylim()[1], its[0]["target"] + 1))  # where the lines differ
        axis.axhline(its[0]["target"], color=TARGET, linewidth=0.6, zorder=0, label="dense's final loss + tolerance")
        axis.set_xscale("log")
        axis.set_xlabel(f"seconds of training ({mode})", fontsize=8)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_title(LINKS.get(link, link), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out loss, bits per byte", fontsize=8)
    handles, names = axes[0][0].get_legend_handles_labels()
    names = [textwrap.fill(name, 48) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(links), fontsize=7, frameon=False)
    figure.savefig(output, metadata={"Date": None})


def _name(run: dict[str, Any]) -> str:
    name = describe_compressor(run["setting"])
    if run["who"] == "disttrain":
        return name
    return PEERS[run["who"]] if name == "none" else f"{PEERS[run['who']]}, {name} hook"


def _choose_colors(runs: list[dict[str, Any]], palette: Any) -> dict[str, Any]:
    """Return a color for each name: grays for the peer, the palette for disttrain."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for run in runs:
        colors, chosen = (palette, ours) if run["who"] == "disttrain" else (THEIRS, theirs)
        chosen.setdefault(_name(run), colors[len(chosen) % len(colors)])
    return theirs | ours
