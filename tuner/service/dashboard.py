"""optuna-dashboard behind a guard: read-only, on this machine, for this machine's browser.

The bare dashboard has no login and no read-only mode, answers any Host (so a web page can reach it through DNS
rebinding), and serves artifacts as active content. The guard closes these doors in front of it.
"""

from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tuner.errors import StorageError
from tuner.search.storage import open_storage, resolve_url

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_HOST = "127.0.0.1"
_OWN_NAMES = {"127.0.0.1", "localhost", "::1"}
_SAFE_METHODS = {"GET", "HEAD"}


def guard(app: "WSGIApplication", *, writable: bool) -> "WSGIApplication":
    """Wrap a dashboard.

    Args:
        app: What ``optuna_dashboard.wsgi`` returns.
        writable: Let requests through that change studies, from pages of the dashboard itself.

    Returns:
        An application that refuses other Hosts (421), other origins and methods (403, 405), and serves artifacts
        sandboxed and to no other origin.
    """

    def guarded(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if (refusal := _find_refusal(environ, writable=writable)) is not None:
            status, text = refusal
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # the dashboard's /static/ fails without
        is_artifact = environ.get("PATH_INFO", "").startswith("/artifacts/")

        def start(status: str, headers: list[tuple[str, str]], *details: Any) -> Callable[[bytes], object]:
            return start_response(status, _harden(headers, is_artifact=is_artifact), *details)

        return app(environ, start)

    return guarded


def _find_refusal(environ: "WSGIEnvironment", *, writable: bool) -> tuple[str, str] | None:
    """Return the status and text with which a request is refused, or None."""
    if _hostname(f"//{environ.get('HTTP_HOST', '')}") not in _OWN_NAMES:
        return "421 Misdirected Request", "this dashboard answers to 127.0.0.1 and localhost only\n"
    if environ["REQUEST_METHOD"] in _SAFE_METHODS:
        return None
    if not writable:
        return "405 Method Not Allowed", "this dashboard is read-only; 'tuner dashboard --write' opens it\n"
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and urlsplit(origin).netloc != environ["HTTP_HOST"]:
        return "403 Forbidden", "changes must come from the dashboard's own pages\n"
    return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _harden(headers: list[tuple[str, str]], *, is_artifact: bool) -> list[tuple[str, str]]:
    """Return the headers without what opens a door, and with what keeps content passive."""
    kept = [(name, value) for name, value in headers if not name.lower().startswith("access-control-")]
    kept += [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "SAMEORIGIN")]
    return [*kept, ("Content-Security-Policy", "sandbox")] if is_artifact else kept


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at a time: the dashboard polls while it loads."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing of every request."""


def serve_dashboard(
    storage: str | None = None, *, port: int = 8080, writable: bool = False, announce: Callable[[str], None] = print
) -> None:
    """Serve the dashboard on 127.0.0.1 until Ctrl-C.

    Args:
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.
        port: Where to listen; 0 picks a free port.
        writable: Let whoever reaches the port change and delete studies.
        announce: Called with lines for the user.

    Raises:
        StorageError: If the storage cannot be read, or the port is taken.
    """
    url = resolve_url(storage)
    opened = open_storage(url)
    import optuna_dashboard

    app = guard(optuna_dashboard.wsgi(opened), writable=writable)
    try:
        server = make_server(_HOST, port, app, server_class=_Server, handler_class=_QuietHandler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"--port: must be free on {_HOST}, got {port} ({reason}); choose another") from error
    with server:
        mode = "everyone on this machine can change and delete studies" if writable else "read-only"
        announce(f"dashboard of {url} on http://{_HOST}:{server.server_port}/ ({mode}); Ctrl-C ends it")
        server.serve_forever()
