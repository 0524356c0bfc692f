"""What is known of needs: by what they depend on, across processes, whatever lies in the cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner.training.memory import MemoryLine, MemoryNeed
from tuner.training.memory_needs import MemoryNeeds, describe_training

from .builders import make_job, make_net

NEED = MemoryNeed(lines=(MemoryLine(fixed_bytes=5, bytes_per_image=2),), gradient_bytes=1, scratch_bytes=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memory"


@pytest.mark.parametrize(
    "changed",
    [{"optimizer": "sgd"}, {"unfrozen_layers": 2}, {"backbone": "other"}, {"momentum": 0.0}, {"precision": "bfloat16"}],
)
def test_need_is_another_one_where_memory_is(changed: dict[str, Any]) -> None:
    """Each of these takes other memory."""
    assert describe_training(make_job(**changed), {}) != describe_training(make_job(), {})
    assert describe_training(make_job(), {"width": 2}) != describe_training(make_job(), {})
    assert describe_training(make_job(make_net(3)), {}) != describe_training(make_job(), {})
    assert describe_training(make_job(make_net().double()), {}) != describe_training(make_job(), {})


def test_need_is_the_same_for_all_batches_weights_and_recipes() -> None:
    """What the measurement is shared by."""
    other = make_job(make_net(seed=5), batch_size=64, lr=0.5, seed=3, momentum=0.5, augmentation_strength=0.5, epochs=9)
    assert describe_training(other, {}) == describe_training(make_job(), {})
    assert describe_training(replace(other, micro_batch=2), {}) == describe_training(make_job(), {})


def test_needs_are_shared_and_the_last_word_counts() -> None:
    """Another worker, or a later study, finds what one has learnt."""
    facts = describe_training(make_job(), {})
    ours, theirs = MemoryNeeds(), MemoryNeeds()
    assert theirs.find(facts) is None
    ours.keep(facts, NEED)
    assert theirs.find(facts) == NEED
    theirs.keep(facts, NEED.raised(4, 100))
    assert ours.find(facts) == NEED.raised(4, 100)
    assert ours.find({**facts, "image_size": 9}) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"need": {"lines": []}}', '{"need": 4}', "\x00" * 50])
def test_needs_that_cannot_be_read_are_not_known(cache: Path, content: str) -> None:
    """A torn file is measured again; what this process knows by itself stays."""
    facts = describe_training(make_job(), {})
    ours = MemoryNeeds()
    ours.keep(facts, NEED)
    (path,) = cache.iterdir()
    path.write_text(content)
    assert MemoryNeeds().find(facts) is None
    assert ours.find(facts) == NEED
    path.unlink()
    assert ours.find(facts) == NEED


def test_needs_are_known_where_the_cache_cannot_be_written(cache: Path) -> None:
    """A file in the folder's place."""
    cache.parent.mkdir()
    cache.write_text("in the way")
    facts = describe_training(make_job(), {})
    needs = MemoryNeeds()
    needs.keep(facts, NEED)
    assert needs.find(facts) == NEED
