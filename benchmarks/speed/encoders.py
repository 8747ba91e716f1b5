"""Time of every compressor's arithmetic, as a multiple of one copy of the same gradient in the same process.

    python -m benchmarks encoders

One thread. ``encode`` adds the residual, encodes and keeps the new residual. ``decode`` decodes one payload of several
and adds it. ``of four`` is the mean of four payloads, as an exchange computes it, divided by four.

For compressors that are not codecs (PowerSGD, casts), ``encode`` is all their arithmetic: their program runs with
collectives that return what was sent. Every compressor alternates with the copy; figures are medians over turns.

With ``whiten=true``, gradients are converted to other units, and the mean of four is converted back. Of codecs that do
not convert by themselves, ``encode`` then is all the arithmetic, too.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.common.machine import describe_machine
from benchmarks.common.options import RESULTS, LabelOption, OutputOption, describe_compressor, parse_compressor
from benchmarks.common.results import make_table, write_result
from disttrain import compression
from disttrain.comm.malloc import keep_freed_memory
from disttrain.compression import Bucket, Codec, Compressor, State
from disttrain.compression.base import Program, dry_run
from disttrain.compression.payload import Layout
from disttrain.compression.whitening import BucketWhitening, Whitening
from disttrain.kernels import Units, for_device

# In addition to every registered compressor with its default options.
MORE = [
    "qsgd:bits=8,error_feedback=true", "qsgd:bits=4,error_feedback=true", "topk:selection=estimated",
    "topk:chunk_size=4096", "topk:chunk_size=4096,value_bits=4", "efsign:bits=2", "efsign:block_size=512",
    "efsign:block_size=512,whiten=true", "powersgd:whiten=true",
]  # fmt: skip


def main(
    compressor: Annotated[list[str], typer.Option(help="Only these: topk:ratio=0.01, ...")] = [],  # noqa: B006
    width: Annotated[list[int], typer.Option(help="The gradient is ten matrices of width x width.")] = [256, 1024],  # noqa: B006
    turns: Annotated[int, typer.Option(min=3)] = 45,
    output: OutputOption = RESULTS,
    label: LabelOption = "",
) -> None:
    """Measure all compressors."""
    torch.set_num_threads(1)
    machine = describe_machine()
    keep_freed_memory()  # as in a worker
    specs = [parse_compressor(text) for text in compressor or [*compression.names(), *MORE]]
    rows = [{"width": size, **row} for size in width for row in measure(specs, size, turns)]
    result = {"machine": machine, "turns": turns, "rows": rows}
    write_result(tabulate(rows), result, output, "encoders", label, width=120)


def measure(specs: list[dict[str, Any]], width: int, turns: int) -> list[dict[str, Any]]:
    """Return one row for each compressor, with medians as multiples of a copy."""
    shapes = ((width, width),) * 10
    names = tuple(f"layer{index}.weight" for index in range(10))
    bucket = Bucket(names, shapes, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(bucket.numel, generator=generator)
    # Pages are touched before timing, since the first write to each is a page fault.
    target, work = torch.zeros_like(gradient), torch.zeros_like(gradient)
    rows = []
    for spec in specs:
        built = compression.build({key: value for key, value in spec.items() if key != "whiten"})
        jobs = [lambda: target.copy_(gradient), *make_jobs(built, bucket, gradient, work, bool(spec.get("whiten")))]
        times: list[list[float]] = [[] for _ in jobs]
        for turn in range(turns + 2):
            for series, job in zip(times, jobs, strict=True):
                elapsed = time_call(job)
                if turn >= 2:  # the first turns compile kernels and warm up caches
                    series.append(elapsed)
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
    compressor: Compressor, bucket: Bucket, gradient: torch.Tensor, work: torch.Tensor, whiten: bool
) -> list[Callable[[], Any]]:
    """Return the calls to time: encoding and, for codecs, decoding one payload and four."""
    state = compressor.init_state(bucket)
    if type(compressor).reduce is not Codec.reduce or (whiten and not compressor.converts_units()):
        reduce = functools.partial(compressor.reduce, bucket=bucket, state=state)
        if whiten:
            reduce = functools.partial(BucketWhitening(Whitening(), bucket, state).reduce, compressor)
        return [lambda: run_program(reduce, bucket, gradient, work, state)]
    assert isinstance(compressor, Codec)
    units = Units(torch.ones_like(gradient), bound=64.0) if whiten else None

    def encode() -> Any:
        if not compressor.error_feedback:
            return compressor.encode_with_residual(gradient, None, bucket, state)
        if units is not None:
            for_device(gradient.device).whitened_squares(gradient, units.scale, bucket.numels)
        feedback = state.feedback("residual")._replace(units=units)
        payload = compressor.encode_with_residual(gradient, feedback, bucket, state)
        state.commit({"residual": feedback.new_residual})
        return payload

    payload = encode()
    layout = Layout.of(payload)
    packed = list(torch.stack([layout.pack(payload)] * 4))  # side by side, as they are received
    payloads = [layout.unpack(part) for part in packed]
    factors = None if units is None else units.scale
    return [
        encode,
        lambda: compressor.decode_add(payload, work, bucket),
        lambda: compressor.decode_mean_times(factors, payloads, work, bucket),
    ]


def run_program(
    reduce: Callable[[torch.Tensor], Program],
    bucket: Bucket,
    gradient: torch.Tensor,
    work: torch.Tensor,
    state: State,
) -> None:
    """Run a whole step. The time includes a copy of the gradient, since programs may overwrite it."""
    _, new_state = dry_run(reduce(work.copy_(gradient)), bucket)
    state.commit(new_state)


def time_call(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def tabulate(rows: list[dict[str, Any]]) -> Table:
    return make_table(
        "Arithmetic of one step, one thread, in copies of the gradient",
        ("compressor",),
        ("elements", "copy ms", "encode ms", "encode", "decode", "of four", "payload MB"),
        (
            (
                describe_compressor(row["compressor"]),
                f"{10 * row['width'] ** 2:,}",
                f"{row['copy_ms']:.2f}",
                f"{row['encode_ms']:.2f}",
                f"{row['encode']:.2f}",
                *("" if row[key] is None else f"{row[key]:.2f}" for key in ("decode", "decode_of_four")),
                "" if row["payload_bytes"] is None else f"{row['payload_bytes'] / 1e6:.2f}",
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the fastest and the slowest encoder on the largest gradient."""
    width = max(row["width"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["width"] == width]
    best, worst = (choose(rows, key=lambda row: row["encode"]) for choose in (min, max))
    texts = [f"{row['encode']:.1f} ({describe_compressor(row['compressor'])})" for row in (best, worst)]
    return f"{len(rows)} compressors, {10 * width**2:,} elements: encoding takes {' to '.join(texts)} copies"
