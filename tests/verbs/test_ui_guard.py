"""The gate before the page: who passes, and what is refused before anything of the page sees it."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import pytest

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.guard import MOST_BODY, Access, Guard
from difftuning_control.verbs.ui.run import PASSWORD, access_of, listen, serve
from difftuning_control.verbs.ui.settings import UiSettings
from support.asgi import ask

WITHIN = b"the page"


async def page(scope, receive, send):
    own = [(b"content-security-policy", b"sandbox")] if scope["path"] == "/report" else []
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": own})
    await send({"type": "http.response.body", "body": WITHIN})


ACCESS = Access(7860)
GUARD = Guard(page, ACCESS)
COOKIE = {"cookie": f"{ACCESS.cookie}={ACCESS.token}"}
HOME = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}


def test_without_the_token_nothing_is_shown():
    for method, address in (("GET", "/"), ("GET", "/studio/picture?path=a"), ("POST", "/gradio_api/queue/join")):
        assert ask(GUARD, method, address).status == 403
    assert ask(GUARD, "GET", "/?token=guessed").status == 403
    assert ask(GUARD, "GET", "/", {"cookie": f"{ACCESS.cookie}=guessed"}).status == 403
    assert ask(GUARD, "GET", "/", {"cookie": f"{Access(7861).cookie}={ACCESS.token}"}).status == 403


def test_the_printed_address_gives_a_cookie_that_scripts_and_other_sites_do_not_get():
    answer = ask(GUARD, "GET", f"/?token={ACCESS.token}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert answer.headers["set-cookie"].endswith("Path=/; HttpOnly; SameSite=Strict")
    name = answer.headers["set-cookie"].partition(";")[0]
    assert ask(GUARD, "GET", "/", {"cookie": name}).body == WITHIN


@pytest.mark.parametrize(
    "sent",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_a_cross_site_post_is_refused_with_the_cookie_too(sent):
    assert ask(GUARD, "POST", "/gradio_api/queue/join", COOKIE | HOME).body == WITHIN
    assert ask(GUARD, "POST", "/gradio_api/queue/join", COOKIE | HOME | sent).status == 403


def test_a_name_that_was_pointed_at_this_machine_is_refused():
    assert ask(GUARD, "GET", "/", COOKIE | {"host": "evil.example:7860"}).status == 421
    assert ask(GUARD, "GET", "/", COOKIE | {"host": "localhost:7860"}).status == 200
    assert ask(GUARD, "GET", "/", COOKIE | {"host": "[::1]:7860"}).status == 200


def test_what_is_sent_is_bounded_with_and_without_a_length():
    for length in (str(MOST_BODY + 1), "-1", "many"):
        assert ask(GUARD, "POST", "/upload", COOKIE | HOME | {"content-length": length}).status == 413
    heard = []

    async def reads(scope, receive, send):
        heard.append((await receive())["type"])
        await page(scope, receive, send)

    ask(Guard(reads, ACCESS), "POST", "/upload", COOKIE | HOME, bytes(MOST_BODY + 1))
    assert heard == ["http.disconnect"]


def test_every_answer_forbids_what_is_from_elsewhere_and_a_stricter_policy_stays():
    for headers in ({}, COOKIE):
        policy = ask(GUARD, "GET", "/", headers).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
    assert ask(GUARD, "GET", "/report", COOKIE).headers["content-security-policy"] == "sandbox"


@pytest.mark.parametrize("fails", ["bind", "__init__"])
def test_an_address_of_ipv6_stands_in_brackets(monkeypatch, fails):
    assert access_of(UiSettings(host="::1"), 7860)[1][0].startswith("open http://[::1]:7860/")
    monkeypatch.setattr(socket.socket, fails, Mock(side_effect=OSError(97, "Address family not supported")))
    with pytest.raises(UserError, match=r"listen on \[2001:db8::1\]:0 \(Address family not supported\)"):
        listen("2001:db8::1", 0)


def test_another_host_has_a_password_drawn_or_given(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    access, lines = access_of(UiSettings(host="0.0.0.0"), 7860)
    assert access.password in " ".join(lines)
    assert access.token not in " ".join(lines)
    monkeypatch.setenv(PASSWORD, "correct horse 1")
    access, lines = access_of(UiSettings(host="0.0.0.0"), 7860)
    assert access.password == "correct horse 1"
    assert "correct horse 1" not in " ".join(lines)
    assert access_of(UiSettings(), 7860)[0].password is None


def test_the_password_opens_the_page_and_the_token_in_an_address_does_not(monkeypatch):
    monkeypatch.setattr("asyncio.sleep", lambda seconds: _at_once())
    access = Access(7860, "correct horse 1")
    guard, host = Guard(page, access), {"host": "studio.example:7860"}
    asked = ask(guard, "GET", f"/?token={access.token}", host)
    assert (asked.status, b'type="password"' in asked.body) == (401, True)
    assert ask(guard, "POST", "/login", host, b"password=wrong").status == 401
    right = ask(guard, "POST", "/login", host, b"password=correct+horse+1")
    assert right.status == 303
    cookie = {"cookie": right.headers["set-cookie"].partition(";")[0]}
    assert ask(guard, "GET", "/", host | cookie).body == WITHIN
    assert ask(guard, "POST", "/login", host | {"origin": "https://evil.example"}, b"password=x").status == 403


async def _at_once():
    return None


def test_without_gradio_it_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("difftuning_control.verbs.ui.run.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^the page needs gradio; run pip install 'difftuning-control\[ui\]'\.$"):
        serve(UiSettings(str(tmp_path)), print)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port} \(.*\); name another --port"):
            listen("127.0.0.1", port)
