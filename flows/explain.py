"""The main job as a Prefect flow: one task an image, small reports, no arrays."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import cast
from uuid import UUID

from flows.settings import quiet_environment, resolve_pool

quiet_environment()

from prefect import flow, get_run_logger, task  # noqa: E402  (analytics are turned off first)
from prefect.artifacts import (  # noqa: E402
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.futures import PrefectFuture, as_completed  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.batch import One, explain_batch, list_images  # noqa: E402
from flows.inbox import move, settled  # noqa: E402
from flows.progress import LISTENER, Event, throttled  # noqa: E402
from schemas.image import ImageRequest  # noqa: E402
from schemas.run import ExplainRequest, ImageReport, PoolSettings, RunReport  # noqa: E402

ARTIFACT_EVERY_S = 2.0

log = logging.getLogger("gigacam")


class NotComplete(Exception):
    """What a flow ends with that was interrupted or asked to be strict; the report of the run goes along."""

    def __init__(self, report: RunReport) -> None:
        dead = sum(image.status not in ("complete", "duplicate") for image in report.images)
        why = "--strict" if report.exit_code == 1 else "interrupted"
        super().__init__(f"{why}: {dead} of {len(report.images)} images are not complete; run.json says why")
        self.report = report


@flow(name="explain", log_prints=False, validate_parameters=True)
def explain(request: ExplainRequest, pool: PoolSettings = PoolSettings()) -> RunReport:  # noqa: B008
    """Explain every image of `request`; one task and one progress artifact an image.

    One image's failure never ends the others; the flow fails only under `strict`, and where it is interrupted.

    Raises
    ------
    SpecError, ModelError
        The request is wrong: nothing was computed.
    NotComplete
        See above.
    """
    logger = get_run_logger()
    settings, why = resolve_pool(pool, len(list_images(request)))
    logger.info("pool: %s", why)
    watching = LISTENER.get()

    def tell(event: Event) -> None:
        # Called in the thread of the image's task, whose artifact the event is for.
        artifact = _ARTIFACT.get()
        if artifact is not None:
            artifact(event)
        if event.message:
            logger.info("%s: %s: %s", event.image, event.stage, event.message)
        if watching is not None:
            watching(event)

    in_flight = settings.images_in_flight if settings.kind == "ray" else 1
    report = explain_batch(request, settings, tell, each=partial(_as_tasks, in_flight))
    _publish(report)
    if report.exit_code > int(not request.strict):
        raise NotComplete(report)
    return report


@flow(name="scan-inbox", validate_parameters=True)
def scan_inbox(
    inbox: str,
    model: str,
    out: str,
    done: str = "",
    settle_s: float = 60.0,
    pool: PoolSettings = PoolSettings(),  # noqa: B008
) -> RunReport | None:
    """Explain what lies in `inbox`; what was explained before is resumed or found complete.

    Parameters
    ----------
    done
        Folder that images are moved to once complete; empty leaves them where they are.
    settle_s
        What was written to within this time is left for the next scan, as it may still be on its way (seconds).
    """
    entries, waiting = settled(Path(inbox), settle_s)
    get_run_logger().info("%s: %d to explain, %d still being written", inbox, len(entries), waiting)
    if not entries:
        return None
    images = tuple(uri for entry in entries for uri in entry.images)
    report: RunReport = explain(ExplainRequest(images=images, model=model, out=out), pool)
    if done:
        complete = {image.image for image in report.images if image.status == "complete"}
        for entry in entries:
            if complete.issuperset(entry.images):
                move(entry, Path(done))
    return report


@flow(name="heartbeat")
def heartbeat() -> str:
    """Do nothing, through Prefect: an import alone does not show that flows run."""
    return "ran"


def _as_tasks(
    in_flight: int, images: Sequence[ImageRequest], one: One, stop: Callable[[], None]
) -> Iterable[tuple[int, ImageReport]]:
    """One Prefect task an image; the reports come back beside the states, not through them."""
    reports: dict[int, ImageReport] = {}
    names = _distinct([Path(image.uri.partition("?")[0]).name or image.uri for image in images])

    @task(task_run_name="{name}", cache_policy=NO_CACHE, retries=0, persist_result=False)
    def explain_one_image(name: str, position: int) -> State[str]:
        _ARTIFACT.set(_Artifact(name))
        report = reports[position] = one(position)
        if report.status == "failed":
            return Failed(message=report.error)
        if report.status == "gaps":
            return Completed(name="CompletedWithGaps", message=report.error)
        return Completed(message=report.output or report.error)

    threads: ThreadPoolTaskRunner[State[str]] = ThreadPoolTaskRunner(max_workers=in_flight)
    with threads as runner:
        try:
            futures: dict[PrefectFuture[State[str]], int] = {
                runner.submit(explain_one_image, {"name": name, "position": position}): position
                for position, name in enumerate(names)
            }
            for future in as_completed(list(futures)):
                position = futures[future]
                report = reports.get(position)
                if report is None:
                    uri = images[position].uri
                    message = future.state.message or f"{uri}: its task ended without a report"
                    report = ImageReport(image=uri, status="failed", error=message)
                yield position, report
        except BaseException:
            # An interrupt, or --strict. The runner waits for its threads, and they for work nobody wants now.
            stop()
            raise


def _distinct(names: list[str]) -> list[str]:
    """Names that occur more than once get their place in the run."""
    often = Counter(names)
    return [name if often[name] == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


class _Artifact:
    """The progress artifact of one image; losing Prefect must not stop the work."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._id = _shown(
            create_progress_artifact, progress=0.0, key=_key(name), description=f"{name}: probe"
        )
        self._tell = throttled(self._update, ARTIFACT_EVERY_S)

    def __call__(self, event: Event) -> None:
        if event.total and self._id is not None:
            self._tell(event)

    def _update(self, event: Event) -> None:
        text = f"{self._name}: {event.stage} {event.done}/{event.total}, {event.failed} failed"
        percent = 100.0 * event.done / event.total
        _shown(update_progress_artifact, self._id, progress=percent, description=text)


_ARTIFACT: ContextVar[_Artifact | None] = ContextVar("artifact", default=None)
"""Of the image whose task runs in this thread."""


def _shown(call: Callable[..., object], *args: object, **values: object) -> UUID | None:
    """What an artifact call answers; None, and a warning, where Prefect could not be reached."""
    try:
        return cast(UUID, call(*args, **values))
    except Exception as error:  # whatever the API client raises when the server is gone
        log.warning("not shown in Prefect: %s", error)
        return None


def _publish(report: RunReport) -> None:
    rows = [
        {
            "image": Path(image.image).name,
            "status": image.status,
            "tiles": image.counts.planned if image.counts else 0,
            "failed": image.counts.failed if image.counts else 0,
            "seconds": round(image.seconds.get("all", 0.0), 1),
            "output": image.output,
        }
        for image in report.images
    ]
    description = f"{report.pool}, {report.seconds:.0f} s"
    _shown(create_table_artifact, key="explain-batch", table=rows, description=description)
    dead = [image for image in report.images if image.status in ("failed", "gaps")]
    if dead:
        lines = ["# Not complete", ""]
        for image in dead:
            lines.append(f"- **{Path(image.image).name}** ({image.status}): {image.error}")
            lines += [
                f"  - tile {f.tile} at {f.box.start} to {f.box.stop}: {f.reason}" for f in image.failures[:50]
            ]
            lines += [f"  - {line}" for line in image.failed_tasks[:50]]
        _shown(create_markdown_artifact, key="explain-dead-letter", markdown="\n".join(lines))


def _key(name: str) -> str:
    """An artifact key of lower-case letters, digits and dashes; names in other letters keep apart by digest."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"explain-{plain}" if name.isascii() and plain else f"explain-{plain}-{_short_digest(name)}"


def _short_digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
