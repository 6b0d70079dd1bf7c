// The server, by addresses relative to this module, so that a proxy may put the viewer under a path of its own.

const ROOT = new URL("../", import.meta.url);

/** Absolute address of a path of the server; parts are escaped. */
export function address(...parts) {
    return new URL(parts.map((part) => encodeURIComponent(part)).join("/"), ROOT).href;
}

/** JSON of an address; the server's own words where it says no. */
export async function getJson(url) {
    const response = await fetch(url);
    if (!response.ok) throw new Error(await reason(response));
    return response.json();
}

/** Why a response is none. */
export async function reason(response) {
    try {
        return (await response.json()).error || response.statusText;
    } catch {
        return `${response.status} ${response.statusText}`;
    }
}

/** Id of the image this page shows. */
export const imageId = () => decodeURIComponent(location.pathname.replace(/\/$/, "").split("/").pop());

/** Whether a run is still being written. */
export const computing = (run) => !run.complete && run.status === "computing";
