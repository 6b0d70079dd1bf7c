// Small helpers around the document.

/** An element with properties, attributes (`aria-*`, `for`, `role`: through `attrs`) and children. */
export function el(tag, { attrs = {}, ...properties } = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attrs)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
}

export const byId = (id) => document.getElementById(id);

/** Hand a blob to the person as a file. */
export function download(blob, name) {
    const link = el("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

let notice;
/** Say something for a few seconds, also to screen readers. */
export function say(text, { error = false } = {}) {
    const place = byId("notice");
    place.textContent = text;
    place.classList.toggle("error", error);
    place.classList.add("shown");
    clearTimeout(notice);
    notice = setTimeout(() => place.classList.remove("shown"), error ? 10_000 : 3_000);
}

/** A canvas of CSS size `width` x `height` with the screen's own pixels, and its context, scaled to CSS px. */
export function sharpCanvas(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
}
