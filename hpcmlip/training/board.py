"""Figures for TensorBoard."""

import contextlib
import logging
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)


class Board:
    """An event file in `folder`. Never raises OSError: warns once and does without.

    Written by RecordWriter and not by torch's SummaryWriter, whose thread meets errors where nobody catches them, and
    on whose queue training would wait.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self._folder, self._writer = folder, None
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter((folder / name).open("wb"))
        except OSError as error:
            self._give_up(error)
        self._write(Event(file_version="brain.Event:2"))
        # steps after the checkpoint that the run goes on from are made again: what was shown of them is dropped
        self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, figures: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # of what was told already
                self._writer.close()
            self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning(
            "nothing more for TensorBoard: cannot write %s (%s); training goes on", self._folder, error.strerror
        )
        self.close()
