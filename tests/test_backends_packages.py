"""Adapters of packages that need a GPU, against stand-ins of the real signatures; packages that are absent or broken."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import standins
from attnbench import backends
from attnbench.backends import Ask
from attnbench.backends.packages import PACKAGES, Package, _absent
from attnbench.inputs import make_inputs
from attnbench.measure.call import make_call
from attnbench.reference import compare, reference
from conftest import SMALL_GRID, Attnbench, records_of, small
from test_backends import SHAPES

CPU = torch.device("cpu")
PACKAGED = [name for name, entry in backends.BUILTIN.items() if entry.package and entry.package != "jax"]
LEAVE_OUT = ("odd sizes", "one of each", "float64")  # which hardly any of them takes


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in LEAVE_OUT])
def test_an_adapter_is_right_where_it_takes_a_case(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch)
    case = small(**{"batch": 2, "d_model": 64} | SHAPES[shape])
    if case.dtype == "float32":
        case = replace(case, dtype="float16")
    backend = backends.load(name)
    backward = backend.support["cuda"].backward and backend.refuses(Ask(case, "cuda")) is None
    if reason := backend.refuses(Ask(case, "cuda", backward)):
        assert case.masked_rows, reason
        return
    inputs = make_inputs(case, CPU, 0, requires_grad=backward)
    call = make_call(backend, backend.build(case), inputs)
    result = call.forward()
    out = call.output(result)
    assert out.shape == inputs.q.shape
    grads = call.gradients(call.backward(result)) if backward else None
    errors = compare(case, reference(case, inputs, backward=backward), out, grads)
    assert errors.complaint is None, errors
    again = call.forward()
    assert torch.equal(call.output(again), out)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_deterministic_variant_asks_for_it_and_the_other_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch)
    case = small(dtype="float16", d_model=64)
    backend = backends.load(name)
    call = make_call(backend, backend.build(case), make_inputs(case, CPU, 0))
    if backend.support["cuda"].backward:
        call.backward(call.forward())
    assert all(switch["deterministic"] == name.endswith("-deterministic") for switch in standins.asked)
    assert bool(standins.asked) == name.startswith(("flash-attn", "cudnn"))


REFUSALS = [
    ("flash-attn-2", {"dtype": "float32"}, (9, 0), "takes float16 and bfloat16, not float32"),
    ("flash-attn-2", {"d_model": 264}, (9, 0), "up to 256, not 264"),
    ("flash-attn-2", {}, (7, 5), "needs a GPU of compute capability 8.0 or more, and this one has 7.5"),
    ("flash-attn-3", {}, (10, 0), "below 10.0, and this one has 10.0"),
    ("flash-attn-3", {"d_model": 12}, (9, 0), "multiples of 8, not 12"),
    ("flash-attn-3-deterministic", {"d_model": 256}, (9, 0), "deterministic backward for head dimensions up to 192"),
    ("flash-attn-4", {"d_model": 192}, (10, 0), "up to 128, and 256, on this GPU, not 192"),
    ("flash-attn-4", {}, (8, 0), "needs a GPU of compute capability 9.0"),
    ("flash-attn-4-deterministic", {}, (12, 0), "no deterministic backward on this GPU"),
    ("xformers", {"causal": True, "kv_len": 20, "dtype": "float32"}, (9, 0), "44 queries see no key"),
    ("xformers", {"kv_heads": 1}, (9, 0), "in the forward alone"),
    ("xformers", {"d_model": 12}, (9, 0), "multiples of 8, not 12"),
    ("xformers", {"dtype": "float64"}, (9, 0), "not float64"),
    ("transformer-engine", {"dtype": "float64"}, (9, 0), "not float64"),
    ("flashinfer", {"d_model": 64}, (9, 0), "has no backward on CUDA; ask for the forward alone"),
    ("flashinfer", {"d_model": 32}, (9, 0), "takes head dimensions 64, 128 and 256, not 32"),
    ("cudnn-frontend", {"d_model": 248}, (9, 0), "No valid engine configs"),
]


@pytest.mark.parametrize(("name", "changes", "capability", "reason"), REFUSALS)
def test_what_a_package_does_not_take_has_its_reason(
    name: str, changes: dict[str, object], capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.install(monkeypatch)
    refusal = backends.load(name).refuses(Ask(small(**{"dtype": "float16"} | changes), "cuda", True, capability))
    assert reason in str(refusal)
    assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("name", "d_model", "padded"),
    [("flash-attn-2", 16, 32), ("flash-attn-2", 64, None), ("flash-attn-2", 160, 192), ("flash-attn-3", 16, 64)],
)
def test_padding_is_known(name: str, d_model: int, padded: int | None) -> None:
    assert backends.load(name).padded_d_model(Ask(small(d_model=d_model), "cuda")) == padded


def test_xformers_without_its_compiled_part_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch)
    assert backends.load("xformers").lacks("cuda") is None
    problem = RuntimeError("xFormers can't load C++/CUDA extensions.")
    problem.__cause__ = OSError("libcudart.so.12: cannot open shared object file\nmore")
    monkeypatch.setattr(sys.modules["xformers._cpp_lib"], "_cpp_library_load_exception", problem)
    reason = backends.load("xformers").lacks("cuda")
    assert str(reason).endswith(
        "what is compiled in it was not loaded: libcudart.so.12: cannot open shared object file; "
        "pip install nvidia-cuda-runtime-cu12"
    )
    problem.__cause__ = OSError("undefined symbol: x")
    assert str(backends.load("xformers").lacks("cuda")).endswith("was not loaded: undefined symbol: x")


# --- packages that are not here, or do not work -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGED)
def test_an_absent_package_is_told_with_how_to_get_it(name: str) -> None:
    package = PACKAGES[backends.BUILTIN[name].package]
    if package.absent() is None:
        pytest.skip("it is installed here")
    assert backends.load(name).unavailable("cuda") == f"package {package.name} is not installed; {package.install}"
    assert backends.worker_of(name) == "", "no process is started for what is not here"


def put(site: Path, module: str, code: str, version: str = "1.0") -> Package:
    """A package of one module on the path, with what pip leaves beside it."""
    file = site.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    info = site / f"{module.partition('.')[0]}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.partition('.')[0]}\nVersion: {version}\n")
    return Package(module, (module.partition(".")[0],), "pip install it", "2.4", brings="attend")


@pytest.mark.parametrize(
    ("code", "version", "absent", "broken"),
    [
        ("attend = 1", "2.10.1.post3", None, None),
        ("attend = 1", "2.3", "needs standin 2.4 or newer, and 2.3 is installed; pip install it", None),
        ("", "3", None, "standin.ops has no attend: what it is compiled in was not loaded"),
        ("raise ImportError('libcudart.so.11: cannot\\nmore')", "3", None,
         "importing standin.ops raised ImportError: libcudart.so.11: cannot"),
        ("raise SystemExit", "3", None, "importing standin.ops raised SystemExit"),
    ],
)  # fmt: skip
def test_a_package_is_looked_at_before_it_is_imported(
    code: str, version: str, absent: str | None, broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    _absent.cache_clear()
    for name in ("standin", "standin.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package = put(tmp_path, "standin.ops", code, version)
    assert package.absent() == absent
    assert package.broken() == broken
    assert package.version() == f"standin {version}"


def test_a_library_that_no_loader_finds_is_taken_from_nvidias_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of xFormers, built for CUDA 12, beside a PyTorch built for CUDA 13."""
    wanted, here, loaded = "libcudart.so.12", {"libcudart.so.13"}, []

    def load(name: str) -> None:
        if name not in here:
            raise OSError(f"{name}: cannot open shared object file")
        loaded.append(name)

    monkeypatch.setattr("attnbench.backends.packages.ctypes.CDLL", load)
    monkeypatch.syspath_prepend(tmp_path)
    package = replace(put(tmp_path, "linked.ops", "attend = 1"), library=wanted)
    assert package.broken() is None, "whatever is missing, it is the package that says so"
    assert not loaded
    brought = tmp_path / "nvidia" / "cuda_runtime" / "lib" / wanted
    brought.parent.mkdir(parents=True)
    brought.touch()
    here.add(str(brought))
    package.load()
    assert loaded == [str(brought)]
    here.add(wanted)
    package.load()
    assert loaded == [str(brought), wanted]


def test_a_package_that_takes_half_of_another_for_the_whole_is_not_shown_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As xFormers imports flash_attn.flash_attn_interface wherever there is a flash_attn, be it version 4's alone."""
    monkeypatch.syspath_prepend(tmp_path)
    looks = "from importlib.util import find_spec\nif find_spec('half'):\n    import half.other"
    picky = replace(put(tmp_path, "picky.ops", f"{looks}\nattend = 1"), takes_for_whole="half.other")
    put(tmp_path, "half.cute", "")
    assert str(replace(picky, takes_for_whole="").broken()).startswith("importing picky.ops raised ModuleNotFoundError")
    assert picky.broken() is None
    assert importlib.import_module("half.cute") is importlib.import_module("half").cute, "and it is there again"
    for module in ("picky", "picky.ops"):
        del sys.modules[module]
    put(tmp_path, "half.other", "seen = True")
    importlib.invalidate_caches()
    assert picky.broken() is None
    assert sys.modules["half.other"].seen


def test_a_part_of_a_package_is_not_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 lies in a folder of flash-attn's name; neither is the other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "standin" / "cute").mkdir(parents=True)
    assert Package("standin.cute", ("standin-4",), "").absent() is None
    assert Package("standin.interface", ("standin-2",), "pip").absent() == "package standin-2 is not installed; pip"


BROKEN = {
    "flash_attn/flash_attn_interface.py": "raise ImportError('libcudart.so.11.0: cannot open shared object file')",
    "flash_attn/__init__.py": "",
    "flashinfer/__init__.py": "import os; os.abort()",
}


def test_a_broken_package_costs_its_own_cells_alone(
    attnbench: Attnbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU its device comes first, so its row there is lent to the adapter by a site of its own."""
    site = tmp_path / "site"
    for file, code in BROKEN.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(code)
    (site / "sitecustomize.py").write_text(LENDS_A_CPU)
    monkeypatch.setenv("PYTHONPATH", str(site))
    names = ("flash-attn-2", "flash-attn-2-deterministic", "flashinfer", "xformers", "eager")
    done = attnbench("run", *SMALL_GRID, *(f"--backend={name}" for name in names), "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    found = {record["backend"]: record for record in records_of(tmp_path / "run")}
    assert found["eager"]["status"] == "ok"
    assert {found[name]["status"] for name in names[:-1]} == {"unsupported"}
    for name in names[:2]:
        assert found[name]["reason"] == (
            "importing flash_attn.flash_attn_interface raised ImportError: libcudart.so.11.0: cannot open shared object file"
        )
    assert "loading it failed: the worker process ended with SIGABRT" in found["flashinfer"]["reason"]
    assert found["xformers"]["reason"].startswith("package xformers is not installed")


LENDS_A_CPU = """
import sys
from importlib.abc import MetaPathFinder

class Lender(MetaPathFinder):
    \"\"\"Where attnbench's adapters are loaded, says of each that it serves a CPU, too.\"\"\"

    def find_spec(self, name, path, target=None):
        if name not in ("attnbench.backends.flash_attn", "attnbench.backends.packaged"):
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec
        spec = find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            for backend in module.BACKENDS.values():
                backend.support["cpu"] = backend.support["cuda"]
        spec.loader.exec_module = exec_module
        sys.meta_path.insert(0, self)
        return spec

sys.meta_path.insert(0, Lender())
"""


def test_cudnn_is_asked_whether_it_has_a_plan_and_builds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch)
    built: list[object] = []
    monkeypatch.setattr(standins.pygraph, "build_plans", lambda graph: built.append(graph))
    cudnn = backends.load("cudnn-frontend")
    case = small(dtype="float16", d_model=64)
    assert cudnn.refuses(Ask(case, "cuda")) is None
    assert built == []
    call = make_call(cudnn, cudnn.build(case), make_inputs(case, CPU, 0))
    with pytest.raises(AssertionError):
        call.forward()
    assert len(built) == 1, "to run, it builds one"


def test_cudnn_that_finds_two_runtime_libraries_says_where_to_keep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch)

    def two(graph: object) -> None:
        raise RuntimeError("Multiple libcudart libraries found: libcudart.so.12 and libcudart.so.13")

    monkeypatch.setattr(standins.pygraph, "check_support", two)
    why = backends.load("cudnn-frontend").refuses(Ask(small(dtype="float16", d_model=64), "cuda"))
    assert why
    assert why.startswith("Multiple libcudart libraries found")
    assert why.endswith("in a folder like nvidia/cuda_runtime_12/lib (docs/backends.md)")


@pytest.mark.parametrize(
    ("worker", "kept"),
    [("", False), ("package flash_attn", False), ("package jax", True), ("mine.py:attention", True)],
)
def test_what_may_keep_memory_is_known(worker: str, kept: bool) -> None:
    assert backends.keeps_memory(worker) is kept
