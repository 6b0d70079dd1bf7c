"""Which tiles are computed: tissue, regions, order and units."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.grid import GridSpec, Lattice, TissueSpec
from schemas.image import Kind, LevelMeta
from workers.tiling.plan import default_unit, make_plan
from workers.tiling.positions import make_lattice


def lattice_of(side: int, tile: int) -> Lattice:
    grid = GridSpec(tile_px=(tile, tile), spacing=(1.0, 1.0))
    return make_lattice("s", (LevelMeta(shape=(side, side), downsample=(1.0, 1.0)),), (1.0, 1.0), grid)


def test_without_a_mask_every_tile_is_planned_in_row_order() -> None:
    plan = make_plan(lattice_of(100, 10), 7, None, (1.0, 1.0), TissueSpec(method="none"))
    assert (plan.tiles, plan.planned, plan.units) == (100, 100, 15)
    starts = plan.boxes[:, 0]
    assert (np.diff(starts[:, 0] * 1000 + starts[:, 1]) > 0).all()


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_tiles_with_enough_tissue_are_kept(scale: int) -> None:
    mask = np.zeros((100 // scale, 100 // scale), bool)
    mask[: 20 // scale, : 40 // scale] = True
    plan = make_plan(lattice_of(100, 10), 8, mask, (float(scale),) * 2, TissueSpec(min_fraction=0.5))
    assert {tuple(b) for b in plan.boxes[:, 0].tolist()} == {(y, x) for y in (0, 10) for x in (0, 10, 20, 30)}


def test_an_empty_mask_plans_nothing_even_at_fraction_0() -> None:
    plan = make_plan(
        lattice_of(100, 10), 8, np.zeros((50, 50), bool), (2.0, 2.0), TissueSpec(min_fraction=0.0)
    )
    assert (plan.tiles, plan.units) == (0, 0)
    assert plan.boxes.shape == (0, 2, 2)


def test_tiles_outside_the_regions_are_left_out_by_choice_and_come_last() -> None:
    triangle = ((12.0, 12.0), (12.0, 33.0), (33.0, 12.0))
    plan = make_plan(lattice_of(100, 10), 8, None, (1.0, 1.0), TissueSpec(), (triangle,))
    asked = {tuple(b) for b in plan.boxes[: plan.planned, 0].tolist()}
    assert plan.tiles == 100
    assert asked == {(10, 10), (10, 20), (10, 30), (20, 10), (20, 20), (30, 10)}


def test_a_region_thinner_than_a_raster_pixel_is_not_lost() -> None:
    line = ((50_000.0, 50_000.0), (50_000.5, 50_000.0), (50_000.5, 50_300.0), (50_000.0, 50_300.0))
    plan = make_plan(lattice_of(100_000, 1000), 8, None, (1.0, 1.0), TissueSpec(), (line,))
    assert (50_000, 50_000) in {tuple(b) for b in plan.boxes[: plan.planned, 0].tolist()}


@pytest.mark.parametrize(
    ("kind", "planned", "unit"),
    [("slide", 0, 64), ("slide", 4095, 64), ("slide", 4096, 128), ("slide", 8192, 256), ("volume", 9999, 8)],
)
def test_small_slides_are_cut_finer_so_that_no_worker_idles(kind: Kind, planned: int, unit: int) -> None:
    assert default_unit(kind, planned) == unit
