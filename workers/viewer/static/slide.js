// The slide page: one or two maps over a slide, with all that is needed to read them.

import { about } from "./about.js";
import { address, computing, getJson, imageId } from "./api.js";
import { byId, download, el, say } from "./dom.js";
import { COVERAGE_WORDS, EVALUATED, grouped, length, number } from "./format.js";
import { Pyramid, Tiles } from "./heat.js";
import { listen } from "./keys.js";
import { channelOf, decided, legendOf, mapped, runOf, spacingOf } from "./looks.js";
import { MapPanel, row, section } from "./panel.js";
import { picture } from "./screenshot.js";
import { copyLink, newLook, readState, writeState } from "./state.js";
import { SlideView } from "./view.js";

const id = imageId();
let image;
const looks = [];
const views = [];
let active = 0;
let driver = 0; // the view that was moved last: the other follows
const extra = { hatch: "", regions: "", sign: "" };
const tiles = new Tiles({
    loaded: () => views.forEach((view) => loaded(view)),
    failed: (message) => say(message, { error: true }),
});
const rangesSeen = new Map(); // map -> range of what is computed so far
let following = false;
const panel = new MapPanel({ image: () => image, seen, changed: () => refresh() });

const mapKey = (look) => `${runOf(image, look).run}/${channelOf(image, look).index}`;
function seen(look) {
    return rangesSeen.get(mapKey(look)) ?? null;
}

function loaded(view) {
    const look = looks[views.indexOf(view)];
    const channel = channelOf(image, look);
    if (!channel.display) {
        const range = view.layer.seenRange();
        if (range && String(range) !== String(seen(look))) {
            rangesSeen.set(mapKey(look), range);
            refresh();
        }
    }
    view.layer.request();
}

// ---- views ----

function addView() {
    const container = byId("view").content.firstElementChild.cloneNode(true);
    byId("views").append(container);
    const view = new SlideView(container, image, tiles, {
        moved, pointed, failed: (message) => say(message, { error: true }),
    });
    container.addEventListener("pointerdown", () => activate(views.indexOf(view)), true);
    for (const event of ["pointerenter", "wheel"]) {
        container.addEventListener(event, () => (driver = views.indexOf(view)), { capture: true, passive: true });
    }
    container.addEventListener("click", ({ target }) => {
        const zoom = target.dataset?.zoom;
        if (zoom === "home") view.home();
        else if (zoom) view.zoom(zoom === "in" ? 1.6 : 1 / 1.6);
    });
    views.push(view);
    return view;
}

function moved(view) {
    if (following || !views.includes(view)) return;
    if (views.indexOf(view) === driver) {
        following = true;
        for (const other of views) if (other !== view && other.viewer.world.getItemCount()) other.setView(view.view());
        following = false;
    }
    remember();
}

let remembering;
/** The address follows what is seen, but not at every frame. */
function remember() {
    clearTimeout(remembering);
    remembering = setTimeout(() => writeState({ view: views[0]?.view(), looks, extra }), 200);
}

function activate(index) {
    if (index === active || index < 0) return;
    active = index;
    refresh();
}

async function split(on) {
    if (on && views.length === 1) {
        if (looks.length === 1) looks.push(other(looks[0]));
        const place = views[0].view();
        const view = addView();
        await view.ready;
        await Promise.all(views.map((v) => v.sized()));
        views.forEach((v) => v.setView(place));
    } else if (!on && views.length === 2) {
        looks.pop();
        views.pop().destroy();
        driver = active = 0;
    }
    refresh();
}

/** The map one would compare with: the next run's same map, or else the next map of this run. */
function other(look) {
    const runs = mapped(image);
    const { channels, run } = runOf(image, look);
    if (runs.length > 1) return { ...newLook(), opacity: look.opacity, run: runs[(runs.findIndex((r) => r.run === run) + 1) % runs.length].run };
    return { ...newLook(), opacity: look.opacity, run, channel: (look.channel + 1) % channels.length };
}

/** All that is shown follows the looks. */
function refresh() {
    looks.forEach((look, i) => {
        const view = views[i];
        if (!view) return;
        const run = runOf(image, look);
        const channel = channelOf(image, look);
        const how = decided(look, channel, seen(look), extra.hatch === "1");
        const key = `${mapKey(look)}/${run.has_peak ? look.pyramid : "mean"}`;
        if (view.key !== key) {
            view.key = key;
            const kind = run.has_peak ? look.pyramid : "mean";
            view.setMap(new Pyramid({
                grid: run.grid,
                urlOf: (level, y, x) => address("heat", id, run.run, channel.index, kind, level, `${y}_${x}.bin`),
            }));
        }
        view.layer.setLook(how);
        view.setLegend(legendOf(image, how, channel, { hatch: how.hatch }));
        view.container.classList.toggle("active", views.length > 1 && i === active);
        view.container.querySelector(".side").textContent = views.length > 1 ? "AB"[i] : "";
    });
    panel.show(looks[active]);
    byId("compare").setAttribute("aria-pressed", String(views.length > 1));
    for (const tab of tabs.children) {
        tab.setAttribute("aria-pressed", String(tab.dataset.side === String(active)));
    }
    tabs.hidden = views.length < 2;
    hatch.checked = extra.hatch === "1";
    marks.checked = extra.regions === "1";
    loadRegions();
    showFacts();
    remember();
}

// ---- pointer ----

function pointed(view, point) {
    const out = byId("readout");
    if (!point) {
        out.textContent = "";
        return;
    }
    const [y, x] = point;
    const { spacing_unit: unit, shape_l0: shape } = image.source;
    if (y < 0 || x < 0 || y >= shape[0] || x >= shape[1]) {
        out.textContent = "outside the slide";
        return;
    }
    const um = [y, x].map((v, i) => grouped(v * view.spacing[i] * (unit === "mm" ? 1000 : 1)));
    const values = views.map((v, i) => {
        const found = v.layer.at(y, x);
        const name = views.length > 1 ? `${"AB"[i]}: ` : "";
        if (!found) return `${name}…`;
        if (found.code !== EVALUATED) return `${name}${COVERAGE_WORDS[found.code]}`;
        const size = length(v.layer.pyramid.pixel(found.level)[1] * v.spacing[1], unit);
        return `${name}${number(found.value, 4)} (${found.level ? `${looks[i].pyramid} over ${size}` : size})`;
    });
    out.textContent = `x ${grouped(Math.floor(x))}  y ${grouped(Math.floor(y))} px   ${um[1]}, ${um[0]} µm   ${values.join("   ")}`;
}

// ---- regions ----

const regionList = el("ol", { className: "regions" });
const sign = el("select", { title: "Which end of the map" },
    el("option", { value: "", textContent: "for the target" }), el("option", { value: "negative", textContent: "against the target" }));
const signRow = row("Most", sign);
const marks = el("input", { type: "checkbox", id: "marks", title: "Outline the regions (g)" });
let regionsKey;

async function loadRegions() {
    const look = looks[active];
    const channel = channelOf(image, look);
    const run = runOf(image, look);
    signRow.hidden = !channel.signed;
    sign.value = extra.sign === "negative" ? "negative" : "";
    const key = `${mapKey(look)}/${run.progress?.blocks_done ?? ""}/${run.complete}/${sign.value}`;
    const outlined = () => views.forEach((view, i) => view.setRegions(extra.regions === "1" && i === active ? regions : []));
    if (key === regionsKey) return outlined();
    regionsKey = key;
    regions = [];
    try {
        const url = `${address("api", "images", id, run.run, "top")}?channel=${channel.index}&k=10${channel.signed ? `&sign=${sign.value || "positive"}` : ""}`;
        const found = await getJson(url);
        if (key !== regionsKey) return undefined;
        regions = found;
    } catch (error) {
        regionList.replaceChildren(el("li", { className: "quiet", textContent: error.message }));
        return undefined;
    }
    regionList.replaceChildren(...regions.map((region) => el("li", {}, el("button", {
        title: `Go to region ${region.rank} (${region.rank % 10})`,
        onclick: () => goTo(region.rank),
    }, el("span", { textContent: region.rank }), el("span", { className: "number", textContent: number(region.value) })))));
    if (!regions.length) regionList.replaceChildren(el("li", { className: "quiet", textContent: "none evaluated" }));
    return outlined();
}
let regions = [];

function goTo(rank) {
    const region = regions.find((r) => r.rank === rank);
    if (!region) return;
    extra.regions = "1";
    driver = active;
    views[active].goTo(region.box_l0);
    refresh();
}

// ---- the rest of the panel ----

const hatch = el("input", { type: "checkbox", id: "hatch", title: "Hatch what was not evaluated (n)" });
const tabs = el("div", { className: "tabs", attrs: { role: "group", "aria-label": "Map the controls are for" } },
    ...["A", "B"].map((name, i) => el("button", { textContent: `Map ${name}`, onclick: () => activate(i), attrs: { "data-side": i } })));
const facts = el("div");

function buildPanel() {
    const check = (input, text) => row(text, input);
    hatch.addEventListener("change", () => toggle("hatch"));
    marks.addEventListener("change", () => toggle("regions"));
    sign.addEventListener("change", () => {
        extra.sign = sign.value;
        refresh();
    });
    byId("panel").append(
        tabs, panel.element,
        section("Places without a value", check(hatch, "Hatch not evaluated")),
        section("Strongest regions", signRow, regionList, check(marks, "Outline")),
        el("details", {}, el("summary", { textContent: "About this map" }), facts),
    );
}

function toggle(name) {
    extra[name] = extra[name] === "1" ? "" : "1";
    refresh();
}

function showFacts() {
    const look = looks[active];
    const key = JSON.stringify([runOf(image, look), look.channel]);
    if (facts.dataset.key === key) return;
    facts.dataset.key = key;
    const { vendor, objective } = image.source;
    facts.replaceChildren(about(image, look, [["Scanner", [vendor, objective ? `${objective}×` : ""].filter(Boolean).join(", ")]]));
}

function showHead() {
    byId("name").textContent = image.name;
    document.title = `${image.name} – gigacam`;
    const run = runOf(image, looks[active]);
    const state = byId("status");
    state.textContent = run.status;
    state.dataset.status = run.status;
    const p = run.progress;
    byId("progress").textContent = !run.complete && p?.blocks_total
        ? `${Math.floor((100 * p.blocks_done) / p.blocks_total)} % of the heatmap written` : run.error || "";
    byId("progress").title = run.error || "";
    if (!image.source.available) say(`The slide itself cannot be shown: ${image.source.reason}`, { error: true });
}

async function poll() {
    if (!image.runs.some(computing)) return;
    try {
        const before = image.runs.map((run) => run.progress?.blocks_done);
        image = await getJson(address("api", "images", id));
        if (String(before) !== String(image.runs.map((run) => run.progress?.blocks_done)) || !image.runs.some(computing)) {
            tiles.expire();
            showHead();
            refresh();
        }
    } catch (error) {
        say(`The server does not answer: ${error.message}`, { error: true });
    }
    setTimeout(poll, 3000);
}

async function screenshot() {
    const place = views[0].view();
    const size = (look) => length(place[2] * spacingOf(image, look)[1], image.source.spacing_unit);
    const sizes = [...new Set(looks.map(size))].join(" and ");
    const position = `x ${grouped(place[1])}, y ${grouped(place[0])} px; ${sizes} a px`;
    const parts = views.map((view) => ({
        width: view.container.clientWidth, height: view.container.clientHeight, legend: view.legend, bar: view.bar,
        canvases: [
            { canvas: view.viewer.drawer.canvas, opacity: 1 },
            ...(view.layer.look.shown ? [
                { canvas: view.layer.heat, opacity: view.layer.look.opacity }, { canvas: view.layer.status, opacity: 1 },
            ] : []),
            { canvas: view.marks, opacity: 1 },
        ],
    }));
    const blob = await picture({ title: image.name, subtitle: position, parts });
    download(blob, `${id}.png`);
    say("Picture saved.");
}

const link = () => copyLink({ view: views[0].view(), looks, extra });

function keys() {
    const look = () => looks[active];
    const set = (change) => {
        Object.assign(look(), change);
        refresh();
    };
    const opacity = (by) => set({ opacity: Math.min(1, Math.max(0, Math.round(20 * (look().opacity + by)) / 20)) });
    const drive = (act) => {
        driver = active;
        act(views[active]);
    };
    listen([
        [["h"], "heat on, off", () => set({ shown: !look().shown })],
        [[" "], "hold: look below the heat", () => views.forEach((v) => v.container.classList.add("below"))],
        [["[", "]"], "opacity down, up", ({ key }) => opacity(key === "]" ? 0.05 : -0.05)],
        [["c"], "next colour map", () => panel.nextColours()],
        [["w", "W"], "published window, full range", ({ key }) => (key === "w" ? panel.published : panel.full).click()],
        [["t"], "no threshold", () => set({ threshold: null })],
        [["p"], "mean, peak", () => runOf(image, look()).has_peak && set({ pyramid: look().pyramid === "mean" ? "peak" : "mean" })],
        [["s"], "smooth", () => set({ smooth: !look().smooth })],
        [["r"], "reset the display", () => panel.reset.click()],
        [["m", "M"], "next, previous map", ({ key }) => panel.step(key === "m" ? 1 : -1)],
        [["n"], "hatch what was not evaluated", () => toggle("hatch")],
        [["g"], "outline the strongest regions", () => toggle("regions")],
        [[..."123456789"], "go to the region of that rank", ({ key }) => goTo(Number(key))],
        [["v"], "two maps side by side", () => split(views.length === 1)],
        [["x"], "controls for the other map", () => activate(views.length - 1 - active)],
        [["0"], "whole slide", () => drive((v) => v.home())],
        [["+", "="], "zoom in", () => drive((v) => v.zoom(1.6))],
        [["-"], "zoom out", () => drive((v) => v.zoom(1 / 1.6))],
        [["ArrowLeft", "ArrowRight"], "move", ({ key }) => drive((v) => v.pan(key === "ArrowLeft" ? -0.2 : 0.2, 0))],
        [["ArrowUp", "ArrowDown"], "move", ({ key }) => drive((v) => v.pan(0, key === "ArrowUp" ? -0.2 : 0.2))],
        [["i"], "save a picture", screenshot],
        [["l"], "copy a link to this view", link],
    ]);
    document.addEventListener("keyup", ({ key }) => {
        if (key === " ") views.forEach((v) => v.container.classList.remove("below"));
    });
}

async function start() {
    const { view, looks: asked, extra: more } = readState(Object.keys(extra));
    for (const [key, value] of Object.entries(more)) extra[key] = value ?? "";
    image = await getJson(address("api", "images", id));
    if (!mapped(image).length) {
        byId("name").textContent = image.name;
        const why = image.runs.map((run) => run.error || run.status).join("; ");
        byId("views").append(el("p", { className: "empty", textContent: `No heatmap to show: ${why}` }));
        return;
    }
    looks.push(...asked);
    buildPanel();
    showHead();
    const first = addView();
    refresh();
    await first.ready;
    await first.sized();
    if (view?.length === 3) first.setView(view);
    if (looks.length > 1) await split(true);
    keys();
    byId("compare").addEventListener("click", () => split(views.length === 1));
    byId("screenshot").addEventListener("click", screenshot);
    byId("link").addEventListener("click", link);
    if (image.runs.some(computing)) setTimeout(poll, 3000);
    // for whoever automates the page
    window.gigacam = { views, tiles, looks, settled };
}

/** Whether all that is seen now has come and is drawn. */
function settled() {
    views.forEach((view) => view.layer.draw());
    return tiles.settled && views.every(({ viewer: { world } }) => world.getItemCount() && world.getItemAt(0).getFullyLoaded());
}

start().catch((error) => {
    byId("views").append(el("p", { className: "empty", textContent: error.message }));
});
