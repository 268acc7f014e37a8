"""The kernels compiled for a Hopper GPU, which need not be there: what they take of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = 227 << 10
"""What one program may have of a Hopper multiprocessor."""

SPILL = {("dq", "ieee", 256)}
"""Full float32 products of such heads need more registers than there are, whatever the tile."""


@pytest.mark.timeout(600)
def test_no_tile_spills_registers_or_asks_for_more_shared_memory_than_there_is() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "attnbench.kernels.portable.inspection"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 75
    spilling = {(one["kernel"], one["precision"], one["head_dim"]) for one in told if one["spilled_bytes"]}
    assert spilling == SPILL, "a list of what spills that can both grow and shrink"
    assert all(0 < one["registers"] <= 255 for one in told)
    assert all(one["shared_bytes"] <= SHARED_BYTES for one in told)
