"""What the compiler makes of the kernels, with no GPU present: registers, spills and shared memory.

`python -m attnbench.kernels.portable.inspection` prints it for every tile in use, as lines of JSON; with `--causal` as it
is under a causal mask.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnbench.kernels.portable.arithmetic import HALVES, NATIVE
from attnbench.kernels.portable.backward import attnbench_dkdv, attnbench_dq
from attnbench.kernels.portable.forward import attnbench_forward
from attnbench.kernels.portable.tiles import TILES, WIDTHS, Tile

KERNELS = {"forward": attnbench_forward, "dq": attnbench_dq, "dkdv": attnbench_dkdv}

OPERANDS = {"q", "k", "v", "out", "do", "dq", "dk", "dv"}
FLOATS = {"score_scale", "scale"}
UNSPECIALIZED = {"H", "G"}
UNALIGNED = {"kv_magnitudes", "q_do_magnitudes", "PRECISION"}
"""Arguments of which the compiler is never told whether 16 divides them; a launch has an empty list for those of the second
kind. With that the compiled kernel is the one that a launch finds in Triton's cache."""
STREAMED = {"attnbench_forward": {"k", "v"}, "attnbench_dq": {"k", "v"}, "attnbench_dkdv": {"q", "do"}}
"""Operands that a kernel reads as float16 halves, where its precision makes such."""


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of local memory that more would spill to; per program: bytes of shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def resources(
    kernel: str, precision: str, head_dim: int, tile: Tile, *, causal: bool = False, capability: int = 90
) -> Resources:
    """Compiles a kernel for tensors whose elements lie side by side and whose strides are multiples of 16.

    Raises what the compiler raises, where the kernel needs more than the GPU has.
    """
    constants = {
        "PRECISION": precision,
        "PARTS": HALVES.get(precision, 0),
        "CAUSAL": causal,
        "NEGATED": False,
        "D": head_dim,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_D": head_dim,
        "LOG2_D": head_dim.bit_length() - 1,
    }
    function = KERNELS[kernel]
    source = _source(function, {name: constants[name] for name in function.arg_names if name in constants}, precision)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile.warps, "num_stages": tile.stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if not found:
        raise RuntimeError(f"cuobjdump did not tell what the kernel uses: {told.strip()[:200]}")
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared)


def _source(kernel: Any, constants: dict[str, Any], precision: str) -> ASTSource:
    own = "bf16" if precision == NATIVE else "fp32"
    streamed = STREAMED[kernel.__name__] if constants["PARTS"] else ()
    signature: dict[str, str] = {}
    fixed = dict(constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if re.fullmatch(r"stride_.d", name):
            fixed[name] = 1
        if name in fixed:
            signature[name] = "constexpr"
        elif name in OPERANDS:
            signature[name] = "*fp16" if name in streamed else f"*{own}"
        elif name.endswith("_magnitudes"):
            signature[name] = "*i32"
        elif name in ("logsumexp", "of_rows"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name in UNALIGNED:
            attributes[(index,)] = []
        elif name not in (*fixed, *FLOATS, *UNSPECIALIZED):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def _told(causal: bool, use: tuple[int, str, str, int, Tile]) -> dict[str, Any]:
    capability, kernel, precision, head_dim, tile = use
    found = resources(kernel, precision, head_dim, tile, causal=causal, capability=capability)
    row = {"capability": capability, "kernel": kernel, "precision": precision, "head_dim": head_dim}
    return row | asdict(tile) | asdict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, choices=TILES, help="Only the tiles for this one; by default all.")
    parser.add_argument("--causal", action="store_true", help="Kernels with a causal mask.")
    asked = parser.parse_args()
    uses = [
        (capability, *key, width, tile)
        for capability, table in TILES.items()
        if asked.capability in (None, capability)
        for key, tiles in table.items()
        for width, tile in zip(WIDTHS, tiles, strict=True)
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for told in pool.map(partial(_told, asked.causal), uses):
            print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
