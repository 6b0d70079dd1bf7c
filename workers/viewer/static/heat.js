// Heatmap tiles, kept as the float32 they come as: colouring never asks the server again.

import { reason } from "./api.js";

/** Tiles of one image, of all its maps, fetched in the order they are wanted in. */
export class Tiles {
    /** `loaded()` is called after each tile, `failed(message)` where one cannot be had. */
    constructor({ loaded, failed, bytes = 400e6, parallel = 4 }) {
        Object.assign(this, { loaded, failed, bytes, parallel });
        this.tiles = new Map(); // address -> tile, least recently used first
        this.size = 0;
        this.wanted = new Map(); // who -> [{url, h, w}]
        this.flying = new Map(); // address -> AbortController
        this.refused = new Map(); // address -> time after which it may be asked again
    }

    get(url) {
        const tile = this.tiles.get(url);
        if (tile) {
            this.tiles.delete(url);
            this.tiles.set(url, tile);
        }
        return tile;
    }

    /** Replace what `who` wants; what nobody wants any more is no longer fetched. */
    want(who, list) {
        this.wanted.set(who, list);
        const urls = new Set([...this.wanted.values()].flat().map((tile) => tile.url));
        for (const [url, flight] of this.flying) if (!urls.has(url)) flight.abort();
        this.#fill();
    }

    /** Tiles that had places not computed yet are fetched again when wanted next; till then they stay as they are. */
    expire() {
        for (const tile of this.tiles.values()) if (tile.codes & 1) tile.stale = true;
        this.refused.clear();
        this.#fill();
    }

    /** Whether all that is wanted is here. */
    get settled() {
        return !this.flying.size && this.#next() === undefined;
    }

    #next() {
        const now = performance.now();
        const lists = [...this.wanted.values()];
        const longest = Math.max(0, ...lists.map((list) => list.length));
        for (let i = 0; i < longest; i++) {
            for (const list of lists) {
                const tile = list[i];
                if (!tile || this.flying.has(tile.url) || this.refused.get(tile.url) > now) continue;
                const have = this.tiles.get(tile.url);
                if (!have || have.stale) return tile;
            }
        }
        return undefined;
    }

    #fill() {
        while (this.flying.size < this.parallel) {
            const tile = this.#next();
            if (!tile) return;
            this.#fetch(tile);
        }
    }

    async #fetch({ url, h, w }) {
        const flight = new AbortController();
        this.flying.set(url, flight);
        try {
            const response = await fetch(url, { signal: flight.signal });
            if (!response.ok) throw new Error(await reason(response));
            const data = await response.arrayBuffer();
            if (data.byteLength !== 5 * h * w) throw new Error(`${data.byteLength} bytes, expected ${5 * h * w}`);
            this.#keep(url, new Float32Array(data, 0, h * w), new Uint8Array(data, 4 * h * w), h, w);
        } catch (error) {
            if (error.name !== "AbortError") {
                this.refused.set(url, performance.now() + 3000);
                setTimeout(() => this.#fill(), 3100);
                this.failed(`A heatmap tile could not be read: ${error.message}`);
            }
        }
        this.flying.delete(url);
        this.#fill();
        this.loaded();
    }

    #keep(url, values, coverage, h, w) {
        let codes = 0;
        for (const code of coverage) codes |= 1 << code;
        const old = this.tiles.get(url);
        if (old) this.size -= 5 * old.h * old.w;
        this.tiles.delete(url);
        this.tiles.set(url, { url, values, coverage, codes, h, w, stale: false });
        this.size += 5 * h * w;
        for (const [other, tile] of this.tiles) {
            if (this.size <= this.bytes) break;
            this.tiles.delete(other);
            this.size -= 5 * tile.h * tile.w;
        }
    }
}

/** One map as a pyramid: its geometry in level-0 px, and the addresses of its tiles. */
export class Pyramid {
    constructor({ grid, urlOf }) {
        this.downsample = grid.downsample;
        this.levels = grid.levels;
        this.tile = grid.tile;
        this.shapeL0 = grid.shape_l0;
        this.spacing = grid.spacing;
        this.urlOf = urlOf;
    }

    /** The finest level whose px is not smaller than a picture's of `l0` level-0 px: none falls between two. */
    levelFor(l0) {
        const finest = this.levels.findIndex((_, n) => Math.min(...this.downsample) * 2 ** n >= l0 * (1 - 1e-9));
        return finest < 0 ? this.levels.length - 1 : finest;
    }

    /** Level-0 px (y, x) a px of a level. */
    pixel(level) {
        return this.downsample.map((d) => d * 2 ** level);
    }

    /** Tiles of a level that a level-0 box [y0, x0, y1, x1] touches, nearest to its centre first. */
    tilesIn(level, [y0, x0, y1, x1]) {
        const [dy, dx] = this.pixel(level);
        const [h, w] = this.levels[level];
        const { tile } = this;
        const first = (at, d) => Math.max(0, Math.floor(at / (d * tile)));
        const last = (at, d, n) => Math.min(Math.ceil(n / tile), Math.ceil(at / (d * tile)));
        const list = [];
        for (let y = first(y0, dy); y < last(y1, dy, h); y++) {
            for (let x = first(x0, dx); x < last(x1, dx, w); x++) {
                const far = Math.hypot((y + 0.5) * dy * tile - (y0 + y1) / 2, (x + 0.5) * dx * tile - (x0 + x1) / 2);
                list.push({
                    y, x, far, level, url: this.urlOf(level, y, x),
                    h: Math.min(tile, h - y * tile), w: Math.min(tile, w - x * tile),
                });
            }
        }
        return list.sort((a, b) => a.far - b.far);
    }
}
