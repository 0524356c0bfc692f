"""Cut images whose groups (patients, scenes) must not be torn: whole groups, with the classes as even as they allow."""

import numpy as np
from numpy.typing import NDArray

from tuner.data.index import ImageIndex, Split, preview
from tuner.errors import DataError

_N_DRAWS = 10
"""Orders of groups that are tried at most until every split holds every class; the first nearly always does."""


def check_given_groups(index: ImageIndex) -> None:
    """Check that the given splits leave every group whole.

    Raises:
        DataError: If one stands in two splits.
    """
    held: dict[str, set[int]] = {}
    for group, split in zip(index.groups or (), index.given_splits.tolist(), strict=True):
        held.setdefault(group, set()).add(split)
    if torn := [group for group, splits in held.items() if len(splits) > 1]:
        where = " and ".join(Split(split).name.lower() for split in sorted(held[torn[0]]))
        more = f" ({len(torn) - 1} more are torn)" if len(torn) > 1 else ""
        raise DataError(
            f"data.group: each group must stand in one split, got {torn[0]!r} in {where}{more}; correct the split "
            f"column, or leave it out and the groups are cut whole"
        )


def cut_groups(
    index: ImageIndex, rows: NDArray[np.int64], shares: dict[Split, float], generator: np.random.Generator
) -> NDArray[np.int8]:
    """Return the splits of some images: whole groups, shares of each class as near as they allow, no class missing.

    The greedy rule of scikit-learn's StratifiedGroupKFold, for shares of any size: the largest groups first, each to
    the split where it brings the classes' shares nearest to what is wanted.

    Args:
        index: The images, with groups.
        rows: Which of them.
        shares: Of the splits beside train.
        generator: Draws the order of groups of one size.

    Raises:
        DataError: If a class has fewer groups than there are splits to fill.
    """
    assert index.groups is not None  # noqa: S101 - the caller checked
    numbers: dict[str, int] = {}
    members = np.array([numbers.setdefault(index.groups[row], len(numbers)) for row in rows], dtype=np.int64)
    counts = np.zeros((len(numbers), len(index.classes)))  # images of each class in each group
    np.add.at(counts, (members, index.labels[rows]), 1)
    wanted = {Split.TRAIN: 1 - sum(shares.values()), **shares}
    _check_numbers(index, counts, list(wanted))
    fractions = np.array(list(wanted.values()))
    for _ in range(_N_DRAWS):
        order = generator.permutation(len(counts))
        order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
        chosen = _assign(counts, fractions, order)
        held = np.zeros((len(wanted), len(index.classes)))
        np.add.at(held, chosen, counts)
        if held.all():
            break
    return np.array(list(wanted), dtype=np.int8)[chosen][members]


def _check_numbers(index: ImageIndex, counts: NDArray[np.float64], wanted: list[Split]) -> None:
    n_groups = np.count_nonzero(counts, axis=0)
    if (n_groups < len(wanted)).any():
        filled = ", ".join(split.name.lower() for split in wanted)
        label = int(np.argmax(n_groups < len(wanted)))
        raise DataError(
            f"data.group: each class must have at least one group for each of {filled}, "
            f"got {n_groups[label]} of {preview([index.classes[label]])}"
        )


def _assign(counts: NDArray[np.float64], fractions: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each group's split, groups taken in an order; the last groups of a class fill gaps."""
    parts = counts / counts.sum(axis=0)  # a rare class weighs as much as a common one
    held = np.zeros((len(fractions), counts.shape[1]))
    n_waiting = np.count_nonzero(counts, axis=0)
    chosen = np.zeros(len(counts), dtype=np.int64)
    for group in order:
        part, has = parts[group], counts[group] > 0
        # How much the squared distance to the wanted shares grows, relative to those shares.
        cost = (part * (2 * (held - fractions[:, None]) + part)).sum(axis=1) / fractions
        gaps = held == 0
        urgent = has & (n_waiting <= gaps.sum(axis=0))
        if (fills := (gaps & urgent).any(axis=1)).any():
            cost[~fills] = np.inf
        chosen[group] = np.argmin(cost)
        held[chosen[group]] += part
        n_waiting -= has
    return chosen
