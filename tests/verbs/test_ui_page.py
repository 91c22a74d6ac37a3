"""The page itself, without a browser: what it answers to whom, and that nothing in it comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.asgi import ask

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'difftuning-control[ui]'")

HOME = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The application over a folder with one picture, and the cookie of who may see it."""
    from difftuning_control.verbs.ui.application import make_application
    from difftuning_control.verbs.ui.guard import Access
    from difftuning_control.verbs.ui.places import Places

    folder = tmp_path_factory.mktemp("studio")
    access = Access(7860)
    cookie = {"cookie": f"{access.cookie}={access.token}"}
    return make_application(Places.of(folder), access), cookie, folder


def test_the_page_names_nothing_that_is_fetched_from_elsewhere(page):
    application, cookie, _ = page
    answer = ask(application, "GET", "/", cookie)
    assert answer.status == 200
    text = answer.body.decode()
    fetched = re.findall(r"""(?:src|href|@import|url\()\s*=?\s*["'(]?(https?://[^"') ]+)""", text)
    assert fetched == []
    assert '"analytics_enabled":false' in text.replace(" ", "")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "address",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/studio/picture?path=/etc/passwd&side=96",
        "/studio/picture?path=..%2F..%2Fetc%2Fpasswd&side=96",
        "/studio/report?path=/etc/passwd",
        "/studio/report?path=.difftune-ui/report.html",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_file_elsewhere_is_served(page, address):
    application, cookie, folder = page
    (folder / ".difftune-ui").mkdir(exist_ok=True)
    (folder / ".difftune-ui" / "report.html").write_text("root:")
    answer = ask(application, "GET", address, cookie)
    assert answer.status in (403, 404, 422)
    assert b"root:" not in answer.body


def test_files_of_the_folder_are_not_served_by_gradio_itself(page):
    application, cookie, folder = page
    (folder / "secret.txt").write_text("mine")
    answer = ask(application, "GET", f"/gradio_api/file={folder / 'secret.txt'}", cookie)
    assert answer.status in (403, 404)
    assert b"mine" not in answer.body


def test_a_report_runs_nothing(page):
    application, cookie, folder = page
    (folder / "one").mkdir(exist_ok=True)
    (folder / "one" / "report.html").write_text("<script>alert(1)</script>")
    answer = ask(application, "GET", "/studio/report?path=one/report.html", cookie)
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "allow-scripts" not in policy
    assert "script-src" not in policy
    assert "default-src 'none'" in policy


def test_nothing_is_started_from_another_site(page):
    application, cookie, folder = page
    body = b'{"data": [], "fn_index": 0, "session_hash": "x"}'
    sent = {"content-type": "application/json"}
    join = "/gradio_api/queue/join"
    assert ask(application, "POST", join, sent | HOME, body).status == 403  # no cookie
    for origin in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert ask(application, "POST", join, sent | cookie | HOME | origin, body).status == 403
    assert not [*folder.glob(".difftune-ui/jobs/*.json")]


@pytest.mark.wide
def test_the_page_starts_without_what_trains():
    """Which takes ten seconds more, and is imported when something is drawn."""
    code = (
        "import sys; import difftuning_control.verbs.ui.application; "
        "print([m for m in ('diffusers', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
