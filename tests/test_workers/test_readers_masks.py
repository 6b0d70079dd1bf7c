"""Masks from files: read whole, and refused where they are of another field of view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from schemas.errors import SourceError, SpecError
from schemas.image import ImageMeta, ReadOptions
from workers.readers import open_image
from workers.readers.masks import read_mask

DATA = Path(__file__).parents[1] / "data"
CT = DATA / "totalseg_ct_3mm_slab30.nii.gz"
LABELS = DATA / "totalseg_ct_3mm_slab30_labels.nii.gz"


def slide(height: int, width: int) -> ImageMeta:
    return open_image(f"procedural:slide?width={width}&height={height}&mpp=0.5").meta


def volume(path: Path = CT, options: ReadOptions | None = None) -> ImageMeta:
    return open_image(str(path), options).meta


def save(path: Path, shape: tuple[int, ...], affine: Any) -> str:
    nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), affine), path)
    return str(path)


def coarse(affine: Any, k: int, aligned: bool = True) -> Any:
    """Affine of every k-th voxel's grid: its corner, or else the centre of its first voxel, stays."""
    out = np.array(affine, dtype=np.float64)
    out[:3, :3] *= k
    if aligned:
        out[:3, 3] += np.array(affine)[:3, :3] @ np.full(3, (k - 1) / 2)
    return out


def test_masks_from_files(tmp_path: Path) -> None:
    drawn = np.zeros((30, 40), np.uint8)
    drawn[5:9, 10:20] = 1
    Image.fromarray(drawn).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", drawn.astype(bool))
    for name in ("m.png", "m.npy"):
        mask, sha256 = read_mask(str(tmp_path / name), slide(300, 400))
        assert np.array_equal(mask, drawn.astype(bool))
        assert len(sha256) == 64
    labels, _ = read_mask(str(LABELS), volume())
    assert labels.shape == volume().shape_l0
    with pytest.raises(SourceError, match="a mask of 3 axes; expected 2"):
        read_mask(str(LABELS), slide(300, 400))


@pytest.mark.parametrize(
    ("mask", "image", "fits"),
    [
        ((30, 40), (3000, 4000), True),
        ((31, 41), (3001, 4001), True),  # 100 px each, rounded up
        ((30, 40), (3099, 4099), True),  # and down
        ((2, 4), (256, 512), True),
        ((600, 800), (300, 400), True),  # finer than the slide
        ((1, 1), (300, 400), True),  # to one mask pixel
        ((40, 30), (3000, 4000), False),
        ((30, 40), (3000, 3500), False),
        ((300, 400), (3000, 3900), False),
    ],
)
def test_a_slides_mask_has_its_aspect(
    tmp_path: Path, mask: tuple[int, ...], image: tuple[int, ...], fits: bool
) -> None:
    path = tmp_path / "m.npy"
    np.save(path, np.ones(mask, np.uint8))
    if fits:
        assert read_mask(str(path), slide(*image))[0].shape == mask
    else:
        with pytest.raises(SpecError, match=r"does not lie over procedural:slide.*the slide's aspect"):
            read_mask(str(path), slide(*image))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_volumes_mask_may_be_coarser_and_of_another_orientation(
    tmp_path: Path, k: int, aligned: bool
) -> None:
    image = nib.load(CT)
    shape = tuple(-(-n // k) for n in image.shape)  # type: ignore[attr-defined]
    affine = coarse(image.affine, k, aligned)  # type: ignore[attr-defined]
    whole, _ = read_mask(save(tmp_path / "m.nii.gz", shape, affine), volume())
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = shape[0] - 1
    turned, _ = read_mask(save(tmp_path / "t.nii.gz", shape, affine @ flip), volume())
    assert whole.shape == turned.shape == shape[::-1]


def test_a_volumes_mask_of_another_field_of_view_is_refused(tmp_path: Path) -> None:
    image = nib.load(CT)
    shape, affine = image.shape, image.affine  # type: ignore[attr-defined]
    shifted, larger, turned = affine.copy(), affine.copy(), affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ [0.0, 0.0, 1.0]  # by one voxel
    larger[:3, :3] *= 1.1
    turned[:3, :3] = affine[:3, :3] @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    wrong = {
        "shifted": (shape, shifted),
        "larger": (shape, larger),
        "turned": (shape, turned),
        "cropped": ((*shape[:2], shape[2] - 2), affine),
        "nowhere": (shape, np.eye(4)),
    }
    for name, (size, there) in wrong.items():
        path = save(tmp_path / f"{name}.nii.gz", size, there)
        with pytest.raises(SpecError, match=rf"{name}.nii.gz.*does not lie over .*{CT.name}.*field of view"):
            read_mask(path, volume())
    within = affine.copy()
    within[:3, 3] += affine[:3, :3] @ [0.0, 0.0, 0.4]
    read_mask(save(tmp_path / "within.nii.gz", shape, within), volume())


def test_a_corrected_voxel_size_corrects_the_mask_alike(tmp_path: Path) -> None:
    corrected = volume(options=ReadOptions(spacing_mm=(5.0, 1.5, 1.5)))
    assert read_mask(str(LABELS), corrected)[0].shape == corrected.shape_l0
    with pytest.raises(SpecError, match="does not lie over"):
        read_mask(save(tmp_path / "m.nii.gz", corrected.shape_l0[::-1], np.eye(4)), corrected)


def test_an_array_over_a_volume_divides_its_shape_by_whole_numbers(tmp_path: Path) -> None:
    uri = "procedural:volume?shape=30,101,100"
    for shape, fits in [
        ((30, 101, 100), True),
        ((30, 51, 50), True),
        ((15, 50, 50), True),
        ((30, 100, 100), False),
        ((30, 40, 40), False),
        ((30, 202, 200), False),
    ]:
        np.save(tmp_path / "m.npy", np.ones(shape, np.float32))
        if fits:
            assert read_mask(str(tmp_path / "m.npy"), open_image(uri).meta)[0].shape == shape
        else:
            with pytest.raises(SpecError, match="divided by whole numbers"):
                read_mask(str(tmp_path / "m.npy"), open_image(uri).meta)
