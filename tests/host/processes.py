"""Work carried out in a process of its own: the runner kills every descendant it has, which must not be the tests'."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_agent.host import confine
from edge_agent.host.pins import Pins
from edge_agent.host.runner import Pipeline, descendants
from tools.values import Stage, StepResult

PYTHON = os.path.realpath("/usr/bin/python3")


def in_child(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What ``work`` returns (plain JSON), carried out in a forked subreaper; its exception fails the test."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            signal.alarm(int(seconds))
            confine.become_subreaper()
            answer = {"returned": work()}
            status = 0
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        finally:
            with os.fdopen(write_end, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert said, f"the child ended with {status} and said nothing"
    answer = json.loads(said)
    assert "returned" in answer, answer["raised"]
    return answer["returned"]


def stage(*argv: str, **fields: Any) -> Stage:
    return Stage(argv[0], tuple(argv), **fields)


def script(code: str, *words: str, **fields: Any) -> Stage:
    """A stage that runs Python ``code``; ``words`` are its ``sys.argv[1:]``."""
    return stage(PYTHON, "-I", "-S", "-c", code, *words, **fields)


def serve(selector: selectors.BaseSelector, pipeline: Pipeline, until: Callable[[], bool]) -> None:
    while not until():
        for key, _ in selector.select(max(0.0, min(0.05, pipeline.deadline - time.monotonic()))):
            key.data()
        pipeline.check_time(time.monotonic())


def carry_out(*stages: Stage, cancel_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    """The result of one pipeline, and ``left``: the pids below this process once it was told. Call it ``in_child``."""
    selector = selectors.DefaultSelector()
    results: list[StepResult] = []
    pipeline = Pipeline(stages, Pins(stage.binary for stage in stages), selector, results.append)

    def over() -> bool:
        if cancel_when is not None and not pipeline.finished and cancel_when():
            pipeline.cancel("the test said so")
        return bool(results)

    serve(selector, pipeline, over)
    assert len(results) == 1
    assert not selector.get_map(), "something is still registered"
    return dict(results[0].to_json(), left=descendants(os.getpid()))


def run(*stages: Stage, cancel_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    result: dict[str, Any] = in_child(lambda: carry_out(*stages, cancel_when=cancel_when))
    return result


def alive(pid: int) -> bool:
    """Whether ``pid`` lives; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What ``condition`` returns once it is true; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def written_by(program: Path, text: str) -> Iterator[Path]:
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    yield program
