// Legend and scale bar, drawn on canvases: the same code draws them on the page and into a screenshot.

import { cssColour, hidden } from "./colours.js";
import { commonPower, length, niceLength, number, tenTo, unitWords } from "./format.js";
import { hatch } from "./layer.js";

const FONT = "12px system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
const SMALL = FONT.replace("12px", "11px");
export const LEGEND_WIDTH = 264;
const PAD = 10, LINE = 15, BAR = 12;

/** Everything one has to know to read the heat: `{title, lines, look, unit, ends, swatches}`. */
export function legendText(legend) {
    const [lo, hi] = legend.look.window;
    return [
        legend.title, ...legend.lines, `colours from ${number(lo)} to ${number(hi)} (${unitWords(legend.unit)})`,
        ...legend.swatches.map((swatch) => swatch.text),
    ].join("; ");
}

function wrapped(context, text, width) {
    const lines = [];
    let line = "";
    for (const word of text.split(" ")) {
        const longer = line ? `${line} ${word}` : word;
        if (line && context.measureText(longer).width > width) {
            lines.push(line);
            line = word;
        } else line = longer;
    }
    return [...lines, line];
}

/** Draw the legend at (x, y), or only measure it where `dry`; gives its height. */
export function drawLegend(context, legend, x, y, { dry = false } = {}) {
    const inner = LEGEND_WIDTH - 2 * PAD;
    context.save();
    context.textBaseline = "alphabetic";
    context.font = `600 ${FONT}`;
    const title = wrapped(context, legend.title, inner);
    context.font = SMALL;
    const lines = legend.lines.flatMap((line) => wrapped(context, line, inner));
    const swatches = legend.swatches.map((swatch) => ({ ...swatch, lines: wrapped(context, swatch.text, inner - 24) }));
    const height = 2 * PAD + (title.length + lines.length) * LINE + BAR + LINE + 10
        + swatches.reduce((sum, swatch) => sum + swatch.lines.length * LINE + 2, 0);
    if (dry) {
        context.restore();
        return height;
    }
    context.fillStyle = "rgba(24, 27, 31, 0.9)";
    context.beginPath();
    context.roundRect(x, y, LEGEND_WIDTH, height, 4);
    context.fill();
    const left = x + PAD;
    let row = y + PAD + 10;
    context.fillStyle = "#f2f4f6";
    context.font = `600 ${FONT}`;
    for (const text of title) {
        context.fillText(text, left, row);
        row += LINE;
    }
    row += 2;
    drawBar(context, legend, left, row - 8, inner);
    row += BAR + LINE - 2;
    drawTicks(context, legend, left, row - 2, inner);
    row += LINE + 2;
    context.font = SMALL;
    context.fillStyle = "#c9ced4";
    for (const text of lines) {
        context.fillText(text, left, row);
        row += LINE;
    }
    for (const swatch of swatches) {
        row += 2;
        context.fillStyle = "#e9e4ea";
        context.fillRect(left, row - 10, 18, 12);
        context.fillStyle = swatch.hatch ? hatch(context, swatch.hatch, 1, left, row - 10) : swatch.colour ?? "#e9e4ea";
        context.fillRect(left, row - 10, 18, 12);
        context.strokeStyle = "#8a9199";
        context.strokeRect(left + 0.5, row - 9.5, 17, 11);
        context.fillStyle = "#c9ced4";
        for (const text of swatch.lines) {
            context.fillText(text, left + 24, row);
            row += LINE;
        }
    }
    context.restore();
    return height;
}

/** The colour bar on the tissue's paper, at the opacity the heat has: it looks as the heat does. */
function drawBar(context, { look }, x, y, width) {
    const [lo, hi] = look.window;
    context.fillStyle = "#f0edf1";
    context.fillRect(x, y, width, BAR);
    for (let i = 0; i < width; i++) {
        const share = (i + 0.5) / width;
        if (hidden(lo + share * (hi - lo), look)) continue;
        context.globalAlpha = look.opacity;
        context.fillStyle = cssColour(look.map, share);
        context.fillRect(x + i, y, 1, BAR);
    }
    context.globalAlpha = 1;
    context.strokeStyle = "#8a9199";
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, BAR - 1);
    const marks = look.threshold === null ? [] : look.signed ? [-look.threshold, look.threshold] : [look.threshold];
    context.fillStyle = "#ffffff";
    for (const mark of marks) {
        const at = x + ((mark - lo) / (hi - lo)) * width;
        if (at >= x && at <= x + width) context.fillRect(Math.round(at) - 0.5, y - 3, 1.5, BAR + 6);
    }
}

function drawTicks(context, { look, unit, ends }, x, y, width) {
    const power = commonPower(look.window);
    const [lo, hi] = look.window.map((value) => number(value / 10 ** power));
    context.font = SMALL;
    context.fillStyle = "#f2f4f6";
    context.textAlign = "left";
    context.fillText(`${ends[0] ? "≤ " : ""}${lo}`, x, y);
    context.textAlign = "right";
    context.fillText(`${ends[1] ? "≥ " : ""}${hi}`, x + width, y);
    context.textAlign = "center";
    context.fillStyle = "#c9ced4";
    context.fillText(power ? `${unitWords(unit)}, × ${tenTo(power)}` : unitWords(unit), x + width / 2, y);
    context.textAlign = "left";
}

/** The longest round length that fits `most` px: `{px, text}`; `size` is that of a screen px, in `unit`. */
export function scaleBar(size, unit, most) {
    const um = unit === "mm" ? size * 1000 : size;
    const long = niceLength(um * most);
    return { px: long / um, text: length(long, "um") };
}

export const SCALE_HEIGHT = 30;
/** Draw a scale bar whose box starts at (x, y). */
export function drawScale(context, { px, text }, x, y) {
    context.save();
    context.fillStyle = "rgba(24, 27, 31, 0.9)";
    context.beginPath();
    context.roundRect(x, y, px + 20, SCALE_HEIGHT, 4);
    context.fill();
    context.fillStyle = "#f2f4f6";
    context.fillRect(x + 10, y + 20, px, 3);
    context.fillRect(x + 10, y + 16, 1.5, 7);
    context.fillRect(x + 10 + px - 1.5, y + 16, 1.5, 7);
    context.font = SMALL;
    context.textAlign = "center";
    context.fillText(text, x + 10 + px / 2, y + 13);
    context.restore();
}
