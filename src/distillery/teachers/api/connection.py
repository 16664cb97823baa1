"""The HTTP connection to an endpoint: through the proxy in the environment, but not to this machine."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from distillery.errors import UserError


def needs_no_proxy(url: str) -> bool:
    """Whether the host of `url` is this machine, or one that the environment names in NO_PROXY."""
    host = urlsplit(url).hostname or ""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost" or host.endswith(".localhost")
    return is_loopback or bool(proxy_bypass(host))


def http_client(package: Any, name: str, base_url: str) -> Any:
    """The HTTP client of `package`, a vendor's, for the endpoint `base_url` of the teacher `name`.

    Raises UserError when the proxy in the environment cannot be used.
    """
    from httpx2 import HTTPTransport, InvalidURL  # imported here, as the packages of the vendors are

    if needs_no_proxy(base_url):  # a transport of its own keeps the client from reading the proxies in the environment
        return package.DefaultHttpxClient(transport=HTTPTransport(limits=package.DEFAULT_CONNECTION_LIMITS))
    try:
        return package.DefaultHttpxClient()
    except (ImportError, ValueError, InvalidURL) as error:
        names = ", ".join(f"{scheme.upper()}_PROXY" for scheme in sorted(getproxies()) if scheme != "no")
        way = "install the package `socksio`" if isinstance(error, ImportError) else "give it as http://host:port"
        raise UserError(
            f"teachers.{name}: the proxy in the environment ({names}) cannot be used for {base_url}: {way}, unset the "
            "variable, or name the host in NO_PROXY"
        ) from None
