"""Workers of the pool tests: importable, so that another process can find them by name."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from schemas.errors import ModelError, SourceError
from schemas.frozen import Frozen
from schemas.run import Report, UnitTask
from workers.pool import Task


class Init(Frozen):
    """What a test worker is told; `folder` is where it leaves marks that outlive its process."""

    folder: str
    sleep: float = 0.0
    name: str = ""
    poison: int = -1
    """Unit that fails."""
    times: int = 10**6
    """How many times it fails."""


class Counting:
    """Does nothing but count: one mark file an init, one a call."""

    def __init__(self, init: Init) -> None:
        self.init = init
        self.mark(f"init{init.name}")

    def mark(self, name: str) -> int:
        """Append to a mark file (atomic for such short writes); the number of marks so far."""
        path = Path(self.init.folder) / name
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return len(path.read_text().splitlines())

    def expect(self, task: Task) -> None:
        """Nothing to read."""

    def run(self, task: Task) -> Report:
        time.sleep(self.init.sleep)
        assert isinstance(task, UnitTask)
        if task.unit == self.init.poison and self.mark("failed") <= self.init.times:
            self.fail()
        self.mark(f"unit{task.unit}")
        return Report(stage="count", key=task.key, done=task.unit**2)

    def fail(self) -> None:
        raise ValueError("unexpected")

    def close(self) -> None:
        self.mark(f"close{self.init.name}")


class RaisesOurs(Counting):
    def fail(self) -> None:
        raise SourceError("slide.svs: damaged at level 2")


class RaisesOSError(Counting):
    def fail(self) -> None:
        raise OSError(5, "Input/output error")


class LosesDevice(Counting):
    def fail(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


class HoldsTheInterpreter(Counting):
    def fail(self) -> None:
        re.match(r"(a+)+$", "a" * 60 + "b")  # exponential, and no other thread runs meanwhile


class Dies(Counting):
    def fail(self) -> None:
        time.sleep(0.2)  # the report of the unit before is on its way, and would die with the process
        os._exit(7)


class CannotBeMade(Counting):
    def __init__(self, init: Init) -> None:
        super().__init__(init)
        raise ModelError("model.toml: no layer 'layer9'; layers are layer1, layer2")


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class CannotBeMadeOddly(Counting):
    def __init__(self, init: Init) -> None:
        super().__init__(init)
        raise Unpicklable(1, 2)


class TellsThreads(Counting):
    def run(self, task: Task) -> Report:
        notes = (os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
        return Report(stage="count", key=task.key, notes=notes)
