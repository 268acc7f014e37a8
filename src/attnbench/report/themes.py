"""How charts look: colours, dashes and shapes of backends, and what stands around them on each background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that differ without colour vision (Okabe and Ito), without the yellow and the black that a background hides."""

DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (8, 3, 2, 3, 2, 3))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left")
"""Backend i has colour i and shape i, each going round, and another dash each time the colours have gone round."""

NEUTRAL = "#7a828e"


_FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"


@dataclass(frozen=True)
class Palette:
    """The colours of a background and of what is written on it; None lets through what lies behind."""

    background: str | None
    text: str
    muted: str
    grid: str
    ramp: tuple[str, ...]
    on_ramp: tuple[str, str]


_BLUES = ("#eef4fa", "#bcd7ee", "#74b0dc", "#1f6fb0", "#0a3f73")
_BLUES_ON_DARK = ("#1a2430", "#1d4164", "#20609a", "#5aa9e0", "#c4e3fb")

THEMES = {
    "paper": Palette("white", "#1b1f24", "#59636e", "#e3e6ea", _BLUES, ("#1b1f24", "#ffffff")),
    "light": Palette(None, "#1b1f24", "#59636e", "#e6e9ed", _BLUES, ("#1b1f24", "#ffffff")),
    "dark": Palette(None, "#e6e9ed", "#9aa4b0", "#2d333b", _BLUES_ON_DARK, ("#e6e9ed", "#0b0f14")),
}
"""`ramp` shows small to large; what is written on its two ends is `on_ramp`."""


def config(theme: str) -> dict[str, Any]:
    """Vega-Lite's `config` for a background: small type, thin lines, no frame."""
    palette = THEMES[theme]
    type_ = {"labelFont": _FONT, "titleFont": _FONT, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 500}
    return {
        "background": palette.background,
        "font": _FONT,
        "view": {"stroke": None},
        "axis": type_ | {"labelColor": palette.muted, "titleColor": palette.text, "gridColor": palette.grid,
                 "domainColor": palette.grid, "tickColor": palette.grid, "tickSize": 4, "labelPadding": 4, "titlePadding": 8},
        "legend": type_ | {"labelColor": palette.text, "symbolSize": 70, "symbolStrokeWidth": 2, "labelLimit": 260},
        "header": type_ | {"labelColor": palette.text, "labelFontWeight": 600, "labelFontSize": 12, "labelPadding": 6},
        "title": {"color": palette.text, "subtitleColor": palette.muted, "font": _FONT, "subtitleFont": _FONT,
                  "anchor": "start", "fontSize": 14, "fontWeight": 600, "subtitleFontSize": 12, "offset": 14},
        "range": {"heatmap": list(palette.ramp), "ordinal": list(palette.ramp)},
        "style": {
            name: {"color": colour, "fill": colour}
            for name, colour in (("muted", palette.muted), ("small", palette.on_ramp[0]), ("large", palette.on_ramp[1]))
        },
        "text": {"font": _FONT, "fontSize": 10},
    }  # fmt: skip
