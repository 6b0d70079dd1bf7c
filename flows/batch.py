"""All images of a request, over one pool; one image's failure never ends the others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from flows.export import check_formats
from flows.progress import Event
from flows.settings import with_threads
from flows.steps import Tell, explain_image
from schemas.errors import GigacamError, SpecError
from schemas.image import ImageRequest
from schemas.run import ExplainRequest, ImageReport, ImageStatus, PoolSettings, RunReport
from workers.models.facts import retarget
from workers.planner import Model, open_model, with_row_options
from workers.pool import Pool, open_pool
from workers.provenance import versions
from workers.publisher import write_run_report
from workers.readers import expand, identity_of

log = logging.getLogger("gigacam")

Image = Callable[[ImageRequest, ExplainRequest, Model, Pool, PoolSettings, Tell], ImageReport]
"""What is done with each image."""
One = Callable[[int], ImageReport]
"""Explains the image at a position of the run."""
Stop = Callable[[], None]
Each = Callable[[Sequence[ImageRequest], One, Stop], Iterable[tuple[int, ImageReport]]]
"""How the images of a run are run, here one after another or in threads, under Prefect as tasks: the position of
each image and its report. The last argument ends the work of all images; who waits for threads calls it first."""


def one_after_another(
    images: Sequence[ImageRequest], one: One, stop: Stop
) -> Iterable[tuple[int, ImageReport]]:
    """Run the images in order, in this thread."""
    return ((position, one(position)) for position in range(len(images)))


def in_threads(workers: int) -> Each:
    """At most `workers` images at once, over a pool that is shared: one is planned while another computes."""

    def each(images: Sequence[ImageRequest], one: One, stop: Stop) -> Iterable[tuple[int, ImageReport]]:
        executor = ThreadPoolExecutor(workers, thread_name_prefix="image")
        try:
            running = {executor.submit(one, position): position for position in range(len(images))}
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    return each


def list_images(request: ExplainRequest) -> list[ImageRequest]:
    """Files, folders, globs and CSV rows of the request, one by one."""
    return [with_row_options(image, request.read) for image in expand(request.images)]


def explain_batch(
    request: ExplainRequest,
    settings: PoolSettings,
    tell: Tell,
    each: Each | None = None,
    *,
    opened: Callable[[ExplainRequest], Model] = open_model,
    do: Image = explain_image,
) -> RunReport:
    """Explain every image of the request; write `run.json` after each.

    Parameters
    ----------
    each
        How images are run; None: in order on the serial pool, else `images_in_flight` at once.
    opened, do
        How the model is opened, and what is done with an image, where that is not to explain it.

    Raises
    ------
    SpecError, ModelError
        The request is wrong: nothing was computed.
    """
    began = time.perf_counter()
    settings = with_threads(settings)
    if request.exports:
        check_formats(request.exports)
    images = list_images(request)
    model = opened(request)
    out = Path(request.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--out {out}: cannot be made a folder ({error.strerror or error}); choose another"
        raise SpecError(msg) from error
    pool = open_pool(settings)
    reports: dict[int, ImageReport] = {}
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        pool.close()

    def tell_unless_stopped(event: Event) -> None:
        # What threads have to say of a pool closed under them is no news.
        if not stopped.is_set():
            tell(event)

    def summary() -> RunReport:
        ordered = tuple(reports[position] for position in sorted(reports))
        seconds = time.perf_counter() - began
        return RunReport(images=ordered, pool=pool.description, seconds=seconds, versions=versions())

    try:
        if each is None:
            each = one_after_another if settings.kind == "serial" else in_threads(settings.images_in_flight)
        one = _one_image(images, do, request, model, pool, settings, tell_unless_stopped)
        for position, report in each(images, one, stop):
            reports[position] = report
            write_run_report(out, summary())
            if request.strict and report.status in ("failed", "gaps"):
                log.error("--strict: stopping at %s", report.image)
                for position, image in enumerate(images):
                    reports.setdefault(position, ImageReport(image=image.uri, status="not started"))
                break
    except KeyboardInterrupt:
        for position, image in enumerate(images):
            reports.setdefault(position, ImageReport(image=image.uri, status="interrupted"))
    finally:
        stop()
    write_run_report(out, summary())
    return summary()


def _one_image(
    images: Sequence[ImageRequest],
    do: Image,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Tell,
) -> One:
    holders: dict[tuple[str, int | None, int | None], int] = {}
    holder_of = list(range(len(images)))
    targets: dict[int, tuple[str, ...]] = {}
    for position, image in enumerate(images):
        try:
            identity = identity_of(image.uri)
            targets[position] = _targets(image, model)
        except (GigacamError, OSError) as error:
            # It fails by name when its turn comes; here only duplicates matter.
            log.debug("no identity for %s: %s", image.uri, error)
        else:
            # Another time point or channel is another image; another pixel size is not.
            key = (identity, image.options.time, image.options.channel)
            holder_of[position] = holders.setdefault(key, position)

    def one(position: int) -> ImageReport:
        image, holder = images[position], images[holder_of[position]]
        if holder_of[position] != position:
            return _repeated(image, targets[position], holder, targets[holder_of[position]], tell)
        return do(image, request, model, pool, settings, tell)

    return one


def _targets(image: ImageRequest, model: Model) -> tuple[str, ...]:
    """What is explained of an image: the target of its own row, else those of the run."""
    if not image.target:
        return model.facts.targets
    return retarget(model.facts, model.card.output, (image.target,)).targets


def _repeated(
    image: ImageRequest, asked: Sequence[str], holder: ImageRequest, explained: Sequence[str], tell: Tell
) -> ImageReport:
    """Of an image whose content another one's row has: nothing is lost, or targets that only this row asks for."""
    message = f"{image.uri}: the same content as {holder.uri}, which this run explains"
    status: ImageStatus = "duplicate"
    if missing := [name for name in asked if name not in explained]:
        status = "failed"
        together = ",".join([*explained, *missing])
        message += (
            f" for {', '.join(explained)}: nothing is explained for {', '.join(missing)}; an image has one folder in "
            f"OUT, so ask for all of them at once (--target {together}, no target in its rows), or run this row "
            "with another --out"
        )
    tell(Event(Path(image.uri).name, status, message=message))
    return ImageReport(image=image.uri, status=status, error=message)
