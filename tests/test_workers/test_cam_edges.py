"""Where there is nothing to show, every method says so: a typed error or a flag, never a plausible picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from tests.test_workers.every_method import (
    NAMES,
    Setting,
    all_alike,
    last_linear,
    one_cell,
    row,
    setting,
    spoil,
    uses_gradients,
)
from workers.cam.explain import Explained

LINEAR = ("gradcam", "hirescam", "cam", "xgradcam", "linear_approximation")
"""Maps that are below 0 where every channel speaks against the class."""


def explained(of: Setting, name: str) -> Explained | None:
    """None where the method refuses, with a typed error."""
    try:
        return of.explain(name)
    except ModelError:
        return None


def parts(done: Explained, name: str) -> tuple[Tensor, Tensor]:
    """Maps `(B, T, Z)` and flags `(B, T)`, which must agree in what is not finite, empty and single."""
    maps, flags = done.maps[name].flatten(2), done.flags[name].int()
    broken = ~maps.isfinite().all(2)
    assert maps[broken].isnan().all(), "a map is NaN everywhere or nowhere"
    assert torch.equal(broken, (flags & MapFlag.NOT_FINITE) > 0)
    assert torch.equal(~broken & (maps.amax(2) <= 0), (flags & MapFlag.EMPTY) > 0)
    assert torch.equal((flags & MapFlag.SINGLE_CELL) > 0, torch.full_like(broken, maps.shape[2] == 1))
    return maps, flags


@pytest.mark.parametrize("name", NAMES)
def test_the_setting_itself_shows_something(name: str) -> None:
    """Else the edge cases below would pass for nothing."""
    done = setting(name, head="gap" if name == "cam" else "conv").explain(name)
    maps, flags = parts(done, name)
    assert maps.isfinite().all()
    # Finer-CAM, BAS and the like may find a class without evidence: not all maps of all tiles do
    assert (flags == 0).any()
    assert (maps.amax(2) > maps.amin(2)).any()


@pytest.mark.parametrize("name", NAMES)
def test_one_position(name: str) -> None:
    done = explained(one_cell(name), name)
    if done is not None:
        maps, flags = parts(done, name)
        on_layer = maps.shape[2] == 1
        assert on_layer or row(name).place is not None
        assert bool((flags & MapFlag.SINGLE_CELL).all()) == on_layer


LOOKS_ELSEWHERE = {
    "normgrad_proper": "at what the convolution is given, the padded border included, which differs",
    "normgrad_meta": "at a network with changed weights, that no longer treats all positions alike",
}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LOOKS_ELSEWHERE])
def test_positions_that_are_all_alike(name: str) -> None:
    """A constant map, or none; never contrast made of rounding."""
    done = explained(all_alike(name), name)
    if done is not None:
        maps, flags = parts(done, name)
        said = (flags & (MapFlag.CONSTANT | MapFlag.NOT_FINITE | MapFlag.DOUBTFUL)) > 0
        assert said.all(), maps[~said][:1]


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_a_number(name: str) -> None:
    of = setting(name)
    clean = of.explain(name).maps[name].flatten(2)
    spoil(of.net)
    done = explained(of, name)
    if done is None:
        return
    maps, flags = parts(done, name)
    if uses_gradients(name):
        assert ((flags & MapFlag.NOT_FINITE) > 0).all()
    else:
        torch.testing.assert_close(maps, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if row(n).info.class_specific])
def test_a_target_that_nothing_reaches(name: str) -> None:
    """Class 1 has one score for every input: no map of it means anything."""
    of = setting(name)
    with torch.no_grad():
        last_linear(of.net).weight[1] = 0
    done = explained(of, name)
    if done is not None:
        maps, flags = parts(done, name)
        said = (flags[:, 1] & (MapFlag.CONSTANT | MapFlag.NOT_FINITE | MapFlag.DOUBTFUL)) > 0
        assert said.all(), maps[:, 1][~said][:1]
        assert not (flags[:, 0] & MapFlag.NOT_FINITE).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_everything_speaks_against(name: str) -> None:
    of = setting(name)
    with torch.no_grad():
        last_linear(of.net).weight.copy_(-last_linear(of.net).weight.abs())
    done = explained(of, name)
    if done is not None:
        maps, flags = parts(done, name)
        assert maps.isfinite().all()
        if name in LINEAR:
            assert (maps <= 0).all()
            assert (maps < 0).any()
            assert (flags & MapFlag.EMPTY).all()
