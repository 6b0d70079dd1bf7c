from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import data

from schemas.errors import SpecError
from schemas.grid import TissueSpec
from workers.tiling.tissue import TissueMask, foreground_mask, tissue_fraction, tissue_mask

DATA = Path(__file__).parents[1] / "data"
THUMBS = DATA / "thumbs"
SPEC = TissueSpec()
RGB = NDArray[np.uint8]
Bools = NDArray[np.bool_]

INKS = {"red": (215, 20, 60), "green": (20, 140, 110), "blue": (30, 70, 190), "black": (25, 22, 24)}


def thumb(name: str) -> RGB:
    return np.moveaxis(np.asarray(Image.open(THUMBS / name).convert("RGB")), -1, 0)


def nifti(name: str) -> NDArray[Any]:
    image = nibabel.load(DATA / name)
    assert isinstance(image, nibabel.Nifti1Image)
    return np.asarray(image.dataobj).T


def found(image: NDArray[Any], um: float) -> TissueMask:
    return tissue_mask(image, (um, um), SPEC)


def share(mask: Bools, y: slice, x: slice) -> float:
    return float(mask[y, x].mean())


def iou(a: Bools, b: Bools) -> float:
    return float((a & b).sum() / (a | b).sum())


def glass(
    shape: tuple[int, int], colour: tuple[int, int, int] = (240, 239, 241), seed: int = 0
) -> NDArray[np.float64]:
    noise = np.random.default_rng(seed).normal(0, 2, (3, *shape))
    return np.array(colour, float)[:, None, None] + noise


def ellipse(shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> Bools:
    y, x = np.ogrid[: shape[0], : shape[1]]
    inside: Bools = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    return inside


def stained(
    background: NDArray[np.float64], where: Bools, dyes: tuple[tuple[float, float, float], ...], seed: int = 1
) -> NDArray[np.float64]:
    """Beer-Lambert: cloudy amounts of each dye (optical density of its own R, G, B) over the glass."""
    rng = np.random.default_rng(seed)
    density = np.zeros_like(background)
    for i, dye in enumerate(dyes):
        cloud = ndimage.gaussian_filter(rng.normal(size=where.shape), 3 + 4 * i)
        amount = np.clip(0.35 + 0.12 * cloud / cloud.std(), 0.1, None)
        density += np.array(dye)[:, None, None] * amount
    return np.where(where, background * 10**-density, background)


def picture(pixels: NDArray[np.float64]) -> RGB:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.12, 0.75, 0.42), (0.27, 0.57, 0.78)
SHAPE = (384, 512)
TISSUE = ellipse(SHAPE, (190, 200), (120, 150)) | ellipse(SHAPE, (300, 440), (50, 40))


def slide(dyes: tuple[tuple[float, float, float], ...] = (HAEMATOXYLIN, EOSIN)) -> NDArray[np.float64]:
    return stained(glass(SHAPE), TISSUE, dyes)


def stroke(shape: tuple[int, int], y0: float, slope: float, width: float) -> Bools:
    y, x = np.mgrid[: shape[0], : shape[1]]
    across: Bools = np.abs(y - y0 - slope * x) <= width / 2 * np.hypot(1, slope)
    return across


@pytest.fixture(scope="module")
def marked() -> TissueMask:
    return found(thumb("diagnostic-slide-thumb-pen-marks.png"), 53)


class TestRealSlides:
    """Boxes chosen by eye; the thumbnails' pixel sizes are estimates."""

    @pytest.mark.parametrize(
        "box",
        [
            pytest.param((slice(36, 60), slice(110, 180)), id="green, top"),
            pytest.param((slice(25, 40), slice(260, 340)), id="green, right lobe"),
            pytest.param((slice(140, 190), slice(40, 46)), id="green, left"),
            pytest.param((slice(445, 490), slice(32, 45)), id="green, bottom left"),
            pytest.param((slice(85, 140), slice(38, 46)), id="red, left"),
            pytest.param((slice(120, 150), slice(414, 421)), id="red, right lobe"),
            pytest.param((slice(180, 194), slice(288, 298)), id="red dot"),
            pytest.param((slice(116, 124), slice(84, 94)), id="black dot"),
            pytest.param((slice(325, 338), slice(270, 279)), id="black, a ring's arm"),
            pytest.param((slice(258, 290), slice(208, 216)), id="black, a ring's side"),
            pytest.param((slice(500, 525), slice(0, 468)), id="grey bar at the bottom"),
            pytest.param((slice(60, 500), slice(0, 12)), id="glass"),
        ],
    )
    def test_pen_and_glass_are_not_tissue(self, marked: TissueMask, box: tuple[slice, slice]) -> None:
        assert share(marked.mask, *box) < 0.02

    @pytest.mark.parametrize(
        "box",
        [
            pytest.param((slice(90, 160), slice(125, 190)), id="upper left"),
            pytest.param((slice(300, 350), slice(418, 438)), id="right"),
            pytest.param((slice(395, 425), slice(80, 150)), id="lower left"),
            pytest.param((slice(212, 236), slice(255, 300)), id="pink middle"),
            pytest.param((slice(150, 180), slice(345, 390)), id="right lobe"),
        ],
    )
    def test_tissue_between_pen_marks_is_kept(self, marked: TissueMask, box: tuple[slice, slice]) -> None:
        assert share(marked.mask, *box) > 0.9

    def test_every_ink_is_named(self, marked: TissueMask) -> None:
        assert marked.notes == ("green or blue ink removed", "red ink removed", "black ink removed")
        assert marked.method == "saturation+otsu"
        assert marked.fraction == pytest.approx(marked.mask.mean())

    @pytest.mark.parametrize("um", [2, 8])
    def test_stroke_across_tissue(self, um: float) -> None:
        mask = found(thumb("tcga-green-pen.png"), um).mask
        assert share(mask, slice(0, 120), slice(350, 440)) < 0.02
        assert share(mask, slice(180, 260), slice(270, 330)) < 0.02
        assert share(mask, slice(460, 631), slice(190, 300)) < 0.02
        assert share(mask, slice(0, 631), slice(520, 754)) > 0.95
        assert share(mask, slice(0, 220), slice(0, 200)) > 0.95

    @pytest.mark.parametrize("name", ["t_no-tissue.png", "t_no-tissue-line.png", "t_no-tissue-green-pen.png"])
    @pytest.mark.parametrize("um", [0.5, 2, 8, 32])
    def test_empty(self, name: str, um: float) -> None:
        assert found(thumb(name), um).fraction < 0.002

    @pytest.mark.parametrize("um", [2, 8])
    def test_a_wisp(self, um: float) -> None:
        mask = found(thumb("t_almost-white-2.png"), um).mask
        assert share(mask, slice(0, 30), slice(315, 385)) > 0.8
        assert share(mask, slice(0, 512), slice(0, 290)) == 0
        assert share(mask, slice(140, 512), slice(0, 512)) == 0

    @pytest.mark.parametrize("name", ["tcga-lung-tile.png", "t_tissue-level0-4302-10273-4814-10785.png"])
    def test_nearly_all_tissue(self, name: str) -> None:
        assert found(thumb(name), 0.5).fraction > 0.95

    def test_dark_epithelium_is_no_black_ink(self) -> None:
        with openslide.open_slide(DATA / "CMU-1-Small-Region.svs") as source:
            pixels = np.asarray(source.read_region((0, 0), 0, (2208, 2960)).convert("RGB"), np.float64)
        image = picture(np.moveaxis(pixels.reshape(185, 16, 138, 16, 3).mean((1, 3)), -1, 0))
        result = found(image, 8)
        assert result.notes == ()
        assert share(result.mask, slice(70, 145), slice(65, 85)) > 0.98
        assert share(result.mask, slice(140, 185), slice(40, 95)) > 0.98
        assert share(result.mask, slice(0, 55), slice(5, 45)) == 0
        assert share(result.mask, slice(90, 185), slice(0, 30)) == 0

    def test_lymph_nodes_on_tinted_glass(self) -> None:
        with openslide.open_slide(DATA / "camelyon_lowres_multiframe.dcm") as source:
            pixels = np.asarray(source.read_region((0, 0), 0, source.dimensions).convert("RGB"))
        result = found(np.moveaxis(pixels, -1, 0), 29)
        assert result.notes == ()
        assert share(result.mask, slice(220, 440), slice(100, 215)) > 0.97
        assert share(result.mask, slice(110, 300), slice(445, 500)) > 0.9
        assert share(result.mask, slice(0, 40), slice(0, 1152)) == 0
        assert share(result.mask, slice(640, 700), slice(0, 1152)) == 0

    def test_all_tissue(self) -> None:
        """Otsu alone would part the pink from the purple."""
        image = thumb("tcga-green-pen.png")[:, :, 520:]
        assert found(image, 4).fraction > 0.98

    def test_immunohistochemistry(self) -> None:
        ihc = np.moveaxis(data.immunohistochemistry(), -1, 0)  # type: ignore[no-untyped-call]
        mask = found(ihc, 8).mask
        assert share(mask, slice(20, 200), slice(20, 240)) > 0.98
        assert share(mask, slice(430, 470), slice(275, 340)) > 0.95
        assert share(mask, slice(330, 390), slice(0, 20)) < 0.02


class TestSyntheticSlides:
    @pytest.mark.parametrize(
        "dyes",
        [
            pytest.param((HAEMATOXYLIN, EOSIN), id="H&E"),
            pytest.param((HAEMATOXYLIN, DAB), id="H-DAB"),
            pytest.param((EOSIN,), id="eosin"),
            pytest.param((HAEMATOXYLIN,), id="haematoxylin"),
            pytest.param((DAB,), id="DAB"),
        ],
    )
    def test_stains_are_kept(self, dyes: tuple[tuple[float, float, float], ...]) -> None:
        result = found(picture(slide(dyes)), 8)
        assert iou(result.mask, TISSUE) > 0.95
        assert result.notes == ()

    @pytest.mark.parametrize("ink", INKS)
    @pytest.mark.parametrize("um", [8.0, 32.0])
    def test_ink_is_dropped_and_tissue_beside_it_kept(self, ink: str, um: float) -> None:
        line = stroke(SHAPE, 100, 0.4, 60 if um == 8 else 24)
        marked = picture(slide() * np.where(line, np.array(INKS[ink])[:, None, None] / 240, 1))
        mask = found(marked, um).mask
        assert share(mask[line][None], slice(None), slice(None)) < 0.02
        assert iou(mask, TISSUE & ~line) > 0.88

    @pytest.mark.parametrize("ink", INKS)
    def test_ink_on_an_empty_slide(self, ink: str) -> None:
        line = stroke(SHAPE, 100, 0.4, 50)
        soft = ndimage.gaussian_filter(line.astype(float), 3)
        marked = glass(SHAPE) * (np.array(INKS[ink])[:, None, None] / 240) ** soft
        result = found(picture(marked), 8)
        assert result.fraction < 0.002
        assert any(ink in note for note in result.notes)

    @pytest.mark.parametrize("pad", [255, 0])
    @pytest.mark.parametrize("colour", [(240, 239, 241), (225, 220, 230), (236, 230, 214)])
    def test_padding_changes_nothing(self, pad: int, colour: tuple[int, int, int]) -> None:
        plain = stained(glass(SHAPE, colour), TISSUE, (HAEMATOXYLIN, EOSIN))
        padded = np.pad(plain, ((0, 0), (300, 200), (400, 100)), constant_values=pad)
        inside = found(picture(plain), 8).mask
        result = found(picture(padded), 8)
        mask = result.mask
        assert result.notes == ()
        assert iou(mask[300:-200, 400:-100], inside) > 0.99
        assert iou(inside, TISSUE) > 0.95
        mask[300:-200, 400:-100] = False
        assert not mask.any()

    def test_black_padding_right_beside_dark_tissue(self) -> None:
        dark = stained(glass((200, 200)), np.ones((200, 200), bool), ((1.1, 1.8, 1.05),))
        image = picture(np.concatenate([np.zeros((3, 200, 100)), dark, glass((200, 100))], axis=2))
        result = found(image, 8)
        assert share(result.mask, slice(0, 200), slice(102, 298)) > 0.98
        assert not result.mask[:, :98].any()
        assert result.notes == ()

    @pytest.mark.parametrize("pad", [255, 0, 240])
    @pytest.mark.parametrize("colour", [(240, 239, 241), (225, 220, 230)])
    def test_padded_glass_is_empty(self, pad: int, colour: tuple[int, int, int]) -> None:
        padded = np.pad(glass(SHAPE, colour), ((0, 0), (100, 200), (300, 50)), constant_values=pad)
        assert found(picture(padded), 8).fraction == 0

    @pytest.mark.parametrize("value", [0, 128, 255])
    def test_constant(self, value: int) -> None:
        assert found(np.full((3, 64, 64), value, np.uint8), 8).fraction == 0

    @pytest.mark.parametrize("sigma", [0.5, 2, 5])
    @pytest.mark.parametrize("um", [2, 8, 50])
    def test_noise_is_no_tissue(self, sigma: float, um: float) -> None:
        noise = np.random.default_rng(3).normal(0, sigma, (3, 256, 256))
        assert found(picture(238 + noise), um).fraction < 0.001

    def test_scanner_bars_and_vignette(self) -> None:
        y = np.linspace(-1, 1, SHAPE[0])[:, None]
        pixels = slide() * (1 - 0.12 * y**2)
        pixels[:, -12:] = np.linspace(200, 30, 12)[:, None]
        pixels[:, :, :6] = 0
        mask = found(picture(pixels), 8).mask
        assert iou(mask, TISSUE) > 0.93
        assert not mask[-10:].any()
        assert not mask[:, :5].any()

    def test_cover_slip_line_and_dust(self) -> None:
        pixels = slide()
        pixels[:, stroke(SHAPE, 5, 0.05, 3)] *= 0.4
        pixels[:, ellipse(SHAPE, (350, 60), (8, 8))] *= 0.3
        assert iou(found(picture(pixels), 8).mask, TISSUE) > 0.95

    def test_specks_and_holes_by_their_size_in_um(self) -> None:
        where = ellipse(SHAPE, (190, 200), (120, 150))
        small, large = ellipse(SHAPE, (150, 150), (6, 6)), ellipse(SHAPE, (240, 240), (30, 30))
        speck, piece = ellipse(SHAPE, (40, 450), (4, 4)), ellipse(SHAPE, (300, 450), (14, 14))
        image = picture(
            stained(glass(SHAPE), (where & ~small & ~large) | speck | piece, (HAEMATOXYLIN, EOSIN))
        )
        mask = found(image, 8).mask
        assert mask[small].all()
        assert not mask[ellipse(SHAPE, (240, 240), (25, 25))].any()
        assert not mask[speck].any()
        assert mask[ellipse(SHAPE, (300, 450), (12, 12))].all()

    def test_scale(self) -> None:
        small = slide()[:, 40:240, 20:260]
        fine = np.kron(small, np.ones((1, 4, 4)))
        noisy = picture(fine + np.random.default_rng(5).normal(0, 4, fine.shape))
        mask_2, mask_8 = found(noisy, 2).mask, found(picture(small), 8).mask
        assert mask_2.shape == fine.shape[1:]
        assert iou(mask_2[2::4, 2::4], mask_8) > 0.95

    def test_float_pictures(self) -> None:
        image = picture(slide())
        expected = found(image, 8).mask
        assert (found(image.astype(np.float32), 8).mask == expected).all()
        assert iou(found(image / np.float32(255), 8).mask, expected) > 0.999

    def test_none_keeps_everything(self) -> None:
        result = tissue_mask(picture(glass((8, 9))), (8, 8), TissueSpec(method="none"))
        assert result.mask.all()
        assert (result.method, result.fraction) == ("none", 1.0)

    @settings(max_examples=15, deadline=None)
    @given(
        seed=st.integers(0, 2**16),
        ink=st.sampled_from(list(INKS)),
        um=st.sampled_from([4.0, 8.0, 40.0]),
        axes=st.sampled_from([(1,), (2,), (1, 2)]),
    )
    def test_flips(self, seed: int, ink: str, um: float, axes: tuple[int, ...]) -> None:
        shape = (96, 128)
        rng = np.random.default_rng(seed)
        where = ellipse(
            shape, (rng.uniform(20, 76), rng.uniform(20, 108)), (rng.uniform(8, 40), rng.uniform(8, 50))
        )
        pixels = stained(glass(shape, seed=seed), where, (HAEMATOXYLIN, EOSIN), seed)
        line = stroke(shape, rng.uniform(0, 96), rng.uniform(-1, 1), 14)
        pixels = np.where(line, pixels * np.array(INKS[ink])[:, None, None] / 240, pixels)
        image = picture(pixels)
        flipped = found(np.flip(image, axes), um).mask
        assert (np.flip(flipped, tuple(a - 1 for a in axes)) == found(image, um).mask).mean() > 0.9999

    @pytest.mark.parametrize("shape", [(3, 1, 1), (3, 5, 1), (3, 0, 4), (1, 1, 7), (3, 17, 33)])
    def test_tiny(self, shape: tuple[int, int, int]) -> None:
        rng = np.random.default_rng(0)
        assert found(rng.integers(0, 256, shape, dtype=np.uint8), 0.5).mask.shape == shape[1:]

    def test_wrong_shapes(self) -> None:
        with pytest.raises(SpecError, match="pixel_um"):
            tissue_mask(np.zeros((4, 4), np.uint8), (8, 8), SPEC)
        with pytest.raises(SpecError, match="pixel_um"):
            tissue_mask(np.zeros((3, 4, 4), np.uint8), (8,), SPEC)


class TestOtherChannels:
    def test_fluorescence(self) -> None:
        rng = np.random.default_rng(0)
        image = rng.normal(100, 5, (2, *SHAPE)).astype(np.float32)
        image[1][TISSUE] += 400 + rng.normal(0, 60, TISSUE.sum())
        assert iou(found(image, 8).mask, TISSUE) > 0.95

    def test_grey_brightfield(self) -> None:
        grey = picture(slide()).mean(0, keepdims=True).astype(np.uint8)
        result = found(grey, 8)
        assert iou(result.mask, TISSUE) > 0.9
        assert result.method == "distance+otsu"

    def test_noise_and_nothing(self) -> None:
        noise = np.random.default_rng(0).normal(100, 5, (1, 512, 512)).astype(np.float32)
        assert found(noise, 8).fraction < 0.001
        assert found(np.zeros((1, 20, 20), np.uint16), 8).fraction == 0


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radii: tuple[float, ...]) -> Bools:
    grid = np.indices(shape)
    inside: Bools = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1
    return inside


class TestVolumes:
    SHAPE = (24, 64, 64)
    BODY = ball((24, 64, 64), (12, 30, 32), (40, 22, 28))

    @pytest.mark.parametrize("outside", [-1000, -3024])
    def test_ct_with_lungs_and_table(self, outside: int) -> None:
        lung = ball(self.SHAPE, (12, 30, 22), (40, 10, 8))
        ct = np.random.default_rng(0).normal(0, 20, self.SHAPE)
        ct[self.BODY] += 40
        ct[~self.BODY] -= 1000
        ct[lung] -= 850
        ct[:, 58:60] = -200
        ct[:, :, :2] = outside
        result = foreground_mask(ct[None].astype(np.float32), (3, 3, 3), SPEC)
        assert (result.method, result.threshold) == ("hounsfield", -500)
        assert iou(result.mask, self.BODY) > 0.99

    @pytest.mark.parametrize("offset", [0, 50])
    def test_mr_with_noise_and_dark_fluid(self, offset: float) -> None:
        rng = np.random.default_rng(0)
        head = ball(self.SHAPE, (12, 30, 32), (10, 22, 28))
        tissue = np.where(ball(self.SHAPE, (12, 30, 32), (4, 8, 8)), 120, 400) * head
        mr = np.hypot(tissue + rng.normal(0, 12, self.SHAPE), rng.normal(0, 12, self.SHAPE)) + offset
        result = foreground_mask(mr[None], (1, 1, 1), SPEC)
        assert result.method == "distance+otsu"
        assert iou(result.mask, head) > 0.97

    def test_susceptibility_of_both_signs(self) -> None:
        qsm = np.random.default_rng(0).normal(0, 30, self.SHAPE)
        qsm[~self.BODY] = 0
        assert iou(foreground_mask(qsm[None], (1, 1, 1), SPEC).mask, self.BODY) > 0.97

    def test_no_background_in_view(self) -> None:
        inside = np.random.default_rng(0).normal(300, 40, (1, 16, 16, 16))
        assert foreground_mask(inside, (1, 1, 1), SPEC).fraction > 0.95

    def test_real_ct(self) -> None:
        ct, labels = (nifti(f"totalseg_ct_3mm_slab30{part}.nii.gz") for part in ("", "_labels"))
        result = foreground_mask(ct[None], (3, 3, 3), SPEC)
        assert result.method == "hounsfield"
        assert result.mask[labels > 0].mean() > 0.999
        assert result.fraction < 0.7
        assert not result.mask[:, [0, 0], [0, -1]].any()

    def test_real_mr(self) -> None:
        brain = nifti("mni152_2009a_t1_1mm.nii.gz")[::3, ::3, ::3]
        result = foreground_mask(brain[None], (3, 3, 3), SPEC)
        assert result.mask[brain > 60].all()
        assert 0.2 < result.fraction < 0.25

    def test_channels_add_up(self) -> None:
        two = np.zeros((2, *self.SHAPE), np.float32)
        left, right = self.BODY.copy(), self.BODY.copy()
        left[..., 32:] = False
        right[..., :32] = False
        two[0][left], two[1][right] = 100, 7
        assert (foreground_mask(two, (1, 1, 1), SPEC).mask == self.BODY).all()

    def test_nothing(self) -> None:
        result = foreground_mask(np.zeros((1, 4, 5, 6)), (1, 1, 1), SPEC)
        assert not result.mask.any()
        assert result.notes == ("nothing stands out from the background",)

    def test_not_a_number_is_background(self) -> None:
        volume = np.where(self.BODY, 100.0, np.nan)
        volume[0, 0, 0] = 0
        assert iou(foreground_mask(volume[None], (1, 1, 1), SPEC).mask, self.BODY) > 0.99

    def test_the_caller_keeps_its_array(self) -> None:
        volume = np.random.default_rng(0).normal(300, 40, (1, 8, 8, 8)).astype(np.float32)
        before = volume.copy()
        foreground_mask(volume, (1, 1, 1), SPEC)
        assert (volume == before).all()

    def test_none_and_wrong_shapes(self) -> None:
        assert foreground_mask(np.zeros((1, 2, 3, 4)), (1, 1, 1), TissueSpec(method="none")).mask.all()
        with pytest.raises(SpecError, match="spacing_mm"):
            foreground_mask(np.zeros((2, 3, 4)), (1, 1, 1), SPEC)


def slow_fraction(
    mask: Bools, start: tuple[int, ...], tile: tuple[int, ...], down: tuple[float, ...]
) -> float:
    """Overlap of the tile with every mask pixel, summed one by one."""
    area = 0.0
    for pixel in np.argwhere(mask):
        part = 1.0
        for p, s, t, d in zip(pixel, start, tile, down, strict=True):
            part *= max(0.0, min((p + 1) * d, s + t) - max(p * d, s))
        area += part
    return area / float(np.prod(tile))


class TestTissueFraction:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_against_the_sum_over_pixels(self, data: st.DataObject) -> None:
        axes = data.draw(st.integers(1, 3))
        shape = tuple(data.draw(st.integers(1, 6)) for _ in range(axes))
        down = tuple(data.draw(st.floats(0.5, 40)) for _ in range(axes))
        tile = tuple(data.draw(st.integers(1, 150)) for _ in range(axes))
        starts = np.array(
            [[data.draw(st.integers(-60, 250)) for _ in range(axes)] for _ in range(3)], np.int64
        )
        mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.5
        expected = [slow_fraction(mask, tuple(s), tile, down) for s in starts.tolist()]
        result = tissue_fraction(mask, starts, tile, down)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=2e-6)

    def test_a_full_mask_gives_one_and_outside_is_none(self) -> None:
        mask = np.ones((10, 10), bool)
        starts = np.array([[0, 0], [0, 160], [0, 312], [-32, 0], [1000, 1000]])
        result = tissue_fraction(mask, starts, (64, 16), (32.0, 32.0))
        np.testing.assert_allclose(result, [1, 1, 0.5, 0.5, 0], atol=1e-6)

    def test_no_tiles(self) -> None:
        assert tissue_fraction(np.ones((3, 3), bool), np.zeros((0, 2), int), (4, 4), (2.0, 2.0)).shape == (0,)

    def test_axes_must_agree(self) -> None:
        with pytest.raises(SpecError, match="axes"):
            tissue_fraction(np.ones((3, 3), bool), np.zeros((1, 3), int), (4, 4), (2.0, 2.0))
