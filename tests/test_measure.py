"""Time, memory and rehearsal on a CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from attnbench import backends, forecast
from attnbench.case import Case
from attnbench.families import family
from attnbench.inputs import make_inputs
from attnbench.measure.call import TorchCall
from attnbench.measure.kernels import LONGEST_GAP_US, Seen, Watch, queued_us
from attnbench.measure.memory import Ledger, ResidentProbe, probe
from attnbench.measure.rehearsal import rehearse
from attnbench.measure.timing import Timer, time_as_seed
from conftest import small

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")


class Paced(torch.autograd.Function):
    """Sleeps 4 ms forward and 12 ms backward, and counts."""

    forwards = backwards = 0

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        Paced.forwards += 1
        time.sleep(0.004)
        return q.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        Paced.backwards += 1
        time.sleep(0.012)
        return grad


def paced() -> TorchCall:
    Paced.forwards = Paced.backwards = 0
    return TorchCall(lambda q, k, v: Paced.apply(q) + 0 * (k.sum() + v.sum()), make_inputs(small(), CPU, 0))


def timed(call: TorchCall, budget_s: float, *, backward: bool = True, warm: bool = False) -> dict[str, list[float]]:
    return Timer(CPU, backward).time(call, budget_s, warm=warm).samples_ms


def test_backward_is_the_backward_alone_and_the_step_is_both() -> None:
    samples = timed(paced(), 0.3)
    assert statistics.median(samples["forward"]) == pytest.approx(4.5, abs=1)
    assert statistics.median(samples["backward"]) == pytest.approx(12.5, abs=1)
    assert statistics.median(samples["forward_backward"]) == pytest.approx(17, abs=2)
    assert len(samples["forward"]) == len(samples["backward"]) == len(samples["forward_backward"])


def test_nothing_is_accumulated() -> None:
    call = paced()
    timed(call, 0.05, warm=True)
    assert all(tensor.grad is None for tensor in call.inputs)


def test_a_forward_alone_calls_no_backward() -> None:
    samples = timed(paced(), 0.05, backward=False, warm=True)
    assert list(samples) == ["forward"]
    assert samples["forward"]
    assert Paced.backwards == 0


def test_it_stops_when_the_budget_is_spent_and_has_one_sample_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.noise.RELATIVE_ERROR", -1)
    began = time.perf_counter()
    timed(paced(), 0.2, warm=True)
    assert 0.2 <= time.perf_counter() - began < 0.5
    assert timed(paced(), 0, warm=True)["forward"]


def test_a_step_that_does_not_count_warms_a_cpu_that_is_not_warm() -> None:
    call = paced()
    samples = timed(call, 0.05, warm=False)
    assert Paced.forwards == len(samples["forward"]) + 1
    call = paced()
    samples = timed(call, 0.05, warm=True)
    assert Paced.forwards == len(samples["forward"])


def test_the_seeds_protocol_is_a_hundred_forwards_and_a_hundred_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    samples = time_as_seed(paced(), CPU, backward=True, budget_s=60).samples_ms
    assert {name: len(taken) for name, taken in samples.items()} == {"forward": 100, "backward": 100}
    assert (Paced.forwards, Paced.backwards) == (220, 110)


def test_the_seeds_backward_is_a_whole_step() -> None:
    samples = time_as_seed(paced(), CPU, backward=True, budget_s=0.5).samples_ms
    assert statistics.mean(samples["forward"]) == pytest.approx(4.5, abs=1.5)
    assert statistics.mean(samples["backward"]) == pytest.approx(17, abs=3)


def test_the_seeds_protocol_keeps_to_a_budget() -> None:
    samples = time_as_seed(paced(), CPU, backward=True, budget_s=0.06).samples_ms
    assert 1 <= len(samples["forward"]) < 20
    assert 1 <= len(samples["backward"]) < 20


needs_probe = pytest.mark.skipif(probe(CPU) is None, reason="this system does not tell a process's peak")


@needs_probe
def test_the_resident_peak_is_seen_and_forgotten() -> None:
    resident = ResidentProbe()
    base = resident.now_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert resident.peak_bytes() - base > 60 << 20
    resident.settle()
    resident.forget_peak()
    assert resident.peak_bytes() - base < 20 << 20


def step_ledger(device: torch.device, case: Case, name: str) -> dict[str, float]:
    """What the memory ledger tells of a step, after another that loaded and made what stays."""
    attention = backends.load(name).build(case)
    fields: dict[str, float] = {}
    for _ in range(2):
        ledger = Ledger(probe(device))
        call = TorchCall(attention, make_inputs(case, device, 0))
        ledger.after_inputs()
        out = call.forward()
        ledger.after_forward()
        grads = call.backward(out)
        ledger.after_backward()
        assert len(grads) == 3
        fields = ledger.fields
        del call, out, grads
    return fields


@needs_probe
@pytest.mark.parametrize("name", ["naive", "eager", "sdpa-math"])
def test_memory_is_told_phase_by_phase_and_forecasts_hold(name: str) -> None:
    case = small(batch=8, heads=1, kv_heads=1, seq_len=1024, kv_len=1024)  # 32 MiB a score matrix
    told = step_ledger(CPU, case, name)
    assert told["mem_after_inputs_MiB"] == pytest.approx(2, abs=1.5)
    assert told["saved_activations_MiB"] == pytest.approx(
        told["mem_before_backward_MiB"] - told["mem_after_inputs_MiB"]
    )
    expected = forecast.memory_bytes(case, name, "cpu")
    assert expected is not None
    assert expected[1] is not None
    peak = max(told["forward_peak_MiB"], told["backward_peak_MiB"])
    assert peak == pytest.approx(max(expected[0], expected[1]) / (1 << 20), rel=0.2)


@pytest.mark.parametrize("name", ["naive", "eager", "sdpa-math"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_rehearsal_makes_the_allocations_of_a_step_and_none_of_its_work(name: str, causal: bool) -> None:
    case = small(batch=4, seq_len=2048, kv_len=2048, causal=causal)  # 128 MiB a score matrix
    assert backends.load(name).rehearsable
    call = TorchCall(backends.load(name).build(case), make_inputs(case, CPU, 0))
    began, phases = time.perf_counter(), []
    rehearse(call, phases.append, backward=True)
    rehearsed = time.perf_counter() - began
    began = time.perf_counter()
    call.backward(call.forward())
    assert phases == ["forward", "backward"]
    assert rehearsed < (time.perf_counter() - began) / 5


def test_it_is_told_what_ran() -> None:
    case = small(seq_len=256, kv_len=256)
    flash, eager = (
        TorchCall(backends.load(name).build(case), make_inputs(case, CPU, 0)) for name in ("sdpa-flash", "eager")
    )
    with Watch(CPU) as watch:
        watch(flash.forward)
        out = watch(eager.forward)
        watch(lambda: eager.backward(out))
    first, second, third = watch.seen()
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in first.names
    assert {"aten::bmm", "aten::_softmax"} <= set(second.names)
    assert "aten::_softmax_backward_data" in third.names
    assert family(first.names) == "flash"
    assert family(second.names) == "math"


def test_gaps_between_kernels_count_as_if_each_was_queued_and_what_overlaps_counts_once() -> None:
    assert queued_us([(5.0, 8.0)]) == 3.0
    assert queued_us([(10.0, 14.0), (0.0, 9.5)]) == 14.0, "a gap of half a microsecond is the device's"
    assert queued_us([(0.0, 10.0), (50.0, 60.0)]) == 20.0 + LONGEST_GAP_US
    assert queued_us([(0.0, 10.0), (2.0, 4.0), (6.0, 13.0)]) == 13.0


def test_kernels_between_marks_are_parted_from_flushes_and_holds() -> None:
    """As a GPU's profiler tells of them: name and microseconds, in the order of their starts, with gaps of a microsecond."""
    told = [
        ("spin_kernel(long)", 300.0),  # holds the queue
        *(
            ("FillFunctor<signed char>", 38.0),
            ("spin_kernel(long)", 1.0),
            ("flash_fwd", 100.0),
            ("Memset (Device)", 2.0),
        ),
        *(("spin_kernel(long)", 1.0), ("FillFunctor<signed char>", 38.0), ("spin_kernel(long)", 1.0)),
        *(("flash_bwd", 200.0), ("convert_dq", 20.0), ("flash_bwd", 50.0), ("spin_kernel(long)", 1.0)),
        ("FillFunctor<signed char>", 38.0),
    ]
    starts = itertools.accumulate((us + 1 for _, us in told), initial=0.0)
    events = [
        SimpleNamespace(
            name=name,
            self_device_time_total=us,
            device_type=DeviceType.CUDA,
            time_range=SimpleNamespace(start=start, end=start + us),
        )
        for start, (name, us) in zip(starts, told, strict=False)
    ]
    launches = SimpleNamespace(
        name="cudaLaunchKernel",
        device_type=DeviceType.CPU,
        self_device_time_total=0.0,
        time_range=SimpleNamespace(start=3),
    )
    watch = Watch(CPU)
    watch._cuda = True
    watch._profiler = SimpleNamespace(events=lambda: [*events[::-1], launches])  # pyright: ignore[reportAttributeAccessIssue]
    assert watch.seen() == [
        Seen(("flash_fwd", "Memset (Device)"), 0.102, 0.103),
        Seen(("flash_bwd", "convert_dq"), 0.27, 0.272),
    ]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "cudnn"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128>>", "flash"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>)", "efficient"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10>", "math"),
        ("ampere_sgemm_128x64_tn", None),
    ],
)
def test_kernel_names_tell_their_family(kernel: str, expected: str | None) -> None:
    assert family((kernel,)) == expected
