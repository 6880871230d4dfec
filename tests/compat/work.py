"""Pieces of real work for a child; each is true when its result is right. Nothing here knows of a child."""

from __future__ import annotations

import os
import threading
from typing import Any

_COUNT = """<x:stylesheet version='1.0' xmlns:x='http://www.w3.org/1999/XSL/Transform'>
<x:template match='/'><n><x:value-of select='count(//b)'/></n></x:template></x:stylesheet>"""


def numpy() -> bool:
    import numpy as np

    matrix = np.random.default_rng(7).normal(size=(300, 300))
    np.save("/tmp/matrix.npy", matrix)
    solved = np.linalg.solve(np.load("/tmp/matrix.npy", mmap_mode="r"), np.ones(300))  # BLAS and its threads
    return bool(np.allclose(matrix @ solved, 1.0)) and bool(np.allclose(np.fft.ifft(np.fft.fft(matrix)).real, matrix))


def pandas() -> bool:
    import pandas as pd

    frame = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=60, tz="Europe/Berlin"), "sold": range(60)})
    frame.to_csv("/tmp/sold.csv", index=False)
    read = pd.read_csv("/tmp/sold.csv", parse_dates=["day"])
    months = read.groupby(read["day"].astype(str).str[:7])["sold"].sum()
    return months.to_dict() == {"2024-01": sum(range(31)), "2024-02": sum(range(31, 60))}


def scipy() -> bool:
    from scipy import integrate, optimize, sparse
    from scipy.sparse import linalg

    area, _ = integrate.quad(lambda x: x * x, 0, 3)
    lowest = optimize.minimize(lambda x: (x[0] - 2) ** 2 + 1, [10.0])
    laplace = sparse.diags([-1, 2.0, -1], [-1, 0, 1], shape=(500, 500), format="csc")
    residual = laplace @ linalg.spsolve(laplace, [1.0] * 500) - 1
    return bool(abs(area - 9) < 1e-9 and abs(lowest.x[0] - 2) < 1e-4 and abs(residual).max() < 1e-6)


def pillow() -> bool:
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(image).rectangle((100, 100, 300, 300), fill="red")
    image.filter(ImageFilter.GaussianBlur(3)).resize((64, 48)).save("/tmp/small.jpg")
    image.save("/tmp/image.png")
    return Image.open("/tmp/small.jpg").size == (64, 48) and Image.open("/tmp/image.png").getpixel((200, 200)) == (
        255,
        0,
        0,
    )


def lxml() -> bool:
    from lxml import etree, html

    tree = etree.fromstring(b"<a>" + b"".join(b"<b n='%d'/>" % n for n in range(1000)) + b"</a>")
    etree.ElementTree(tree).write("/tmp/tree.xml")
    count = etree.XSLT(etree.fromstring(_COUNT))(etree.parse("/tmp/tree.xml"))
    return count.getroot().text == "1000" and html.fromstring("<p>a<br>b").text_content() == "ab"


def cryptography() -> bool:
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    token = Fernet(Fernet.generate_key())
    key = ec.generate_private_key(ec.SECP256R1())
    key.public_key().verify(key.sign(b"text", ec.ECDSA(hashes.SHA256())), b"text", ec.ECDSA(hashes.SHA256()))  # raises
    return token.decrypt(token.encrypt(b"secret")) == b"secret"


def requests() -> bool:
    """To a server of the child's own, on its own loopback."""
    import http.server

    import requests as library

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = library.post(f"http://localhost:{server.server_port}/", json={"a": [1, 2]}, timeout=10)
        server.shutdown()
    return answer.json() == {"a": [1, 2]}


def matplotlib() -> bool:
    import matplotlib as library

    library.use("Agg")
    from matplotlib import pyplot

    pyplot.plot(range(10), [n * n for n in range(10)], label="squares")
    pyplot.legend()
    for name in ("plot.png", "plot.pdf", "plot.svg"):
        pyplot.savefig(f"/tmp/{name}")
    return all(os.path.getsize(f"/tmp/{name}") > 3000 for name in ("plot.png", "plot.pdf", "plot.svg"))


def scikit_learn() -> bool:
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score

    data, kinds = load_iris(return_X_y=True)
    model = RandomForestClassifier(n_estimators=20, n_jobs=2, random_state=0)  # joblib and its semaphores
    return bool(cross_val_score(model, data, kinds, cv=3).mean() > 0.9)


def sqlite() -> bool:
    import sqlite3

    return _fill(sqlite3.connect("/tmp/data.db"))


def sqlite_wal() -> bool:
    import sqlite3

    database = sqlite3.connect("/tmp/wal.db")
    database.execute("pragma journal_mode=wal")
    return _fill(database)


def _fill(database: Any) -> bool:
    with database:
        database.execute("create table t(a integer primary key, b text)")
        database.executemany("insert into t(b) values (?)", [(str(n),) for n in range(1000)])
    return bool(database.execute("select sum(a) from t").fetchone() == (500500,))


def multiprocessing_pool() -> bool:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(3) as pool:
        return pool.map(abs, range(-100, 0)) == list(range(100, 0, -1))


def threads() -> bool:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(lambda n: n * n, range(1000))) == 332833500


def subprocesses() -> bool:
    import subprocess
    import sys

    piped = subprocess.run(
        "echo some words | wc -w", shell=True, capture_output=True, text=True, check=True, timeout=20
    )
    python = subprocess.run(
        [sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True, timeout=20
    )
    return (piped.stdout.strip(), python.stdout.strip()) == ("2", "42")


def asyncio_streams() -> bool:
    import asyncio

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"hello\n")
            line = await reader.readline()
            writer.close()
            return line

    return asyncio.run(main()) == b"HELLO\n"


def tls() -> bool:
    """A handshake in memory, without certificates (anonymous Diffie-Hellman), and a message."""
    import ssl

    ends, pipes = [], (ssl.MemoryBIO(), ssl.MemoryBIO())
    for kind, (incoming, outgoing) in ((ssl.PROTOCOL_TLS_CLIENT, pipes), (ssl.PROTOCOL_TLS_SERVER, pipes[::-1])):
        context = ssl.SSLContext(kind)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("aNULL:@SECLEVEL=0")
        ends.append(context.wrap_bio(incoming, outgoing, server_side=kind == ssl.PROTOCOL_TLS_SERVER))
    for end in (*ends, *ends):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    ends[0].write(b"hello")
    return ends[1].read() == b"hello"
