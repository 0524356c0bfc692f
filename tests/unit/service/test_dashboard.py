"""The guard in front of optuna-dashboard."""

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from tuner.errors import StorageError
from tuner.service.dashboard import guard, serve_dashboard

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test


def make_app(content_type: str) -> Callable[..., Iterable[bytes]]:
    """Return a dashboard that opens every door."""

    def answer(_: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", content_type), ("Access-Control-Allow-Origin", "*")])
        return [b"inside"]

    return answer


def call(
    *, content_type: str = "text/html", options: Any = None, guarded: Any = None, **environ: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request through the guard, a new one each time or the given one; return status, headers and body."""
    answers: list[tuple[str, list[tuple[str, str]]]] = []

    def start(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
        answers.append((status, headers))
        return lambda _: None

    request: dict[str, Any] = {"HTTP_HOST": "127.0.0.1:8080", "REQUEST_METHOD": "GET", "PATH_INFO": "/", **environ}
    setup_testing_defaults(request)
    body = b"".join((guarded or guard(make_app(content_type), **(options or {})))(request, start))
    ((status, headers),) = answers
    assert len({name.lower() for name, _ in headers}) == len(headers)
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
    assert call(REQUEST_METHOD=method, options={"writable": True})[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"HTTP_ORIGIN": "http://127.0.0.1:8080", "HTTP_SEC_FETCH_SITE": "same-origin"}, 200),
        ({"HTTP_ORIGIN": "http://127.0.0.1:8080"}, 200),
        ({"HTTP_ORIGIN": "http://evil.example"}, 403),
        ({"HTTP_ORIGIN": "http://127.0.0.1:9090"}, 403),
        ({"HTTP_ORIGIN": "null"}, 403),
        ({"HTTP_ORIGIN": "http://["}, 403),
        ({"HTTP_SEC_FETCH_SITE": "cross-site"}, 403),
        ({"HTTP_SEC_FETCH_SITE": "same-site"}, 403),
        ({"HTTP_ORIGIN": "http://127.0.0.1:8080", "HTTP_SEC_FETCH_SITE": "cross-site"}, 403),
    ],
)
def test_guard_refuses_changes_from_other_pages(headers: dict[str, str], status: int) -> None:
    """Even with --write, another site's page changes nothing; a program that is no browser may."""
    assert call(REQUEST_METHOD="POST", options={"writable": True}, **headers)[0] == status


@pytest.mark.parametrize("path", ["/artifacts/1/2", "//artifacts/1/2", "/Artifacts/1", "/", "/api/studies", "/csv/1"])
def test_guard_sandboxes_all_but_its_own_pages(path: str) -> None:
    """An artifact that is HTML stays passive, whatever its path looks like, and no other origin reads it."""
    _, headers, _ = call(PATH_INFO=path)
    assert headers["Content-Security-Policy"] == "sandbox"
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/studies/1", "/static/bundle.js"])
def test_guard_leaves_the_pages_of_the_dashboard_alone(path: str) -> None:
    """The dashboard's own pages run, unless another site frames them."""
    _, headers, _ = call(PATH_INFO=path)
    assert headers["Content-Type"] == "text/html"
    assert "Content-Security-Policy" not in headers
    assert headers["X-Frame-Options"] == "SAMEORIGIN"


@pytest.mark.parametrize(
    ("given", "sent", "is_saved"),
    [
        ("image/png", "image/png", False),
        ("video/mp4", "video/mp4", False),
        ("application/json; charset=utf-8", "application/json; charset=utf-8", False),
        ("TEXT/HTML", "text/plain; charset=utf-8", False),
        ("text/javascript", "text/plain; charset=utf-8", False),
        ("image/svg+xml", "application/octet-stream", True),
        ("application/xhtml+xml", "application/octet-stream", True),
        ("application/pdf", "application/octet-stream", True),
        ("", "application/octet-stream", True),
    ],
)
def test_guard_makes_active_types_passive(given: str, sent: str, is_saved: bool) -> None:
    """What a browser would run is shown as text or saved."""
    _, headers, _ = call(PATH_INFO="/artifacts/1/2", content_type=given)
    assert headers["Content-Type"] == sent
    assert (headers.get("Content-Disposition") == "attachment") is is_saved


def test_token_becomes_a_cookie() -> None:
    """The address opens the dashboard once; the cookie, which does not hold the token, keeps it open."""
    guarded = guard(make_app("text/html"), token=TOKEN, hosts=None)
    assert call(guarded=guarded, HTTP_HOST="gpu-box:8080")[0] == 401
    status, headers, _ = call(guarded=guarded, PATH_INFO="//evil.example", QUERY_STRING=f"token={TOKEN}")
    assert (status, headers["Location"], headers["Cache-Control"]) == (303, "/dashboard", "no-store")
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert attributes == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert TOKEN not in cookie
    assert call(guarded=guarded, HTTP_HOST="gpu-box:8080", HTTP_COOKIE=f"a=b; {cookie}")[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"QUERY_STRING": "token="},
        {"QUERY_STRING": "token=wrong"},
        {"QUERY_STRING": f"token={TOKEN[:-1]}"},
        {"QUERY_STRING": "token=%FF%ED%A0%80é"},
        {"QUERY_STRING": f"token={TOKEN}", "REQUEST_METHOD": "POST"},
        {"HTTP_COOKIE": "tuner_dashboard_80="},
        {"HTTP_COOKIE": f"tuner_dashboard_80={TOKEN}"},
        {"HTTP_COOKIE": ";;=;tuner_dashboard_80=\xff"},
    ],
)
def test_guard_refuses_strangers(request_: dict[str, str]) -> None:
    """Without the token there is nothing, not even for --write."""
    status, _, body = call(options={"token": TOKEN, "hosts": None, "writable": True}, **request_)
    assert status == 401
    assert b"inside" not in body


def test_cookie_opens_the_guard_that_gave_it_alone() -> None:
    """Cookies go to every port of a host: another user's server with the same token, or a later one, gets no key."""
    first, other = (guard(make_app("text/html"), token=TOKEN) for _ in range(2))
    cookie = call(guarded=first, QUERY_STRING=f"token={TOKEN}")[1]["Set-Cookie"].split(";")[0]
    assert call(guarded=first, HTTP_COOKIE=cookie)[0] == 200
    assert call(guarded=other, HTTP_COOKIE=cookie)[0] == 401


@pytest.mark.parametrize("token", ["short", "x" * 15, "sixteen letters!", "ééééééééééééééééé"])
def test_serve_refuses_a_token_that_can_be_guessed(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of the user's own must be long and fit an address; it is not printed."""
    monkeypatch.setenv("TUNER_DASHBOARD_TOKEN", token)
    with pytest.raises(StorageError, match="TUNER_DASHBOARD_TOKEN: must be at least 16 letters") as caught:
        serve_dashboard("sqlite:///none.db")
    assert token not in str(caught.value)


def test_serve_refuses_an_address_that_is_none() -> None:
    """An address is checked before the storage is opened."""
    with pytest.raises(StorageError, match=r"--host: must be .* of this machine, got '1\.2\.3\.400'"):
        serve_dashboard("sqlite:///none.db", host="1.2.3.400")
