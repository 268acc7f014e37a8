"""Time against seq_len for every backend of a run: python docs/plot.py RUN D_MODEL OUT.svg (needs matplotlib)."""

from __future__ import annotations

import sys

import matplotlib

import attnbench

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "attnbench"  # the same picture from the same run
import matplotlib.pyplot as plt  # noqa: E402

STYLES = [(colour, marker) for marker in "os^" for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")]
"""Colours that differ without colour vision (Okabe and Ito), by markers where they repeat."""


def main(directory: str, d_model: int, out: str) -> None:
    records = [record for record in attnbench.load(directory).records if record.d_model == d_model]
    backends = attnbench.load(directory).header.request["backends"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, ("forward", "backward"), strict=True):
        for backend, (colour, marker) in zip(backends, STYLES, strict=False):
            shown = sorted(
                (record.seq_len, getattr(record, f"{name}_ms"))
                for record in records
                if record.backend == backend and record.status == "ok"
            )
            if shown:
                panel.loglog(*zip(*shown, strict=True), color=colour, marker=marker, markersize=4, label=backend)
        panel.set(title=f"{name}, d_model {d_model}", xlabel="seq_len")
        panel.set_xticks(lengths := sorted({record.seq_len for record in records}), [str(n) for n in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    panels[1].legend(fontsize=8, loc="upper left")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
