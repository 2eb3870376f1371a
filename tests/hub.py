"""A loopback server that behaves like the Hugging Face hub, and misbehaves on demand.

Two hosts, as there: the endpoint answers with the file's SHA-256 and a redirect, the content host
with the bytes. Each answers a request for a file with the next fault of `faults[name]`, if any.

    with Hub({"a.parquet": content}) as hub:
        hub.endpoint.faults["a.parquet"] = iter([status(500)] * 3)
        hub.content.faults["a.parquet"] = repeat(cut_after(10_000))
        ...                                     # with HF_ENDPOINT = hub.url
        hub.content.asked                       # what was requested
"""

import hashlib
import re
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

REPOSITORY = "someone/some-data"


class Asked(NamedTuple):
    """A request as a host saw it."""

    name: str
    first_byte: int
    authorization: str | None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host, name = self.server, self.path.split("?")[0].rsplit("/", 1)[1]
        bytes_from = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first_byte = int(bytes_from[1]) if bytes_from else 0
        host.asked.append(Asked(name, self.first_byte, self.headers.get("Authorization")))
        fault = next(host.faults.get(name, iter(())), None)
        (fault or host.behave)(self, name)

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.start(status, len(body), **headers)
        self.wfile.write(body)

    def start(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def wait(self, seconds: float | None) -> None:
        self.server.hub.closing.wait(seconds)


Fault = Callable[[Handler, str], None]


class Host(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: "Hub", behave: Fault):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.behave = hub, behave
        self.faults: dict[str, Iterator[Fault]] = {}
        self.asked: list[Asked] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks for a name of the address

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error
            super().handle_error(request, client_address)


class Hub:
    """The two hosts and their files, running within a `with`."""

    def __init__(self, files: dict[str, bytes], repository: str = REPOSITORY):
        self.files, self.repository = files, repository
        self.renamed_from: str | None = None
        self.digest_header: str | None = "X-Linked-ETag"
        self.closing = threading.Event()
        self.endpoint, self.content = Host(self, redirect), Host(self, send_file)
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


# --- Good behaviour --------------------------------------------------------------


def redirect(request: Handler, name: str) -> None:
    """The endpoint: the digest, the size, and where the bytes are."""
    hub = request.server.hub
    route = f"/datasets/{hub.renamed_from}/resolve/main/{name}"
    if hub.renamed_from and request.path == route:
        return request.answer(307, Location=route.replace(hub.renamed_from, hub.repository))
    if request.path != f"/datasets/{hub.repository}/resolve/main/{name}" or name not in hub.files:
        return request.answer(404, b"not here", X_Error_Message="Entry not found")
    body = hub.files[name]
    headers = {"Location": f"{hub.content.url}/content/{name}?X-Signature=abc"}
    if hub.digest_header:
        headers[hub.digest_header] = f'"{hashlib.sha256(body).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(body))
    return request.answer(302, **headers)


def send_file(
    request: Handler,
    name: str,
    write: Callable[[Handler, bytes], object] = lambda request, part: request.wfile.write(part),
    change: Callable[[bytes], bytes] = bytes,
    ranges: bool = True,
) -> None:
    """The content host: the bytes asked for, through `change` and `write` where those are given."""
    if request.headers.get("Authorization"):
        return request.answer(400, b"one authorization only: the signature in the address")
    body = change(request.server.hub.files[name])
    first = request.first_byte if ranges else 0
    # A digest of another kind, as the hub's content host names one: never to be taken for SHA-256.
    headers = {"ETag": f'"{hashlib.sha3_256(body).hexdigest()}"'}
    if ranges:
        headers["Accept-Ranges"] = "bytes"
    if ranges and "Range" in request.headers:
        if first >= len(body):
            return request.answer(416, Content_Range=f"bytes */{len(body)}")
        headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
    request.start(206 if "Content-Range" in headers else 200, len(body) - first, **headers)
    return write(request, body[first:])


# --- Faults ----------------------------------------------------------------------


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    """An answer of that status, whatever was asked."""
    return lambda request, name: request.answer(code, body, **headers)


def cut_after(num_bytes: int) -> Fault:
    """The connection is reset after so many of the bytes announced."""

    def write(request: Handler, part: bytes) -> None:
        request.wfile.write(part[:num_bytes])
        request.wait(0.05)  # what is on its way arrives: a reset may overtake it
        linger = struct.pack("ii", 1, 0)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.close_connection = True
        socket.close(request.connection.detach())

    return partial(send_file, write=write)


def short_by(num_bytes: int) -> Fault:
    """The answer ends, in good order, before all bytes announced have come."""

    def write(request: Handler, part: bytes) -> None:
        request.wfile.write(part[:-num_bytes])
        request.close_connection = True

    return partial(send_file, write=write)


def truncated_by(num_bytes: int) -> Fault:
    """The content host holds, and announces, fewer bytes than the endpoint promised."""
    return partial(send_file, change=lambda body: body[:-num_bytes])


def stalls_after(num_bytes: int) -> Fault:
    """So many bytes, then nothing for ever."""

    def write(request: Handler, part: bytes) -> None:
        request.wfile.write(part[:num_bytes])
        request.wait(None)
        request.close_connection = True

    return partial(send_file, write=write)


def paced(bytes_per_s: float, piece: int = 1 << 13) -> Fault:
    """All is well, but slow."""

    def write(request: Handler, part: bytes) -> None:
        for i in range(0, len(part), piece):
            request.wait(piece / bytes_per_s)
            request.wfile.write(part[i : i + piece])

    return partial(send_file, write=write)


def sent_after(event: threading.Event) -> Fault:
    """All is well, once that has happened."""

    def fault(request: Handler, name: str) -> None:
        event.wait()
        send_file(request, name)

    return fault


def wrong_bytes(request: Handler, name: str) -> None:
    """As many bytes as promised, one of them wrong, in the last quarter."""

    def change(body: bytes) -> bytes:
        i = len(body) * 3 // 4
        return body[:i] + bytes([body[i] ^ 1]) + body[i + 1 :]

    send_file(request, name, change=change)


def ignores_ranges(request: Handler, name: str) -> None:
    """The whole file, whatever part was asked for."""
    send_file(request, name, ranges=False)


def ignores_ranges_and_cut_after(num_bytes: int) -> Fault:
    """Both: the whole file anew, and never to its end."""
    return partial(cut_after(num_bytes), ranges=False)


def no_length(request: Handler, name: str) -> None:
    """The whole file in chunks, its length unknown to the end."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    body = request.server.hub.files[name]
    request.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
