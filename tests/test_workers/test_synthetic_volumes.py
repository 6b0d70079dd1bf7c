"""The rim phantom: twins that only their arrangement tells apart, in physical units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from schemas.errors import SpecError
from workers.metrics.localisation import auroc
from workers.synthetic.volumes import (
    BACKGROUND_SD,
    CORE,
    NOISE_SD,
    RIM_MINUS,
    SHELL,
    Lesion,
    rasterise,
    rim_phantom,
    training_crops,
    write_phantom,
)

BALL = Lesion(
    axes_mm=(6.0, 6.0, 6.0),
    rotation=np.eye(3),
    shell_mm=1.5,
    gap=(1.0, 0.0, 0.0),
    covered=1.0,
    core_ppb=20.0,
    rim_ppb=40.0,
)


def test_twins_have_equal_means_and_share_geometry() -> None:
    phantom = rim_phantom(seed=4)
    for lesion in phantom.lesions:
        stamp = rasterise(lesion, phantom.spacing_mm)
        inside = stamp.truth > 0
        assert stamp.rim_plus[inside].mean() == pytest.approx(stamp.rim_minus[inside].mean(), rel=1e-5)
    assert (phantom.truth == RIM_MINUS).sum() == np.isin(phantom.truth, (CORE, SHELL)).sum()


def test_shell_volume_and_values_are_those_of_a_hollow_ball() -> None:
    stamp = rasterise(BALL, (1.0, 1.0, 1.0))
    voxels = (stamp.truth == SHELL).sum() / (stamp.truth > 0).sum()
    assert voxels == pytest.approx(1 - (4.5 / 6.0) ** 3, abs=0.05)
    middle = tuple(n // 2 for n in stamp.truth.shape)
    assert stamp.rim_plus[middle] == pytest.approx(20.0, abs=0.1)
    assert stamp.rim_plus.max() == pytest.approx(60.0, abs=8.0)
    # signal is kept by blur and partial volume: core over the ball, rim over the shell
    ball, core = BALL.volume_mm3, 4 / 3 * np.pi * 4.5**3
    assert stamp.rim_plus.sum() == pytest.approx(20.0 * ball + 40.0 * (ball - core), rel=0.01)


def test_gap_takes_its_share_of_the_surface() -> None:
    whole = rasterise(BALL, (0.5, 0.5, 0.5)).truth
    open_ball = rasterise(replace(BALL, covered=0.7), (0.5, 0.5, 0.5)).truth
    assert (open_ball == SHELL).sum() / (whole == SHELL).sum() == pytest.approx(0.7, abs=0.03)
    lost = np.argwhere((whole == SHELL) & (open_ball != SHELL))
    assert lost[:, 0].min() > whole.shape[0] / 2  # the gap looks along +z


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.5, 0.7, 1.0)])
def test_voxel_counts_are_the_physical_volume(spacing_mm: tuple[float, float, float]) -> None:
    shape = tuple(int(np.ceil(96 / s)) for s in spacing_mm)
    phantom = rim_phantom((shape[0], shape[1], shape[2]), spacing_mm, seed=2)
    counted = (phantom.truth > 0).sum() * np.prod(spacing_mm)
    assert counted == pytest.approx(2 * sum(one.volume_mm3 for one in phantom.lesions), rel=0.05)


def test_background_has_the_sd_it_says() -> None:
    phantom = rim_phantom(seed=1)
    quiet = phantom.values[(phantom.truth == 0) & (np.abs(phantom.values) < 40)]
    assert quiet.std() == pytest.approx(np.hypot(BACKGROUND_SD, NOISE_SD), rel=0.05)


def test_mean_intensity_of_twins_carries_no_label() -> None:
    crops, labels = training_crops(300, seed=7)
    twins = np.arange(300) % 6 < 4
    means = crops[twins].mean(axis=(1, 2, 3, 4))
    assert auroc(means, labels[twins, 0] > 0) == pytest.approx(0.5, abs=0.03)


def test_crops_are_twins_then_empty() -> None:
    crops, labels = training_crops(9, seed=1)
    assert crops.shape == (9, 1, 32, 32, 32)
    assert crops.dtype == np.float32
    assert labels[:, 0].tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 1]
    changed = np.abs(crops[0] - crops[1]) > 1e-3
    assert 0 < changed.mean() < 0.2  # outside the lesion, twins are the same
    assert np.isfinite(crops).all()


def test_seeds_reproduce_and_differ() -> None:
    small = (64, 96, 96)
    np.testing.assert_array_equal(rim_phantom(small, seed=1).values, rim_phantom(small, seed=1).values)
    assert (rim_phantom(small, seed=1).truth != rim_phantom(small, seed=2).truth).any()
    np.testing.assert_array_equal(training_crops(6, seed=3)[0], training_crops(6, seed=3)[0])


def test_files_carry_spacing_and_axes(tmp_path: Path) -> None:
    values, truth = tmp_path / "volume.nii.gz", tmp_path / "volume.truth.nii.gz"
    phantom = write_phantom(values, truth, (40, 80, 96), (2.0, 1.0, 1.0), seed=5)
    image, labels = nib.load(values), nib.load(truth)
    assert isinstance(image, nib.Nifti1Image)
    assert isinstance(labels, nib.Nifti1Image)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (1.0, 1.0, 2.0)
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom.values.transpose(2, 1, 0))
    np.testing.assert_array_equal(np.asarray(labels.dataobj), phantom.truth.transpose(2, 1, 0))
    assert labels.get_data_dtype() == np.uint8
    centre = image.affine @ [(96 - 1) / 2, (80 - 1) / 2, (40 - 1) / 2, 1]
    np.testing.assert_allclose(centre, [0, 0, 0, 1], atol=1e-9)


def test_volume_without_room_is_refused() -> None:
    with pytest.raises(SpecError, match="no room for 10 lesions"):
        rim_phantom((24, 24, 24), seed=1)
