"""Write the index of all results, from the result files and the documents that link to them.

python -m benchmarks index
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy import convergence, finetune, mean_bits, recipe
from benchmarks.common.machine import ROOT, describe_hardware
from benchmarks.common.options import RESULTS
from benchmarks.speed import checkpointing, encoders, plots, step_time
from benchmarks.time_to_loss import rows as time_to_loss

INDEX = RESULTS / "README.md"
# The subdirectory of a benchmark's results -> the function that summarizes one of them in a line.
SUMMARIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step-time": step_time.summarize_result,
    "time-to-loss": time_to_loss.summarize_result,
    "encoders": encoders.summarize_result,
    "checkpointing": checkpointing.summarize_result,
    "convergence": convergence.summarize_result,
    "recipe": recipe.summarize_result,
    "finetune": finetune.summarize_result,
    "mean-bits": mean_bits.summarize_result,
}
HEADER = """\
# Results

<!-- Written by `python -m benchmarks index`; do not edit. -->

The results that the documents quote, and the newest run of each benchmark. Each has a table with machine and command
(`.md`) and all measurements (`.json`). Earlier results are in the history: `git log --stat -- benchmarks/results` lists
them, `git show COMMIT:PATH` prints one.

Commands are given as they were recorded. `python benchmarks/step_time.py ...` is `python -m benchmarks step-time ...`
today, and likewise for the others; results named in `--earlier` were directly in `benchmarks/results`, with the
benchmark in their names.
"""
LINK = re.compile(r"\]\(([^)\s#]+)\)")


def main() -> None:
    """Write benchmarks/results/README.md."""
    INDEX.write_text(make_index())


def make_index() -> str:
    """Return the text of the index."""
    quotes = find_quotes()
    parts = [HEADER]
    for benchmark, summarize in SUMMARIES.items():
        if not (paths := sorted((RESULTS / benchmark).glob("*.json"))):
            continue
        parts += [
            f"\n## {benchmark}\n",
            "| date | result | machine | what it shows | quoted in |",
            "|---|---|---|---|---|",
        ]
        commands = []
        for path in paths:
            result = json.loads(path.read_text())
            date, name = path.stem[:10], path.stem[11:] or benchmark
            link = f"[{name}]({benchmark}/{path.stem}.md)"
            documents = ", ".join(
                f"[{document.relative_to(ROOT)}]({os.path.relpath(document, RESULTS)})"
                for document in quotes.get(path.with_suffix(""), [])
            )
            cells = (date, link, describe_hardware(result["machine"]), summarize(result), documents)
            parts.append(f"| {' | '.join(cells)} |")
            commands.append(f"# {date} {name}\n{result['machine']['command']}")
        parts += ["\n```bash", *commands, "```"]
    return "\n".join(parts) + "\n"


def find_quotes() -> dict[Path, list[Path]]:
    """Return the documents that link to a result or show it in a figure, by the result's path without suffix."""
    quotes: dict[Path, list[Path]] = {}
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        links = LINK.findall(document.read_text())
        for target in dict.fromkeys((document.parent / link).resolve() for link in links if "://" not in link):
            if target.is_relative_to(RESULTS) and target.suffix and target != INDEX:
                quotes.setdefault(target.with_suffix(""), []).append(document)
    for source in plots.SOURCES:
        quotes.setdefault(source.with_suffix(""), []).append(plots.FIGURE)
    return quotes
