"""Writes the tables of docs/backends.md from the backends' own data: python docs/support.py"""

from __future__ import annotations

from pathlib import Path

import attnbench
from attnbench import backends
from attnbench.backends import Backend, Support
from attnbench.backends.packages import PACKAGES
from attnbench.report.tables import Table, markdown_table

DOCS = Path(__file__).parent
PAGE, RESULTS = DOCS / "backends.md", DOCS.parent / "results"
HEADER = [
    "backend", "on", "dtypes", "head dimension", "kernels for", "causal", "kv_len ≠ seq_len", "no key seen", "grouped",
    "backward", "capability",
]  # fmt: skip
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def support_table() -> str:
    """A row for each backend and type of device; one for both where they take the same."""
    rows = []
    for name in backends.BUILTIN:
        backend = backends.load(name)
        on = {device.upper() if device == "cpu" else "CUDA": support for device, support in backend.support.items()}
        if len(on) == 2 and len(set(on.values())) == 1:
            on = {"CPU, CUDA": on["CPU"]}
        rows += [[f"`{name}`", device, *_row(support)] for device, support in on.items()]
    return markdown_table(Table(HEADER, rows))


def _row(support: Support) -> list[str]:
    unequal = {(True, True): "yes", (True, False): "no mask", (False, False): "–"}
    return [
        _dtypes(support.dtypes),
        support.head_dims.words,
        ", ".join(map(str, support.head_dims.kernels)) or "–",
        "alone" if not support.full else _yes(support.causal),
        unequal[support.unequal, support.causal_unequal],
        _dtypes(support.blind) if support.causal_unequal and support.blind else "–",
        _yes(support.grouped),
        _yes(support.backward),
        support.capabilities,
    ]


def _dtypes(names: tuple[str, ...]) -> str:
    return "all" if set(names) == set(SHORT) else ", ".join(SHORT[name] for name in names)


def _yes(value: bool) -> str:
    return "yes" if value else "–"


def package_table() -> str:
    """What to install for which backend, and whether a published run has measured it."""
    seen = measured()
    rows = []
    for name, entry in backends.BUILTIN.items():
        backend: Backend = backends.load(name)
        package = PACKAGES.get(entry.package)
        when = "when named" if entry.when_named else "by default"
        rows.append([
            f"`{name}`", backend.about, f"`{package.name}`" if package else "", when, "yes" if name in seen else "not yet",
        ])  # fmt: skip
    return markdown_table(Table(["backend", "what it is", "package", "runs", "measured in `results/`"], rows))


def measured() -> set[str]:
    """The backends of which a published run has a record that is `ok`."""
    runs = [attnbench.load(directory) for directory in sorted(RESULTS.iterdir()) if (directory / "run.json").is_file()]
    return {record.backend for run in runs for record in run.records if record.status == "ok"}


TABLES = {"support": support_table, "packages": package_table}


def written(page: str) -> str:
    """The page with each table renewed between its markers. Raises `ValueError` where a marker is missing."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name}: written by docs/support.py -->\n", f"<!-- end of {name} -->"
        first = page.index(start) + len(start)
        page = page[:first] + make() + "\n" + page[page.index(end, first) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
