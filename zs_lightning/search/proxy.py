"""Which of the environment's proxies stands between this machine and a server."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_of(endpoint: str) -> str:
    """The host of the environment's proxy, without user and password, by which a server is asked; empty for none, as always
    for servers on this machine or in a private network: there no proxy finds them."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    try:
        is_near = not ipaddress.ip_address(host).is_global
    except ValueError:
        is_near = "." not in host or host.endswith(".localhost")
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if is_near or not proxy or proxy_bypass(host):
        return ""
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}").netloc.rpartition("@")[2]
