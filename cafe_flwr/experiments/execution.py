"""Executes the runs of an experiment in worker processes, several at a time, with one thread each."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import NamedTuple

from cafe_flwr.core.log import logger
from cafe_flwr.experiments.folders import state_of
from cafe_flwr.experiments.plan import PlannedRun


class Event(NamedTuple):
    """A run has started or ended, with the reason if it failed."""

    run: PlannedRun
    ended: bool
    failure: str | None = None


def execute(runs: Sequence[PlannedRun], jobs: int) -> Generator[Event | None, None, None]:
    """Execute runs in worker processes, ``jobs`` at a time, in their order.

    A run that fails, or kills its process, ends with a reason, and the others go on. When the caller closes the
    generator or its process ends, the workers end at once; their runs can be resumed.

    Yields
    ------
    An event for the start and the end of every run, and None about once a second in between.
    """
    spawn = multiprocessing.get_context("spawn")
    lifeline, end = spawn.Pipe(duplex=False)
    waiting, events = deque(runs), Queue[Event]()
    slots = [
        threading.Thread(target=_work_off, args=(waiting, events, lifeline), daemon=True)
        for _ in range(min(jobs, len(runs)))
    ]
    ended = 0
    try:
        with _one_thread_each():
            for slot in slots:
                slot.start()
            while ended < len(runs):
                try:
                    event = events.get(timeout=1)
                except Empty:
                    yield None
                    continue
                ended += event.ended
                yield event
    finally:
        waiting.clear()
        end.close()
        for slot in slots:
            slot.join()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are started inside use one thread in every numerical library."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work_off(waiting: deque[PlannedRun], events: Queue[Event], lifeline: Connection) -> None:
    """Give one run after the other to a worker process, and replace a worker that died."""
    spawn = multiprocessing.get_context("spawn")
    pool: ProcessPoolExecutor | None = None
    while True:
        try:
            run = waiting.popleft()
        except IndexError:
            break
        events.put(Event(run, ended=False))
        try:
            pool = pool or ProcessPoolExecutor(1, spawn, _begin_worker, (lifeline,))
            failure = pool.submit(run_one, run).result()
        except BrokenProcessPool:
            failure = "its process died: killed, perhaps for lack of memory"
            if pool:
                pool.shutdown()
            pool = None
        except Exception as error:
            failure = _last_line(error)
        events.put(Event(run, ended=True, failure=failure))
    if pool:
        pool.shutdown()


def _begin_worker(lifeline: Connection) -> None:
    """Set up a worker with one thread, which ends when the command ends."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the command decides

    def watch() -> None:
        lifeline.poll(None)  # nothing is ever sent: returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(run: PlannedRun) -> str | None:
    """Execute a run in this process, from its checkpoint if it has one.

    Returns None, or the reason why it failed: the last line of the exception, which is in full in the run's log.
    """
    from cafe_flwr.app.parts import build_networks, federation, modality_of
    from cafe_flwr.app.run import run as run_federation
    from cafe_flwr.client.app import make_client_app
    from cafe_flwr.engine import InProcessGrid

    with _quiet(run.log):
        try:
            settings = run.settings.model_copy(update={"resume": state_of(run) == "resumable"})
            app = make_client_app(
                lambda context: build_networks(settings),
                lambda client, context: federation(settings).load(client),
                modality_of=lambda client, context: modality_of(settings, client),
                state_dir=lambda context: str(settings.results / "personal"),
            )
            run_federation(InProcessGrid(app, 1, settings.to_run_config()), settings)
        except Exception as error:
            logger.exception("The run failed")
            return _last_line(error)
    return None


def _last_line(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1].strip()


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send everything that this process prints or logs to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    loggers = [logger, logging.getLogger("py.warnings")]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.captureWarnings(True)
        try:
            for each in loggers:
                each.handlers, each.propagate = [handler], False
                each.setLevel(logging.INFO)
            yield
        finally:
            logging.captureWarnings(False)
            for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
                each.handlers, each.propagate = handlers, propagate
                each.setLevel(level)
