"""How many workers share a device, from what was measured."""

import pytest

from tuner.service.sharing import Sharing, choose_n_workers, count_fitting, has_gained


@pytest.mark.parametrize(
    ("speeds", "n_workers"),
    [
        ([], 1),
        ([100.0], 1),
        ([100.0, 104.0], 1),  # within 5 % of the best
        ([100.0, 106.0], 2),
        ([100.0, 97.0], 1),
        ([100.0, 160.0, 190.0], 3),
        ([100.0, 160.0, 165.0], 2),
        ([100.0, 160.0, 120.0], 2),
        ([100.0, 150.0, 200.0, 205.0], 3),
    ],
)
def test_choose_n_workers_takes_the_fewest_that_are_nearly_the_fastest(speeds: list[float], n_workers: int) -> None:
    """Each further worker costs memory, so that it must bring more than noise."""
    assert choose_n_workers(speeds) == n_workers


@pytest.mark.parametrize(
    ("speeds", "gained"),
    [([], True), ([100.0], True), ([100.0, 105.0], True), ([100.0, 104.9], False), ([100.0, 150.0, 152.0], False)],
)
def test_has_gained_asks_for_five_per_cent(speeds: list[float], gained: bool) -> None:
    """The first two are always tried; a third only if the second was worth it."""
    assert has_gained(speeds) is gained


@pytest.mark.parametrize(
    ("memory", "n_fitting"),
    [
        ([], 1),
        ([(10, 100)], 10),  # 9 more in nine tenths of 100
        ([(10, 11)], 1),
        ([(10, 12)], 2),
        ([(10, 100), (50, 60)], 2),  # the device, the second, is the tighter one
        ([(0, 100)], 1),
    ],
)
def test_count_fitting_leaves_a_tenth_free(memory: list[tuple[int, int]], n_fitting: int) -> None:
    """Of every memory, the host's and the device's, the tightest decides."""
    assert count_fitting(memory) == n_fitting


def test_describe_says_what_was_measured_and_chosen() -> None:
    """One line for the user."""
    sharing = Sharing(device="cuda:0", n_workers=2, speeds=(812.4, 1004.0, 1011.0), reason="one more gained less")
    assert sharing.describe() == (
        'per_device = "auto": 2 workers on each device; cuda:0 trained 812 images/s with 1, 1004 images/s with 2, '
        "1011 images/s with 3; one more gained less"
    )
    nothing = Sharing(device="cuda:0", n_workers=1, speeds=(), reason="out of memory")
    assert nothing.describe() == ('per_device = "auto": 1 worker on each device; nothing was measured; out of memory')
