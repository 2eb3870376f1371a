"""A loopback server that behaves like the Hugging Face hub, and misbehaves on demand.

Two hosts, as there: the endpoint answers with the file's SHA-256 and a redirect, the content host
with the bytes. Each answers a request for a file with the next fault of `faults[name]`, if any:
`hub.content.faults["a.parquet"] = repeat(sends(most=10_000, then=reset))`.
"""

import hashlib
import re
import socket
import socketserver
import struct
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "someone/some-data"
Asked = namedtuple("Asked", "name first_byte authorization")  # a request as a host saw it


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host, name = self.server, self.path.split("?")[0].rsplit("/", 1)[1]
        bytes_from = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first_byte = int(bytes_from[1]) if bytes_from else 0
        host.asked.append(Asked(name, self.first_byte, self.headers.get("Authorization")))
        (next(host.faults.get(name, iter(())), None) or host.behave)(self, name)

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.start(status, headers | {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class Host(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: "Hub", behave: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.behave = hub, behave
        self.faults: dict[str, Iterator[Callable]] = {}
        self.asked: list[Asked] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks for a name of the address

    def handle_error(self, *_) -> None:
        pass  # a client went away


class Hub:
    """The two hosts and their files, running within a `with`."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.repository = files, REPOSITORY
        self.renamed_from: str | None = None
        self.digest_header: str | None = "X-Linked-ETag"
        self.closing = threading.Event()
        self.endpoint, self.content = Host(self, redirect), Host(self, send)
        self.url = self.endpoint.url

    def __enter__(self) -> "Hub":
        for host in (self.endpoint, self.content):
            threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        for host in (self.endpoint, self.content):
            host.shutdown()
            host.server_close()


def redirect(request: Handler, name: str) -> None:
    """The endpoint: the digest, and where the bytes are."""
    hub, route = request.server.hub, f"/datasets/{{}}/resolve/main/{name}"
    if hub.renamed_from and request.path == route.format(hub.renamed_from):
        return request.answer(307, Location=route.format(hub.repository))
    if request.path != route.format(hub.repository) or name not in hub.files:
        return request.answer(404, b"not here", X_Error_Message="Entry not found")
    headers = {"Location": f"{hub.content.url}/content/{name}?X-Signature=abc"}
    if hub.digest_header:
        headers[hub.digest_header] = f'"{hashlib.sha256(hub.files[name]).hexdigest()}"'
    return request.answer(302, **headers)


def send(
    request: Handler,
    name: str,
    change: Callable[[bytes], bytes] = bytes,
    most: int | None = None,
    then: Callable[[Handler], object] = lambda request: None,
    ranges: bool = True,
    piece_s: float = 0,
) -> None:
    """The content host: the bytes asked for, through `change`, up to `most` of them, and `then`."""
    if request.headers.get("Authorization"):
        return request.answer(400, b"one authorization only: the signature in the address")
    body = change(request.server.hub.files[name])
    # A digest of another kind, as the hub's content host names one: never to be taken for SHA-256.
    status, headers = 200, {"ETag": f'"{hashlib.sha3_256(body).hexdigest()}"'}
    if ranges and "Range" in request.headers:
        first = request.first_byte
        if first >= len(body):
            return request.answer(416, Content_Range=f"bytes */{len(body)}")
        status, headers["Content-Range"] = 206, f"bytes {first}-{len(body) - 1}/{len(body)}"
        body = body[first:]
    request.start(status, headers | {"Content-Length": str(len(body))})
    body = body[:most]
    for start in range(0, len(body), 1 << 13):
        request.server.hub.closing.wait(piece_s)
        request.wfile.write(body[start : start + (1 << 13)])
    return then(request)


sends = partial(partial, send)  # as `send` does, but for what is named


def status(code: int, body: bytes = b"", **headers: str) -> Callable:
    """An answer of that status, whatever was asked."""
    return lambda request, name: request.answer(code, body, **headers)


# What comes after `most` of the bytes announced.


def close(request: Handler) -> None:
    request.close_connection = True


def stall(request: Handler, name: str = "") -> None:
    request.server.hub.closing.wait()
    request.close_connection = True


def reset(request: Handler) -> None:
    request.server.hub.closing.wait(0.05)  # what is on its way arrives: a reset may overtake it
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.close_connection = True
    socket.close(request.connection.detach())
