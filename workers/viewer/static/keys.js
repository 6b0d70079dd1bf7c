// Keyboard: one table for what keys do and for the list of them.

import { byId, el } from "./dom.js";

/** `rows`: `[[keys], words, act]`; typing in a field and keys with Ctrl, Alt or Meta are left alone. */
export function listen(rows) {
    const dialog = byId("keys");
    dialog.append(
        el("h2", { textContent: "Keys" }),
        el("table", {}, ...rows.map(([keys, words]) => el("tr", {},
            el("td", {}, ...keys.map((key) => el("kbd", { textContent: NAMES[key] ?? key }))), el("td", { textContent: words })))),
        el("form", { method: "dialog" }, el("button", { textContent: "Close" })),
    );
    byId("help").addEventListener("click", () => dialog.showModal());
    const acts = new Map(rows.flatMap(([keys, , act]) => keys.map((key) => [key, act])));
    document.addEventListener("keydown", (event) => {
        const typing = event.target.matches?.("input[type=number], input[type=text], input[type=search], select, textarea");
        const sliding = event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow");
        const pressing = event.key === " " && event.target.matches?.("button, input, summary, a");
        if (typing || sliding || pressing || dialog.open || event.ctrlKey || event.altKey || event.metaKey) return;
        if (event.key === "?") dialog.showModal();
        else if (acts.has(event.key)) acts.get(event.key)(event);
        else return;
        event.preventDefault();
    });
}

const NAMES = { " ": "Space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };
