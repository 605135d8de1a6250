"""The address of an endpoint: what a person may write, and what it means."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from gemma_serve.adapters.openai_answers import shorten
from gemma_serve.errors import UsageError


def endpoint_url(text: str) -> str:
    """The endpoint's own address: `http://host:8000`, also from `http://host:8000/v1/`.

    Raises:
        UsageError: it is no http(s) address, or it carries a user name or password.
    """
    hint = "give the address of the server, such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(text.strip())
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        raise UsageError("the URL can't be read", code="smoke.bad_url", hint=hint) from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "the URL holds a user name or a password",
            code="smoke.bad_url",
            hint="put the API key into GEMMA_SERVE_API_KEY or a file named by --api-key-file",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        message = f"{shorten(text, 80)!r} is no address of a server"
        raise UsageError(message, code="smoke.bad_url", hint=hint)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{host}{port}{path}"


def is_local(host: str) -> bool:
    """Whether `host` (a name or an address) is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
