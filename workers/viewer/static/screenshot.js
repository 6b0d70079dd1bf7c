// A picture of what is seen, with all one needs to read it burned in.

import { INTENDED_USE } from "./format.js";
import { SCALE_HEIGHT, drawLegend, drawScale } from "./furniture.js";

const HEAD = 30, FOOT = 26, GAP = 2;
const FONT = "system-ui, 'Segoe UI', Roboto, Arial, sans-serif";

/** PNG blob; `parts`: `[{width, height, canvases: [{canvas, opacity}], legend, bar}]` side by side, sizes in CSS px. */
export function picture({ title, subtitle, parts }) {
    const ratio = window.devicePixelRatio || 1;
    const width = parts.reduce((sum, part) => sum + part.width, GAP * (parts.length - 1));
    const height = Math.max(...parts.map((part) => part.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round((height + HEAD + FOOT) * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#1d2024";
    context.fillRect(0, 0, width, height + HEAD + FOOT);
    context.fillStyle = "#f2f4f6";
    context.font = `600 14px ${FONT}`;
    context.fillText(title, 10, 20, width * 0.45);
    context.font = `12px ${FONT}`;
    context.fillStyle = "#c9ced4";
    context.textAlign = "right";
    context.fillText(subtitle, width - 10, 20, width * 0.5);
    context.textAlign = "left";
    let x = 0;
    for (const part of parts) {
        context.save();
        context.beginPath();
        context.rect(x, HEAD, part.width, part.height);
        context.clip();
        context.fillStyle = part.ground ?? "#2b2f34";
        context.fillRect(x, HEAD, part.width, part.height);
        for (const { canvas: layer, opacity } of part.canvases) {
            context.globalAlpha = opacity;
            context.drawImage(layer, x, HEAD, part.width, part.height);
        }
        context.globalAlpha = 1;
        const bottom = HEAD + part.height - 10;
        if (part.bar) drawScale(context, part.bar, x + 10, bottom - SCALE_HEIGHT);
        if (part.legend) {
            const tall = drawLegend(context, part.legend, 0, 0, { dry: true });
            drawLegend(context, part.legend, x + 10, bottom - (part.bar ? SCALE_HEIGHT + 8 : 0) - tall);
        }
        context.restore();
        x += part.width + GAP;
    }
    context.fillStyle = "#f0c674";
    context.font = `600 13px ${FONT}`;
    context.fillText(INTENDED_USE, 10, HEAD + height + 18);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
