// Heat of a volume: NIfTI through NiiVue, coloured here, so that volumes and slides are coloured by the same rules.

import { paint } from "./colours.js";
import { FAILED } from "./format.js";

const RGBA32 = 2304;
/** Stripes of what has no value since it failed, as on slides: dark on light (little-endian RGBA). */
const STRIPES = [0xff191919, 0xffc4c4c4];
const PERIOD = 6;

export class VolumeHeat {
    /** Read a float32 NIfTI; its affine places it, whatever its axes. `coverageUrl`: of the codes, where something failed. */
    static async load(url, name, coverageUrl = null) {
        const read = (from, suffix) => window.niivue.NVImage.loadFromUrl({ url: from, name: `${name}${suffix}.nii.gz`, colormap: "gray" });
        const [image, coverage] = await Promise.all([read(url, ""), coverageUrl && read(coverageUrl, "-coverage")]);
        if (!(image.img instanceof Float32Array)) throw new Error(`${name}: heat is not float32`);
        return new VolumeHeat(image, coverage?.img ?? null);
    }

    constructor(image, codes) {
        this.image = image;
        this.codes = codes;
        const { scl_slope: slope, scl_inter: inter, dims, affine } = image.hdr;
        this.values = image.img;
        if (slope && (slope !== 1 || inter)) this.values = this.values.map((value) => value * slope + inter);
        this.dims = dims.slice(1, 4);
        this.affine = affine;
        this.pixels = new Uint32Array(this.values.length);
        image.hdr.datatypeCode = RGBA32;
        image.hdr.numBitsPerVoxel = 32;
        image.img = new Uint8Array(this.pixels.buffer);
    }

    /** Colour all voxels; `look` as for slides. */
    paint(look) {
        paint(this.values, this.pixels, look);
        if (this.codes) this.#stripe();
        this.image.opacity = look.shown ? look.opacity : 0;
    }

    #stripe() {
        const [w, h] = this.dims;
        for (let i = 0; i < this.codes.length; i++) {
            if (this.codes[i] !== FAILED) continue;
            const sum = (i % w) + (Math.floor(i / w) % h) + Math.floor(i / (w * h));
            this.pixels[i] = STRIPES[sum % PERIOD < PERIOD / 3 ? 0 : 1];
        }
    }

    /** Stored voxel (i, j, k) that holds a point in mm, or null outside. */
    voxel(mm) {
        const voxel = solve(this.affine, mm).map(Math.round);
        return voxel.every((v, axis) => v >= 0 && v < this.dims[axis]) ? voxel : null;
    }

    /** Value at a point in mm; NaN where nobody looked. */
    at(mm) {
        const index = this.#index(mm);
        return index === null ? NaN : this.values[index];
    }

    /** Whether the tile over a point in mm failed. */
    failedAt(mm) {
        const index = this.#index(mm);
        return index !== null && this.codes?.[index] === FAILED;
    }

    #index(mm) {
        const voxel = this.voxel(mm);
        return voxel && voxel[0] + this.dims[0] * (voxel[1] + this.dims[1] * voxel[2]);
    }

    /** Centre in mm of the voxel of largest magnitude, or null where nothing was evaluated. */
    strongest() {
        let best = -1;
        for (let i = 0; i < this.values.length; i++) {
            if (Math.abs(this.values[i]) > (best < 0 ? -1 : Math.abs(this.values[best]))) best = i;
        }
        if (best < 0) return null;
        const [w, h] = this.dims;
        const voxel = [best % w, Math.floor(best / w) % h, Math.floor(best / (w * h)), 1];
        return [0, 1, 2].map((axis) => this.affine[axis].reduce((sum, a, i) => sum + a * voxel[i], 0));
    }

    range() {
        let [lo, hi] = [Infinity, -Infinity];
        for (const value of this.values) {
            if (value < lo) lo = value;
            if (value > hi) hi = value;
        }
        return lo <= hi ? [lo, hi] : null;
    }
}

/** Voxel coordinates of a point in mm: the affine's inverse by Cramer's rule. */
function solve(affine, mm) {
    const column = (axis) => affine.slice(0, 3).map((line) => line[axis]);
    const [a, b, c, t] = [0, 1, 2, 3].map(column);
    const d = mm.slice(0, 3).map((value, axis) => value - t[axis]);
    const det = (p, q, r) =>
        p[0] * (q[1] * r[2] - q[2] * r[1]) - p[1] * (q[0] * r[2] - q[2] * r[0]) + p[2] * (q[0] * r[1] - q[1] * r[0]);
    const whole = det(a, b, c);
    return [det(d, b, c) / whole, det(a, d, c) / whole, det(a, b, d) / whole];
}
