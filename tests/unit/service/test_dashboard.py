"""The guard in front of optuna-dashboard."""

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from tuner.service.dashboard import guard


def echo(_: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer like a dashboard that opens every door."""
    start_response("200 OK", [("Content-Type", "text/html"), ("Access-Control-Allow-Origin", "*")])
    return [b"inside"]


def call(*, writable: bool = False, **environ: str) -> tuple[int, dict[str, str], bytes]:
    """Send one request through the guard; return status, headers and body."""
    answers: list[tuple[str, list[tuple[str, str]]]] = []

    def start(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
        answers.append((status, headers))
        return lambda _: None

    request: dict[str, Any] = {"HTTP_HOST": "127.0.0.1:8080", "REQUEST_METHOD": "GET", "PATH_INFO": "/", **environ}
    setup_testing_defaults(request)
    body = b"".join(guard(echo, writable=writable)(request, start))
    ((status, headers),) = answers
    return int(status.split()[0]), dict(headers), body


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "LOCALHOST"])
def test_guard_answers_to_this_machine(host: str) -> None:
    """The browser of this machine gets in."""
    assert call(HTTP_HOST=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8080", "", "[::1", "user@x"])
def test_guard_refuses_other_hosts(host: str) -> None:
    """A page that rebinds its name to 127.0.0.1 reads nothing."""
    status, _, body = call(HTTP_HOST=host)
    assert status == 421
    assert b"inside" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_guard_is_read_only_unless_asked(method: str) -> None:
    """Only GET and HEAD reach the dashboard; --write opens the rest."""
    assert call(REQUEST_METHOD=method)[0] == 405
    assert call(REQUEST_METHOD=method, writable=True)[0] == 200


def test_guard_refuses_changes_from_other_pages() -> None:
    """Even with --write, another site's page changes nothing."""
    changes = {"REQUEST_METHOD": "POST", "writable": True}
    assert call(**changes, HTTP_ORIGIN="http://evil.example")[0] == 403  # type: ignore[arg-type]
    assert call(**changes, HTTP_ORIGIN="http://127.0.0.1:8080")[0] == 200  # type: ignore[arg-type]


def test_guard_sandboxes_artifacts_and_drops_cors() -> None:
    """An artifact that is HTML stays passive, and no other origin reads it."""
    _, headers, _ = call(PATH_INFO="/artifacts/1/2")
    assert headers["Content-Security-Policy"] == "sandbox"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert "Content-Security-Policy" not in call()[1]
