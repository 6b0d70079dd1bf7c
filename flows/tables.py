"""What the commands print, as lines and tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import schemas.geometry
import schemas.model
import schemas.ngff  # noqa: F401
from schemas.explanation import MethodInfo
from schemas.frozen import Frozen
from schemas.plan import PlanSummary
from schemas.run import RunReport

if TYPE_CHECKING:
    from workers.trust import Trust


def plan_lines(plan: PlanSummary) -> list[str]:
    """One plan, one line a fact."""
    unit = plan.spacing_unit
    axes = f"({', '.join(('z', 'y', 'x')[-len(plan.shape_l0) :])})"
    time = "unknown; --measure runs one batch" if plan.seconds is None else _duration(plan.seconds)
    lines = [
        f"{plan.image}",
        f"  id          {plan.image_id}",
        f"  source      {_times(plan.shape_l0)} px {axes} at {_times(plan.spacing)} {unit} ({plan.spacing_source})",
        f"  tiles       {plan.tiles} of {_times(plan.tile_l0)} level-0 px every {_times(plan.stride_l0)}, "
        f"read at level {plan.level} (size error {plan.size_error:.2%})",
        f"  tissue      {plan.tissue_fraction:.1%} by {plan.tissue_method}"
        + (f"; {plan.left_out} tiles left out by choice" if plan.left_out else ""),
        f"  work        {_count(plan.units, 'unit')}, {_count(plan.batches, 'batch')}, {_count(plan.blocks, 'block')}",
        f"  heatmap     {_times(plan.heatmap_shape)} at 1/{_times(plan.heatmap_downsample)}: {', '.join(plan.channels)}",
        f"  disk        {_bytes(plan.tiles_bytes)} of tile maps, {_bytes(plan.heatmap_bytes)} of heatmap "
        f"before compression; {_bytes(plan.disk_free_bytes)} free",
        f"  memory      about {_bytes(plan.peak_memory_bytes)} a worker",
        f"  time        {time}",
        f"  defaults    {', '.join(f'{k}={v}' for k, v in plan.defaults.items())}",
    ]
    return lines + [f"  note        {note}" for note in plan.notes]


def report_lines(report: RunReport, out: str) -> list[str]:
    """A finished run: one line an image, and where to look."""
    lines = []
    for image in report.images:
        line = f"{image.status:11} {Path(image.image).name}"
        if image.counts is not None:
            line += f"  {image.counts.done}/{image.counts.planned} tiles"
            if image.counts.failed:
                line += f", {image.counts.failed} failed"
        if image.error:
            line += f"  {image.error}"
        elif image.output:
            line += f"  {image.output}"
        lines.append(line)
        lines += [f"            note: {note}" for note in image.notes]
        lines += [f"            export {e.name} failed: {e.error}" for e in image.exports if e.error]
    lines.append(
        f"{_count(len(report.images), 'image')} in {report.seconds:.1f} s on {report.pool}; {Path(out) / 'run.json'}"
    )
    return lines


def method_table(methods: Sequence[MethodInfo], flag: str) -> Table:
    """Every method of a flag with what it needs and where it comes from."""
    table = Table(flag, "method", "unit", "signed", "class", "needs", "citation", box=None)
    for row in methods:
        title = f"{row.title} ({row.edition})" if row.edition else row.title
        table.add_row(
            row.name,
            title,
            row.unit,
            "signed" if row.signed else "unsigned",
            "yes" if row.class_specific else "no",
            ", ".join(row.needs),
            row.citation,
        )
    return table


Scores = dict[str, dict[str, float]]
"""AUROC by channel and question."""


def demo_table(title: str, scores: Scores, trust: Sequence[Trust]) -> Table:
    """How well each method found what was planted, and how far it can be trusted; what is no method comes last."""
    questions = list(next(iter(scores.values())))
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("method", max_width=24, overflow="fold")
    for column in (*questions, "s / 1,000 tiles", "class sensitivity", "SSIM under noise"):
        table.add_column(column, justify="right")
    labels = {label.rpartition(":")[0]: label for label in scores if ":" in label}
    for row in trust:
        if row.reason:
            table.add_row(row.method, *["-"] * len(questions), "not applicable")
            continue
        found = [f"{scores[labels[row.method]][q]:.3f}" for q in questions]
        table.add_row(row.method, *found, f"{row.seconds_per_1000:.1f}", class_words(row), noise_words(row))
    for label in [label for label in scores if ":" not in label]:
        table.add_row(label, *(f"{scores[label][q]:.3f}" for q in questions))
    return table


def demo_document(scores: Scores, trust: Sequence[Trust]) -> dict[str, dict[str, Any]]:
    """The same for machines, by method; what is not defined is null."""
    labels = {label.rpartition(":")[0]: label for label in scores if ":" in label}
    document = {}
    for row in trust:
        facts: dict[str, Any] = {"reason": row.reason}
        if not row.reason:
            facts |= {"auroc": scores[labels[row.method]], "seconds_per_1000_tiles": row.seconds_per_1000}
        if row.sensitivity is not None:
            facts |= {"class_sensitivity": _known(row.sensitivity.mean), "tiles": row.sensitivity.counted,
                      "left_out": row.sensitivity.left_out}  # fmt: skip
        if row.robustness is not None:
            facts |= {"ssim": _known(row.robustness.ssim.mean), "mse": _known(row.robustness.mse.mean),
                      "changed": row.robustness.changed}  # fmt: skip
        document[row.method] = facts
    return document


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def noise_words(row: Trust) -> str:
    """How alike a method's maps stay under noise on their gradients."""
    if row.robustness is None:
        return "none used"
    if not row.robustness.changed:
        return "not reached"
    return f"{row.robustness.ssim.mean:.3f}" if row.robustness.ssim.counted else "-"


def class_words(row: Trust) -> str:
    """A method's class sensitivity, and of how many tiles where some had none."""
    if row.sensitivity is None or not row.sensitivity.counted:
        return "-"
    left_out = f" ({row.sensitivity.counted} tiles)" if row.sensitivity.left_out else ""
    return f"{row.sensitivity.mean:.2f}{left_out}".replace("-", "\N{MINUS SIGN}")


def print_table(table: Table) -> None:
    """Print to the terminal's width; wide where nobody looks."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def json_schemas() -> dict[str, type[Frozen]]:
    """Every value of `schemas`, by class name."""
    return {
        value.__name__: value for value in Frozen.__subclasses__() if value.__module__.startswith("schemas.")
    }


def _count(n: int, what: str) -> str:
    if n == 1:
        return f"1 {what}"
    return f"{n} {what}es" if what.endswith("ch") else f"{n} {what}s"


def _times(values: Sequence[float]) -> str:
    if len(set(values)) == 1 and float(values[0]).is_integer() and values[0] < 100:
        return f"{values[0]:.0f}"
    return " x ".join(f"{v:.0f}" if float(v).is_integer() else f"{v:.4g}" for v in values)


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"
