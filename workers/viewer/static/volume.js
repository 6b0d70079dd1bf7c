// The volume page: three planes and a rendering, under a map, by NiiVue.

import { about } from "./about.js";
import { address, computing, getJson, imageId } from "./api.js";
import { byId, download, el, say, sharpCanvas } from "./dom.js";
import { number, sides } from "./format.js";
import { LEGEND_WIDTH, drawLegend, legendText } from "./furniture.js";
import { listen } from "./keys.js";
import { channelOf, decided, legendOf, mapped, runOf, spacingOf } from "./looks.js";
import { VolumeHeat } from "./nifti.js";
import { MapPanel, row, section } from "./panel.js";
import { picture } from "./screenshot.js";
import { copyLink, readState, writeState } from "./state.js";

const { Niivue } = window.niivue;
const PLANES = { all: "Planes and 3-D", axial: "Axial", coronal: "Coronal", sagittal: "Sagittal", render: "3-D" };
/** Hounsfield units, from and to: the usual ones. */
const HOUNSFIELD = { "Soft tissue": [-160, 240], Lung: [-1350, 150], Bone: [-450, 1050], Brain: [0, 80] };

const id = imageId();
let image;
let look;
let legend;
let shownHeat; // {key, heat}
const heats = new Map(); // map -> promise of VolumeHeat
const extra = { planes: "", grey: "", neuro: "" };
const KEEP = 3;
const panel = new MapPanel({ image: () => image, seen, changed: () => refresh(), volume: true });
const nv = new Niivue({
    backColor: [0.08, 0.09, 0.1, 1],
    crosshairColor: [0.94, 0.78, 0.45, 0.9],
    crosshairWidth: 0.25,
    crosshairWidthUnit: "percent",
    crosshairGap: 6,
    fontColor: [0.9, 0.92, 0.94, 1],
    show3Dcrosshair: true,
    isRadiologicalConvention: true,
    isColorbar: false,
    showAllOrientationMarkers: true,
    fontSizeScaling: 0.3,
    isRuler: true,
    rulerWidth: 2,
    rulerColor: [0.94, 0.78, 0.45, 1],
    multiplanarShowRender: 1,
    multiplanarPadPixels: 4,
    dragAndDropEnabled: false,
    isNearestInterpolation: true,
    viewModeHotKey: "",
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    loadingText: "",
    logLevel: "error",
});

// The source is always drawn smooth; only the heat shows its voxels. NiiVue knows one setting for both.
const interpolate = nv.updateInterpolation.bind(nv);
nv.updateInterpolation = (layer, linear = false) => interpolate(layer, linear || layer === 0);

function seen(of) {
    const key = mapKey(of);
    return shownHeat?.key === key ? (shownHeat.range ??= shownHeat.heat.range()) : null;
}

const mapKey = (of) => `${runOf(image, of).run}/${channelOf(image, of).index}`;

// ---- what is drawn ----

async function heatOf(of) {
    const { run, progress } = runOf(image, of);
    const { index } = channelOf(image, of);
    const key = mapKey(of);
    if (!heats.has(key)) {
        const url = (suffix) => address("volume", id, run, `${index}${suffix}`);
        heats.set(key, VolumeHeat.load(url(".nii.gz"), `${id}-${run}-${index}`, progress?.failed ? url(".coverage.nii.gz") : null));
        if (heats.size > KEEP) heats.delete(heats.keys().next().value);
    }
    try {
        return await heats.get(key);
    } catch (error) {
        heats.delete(key);
        throw error;
    }
}

/** Put the map that is asked for over the volume; false where another was asked for meanwhile. */
async function showMap() {
    const key = mapKey(look);
    if (shownHeat?.key === key) return true;
    byId("progress").textContent = "loading the map…";
    const heat = await heatOf(look);
    byId("progress").textContent = "";
    if (key !== mapKey(look)) return false;
    if (nv.volumes[1]) nv.volumes.splice(1, 1);
    shownHeat = { key, heat };
    const channel = channelOf(image, look);
    heat.paint(decided(look, channel, seen(look)));
    nv.addVolume(heat.image);
    return true;
}

let painted;
async function refresh() {
    panel.show(look);
    try {
        if (!(await showMap())) return;
    } catch (error) {
        byId("progress").textContent = "";
        say(`The map could not be read: ${error.message}`, { error: true });
        return;
    }
    const channel = channelOf(image, look);
    const how = decided(look, channel, seen(look));
    const key = JSON.stringify([shownHeat.key, how.map, how.window, how.threshold, how.opacity, how.shown]);
    if (key !== painted) {
        painted = key;
        shownHeat.heat.paint(how);
        nv.refreshLayers(nv.volumes[1], 1);
    }
    nv.opts.isNearestInterpolation = !look.smooth;
    nv.updateInterpolation(1);
    nv.drawScene();
    panel.show(look);
    legend = legendOf(image, how, channel, { volume: true });
    drawLegendCanvas();
    showFacts();
    readout();
    remember();
}

function drawLegendCanvas() {
    const canvas = document.querySelector(".legend");
    canvas.hidden = false;
    const height = drawLegend(canvas.getContext("2d"), legend, 0, 0, { dry: true });
    drawLegend(sharpCanvas(canvas, LEGEND_WIDTH, height), legend, 0, 0);
    canvas.setAttribute("aria-label", `Legend: ${legendText(legend)}`);
}

function showPlanes() {
    const name = PLANES[extra.planes] ? extra.planes : "all";
    planes.value = name;
    const type = { all: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal, sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender };
    nv.setSliceType(type[name]);
    nv.setRadiologicalConvention(extra.neuro !== "1");
    neuro.checked = extra.neuro === "1";
    remember();
}

// ---- where the crosshair is ----

const mm = () => [...nv.frac2mm(nv.scene.crosshairPos, 0, true)].slice(0, 3);

function goToMm(at) {
    nv.scene.crosshairPos = nv.mm2frac(at, 0, true);
    nv.drawScene();
    nv.createOnLocationChange();
}

function readout() {
    const at = mm();
    const places = at.map((value, axis) => `${number(Math.abs(value), 4)} ${(value < 0 ? "LPI" : "RAS")[axis]}`);
    // the volume lies as its first run was told: another run may have been told other voxels
    const told = String(spacingOf(image, look)) === String(image.source.spacing) ? "" : ` by voxels of ${sides(image.source.spacing, "mm")}`;
    const voxel = shownHeat?.heat.voxel(at);
    const value = shownHeat ? shownHeat.heat.at(at) : NaN;
    const source = nv.volumes[0];
    const stored = voxel ? source.getValue(...source.mm2vox(at)) : null;
    byId("readout").textContent = [
        `${places.join("  ")} mm${told}`, voxel ? `voxel ${voxel.join(", ")}` : "outside the volume",
        stored === null ? "" : `source ${number(stored, 4)}`,
        `heat ${!Number.isNaN(value) ? number(value, 4) : shownHeat?.heat.failedAt(at) ? "failed" : "not evaluated"}`,
    ].filter(Boolean).join("   ");
}

let remembering;
function remember() {
    clearTimeout(remembering);
    remembering = setTimeout(() => writeState({ view: mm(), looks: [look], extra }), 200);
}

// ---- the rest of the panel ----

const planes = el("select", { title: "Planes (v)" }, ...Object.entries(PLANES).map(([value, textContent]) => el("option", { value, textContent })));
const neuro = el("input", { type: "checkbox", id: "neuro", title: "Patient's left on the left (o)" });
const greyLow = el("input", { type: "number", step: "any", attrs: { "aria-label": "Grey levels from" } });
const greyHigh = el("input", { type: "number", step: "any", attrs: { "aria-label": "Grey levels to" } });
const facts = el("div");
const regionList = el("ol", { className: "regions" });
let greyAtFirst;

function setGrey(lo, hi) {
    if (!(lo < hi)) return;
    Object.assign(nv.volumes[0], { cal_min: lo, cal_max: hi });
    extra.grey = String([lo, hi]) === String(greyAtFirst) ? "" : `${lo},${hi}`;
    nv.refreshLayers(nv.volumes[0], 0);
    nv.drawScene();
    for (const [box, value] of [[greyLow, lo], [greyHigh, hi]]) if (document.activeElement !== box) box.value = Number(value.toPrecision(4));
    remember();
}

function buildPanel() {
    planes.addEventListener("change", () => choosePlanes(planes.value));
    neuro.addEventListener("change", toggleSide);
    for (const box of [greyLow, greyHigh]) {
        box.addEventListener("input", () => greyLow.value && greyHigh.value && setGrey(Number(greyLow.value), Number(greyHigh.value)));
    }
    const presets = nv.volumes[0].global_min < -500
        ? Object.entries(HOUNSFIELD).map(([textContent, [lo, hi]]) => el("button", { textContent, onclick: () => setGrey(lo, hi) })) : [];
    byId("panel").append(
        panel.element,
        section("Volume", row("Show", planes),
            el("div", { className: "row" }, el("label", { htmlFor: "neuro", textContent: "Patient's left on the left" }), neuro)),
        section("Grey levels",
            el("div", { className: "pair" }, greyLow, el("span", { textContent: "to" }), greyHigh),
            el("div", { className: "buttons wrap" }, ...presets, el("button", { textContent: "Reset", onclick: () => setGrey(...greyAtFirst) }))),
        section("Strongest regions", regionList),
        el("details", {}, el("summary", { textContent: "About this map" }), facts),
    );
}

function choosePlanes(name) {
    extra.planes = name === "all" ? "" : name;
    showPlanes();
}

function toggleSide() {
    extra.neuro = extra.neuro === "1" ? "" : "1";
    showPlanes();
}

let regionsKey;
async function loadRegions() {
    const shown = runOf(image, look);
    const key = `${mapKey(look)}/${shown.progress?.blocks_done ?? ""}/${shown.complete}`;
    if (key === regionsKey) return;
    regionsKey = key;
    const url = `${address("api", "images", id, runOf(image, look).run, "top")}?channel=${channelOf(image, look).index}&k=10`;
    let regions = [];
    try {
        regions = await getJson(url);
    } catch (error) {
        say(error.message, { error: true });
    }
    if (key !== regionsKey) return;
    // regions are in the reader's voxels, which are NiiVue's: axes turned to the nearest of right, front, top
    const dims = nv.volumes[0].dimsRAS.slice(1, 4);
    regionList.replaceChildren(...regions.map(({ rank, value, centre_l0: [z, y, x] }) => el("li", {}, el("button", {
        title: `Go to region ${rank}`,
        onclick: () => goToMm([...nv.frac2mm([x / dims[0], y / dims[1], z / dims[2]], 0, true)].slice(0, 3)),
    }, el("span", { textContent: rank }), el("span", { className: "number", textContent: number(value) })))));
}

function showFacts() {
    const { orientation } = image.source;
    facts.replaceChildren(about(image, look, [["Stored axes", Array.isArray(orientation) ? orientation.join("") : orientation]]));
    loadRegions();
}

async function screenshot() {
    nv.drawScene(); // a WebGL canvas can be read only in the frame it was drawn in
    const canvas = byId("volume");
    const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    copy.getContext("2d").drawImage(canvas, 0, 0);
    const { clientWidth: width, clientHeight: height } = canvas;
    const parts = [{ width, height, ground: "#000", canvases: [{ canvas: copy, opacity: 1 }], legend }];
    download(await picture({ title: image.name, subtitle: byId("readout").textContent, parts }), `${id}.png`);
    say("Picture saved.");
}

const link = () => copyLink({ view: mm(), looks: [look], extra });

function keys() {
    const set = (change) => {
        Object.assign(look, change);
        refresh();
    };
    const opacity = (by) => set({ opacity: Math.min(1, Math.max(0, Math.round(20 * (look.opacity + by)) / 20)) });
    const names = Object.keys(PLANES);
    const step = (axis, by) => {
        const move = [0, 0, 0];
        move[axis] = by;
        nv.moveCrosshairInVox(...move);
    };
    listen([
        [["h"], "heat on, off", () => set({ shown: !look.shown })],
        [["[", "]"], "opacity down, up", ({ key }) => opacity(key === "]" ? 0.05 : -0.05)],
        [["c"], "next colour map", () => panel.nextColours()],
        [["w", "W"], "published window, full range", ({ key }) => (key === "w" ? panel.published : panel.full).click()],
        [["t"], "no threshold", () => set({ threshold: null })],
        [["s"], "smooth", () => set({ smooth: !look.smooth })],
        [["r"], "reset the display", () => panel.reset.click()],
        [["m", "M"], "next, previous map", ({ key }) => panel.step(key === "m" ? 1 : -1)],
        [["v"], "next planes", () => choosePlanes(names[(names.indexOf(planes.value) + 1) % names.length])],
        [["o"], "turn left and right", toggleSide],
        [["ArrowLeft", "ArrowRight"], "crosshair left, right", ({ key }) => step(0, key === "ArrowLeft" ? -1 : 1)],
        [["ArrowUp", "ArrowDown"], "crosshair to the front, to the back", ({ key }) => step(1, key === "ArrowUp" ? 1 : -1)],
        [["PageUp", "PageDown"], "crosshair up, down", ({ key }) => step(2, key === "PageUp" ? 1 : -1)],
        [["1", "2", "3", "4", "5", "6", "7", "8", "9"], "go to the region of that rank", ({ key }) => regionList.querySelectorAll("button")[Number(key) - 1]?.click()],
        [["i"], "save a picture", screenshot],
        [["l"], "copy a link to this view", link],
    ]);
}

async function start() {
    const state = readState(Object.keys(extra));
    for (const [key, value] of Object.entries(state.extra)) extra[key] = value ?? "";
    [look] = state.looks;
    image = await getJson(address("api", "images", id));
    byId("name").textContent = image.name;
    document.title = `${image.name} – gigacam`;
    const run = mapped(image)[0];
    const empty = (text) => document.querySelector(".view").replaceChildren(el("p", { className: "empty", textContent: text }));
    if (!run) return empty(`No heatmap to show: ${image.runs.map((r) => r.error || r.status).join("; ")}`);
    if (!image.source.available) return empty(`The volume itself cannot be shown: ${image.source.reason}`);
    Object.assign(byId("status"), { textContent: run.status }).dataset.status = run.status;
    byId("progress").textContent = "loading the volume…";
    await nv.attachToCanvas(byId("volume"));
    await nv.loadVolumes([{ url: address("volume", id, "source.nii.gz"), name: `${id}.nii.gz`, colormap: "gray" }]);
    byId("progress").textContent = "";
    greyAtFirst = [nv.volumes[0].cal_min, nv.volumes[0].cal_max];
    buildPanel();
    const asked = extra.grey.split(",").map(Number);
    setGrey(...(asked.length === 2 && asked[0] < asked[1] ? asked : greyAtFirst));
    nv.onLocationChange = () => {
        readout();
        remember();
    };
    await refresh();
    const at = state.view?.length === 3 ? state.view : shownHeat?.heat.strongest();
    if (at) goToMm(at);
    showPlanes();
    keys();
    byId("screenshot").addEventListener("click", screenshot);
    byId("link").addEventListener("click", link);
    if (image.runs.some(computing)) setTimeout(poll, 3000);
    // for whoever automates the page
    window.gigacam = { nv, look, heat: () => shownHeat?.heat, goToMm, mm };
    return undefined;
}

async function poll() {
    const before = image.runs.map((run) => run.progress?.blocks_done);
    try {
        image = await getJson(address("api", "images", id));
        if (String(before) !== String(image.runs.map((run) => run.progress?.blocks_done)) || !image.runs.some(computing)) {
            heats.clear();
            shownHeat = undefined;
            const run = runOf(image, look);
            Object.assign(byId("status"), { textContent: run.status }).dataset.status = run.status;
            await refresh();
        }
    } catch (error) {
        say(`The server does not answer: ${error.message}`, { error: true });
    }
    if (image.runs.some(computing)) setTimeout(poll, 3000);
}

start().catch((error) => {
    byId("progress").textContent = "";
    say(`The volume cannot be shown: ${error.message}`, { error: true });
});
