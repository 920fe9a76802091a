"""Is the hub, or the mirror that HF_ENDPOINT names, within reach? Decided once, before huggingface_hub retries."""

import os
import socket
import threading
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants

CONNECT_SECONDS = 4.0  # for the one attempt that decides whether there is a connection at all
ANSWER_SECONDS = 60.0  # for a hub that was reached and is slow to answer


def endpoint() -> str:
    """Read at every call, so that HF_ENDPOINT can be set in a notebook's cell."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def out_of_reach() -> str | None:
    """Why nothing can be fetched now; None if it can be tried."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    reason = _unreachable(endpoint())
    return reason and f"{endpoint()} cannot be reached ({reason})"


def is_the_disks_fault(error: Exception) -> bool:
    """A disk that is full or not writable is no reason to look for weights or text elsewhere."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)


def not_to_be_had(what: str, reason: str, local_copy: str, in_the_box: str) -> ConnectionError:
    return ConnectionError(
        f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and {reason}.\n"
        "Three ways out: set HF_ENDPOINT to a mirror of the hub that this machine can reach; "
        f"give {local_copy}; or take {in_the_box}."
    )


def _unreachable(endpoint: str) -> str | None:
    """Why no connection can be opened to the endpoint, or to the proxy that leads there; None if one can.

    Asked once, before huggingface_hub, which would retry. In a thread, because looking a name up knows no timeout.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"HF_ENDPOINT={endpoint!r}: allowed is a URL such as https://huggingface.co")
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or {"https": 443, "socks5": 1080}.get(url.scheme, 80)
    outcome = [f"{url.hostname} did not answer within {CONNECT_SECONDS:g} s"]

    def connect():
        try:
            socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(str(error))

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(CONNECT_SECONDS)
    return outcome[-1]
