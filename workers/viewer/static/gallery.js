// The gallery: every image of the output folders, its runs side by side.

import { address, computing, getJson } from "./api.js";
import { byId, el, say } from "./dom.js";
import { duration, number } from "./format.js";

const POLL = 3000;
let images = [];
let folders = [];
const cards = new Map(); // image id -> {key, element}: only what has changed is drawn again

const best = (image, of) => Math.max(-Infinity, ...image.runs.map(of));
const score = (run) => Math.max(-Infinity, ...(run.prediction ?? []).map((p) => p.highest ?? p.mean));
const auroc = (run) => Math.max(-Infinity, ...Object.values(run.auroc ?? {}));
const WORST_FIRST = ["failed", "gaps", "interrupted", "computing", "not started", "duplicate", "complete"];
const rank = (run) => WORST_FIRST.indexOf(run.status);
const ORDERS = {
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
    status: (a, b) => Math.min(...a.runs.map(rank)) - Math.min(...b.runs.map(rank)),
    score: (a, b) => best(b, score) - best(a, score),
    auroc: (a, b) => best(b, auroc) - best(a, auroc),
    started: (a, b) => newest(b).localeCompare(newest(a)),
};
const newest = (image) => image.runs.map((run) => String(run.started ?? "")).sort().at(-1) ?? "";

function shown() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = byId("filter").value;
    const text = (image) => [image.name, image.id, ...image.runs.flatMap((r) => [...(r.methods ?? []), ...(r.targets ?? []), r.status])]
        .join(" ").toLowerCase();
    return images
        .filter((image) => (!status || image.runs.some((run) => run.status === status)) && words.every((w) => text(image).includes(w)))
        .sort((a, b) => ORDERS[byId("sort").value](a, b) || ORDERS.name(a, b));
}

function draw() {
    const list = shown();
    byId("count").textContent = list.length === images.length
        ? `${images.length} image${images.length === 1 ? "" : "s"}` : `${list.length} of ${images.length} images`;
    const elements = list.map((image) => {
        const key = JSON.stringify(image);
        const have = cards.get(image.id);
        if (have?.key === key) return have.element;
        const element = card(image);
        cards.set(image.id, { key, element });
        return element;
    });
    if (!elements.length) {
        elements.push(el("p", { className: "empty", textContent: images.length ? "No image is like that." : "No image here yet." }));
    }
    const main = byId("images");
    if (elements.length !== main.children.length || elements.some((e, i) => main.children[i] !== e)) main.replaceChildren(...elements);
    const states = [...new Set(images.flatMap((image) => image.runs.map((run) => run.status)))].sort();
    const filter = byId("filter");
    if (filter.dataset.states !== String(states)) {
        const value = filter.value;
        filter.replaceChildren(el("option", { value: "", textContent: "all" }), ...states.map((s) => el("option", { value: s, textContent: s })));
        filter.value = states.includes(value) ? value : "";
        filter.dataset.states = String(states);
    }
}

const page = (image, hash = "") => address("image", image.id) + hash;

function card(image) {
    const able = image.runs.filter((run) => run.methods?.length);
    const openable = image.kind !== null;
    return el("section", { className: "image", attrs: { "data-id": image.id } },
        el("div", {},
            el("h2", { title: image.name }, openable ? el("a", { href: page(image), textContent: image.name }) : image.name),
            el("span", { className: "quiet", textContent: openable ? image.kind + (image.source_available ? "" : ", source not found") : "" }),
            able.length > 1 && image.kind === "slide"
                ? el("a", { href: page(image, `#a.run=${able[0].run}&b.run=${able[1].run}&b.ch=0`), textContent: "Compare the runs" }) : null),
        el("div", { className: "runs" }, ...image.runs.map((run) => runCard(image, run))));
}

function runCard(image, run) {
    const p = run.progress ?? {};
    const label = folders.length > 1 ? folders.find((folder) => folder.run === run.run)?.label ?? "" : "";
    const methods = (run.methods ?? []).join(", ");
    const scores = (run.prediction ?? []).slice(0, 3).map((one) => el("div", { className: "line" },
        el("span", { textContent: one.target, title: one.target }),
        el("span", {
            className: "number", title: one.quantity,
            textContent: one.highest === null ? number(one.mean) : `mean ${number(one.mean)}, highest ${number(one.highest)}`,
        })));
    const known = Object.entries(run.auroc ?? {}).map(([name, value]) => el("div", { className: "line" },
        el("span", { textContent: name, title: `${name}: ${run.auroc_of || "AUROC"}` }), el("span", { className: "number", textContent: `AUROC ${number(value)}` })));
    return el("div", { className: "run", attrs: { "data-run": run.run } },
        thumbnail(image, run),
        el("div", { className: "text" },
            el("div", { className: "line" },
                el("span", { textContent: methods || label || "no heatmap", title: methods }),
                el("span", { className: "chip", textContent: run.status, attrs: { "data-status": run.status } })),
            methods && (label || run.model) ? el("div", { className: "line quiet" },
                el("span", { textContent: label || run.model, title: label }),
                label && run.model ? el("span", { textContent: run.model }) : null) : null,
            run.error ? el("div", { className: "error", textContent: run.error }) : null,
            ...scores, ...known,
            computing(run) && p.blocks_total
                ? el("progress", { max: p.blocks_total, value: p.blocks_done, attrs: { "aria-label": "Blocks written" } }) : null,
            el("div", { className: "line quiet number" },
                el("span", { textContent: p.planned ? `${p.done} of ${p.planned} tiles${p.failed ? `, ${p.failed} failed` : ""}` : "" }),
                el("span", { textContent: duration(run.seconds) }))));
}

function thumbnail(image, run) {
    const href = page(image, image.runs.length > 1 ? `#a.run=${run.run}` : "");
    const link = el("a", { className: "picture", attrs: { "aria-label": `Open ${image.name}` } });
    if (image.kind !== null) link.href = href;
    const none = () => {
        link.classList.add("none");
        link.replaceChildren("no picture");
    };
    if (!run.methods?.length && !image.source_available) {
        none();
        return link;
    }
    const version = `&v=${run.progress?.blocks_done ?? 0}`;
    const src = run.methods?.length
        ? `${address("api", "images", image.id, run.run, "overlay.jpg")}?channel=0&size=384${version}`
        : `${address("api", "images", image.id, "thumbnail.jpg")}?size=384`;
    link.append(el("img", { src, loading: "lazy", decoding: "async", alt: "", onerror: none }));
    return link;
}

async function load() {
    const answer = await getJson(address("api", "images"));
    images = answer.images;
    folders = answer.folders ?? [];
    draw();
    const busy = images.some((image) => image.runs.some(computing));
    if (busy) setTimeout(again, POLL);
}

const again = () => load().catch((error) => {
    say(`The server does not answer: ${error.message}`, { error: true });
    setTimeout(again, 2 * POLL);
});

for (const id of ["search", "filter", "sort"]) byId(id).addEventListener("input", draw);
again();
