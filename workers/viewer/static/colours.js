// Values to colours. One window for a whole map, never one a tile.

import { TABLES } from "./tables.js";

export const MAPS = {
    viridis: "Viridis", cividis: "Cividis", magma: "Magma", gray: "Greys", signed: "Blue–orange about 0",
};

const tables = new Map();
/** Colour table as 256 opaque pixels (Uint32, the byte order of canvas data). */
export function table(name) {
    if (!tables.has(name)) {
        const bytes = new Uint8ClampedArray(1024);
        for (let i = 0; i < 256; i++) {
            const colour = parseInt(TABLES[name].substr(6 * i, 6), 16);
            bytes.set([colour >> 16, (colour >> 8) & 255, colour & 255, 255], 4 * i);
        }
        tables.set(name, new Uint32Array(bytes.buffer));
    }
    return tables.get(name);
}

/** CSS colour of a share 0..1 of a table. */
export function cssColour(name, share) {
    const i = Math.round(255 * Math.min(1, Math.max(0, share)));
    return `#${TABLES[name].substr(6 * i, 6)}`;
}

/** What is drawn of a value: a look has `map`, `window` [lo, hi], `threshold` (or null), `signed`. */
export const hidden = (value, look) =>
    look.threshold !== null && (look.signed ? Math.abs(value) : value) < look.threshold;

/** Colour `values` (Float32Array) into `pixels` (Uint32Array): transparent where nobody looked or below the threshold. */
export function paint(values, pixels, look) {
    const colours = table(look.map);
    const [lo, hi] = look.window;
    const scale = 255 / (hi - lo);
    const least = look.threshold === null ? -Infinity : look.threshold;
    const signed = look.signed;
    for (let i = 0; i < values.length; i++) {
        const value = values[i];
        // NaN fails the comparison, too
        if (!((signed && value < 0 ? -value : value) >= least)) {
            pixels[i] = 0;
            continue;
        }
        const at = (value - lo) * scale + 0.5;
        pixels[i] = colours[at < 0 ? 0 : at > 255 ? 255 : at | 0];
    }
}
