"""Workarounds of upstream versions."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from stoker import compat


def test_an_older_fully_shard_makes_parameters_of_bytes_without_a_gradient(monkeypatch):
    monkeypatch.setattr(compat, "shares_bytes", lambda: False)
    with compat.bytes_may_be_shared():
        made = _fsdp_param.nn.Parameter(torch.zeros(4, dtype=torch.uint8))
        assert isinstance(made, nn.Parameter)
        assert not made.requires_grad
        assert _fsdp_param.nn.Parameter(torch.zeros(4)).requires_grad
        assert not _fsdp_param.nn.Parameter(torch.zeros(4), requires_grad=False).requires_grad
        assert _fsdp_param.nn.Module is nn.Module
    assert _fsdp_param.nn is nn


def test_a_newer_one_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat, "shares_bytes", lambda: True)
    with compat.bytes_may_be_shared():
        assert _fsdp_param.nn is nn
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(torch.zeros(4, dtype=torch.uint8))


@pytest.mark.parametrize(("version", "known"), [("2.11.0+cu130", False), ("2.12.1", False), ("2.13.0+cpu", True)])
def test_the_version_decides(monkeypatch, version, known):
    monkeypatch.setattr(torch, "__version__", version)
    assert compat.shares_bytes() is known
