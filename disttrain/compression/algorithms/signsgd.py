"""signSGD: the majority vote of the ranks' signs (Bernstein et al. 2018, arXiv:1802.04434, 1810.05291)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import Feedback, for_device


class SignSGD(FusedCodec):
    """Send one bit an entry, and return the sign of the vote, +1 or -1, instead of the mean.

    A minority of faulty ranks cannot change an entry on which the others agree. The magnitude is lost, so the
    learning rate is that of sign descent, as for Adam (authors: 1e-4). There is no error feedback, since the vote does
    not approximate the mean (``efsign`` does).

    The sign of zero is plus, and a block of zeros abstains, so that parameters without gradients do not move. In a tie
    the first rank that votes decides: one bit has no third value, and a constant would make parameters drift. Wire: 1/8
    byte an entry and a byte a block; in two stages for any number of ranks.
    """

    name = "signsgd"

    error_feedback: Literal[False] = Field(default=False, description="always false: a vote has no error to feed back")
    mean_bits: None = Field(default=None, description="always null: the result of a vote has one bit")
    block_size: int = Field(default=512, ge=8, multiple_of=8, description="entries that abstain together")

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        bits, scales = for_device(grad.device).sign(grad, feedback, self.block_size)
        return {"bits": bits, "votes": (scales > 0).to(torch.uint8)}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        weights, undecided = [], torch.ones_like(payloads[0]["votes"], dtype=out.dtype)
        for payload in payloads:  # the first voter of every block has 1.5 votes, which only breaks ties
            votes = payload["votes"].to(out.dtype)
            weights.append(votes.addcmul(votes, undecided, value=0.5))
            undecided = undecided.addcmul(undecided, votes, value=-1)
        bits = [payload["bits"] for payload in payloads]
        for_device(out.device).sign_vote(bits, weights, self.block_size, out, add=add)
