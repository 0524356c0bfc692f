"""Messages cross the socket whole."""

import socket
from dataclasses import replace

import pytest

from tests.unit.search.builders import make_epoch
from tuner.service.messages import (
    EpochDone,
    GivenBack,
    Hello,
    Message,
    Probe,
    Probed,
    Progress,
    Train,
    TrialDone,
    Verdict,
)
from tuner.service.wire import Lines, decode, encode
from tuner.trial import ClassReport, HeadStart, Reason, TrialOutcome, TrialParams, TrialState, Usage

PARAMS = TrialParams(
    backbone="test_resnet",
    lr=1e-3,
    batch_size=32,
    unfrozen_layers=2,
    augmentation_strength=0.5,
    optimizer="sgd",
    weight_decay=0.0,
    layer_decay=0.9,
    label_smoothing=0.1,
    dropout=0.2,
    warmup_fraction=0.1,
    momentum=0.9,
    epochs=3,
    horizontal_flip=True,
    class_weights="none",
    seed=2**62,
)
REPORT = ClassReport(confusion_matrix=((1, 2), (0, 3)), precision=(1.0, 0.6), recall=(0.3, 1.0), f1=(0.5, 0.75))
MESSAGES: list[Message] = [
    Train(data_hash="x", members=((3, PARAMS), (5, replace(PARAMS, views=4))), uses_features=True),
    Train(
        data_hash="x",
        members=((3, replace(PARAMS, head_start=HeadStart.take_from(replace(PARAMS, lr=0.1)))),),
        uses_features=False,
    ),
    EpochDone(results=((3, make_epoch(1, 0.5)), (5, make_epoch(1, 0.25)))),
    Verdict(stop=(3, 4), keep=5, folder="/a b/ü", provenance={"value": 0.5}),
    TrialDone(
        number=3,
        outcome=TrialOutcome(state=TrialState.COMPLETE, report=REPORT),
        kept=True,
        usage=Usage(features="cached", cohort_size=2, saved_seconds=1.5),
    ),
    GivenBack(numbers=(3, 5), backbone="test_resnet", reason="two classifiers", is_lasting=True),
    Progress(text="decoding images", n_done=1, n_total=3),
    TrialDone(
        number=4,
        outcome=TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR, message="a\nb", traceback="line\nline"),
    ),
    Hello(cuda_devices=("A", "B")),
    Probe(data_hash="x", params=PARAMS, seconds=0.5),
    Probed(images_per_second=12.5, memory=((2**40, 1), (3, 4))),
    Probed(problem="out of memory"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_decode_reads_what_encode_wrote(message: Message) -> None:
    """Every kind of value survives JSON: enums, tuples, None, newlines, large seeds."""
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


def test_lines_cuts_messages_wherever_the_bytes_are_split() -> None:
    """A message may arrive in pieces, and several at once."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = b"".join(encode(message) for message in MESSAGES)
        lines = Lines(ours)
        received: list[Message] = []
        for start in range(0, len(data), 100):
            theirs.sendall(data[start : start + 100])
            received += lines.receive()
        assert received == MESSAGES


def test_lines_says_that_the_other_side_is_gone() -> None:
    """The end of the socket is how a death is heard."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError, match=r"^$"):
        list(Lines(ours).receive())
