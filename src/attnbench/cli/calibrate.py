"""`attnbench calibrate`: the rates of a device."""

from __future__ import annotations

import json
from typing import Any

import click

from attnbench import calibration, machine
from attnbench.cli.console import show
from attnbench.report.tables import Table, markdown_table
from attnbench.request import parse_device


@click.command("calibrate")
@click.option("--device", metavar="cpu|cuda|cuda:N", help="Default: the best one here.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def command(device: str | None, as_json: bool) -> None:
    """Measures this device's ceilings anew: memory, matrix products, exponentials, a launch. Runs use them from then on."""
    device = parse_device(device) if device is not None else machine.best_device()
    found = calibration.ceilings(device, anew=True)
    show(json.dumps({"device": device} | found, indent=1) if as_json else ceilings_text(found, device))


def ceilings_text(found: dict[str, Any], device: str) -> str:
    """The rates that a calibration found."""
    rates = [
        ("copy, bytes read and written", found["copy_bytes_per_s"], 1e9, "GB/s"),
        ("read", found["read_bytes_per_s"], 1e9, "GB/s"),
        *((f"matrix product, {name}", rate, 1e12, "TFLOP/s") for name, rate in found["matmul_flop_per_s"].items()),
        ("exponentials", found["exp_per_s"], 1e9, "G/s"),
        ("one launch", found["launch_ms"], 1e-3, "µs"),
    ]
    rows = [[what, f"{rate / unit:.4g}", name] for what, rate, unit, name in rates if rate]
    took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
    return f"Ceilings of {device}, measured{took}:\n{markdown_table(Table(['rate', 'highest', 'unit'], rows))}"
