"""The kernels compiled for GPUs that need not be there: what they take of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
"""What one program may have of a multiprocessor, on the least of the GPUs that a table is for."""

SPILL = {("dq", "ieee", 256)}
"""Full float32 products of such heads need more registers than there are, whatever the tile."""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "attnbench.kernels.portable.inspection"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_no_tile_spills_registers_or_asks_for_more_shared_memory_than_there_is(
    told: list[dict[str, Any]], capability: int
) -> None:
    compiled = [one for one in told if one["capability"] == capability]
    assert len(compiled) == 75
    spilling = {(one["kernel"], one["precision"], one["head_dim"]) for one in compiled if one["spilled_bytes"]}
    assert spilling == SPILL, "a list of what spills that can both grow and shrink"
    assert all(0 < one["registers"] <= 255 for one in compiled)
    assert all(one["shared_bytes"] <= SHARED_BYTES[capability] for one in compiled)
