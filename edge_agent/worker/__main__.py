"""The worker process: ``python -m edge_agent.worker``.

Owns: starting and ending in order. Sockets first, then the broker's hello, then ``ready``; at SIGTERM the task is
cancelled, which kills what runs, and the process ends within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STARTED = time.monotonic()
# Where the container mounts the directory it shares with the host.
DEFAULT_DIRECTORY = "/run/chargehand"
# How long open answers may take to be finished at SIGTERM, seconds; the unit's own limit comes after.
SHUTDOWN_S = 3
# The window of a model the gateway did not describe, tokens.
CONTEXT_TOKENS = 32768


async def serve(directory: Path) -> None:
    """Serve tasks until SIGTERM, or until the broker goes: without a broker nothing can be done."""
    import uvicorn

    from a2a_bridge.server import Handler, application
    from edge_agent.worker.agent import Agent
    from edge_agent.worker.channels import ToolsChannel, listen
    from inference.remote import RemoteModel

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are this module's: the task is cancelled first

    tools = ToolsChannel(directory)
    remote = RemoteModel("unknown", "unknown", CONTEXT_TOKENS)
    inference = await asyncio.start_unix_server(
        remote.serve_connection, sock=listen(directory, "inference.sock"), limit=1 << 20
    )
    agent = Agent(tools, remote)
    app = application(Handler(agent.run, agent.cancel), "chargehand-edge", "0.1.0")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_S, ws="none"
    )
    server = Server(config)
    await tools.start()

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve(sockets=[listen(directory, "a2a.sock")]))
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({asyncio.ensure_future(tools.hello()), stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return
        while not server.started and not serving.done():
            await asyncio.sleep(0.002)
        tools.say_ready({"pid": os.getpid(), "start_s": round(time.monotonic() - STARTED, 3)})
        waits = {stopping, asyncio.create_task(tools.gone.wait()), serving}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        agent.cancel()
        server.should_exit = True
        await asyncio.wait({serving}, timeout=SHUTDOWN_S + 2)
        inference.close()
        await remote.aclose()
        await tools.aclose()


def main() -> int:
    """Run the worker; the exit status is 0 for an orderly end."""
    directory = Path(os.environ.get("CHARGEHAND_WORKER_DIR", DEFAULT_DIRECTORY))
    if not directory.is_dir():
        sys.stderr.write(
            f"chargehand worker: {directory} is not a directory; it is started by a unit, not by hand "
            "(CHARGEHAND_WORKER_DIR names another one)\n"
        )
        return 2
    # The first process of a container has no default handlers: without one, a stop during the imports costs the whole
    # time between SIGTERM and SIGKILL.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(serve(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
