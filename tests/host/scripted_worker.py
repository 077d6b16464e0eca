"""A worker for tests, plain Python: it passes lines between ``a2a.sock`` and the broker, so a test speaks as the worker.

``argv[1]`` is what kind of worker it is; each kind but ``sound`` is one of the ways in which a worker can be bad.
"""

import os
import select
import signal
import socket
import sys
import time

KIND = sys.argv[1]
DIRECTORY = os.environ["CHARGEHAND_WORKER_DIR"]


def listen(name, backlog=4):
    path = os.path.join(DIRECTORY, name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(backlog)
    return listener


def note(name, text):
    with open(os.path.join(DIRECTORY, name), "w") as file:
        file.write(text)


if KIND == "crash":
    sys.stderr.write("this worker cannot start: no module named 'nothing'\n")
    sys.exit(3)
if KIND == "stubborn":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note("escaped", str(os.getpid()))
            while True:
                time.sleep(60)
        os._exit(0)
if KIND == "never":
    time.sleep(600)
if KIND == "full":
    # It listens, takes nobody, and has filled its own queue: a blocking connect would wait for ever.
    listener = listen("tools.sock", 0)
    held = []
    for _ in range(3):
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.setblocking(False)
        try:
            stream.connect(os.path.join(DIRECTORY, "tools.sock"))
        except OSError:
            break
        held.append(stream)
    time.sleep(600)
if KIND == "link":
    os.symlink(sys.argv[2], os.path.join(DIRECTORY, "tools.sock"))
    time.sleep(600)
if KIND == "mess":
    os.mkdir(os.path.join(DIRECTORY, "task.new"))
    os.mkdir(os.path.join(DIRECTORY, "a2a.sock"))
    os.chmod(os.path.join(DIRECTORY, "a2a.sock"), 0)
    os.symlink("/etc", os.path.join(DIRECTORY, "inference.sock"))

tools = listen("tools.sock")
drive = listen("a2a.sock") if KIND != "mess" else None
broker, _ = tools.accept()
hello = broker.makefile("rb").readline()
note("hello.json", hello.decode())
if KIND == "mute":
    time.sleep(600)
broker.sendall(b'{"ready":true,"pid":%d,"start_s":0.01,"extra":"<script>"}\n' % os.getpid())
driver = None
while True:
    watched = [broker, *([drive] if drive else []), *([driver] if driver else [])]
    for stream in select.select(watched, [], [])[0]:
        if stream is drive:
            driver, _ = drive.accept()
            continue
        data = stream.recv(65536)
        if stream is driver:
            if data.startswith(b"DEAF "):
                # From now on it asks and never reads.
                for number in range(1, 1000):
                    call = b'{"call":{"call_id":"c%d","tool":"read","arguments":{"path":"%s"}}}\n'
                    broker.sendall(call % (number, data[5:].strip()))
                    time.sleep(0.01)
            if data:
                broker.sendall(data)
            else:
                driver = None
        elif not data:
            sys.exit(0)
        elif driver is not None:
            driver.sendall(data)
