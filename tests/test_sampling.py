"""When samples are taken, thrown away and enough, with a stopwatch whose device is made up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from attnbench.measure.sampling import (
    LEAST_WARM_S,
    MOST_RETRIES,
    MOST_WARM_S,
    STARVED,
    Reading,
    Window,
    sample,
    settle,
)
from attnbench.noise import MAX_SAMPLES, by_round, noise, relative_error, settled, wander

STEADY = [1.0, 1.001, 0.999, 1.0]
WILD = [1.0, 2.0, 0.5, 1.5]


@dataclass
class Simulated:
    """A device on a clock of its own: a window takes `lasts_s`, and `state(now)` tells SM clock, power and events."""

    state: Callable[[float], tuple[float, float, tuple[str, ...]]] = lambda _: (1980.0, 200.0, ())
    samples: list[float] = field(default_factory=lambda: STEADY)
    lasts_s: float = 0.05
    starved: Iterator[bool] = field(default_factory=lambda: iter(()))
    seconds: float = 0.0
    windows: int = 0
    waits: int = 0
    rests: list[float] = field(default_factory=list)

    def window(self, most: int) -> Window:
        self.seconds += self.lasts_s
        self.windows += 1
        clock, power, events = self.state(self.seconds)
        reading = Reading(self.seconds, clock, power, 40.0, events)
        return Window({"forward": self.samples[:most]}, [reading], next(self.starved, False))

    def wait_longer(self) -> None:
        self.waits += 1

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.rests.append(seconds)


def taken(device: Simulated, budget_s: float = 1.0, **how: float | int) -> list[Window]:
    return sample(device, budget_s=budget_s, now=device.now, sleep=device.sleep, **how).windows  # pyright: ignore[reportArgumentType]


def test_it_stops_when_the_medians_are_known_and_else_when_the_budget_is_spent() -> None:
    assert len(taken(Simulated())) == 3  # ten samples at the least, of four a window
    assert len(taken(Simulated(samples=WILD))) == 20
    assert len(taken(Simulated(samples=WILD), budget_s=0)) == 1


def test_every_pass_has_to_settle() -> None:
    device = Simulated()
    plain = device.window
    device.window = lambda most: Window({"forward": STEADY, "backward": WILD}, plain(most).readings)
    assert len(taken(device)) == 20


@pytest.mark.parametrize(
    "event", ["sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "hw_slowdown"]
)
def test_windows_that_heat_or_the_outside_disturbed_are_taken_again(event: str) -> None:
    device = Simulated(lambda now: (1200.0, 500.0, (event,)) if now < 0.12 else (1980.0, 500.0, ("sw_power_cap",)))
    windows = taken(device)
    assert [window.discarded for window in windows] == [event, event, None, None, None]
    assert windows[0].to_dict()["samples_ms"] == {"forward": STEADY}, "raw samples are kept all the same"


def test_what_is_always_disturbed_is_kept_after_some_tries_with_its_cause() -> None:
    windows = taken(Simulated(lambda _: (1200.0, 500.0, ("hw_slowdown",))))
    assert [bool(window.discarded) for window in windows] == [True] * MOST_RETRIES + [False] * 3
    assert "hw_slowdown" in windows[-1].to_dict()["clock_events"]


def test_the_loads_own_power_disturbs_nothing() -> None:
    assert not any(window.discarded for window in taken(Simulated(lambda _: (1650.0, 690.0, ("sw_power_cap",)))))


def test_a_starved_window_is_taken_again_with_more_time_for_the_host() -> None:
    device = Simulated(starved=iter([True, True]))
    windows = taken(device)
    assert [window.discarded for window in windows] == [STARVED, STARVED, None, None, None]
    assert device.waits == 2


def test_a_host_that_is_always_behind_is_kept_after_some_tries_and_told_of() -> None:
    windows = taken(Simulated(starved=iter([True] * 100)))
    assert [bool(window.discarded) for window in windows] == [True] * MOST_RETRIES + [False] * 3
    assert windows[-1].to_dict()["starved"] is True


def test_a_window_is_kept_even_when_the_tries_use_the_budget_up() -> None:
    windows = taken(Simulated(lambda _: (1200.0, 500.0, ("hw_slowdown",))), budget_s=0.01)
    assert [bool(window.discarded) for window in windows] == [True] * MOST_RETRIES + [False]


def test_a_burst_rests_before_each_window() -> None:
    device = Simulated()
    taken(device, rest_s=0.5, most=4)
    assert device.rests == [0.5, 0.5]  # the budget counts rests too


BUSY, IDLE = [12.0] * 4, [0.1] * 4  # milliseconds in windows of fifty


def warmed(device: Simulated, **known: bool | None) -> float:
    settle(device, limit_W=700.0, now=device.now, **known)
    return device.seconds


def test_a_light_load_is_warm_at_once() -> None:
    assert warmed(Simulated(samples=IDLE)) == 0.05


def test_a_busy_load_runs_until_the_driver_can_tell_that_it_is_far_from_the_power_cap() -> None:
    assert LEAST_WARM_S[True] <= warmed(Simulated(samples=BUSY)) <= LEAST_WARM_S[True] + 0.05
    assert warmed(Simulated(samples=BUSY), near_cap=False) <= 0.2, "it is known already"


def test_what_it_finds_of_the_power_cap_is_told() -> None:
    heavy, light = Simulated(lambda _: (1650.0, 690.0, ("sw_power_cap",))), Simulated()
    assert settle(heavy, limit_W=700.0, now=heavy.now) is True
    assert settle(light, limit_W=700.0, now=light.now) is False


def test_a_heavy_load_warms_until_its_clock_stands_still() -> None:
    falling = Simulated(lambda now: (max(1650.0, 1980 - 500 * now), 690.0, ("sw_power_cap",)), BUSY)
    assert 0.66 + 0.1 < warmed(falling) < MOST_WARM_S  # it stands still from 0.66 s on


def test_steps_longer_than_the_stretch_are_held_against_the_one_before() -> None:
    slow = {"samples": [600.0], "lasts_s": 0.6}
    falling = Simulated(lambda now: (1980 - 500 * now, 690.0, ("sw_power_cap",)), **slow)
    assert warmed(falling) >= MOST_WARM_S
    assert warmed(Simulated(lambda _: (1650.0, 690.0, ("sw_power_cap",)), **slow)) < MOST_WARM_S


@pytest.mark.parametrize("near_cap", [None, True])
def test_near_the_power_cap_it_waits_although_the_clock_has_not_fallen_yet(near_cap: bool | None) -> None:
    late = Simulated(
        lambda now: (
            (1980.0, 150.0, ())
            if now < 0.12
            else (1980.0, 600.0, ())
            if now < 0.2
            else (1700.0, 690.0, ("sw_power_cap",))
        ),
        BUSY,
    )
    assert warmed(late, near_cap=near_cap) > 0.2 + 0.25
    assert late.state(late.seconds)[0] == 1700


def test_a_clock_that_never_settles_is_not_waited_for_without_end() -> None:
    falling = Simulated(lambda now: (1980 - 200 * now, 690.0, ("sw_power_cap",)), BUSY)
    assert MOST_WARM_S <= warmed(falling) < MOST_WARM_S + 0.1


def test_a_clock_that_goes_up_and_down_under_the_power_cap_has_settled() -> None:
    restless = Simulated(lambda now: (1700.0 + 60 * (round(now * 20) % 2), 690.0, ("sw_power_cap",)), BUSY)
    assert warmed(restless) < 0.6


def test_where_the_state_cannot_be_read_a_busy_load_still_warms() -> None:
    blind = Simulated(samples=BUSY)
    plain = blind.window
    blind.window = lambda most: Window(plain(most).samples_ms)
    assert warmed(blind) >= LEAST_WARM_S[True]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_a_median_is_known_when_its_standard_error_is_small() -> None:
    assert settled(STEADY * 3)
    assert not settled(WILD * 3)
    assert not settled(STEADY), "too few to tell"
    assert settled(WILD * (MAX_SAMPLES // 4)), "no end of sampling"
    assert relative_error(WILD) > 100 * relative_error(STEADY)


def test_the_error_of_the_median_is_that_of_a_normal_distribution() -> None:
    normal = statistics.NormalDist(100, 2).samples(4001, seed=1)
    assert relative_error(normal) == pytest.approx(1.2533 * 2 / 4001**0.5 / 100, rel=0.1)


def test_rounds_that_disagree_are_noise_however_many_samples_each_has() -> None:
    apart = [[1.0, 1.0, 1.0] * 100, [1.1, 1.1, 1.1] * 100]
    assert noise(apart) == pytest.approx(0.05, rel=0.1)
    assert noise([apart[0], apart[0]]) == 0
    assert noise([[1.0]]) is None


@pytest.mark.parametrize(("rounds", "ranks"), [(2, (0, 1)), (3, (0, 2)), (10, (2, 7)), (100, (44, 55))])
def test_more_rounds_tell_more_of_where_the_median_lies(rounds: int, ranks: tuple[int, int]) -> None:
    low, high = ranks
    medians = [100.0 + 10 * rank for rank in range(rounds)]
    middle = 100.0 + 10 * (rounds - 1) / 2
    assert noise([[ms] * 1000 for ms in reversed(medians)]) == pytest.approx(10 * (high - low) / 2 / middle, rel=0.02)


def test_wander_is_the_range_that_most_pulses_lie_in() -> None:
    assert wander([2.0] * 9) is None
    assert wander([2.0] * 10) == 0
    assert wander([2.0] * 30 + [2.4] * 30) == pytest.approx(0.2 / 2.2)
    assert wander([2.0] * 99 + [9.0]) == 0, "a single hiccup is none"


def test_samples_are_parted_into_their_rounds_without_what_was_discarded() -> None:
    windows = [
        {"round": 0, "samples": {"forward": 2}},
        {"round": 0, "samples": {"forward": 9}, "discarded": STARVED},
        {"round": 1, "samples": {"forward": 1}},
        {"round": 0, "samples": {"forward": 1}},
    ]
    assert by_round(windows, [1, 2, 3, 4], "forward") == [[1, 2, 4], [3]]
    assert by_round([], [1, 2], "forward") == [[1, 2]]
