"""Scalars and texts for TensorBoard."""

from __future__ import annotations

import socket
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.extras import require


class TensorBoardEvents:
    """An event file, written by the thread that calls it.

    `tensorboardX.SummaryWriter` writes in a thread of its own. Where the disk is full that thread ends without a
    word, and whoever writes next waits for it for ever; here each call raises what the file system says.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Opens a new file.

        Args:
            folder: of the run's event files, created if need be.
            first_step: TensorBoard hides what earlier files say of this step and later ones.
        """
        require("tensorboardX")
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard knows such files by their names. The suffix, because the time is in seconds only.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.from-step-{first_step}"
        self._file, self._event = RecordWriter(str(folder / name)), Event
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=first_step, wall_time=time.time(), session_log=start))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds finite numbers by name; those written since the last `flush` may be lost if the process is killed."""
        from tensorboardX.summary import Summary, scalar  # pyright: ignore[reportAttributeAccessIssue]

        values = [value for name, number in numbers.items() for value in scalar(name, number).value]
        self._add(self._event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Adds a text; may be lost as `write` says."""
        from tensorboardX.summary import text  # pyright: ignore[reportAttributeAccessIssue]

        self._add(self._event(step=step, wall_time=time.time(), summary=text(name, markdown)))

    def flush(self) -> None:
        """Hands over what is held back."""
        self._file.flush()

    def close(self) -> None:
        """Hands over what is held back, and closes the file."""
        self._file.close()

    def _add(self, event: Any) -> None:
        self._file.write(event.SerializeToString())


def as_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Completions with their rewards; their texts are blocks of code, of which nothing is read as markup."""
    parts = []
    for row in rows:
        advantage = row.get("advantage")
        told = f"reward {row['reward']:.4g}" + ("" if advantage is None else f", advantage {advantage:.4g}")
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        parts += [f"**{told}**", _block(prompt), _block(row["completion"])]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    plain = text.encode("utf-8", "backslashreplace").decode()
    return textwrap.indent(plain or "(nothing)", "    ", lambda line: True)
