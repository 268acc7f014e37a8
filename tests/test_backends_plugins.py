"""Backends that installed packages offer: found by their entry points, loaded where they run, alone in their faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from attnbench import backends, cli
from attnbench.backends.plugins import refused_plugins
from attnbench.backends.user import plugin_backend
from attnbench.cli import backends as backends_command
from attnbench.errors import RequestError
from conftest import SMALL_GRID, Attnbench, records_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "attnbench_example_backend"


def offer(site: Path, package: str, code: str, **names: str) -> None:
    """Installs a package of one module into a folder: `names` are backends and what in the module they are."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    entries = "".join(f"{name} = {package}:{attribute}\n" for name, attribute in names.items())
    (info / "entry_points.txt").write_text(f"[attnbench.backends]\n{entries}")
    (site / f"{package}.py").write_text(code)


RIGHT = """
import torch

def attention(q, k, v, *, scale):
    return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v

number = 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that commands see."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed into a folder of its own without network."""
    place, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / EXAMPLE.name
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(place), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return place


def test_the_example_is_listed_and_runs(
    installed: Path, attnbench: Attnbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    done = attnbench("backends", "--device", "cpu", "--case", "causal=true", "--json")
    assert done.returncode == 0, done.stderr
    told = {backend["name"]: backend for backend in json.loads(done.stdout)}
    assert told["example-online"]["version"].startswith("attnbench-example-backend 0.1.0, sha256 ")
    assert told["example-online-causal"]["version"] == "attnbench-example-backend 0.1.0"
    assert told["example-online-causal"]["cases"][0]["refused"] is None
    names = ("--backend=example-online", "--backend=example-online-causal", "--backend=eager")
    shape = ("--heads", "4", "--kv-heads", "2", "--kv-len", "300", "--causal", "--dtype", "float32,float16")
    done = attnbench("run", *SMALL_GRID, *shape, *names, "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    found = {(record["backend"], record["dtype"]): record for record in records_of(tmp_path / "run")}
    assert len(found) == 6
    refused = found.pop(("example-online-causal", "float16"))
    assert (refused["status"], refused["reason"]) == ("unsupported", "takes float32, not float16")
    assert [record["status"] for record in found.values()] == ["ok"] * 5
    assert all(record["error_dk"] is not None for record in found.values())


BROKEN = {
    "raises": (
        "raise OSError('libcuda.so.9: cannot open')",
        "importing broken raised OSError: libcuda.so.9: cannot open",
    ),
    "exits": ("raise SystemExit(3)", "importing broken raised SystemExit: 3"),
    "is not there": ("", "there: broken has no 'attention'"),
    "is a number": ("attention = 3", "is neither a function nor a Backend, but int"),
    "takes two": ("def attention(q, k): ...", "its signature is (q, k)"),
    "calls itself otherwise": (
        "from dataclasses import replace\nfrom attnbench.backends import load\nattention = load('eager')",
        "calls itself 'eager'; its two names must be the same",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_with_a_plugin_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    code, reason = BROKEN[fault]
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(RequestError) as error:
        plugin_backend(EntryPoint("slow", "broken:attention", "attnbench.backends"))
    assert str(error.value).startswith("backend 'slow'")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_plugin_costs_its_own_cells_alone(site: Path, attnbench: Attnbench, tmp_path: Path) -> None:
    offer(site, "broken", BROKEN["raises"][0], slow="attention")
    offer(site, "deadly", "import os; os.abort()", dies="attention")
    names = ("--backend=slow", "--backend=dies", "--backend=eager")
    done = attnbench("run", *SMALL_GRID, *names, "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    found = {record["backend"]: record for record in records_of(tmp_path / "run")}
    assert {name: record["status"] for name, record in found.items()} == {
        "slow": "unsupported", "dies": "unsupported", "eager": "ok",
    }  # fmt: skip
    assert "importing broken raised OSError: libcuda.so.9" in found["slow"]["reason"]
    assert "loading it failed: the worker process ended with SIGABRT" in found["dies"]["reason"]


def test_plugins_run_where_nobody_names_a_backend_and_names_that_are_taken_are_refused(
    site: Path, attnbench: Attnbench
) -> None:
    offer(site, "greedy", RIGHT, quick="attention", eager="attention", twice="attention", all="attention")
    offer(site, "rival", RIGHT, twice="attention")
    done = attnbench("run", *SMALL_GRID, "--backend=twice")
    assert done.returncode == 2
    assert done.stderr.startswith("attnbench: backend 'twice' is offered by ")
    assert "greedy:attention" in done.stderr
    assert "rival:attention" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = attnbench("plan", *SMALL_GRID, "--device", "cuda", "--backend", "quick")
    assert done.returncode == (0 if torch.cuda.is_available() else 2)
    assert torch.cuda.is_available() or "sees 0 CUDA GPUs; try --device cpu" in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    plan = json.loads(attnbench("plan", *SMALL_GRID, "--json").stdout)
    assert {"quick", "eager"} <= {cell["backend"] for cell in plan["cells"]}
    assert "is offered by" in plan["left_out"]["twice"]
    assert "of greedy 1.0 is refused: a name is not empty" in plan["left_out"]["all"]
    assert plan["left_out"]["eager"] == (
        "of greedy 1.0 is refused: attnbench has one of that name; call it by its place: greedy:attention"
    )


def test_a_refused_name_is_told_where_backends_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "refused_plugins", lambda: {"eager": "of greedy 1.0 is refused: it is taken"})
    monkeypatch.setattr(backends_command, "describe", lambda *_: {"backends": []})
    cli.cli.main(["backends", "--device", "cpu"], standalone_mode=False)
    assert capsys.readouterr().err == "attnbench: backend 'eager' of greedy 1.0 is refused: it is taken\n"
    assert refused_plugins() == {}


def test_a_decorated_function_cannot_have_a_plugins_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "plugins", lambda: {"quick": None})
    with pytest.raises(RequestError, match="taken or malformed"):
        backends.backend("quick")(offer)


def test_nothing_of_a_plugin_is_loaded_outside_its_worker(site: Path) -> None:
    offer(site, "loud", "raise SystemExit('loaded')", quick="attention")
    code = "from attnbench import backends; backends.check_name('quick'); print(backends.every()[-1])"
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "quick"), done.stderr
