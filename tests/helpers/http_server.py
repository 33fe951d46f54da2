"""A real HTTP server on the loopback address that does to a client what servers do.

Each path has a list of behaviours, one for each request; the last one stays. A behaviour is a
function that is given the handler of the request.
"""

import contextlib
import hashlib
import re
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"
    tunnel: ssl.SSLSocket | None = None

    def do_GET(self):
        name = urlsplit(self.path).path
        host = self.headers.get("Host", "").partition(":")[0]
        seen = {key.lower(): value for key, value in self.headers.items()}
        with self.server.lock:
            self.server.requests[name].append(seen)
            behaviours = self.server.hosts.get(host, self.server.behaviours).get(name)
            if not behaviours:
                behaviours = [status(404)]
            behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        # some tests want the client to go
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            behaviour(self)

    def do_CONNECT(self):
        """As a proxy: whatever host is asked for is this server, over TLS."""
        self.send_response(200)
        self.end_headers()
        self.tunnel = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.connection = self.request = self.tunnel
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def finish(self):
        super().finish()
        if self.tunnel is not None:
            self.tunnel.close()  # the server knows only the connection below it

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def cut(self):
        """End the connection without a word."""
        self.close_connection = True
        self.connection.close()


class Server(ThreadingHTTPServer):
    """Runs in a thread of its own, in a with statement."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behaviours: dict[str, list[Callable]] = {}
        self.hosts: dict[str, dict[str, list[Callable]]] = {}  # for a proxy: host -> behaviours
        self.requests: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.lock = threading.Lock()
        self.tls: ssl.SSLContext | None = None

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients that go away are part of the tests

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def offer(self, name, *behaviours):
        """Say what a path does; gives its address."""
        self.behaviours[name] = list(behaviours)
        return self.address + name


def tag_of(content):
    return f'"{hashlib.md5(content).hexdigest()}"'


def ranges(content, cut_after=None, **headers):
    """The file, or the part of it that is asked for.

    cut_after: bytes after which the connection ends.
    """

    def behave(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if condition is not None and condition != tag_of(content):
            asked = None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(content):
            handler.reply(416, Content_Range=f"bytes */{len(content)}")
            return
        body = content[start:]
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("ETag", tag_of(content))
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            handler.cut()

    return behave


def cut_whole(content, after, gate=None):
    """The beginning of the file from a server without ranges, then the end of the connection.

    gate: an event that the server waits for before it ends the connection.
    """

    def behave(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:after])
        if gate is not None:
            gate.wait(20)
        handler.cut()

    return behave


def slow(content):
    """The whole file after a pause of four seconds, in which a second client comes."""

    def behave(handler):
        time.sleep(4)
        handler.reply(200, content)

    return behave


def redirect(target, code=302):
    return lambda handler: handler.reply(code, Location=target)


def status(code, body=b"", **headers):
    return lambda handler: handler.reply(code, body, **headers)


def whole(content, **headers):
    """The file, without support for ranges."""
    return status(200, content, **headers)


def page(text, code=200, **headers):
    return status(code, text.encode(), Content_Type="text/html; charset=utf-8", **headers)
