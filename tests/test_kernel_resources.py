"""The kernels compiled for GPUs that need not be there: what they take of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
"""What one program may have of a multiprocessor, on the least of the GPUs that a table is for."""

SERIALIZED = {90: {("forward", "native", 16), ("forward", "native", 32), ("forward", "fp16x1", 16)}, 80: set[object]()}
"""Where each product is waited for, since with so few registers another program shares a multiprocessor, which was worth more."""


# A kernel with a causal mask has the loops without it too; where none has been timed, a minute of compiling is saved.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "mask"),
    [(90, ()), (90, ("--causal",)), (80, ("--causal",))],
    ids=["9.0", "9.0 causal", "8.0 causal"],
)
def test_no_tile_spills_registers_or_asks_for_more_shared_memory_than_there_is(
    capability: int, mask: tuple[str, ...]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.portable.inspection", "--capability", str(capability), *mask]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 105
    assert not [one for one in compiled if one["spilled_bytes"]]
    serialized = {(one["kernel"], one["precision"], one["head_dim"]) for one in compiled if one["serialized"]}
    assert serialized == SERIALIZED[capability]
    assert all(0 < one["registers"] <= 255 for one in compiled)
    assert all(one["shared_bytes"] <= SHARED_BYTES[capability] for one in compiled)
