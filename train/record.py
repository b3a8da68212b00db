"""metrics.jsonl and TensorBoard: one row an epoch, and a position in them that a checkpoint can hold."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import parallel
import report

TIMINGS = ("seconds", "images_per_second")  # the fields of a row that differ from run to run


class Record:
    """What a run has measured so far: the calls of the epoch under way, the rows before it, and the time it took."""

    def __init__(self, folder: Path, position: dict[str, Any] | None, tensorboard: bool = False):
        position = position or {}
        # [steps, loss, accuracy] of each; JSON holds null for a NaN.
        self._calls: list[list[Any]] = [
            [n, *(np.asarray(values, np.float64) for values in rest)] for n, *rest in position.get("calls", [])
        ]
        self.epoch_seconds: float = position.get("epoch_seconds", 0.0)
        self.timed: list[float] = position.get("timed", [0, 0.0])  # steps, seconds; without each process's first call
        self._file = self._board = None
        if parallel.is_first():
            if tensorboard:
                self._board = open_board(folder / "tensorboard", position.get("step", 0))
            self._file = open_at(folder / "metrics.jsonl", position.get("bytes", 0))

    def add(self, steps: int, loss: Any, accuracy: Any, seconds: float, timed: bool) -> None:
        """One call's results; they may still be on their way from the device."""
        self._calls.append([steps, loss, accuracy])
        self.epoch_seconds += seconds
        if timed:
            self.timed = [self.timed[0] + steps, self.timed[1] + seconds]

    def end_epoch(self, row: dict[str, Any], test_error: Any, batch_size: int) -> dict[str, Any]:
        """Writes the row of an epoch; returns it. With several seeds each figure is a list."""
        self._fetch()
        steps = sum(n for n, *_ in self._calls)
        mean = lambda which: sum(n * np.asarray(values[which]) for n, *values in self._calls) / steps
        results = {"train_loss": mean(0), "train_error": 1 - mean(1), "test_error": np.asarray(test_error)}
        count = results["train_loss"].size
        times = {"seconds": self.epoch_seconds, "images_per_second": count * steps * batch_size / self.epoch_seconds}
        row = {**row, **{name: value.tolist() for name, value in results.items()}, **times}
        if self._file is not None:
            finite = all(np.isfinite(value).all() for value in results.values())
            reason = {} if finite else {"reason": "null stands for NaN or infinity: the run diverged"}
            self._file.write(json.dumps(report.valid_json({**row, **reason}), allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                for seed, one in enumerate(np.atleast_1d(value)):
                    self._board.add_scalar(name if np.ndim(value) == 0 else f"{name}/{seed}", one, row["step"])
            self._board.flush()
        self._calls, self.epoch_seconds = [], 0.0
        return row

    def position(self, step: int) -> dict[str, Any]:
        """Where this stands, for JSON; what is written before it is on the disk for good."""
        self._fetch()
        calls = report.valid_json(self._calls)
        position = {"step": step, "calls": calls, "epoch_seconds": self.epoch_seconds, "timed": self.timed}
        if self._file is not None:
            os.fsync(self._file.fileno())
            position["bytes"] = self._file.tell()
        return position

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()

    def _fetch(self) -> None:
        values = jax.device_get([call[1:] for call in self._calls])
        self._calls = [
            [n, *(np.asarray(v, np.float64).tolist() for v in vs)] for (n, *_), vs in zip(self._calls, values)
        ]


def open_at(path: Path, position: int) -> Any:
    """The file, cut back to ``position`` and open for writing there."""
    size = path.stat().st_size if path.exists() else 0
    if size < position:
        raise ValueError(
            f"{path}: expected the {position} bytes that the checkpoint goes with, got {size}. Restore the file, or "
            "begin anew with --resume never."
        )
    file = open(path, "r+" if path.exists() else "w")
    file.truncate(position)
    file.seek(position)
    return file


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; what an earlier process wrote past ``step`` is hidden."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("expected tensorboardX for --tensorboard: pip install 'opnorm-jax[tensorboard]'.") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
