// Heat over a slide: one canvas for values, one for places without any, laid over OpenSeadragon's own.
//
// Drawn here and not as tiles of OpenSeadragon's, because its canvas drawer stretches tiles without overlap by a px, leaves
// seams between tiles that let light through, and smooths either all images or none.

import { paint } from "./colours.js";
import { BACKGROUND, FAILED, LEFT_OUT, PENDING } from "./format.js";

const bits = (...codes) => codes.reduce((sum, code) => sum | (1 << code), 0);
export const HATCHES = {
    failed: { codes: bits(FAILED), period: 9, line: 2.2, colour: "rgba(25,25,25,0.95)", ground: "rgba(196,196,196,0.85)" },
    pending: { codes: bits(PENDING), period: 10, line: 1, colour: "rgba(60,95,150,0.55)", ground: "rgba(190,208,235,0.35)" },
    unevaluated: { codes: bits(BACKGROUND, LEFT_OUT), period: 14, line: 1, colour: "rgba(70,80,90,0.42)", ground: "" },
};

/** Diagonal stripes as a canvas pattern; lines of `failed` fall, the others rise. */
export function hatch(context, kind, ratio = 1, x = 0, y = 0) {
    const { period, line, colour, ground } = HATCHES[kind];
    const size = Math.round(period * ratio);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const brush = canvas.getContext("2d");
    if (ground) {
        brush.fillStyle = ground;
        brush.fillRect(0, 0, size, size);
    }
    brush.strokeStyle = colour;
    brush.lineWidth = line * ratio;
    const down = kind === "failed" ? 1 : -1;
    const corner = down > 0 ? 0 : size;
    for (const shift of [-size, 0, size]) {
        brush.beginPath();
        brush.moveTo(shift - size, corner - down * size);
        brush.lineTo(shift + 2 * size, corner + down * 2 * size);
        brush.stroke();
    }
    const pattern = context.createPattern(canvas, "repeat");
    pattern.setTransform(new DOMMatrix([1, 0, 0, 1, x % size, y % size]));
    return pattern;
}

export class HeatLayer {
    /** `width` is the slide's at level 0: OpenSeadragon's unit of length. */
    constructor(viewer, tiles, width) {
        Object.assign(this, { viewer, tiles, width, pyramid: null, look: null, level: 0, masks: new WeakMap() });
        this.coloured = new WeakMap(); // tile -> {canvas, look}
        this.heat = layerCanvas(viewer, "heat");
        this.status = layerCanvas(viewer, "status");
        this.scratch = document.createElement("canvas");
        viewer.addHandler("update-viewport", () => this.draw());
        viewer.addHandler("resize", () => this.request());
    }

    /** Show another pyramid (or null: none). */
    setMap(pyramid) {
        this.pyramid = pyramid;
        this.request();
    }

    /** `{map, window, threshold, signed, opacity, smooth, shown, hatch}`; nothing is fetched. */
    setLook(look) {
        const painted = (l) => l && JSON.stringify([l.map, l.window, l.threshold, l.signed]);
        if (painted(look) !== painted(this.look)) this.paints = {};
        this.look = look;
        this.heat.style.opacity = look.opacity;
        this.heat.hidden = this.status.hidden = !look.shown;
        this.request();
    }

    /** Draw at the next frame. */
    request() {
        this.frame ??= requestAnimationFrame(() => {
            this.frame = undefined;
            this.draw();
        });
    }

    destroy() {
        cancelAnimationFrame(this.frame);
        this.tiles.want(this, []);
        this.pyramid = null;
    }

    /** Where level-0 px are on the canvas: px = at + scale * l0, the same that OpenSeadragon draws the slide by. */
    place() {
        const { Point, pixelDensityRatio } = window.OpenSeadragon;
        const origin = this.viewer.viewport.pixelFromPoint(new Point(0, 0), true);
        const end = this.viewer.viewport.pixelFromPoint(new Point(1, 0), true);
        return {
            x: origin.x * pixelDensityRatio,
            y: origin.y * pixelDensityRatio,
            scale: ((end.x - origin.x) * pixelDensityRatio) / this.width,
        };
    }

    draw() {
        if (!this.viewer.drawer || !this.viewer.world.getItemCount()) return;
        const { width, height } = this.viewer.drawer.canvas;
        for (const canvas of [this.heat, this.status]) {
            if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
            canvas.getContext("2d").clearRect(0, 0, width, height);
        }
        if (!this.pyramid || !this.look || !this.look.shown || !width) return;
        const place = this.place();
        const [h, w] = this.pyramid.shapeL0;
        const box = [
            Math.max(0, -place.y / place.scale), Math.max(0, -place.x / place.scale),
            Math.min(h, (height - place.y) / place.scale), Math.min(w, (width - place.x) / place.scale),
        ];
        this.level = this.pyramid.levelFor(1 / place.scale);
        const coarsest = this.pyramid.levels.length - 1;
        const visible = box[2] > box[0] && box[3] > box[1] ? this.pyramid.tilesIn(this.level, box) : [];
        this.tiles.want(this, [...this.pyramid.tilesIn(coarsest, [0, 0, h, w]), ...visible]);
        this.#drawTiles(visible, box, place);
    }

    #drawTiles(visible, box, place) {
        const context = this.heat.getContext("2d");
        context.imageSmoothingEnabled = this.look.smooth;
        const drawn = [];
        for (const { y, x } of visible) {
            for (let level = this.level; level < this.pyramid.levels.length; level++) {
                const up = level - this.level;
                const tile = this.tiles.get(this.pyramid.urlOf(level, y >> up, x >> up));
                if (!tile) continue;
                const [dy, dx] = this.pyramid.pixel(this.level).map((d) => d * this.pyramid.tile);
                const part = [
                    Math.max(box[0], y * dy), Math.max(box[1], x * dx),
                    Math.min(box[2], (y + 1) * dy), Math.min(box[3], (x + 1) * dx),
                ];
                const at = this.#rectangles(tile, level, y >> up, x >> up, part, place);
                if (tile.codes & 2) context.drawImage(this.#colouredTile(tile), ...at);
                drawn.push([tile, at]);
                break;
            }
        }
        for (const kind of ["pending", "unevaluated", "failed"]) {
            if (kind !== "unevaluated" || this.look.hatch) this.#drawHatch(kind, drawn, place);
        }
    }

    /** Source and target rectangle of the px of a tile that a level-0 part touches; edges are shared with the neighbours'. */
    #rectangles(tile, level, ty, tx, [y0, x0, y1, x1], place) {
        const [dy, dx] = this.pyramid.pixel(level);
        const size = this.pyramid.tile;
        const cut = (from, to, d, first, n) => [
            Math.max(0, Math.floor(from / d) - first), Math.min(n, Math.ceil(to / d) - first),
        ];
        const [sy0, sy1] = cut(y0, y1, dy, ty * size, tile.h);
        const [sx0, sx1] = cut(x0, x1, dx, tx * size, tile.w);
        const onX = (px) => Math.round(place.x + place.scale * (tx * size + px) * dx);
        const onY = (px) => Math.round(place.y + place.scale * (ty * size + px) * dy);
        return [sx0, sy0, sx1 - sx0, sy1 - sy0, onX(sx0), onY(sy0), onX(sx1) - onX(sx0), onY(sy1) - onY(sy0)];
    }

    #colouredTile(tile) {
        const have = this.coloured.get(tile);
        if (have?.paints === this.paints) return have.canvas;
        const canvas = have?.canvas ?? Object.assign(document.createElement("canvas"), { width: tile.w, height: tile.h });
        const context = canvas.getContext("2d");
        const image = context.createImageData(tile.w, tile.h);
        paint(tile.values, new Uint32Array(image.data.buffer), this.look);
        context.putImageData(image, 0, 0);
        this.coloured.set(tile, { canvas, paints: this.paints });
        return canvas;
    }

    #drawHatch(kind, drawn, place) {
        const { codes } = HATCHES[kind];
        const concerned = drawn.filter(([tile]) => tile.codes & codes);
        if (!concerned.length) return;
        const { width, height } = this.status;
        Object.assign(this.scratch, { width, height });
        const scratch = this.scratch.getContext("2d");
        scratch.imageSmoothingEnabled = false;
        for (const [tile, at] of concerned) scratch.drawImage(this.#mask(tile, kind), ...at);
        scratch.globalCompositeOperation = "source-in";
        scratch.fillStyle = hatch(scratch, kind, window.OpenSeadragon.pixelDensityRatio, place.x, place.y);
        scratch.fillRect(0, 0, width, height);
        this.status.getContext("2d").drawImage(this.scratch, 0, 0);
    }

    #mask(tile, kind) {
        const masks = this.masks.get(tile) ?? {};
        this.masks.set(tile, masks);
        if (masks[kind]) return masks[kind];
        const canvas = Object.assign(document.createElement("canvas"), { width: tile.w, height: tile.h });
        const context = canvas.getContext("2d");
        const image = context.createImageData(tile.w, tile.h);
        const pixels = new Uint32Array(image.data.buffer);
        const { codes } = HATCHES[kind];
        for (let i = 0; i < pixels.length; i++) if ((1 << tile.coverage[i]) & codes) pixels[i] = 0xff000000;
        context.putImageData(image, 0, 0);
        masks[kind] = canvas;
        return canvas;
    }

    /** What is drawn at a level-0 point: `{value, code, level}`, or null where no tile has come yet. */
    at(y, x) {
        if (!this.pyramid) return null;
        const [h, w] = this.pyramid.shapeL0;
        if (y < 0 || x < 0 || y >= h || x >= w) return null;
        for (let level = this.level; level < this.pyramid.levels.length; level++) {
            const [dy, dx] = this.pyramid.pixel(level);
            const [row, column] = [Math.floor(y / dy), Math.floor(x / dx)];
            const size = this.pyramid.tile;
            const [ty, tx] = [Math.floor(row / size), Math.floor(column / size)];
            const tile = this.tiles.get(this.pyramid.urlOf(level, ty, tx));
            if (!tile) continue;
            const index = (row - ty * size) * tile.w + column - tx * size;
            return { value: tile.values[index], code: tile.coverage[index], level };
        }
        return null;
    }

    /** Smallest and largest value of the coarsest level, or null: what a map without a published window is shown by. */
    seenRange() {
        const [h, w] = this.pyramid.shapeL0;
        let [lo, hi] = [Infinity, -Infinity];
        for (const { url } of this.pyramid.tilesIn(this.pyramid.levels.length - 1, [0, 0, h, w])) {
            for (const value of this.tiles.get(url)?.values ?? []) {
                if (value < lo) lo = value;
                if (value > hi) hi = value;
            }
        }
        return lo <= hi ? [lo, hi] : null;
    }
}

function layerCanvas(viewer, name) {
    const canvas = document.createElement("canvas");
    canvas.className = `layer ${name}`;
    viewer.canvas.append(canvas);
    return canvas;
}
