"""Real servers on this machine, good ones and bad ones, each in a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmalign.serving import application


class Running:
    """A reward server that can be stopped like a process that dies: its connections are cut."""

    def __init__(self, rewards: Any, made_with: Any = None, **settings: Any) -> None:
        import uvicorn

        from mmalign.serving import ServingSettings

        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # no Nagle
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = application([(reward, made_with or {}) for reward in rewards], ServingSettings(**settings))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def kill(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


@contextmanager
def running(*rewards: Any, made_with: Any = None, **settings: Any) -> Iterator[Running]:
    """A server of these rewards while the block lasts; made_with: what it takes for their settings."""
    server = Running(rewards, made_with, **settings)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def pretending(like: Running, answer: Callable[[bytes], tuple[int, bytes]]) -> Iterator[str]:
    """The address of a server that describes itself as another one does and answers by `answer(body)`."""
    import httpx

    described = httpx.get(f"{like.url}/describe").content

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, described)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*answer(body))

        def reply(self, status: int, body: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the other side has stopped waiting

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
