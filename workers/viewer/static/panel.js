// The controls of one map. They change the look they are given and say so; nothing here fetches or draws.

import { MAPS } from "./colours.js";
import { el } from "./dom.js";
import { number } from "./format.js";
import { channelOf, decided, mapped, runOf, windows } from "./looks.js";

let ids = 0;
/** A labelled control on one row. */
export function row(text, control, ...more) {
    control.id ||= `control-${++ids}`;
    return el("div", { className: "row" }, el("label", { htmlFor: control.id, textContent: text }), control, ...more);
}
export const section = (title, ...children) =>
    el("section", {}, title ? el("h2", { textContent: title }) : null, ...children);

function fill(select, options, value) {
    const key = JSON.stringify(options);
    if (select.dataset.options !== key) {
        select.replaceChildren(...options.map(([v, text]) => el("option", { value: v, textContent: text })));
        select.dataset.options = key;
    }
    select.value = String(value);
    select.disabled = options.length < 2;
}

const rounded = (value) => Number(value.toPrecision(4));

export class MapPanel {
    /** `changed(look)` after each change; `image()` gives the image, `seen(look)` the range computed so far. */
    constructor({ image, seen, changed, volume = false }) {
        Object.assign(this, { image, seen, changed });
        this.run = el("select", { title: "Run (output folder)" });
        this.method = el("select", { title: "Method (m, M: next, previous map)" });
        this.target = el("select", { title: "Target class" });
        this.shown = el("input", { type: "checkbox", title: "Show heat (h; hold space to look below)" });
        this.opacity = el("input", { type: "range", min: 0, max: 1, step: 0.01, title: "Opacity ([ and ])" });
        this.opacityText = el("output", { className: "number" });
        this.map = el("select", { title: "Colour map (c)" });
        this.low = el("input", { type: "number", step: "any", attrs: { "aria-label": "Window from" } });
        this.high = el("input", { type: "number", step: "any", attrs: { "aria-label": "Window to" } });
        this.lowRange = el("input", { type: "range", attrs: { "aria-label": "Window from" } });
        this.highRange = el("input", { type: "range", attrs: { "aria-label": "Window to" } });
        this.published = el("button", { textContent: "Published", title: "The window the run was published with, one for the whole image (w)" });
        this.full = el("button", { textContent: "Full range", title: "From the smallest to the largest value (W)" });
        this.threshold = el("input", { type: "range", title: "Below: transparent", attrs: { "aria-label": "Threshold" } });
        this.thresholdText = el("input", { type: "number", step: "any", placeholder: "off", attrs: { "aria-label": "Threshold" } });
        this.noThreshold = el("button", { textContent: "Off", title: "No threshold (t)" });
        this.pyramid = el("select", { title: "What a px shows when zoomed out (p)" });
        this.smooth = el("input", { type: "checkbox", title: "Interpolate between heatmap pixels (s)" });
        this.reset = el("button", { textContent: "Reset display", title: "Colours, window, threshold and opacity as at first (r)" });
        this.element = el("div", { className: "map-panel" },
            section("Map", row("Run", this.run), row("Method", this.method), row("Target", this.target)),
            section("Heat",
                row("Show", this.shown),
                row("Opacity", this.opacity, this.opacityText),
                row("Colours", this.map),
                volume ? null : row("Pyramid", this.pyramid),
                row("Smooth", this.smooth)),
            section("Window",
                el("div", { className: "pair" }, this.low, el("span", { textContent: "to" }), this.high),
                this.lowRange, this.highRange,
                el("div", { className: "buttons" }, this.published, this.full)),
            section("Threshold",
                el("div", { className: "pair threshold" }, this.threshold, this.thresholdText, this.noThreshold)),
            el("div", { className: "buttons" }, this.reset));
        this.#listen();
    }

    #listen() {
        const on = (control, event, act) => control.addEventListener(event, () => {
            act(control);
            this.changed(this.look);
        });
        on(this.run, "change", () => Object.assign(this.look, { run: Number(this.run.value), channel: 0, ...NEW_SCALE }));
        on(this.method, "change", () => this.#choose(this.method.value, channelOf(this.image(), this.look).target));
        on(this.target, "change", () => this.#choose(null, null, Number(this.target.value)));
        on(this.shown, "change", () => (this.look.shown = this.shown.checked));
        on(this.opacity, "input", () => (this.look.opacity = Number(this.opacity.value)));
        on(this.map, "change", () => (this.look.map = this.map.value));
        on(this.pyramid, "change", () => (this.look.pyramid = this.pyramid.value));
        on(this.smooth, "change", () => (this.look.smooth = this.smooth.checked));
        for (const input of [this.low, this.lowRange]) on(input, "input", () => this.#setWindow(input.value, null));
        for (const input of [this.high, this.highRange]) on(input, "input", () => this.#setWindow(null, input.value));
        on(this.published, "click", () => (this.look.window = null));
        on(this.full, "click", () => (this.look.window = this.#windows().full));
        for (const input of [this.threshold, this.thresholdText]) {
            on(input, "input", () => (this.look.threshold = input.value === "" ? null : Number(input.value)));
        }
        on(this.noThreshold, "click", () => (this.look.threshold = null));
        on(this.reset, "click", () => Object.assign(this.look, { ...NEW_SCALE, map: null, opacity: 0.5, smooth: false, shown: true }));
    }

    #windows() {
        return windows(channelOf(this.image(), this.look), this.seen(this.look));
    }

    #choose(method, target, index) {
        const { channels } = runOf(this.image(), this.look);
        const found = index ?? Math.max(0, channels.findIndex((c) => c.method === method && c.target === target));
        const channel = channels[found].method === (method ?? channels[found].method)
            ? found : channels.findIndex((c) => c.method === method);
        Object.assign(this.look, { channel, ...NEW_SCALE });
    }

    /** Window ends from text; signed maps stay symmetrical about zero, and the ends never cross. */
    #setWindow(low, high) {
        const channel = channelOf(this.image(), this.look);
        const now = decided(this.look, channel, this.seen(this.look)).window;
        let [lo, hi] = [low ?? now[0], high ?? now[1]].map(Number);
        if (low === "" || high === "" || !Number.isFinite(lo) || !Number.isFinite(hi)) return;
        if (channel.signed) {
            const most = Math.abs(low === null ? hi : lo);
            [lo, hi] = [-most, most];
        }
        if (lo < hi) this.look.window = [lo, hi];
    }

    /** Show a look in the controls. */
    show(look) {
        this.look = look;
        const image = this.image();
        const run = runOf(image, look);
        const channel = channelOf(image, look);
        fill(this.run, mapped(image).map((r) => [r.run, r.label]), run.run);
        const methods = [...new Set(run.channels.map((c) => c.method))];
        fill(this.method, methods.map((m) => [m, m]), channel.method);
        const targets = run.channels.map((c, i) => [i, c]).filter(([, c]) => c.method === channel.method);
        fill(this.target, targets.map(([i, c]) => [i, c.target]), run.channels.indexOf(channel));
        const d = decided(look, channel, this.seen(look));
        const { published, full } = this.#windows();
        this.shown.checked = look.shown;
        this.opacity.value = look.opacity;
        this.opacityText.textContent = `${Math.round(100 * look.opacity)} %`;
        fill(this.map, Object.entries(MAPS), d.map);
        fill(this.pyramid, run.has_peak ? [["mean", "Mean"], ["peak", "Peak"]] : [["mean", "Mean"]], run.has_peak ? look.pyramid : "mean");
        this.smooth.checked = look.smooth;
        const [least, most] = [Math.min(full[0], d.window[0]), Math.max(full[1], d.window[1])];
        const step = (most - least) / 500;
        for (const [range, box, value] of [[this.lowRange, this.low, d.window[0]], [this.highRange, this.high, d.window[1]]]) {
            Object.assign(range, { min: least, max: most, step });
            range.value = value;
            if (document.activeElement !== box) box.value = rounded(value);
        }
        this.published.disabled = !published;
        this.published.classList.toggle("on", published !== null && look.window === null);
        this.full.classList.toggle("on", String(d.window) === String(full));
        Object.assign(this.threshold, { min: channel.signed ? 0 : least, max: most, step });
        this.threshold.value = look.threshold ?? (channel.signed ? 0 : least);
        if (document.activeElement !== this.thresholdText) {
            this.thresholdText.value = look.threshold === null ? "" : rounded(look.threshold);
        }
        this.noThreshold.classList.toggle("on", look.threshold === null);
    }

    /** The next (or previous) map of the run. */
    step(by) {
        const { channels } = runOf(this.image(), this.look);
        const at = channels.indexOf(channelOf(this.image(), this.look));
        Object.assign(this.look, { channel: (at + by + channels.length) % channels.length, ...NEW_SCALE });
        this.changed(this.look);
    }

    /** The next colour map. */
    nextColours() {
        const names = Object.keys(MAPS);
        this.look.map = names[(names.indexOf(this.map.value) + 1) % names.length];
        this.changed(this.look);
    }
}

/** Another map has other numbers: a window or a threshold of the last one would mislead. */
const NEW_SCALE = { window: null, threshold: null };

/** Term and description rows. */
export function facts(pairs) {
    return el("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
        .flatMap(([term, value]) => [el("dt", { textContent: term }), el("dd", { textContent: typeof value === "number" ? number(value) : value })]));
}
