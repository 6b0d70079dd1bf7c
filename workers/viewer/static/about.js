// What is known of a map, its run and its image, as rows.

import { grouped, scoreWords, sides } from "./format.js";
import { UNVERIFIED, channelOf, runOf, spacingOf } from "./looks.js";
import { facts } from "./panel.js";

/** Rows of the map that a look shows; `more` are rows of the image itself. */
export function about(image, look, more) {
    const run = runOf(image, look);
    const channel = channelOf(image, look);
    const { spacing_unit: unit, shape_l0: shape } = image.source;
    const spacing = spacingOf(image, look);
    const short = run.provenance_short ?? {};
    const px = shape.length === 2 ? "px" : "voxels";
    return facts([
        ["Method", [channel.title || channel.method, channel.edition].filter(Boolean).join(", ")],
        ["Note", channel.encoder_unverified ? UNVERIFIED : null],
        ["Native cell", channel.native_cell_l0 ? sides(channel.native_cell_l0.map((n, i) => n * spacing[i]), unit) : null],
        ["Heatmap px", sides(run.grid.downsample.map((n, i) => n * spacing[i]), unit)],
        [run.auroc_of ? `AUROC, ${run.auroc_of}` : "AUROC", channel.auroc],
        ...(run.prediction ?? []).map((p) => [`Score, ${p.target}`, scoreWords(p)]),
        ["Tiles", run.counts ? `${run.counts.done} of ${run.counts.planned} done, ${run.counts.failed} failed` : null],
        ["Not complete", run.error],
        ["Model", short.model], ["Digest", short.digest?.slice(0, 16)], ["Precision", short.precision], ["Made", short.created],
        ["Image", `${[...shape].reverse().map(grouped).join(" × ")} ${px} of ${sides(spacing, unit)}`],
        ...more,
        ["Stored as", run.raw],
    ]);
}
