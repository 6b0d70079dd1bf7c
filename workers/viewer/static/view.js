// One slide under one map: OpenSeadragon, the heat layer, legend, scale bar and marks.

import { address, reason } from "./api.js";
import { sharpCanvas } from "./dom.js";
import { LEGEND_WIDTH, SCALE_HEIGHT, drawLegend, drawScale, legendText, scaleBar } from "./furniture.js";
import { length, number } from "./format.js";
import { HeatLayer } from "./layer.js";

const { OpenSeadragon } = window;
const PAPER = "data:image/gif;base64,R0lGODlhAQABAIAAAOfk6AAAACwAAAAAAQABAAACAkQBADs=";

// OpenSeadragon adds an inline style, which the content security policy refuses, unless it finds an element of this name.
const style = document.createElementNS("urn:gigacam:none", "style");
style.setAttribute("data-openseadragon-mobile-css", "");
document.head.append(style);

function tileSource({ id, source }, [height, width]) {
    if (!source.deepzoom) {
        return { width, height, tileSize: Math.max(width, height), minLevel: 0, maxLevel: 0, getTileUrl: () => PAPER };
    }
    const { tile, overlap, levels, format } = source.deepzoom;
    return {
        width, height, tileSize: tile, tileOverlap: overlap, minLevel: 0, maxLevel: levels - 1,
        getTileUrl: (level, x, y) => address("slide", id, level, `${x}_${y}.${format}`),
    };
}

export class SlideView {
    /** `moved(view)` on every change of what is seen, `pointed(view, point)` on every move of the pointer (null: it left). */
    constructor(container, image, tiles, { moved, pointed, failed }) {
        this.container = container;
        this.image = image;
        this.shape = image.source.shape_l0;
        this.width = this.shape[1];
        this.stage = container.querySelector(".stage");
        this.viewer = OpenSeadragon({
            element: this.stage,
            tileSources: tileSource(image, this.shape),
            drawer: "canvas",
            showNavigationControl: false,
            showNavigator: true,
            navigatorPosition: "TOP_RIGHT",
            navigatorSizeRatio: 0.16,
            navigatorMaintainSizeRatio: true,
            navigatorAutoFade: false,
            navigatorDisplayRegionColor: "#e0a030",
            navigatorBackground: "#2b2f34",
            navigatorBorderColor: "#14171a",
            keyboardNavEnabled: false,
            crossOriginPolicy: false,
            imageLoaderLimit: 6,
            maxTilesPerFrame: 12,
            blendTime: 0,
            animationTime: 0.35,
            springStiffness: 9,
            zoomPerScroll: 1.3,
            maxZoomPixelRatio: 40,
            minZoomImageRatio: 0.6,
            visibilityRatio: 0.2,
            smoothTileEdgesMinZoom: Infinity,
            preserveImageSizeOnResize: true,
            gestureSettingsMouse: { clickToZoom: false },
            gestureSettingsTouch: { pinchRotate: false },
        });
        this.layer = new HeatLayer(this.viewer, tiles, this.width);
        this.marks = document.createElement("canvas");
        this.marks.className = "layer marks";
        this.viewer.canvas.append(this.marks);
        this.regions = [];
        this.legend = null;
        this.legendCanvas = container.querySelector(".legend");
        this.scaleCanvas = container.querySelector(".scale");
        this.zoomText = container.querySelector(".zoom");
        this.ready = new Promise((resolve) => this.viewer.addOnceHandler("open", resolve));
        this.viewer.addHandler("update-viewport", () => {
            this.#drawMarks();
            this.#drawScale();
            moved(this);
        });
        this.viewer.addHandler("resize", () => requestAnimationFrame(() => this.#placeLegend()));
        let told = false;
        this.viewer.addHandler("tile-load-failed", async ({ tile }) => {
            if (told) return;
            told = true;
            const response = await fetch(tile.getUrl()); // OpenSeadragon does not hear why
            if (!response.ok) failed(`Part of the slide cannot be shown: ${await reason(response)}`);
        });
        this.stage.addEventListener("pointermove", (event) => pointed(this, this.#pointAt(event)));
        this.stage.addEventListener("pointerleave", () => pointed(this, null));
    }

    /** Resolves once OpenSeadragon, which looks at its size only between frames, knows the size it has now. */
    async sized() {
        while (Math.abs(this.viewer.viewport.getContainerSize().x - this.stage.clientWidth) > 1) {
            this.viewer.forceResize();
            await new Promise(requestAnimationFrame);
        }
    }

    destroy() {
        this.layer.destroy();
        this.viewer.destroy();
        this.container.remove();
    }

    #pointAt(event) {
        const { left, top } = this.viewer.canvas.getBoundingClientRect();
        const { x, y } = this.viewer.viewport.pointFromPixel(
            new OpenSeadragon.Point(event.clientX - left, event.clientY - top), true,
        );
        return [y * this.width, x * this.width];
    }

    /** `[y, x, level-0 px a screen px]` of the middle, as it is on the screen now. */
    view() {
        const { viewport } = this.viewer;
        const { x, y } = viewport.getCenter(true);
        return [y * this.width, x * this.width, this.width / (viewport.getZoom(true) * viewport.getContainerSize().x)];
    }

    /** Show `[y, x, level-0 px a screen px]`. */
    setView([y, x, size], { immediately = true } = {}) {
        const { viewport } = this.viewer;
        viewport.zoomTo(this.width / (size * viewport.getContainerSize().x), null, immediately);
        viewport.panTo(new OpenSeadragon.Point(x / this.width, y / this.width), immediately);
    }

    home() {
        this.viewer.viewport.goHome();
    }

    /** Zoom by a factor about the middle. */
    zoom(factor) {
        this.viewer.viewport.zoomBy(factor);
        this.viewer.viewport.applyConstraints();
    }

    /** Move by shares of what is seen. */
    pan(right, down) {
        const { width, height } = this.viewer.viewport.getBounds();
        this.viewer.viewport.panBy(new OpenSeadragon.Point(right * width, down * height));
        this.viewer.viewport.applyConstraints();
    }

    /** Show a level-0 box `[[y0, x0], [y1, x1]]` with a good deal around it. */
    goTo([[y0, x0], [y1, x1]]) {
        const { x, y } = this.viewer.viewport.getContainerSize();
        const size = Math.max((y1 - y0) / y, (x1 - x0) / x) * 2.5;
        this.setView([(y0 + y1) / 2, (x0 + x1) / 2, size], { immediately: false });
    }

    /** Show another map, and measure by its run. */
    setMap(pyramid) {
        this.layer.setMap(pyramid);
        this.#drawScale();
    }

    setLegend(legend) {
        this.legend = legend;
        this.legendCanvas.hidden = !legend;
        if (!legend) return;
        const height = drawLegend(this.legendCanvas.getContext("2d"), legend, 0, 0, { dry: true });
        drawLegend(sharpCanvas(this.legendCanvas, LEGEND_WIDTH, height), legend, 0, 0);
        this.legendCanvas.setAttribute("aria-label", `Legend: ${legendText(legend)}`);
        this.#placeLegend();
    }

    /** Below the slide's corner where there is room, away from it where there is none. */
    #placeLegend() {
        const { clientHeight, clientWidth } = this.container;
        this.container.classList.toggle("small", clientHeight < 360 || clientWidth < 420);
    }

    setRegions(regions) {
        this.regions = regions;
        this.#drawMarks();
    }

    #drawMarks() {
        if (!this.viewer.drawer) return;
        const { width, height } = this.viewer.drawer.canvas;
        if (this.marks.width !== width || this.marks.height !== height) Object.assign(this.marks, { width, height });
        const context = this.marks.getContext("2d");
        context.clearRect(0, 0, width, height);
        if (!this.regions.length || !this.viewer.world.getItemCount()) return;
        const place = this.layer.place();
        const ratio = OpenSeadragon.pixelDensityRatio;
        context.font = `600 ${12 * ratio}px system-ui, sans-serif`;
        context.textBaseline = "top";
        for (const { rank, box_l0: [[y0, x0], [y1, x1]] } of this.regions) {
            const [left, top] = [place.x + place.scale * x0, place.y + place.scale * y0];
            const [across, down] = [place.scale * (x1 - x0), place.scale * (y1 - y0)];
            context.strokeStyle = "rgba(255,255,255,0.9)";
            context.lineWidth = 4 * ratio;
            context.strokeRect(left, top, across, down);
            context.strokeStyle = "#1a1d20";
            context.lineWidth = 2 * ratio;
            context.strokeRect(left, top, across, down);
            const text = String(rank);
            const wide = context.measureText(text).width + 8 * ratio;
            context.fillStyle = "#1a1d20";
            context.fillRect(left - ratio, top - 17 * ratio, wide, 17 * ratio);
            context.fillStyle = "#ffffff";
            context.fillText(text, left + 3 * ratio, top - 15 * ratio);
        }
    }

    /** Size of a level-0 px `[y, x]`, as the run shown was told it. */
    get spacing() {
        return this.layer.pyramid?.spacing ?? this.image.source.spacing;
    }

    /** Size of a screen px, in the slide's unit (columns). */
    pixelSize() {
        const [, , l0] = this.view();
        return { size: l0 * this.spacing[1], unit: this.image.source.spacing_unit };
    }

    #drawScale() {
        if (!this.viewer.world.getItemCount()) return;
        const { size, unit } = this.pixelSize();
        const bar = scaleBar(size, unit, Math.min(180, this.container.clientWidth / 4));
        const text = `${length(size, unit)} a px, about ${number(10 / (unit === "mm" ? size * 1000 : size), 2)}×`;
        if (this.zoomText.textContent !== text) this.zoomText.textContent = text;
        if (this.bar?.px === bar.px && this.bar?.text === bar.text) return;
        this.bar = bar;
        drawScale(sharpCanvas(this.scaleCanvas, bar.px + 20, SCALE_HEIGHT), bar, 0, 0);
        this.scaleCanvas.setAttribute("aria-label", `Scale bar: ${bar.text}`);
    }
}
