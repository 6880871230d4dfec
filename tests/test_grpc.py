"""A protocol of the application's own on top of a passed socket pair: gRPC, served by a child that has no network."""

from __future__ import annotations

import os
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, write

from pisupervisor import ProcessIsolator, Security

grpc = pytest.importorskip("grpc")
pytestmark = linux

SERVICE = '''
"""Knows nothing of its host but one connected socket, and serves gRPC to whoever is at the other end."""

import socket
import tempfile
import threading
from concurrent import futures

import grpc


def serve(sock):
    """Until the other end closes. gRPC opens its sockets itself, so a relay joins one in /tmp to the one that was given."""
    folder = tempfile.mkdtemp()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([handlers()])
    server.add_insecure_port(f"unix:{folder}/grpc")
    server.start()
    relay = socket.socket(socket.AF_UNIX)
    relay.connect(f"{folder}/grpc")
    back = threading.Thread(target=pump, args=(relay, sock))
    back.start()
    pump(sock, relay)
    back.join()
    server.stop(None).wait()
    return "served"


def pump(source, target):
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def handlers():
    return grpc.method_handlers_generic_handler("Tools", {
        "Shout": grpc.unary_unary_rpc_method_handler(lambda text, context: text.upper()),
        "Count": grpc.unary_stream_rpc_method_handler(lambda n, context: (b"%d" % i for i in range(int(n)))),
        "Sum": grpc.stream_unary_rpc_method_handler(lambda numbers, context: b"%d" % sum(map(int, numbers))),
        "Echo": grpc.stream_stream_rpc_method_handler(lambda items, context: items),
        "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
    })


def refuse(_request, context):
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "not for you")
'''


def pump(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


@pytest.fixture(params=["default", "strict"])
def channel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """To a server in a child, over a socket pair. The client, too, wants an address: a relay of the host's."""
    path = write(tmp_path, "service.py", SERVICE)
    with ProcessIsolator.create(
        import_paths=[sysconfig.get_path("purelib")], security=Security(seccomp=request.param)
    ) as isolator:
        ours, theirs = socket.socketpair()
        serving = isolator.submit_call(isolator.invoke_method, path, "serve", theirs)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "relay"))
        listener.listen()
        channel = grpc.insecure_channel(f"unix:{tmp_path}/relay")
        relay = threading.Thread(target=_relay, args=(listener, ours))
        relay.start()
        yield channel
        channel.close()
        relay.join(10)
        theirs.close()
        assert serving.result(10) == "served"


def _relay(listener: socket.socket, ours: socket.socket) -> None:
    with listener, ours:
        client, _address = listener.accept()
        with client:
            back = threading.Thread(target=pump, args=(client, ours))
            back.start()
            pump(ours, client)
            back.join()


def test_grpc_over_a_passed_socket_pair(channel: Any) -> None:
    def ask(kind: str, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(channel, kind)(f"/Tools/{name}")
        return lambda request: method(request, timeout=20)

    assert ask("unary_unary", "Shout")(b"hello") == b"HELLO"
    assert list(ask("unary_stream", "Count")(b"5")) == [b"0", b"1", b"2", b"3", b"4"]
    assert ask("stream_unary", "Sum")(iter([b"1", b"2", b"39"])) == b"42"
    big = [os.urandom(100_000) for _ in range(20)]
    assert list(ask("stream_stream", "Echo")(iter(big))) == big
    with pytest.raises(grpc.RpcError) as caught:
        ask("unary_unary", "Refuse")(b"")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "not for you")
