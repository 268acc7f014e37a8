"""JAX backends: on a CPU for real, and what needs a GPU by what can be told without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnbench import backends
from attnbench.backends import Ask
from attnbench.backends.packages import PACKAGES
from attnbench.bench import Bench, Settings
from attnbench.inputs import make_inputs
from attnbench.measure.call import BrokenPromise, make_call, make_probe
from attnbench.measure.kernels import Seen, device_times
from attnbench.measure.memory import Ledger
from attnbench.measure.profiled import ProfiledStopwatch
from attnbench.reference import compare, reference
from conftest import SMALL_GRID, Attnbench, records_of, small
from test_backends import SHAPES

pytest.importorskip("jax")
pytestmark = pytest.mark.filterwarnings("default")  # what JAX warns of is not ours to mend
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_xla_is_right_where_it_takes_a_case(shape: str) -> None:
    case = small(**SHAPES[shape])
    backend = backends.load("jax-xla")
    if reason := backend.refuses(Ask(case, "cpu")):
        assert case.masked_rows or case.dtype in ("float16", "float64"), reason
        return
    inputs = make_inputs(case, CPU, 0)
    call = make_call(backend, backend.build(case), inputs)
    result = call.forward()
    out, grads = call.output(result), call.gradients(call.backward(result))
    assert [grad.shape for grad in grads] == [x.shape for x in inputs[:3]]
    errors = compare(case, reference(case, inputs), out, grads)
    assert errors.complaint is None, errors
    again = call.gradients(call.backward(result))
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True)), (
        "a forward serves many backwards"
    )


def test_the_forward_alone_is_compiled_alone_and_saves_nothing() -> None:
    case = small()
    backend = backends.load("jax-xla")
    attention: Any = backend.build(case)
    call = make_call(backend, attention, make_inputs(case, CPU, 0, requires_grad=False))
    assert call.forward().saved == ()
    assert list(attention.executables) == ["infer"]


def test_a_backward_computes_no_forward_and_inputs_are_not_copied_for_it() -> None:
    """The pull's program has the three products of a backward that kept its weights, and two less than with a forward."""
    case = small()
    backend = backends.load("jax-xla")
    attention: Any = backend.build(case)
    call = make_call(backend, attention, make_inputs(case, CPU, 0))
    result = call.forward()
    call.backward(result)
    assert {place for place in attention.places if place is not None}, "q, k or v stand for themselves"
    assert all(saved.shape != call.arrays[1].shape for saved in result.saved)  # pyright: ignore[reportAttributeAccessIssue]
    products = {name: program.as_text().count(" dot(") for name, program in attention.executables.items()}
    assert products == {"record": 2, "pull": 4}


def test_compilation_is_booked_and_not_timed() -> None:
    at_work = Bench(Settings("cpu", 0, True, "default", "sustained", warm_cache=False, graph=False), lambda _: None)
    reply = at_work.visit(small().to_dict(), "jax-xla", None, first=True, last=False, budget_s=0.02)
    fields = reply["fields"]
    assert "status" not in fields
    assert fields["compile_ms"] > 50
    assert max(reply["samples_ms"]["forward"]) < fields["compile_ms"] / 2
    assert at_work.accounts.spent_s["compile"] == pytest.approx(fields["compile_ms"] / 1e3, rel=0.5)
    assert fields["backend_version"].startswith("jax ")
    assert fields["mem_after_inputs_MiB"] >= 0


def test_a_wrong_shape_is_a_broken_promise() -> None:
    from attnbench.measure.jax_call import JaxAttention, JaxCall, Recorded

    case = small()
    attention = JaxAttention(lambda q, k, v: q[..., :-1], "highest")
    backend = backends.load("jax-xla")
    call = make_call(backend, attention, make_inputs(case, CPU, 0))  # pyright: ignore[reportArgumentType]
    assert isinstance(call, JaxCall)
    with pytest.raises(BrokenPromise, match=r"returned float32\[1, 64, 2, 15\], not float32\[1, 64, 2, 16\]"):
        call.output(call.forward())
    assert isinstance(call.forward(), Recorded)


def test_memory_of_a_gpu_is_what_is_in_use_and_what_xla_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's statistics, simulated: the peak of a phase is what was there before it, and what its program allocates."""
    import jax

    in_use = [0]
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": in_use[0], "peak_bytes_in_use": 1 << 40})
    monkeypatch.setattr(jax, "devices", lambda _: [None, device])
    case = small(seq_len=256, kv_len=256)
    backend = backends.load("jax-xla")
    attention: Any = backend.build(case)
    ledger = Ledger(make_probe(backend, attention, torch.device("cuda", 1)))
    call = make_call(backend, attention, make_inputs(case, CPU, 0))
    in_use[0] = 1 << 20
    ledger.after_inputs()
    result = call.forward()
    in_use[0] = 3 << 20
    ledger.after_forward()
    call.backward(result)
    ledger.after_backward()
    plans = {name: program.memory_analysis() for name, program in attention.executables.items()}
    needs = {name: (plan.output_size_in_bytes + plan.temp_size_in_bytes) / (1 << 20) for name, plan in plans.items()}
    scores_MiB = 2 * 256 * 256 * 4 / (1 << 20)
    assert needs["record"] > scores_MiB
    assert ledger.fields["forward_peak_MiB"] == pytest.approx(1 + needs["record"])
    assert ledger.fields["saved_activations_MiB"] == pytest.approx(2)
    assert ledger.fields["backward_peak_MiB"] == pytest.approx(3 + needs["pull"])


def test_memory_of_a_cpu_is_that_of_arrays_and_the_same_each_time() -> None:
    case = small(seq_len=256, kv_len=256)
    bench = Bench(Settings("cpu", 0, True, "default", "sustained", False, False), lambda _: None)
    fields = [bench.visit(case.to_dict(), "jax-xla", None, True, False, 0.01)["fields"] for _ in range(2)]
    names = [name for name in fields[0] if name.endswith("_MiB")]
    assert len(names) == 5
    assert [fields[0][name] for name in names] == [fields[1][name] for name in names]
    inputs_MiB, scores_MiB = 4 * 2 * 256 * 16 * 4 / (1 << 20), 2 * 256 * 256 * 4 / (1 << 20)
    assert fields[0]["mem_after_inputs_MiB"] == inputs_MiB
    assert inputs_MiB + scores_MiB < fields[0]["forward_peak_MiB"] < inputs_MiB + 5 * scores_MiB


REFUSALS = [
    ("jax-xla", {"dtype": "float64"}, None, "not float64"),
    ("jax-xla", {"causal": True, "kv_len": 20}, None, "44 queries see no key"),
    ("jax-cudnn", {"dtype": "float32"}, (9, 0), "takes float16 and bfloat16, not float32"),
    ("jax-cudnn", {"causal": True, "kv_len": 80}, (9, 0), "takes a causal mask over as many keys as queries alone"),
    ("jax-cudnn", {"d_model": 256}, (8, 0), "up to 128, not 256"),
    ("jax-cudnn", {"d_model": 12}, (9, 0), "multiples of 8, not 12"),
    ("jax-cudnn", {"kv_len": 53}, (9, 0), "has a backward for kv_len that are even, not 53"),
    ("jax-xla", {"kv_len": 1}, (9, 0), "multiplies no float16 with vectors, and kv_len is 1"),
    ("jax-xla", {"kv_len": 1, "dtype": "bfloat16"}, (9, 0), None),
    ("jax-cudnn", {"d_model": 256}, (9, 0), None),
    ("jax-mosaic", {"d_model": 96}, (9, 0), "multiples of 64, not 96"),
    ("jax-mosaic", {"d_model": 64}, (10, 0), "below 10.0"),
    ("jax-mosaic", {"d_model": 64, "seq_len": 64}, (9, 0), "takes seq_len that are multiples of 128, not 64"),
    ("jax-mosaic", {"d_model": 64, "seq_len": 256, "kv_len": 160}, (9, 0), "kv_len that are multiples of 64"),
    (
        "jax-mosaic",
        {"d_model": 64, "seq_len": 256, "kv_len": 256, "causal": True},
        (9, 0),
        "no backward of a causal mask",
    ),
    ("jax-mosaic", {"d_model": 64, "seq_len": 256, "kv_len": 256}, (9, 0), None),
]


@pytest.mark.parametrize(("name", "changes", "capability", "reason"), REFUSALS)
def test_what_jax_does_not_take_has_its_reason(
    name: str, changes: dict[str, Any], capability: tuple[int, int] | None, reason: str | None
) -> None:
    refusal = backends.load(name).refuses(Ask(small(**{"dtype": "float16"} | changes), "cuda", True, capability))
    assert refusal is None if reason is None else reason in str(refusal)


def test_mosaic_and_cudnn_are_called_as_jax_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their signatures, and the promise of mosaic's kernels: softmax(q·kᵀ)·v without a scale, causal from the top left."""
    import jax
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    seen: list[Any] = []

    def kernel(q: Any, k: Any, v: Any, config: attention_mgpu.TuningConfig) -> Any:
        seen.append(config)
        return attention_mgpu.attention_reference(q, k, v, causal=config.causal).astype(q.dtype)

    monkeypatch.setattr(attention_mgpu, "attention", kernel)
    for causal in (False, True):
        case = small(causal=causal, seq_len=128, kv_len=128, d_model=64, heads=4, kv_heads=2)
        backend = backends.load("jax-mosaic")
        inputs = make_inputs(case, CPU, 0)
        call = make_call(backend, backend.build(case), inputs)
        result = call.forward()
        errors = compare(case, reference(case, inputs), call.output(result), call.gradients(call.backward(result)))
        assert errors.complaint is None, errors
        assert seen[-1].causal == causal
        assert seen[-1].has_backward_blocks != causal, "there are no blocks for a backward that there is not"
    plain = jax.nn.dot_product_attention

    def by_cudnn(*args: Any, implementation: str, **options: Any) -> Any:
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_cudnn)
    case = small(causal=True, heads=4, kv_heads=2)
    backend = backends.load("jax-cudnn")
    inputs = make_inputs(case, CPU, 0)
    call = make_call(backend, backend.build(case), inputs)
    result = call.forward()
    errors = compare(case, reference(case, inputs), call.output(result), call.gradients(call.backward(result)))
    assert errors.complaint is None, errors


def test_jax_runs_in_a_process_of_its_own_and_is_measured_like_the_others(attnbench: Attnbench, tmp_path: Path) -> None:
    assert backends.worker_of("jax-xla") == "package jax"
    names = ("--backend=jax-xla", "--backend=jax-cudnn", "--backend=eager")
    done = attnbench("run", *SMALL_GRID, "--causal", *names, "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    found = {record["backend"]: record for record in records_of(tmp_path / "run")}
    xla, cudnn = found["jax-xla"], found["jax-cudnn"]
    assert (xla["status"], cudnn["status"], cudnn["reason"]) == ("ok", "unsupported", "needs a CUDA GPU")
    assert xla["backend_version"] == PACKAGES["jax"].version()
    assert xla["compile_ms"] > 0
    assert len(xla["forward_samples_ms"]) > 1
    assert len(xla["backward_samples_ms"]) > 1
    assert xla["error_dq"] < 1e-5
    told = json.loads(
        attnbench("plan", *SMALL_GRID, "--protocol", "seed", "--backend=jax-xla", "--backend=eager", "--json").stdout
    )
    assert ["PyTorch's" in str(cell["unsupported"]) for cell in told["cells"]] == [True, False]


class Records:
    """A profiler that saw the pieces of work it was given take 1, 2, 3, … milliseconds, one kernel each.

    Like PyTorch's it cannot be started within another.
    """

    blind = False
    running = False
    pieces = 0

    def __init__(self, device: torch.device) -> None:
        Records.pieces = 0

    def __enter__(self) -> Records:
        assert not Records.running
        Records.running = True
        return self

    def __exit__(self, *error: object) -> None:
        Records.running = False

    def __call__(self, work: Callable[[], Any]) -> Any:
        Records.pieces += 1
        return work()

    def seen(self) -> list[Seen]:
        return [Seen((), None) if self.blind else Seen(("kernel",), 0.5, i + 1.0) for i in range(Records.pieces)]


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> tuple[ProfiledStopwatch, list[str]]:
    """A stopwatch over a call that writes down what is done with it."""
    done: list[str] = []
    call = SimpleNamespace(
        forward=lambda: done.append("forward"),
        backward=lambda _: done.append("backward"),
        wait=lambda _: done.append("wait"),
    )
    monkeypatch.setattr("attnbench.measure.profiled.Watch", Records)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("synchronise"))
    monkeypatch.setattr(ProfiledStopwatch, "LEAD_S", 0.0)
    monitor: Any = SimpleNamespace(read=lambda: None)
    return ProfiledStopwatch(call, True, CPU, monitor), done  # pyright: ignore[reportArgumentType]


def test_a_profiled_window_has_the_spans_of_passes_each_alone_on_the_device(
    profiled: tuple[ProfiledStopwatch, list[str]],
) -> None:
    stopwatch, done = profiled
    stopwatch._step_s = stopwatch.WINDOW_S / 2.5
    taken = stopwatch.window(20)
    assert taken.samples_ms == {"forward": [1, 4], "backward": [2, 5], "forward_backward": [3, 6]}
    alone = ["synchronise", "forward", "wait", "synchronise", "backward", "wait"]
    assert done == ([*alone, "synchronise", "forward", "backward", "wait"]) * 2
    assert len(stopwatch.window(1).samples_ms["forward"]) == 1


def test_without_the_profilers_records_there_is_no_time(
    profiled: tuple[ProfiledStopwatch, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Records, "blind", True)
    with pytest.raises(RuntimeError, match="the driver lets no profiler look"):
        profiled[0].window(1)


def test_kernels_are_looked_at_by_the_stopwatch_that_times_the_call(
    profiled: tuple[ProfiledStopwatch, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnbench.measure.kernels.Watch", Records)
    seen = device_times(profiled[0])
    assert {name: piece.names for name, piece in seen.items()} == {"forward": ("kernel",), "backward": ("kernel",)}
    assert (seen["forward"].device_ms, seen["forward"].events_ms) == (0.5, None), "events see nothing of it"


def test_events_around_the_calls_that_are_looked_at_are_kept_unless_the_device_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("attnbench.measure.kernels.Watch", Records)
    monkeypatch.setattr("attnbench.measure.kernels.LOOK_S", 0.02)
    looks = iter([{"forward": [1.0, 3.0]}, {}, {"forward": [2.0]}])

    def watched(watch: Records, repeats: int) -> dict[str, list[float]]:
        watch(lambda: None)
        return next(looks, {})

    stopwatch: Any = SimpleNamespace(device=CPU, backward=False, lead=lambda seconds, most: None, watched=watched)
    assert device_times(stopwatch, near_cap=True)["forward"].events_ms == 2.0
    assert device_times(stopwatch)["forward"].events_ms is None
