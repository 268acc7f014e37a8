"""What the compiler makes of the kernels, with no GPU present: registers, spills and shared memory.

`python -m attnbench.kernels.portable.inspection` prints it for every tile in use, as lines of JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnbench.kernels.portable.arithmetic import HALVES, NATIVE
from attnbench.kernels.portable.backward import attnbench_dkdv, attnbench_dq
from attnbench.kernels.portable.forward import attnbench_forward
from attnbench.kernels.portable.tiles import HOPPER, WIDTHS, Tile

KERNELS = {"forward": attnbench_forward, "dq": attnbench_dq, "dkdv": attnbench_dkdv}

OPERANDS = {"q", "k", "v", "out", "do", "dq", "dk", "dv"}
FLOATS = {"score_scale", "scale"}
UNKNOWN = {"H", "G", "kv_magnitudes", "q_do_magnitudes"}
"""Arguments of which the compiler is never told whether 16 divides them."""
STREAMED = {"attnbench_forward": {"k", "v"}, "attnbench_dq": {"k", "v"}, "attnbench_dkdv": {"q", "do"}}
"""Operands that a kernel reads as float16 halves, where its precision makes such."""


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes spilled to local memory; per program: bytes of shared memory."""

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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(compiled.asm["ptx"])
        told = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{capability}{'a' * (capability >= 90)}", file, "-o", file.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = int(_found(r"Used (\d+) registers", told))
    spilled = int(_found(r"(\d+) bytes spill stores", told)) + int(_found(r"(\d+) bytes spill loads", told))
    return Resources(registers, spilled, compiled.metadata.shared)


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
        elif name in ("logsumexp", "delta"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name not in (*fixed, *FLOATS, *UNKNOWN):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise RuntimeError(f"ptxas did not tell {pattern!r}: {text.strip()[:200]}")
    return match[1]


def _told(use: tuple[str, str, int, Tile]) -> dict[str, Any]:
    kernel, precision, head_dim, tile = use
    return {"kernel": kernel, "precision": precision, "head_dim": head_dim} | asdict(tile) | asdict(resources(*use))


def main() -> None:
    uses = [(*key, width, tile) for key, tiles in HOPPER.items() for width, tile in zip(WIDTHS, tiles, strict=True)]
    with ProcessPoolExecutor(max_workers=2) as pool:
        for told in pool.map(_told, uses):
            print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
