"""The child of engines/process.py: one engine, driven by messages, gone when its parent is.

``python -m evalsuite.engines.worker FD`` reads (method, arguments) from the socket FD and answers with
(done, value), (error, an EvalError) or, while it generates, (event, None). Any other exception ends the
process, with its traceback in the log.
"""

import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from evalsuite.core.errors import EvalError
from evalsuite.core.spec import Serving
from evalsuite.engines.base import Generator
from evalsuite.engines.fake import PREFIX, FakeGenerator
from evalsuite.engines.process_tree import send


def main(fd: int) -> None:
    """Serve until asked to close, or until the other end is gone."""
    os.set_inheritable(fd, False)  # a grandchild that held it would hide this process's end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _sign, _frame: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, args=(fd,), daemon=True).start()
    with Connection(fd) as connection:
        _serve(connection)


def _serve(connection: Connection) -> None:
    engine: Generator | None = None
    try:
        while True:
            name, arguments = connection.recv()
            if name == "close":
                return
            try:
                if name == "load":
                    engine = _open(*arguments)
                    value: Any = (engine.facts, engine.load)
                elif name == "generate":
                    prompts, output_len = arguments
                    value = _engine(engine).generate(
                        prompts, output_len, lambda: connection.send(("event", None))
                    )
                else:
                    value = getattr(_engine(engine), name)(*arguments)
            except EvalError as error:
                connection.send(("error", error))
            else:
                connection.send(("done", value))
    except EOFError:
        return
    finally:
        if engine is not None:
            engine.close()


def _open(model: str, serving: Serving, log: Path) -> Generator:
    if model.startswith(PREFIX):
        return FakeGenerator(model, serving)
    from evalsuite.engines.select import open_generator

    return open_generator(model, serving, log)


def _engine(engine: Generator | None) -> Generator:
    assert engine is not None, "load comes first"
    return engine


def _end_with_parent(fd: int) -> None:
    """Wait for the other end to close, and end everything that this process started, itself last."""
    poller = select.poll()
    poller.register(fd, 0)  # a hang-up is reported whatever is asked for
    poller.poll()
    send(psutil.Process().children(recursive=True), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
