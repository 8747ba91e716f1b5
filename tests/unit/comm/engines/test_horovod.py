"""Conditions under which Horovod would crash are errors before it starts."""

from __future__ import annotations

import socket

import pytest
import torch

from disttrain.comm.engines.horovod import HorovodCommunicator
from disttrain.comm.launch.environment import detect
from disttrain.errors import UserError


def test_a_host_name_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("horovod")

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, f"Name or service not known: {name}")

    monkeypatch.setattr(socket, "gethostname", lambda: "pod-17")
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")  # so that monkeypatch restores it
    with pytest.raises(UserError, match=r"'pod-17', has no address.*'127\.0\.1\.1 pod-17' to /etc/hosts"):
        HorovodCommunicator(detect({}), torch.device("cpu"))
