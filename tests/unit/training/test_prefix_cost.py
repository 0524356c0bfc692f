"""What the cost model predicts from measured times, and what it measures."""

from dataclasses import replace

import pytest
import torch

from tuner.models.layers import freeze_layers
from tuner.models.partition import partition_model
from tuner.training.prefix_cost import Demand, PrefixCost, measure_cost, predict_seconds

from .builders import CPU, PREPROCESSING, SIZE, make_images, make_net

COST = PrefixCost(compute_seconds=2.0, keep_seconds=0.5, take_seconds=0.25, bank_seconds=7.0)
COLD = Demand(n_train=100, n_val=10, epochs=3, n_missing_views=1, lacks_val=True, n_sharing=0.0)


def test_predict_seconds_counts_each_image_of_each_epoch() -> None:
    """Without maps the prefix sees all images in all epochs; with them once, and they are fetched in all epochs."""
    uncached, cached = predict_seconds(COST, COLD)
    assert uncached == 3 * 110 * 2.0
    assert cached == (100 + 10) * 2.5 + 2 * 7.0 + 3 * 110 * 0.25


def test_predict_seconds_of_kept_maps_is_fetching_alone() -> None:
    """What is there need not be computed."""
    _, cached = predict_seconds(COST, replace(COLD, n_missing_views=0, lacks_val=False))
    assert cached == 3 * 110 * 0.25


def test_predict_seconds_spreads_the_computing_over_all_that_share_it() -> None:
    """Three trials that show each view once: computed once, not three times."""
    alone = replace(COLD, n_missing_views=3, lacks_val=False)
    uncached, cached = predict_seconds(COST, replace(alone, n_sharing=2.0))
    assert uncached == 3 * predict_seconds(COST, alone)[0]
    assert cached == 3 * 100 * 2.5 + 3 * 7.0 + 9 * 110 * 0.25


def test_measure_cost_times_everything() -> None:
    """Nothing is free, and everything is per image."""
    net = freeze(make_net())
    partition = partition_model(net, torch.zeros(3, 3, SIZE, SIZE))
    cost = measure_cost(net, partition, make_images(), PREPROCESSING, CPU, precision="auto")
    assert all(0 < seconds < 1 for seconds in vars(cost).values())


def freeze(net: torch.nn.Module) -> torch.nn.Module:
    """Return a net whose stem is frozen."""
    freeze_layers(net, 2)
    return net


def test_measure_cost_keeps_half_as_many_bytes_in_bfloat16() -> None:
    """What a byte costs is timed once."""
    net = freeze(make_net())
    partition = partition_model(net, torch.zeros(3, 3, SIZE, SIZE))
    exact, rounded = (
        measure_cost(net, partition, make_images(), PREPROCESSING, CPU, precision=each).keep_seconds
        for each in ("float32", "bfloat16")
    )
    assert rounded == pytest.approx(exact / 2)
