"""What the compiler makes of the kernels, with no GPU present: registers, spills, shared memory, instructions, and whether
products overlap.

`python -m attnbench.kernels.portable.inspection` prints it for every tile in use, as lines of JSON; with `--causal` as it
is under a causal mask. `--instructions` disassembles them, and counts what a score costs in the loops.
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
from attnbench.kernels.portable.backward import attnbench_backward, attnbench_dkdv, attnbench_dq
from attnbench.kernels.portable.forward import attnbench_forward
from attnbench.kernels.portable.operands import attnbench_halves, attnbench_magnitudes
from attnbench.kernels.portable.splitting import AT_ONCE, ELEMENTS, FEW, warps_for
from attnbench.kernels.portable.tiles import TILES, WIDTHS, Tile, is_wide, passes

KERNELS = {
    "forward": attnbench_forward,
    "dq": attnbench_dq,
    "dkdv": attnbench_dkdv,
    "short_forward": attnbench_forward,
    "short_backward": attnbench_backward,
}

SPLITTING = {
    "magnitudes": (attnbench_magnitudes, ELEMENTS),
    "halves": (attnbench_halves, ELEMENTS),
    "halves_of_heads": (attnbench_halves, FEW),
}
"""What looks at operands beforehand, by as many rows of every width as make these elements: no tile is chosen for it."""

OPERANDS = {"q", "k", "v", "out", "do", "dq", "dk", "dv", "x", "y"}
FLOATS = {"score_scale", "scale"}
UNSPECIALIZED = {"H", "G", "tiles"}
UNALIGNED = {"kv_magnitudes", "q_do_magnitudes", "of_tiles", "magnitudes", "PRECISION"}
"""Arguments of which the compiler is never told whether 16 divides them; a launch has an empty list for those of the second
kind. With that the compiled kernel is the one that a launch finds in Triton's cache."""
IN_HALVES = {name: {"k", "v"} for name in ("forward", "short_forward")} | {
    name: {"q", "k", "v", "do"} for name in ("dq", "dkdv", "short_backward")
}
"""Operands that a kernel reads as float16 halves, where its precision makes such and it does not split them itself."""


ASYNCHRONOUS_FROM = 90
"""From this capability on, products may overlap with what follows them."""


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of local memory that more would spill to; per program: bytes of shared memory.

    `serialized`: Hopper's tensor cores could work on while a program goes on, but each product is waited for by itself. The
    assembler does that where there are too few registers, or something else may write the sums meanwhile.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool = False


def resources(
    kernel: str, precision: str, head_dim: int, tile: Tile, *, causal: bool = False, capability: int = 90
) -> Resources:
    """Compiles a kernel for tensors whose elements and rows lie side by side, with strides that are multiples of 16.

    Raises what the compiler raises, where the kernel needs more than the GPU has.
    """
    taken: list[tuple[int, int, int, bool]] = []
    for compiled in _compiled(kernel, precision, head_dim, tile, causal, capability):
        told = _ask(knobs.nvidia.cuobjdump.path, "-res-usage", of=compiled)
        found = re.search(r"REG:(\d+) STACK:(\d+)", told)
        if not found:
            raise RuntimeError(f"cuobjdump did not tell what the kernel uses: {told.strip()[:200]}")
        listed = _ask(knobs.nvidia.nvdisasm.path, "-c", of=compiled) if capability >= ASYNCHRONOUS_FROM else ""
        taken.append((int(found[1]), int(found[2]), compiled.metadata.shared, is_serialized(listed)))
    return Resources(*map(max, zip(*taken, strict=True)))


def instructions_a_score(
    kernel: str, precision: str, head_dim: int, tile: Tile, *, causal: bool = False, capability: int = 90
) -> list[float]:
    """How many instructions each loop over tiles issues for a score, the shortest loop first.

    Of a loop within a loop both are there. What a branch leaves out most of the time, such as a mask, is counted.
    """
    scores = tile.queries * tile.keys / (32 * tile.warps)
    bodies = [
        body
        for compiled in _compiled(kernel, precision, head_dim, tile, causal, capability)
        for body in loops(_ask(knobs.nvidia.nvdisasm.path, "-c", of=compiled))
    ]
    return sorted(
        round(len(body) / scores, 2) for body in bodies if any(re.search(r"\bH?G?MMA\b", one) for one in body)
    )


def is_serialized(disassembly: str) -> bool:
    """Whether each product that could be on its way with others has a beginning of its own."""
    products = len(re.findall(r"\bHGMMA\b", disassembly))
    return 0 < products == len(re.findall(r"\bWARPGROUP\.ARRIVE\b", disassembly))


def loops(disassembly: str) -> list[list[str]]:
    """The instructions of each loop: from the label that a branch goes back to, to the branch."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: list[list[str]] = []
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
            branch = re.search(r"\bBRA\b.*?(\.L_\w+)", instructions[-1])
            if branch and branch[1] in labels:
                found.append(instructions[labels[branch[1]] :])
    return found


def _ask(tool: str, *options: str, of: Any) -> str:
    """What a tool of CUDA's says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(of.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _compiled(kernel: str, precision: str, head_dim: int, tile: Tile, causal: bool, capability: int) -> list[Any]:
    """What is launched: one, or two where `dkdv` sums one result at a time."""
    constants = {
        "PRECISION": precision,
        "PARTS": HALVES.get(precision, 0),
        "CAUSAL": causal,
        "NEGATED": False,
        "ALONE": kernel.startswith("short") and not is_wide(precision, head_dim),
        "TOGETHER": False,
        "AHEAD": 0,
        "APART": is_wide(precision, head_dim),
        "PACKED": True,
        "GROUPED": False,
        "SORTED": causal,
        "D": head_dim,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK": tile.queries,
        "BLOCK_D": head_dim,
        "AT_ONCE": AT_ONCE,
        "FOUND": False,
        "WHOLE": kernel == "halves_of_heads",
        "LOG2_D": head_dim.bit_length() - 1,
    }
    options = tile.options()
    target = GPUTarget("cuda", capability, 32)
    which = passes(precision, head_dim) if kernel == "dkdv" else ({},)
    return [
        triton.compile(_source(kernel, constants | one, precision), target=target, options=options) for one in which
    ]


def _source(name_of_kernel: str, constants: dict[str, Any], precision: str) -> ASTSource:
    kernel: Any = KERNELS.get(name_of_kernel) or SPLITTING[name_of_kernel][0]
    own = "bf16" if precision == NATIVE else "fp32"
    in_halves = IN_HALVES.get(name_of_kernel, ()) if constants["PARTS"] and not constants["ALONE"] else ()
    signature: dict[str, str] = {}
    fixed = {name: constants[name] for name in kernel.arg_names if name in constants}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if re.fullmatch(r"stride_.d", name):
            fixed[name] = 1
        if name in fixed:
            signature[name] = "constexpr"
        elif name in OPERANDS:
            signature[name] = "*fp16" if name in in_halves else f"*{own}"
        elif name.endswith("magnitudes") or name == "of_tiles":
            signature[name] = "*i32"
        elif name.endswith("_parts"):
            signature[name] = "*fp16"
        elif name in ("logsumexp", "of_rows"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name in UNALIGNED:
            attributes[(index,)] = []
        elif name not in (*fixed, *FLOATS, *UNSPECIALIZED):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def _told(causal: bool, count: bool, use: tuple[int, str, str, int, Tile]) -> dict[str, Any]:
    capability, kernel, precision, head_dim, tile = use
    asked = (kernel, precision, head_dim, tile)
    row = {"capability": capability, "kernel": kernel, "precision": precision, "head_dim": head_dim} | asdict(tile)
    row |= asdict(resources(*asked, causal=causal, capability=capability))
    if count:
        row["instructions_a_score"] = instructions_a_score(*asked, causal=causal, capability=capability)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, choices=TILES, help="Only the tiles for this one; by default all.")
    parser.add_argument("--causal", action="store_true", help="Kernels with a causal mask.")
    parser.add_argument("--instructions", action="store_true", help="Count those that loops issue for a score.")
    asked = parser.parse_args()
    uses = [
        (capability, *key, width, tile)
        for capability, table in TILES.items()
        if asked.capability in (None, capability)
        for key, tiles in table.items()
        for width, tile in zip(WIDTHS, tiles, strict=False)
    ]
    uses += [
        (capability, kernel, "fp16x3", width, Tile(elements // width, 0, warps_for(elements), 3))  # Triton's own stages
        for capability in TILES
        if asked.capability in (None, capability)
        for kernel, (_, elements) in SPLITTING.items()
        for width in WIDTHS
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for told in pool.map(partial(_told, asked.causal, asked.instructions), uses):
            print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
