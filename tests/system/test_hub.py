"""A Hub that cannot be reached is found out by one connection, not by its client's half minute of retries."""

import socket
import threading
from contextlib import contextmanager

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_class, load_family
from difftuning_control.system.hub import hub_or_cache


@contextmanager
def listening():
    """A port of this machine that takes connections and says nothing, and whether it took one."""
    server, taken, held = socket.create_server(("127.0.0.1", 0)), threading.Event(), []

    def take():
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1], taken
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for connection in held:
            connection.close()


@pytest.fixture
def hub(monkeypatch):
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def closed(hub):
    """An endpoint at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hub(port)


def test_a_hub_that_answers_is_asked(hub):
    with listening() as (port, taken):
        hub(port)
        with hub_or_cache("some/model"):
            assert not constants.HF_HUB_OFFLINE
        assert taken.wait(60)


def test_a_hub_that_does_not_is_left_out_for_the_while_of_loading(closed):
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE
        with pytest.raises((LocalEntryNotFoundError, OfflineModeIsEnabled)):
            hf_hub_download("some/model", "config.json")
    assert not constants.HF_HUB_OFFLINE


def test_exceptions_from_proxies_are_no_proxy(closed, monkeypatch):
    monkeypatch.setenv("no_proxy", "localhost")
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(("endpoint", "port"), [("http://mirror", 80), ("https://mirror", 443), ("http://mirror:9", 9)])
def test_a_mirror_is_asked_at_its_port(endpoint, port, hub, monkeypatch):
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with hub_or_cache("some/model"):
        pass
    assert asked == [("mirror", port)]


def test_nothing_is_asked_for_what_lies_here_or_behind_a_proxy(hub, monkeypatch, tmp_path):
    with listening() as (port, taken):
        hub(port)
        with hub_or_cache(str(tmp_path)):
            pass
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        with hub_or_cache("some/model"):
            assert not constants.HF_HUB_OFFLINE
        assert not taken.wait(0.1)


@pytest.mark.parametrize("load", [family_class, load_family])
def test_a_model_that_cannot_be_had_is_refused_without_a_retry(load, closed, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    with pytest.raises(UserError, match=r"could not be downloaded \(the Hub cannot be reached\); give"):
        load("some/model")
