"""The dashboard over HTTP: nobody changes anything, and nothing that is stored runs."""

import http.client
import json
import sqlite3
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from tests.e2e.harness import Place
from tests.properties import reduced
from tests.properties.test_names import study_names
from tests.unit.production.builders import make_spec, store_study, write_images
from tuner.search.storage import use_storage
from tuner.service.dashboard import _QuietHandler, guard

_STUDY = "<script>alert(1)</script>"
_BACKBONE = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("imported").touch()


def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4), nn.Linear(4, num_classes))
"""


class Board:
    """A running dashboard, and one browser."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookie = ""

    def fetch(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, Any, str]:
        """Send a request; return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Content-Type": "application/json", "Cookie": self.cookie} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        try:
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode(errors="replace")
        finally:
            connection.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A stored study with a stranger's backbone and a name that is a script."""
    folder = tmp_path_factory.mktemp("doors")
    (folder / "stranger.py").write_text(_BACKBONE)
    write_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("TUNER_CACHE_DIR", str(folder / "cache"))
        store_study(folder, make_spec(folder, backbone="stranger:make", study={"name": _STUDY}))
        sys.modules.pop("stranger")
    (folder / "imported").unlink()  # made when the study was stored: the marker works
    yield Place(folder=folder, study_file=folder / "none.toml")
    assert not (folder / "imported").exists()


def dump(place: Place) -> list[str]:
    """Return all that the database holds."""
    connection = sqlite3.connect(f"file:{place.folder / 'studies.db'}?mode=ro", uri=True)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def start(place: Place, *arguments: str) -> Iterator[tuple[Board, str]]:
    """Run ``tuner dashboard``; yield it with what it printed first."""
    process = place.start("dashboard", "--port", "0", *arguments)
    assert process.stdout is not None
    text = process.stdout.readline()
    if "--write" in arguments:
        text += process.stdout.readline()
    try:
        yield Board(int(text.split(" on http://")[1].split(":")[1].split("/")[0])), text
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def reading(place: Place) -> Iterator[Board]:
    """The dashboard as it is without options."""
    for board, _ in start(place):
        yield board


@pytest.fixture(scope="module")
def writing(place: Place) -> Iterator[tuple[Board, str]]:
    """The dashboard with --write."""
    yield from start(place, "--write")


def list_write_requests() -> list[tuple[str, str]]:
    """Return every request by which optuna-dashboard changes something."""
    with warnings.catch_warnings(action="ignore"):
        app = optuna_dashboard.wsgi(optuna.storages.InMemoryStorage())
    requests = [(route.method, route.rule) for route in app.routes if route.method not in {"GET", "HEAD"}]
    assert len(requests) > 10
    return [(method, "/".join("1" if "<" in part else part for part in rule.split("/"))) for method, rule in requests]


def test_reading_refuses_every_request_that_writes(place: Place, reading: Board) -> None:
    """Not one of the dashboard's own ways to change a study is open, nor any other verb."""
    before = dump(place)
    requests = [*list_write_requests(), *((method, "/api/studies") for method in ("PATCH", "OPTIONS", "TRACE", "FOO"))]
    for method, path in requests:
        status, headers, _ = reading.fetch(path, method, {}, Origin=f"http://127.0.0.1:{reading.port}")
        assert status == 405, (method, path)
        assert "Access-Control-Allow-Origin" not in headers
    assert dump(place) == before


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", ""])
def test_reading_refuses_other_hosts(host: str, reading: Board) -> None:
    """A name that an attacker's DNS points at 127.0.0.1 reads nothing."""
    status, _, body = reading.fetch("/api/studies", Host=host.format(port=reading.port))
    assert status == 421
    assert "study_summaries" not in body


def test_reading_shows_a_hostile_name_as_data(reading: Board) -> None:
    """The name is in JSON, which is not sniffed to be a page, and in no page."""
    status, headers, body = reading.fetch("/api/studies")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert [study["study_name"] for study in json.loads(body)["study_summaries"]] == [_STUDY]
    status, headers, body = reading.fetch("/dashboard/studies/1")
    assert status == 200
    assert _STUDY not in body
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert reading.fetch("/csv/1")[1]["Content-Disposition"] == "attachment; filename=scriptalert(1)script.csv"


def test_writing_needs_the_token_and_says_what_it_opens(place: Place, writing: tuple[Board, str]) -> None:
    """Other users of this machine are strangers; the printed address lets its owner in, once and for all."""
    board, text = writing
    assert "can create, rename and delete studies" in text
    before = dump(place)
    for method, path in [("GET", "/api/studies"), ("GET", "/dashboard"), *list_write_requests()]:
        assert board.fetch(path, method)[0] == 401, (method, path)
    assert dump(place) == before
    status, headers, _ = board.fetch("/" + text.split(f":{board.port}/")[1].split()[0])
    assert (status, headers["Location"]) == (303, "/dashboard")
    board.cookie = headers["Set-Cookie"].split(";")[0]
    assert board.fetch("/api/studies")[0] == 200
    note = {"body": "seen", "version": 1}
    for other in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "same-site"}):
        assert board.fetch("/api/studies/1/note", "PUT", note, **other)[0] == 403
    assert dump(place) == before
    own = {"Origin": f"http://127.0.0.1:{board.port}", "Sec_Fetch_Site": "same-origin"}
    assert board.fetch("/api/studies/1/note", "PUT", note, **own)[0] == 204
    assert dump(place) != before


def test_dashboard_on_all_addresses_prints_no_token_of_the_users(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets a token knows it; the log of a job does not need to."""
    monkeypatch.setenv("TUNER_DASHBOARD_TOKEN", "correct-horse-battery-staple")
    for board, text in start(place, "--host", "0.0.0.0"):  # noqa: S104 - that is the test
        assert "/?token=$TUNER_DASHBOARD_TOKEN (read-only)" in text
        assert board.fetch("/api/studies", Host="gpu-box")[0] == 401
        assert board.fetch("/?token=correct-horse-battery-staple", Host="gpu-box")[0] == 303


@pytest.fixture
def artifacts(place: Place, tmp_path: Path) -> Iterator[tuple[Board, list[str]]]:
    """A guarded dashboard over artifacts: a page and a drawing that run scripts, a harmless picture, and a way out."""
    (tmp_path / "store").mkdir()
    (tmp_path / "outside").write_text("SQLite import")
    store = FileSystemArtifactStore(str(tmp_path / "store"))
    with use_storage(f"sqlite:///{place.folder}/studies.db") as storage:
        study = optuna.load_study(study_name=_STUDY, storage=storage)
        paths = []
        for name, kind in (("a.html", "text/html"), ("a.svg", "image/svg+xml"), ("a.png", "image/png")):
            file = tmp_path / name
            file.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
            identity = upload_artifact(
                artifact_store=store, file_path=str(file), study_or_trial=study, mimetype=kind, storage=storage
            )
            paths.append(f"/artifacts/1/{identity}")
        way_out = {"artifact_id": "../outside", "filename": "x", "mimetype": "text/plain", "encoding": None}
        storage.set_study_system_attr(study._study_id, "artifacts:../outside", json.dumps(way_out))
        app = guard(optuna_dashboard.wsgi(storage, artifact_store=store))
        with make_server("127.0.0.1", 0, app, handler_class=_QuietHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield Board(server.server_port), paths
            server.shutdown()


def test_artifact_that_is_a_script_is_inert(artifacts: tuple[Board, list[str]]) -> None:
    """A page is shown as text, a drawing is saved; neither is of the dashboard's origin."""
    board, paths = artifacts
    answers = [board.fetch(path) for path in (*paths, f"/{paths[0]}", f"{paths[0]}/")]
    assert [answer[0] for answer in answers[:3]] == [200, 200, 200]
    kinds = [answer[1]["Content-Type"] for answer in answers]
    assert kinds[:3] == ["text/plain; charset=utf-8", "application/octet-stream", "image/png"]
    assert not {"text/html", "image/svg+xml"} & {kind.partition(";")[0] for kind in kinds}
    assert answers[1][1]["Content-Disposition"] == "attachment"
    for _, headers, _ in answers:
        assert headers["Content-Security-Policy"] == "sandbox"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path", ["/artifacts/1/..%2foutside", "/artifacts/1/../outside", "/static/..%2f_app.py", "/static/../_app.py"]
)
def test_no_path_leads_out_of_its_folder(path: str, artifacts: tuple[Board, list[str]]) -> None:
    """What lies beside the artifacts, known to the database by that path, and the program's files are not served."""
    assert (Path(optuna_dashboard.__file__).parent / "_app.py").is_file()
    status, _, body = artifacts[0].fetch(path)
    assert status in {403, 404}
    assert "SQLite" not in body
    assert "import" not in body


def ask(app: Any, path: str) -> tuple[int, dict[str, str], str]:
    """Send a request to an application in this process; return status, headers and body."""
    answers: list[tuple[str, list[tuple[str, str]]]] = []

    def start(status: str, headers: list[tuple[str, str]], *_: object) -> None:
        answers.append((status, headers))

    request: dict[str, Any] = {"HTTP_HOST": "localhost", "PATH_INFO": path}
    setup_testing_defaults(request)
    answer = app(request, start)
    body = b"".join(answer).decode()
    getattr(answer, "close", bool)()
    ((status, headers),) = answers
    return int(status.split()[0]), dict(headers), body


@settings(max_examples=reduced(10))
@given(names=st.lists(study_names, min_size=1, max_size=3, unique=True))
@example(names=["日本 \u00e9; x=\"'", "\u00e9", "<img src=x onerror=alert(1)>"])
def test_every_name_goes_through_the_dashboard_as_data(names: list[str]) -> None:
    """Names are values in JSON, in no page, and in one header of a download that every browser takes."""
    with warnings.catch_warnings(action="ignore"):
        storage = optuna.storages.InMemoryStorage()
        app = guard(optuna_dashboard.wsgi(storage))
    page = ask(app, "/dashboard")[2]
    for name in names:
        identity = optuna.create_study(storage=storage, study_name=name)._study_id
        assert ask(app, f"/dashboard/studies/{identity}")[2] == page
        status, headers, _ = ask(app, f"/csv/{identity}")
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/csv")
        saved = headers["Content-Disposition"].encode("latin-1").decode()  # as wsgiref sends it
        assert saved.startswith("attachment; filename=")
        assert saved.isprintable()
        assert not set(saved) & set('<>"')
    status, headers, body = ask(app, "/api/studies")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert headers["Content-Security-Policy"] == "sandbox"
    assert sorted(study["study_name"] for study in json.loads(body)["study_summaries"]) == sorted(names)
