"""Draw the newest results of step_time.py for docs/compressors.md: step time of every compressor, link by link.

pip install matplotlib
python benchmarks/plots.py benchmarks/results/<date>-step-time-compressors*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files that step_time.py wrote.")],
    model: Annotated[str, typer.Option()] = "mlp",
    output: Annotated[Path, typer.Option()] = ROOT / "docs" / "step_time.svg",
) -> None:
    """One panel a link, bars of ratios to the peer without compression; below 1 is faster."""
    import matplotlib

    matplotlib.use("svg")
    # The same file from the same results.
    matplotlib.rcParams["svg.hashsalt"] = "disttrain"
    from matplotlib import pyplot

    rows: list[dict[str, Any]] = [row for path in results for row in json.loads(path.read_text())["rows"]]
    rows = [row for row in rows if row["model"] == model]
    if not rows:
        sys.exit(f"no rows for the model {model!r}")
    links = list(dict.fromkeys(row["rate"] for row in rows))
    names = list(dict.fromkeys(label(row) for row in rows))
    figure, axes = pyplot.subplots(
        1, len(links), figsize=(2.2 + 2.4 * len(links), 0.6 + 0.24 * len(names)), sharey=True, squeeze=False
    )
    for axis, link in zip(axes[0], links, strict=True):
        found = {label(row): row for row in rows if row["rate"] == link}
        for place, name in enumerate(names):
            if name in found:
                is_ours = found[name]["who"] == "disttrain"
                axis.barh(place, found[name]["ratio"], color="#2a6f97" if is_ours else "#a9a9a9", height=0.7)
                axis.text(found[name]["ratio"], place, f" {found[name]['ratio']:.2f}", va="center", fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.6)
        axis.set_title(link, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, 1.15 * max(1.0, *(row["ratio"] for row in found.values())))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"step time / {rows[0]['who']} without compression", fontsize=8)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


def label(row: dict[str, Any]) -> str:
    setting = row["setting"]
    return " ".join(
        [row["who"] if row["who"] != "disttrain" else "", *(str(value) for value in setting.values())]
    ).strip()


if __name__ == "__main__":
    typer.run(main)
