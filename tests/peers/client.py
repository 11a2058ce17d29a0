"""A client of /ws without code of pathmeter: Python's websockets. Prints one JSON object per line.

client.py URL echo SIZE…     counts of messages, and the sizes whose echo differed
client.py URL codes LIMIT    close codes of several connections
client.py URL stay           "ready" after a message, then the agent's close code
"""

import json
import sys

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


def report(**result):
    print(json.dumps(result), flush=True)


def messages(size):
    text = ('{"seq": 123, "ts": 1678886400100}' + "é" * size)[:size]
    while len(text.encode()) > size:
        text = text[:-1]
    return [text, bytes(at % 256 for at in range(size))]


def echo(url, sizes):
    sent, wrong, payload = 0, [], 0
    with connect(url) as socket:
        for size in map(int, sizes):
            for message in messages(size):
                parts = [message[at : at + 1000] for at in range(0, max(len(message), 1), 1000)]
                # As one frame, and in fragments.
                for form in (message, iter(parts)):
                    socket.send(form)
                    sent += 1
                    payload += len(message.encode() if isinstance(message, str) else message)
                    back = socket.recv(timeout=60)
                    if type(back) is not type(message) or back != message:
                        wrong.append(size)
        pong = socket.ping(b"are you there").wait(60)
    report(sent=sent, payload=payload, wrong=wrong, pong=pong)


def closed_by(url, act):
    with connect(url) as socket:
        try:
            act(socket)
            socket.recv(timeout=60)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None
    return "open"


def codes(url, limit):
    report(
        too_large=closed_by(url, lambda socket: socket.send(b"x" * (int(limit) + 1))),
        far_too_large=closed_by(url, lambda socket: socket.send(b"x" * (int(limit) * 8))),
        fragments_too_large=closed_by(url, lambda socket: socket.send(iter([b"x" * int(limit), b"x"]))),
        no_text=closed_by(url, lambda socket: socket.send(b"\xff\xfe", text=True)),
        normal=closed_by(url, lambda socket: socket.close(1000)),
        own=closed_by(url, lambda socket: socket.close(4321, "why not")),
    )


def stay(url):
    with connect(url) as socket:
        socket.send("here")
        report(ready=socket.recv(timeout=60) == "here")
        try:
            socket.recv(timeout=60)
        except ConnectionClosed as closed:
            report(code=closed.rcvd and closed.rcvd.code)


url, what, *arguments = sys.argv[1:]
{"echo": lambda: echo(url, arguments), "codes": lambda: codes(url, *arguments), "stay": lambda: stay(url)}[what]()
