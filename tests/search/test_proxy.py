"""Servers nearby are asked without the environment's proxy; behind one, a failure names it."""

import pytest

from support.faultserver import Reply, search
from support.providers import good, is_good
from zs_lightning.search import MediaWikiSearch, remote
from zs_lightning.search.http import HttpSpec, proxy_of

NOWHERE = "http://me:canary@127.0.0.1:9"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def proxy(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_server_on_this_machine_is_asked_without_the_proxy(serve, engines, host):
    server = serve(good)
    assert is_good(search(engines(server.url().replace("127.0.0.1", host)), "query 1")["query 1"])


NEAR = (
    "localhost search.localhost wiki 127.8.9.1 [::1] 0.0.0.0 10.1.2.3 172.16.0.9 192.168.1.7 "
    "169.254.3.3 100.101.1.2 [fe80::1] [fd00::5]"
)
FAR = "en.wikipedia.org 8.8.8.8 172.32.0.1 [2001:4860:4860::8888]"


def test_which_servers_are_near():
    assert [host for host in NEAR.split() if proxy_of(f"http://{host}:8000/x")] == []
    assert {proxy_of(f"http://{host}:8000/x") for host in FAR.split()} == {"127.0.0.1:9"}


def test_the_variables_are_read_as_the_client_does(monkeypatch):
    assert proxy_of("https://example.org/") == ""
    monkeypatch.setenv("ALL_PROXY", "inner:3128")
    assert proxy_of("https://example.org/") == "inner:3128"
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert proxy_of("http://www.example.org/") == ""


def test_a_failure_behind_a_proxy_names_it_without_its_password(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    engine = MediaWikiSearch("http://wiki.example/w/api.php", http=HttpSpec(timeout=3.0))
    with pytest.raises(ValueError, match=r"no connection .*\(asked through the environment's proxy 127\.0\.0\.1:9\)") as error:
        engine.setup()
    assert "canary" not in str(error.value)


def test_what_a_proxy_answers_is_not_taken_for_the_servers_word(serve, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    between = serve(lambda asked: Reply({}, status=502))
    monkeypatch.setenv("HTTP_PROXY", between.url(""))
    with pytest.raises(ValueError, match=rf"answers 502.* proxy {between.url('')[7:]}\)"):
        MediaWikiSearch("http://wiki.example/w/api.php").setup()
