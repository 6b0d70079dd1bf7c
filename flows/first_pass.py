"""What must be known of the whole image before any tile is explained: sums that are solved, a bag that is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.work import Work
from schemas.bag import AttributeTask, BagReport
from schemas.run import GroupTask, SolveTask, UnitTask
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
    for report in run.each_tile_once(run.stages.collect, sizes):
        if report.error:
            assert isinstance(report.task, GroupTask)
            sums.fail_group(report.task.group)
    unsolved = sums.unsolved() if run.pending else []
    run.each_done(run.stages.solve, [SolveTask(method=name) for name in unsolved])
    if not sums.unsolved():
        sums.drop_collected()


def embed(work: Work, stage: Stage, bag: Bag, tiles: TilesStore) -> str:
    """Embed all tiles that are not yet, or import their features; how these are known to be the encoder's."""
    pending = {unit: tiles.unit_rows(unit) for unit in bag.pending_units()}
    if work.job.features:
        assert isinstance(stage.init, ExplainInit)
        return import_features(bag, pending, work.job.features, stage.init)
    sizes: dict[Task, int] = {UnitTask(unit=unit): len(rows) for unit, rows in pending.items()}
    for report in work.each_tile_once(stage, sizes):
        if report.error:
            assert isinstance(report.task, UnitTask)
            bag.fail_unit(tiles.unit_rows(report.task.unit), report.error)
    return encoder_known(tiles.info)


def embed_and_attribute(run: Run, bag: Bag, tiles: TilesStore) -> BagReport:
    """Embed all tiles and decide the bag, where no earlier run did."""
    if (found := bag.report()) is None:
        encoder = embed(run, run.stages.embed, bag, tiles)
        run.each_done(run.stages.attribute(encoder), [AttributeTask()])
        found = bag.report()
        assert found is not None
    return found


def forget_failed(
    tiles: TilesStore, heatmap: HeatmapStore | None, bag: Bag | None, sums: Reductions | None
) -> None:
    """Make ready for what failed to be tried again; killed in between, what is left is consistent.

    A tile that comes into a bag changes its decision, and with it every map.
    """
    if sums is not None:
        sums.retry()
    if bag is not None and bag.failed():
        if heatmap is not None:
            heatmap.clear_blocks(tiles.boxes())
        tiles.reset()
        bag.reset_failed()
        return
    if heatmap is not None:
        heatmap.clear_blocks(tiles.retry_boxes())
    tiles.reset_failed()
