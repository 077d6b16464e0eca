"""What runs inside the embedded MLflow server's process: tie it to its parent, then serve.

Owns: the ties to the parent, the environment MLflow reads, and one in-process uvicorn server.
Deliberately does not know: spans, and everything else of ours; it is started by path and imports only MLflow.

MLflow's own command imports everything twice (once to check the database, once in a worker of uvicorn) and leaves
grandchildren behind when it is killed. Here there is one process and one import.

Arguments: ``HOST PORT BACKEND_URI ARTIFACT_DIR ALLOWED_HOSTS TIE``; ``TIE`` is ``thread`` to die with the thread that
started us (only right when that is the parent's main thread) or ``pipe`` for the pipe alone. Standard input is a pipe
nobody writes to: its end means that the parent is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1

# MLflow reads these at import time; the names are internal to it, so ``check_names`` compares them after the import.
BACKEND_STORE = "_MLFLOW_SERVER_FILE_STORE"
REGISTRY_STORE = "_MLFLOW_SERVER_REGISTRY_STORE"
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"


def die_with_parent(by_thread: bool) -> None:
    """Kill this process when its parent is gone, by whatever way the parent went."""
    if by_thread:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    def watch() -> None:
        while True:
            try:
                if not os.read(0, 4096):
                    break
            except OSError:
                break
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def check_names() -> None:
    """Refuse to serve when MLflow renamed the internal variables this module sets: it would use another database."""
    from mlflow.server import constants

    for ours, theirs in (
        (BACKEND_STORE, constants.BACKEND_STORE_URI_ENV_VAR),
        (REGISTRY_STORE, constants.REGISTRY_STORE_URI_ENV_VAR),
        (ARTIFACT_ROOT, constants.ARTIFACT_ROOT_ENV_VAR),
    ):
        if ours != theirs:
            sys.exit(f"this MLflow reads {theirs!r} where {ours!r} was expected: use an MLflow 3.17 or an external one")


def main(arguments: list[str]) -> None:
    host, port, backend, artifacts, allowed_hosts, tie = arguments
    die_with_parent(tie == "thread")
    os.environ.update(
        {
            BACKEND_STORE: backend,
            REGISTRY_STORE: backend,
            ARTIFACT_ROOT: artifacts,
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Prices would be fetched from the internet while a request with an inference waits for them.
            "MLFLOW_MODEL_CATALOG_URI": "",
            "DO_NOT_TRACK": "true",
        }
    )
    import uvicorn
    from mlflow.server.fastapi_app import app

    check_names()
    from mlflow.server import handlers

    # Creates or checks the tables before the first request, so that "answers" means "ready".
    handlers.initialize_backend_stores(backend, backend, artifacts)
    # lifespan off: MLflow's start-up hook would reap containers of its own assistant through docker.
    uvicorn.run(app, host=host, port=int(port), log_level="warning", lifespan="off", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1:])
