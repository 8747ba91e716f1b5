"""Error of the exchange in two stages, by the bits that the mean takes on its way back.

    python -m benchmarks mean-bits

Simulated workers exchange synthetic gradients by ``efsign``: entries are a signal, the same for all workers, plus
Gaussian noise of each worker's own; the signal drifts, and its scale differs by blocks. The reference is the mean by
all-gather. ``step`` is the error of a step's mean relative to it, the root mean square over steps; ``sum`` that of the
sum over all steps, which error feedback keeps bounded; ``sum, exact`` that of the sum, relative to the exact mean's.

The first steps are exchanges between simulated workers, which give the bytes. No chunk ends inside a block, so the
first stage gives the mean by all-gather, whatever the bits of the second. Errors are those of encoding that mean once
more, all at once, which must give what the workers got in the first steps.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from benchmarks.common.machine import describe_machine
from benchmarks.common.options import RESULTS, LabelOption, OutputOption
from benchmarks.common.results import make_table, write_result
from disttrain import compression
from disttrain.comm import Communicator, simulate
from disttrain.compression import Bucket, Codec, Payload, State
from disttrain.compression.mean_encoders import mean_encoder
from disttrain.compression.two_stage import Encoder
from disttrain.kernels import Feedback
from disttrain.reduction.exchange import Exchange, Executor, finish

EXCHANGES: list[dict[str, Any]] = [
    {"exchange": "all_gather", "mean_bits": None},
    *({"exchange": "two_stage", "mean_bits": bits} for bits in (None, 2, 3, 4, 8)),
]
NUM_ELEMENTS = 2**18  # a block of ``efsign`` for each of 64 workers
NUM_REAL_STEPS = 2
SHARE, DRIFT = 0.1, 0.1  # of the signal: its deviation relative to the noise, and how much of it is new in each step


class Exchanged(NamedTuple):
    """What real exchanges come to: the means, (steps, elements), and one worker's bytes a step."""

    means: torch.Tensor
    received: int
    sent: int


class Gradients:
    """Synthetic gradients of ``NUM_ELEMENTS`` entries by step and worker."""

    def __init__(self, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._scales = torch.randn(NUM_ELEMENTS // 256, 1, generator=generator).exp().expand(-1, 256).reshape(-1)
        signal = torch.randn(NUM_ELEMENTS, generator=generator)
        self._signals = []
        for _ in range(num_steps):
            new = torch.randn(NUM_ELEMENTS, generator=generator)
            signal = (1 - DRIFT**2) ** 0.5 * signal + DRIFT * new
            self._signals.append(SHARE * signal * self._scales)
        self._noise = torch.randn(4 * NUM_ELEMENTS, generator=generator)  # windows of it are cheaper than new noise
        self._starts = torch.randint(3 * NUM_ELEMENTS, (num_steps, 64), generator=generator).tolist()

    def at(self, step: int, worker: int) -> torch.Tensor:
        start = self._starts[step][worker]
        return torch.addcmul(self._signals[step], self._scales, self._noise[start : start + NUM_ELEMENTS])


def main(
    workers: Annotated[list[int], typer.Option(help="Numbers of workers: powers of two up to 64.")] = [4, 16, 64],  # noqa: B006
    steps: Annotated[int, typer.Option(min=NUM_REAL_STEPS, help="Steps of each exchange.")] = 50,
    output: OutputOption = RESULTS,
    label: LabelOption = "",
) -> None:
    """Compare the mean in two stages with that of an all-gather."""
    if invalid := [number for number in workers if number not in (2, 4, 8, 16, 32, 64)]:
        raise typer.BadParameter(f"{invalid[0]} workers: expected a power of two from 2 to 64")
    torch.set_num_threads(1)
    machine = describe_machine()
    gradients = Gradients(steps)
    rows = [row for number in workers for row in measure(gradients, number, steps)]
    result = {"machine": machine, "elements": NUM_ELEMENTS, "steps": steps, "rows": rows}
    write_result(tabulate(rows, steps), result, output, "mean-bits", label, width=120)


class Sender:
    """An encoder and the residual of what it has encoded so far."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._bucket = make_bucket(rank=0, world_size=1)
        self._residual, self._spare = torch.zeros(NUM_ELEMENTS), torch.empty(NUM_ELEMENTS)

    def encode(self, values: torch.Tensor) -> Payload:
        """Encode ``values``, which may be overwritten."""
        feedback = Feedback(self._residual, self._spare)
        payload = self._encoder.encode_with_residual(values, feedback, self._bucket, State())
        self._residual, self._spare = self._spare, self._residual
        return payload

    def decode_mean(self, payloads: list[Payload]) -> torch.Tensor:
        out = torch.empty(NUM_ELEMENTS)
        self._encoder.decode_mean(payloads, out, self._bucket)
        return out


def measure(gradients: Gradients, workers: int, steps: int) -> list[dict[str, Any]]:
    """Return one row for each of ``EXCHANGES``."""
    exact = torch.zeros(NUM_ELEMENTS)
    senders = [Sender(build()) for _ in range(workers)]
    means = []
    for step in range(steps):
        payloads = []
        for worker, sender in enumerate(senders):
            gradient = gradients.at(step, worker)
            exact += gradient / workers
            payloads.append(sender.encode(gradient))
        means.append(senders[0].decode_mean(payloads))
    reference = torch.stack(means)

    rows = []
    for options in EXCHANGES:
        found = reference
        if options["exchange"] == "two_stage":
            bits = options["mean_bits"]
            sender = Sender(build() if bits is None else mean_encoder(bits))
            found = torch.stack([sender.decode_mean([sender.encode(mean.clone())]) for mean in reference])
        real = exchange(gradients, workers, build(**options))
        assert torch.equal(real.means, found[:NUM_REAL_STEPS]), f"{workers} workers, {options}"
        rows.append(
            {
                "workers": workers,
                **options,
                "received_bytes": real.received,
                "sent_bytes": real.sent,
                "step_error": relative_error(found, reference),
                "sum_error": relative_error(found.sum(0), reference.sum(0)),
                "sum_error_exact": relative_error(found.sum(0), exact),
            }
        )
    return rows


def exchange(gradients: Gradients, workers: int, codec: Codec) -> Exchanged:
    """Run the first steps on simulated workers."""

    def run(comm: Communicator) -> Exchanged:
        bucket = make_bucket(comm.rank, comm.world_size)
        state, executor, means = codec.init_state(bucket), Executor(comm), []
        for step in range(NUM_REAL_STEPS):
            program = codec.reduce(gradients.at(step, comm.rank), bucket, state)
            ((_, (mean, new_state)),) = finish([Exchange(program, executor)])
            means.append(mean.clone())
            state.commit(new_state)
            executor.ledger.end_step(bucket.numel)
        traffic = executor.ledger.last_step
        return Exchanged(torch.stack(means), traffic.received_bytes, traffic.sent_bytes)

    return simulate(workers, run, in_turns=True)[0]


def build(**options: Any) -> Codec:
    return compression.EFSign(**options)


def make_bucket(rank: int, world_size: int) -> Bucket:
    shapes = ((NUM_ELEMENTS // 256, 256),)
    return Bucket(("layer.weight",), shapes, torch.float32, torch.device("cpu"), rank, world_size)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tabulate(rows: list[dict[str, Any]], steps: int) -> Table:
    """Return the table of all rows."""
    return make_table(
        f"efsign, {NUM_ELEMENTS:,} elements, {steps} steps; bytes a step of one worker",
        ["workers", "exchange", "bits of the mean"],
        ["received", "sent", "step", "sum", "sum, exact"],
        (
            (
                str(row["workers"]),
                row["exchange"].replace("_", " "),
                "" if row["exchange"] == "all_gather" else str(row["mean_bits"] or "as gradients"),
                f"{row['received_bytes']:,}",
                f"{row['sent_bytes']:,}",
                *(f"{row[key]:.3f}" for key in ("step_error", "sum_error", "sum_error_exact")),
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the errors of a step and of the sum by bits, for the largest number of workers."""
    workers = max(row["workers"] for row in result["rows"])
    texts = [
        f"{row['mean_bits'] or 'as gradients'}: {row['step_error']:.2f}, {row['sum_error']:.2f}"
        for row in result["rows"]
        if row["workers"] == workers and row["exchange"] == "two_stage"
    ]
    return f"{workers} workers, error of a step and of the sum by bits of the mean: {'; '.join(texts)}"
