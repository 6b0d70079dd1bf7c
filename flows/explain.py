"""The main job as a Prefect flow: one task an image, small reports, no arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
from prefect.states import Completed, Failed  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.batch import One, explain_batch, list_images  # noqa: E402
from flows.progress import Event, throttled  # noqa: E402
from schemas.image import ImageRequest  # noqa: E402
from schemas.run import ExplainRequest, ImageReport, PoolSettings, RunReport  # noqa: E402

ARTIFACT_EVERY_S = 2.0


class NotComplete(Exception):
    """What a flow asked to be strict ends with; the report of the run goes along."""

    def __init__(self, report: RunReport) -> None:
        dead = sum(image.status not in ("complete", "duplicate") for image in report.images)
        super().__init__(
            f"--strict: {dead} of {len(report.images)} images are not complete; run.json says why"
        )
        self.report = report


@flow(name="explain", log_prints=False, validate_parameters=True)
def explain(request: ExplainRequest, pool: PoolSettings = PoolSettings()) -> RunReport:  # noqa: B008
    """Explain every image of `request`; one task and one progress artifact an image.

    One image's failure never ends the others; the flow fails only under `strict`.
    """
    logger = get_run_logger()
    settings, why = resolve_pool(pool, len(list_images(request)))
    logger.info("pool: %s", why)
    listeners: list[_Artifact] = []

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)
        if event.message:
            logger.info("%s: %s: %s", event.image, event.stage, event.message)

    in_flight = settings.images_in_flight if settings.kind == "ray" else 1
    report = explain_batch(request, settings, tell, each=partial(_as_tasks, in_flight, listeners))
    _publish(report)
    if request.strict and report.exit_code:
        raise NotComplete(report)
    return report


@flow(name="scan-inbox", validate_parameters=True)
def scan_inbox(inbox: str, model: str, out: str, done: str = "") -> RunReport | None:
    """Explain what lies in `inbox`; what was explained before is resumed or found complete.

    Parameters
    ----------
    done
        Folder that images are moved to once complete; empty leaves them where they are.
    """
    request = ExplainRequest(images=(inbox,), model=model, out=out)
    if not list_images(request):
        get_run_logger().info("%s: nothing to explain", inbox)
        return None
    report: RunReport = explain(request)
    if done:
        Path(done).mkdir(parents=True, exist_ok=True)
        for image in report.images:
            if image.status == "complete":
                os.replace(image.image, Path(done) / Path(image.image).name)
    return report


@flow(name="heartbeat")
def heartbeat() -> str:
    """Do nothing, through Prefect: an import alone does not show that flows run."""
    return "ran"


def _as_tasks(
    in_flight: int, listeners: list[_Artifact], images: Sequence[ImageRequest], one: One
) -> Iterable[tuple[int, ImageReport]]:
    """One Prefect task an image; the reports come back beside the states, not through them."""
    reports: dict[int, ImageReport] = {}

    @task(task_run_name="{name}", cache_policy=NO_CACHE, retries=0, persist_result=False)
    def explain_one_image(name: str, position: int) -> State[str]:
        image = images[position]
        listeners.append(_Artifact(Path(image.uri.partition("?")[0]).name))
        report = reports[position] = one(image)
        if report.status == "failed":
            return Failed(message=report.error)
        if report.status == "gaps":
            return Completed(name="CompletedWithGaps", message=report.error)
        return Completed(message=report.output or report.error)

    threads: ThreadPoolTaskRunner[State[str]] = ThreadPoolTaskRunner(max_workers=in_flight)
    with threads as runner:
        futures = [
            runner.submit(explain_one_image, {"name": Path(image.uri).name, "position": i})
            for i, image in enumerate(images)
        ]
        for position, (image, future) in enumerate(zip(images, futures, strict=True)):
            future.wait()
            report = reports.get(position)
            if report is None:
                message = future.state.message or f"{image.uri}: its task ended without a report"
                report = ImageReport(image=image.uri, status="failed", error=message)
            yield position, report


class _Artifact:
    """The progress artifact of one image; losing Prefect must not stop the work."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._id = cast(
            UUID, create_progress_artifact(progress=0.0, key=_key(name), description=f"{name}: probe")
        )
        self._tell = throttled(self._update, ARTIFACT_EVERY_S)

    def __call__(self, event: Event) -> None:
        if event.image == self._name and event.total:
            self._tell(event)

    def _update(self, event: Event) -> None:
        text = f"{event.image}: {event.stage} {event.done}/{event.total}, {event.failed} failed"
        try:
            update_progress_artifact(self._id, progress=100.0 * event.done / event.total, description=text)
        except Exception as error:  # whatever the API client raises when the server is gone
            get_run_logger().warning("progress of %s not shown: %s", event.image, error)


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
    create_table_artifact(
        key="explain-batch", table=rows, description=f"{report.pool}, {report.seconds:.0f} s"
    )
    dead = [image for image in report.images if image.status in ("failed", "gaps")]
    if dead:
        lines = ["# Not complete", ""]
        for image in dead:
            lines.append(f"- **{Path(image.image).name}** ({image.status}): {image.error}")
            lines += [
                f"  - tile {f.tile} at {f.box.start} to {f.box.stop}: {f.reason}" for f in image.failures[:50]
            ]
            lines += [f"  - {line}" for line in image.failed_tasks[:50]]
        create_markdown_artifact(key="explain-dead-letter", markdown="\n".join(lines))


def _key(name: str) -> str:
    """Artifact keys take lower-case letters, digits and dashes."""
    return "explain-" + "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
