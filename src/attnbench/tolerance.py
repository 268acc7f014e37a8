"""How far from float64 a result may be. Knows no framework."""

from __future__ import annotations

TOLERANCE: dict[tuple[str, str], float] = {
    ("float64", "ieee"): 1e-12,
    ("float32", "ieee"): 3e-5,
    ("float32", "tf32"): 1e-2,
    ("float16", "ieee"): 1e-2,
    ("bfloat16", "ieee"): 6e-2,
}
"""Largest error of a row (`attnbench.reference`) that passes, by dtype and precision: a few times what right
implementations show (docs/method.md has the measurements), and well under 1, which is what a row of garbage shows."""
