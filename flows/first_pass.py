"""What must be known of the whole image before any tile is explained: sums that are solved, a bag that is decided."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flows.progress import Event
from schemas.bag import AttributeTask, BagReport
from schemas.errors import GigacamError
from schemas.run import GroupTask, Report, SolveTask, UnitTask
from workers.bag_plan import encoder_known
from workers.explainer import ExplainInit
from workers.imported import import_features
from workers.pool import Stage, Task
from workers.store.bags import Bag
from workers.store.heatmap import HeatmapStore
from workers.store.reductions import Reductions
from workers.store.tiles import TilesStore

if TYPE_CHECKING:
    from flows.steps import Run


def collect_and_solve(run: Run, sums: Reductions) -> None:
    """Sum over all tiles and solve, where no earlier run did: nothing can be explained before."""
    run.lost += [
        f"group {group}: given up by an earlier run, so that its tiles did not enter; --fresh sums anew"
        for group in sums.given_up()
    ]
    groups = sums.pending_groups() if run.pending and sums.unsolved() else []
    sizes: dict[Task, int] = {GroupTask(group=group): len(sums.rows(group)) for group in groups}
    for report in _each_tile_once(run, run.stages.collect, sizes):
        if report.error:
            assert isinstance(report.task, GroupTask)
            sums.fail_group(report.task.group)
    unsolved = sums.unsolved() if run.pending else []
    _each_done(run, run.stages.solve, [SolveTask(method=name) for name in unsolved])
    if not sums.unsolved():
        sums.drop_collected()


def embed_and_attribute(run: Run, bag: Bag, tiles: TilesStore) -> BagReport:
    """Embed all tiles and decide the bag, where no earlier run did."""
    if (found := bag.report()) is None:
        pending = {unit: tiles.unit_rows(unit) for unit in bag.pending_units()}
        encoder = encoder_known(tiles.info)
        if run.job.features:
            init = run.stages.embed.init
            assert isinstance(init, ExplainInit)
            encoder = import_features(bag, pending, run.job.features, init)
            pending = {}
        sizes: dict[Task, int] = {UnitTask(unit=unit): len(rows) for unit, rows in pending.items()}
        for report in _each_tile_once(run, run.stages.embed, sizes):
            if report.error:
                assert isinstance(report.task, UnitTask)
                bag.fail_unit(tiles.unit_rows(report.task.unit), report.error)
        _each_done(run, run.stages.attribute(encoder), [AttributeTask()])
        found = bag.report()
        assert found is not None
    return found


def forget_failed(tiles: TilesStore, heatmap: HeatmapStore, bag: Bag | None, sums: Reductions | None) -> None:
    """Make ready for what failed to be tried again; killed in between, what is left is consistent.

    A tile that comes into a bag changes its decision, and with it every map.
    """
    if sums is not None:
        sums.retry()
    if bag is not None and bag.failed():
        heatmap.clear_blocks(tiles.boxes())
        tiles.reset()
        bag.reset_failed()
        return
    heatmap.clear_blocks(tiles.retry_boxes())
    tiles.reset_failed()


def _each_tile_once(run: Run, stage: Stage, sizes: Mapping[Task, int]) -> Iterable[Report]:
    """Reports of tasks that go over tiles, `sizes` of them each; a failed task is among what was lost."""
    done, failed, total = 0, 0, sum(sizes.values())
    began = time.perf_counter()
    for report in run.pool.run(stage, list(sizes)):
        assert report.task is not None
        if report.error:
            run.lost.append(f"{report.key}: {report.error}")
        yield report
        run.note(stage.name, report)
        rows = sizes[report.task]
        done, failed = done + rows, failed + (rows if report.error else report.failed)
        rate = done / max(1e-9, time.perf_counter() - began)
        run.tell(Event(run.name, stage.name, done, total, failed, rate))


def _each_done(run: Run, stage: Stage, tasks: Sequence[Task]) -> None:
    """Tasks without which the image cannot go on.

    Raises
    ------
    GigacamError
        One failed.
    """
    for report in run.pool.run(stage, tasks):
        if report.error:
            msg = f"{run.job.request.uri}: {report.key}: {report.error}"
            raise GigacamError(msg)
        run.note(stage.name, report)
