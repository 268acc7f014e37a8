"""The Python API, as a user's script calls it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import attnbench

GRID = {"batch": 1, "heads": 2, "seq_len": [16, 32], "d_model": 8}


def test_a_sweep_from_python(tmp_path: Path) -> None:
    result = attnbench.run(GRID, backends=["eager", "sdpa"], device="cpu", budget_s=0.02, out=tmp_path / "run")
    assert result.counts == {"ok": 4}
    assert result.complete
    assert result.exit_code == 0
    frame = result.to_dataframe()
    assert sorted(frame["seq_len"]) == [16, 16, 32, 32]
    assert all(frame["forward_ms"] > 0)
    assert "## float32 (ieee), batch 1, 2 heads, no mask" in result.to_markdown()
    loaded = attnbench.load(tmp_path / "run")
    assert list(loaded.records) == list(result.records)
    assert loaded.header == result.header
    assert len(loaded.header.pulses_ms) == 3 * 4, "one for each visit of a cell"
    pulses = loaded.header.pulses_ms
    assert loaded.header.wander is not None
    assert 0 <= loaded.header.wander <= (max(pulses) - min(pulses)) / (2 * statistics.median(pulses))


def test_bad_requests_raise_one_exception(tmp_path: Path) -> None:
    with pytest.raises(attnbench.RequestError, match=r"grid: seq_len\[0\]: 0 is not"):
        attnbench.run({"seq_len": 0}, out=tmp_path / "run")
    with pytest.raises(attnbench.RequestError, match="preset 'sead' is not known"):
        attnbench.run("sead", out=tmp_path / "run")
    with pytest.raises(attnbench.RequestError, match="does not exist"):
        attnbench.load(tmp_path / "run")


def script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )


MINE = """
    import attnbench, torch

    @attnbench.backend("mine")
    def attention(q, k, v, *, causal, scale):
        return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v
"""


def test_a_decorated_function_in_a_script(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        MINE
        + """
    if __name__ == "__main__":
        grid = attnbench.Grid.from_dict({"batch": 1, "seq_len": 16, "d_model": 8})
        result = attnbench.run(grid, backends=["mine", "eager"], device="cpu", budget_s=0.02, out="run")
        print(result.counts, [record.backend for record in result.records])
    """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'ok': 2}")
    assert "'mine'" in done.stdout


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    done = script(tmp_path, MINE + "\n    attnbench.run({'seq_len': 16}, backends=['mine'], device='cpu', out='run')\n")
    assert done.returncode == 1
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]
