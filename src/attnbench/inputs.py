"""From a case to its tensors: the only maker of inputs."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from attnbench.case import Case


class Inputs(NamedTuple):
    """q, do: (batch, heads, seq_len, d_model); k, v: (batch, kv_heads, kv_len, d_model); `do` is the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


def make_inputs(case: Case, device: torch.device, seed: int, *, requires_grad: bool = True) -> Inputs:
    """Random normal tensors, the same for the same case, seed and device type, whichever backend they are for."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{case.id}".encode()))
    query = (case.batch, case.heads, case.seq_len, case.d_model)
    key = (case.batch, case.kv_heads, case.kv_len, case.d_model)
    dtype = getattr(torch, case.dtype)
    q, k, v, do = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in (query, key, key, query)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_(requires_grad)
    return Inputs(q, k, v, do)
