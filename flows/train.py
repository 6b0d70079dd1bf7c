"""Train a bag head from a CSV of slides and labels: what is told meanwhile, and what is shown in the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.progress import Event
from schemas.errors import SpecError
from schemas.training import MHIM, TrainReport, TrainRequest
from workers.export.learning import Curve, write_learning_curves
from workers.trainer import train
from workers.training.mil import History

CURVES = "learning.png"


def run_training(request: TrainRequest, told: Callable[[Event], None], fresh: bool = False) -> TrainReport:
    """Train, draw the learning curves beside the card; the report says what came of it."""

    def reading(done: int, total: int) -> None:
        told(Event(Path(request.csv).name, "read", done, total))

    def tell(name: str, done: int, total: int, history: History) -> None:
        said = f"validation loss {history.validation[-1]:.4f}, lowest {min(history.validation):.4f}"
        told(Event(name, "fit", done, total, message=said if done % 10 == 0 else ""))

    report, trained = train(request, fresh=fresh, reading=reading, tell=tell)
    if trained is not None:
        curves = [Curve(name, h.train, h.validation, h.best) for name, h in trained.histories.items()]
        title = f"{request.head.head}: {request.fit.loss.replace('_', ' ')} by epoch"
        write_learning_curves(Path(request.out) / CURVES, title, curves)
    return report


def train_request(flags: dict[str, Any]) -> TrainRequest:
    """Flags by name, as the command received them -> the request; SpecError names the flag that is wrong."""
    from pydantic import ValidationError

    from flows.options import flag_errors, words

    mhim = flags["mhim"]
    if mhim and mhim not in MHIM:
        msg = f"--mhim {mhim}: expected {', '.join(MHIM)}"
        raise SpecError(msg)
    fit = ("loss", "epochs", "patience", "learning_rate", "class_weights", "seed")
    try:
        args = json.loads(flags["args"] or "{}")
        return TrainRequest.model_validate(
            {
                "csv": flags["csv"],
                "model": flags["model"],
                "out": flags["out"],
                "features": flags["features"],
                "classes": words(flags["classes"]),
                "head": {"head": flags["head"], "args": args, "mhim": MHIM.get(mhim)},
                "fit": {name: flags[name] for name in fit},
                "folds": flags["folds"],
            }
        )
    except json.JSONDecodeError as error:
        msg = f"--args {flags['args']}: expected a JSON object such as '{{\"hidden\": 256}}' ({error})"
        raise SpecError(msg) from error
    except ValidationError as error:
        raise SpecError(flag_errors(error)) from error


def train_lines(report: TrainReport) -> list[str]:
    """What came of a training, for people."""
    lines = [
        f"{report.slides} slides of {report.patients} patients, {report.tiles} tiles of {report.features} numbers"
    ]
    if report.tested:
        lines.append(f"on {len(report.tested)} slides of patients not seen, 95 % intervals over patients:")
    for name, figure in report.figures.items():
        values = [math.nan if v is None else v for v in (figure.value, figure.low, figure.high)]
        lines.append("  {:18} {:.3f}  ({:.3f} to {:.3f})".format(name.replace("_", " "), *values))
    lines += [f"note: {note}" for note in report.notes]
    epochs = ", ".join(f"{name} {epoch}" for name, epoch in report.epochs.items())
    return [*lines, f"epochs kept: {epochs}", f"{report.card}  in {report.seconds:.1f} s"]
