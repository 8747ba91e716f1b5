"""Time of every compressor's arithmetic, as multiples of one copy of the same gradient in the same process.

    python benchmarks/encoders.py

One thread. ``encode``: add the residual, encode, keep what is left. ``decode``: decode one payload of many and add it;
``of four``: the mean of four payloads, as an exchange forms it, divided by four.
Compressors that are not codecs (PowerSGD, casts) get all their arithmetic in ``encode``: their program is run by hand,
with collectives that give back what was sent. Every compressor takes turns with the copy; medians over turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, show_and_write  # noqa: E402
from benchmarks.step_time import describe_compressor, parse_compressor  # noqa: E402
from disttrain import compression  # noqa: E402
from disttrain.comm.malloc import keep_freed_memory  # noqa: E402
from disttrain.compression import Bucket, Codec, Compressor, State  # noqa: E402
from disttrain.compression.base import dry_run  # noqa: E402
from disttrain.compression.payload import Layout  # noqa: E402

# Beside the defaults of all that are registered.
MORE = ["qsgd:bits=8,error_feedback=true", "qsgd:bits=4,error_feedback=true", "topk:selection=estimated"]


def main(
    compressor: Annotated[list[str], typer.Option(help="Only these: topk:ratio=0.01, ...")] = [],  # noqa: B006
    width: Annotated[list[int], typer.Option(help="Ten matrices of width x width make the gradient.")] = [256, 1024],  # noqa: B006
    turns: Annotated[int, typer.Option(min=3)] = 45,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure all compressors."""
    torch.set_num_threads(1)
    machine = describe_machine()
    keep_freed_memory()  # as in a worker
    specs = [parse_compressor(text) for text in compressor or [*compression.names(), *MORE]]
    rows = [{"width": size, **row} for size in width for row in measure(specs, size, turns)]
    result = {"machine": machine, "turns": turns, "rows": rows}
    show_and_write(make_table(rows), result, output, "encoders", width=120)


def measure(specs: list[dict[str, Any]], width: int, turns: int) -> list[dict[str, Any]]:
    """One row a compressor: median multiples of a copy."""
    shapes = ((width, width),) * 10
    names = tuple(f"layer{index}.weight" for index in range(10))
    bucket = Bucket(names, shapes, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(bucket.numel, generator=generator)
    # Touched before it is timed: the first write to a page is the kernel's work.
    target, work = torch.zeros_like(gradient), torch.zeros_like(gradient)
    rows = []
    for spec in specs:
        built = compression.build(spec)
        jobs = [lambda: target.copy_(gradient), *make_jobs(built, bucket, gradient, work)]
        times: list[list[float]] = [[] for _ in jobs]
        for turn in range(turns + 2):
            for series, job in zip(times, jobs, strict=True):
                took = seconds(job)
                if turn >= 2:  # kernels are compiled, caches are as they will be
                    series.append(took)
        copy, encode, *decodes = [statistics.median(series) for series in times]
        rows.append(
            {
                "compressor": spec,
                "copy_ms": round(copy * 1e3, 2),
                "encode_ms": round(encode * 1e3, 2),
                "encode": round(encode / copy, 2),
                "decode": round(decodes[0] / copy, 2) if decodes else None,
                "decode_of_four": round(decodes[1] / copy / 4, 2) if decodes else None,
                "payload_bytes": built.payload_bytes(bucket) if isinstance(built, Codec) else None,
            }
        )
    return rows


def make_jobs(
    compressor: Compressor, bucket: Bucket, gradient: torch.Tensor, work: torch.Tensor
) -> list[Callable[[], Any]]:
    """What is timed: encoding, and decoding one payload and four if the compressor is a codec."""
    state = compressor.init_state(bucket)
    if type(compressor).reduce is not Codec.reduce:
        return [lambda: run_program(compressor, bucket, gradient, work, state)]
    assert isinstance(compressor, Codec)

    def encode() -> Any:
        if not compressor.error_feedback:
            return compressor.encode_with_residual(gradient, None, bucket, state)
        feedback = state.feedback("residual")
        payload = compressor.encode_with_residual(gradient, feedback, bucket, state)
        state.commit({"residual": feedback.new_residual})
        return payload

    payload = encode()
    layout = Layout.of(payload)
    packed = list(torch.stack([layout.pack(payload)] * 4))  # side by side, as they are received
    payloads = [layout.unpack(part) for part in packed]
    return [
        encode,
        lambda: compressor.decode_add(payload, work, bucket),
        lambda: compressor.decode_mean(payloads, work, bucket),
    ]


def run_program(
    compressor: Compressor, bucket: Bucket, gradient: torch.Tensor, work: torch.Tensor, state: State
) -> None:
    """A whole step by hand. The gradient is copied in first, since programs may overwrite it: that is timed too."""
    _, new_state = dry_run(compressor.reduce(work.copy_(gradient), bucket, state), bucket)
    state.commit(new_state)


def seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def make_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Arithmetic of one step, one thread, in copies of the gradient")
    table.add_column("compressor")
    for column in ("elements", "copy ms", "encode ms", "encode", "decode", "of four", "payload MB"):
        table.add_column(column, justify="right")
    for row in rows:
        payload = "" if row["payload_bytes"] is None else f"{row['payload_bytes'] / 1e6:.2f}"
        decodes = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("decode", "decode_of_four")]
        figures = [f"{row['copy_ms']:.2f}", f"{row['encode_ms']:.2f}", f"{row['encode']:.2f}", *decodes, payload]
        table.add_row(describe_compressor(row["compressor"]), f"{10 * row['width'] ** 2:,}", *figures)
    return table


if __name__ == "__main__":
    typer.run(main)
