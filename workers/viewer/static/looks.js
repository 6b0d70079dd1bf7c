// From what is asked of a map to how it is drawn, and what the legend says of it.

import { MAPS } from "./colours.js";
import { number, sides } from "./format.js";

/** Runs that have a map to show. */
export const mapped = (image) => image.runs.filter((run) => run.grid && run.channels?.length);
export const runOf = (image, look) => mapped(image).find((run) => run.run === look.run) ?? mapped(image)[0];
export const channelOf = (image, look) => runOf(image, look).channels[look.channel] ?? runOf(image, look).channels[0];
/** Size of a level-0 px as the run of a look was told it: runs of one image may differ. */
export const spacingOf = (image, look) => runOf(image, look).grid.spacing;

export const UNVERIFIED = "Encoder unverified: features alone, their slide was not there";

const proper = (range) => Array.isArray(range) && range.length === 2 && range[0] < range[1];
const aboutZero = ([lo, hi]) => {
    const most = Math.max(Math.abs(lo), Math.abs(hi)) || 1;
    return [-most, most];
};

/** Published window, full range, and the range the sliders have; `seen` stands in while nothing is published. */
export function windows(channel, seen) {
    const range = proper(channel.value_range) ? channel.value_range : seen && seen[0] < seen[1] ? seen : [0, seen?.[1] || 1];
    const full = channel.signed ? aboutZero(range) : [Math.min(0, range[0]), range[1]];
    const published = proper(channel.display) ? channel.display : null;
    return { published, full, start: published ?? full };
}

/** A look with everything decided. */
export function decided(look, channel, seen, hatch = false) {
    const { start } = windows(channel, seen);
    return {
        ...look,
        hatch,
        signed: channel.signed,
        map: MAPS[look.map] ? look.map : channel.signed ? "signed" : "viridis",
        window: proper(look.window) ? look.window : start,
        chosen: proper(look.window),
    };
}

/** What the legend of a look says, for `furniture.drawLegend`. */
export function legendOf(image, look, channel, { hatch, volume = false }) {
    const run = runOf(image, look);
    const { published, full } = windows(channel, look.window);
    const spacing = spacingOf(image, look);
    const unit = image.source.spacing_unit;
    const kind = volume ? "volume" : "slide";
    const lines = [`Target: ${channel.target_index === null ? `${channel.target} (the class predicted)` : channel.target}`];
    if (image.runs.length > 1) lines.push(`Run: ${run.label}`);
    if (channel.signed && look.map === "signed") lines.push("Orange speaks for the target, blue against");
    const same = published && published[0] === look.window[0] && published[1] === look.window[1];
    if (same) lines.push(`One window a ${kind}: 99.5 % of ${channel.signed ? "|value|" : "values"}`);
    else lines.push(`One window a ${kind}: ${look.chosen ? "set by hand" : "what is computed so far"}`);
    if (channel.value_range) lines.push(`All values: ${number(channel.value_range[0])} to ${number(channel.value_range[1])}`);
    if (!volume) {
        lines.push(look.pyramid === "peak"
            ? "Zoomed out: largest magnitude" : "Zoomed out: mean");
    }
    if (channel.encoder_unverified) lines.push(UNVERIFIED);
    const cell = channel.native_cell_l0;
    if (channel.bag_method) lines.push("One value a tile, painted over it");
    else if (cell) lines.push(`CAM cell ${sides(cell.map((n, i) => n * spacing[i]), unit)}; finer is interpolated`);
    const swatches = [];
    if (look.threshold !== null) {
        swatches.push({ text: `${channel.signed ? "|value|" : "value"} below ${number(look.threshold)}: not coloured` });
    }
    const failed = Boolean(run.progress?.failed);
    if (hatch) swatches.push({ hatch: "unevaluated", text: "not evaluated" });
    else swatches.push({ text: "not evaluated: no colour" });
    if (failed) swatches.push({ hatch: "failed", text: "failed: no value" });
    if (!run.complete && !volume) swatches.push({ hatch: "pending", text: "not computed yet" });
    const [lo, hi] = look.window;
    const ends = [full[0] < lo - 1e-6 * (hi - lo), full[1] > hi + 1e-6 * (hi - lo)]; // values beyond the window
    return { title: channel.title ? `${channel.title}` : channel.label, lines, look, unit: channel.unit, ends, swatches };
}
