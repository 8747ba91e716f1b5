"""signSGD: the majority vote of the ranks' signs (Bernstein et al. 2018, arXiv:1802.04434, 1810.05291)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import for_device


class SignSGD(FusedCodec):
    """One bit an entry up, and the sign of the vote comes back: +1 or -1 stands in the place of the mean.

    A minority that sends anything it likes cannot turn an entry on which the others agree. The magnitude is lost, so
    the learning rate is that of sign descent, as for Adam (authors: 1e-4), and there is no error feedback: the vote is
    no approximation of the mean (``efsign`` is one).

    The sign of zero is plus, and a block of nothing but zeros abstains, so that parameters without gradients stay where
    they are. In a tie the first rank that votes decides: one bit has no third value, and a constant would make
    parameters drift. Wire: 1/8 byte an entry and a byte a block; in two stages whatever the number of ranks is.
    """

    name = "signsgd"

    error_feedback: Literal[False] = Field(default=False, description="always false: a vote has no error to keep")
    block_size: int = Field(default=512, ge=8, multiple_of=8, description="entries that abstain together")

    def encode_owed(
        self, grad: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None, bucket: Bucket, state: State
    ) -> Payload:
        bits, scales = for_device(grad.device).sign(grad, residual, rest, self.block_size)
        return {"bits": bits, "votes": (scales > 0).to(torch.uint8)}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        weights, undecided = [], torch.ones_like(payloads[0]["votes"], dtype=out.dtype)
        for payload in payloads:  # half a vote more for the first voter of every block breaks ties and nothing else
            votes = payload["votes"].to(out.dtype)
            weights.append(votes.addcmul(votes, undecided, value=0.5))
            undecided = undecided.addcmul(undecided, votes, value=-1)
        bits = [payload["bits"] for payload in payloads]
        for_device(out.device).sign_vote(bits, weights, self.block_size, out, add=add)
