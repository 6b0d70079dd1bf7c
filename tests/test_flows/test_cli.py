"""The command line: what is accepted, what is said, how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer.main
from jsonschema import Draft202012Validator
from typer.core import TyperGroup

import flows.batch
import flows.doctor
from flows.cli import app, main
from flows.doctor import Check
from flows.progress import Bars, Event, Lines
from flows.tables import json_schemas, plan_lines
from schemas.plan import PlanSummary
from schemas.run import RunReport
from tests.test_flows.networks import write_factory_card
from tests.test_flows.runs import tiles_of
from workers.cam.bag_methods import BAG_METHODS
from workers.cam.methods import METHODS

SLIDE = "procedural:slide?width=512&height=256&seed=1"
"""At 0.5 um and a card of 64 px at 1 um: two rows of four tiles."""
SERIAL = ("--direct", "--pool", "serial", "--threads", "1")
COMMANDS = (
    "inspect",
    "plan",
    "explain",
    "methods",
    "demo",
    "schema",
    "doctor",
    "embed",
    "train",
    "export",
    "report",
    "view",
    "napari",
)

pytestmark = pytest.mark.usefixtures("no_pictures")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def report(self) -> RunReport:
        return RunReport.model_validate_json(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def gigacam(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The command in this process, as it would end."""
    for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    at_sigterm = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, said.out, said.err)

    yield run
    signal.signal(signal.SIGTERM, at_sigterm)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_factory_card(
        tmp_path_factory.mktemp("card"), "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(64, 64), mpp=1.0,
    )  # fmt: skip


def write_tiff(path: Path, seed: int, mpp: float | None = 0.5) -> Path:
    """A slide of 256 x 384 px of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (256, 384, 3), np.uint8)
    scale: dict[str, Any] = (
        {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    )
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", **scale)
    return path


def options_of(command: str) -> Sequence[Any]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return [p for p in group.commands[command].params if p.name != "help"]


# --- help --------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE) == list(COMMANDS)
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line
    }
    assert "typer" in imported
    assert imported & {"torch", "ray", "monai", "prefect", "zarr", "numpy", "dask", "pydantic"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_and_what_it_is_by_default(command: str) -> None:
    for option in options_of(command):
        assert option.help, f"{command} {option.name}"
        if option.param_type_name == "option" and not option.required and option.default in (None, ""):
            assert "Default:" in option.help, f"{command} --{option.name}"


def test_options_name_their_units() -> None:
    units = {
        "mpp": "um",
        "spacing": "mm",
        "tile": "model px",
        "downsample": "Level-0 px",
        "region": "level-0 px",
    }
    found = {option.name: option.help for option in options_of("explain")}
    for name, unit in units.items():
        assert unit in found[name]


def test_version_and_no_command(gigacam: Run) -> None:
    assert re.fullmatch(r"gigacam \d+\.\d+\.\d+\n", gigacam("--version").out)
    assert gigacam().code == 2


# --- inspect, methods, schema ------------------------------------------------------------------------------------------


def test_inspect_prints_facts_for_people_and_machines(gigacam: Run, tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "a.tiff", 0)
    text = gigacam("inspect", str(slide))
    assert text.code == 0
    facts = dict(line.split(maxsplit=1) for line in text.out.splitlines() if len(line.split()) > 1)
    (document,) = json.loads(gigacam("inspect", str(slide), "--json").out)
    assert facts["image_id"] == document["image_id"]
    assert re.fullmatch(r"a-[0-9a-f]{8}", document["image_id"])
    assert document["levels"][0]["shape"] == [256, 384]
    assert document["spacing"] == pytest.approx([0.5, 0.5])


def test_inspect_goes_on_after_an_image_that_fails(gigacam: Run) -> None:
    done = gigacam("inspect", "absent.svs", SLIDE, "--json")
    assert done.code == 1
    assert re.match(r"error: \S*absent.svs: no such file", done.err)
    assert [document["uri"] for document in json.loads(done.out)] == [SLIDE]


def test_methods_are_those_of_the_table(gigacam: Run) -> None:
    rows = json.loads(gigacam("methods", "--json").out)
    assert [row["name"] for row in rows if row["flag"] == "--method"] == list(METHODS)
    assert [row["name"] for row in rows if row["flag"] == "--bag-method"] == list(BAG_METHODS)
    text = gigacam("methods").out
    for row in rows:
        assert re.search(rf"^ *{row['name']} ", text, re.MULTILINE)
        assert row["citation"].split(",")[0] in text


def test_schemas_are_json_schemas(gigacam: Run) -> None:
    names = gigacam("schema").out.split()
    assert names == sorted(json_schemas())
    assert {"ModelCard", "ExplainRequest", "RunReport", "PlanSummary"} <= set(names)
    for name in names:
        document = json.loads(gigacam("schema", name).out)
        Draft202012Validator.check_schema(document)
        assert document["title"] == name
        assert document["additionalProperties"] is False


def test_an_unknown_schema_is_answered_with_the_known(gigacam: Run) -> None:
    done = gigacam("schema", "Nope")
    assert done.code == 2
    assert "'Nope'" in done.err
    assert "ModelCard" in done.err


# --- plan --------------------------------------------------------------------------------------------------------------


def test_plan_prints_the_cost_and_writes_nothing(gigacam: Run, card: str, tmp_path: Path) -> None:
    words = (
        "plan",
        SLIDE,
        "--model",
        card,
        "--out",
        str(tmp_path / "out"),
        "--tissue",
        "none",
        "--batch",
        "3",
    )
    done = gigacam(*words, "--json")
    assert done.code == 0
    (document,) = json.loads(done.out)
    plan = PlanSummary.model_validate(document)
    assert (plan.tiles, plan.units, plan.batches) == (8, 1, 3)
    assert plan.channels == ("gradcam:r", "gradcam:g", "gradcam:b")
    assert plan.defaults["unit"] == "64"
    assert not {"batch", "tissue"} & set(plan.defaults), "given, so no default"
    text = gigacam(*words).out
    free = re.compile(r"[\d.]+ GiB free")  # may change meanwhile
    assert free.sub("", text) == free.sub("", "\n".join(plan_lines(plan)) + "\n")
    assert "8 of 128 x 128 level-0 px" in text
    assert "1 unit, 3 batches, 1 block" in text
    assert "256 x 512 px (y, x) at 0.5 x 0.5 um" in text
    assert not (tmp_path / "out").exists()


def test_plan_measures_a_rate_when_asked(
    gigacam: Run, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("plan", SLIDE, "--model", card, "--tissue", "none")
    assert "unknown; --measure runs one batch" in gigacam(*words).out
    assert re.search(r"time +(under|about) \d+ s", gigacam(*words, "--measure").out)


def test_plan_goes_on_after_an_image_that_fails(gigacam: Run, card: str) -> None:
    done = gigacam("plan", "absent.svs", SLIDE, "--model", card, "--json")
    assert done.code == 1
    assert "absent.svs: no such file" in done.err
    assert [document["image"] for document in json.loads(done.out)] == [SLIDE]


WRONG = [
    ("--mpp 0", "--mpp 0: expected .* 0.01 to 100"),
    ("--mpp 500", "--mpp 500: expected .* 0.01 to 100"),
    ("--mpp half", "--mpp.*number"),
    ("--spacing 1,2", "--spacing 1,2: expected one number above 0, or three"),
    ("--spacing 1,0,1", "--spacing 1,0,1: expected"),
    ("--spacing thick", "--spacing thick: expected numbers"),
    ("--method nope,gradcam", "--method nope: unknown; `gigacam methods` lists every method"),
    ("--method grad-cam", "--method grad-cam: unknown; did you mean gradcam"),
    ("--method gradcam+n=3", "--method gradcam: has no option 'n'; it has none"),
    ("--method gradcam+n", r"--method gradcam\+n: options are written name\+key=value"),
    ("--method ,", "--method ',': names no method"),
    ("--target nope", r"--target nope: no class .* \(r, g, b\), an index below 3"),
    ("--target 3", "--target 3: no class"),
    ("--layer nope", "no layer 'nope'; near names: pool"),
    ("--tile 0", "--tile 0: expected greater"),
    ("--tile 3.5", "--tile 3.5: expected whole"),
    ("--tile 64,64,64", r"tile = \[64, 64, 64\] has 3 axes; the model's input has 2"),
    ("--overlap 1", "--overlap 1.0: expected less than 1"),
    ("--edge cut", "--edge cut: expected 'shift' or 'pad'"),
    ("--tissue some", "--tissue some: expected 'auto' or 'none'"),
    ("--region absent.json", "absent.json: not readable as GeoJSON .* polygons in level-0 pixels"),
    ("--mask absent.png", "--mask absent.png: no such file .* check the path"),
    ("--batch 0", "--batch 0: expected greater"),
    ("--unit 0", "--unit 0: expected greater"),
    ("--importance triangle", "--importance triangle: expected 'flat', 'hann' or 'gaussian'"),
    ("--downsample 0", "--downsample 0: expected greater"),
    ("--cell-centres middle", "--cell-centres middle: expected 'receptive_field' or 'grid'"),
    ("--workers 0", "--workers 0: expected greater"),
    ("--image-id name", "--image-id name: expected 'stem' or 'hash'"),
    ("--nope", "[Nn]o such option"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG, ids=[flags for flags, _ in WRONG])
@pytest.mark.parametrize("command", ["plan", "explain"])
def test_a_wrong_request_ends_with_2_and_names_flag_value_and_remedy(
    gigacam: Run, card: str, tmp_path: Path, command: str, flags: str, said: str
) -> None:
    out = tmp_path / "out"
    more = SERIAL if command == "explain" else ()
    done = gigacam(command, SLIDE, "--model", card, "--out", str(out), *more, *flags.split())
    assert done.code == 2, done.err
    assert re.search(said, done.err), done.err
    assert done.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("{}/*.svs", "no file or folder matches"),
        ("{}", "without any image"),
        ("{}/list.csv", "columns .* expected"),
    ],
)
def test_an_empty_list_of_images_is_a_wrong_request(
    gigacam: Run, card: str, tmp_path: Path, image: str, said: str
) -> None:
    (tmp_path / "list.csv").write_text("picture\na.svs\n")
    done = gigacam("plan", image.format(tmp_path), "--model", card)
    assert done.code == 2
    assert re.search(said, done.err)


def test_a_wrong_model_card_or_place_is_a_wrong_request(gigacam: Run, card: str, tmp_path: Path) -> None:
    absent = gigacam(
        "explain", SLIDE, "--model", str(tmp_path / "m.toml"), "--out", str(tmp_path / "o"), *SERIAL
    )
    assert (absent.code, absent.out) == (2, "")
    assert "m.toml: the model card cannot be read" in absent.err
    (tmp_path / "file").write_text("")
    taken = gigacam("explain", SLIDE, "--model", card, "--out", str(tmp_path / "file"), *SERIAL)
    assert taken.code == 2
    assert re.search(r"--out .*file: cannot be made a folder .* choose another", taken.err)
    pool = gigacam("explain", SLIDE, "--model", card, "--out", str(tmp_path / "o"), "--pool", "cloud")
    assert pool.code == 2
    assert "--pool cloud: expected 'auto', 'serial' or 'ray'" in pool.err


@pytest.mark.parametrize(
    "document", ["{", '{"type": "Point"}', '{"type": "Polygon", "coordinates": []}', '{"type": "Polygon"}']
)
def test_a_region_without_polygons_is_a_wrong_request(
    gigacam: Run, card: str, tmp_path: Path, document: str
) -> None:
    region = tmp_path / "region.json"
    region.write_text(document)
    done = gigacam("plan", SLIDE, "--model", card, "--region", str(region))
    assert done.code == 2
    assert re.search(r"region.json: .* --region expects polygons in level-0 pixels", done.err)


# --- explain -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def explain(gigacam: Run, card: str, tmp_path: Path) -> Run:
    """`gigacam explain` of words given, serial and direct, into one folder."""

    def run(*words: str) -> Ended:
        return gigacam("explain", *words, "--model", card, "--out", str(tmp_path / "out"), *SERIAL)

    return run


def test_explain_prints_plain_lines_when_piped(explain: Run, tmp_path: Path) -> None:
    done = explain(SLIDE, "--tissue", "none")
    assert done.code == 0
    image, total = done.out.splitlines()
    assert re.match(r"complete +procedural:slide\S+  8/8 tiles  \S+", image)
    assert re.match(r"1 image in [\d.]+ s on serial, 1 thread; ", total)
    first, *told = done.err.splitlines()
    assert first == "pool: serial, as asked; direct"
    stages = [line.split(": ", 1)[1].split()[0] for line in told]
    assert list(dict.fromkeys(stages)) == ["probe", "plan", "explain", "stitch", "publish", "complete"]
    assert "\x1b" not in done.err
    report = RunReport.model_validate_json((tmp_path / "out" / "run.json").read_text())
    assert report.images[0].status == "complete"


def test_explain_json_is_one_document(explain: Run, tmp_path: Path) -> None:
    done = explain(SLIDE, "--tissue", "none", "--json")
    assert done.code == 0
    (image,) = done.report.images
    assert image.counts is not None
    assert (image.counts.planned, image.counts.done) == (8, 8)
    (written,) = RunReport.model_validate_json((tmp_path / "out" / "run.json").read_text()).images
    assert written == image.model_copy(update={"failures": (), "provenance": {}})
    for line in done.err.splitlines()[1:]:
        assert set(json.loads(line)) >= {"image", "stage", "done", "total"}


def test_an_image_that_fails_ends_with_1_and_leaves_the_others(explain: Run) -> None:
    done = explain("absent.svs", SLIDE, "--tissue", "none")
    assert done.code == 1
    failed, complete, _ = done.out.splitlines()
    assert re.match(r"failed +absent.svs  \S*absent.svs: no such file or folder; check the path", failed)
    assert complete.startswith("complete")


def test_strict_stops_at_the_first_image_that_fails(explain: Run) -> None:
    done = explain("absent.svs", SLIDE, "--strict", "--json")
    assert done.code == 1
    assert [image.status for image in done.report.images] == ["failed", "not started"]


@pytest.mark.parametrize("place", ["do", "opened"])
def test_an_interrupt_ends_with_130_and_says_how_to_resume(
    explain: Run, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    defaults = flows.batch.explain_batch.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, place, interrupted)
    done = explain(SLIDE)
    assert done.code == 130
    assert done.err.splitlines()[-1].startswith("interrupted: run the same command again to resume")


def test_another_request_into_the_same_folder_is_refused_unless_fresh(explain: Run) -> None:
    explain(SLIDE, "--tissue", "none")
    refused = explain(SLIDE, "--tissue", "none", "--overlap", "0.5")
    assert refused.code == 1
    assert re.search(r"differs in grid.overlap \(there 0.0, asked 0.5\).*--fresh", refused.out)
    fresh = explain(SLIDE, "--tissue", "none", "--overlap", "0.5", "--fresh", "--json")
    assert fresh.code == 0
    assert fresh.report.images[0].provenance["spec"]["grid"]["overlap"] == 0.5


@pytest.mark.parametrize(
    ("asked", "channels"),
    [
        ("", ["gradcam:r", "gradcam:g", "gradcam:b"]),
        ("g", ["gradcam:g"]),
        ("2", ["gradcam:b"]),
        ("b,0", ["gradcam:b", "gradcam:r"]),
        ("predicted", ["gradcam:predicted"]),
        ("all", ["gradcam:r", "gradcam:g", "gradcam:b"]),
    ],
)
def test_targets(gigacam: Run, card: str, asked: str, channels: list[str]) -> None:
    (plan,) = json.loads(gigacam("plan", SLIDE, "--model", card, "--target", asked, "--json").out)
    assert plan["channels"] == channels


def test_tile_overlap_methods_and_downsample_arrive(explain: Run) -> None:
    done = explain(
        SLIDE, "--tissue", "none", "--tile", "32", "--overlap", "0.5", "--method", "hirescam, gradcam",
        "--target", "g", "--downsample", "8", "--importance", "flat", "--edge", "pad", "--json",
    )  # fmt: skip
    (image,) = done.report.images
    assert [channel.label for channel in image.channels] == ["hirescam:g", "gradcam:g"]
    lattice, heatmap = image.provenance["lattice"], image.provenance["heatmap"]
    assert (lattice["tile_l0"], lattice["stride_l0"], lattice["edge"]) == ([64, 64], [32, 32], "pad")
    assert (heatmap["downsample"], heatmap["importance"]) == (8, "flat")


def test_layer_and_cell_centres_arrive(gigacam: Run, tmp_path: Path) -> None:
    card = write_factory_card(
        tmp_path, "constant_map", {}, "ones", ("a", "b"), kind="slide", channels=3, tile=(64, 64), mpp=1.0
    )
    done = gigacam(
        "explain", SLIDE, "--model", card, "--out", str(tmp_path / "out"), "--tissue", "none", "--layer", "pool",
        "--cell-centres", "grid", "--json", *SERIAL,
    )  # fmt: skip
    provenance = done.report.images[0].provenance
    assert provenance["spec"]["cam"]["layer"] == "pool"
    assert provenance["cells"]["gradcam"]["source"] == "grid"


def test_region_limits_what_is_computed(explain: Run, tmp_path: Path) -> None:
    ring = [[10, 140], [200, 140], [200, 250], [10, 250], [10, 140]]  # x, y: the lower left two tiles
    region = tmp_path / "region.json"
    region.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    done = explain(SLIDE, "--tissue", "none", "--region", str(region), "--json")
    (image,) = done.report.images
    assert image.counts is not None
    assert (image.counts.planned, image.counts.done, image.counts.left_out) == (2, 2, 6)
    boxes = tiles_of(done.report).boxes(np.arange(2))
    assert boxes[:, 0].tolist() == [[128, 0], [128, 128]]


def test_mask_takes_the_place_of_the_tissue_mask(explain: Run, tmp_path: Path) -> None:
    mask = np.zeros((2, 4), np.uint8)  # stretched over the image: a pixel a tile
    mask[0, 3] = mask[1, 1] = 1
    np.save(tmp_path / "mask.npy", mask)
    done = explain(SLIDE, "--mask", str(tmp_path / "mask.npy"), "--json")
    assert done.code == 0, done.err
    boxes = tiles_of(done.report).boxes(np.arange(2))
    assert boxes[:, 0].tolist() == [[0, 384], [128, 128]]
    assert done.report.images[0].counts == tiles_of(done.report).counts()
    assert done.report.images[0].provenance["spec"]["grid"]["mask_sha256"]


def test_csv_rows_bring_pixel_size_and_target(explain: Run, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tiff", 0, mpp=None)
    write_tiff(tmp_path / "b.tiff", 1)
    (tmp_path / "list.csv").write_text("image,mpp,target\na.tiff,0.25,g\nb.tiff,,b\n")
    done = explain(str(tmp_path / "list.csv"), "--tissue", "none", "--json")
    a, b = done.report.images
    assert done.code == 0, done.err
    assert [a.provenance["spec"]["spacing"], b.provenance["spec"]["spacing"]] == [
        [0.25, 0.25],
        pytest.approx([0.5, 0.5]),
    ]
    assert [[c.target for c in image.channels] for image in (a, b)] == [["g"], ["b"]]


def test_a_csv_row_with_an_unknown_target_fails_by_name(explain: Run, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tiff", 0)
    (tmp_path / "list.csv").write_text("image,target\na.tiff,nope\n")
    done = explain(str(tmp_path / "list.csv"), "--json")
    assert done.code == 1
    assert re.search(r"a.tiff: .*nope.* expected a name \(r, g, b\)", done.report.images[0].error)


@pytest.mark.parametrize("pattern", ["slides", "slides/*.tiff", "slides/?.tiff"])
def test_folders_and_globs_are_listed_by_name(gigacam: Run, card: str, tmp_path: Path, pattern: str) -> None:
    paths = [str(write_tiff(tmp_path / "slides" / f"{name}.tiff", i)) for i, name in enumerate("ab")]
    (tmp_path / "slides" / "notes.txt").write_text("none")
    done = gigacam("plan", str(tmp_path / pattern), "--model", card, "--tissue", "none", "--json")
    assert [plan["image"] for plan in json.loads(done.out)] == paths


def test_the_same_content_twice_is_explained_once(explain: Run, tmp_path: Path) -> None:
    one, other = write_tiff(tmp_path / "a.tiff", 0), tmp_path / "b.tiff"
    other.write_bytes(one.read_bytes())
    done = explain(str(one), str(other), str(one), "--tissue", "none", "--json")
    assert done.code == 0
    assert [image.status for image in done.report.images] == ["complete", "duplicate", "duplicate"]
    assert [image.error for image in done.report.images[1:]] == [
        f"{name}: the same content as {one}, which this run explains" for name in (other, one)
    ]


def test_image_id_hash_keeps_file_names_out_of_the_output(explain: Run, tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "jane-doe.tiff", 0)
    done = explain(str(slide), "--tissue", "none", "--image-id", "hash", "--json")
    (image,) = done.report.images
    assert re.fullmatch(r"[0-9a-f]{8}", image.image_id)
    assert Path(image.output).name == image.image_id
    assert not [path for path in (tmp_path / "out").rglob("*") if "jane" in path.name]


@pytest.mark.prefect
def test_json_and_strict_hold_through_prefect(
    gigacam: Run, card: str, tmp_path: Path, prefect_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_session)
    words = ("--model", card, "--out", str(tmp_path / "out"), "--pool", "serial", "--threads", "1", "--json")
    done = gigacam("explain", "absent.svs", SLIDE, "--tissue", "none", "--strict", *words)
    assert done.code == 1
    assert "pool: serial, as asked; Prefect" in done.err
    assert [image.status for image in done.report.images] == ["failed", "not started"]
    again = gigacam("explain", SLIDE, "--tissue", "none", *words)
    assert (again.code, [i.status for i in again.report.images]) == (0, ["complete"]), again.out


# --- demo, doctor, progress --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--methods gradcam,nope", "--methods nope: unknown; `gigacam methods` lists every method"),
        ("--slide absent.svs", "--slide absent.svs: no such file"),
        ("--pool cloud", "--pool cloud: expected"),
    ],
)
def test_a_wrong_demo_is_refused_before_anything_is_made(
    gigacam: Run, tmp_path: Path, flags: str, said: str
) -> None:
    done = gigacam("demo", "--out", str(tmp_path / "demo"), *flags.split())
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "demo").exists()


def test_doctor_says_what_to_fix(gigacam: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[bool, str]:
        msg = "no such device"
        raise OSError(msg)

    kept = tuple(check for check in flows.doctor._CHECKS if check[0] in ("Python", "packages", "OpenSlide"))
    assert len(kept) == 3
    monkeypatch.setattr(flows.doctor, "_CHECKS", kept)
    fine = gigacam("doctor")
    assert fine.code == 0, fine.out
    assert re.search(r"^ok    Python: 3\.1\d", fine.out)
    monkeypatch.setattr(flows.doctor, "_CHECKS", (("device", "plug it in", broken), *kept))
    done = gigacam("doctor")
    assert done.code == 1
    assert done.out.startswith("FAIL  device: OSError: no such device\n      plug it in\nok    Python")


def test_doctor_looks_at_versions_within_bounds_and_at_the_disk() -> None:
    looked = {name: look for name, _, look in flows.doctor._CHECKS}
    assert {"Ray", "Prefect", "disk", "/dev/shm", "write access", "torch", "constraints"} <= set(looked)
    for name in ("disk", "/dev/shm", "write access", "torch"):
        ok, found = looked[name]()
        assert isinstance(ok, bool)
        assert found


@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.usefixtures("ray_session", "prefect_session")
def test_doctor_starts_ray_and_runs_a_flow() -> None:
    found = {check.name: check for check in flows.doctor.checks() if check.name in ("Ray", "Prefect")}
    assert found["Ray"] == Check("Ray", True, found["Ray"].found, found["Ray"].remedy)
    assert "ray" in found["Ray"].found.lower()
    assert found["Prefect"].ok, found["Prefect"].found
    assert "a flow ran" in found["Prefect"].found


def test_lines_tell_a_stage_once_and_then_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    tell = Lines(every_s=1000.0)
    for done in range(0, 11, 5):
        tell(Event("a", "explain", done, 10, 1, 2.5))
    tell.close()
    assert capsys.readouterr().err.splitlines() == [
        "a: explain  0/10  2.5 tiles/s, 4 s left  1 failed",
        "a: explain  10/10  2.5 tiles/s, 0 s left  1 failed",
    ]


def test_bars_show_rate_failures_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars(Event("a.svs", "explain", 5, 10, 2, 3.0))
    bars(Event("a.svs", "failed", message="a [broken] one"))
    bars.close()
    said = capsys.readouterr().err
    assert "a.svs: a [broken] one" in said
    assert "a.svs  failed" in said
