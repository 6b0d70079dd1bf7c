// What the page shows, in its address: a link restores it all.

import { say } from "./dom.js";

/** How one map is shown; null: as the map itself says. */
export const newLook = () => ({
    run: 0, channel: 0, pyramid: "mean", map: null, opacity: 0.5, window: null, threshold: null, smooth: false, shown: true,
});

const number = (text) => (Number.isFinite(Number(text)) && text.trim() !== "" ? Number(text) : null);
const numbers = (text) => {
    const list = text.split(",").map(number);
    return list.includes(null) ? null : list;
};

const KEYS = {
    run: ["run", number], ch: ["channel", number], pyr: ["pyramid", (v) => (v === "peak" ? "peak" : "mean")],
    map: ["map", String], op: ["opacity", number], win: ["window", numbers], thr: ["threshold", number],
    smooth: ["smooth", (v) => v === "1"], on: ["shown", (v) => v === "1"],
};
const shown = (value) => (typeof value === "boolean" ? Number(value) : value);

/** `{view, looks: [a] or [a, b], extra}` of the address; `extra` has the keys named. */
export function readState(extraKeys) {
    const query = new URLSearchParams(location.hash.slice(1));
    const looks = [];
    for (const side of ["a", "b"]) {
        const look = newLook();
        let found = side === "a";
        for (const [key, [field, parse]] of Object.entries(KEYS)) {
            const text = query.get(`${side}.${key}`);
            if (text === null) continue;
            const value = parse(text);
            if (value !== null) look[field] = value;
            found = true;
        }
        if (found) looks.push(look);
    }
    const at = query.get("at");
    return {
        view: at === null ? null : numbers(at),
        looks,
        extra: Object.fromEntries(extraKeys.map((key) => [key, query.get(key)])),
    };
}

/** Write the state into the address, without a new entry in the browser's history. */
export function writeState({ view, looks, extra = {} }) {
    const parts = view ? [`at=${view.map((v) => Number(v.toPrecision(8))).join(",")}`] : [];
    looks.forEach((look, i) => {
        const plain = newLook();
        for (const [key, [field]] of Object.entries(KEYS)) {
            const value = look[field];
            // the second side is there as soon as it names its map
            const needed = String(value) !== String(plain[field]) || (i === 1 && field === "channel");
            if (needed && value !== null) parts.push(`${"ab"[i]}.${key}=${encodeURIComponent(shown(value))}`);
        }
    });
    for (const [key, value] of Object.entries(extra)) if (value) parts.push(`${key}=${encodeURIComponent(value)}`);
    const hash = parts.length ? `#${parts.join("&")}` : "";
    if (hash !== location.hash) history.replaceState(null, "", `${location.pathname}${location.search}${hash}`);
}

/** Put the address of what is seen on the clipboard, or show it where the browser has none. */
export async function copyLink(state) {
    writeState(state);
    try {
        await navigator.clipboard.writeText(location.href);
        say("Link copied.");
    } catch {
        say(location.href);
    }
}
