"""optuna-dashboard behind a guard: read-only, on this machine, for this machine's browser.

The bare dashboard has no login and no read-only mode, answers any Host (so a web page can reach it through DNS
rebinding), and serves artifacts as active content. The guard closes these doors in front of it. Its token works as
Jupyter's does (``jupyter_server/auth/identity.py``): in the address once, then in a cookie.
"""

import hmac
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Iterable
from ipaddress import ip_address
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tuner.errors import StorageError
from tuner.search.storage import open_storage, resolve_url

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

TOKEN_VARIABLE = "TUNER_DASHBOARD_TOKEN"  # noqa: S105 - the name of a secret, not one
OWN_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
_SAFE_METHODS = {"GET", "HEAD"}
_PAGES = ("/dashboard", "/static/", "/favicon.ico")
"""What the dashboard itself consists of. Whatever else it answers is data."""
_PASSIVE_TYPES = {"application/json", "image/gif", "image/jpeg", "image/png", "image/webp", "text/csv", "text/plain"}
"""Besides audio and video: content types that no browser runs."""
_IDLE_SECONDS = 60
_OPENED = (
    "--write: whoever opens this address can create, rename and delete studies, end trials, and change attributes and "
    "notes; a study that runs may break"
)
_UNENCRYPTED = "the token crosses the network unencrypted; where that matters, use 127.0.0.1 through an SSH tunnel"

_Answer = tuple[str, list[tuple[str, str]], str]
"""Status, headers and text."""


def guard(
    app: "WSGIApplication",
    *,
    writable: bool = False,
    token: str | None = None,
    hosts: Collection[str] | None = OWN_NAMES,
) -> "WSGIApplication":
    """Wrap a dashboard.

    Args:
        app: What ``optuna_dashboard.wsgi`` returns.
        writable: Let requests through that change studies, from pages of the dashboard itself.
        token: Must come with the first request, as ``?token=``; then a cookie opens this guard, and no other one with
            the same token: browsers send the cookies of a host to all its ports. None lets everyone in.
        hosts: Names in the Host header that are answered; None answers all, which only a token makes safe.

    Returns:
        An application that refuses other Hosts (421), strangers (401), other methods and origins (405, 403), and
        serves artifacts sandboxed, never as active content and to no other origin.
    """
    wanted = secrets.token_hex(32)

    def guarded(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        answer = _check_host(environ, hosts) or _check_token(environ, token, wanted) or _check_method(environ, writable)
        if answer is not None:
            status, headers, text = answer
            start_response(status, _harden([*headers, ("Content-Type", "text/plain; charset=utf-8")]))
            return [text.encode()]
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # the dashboard's /static/ fails without
        is_page = environ.get("PATH_INFO", "").startswith(_PAGES)

        def start(status: str, headers: list[tuple[str, str]], *details: Any) -> Callable[[bytes], object]:
            return start_response(status, _harden(headers if is_page else _make_passive(headers)), *details)

        return app(environ, start)

    return guarded


def _check_host(environ: "WSGIEnvironment", hosts: Collection[str] | None) -> _Answer | None:
    if hosts is None or _hostname(f"//{environ.get('HTTP_HOST', '')}") in hosts:
        return None
    return "421 Misdirected Request", [], f"this dashboard answers to {', '.join(sorted(hosts))} only\n"


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _check_token(environ: "WSGIEnvironment", token: str | None, wanted: str) -> _Answer | None:
    """Turn a token in the address into the wanted cookie, and refuse who has neither."""
    if token is None:
        return None
    cookie = f"tuner_dashboard_{environ.get('SERVER_PORT', '')}"  # cookies of all ports of a host are one jar
    given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[-1]
    if environ["REQUEST_METHOD"] in _SAFE_METHODS and _is_same(given, token):
        keep = f"{cookie}={wanted}; Path=/; HttpOnly; SameSite=Strict"
        # To a constant address, so that the token leaves the history and no one is led elsewhere.
        return "303 See Other", [("Location", "/dashboard"), ("Set-Cookie", keep), ("Cache-Control", "no-store")], ""
    pairs = (part.strip().partition("=") for part in environ.get("HTTP_COOKIE", "").split(";"))
    if any(name == cookie and _is_same(value, wanted) for name, _, value in pairs):
        return None
    text = "this dashboard needs its token: open the address that 'tuner dashboard' printed\n"
    return "401 Unauthorized", [("WWW-Authenticate", "Token"), ("Cache-Control", "no-store")], text


def _is_same(given: str, wanted: str) -> bool:
    """Compare secrets in a time that does not tell how much of them is right."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


def _check_method(environ: "WSGIEnvironment", writable: bool) -> _Answer | None:
    if environ["REQUEST_METHOD"] in _SAFE_METHODS:
        return None
    if not writable:
        return "405 Method Not Allowed", [], "this dashboard is read-only; 'tuner dashboard --write' opens it\n"
    # Every browser sends one of the two with such a request; other programs send neither.
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    own = {f"{scheme}://{environ.get('HTTP_HOST', '')}" for scheme in ("http", "https")}
    if site in {None, "same-origin"} and (origin is None or origin in own):
        return None
    return "403 Forbidden", [], "changes must come from the dashboard's own pages\n"


def _harden(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers without what opens a door, and with what closes it for other pages."""
    kept = [(name, value) for name, value in headers if not name.lower().startswith("access-control-")]
    return [
        *kept,
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "SAMEORIGIN"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Referrer-Policy", "no-referrer"),
    ]


def _make_passive(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers of data, which may be anyone's: other types are shown as text or saved, never run."""
    given = {name.lower(): value for name, value in headers}
    kind = given.get("content-type", "").partition(";")[0].strip().lower()
    sandbox = ("Content-Security-Policy", "sandbox")
    if kind in _PASSIVE_TYPES or kind.startswith(("audio/", "video/")):
        return [*headers, sandbox]
    kept = [(name, value) for name, value in headers if name.lower() not in {"content-type", "content-disposition"}]
    if kind.startswith("text/"):
        return [*kept, ("Content-Type", "text/plain; charset=utf-8"), sandbox]
    return [*kept, ("Content-Type", "application/octet-stream"), ("Content-Disposition", "attachment"), sandbox]


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at a time: the dashboard polls while it loads."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that go away or keep silent."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _QuietHandler(WSGIRequestHandler):
    timeout = _IDLE_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing of every request."""


def serve_dashboard(
    storage: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    writable: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the dashboard until Ctrl-C.

    A token is needed wherever more than reading, or more than this machine, is open: the one in the environment
    variable ``TUNER_DASHBOARD_TOKEN``, which is then needed always, else a new one. An option would show in the list
    of processes.

    Args:
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.
        host: IPv4 address of this machine, or its name, to listen on.
        port: Where to listen; 0 picks a free port.
        writable: Let whoever has the token change and delete studies.
        announce: Called with lines for the user.

    Raises:
        StorageError: If the storage cannot be read, the address is not this machine's, the port is taken, or the token
            in the environment is too short.
    """
    address = _find_address(host)
    is_local = ip_address(address).is_loopback
    token = _choose_token(is_needed=writable or not is_local)
    url = resolve_url(storage)
    opened = open_storage(url)
    import optuna_dashboard

    hosts = {*OWN_NAMES, host.lower(), address} if is_local else None
    app = guard(optuna_dashboard.wsgi(opened), writable=writable, token=token, hosts=hosts)
    try:
        server = make_server(address, port, app, server_class=_Server, handler_class=_QuietHandler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"--port: must be free on {host}, got {port} ({reason}); choose another") from error
    with server:
        mode = "changes allowed" if writable else "read-only"
        shown = socket.gethostname() if address == "0.0.0.0" else host  # noqa: S104 - compared, not bound
        where = f"http://{shown}:{server.server_port}/{_show_token(token)}"
        announce(f"dashboard of {url} on {where} ({mode}); Ctrl-C ends it")
        for line in ([_OPENED] if writable else []) + ([] if is_local else [_UNENCRYPTED]):
            announce(line)
        server.serve_forever()


def _find_address(host: str) -> str:
    """Return the IPv4 address of a host name."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"--host: must be an IPv4 address or name of this machine, got {host!r} ({reason})"
        ) from error


def _choose_token(*, is_needed: bool) -> str | None:
    """Return the token of the environment, else a new one if it is needed."""
    if not (chosen := os.environ.get(TOKEN_VARIABLE)):
        return secrets.token_urlsafe(32) if is_needed else None
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", chosen):
        raise StorageError(
            f"{TOKEN_VARIABLE}: must be at least 16 letters, digits, '-' and '_', got {len(chosen)} characters; "
            f"leave it unset for a new one each time"
        )
    return chosen


def _show_token(token: str | None) -> str:
    """Return the end of the address; a token that the user chose is not printed."""
    if token is None:
        return ""
    return f"?token={f'${TOKEN_VARIABLE}' if os.environ.get(TOKEN_VARIABLE) else token}"
