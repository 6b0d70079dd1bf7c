"""`qupath_overlay.groovy`: a script for QuPath that lays `heatmap.ome.tif` over the open slide."""

from __future__ import annotations

from pathlib import Path
from string import Template

from schemas.heatmap import ChannelInfo
from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.overlay import FULL_ALPHA, SHOWN_FROM
from workers.export.overview import display_window
from workers.export.words import INTENDED_USE, UNITS

HEATMAP = "heatmap.ome.tif"
WRITTEN_FOR = "0.6 and 0.7"


def write(context: ExportContext, path: Path) -> None:
    """The script, with the colours, windows and registration of this heatmap.

    It colours the values itself: QuPath's own colour maps look at the first channel only where pixels are floats, and its
    transforming image server reads a scaled heatmap coarser than the screen. The OME-TIFF may be written again with other
    channels, so that the script shows nothing where it does not find those it was written with.
    """
    info = context.info
    names, windows, signs = [], [], []
    for c in context.channels:
        row = info.channels[c]
        names.append(quoted(f"{row.label} [{UNITS[row.unit]}]"))
        low, high = display_window(context.heatmap, c, 0)
        windows.append(f"[{low!r}d, {high!r}d]")
        signs.append(str(row.signed).lower())
    height, width = info.grid.shape_l0
    down_y, down_x = info.grid.downsample
    text = _SCRIPT.substitute(
        about="\n".join(f" * {line}" for line in _comment(statement.text(context)).splitlines()),
        versions=WRITTEN_FOR,
        heatmap=quoted(str(context.folder.resolve() / "export" / HEATMAP)),
        channels=", ".join(quoted(info.channels[c].label) for c in context.channels),
        names=", ".join(names),
        windows=", ".join(windows),
        signs=", ".join(signs),
        width=width,
        height=height,
        down_x=down_x,
        down_y=down_y,
        unsigned=_table(signed=False),
        signed=_table(signed=True),
        shown_from=SHOWN_FROM,
        full_alpha=FULL_ALPHA,
        intended_use=quoted(INTENDED_USE),
        legend=", ".join(quoted(_legend(info.channels[c])) for c in context.channels),
    )
    path.write_text(text, encoding="utf-8")


def quoted(text: str) -> str:
    r"""A Groovy string: single quotes, in which `$` means nothing, and everything unusual as an escape.

    >>> quoted("C:\\slides\\it's $5")
    "'C:\\\\slides\\\\it\\'s $5'"
    """
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    units = memoryview(escaped.encode("utf-16-le")).cast("H")
    return "'" + "".join(chr(u) if 32 <= u < 127 else f"\\u{u:04x}" for u in units) + "'"


def _comment(text: str) -> str:
    r"""Text that cannot end a comment, in ASCII; `\u` would be read as a character even there."""
    plain = text.replace("*/", "* /").replace("\\", "/").replace("µ", "u").replace("×", "x")
    return plain.encode("ascii", "replace").decode()


def _table(signed: bool) -> str:
    packed = [f"0x{r:02x}{g:02x}{b:02x}" for r, g, b in colours(signed).tolist()]
    return ",\n    ".join(", ".join(packed[n : n + 12]) for n in range(0, len(packed), 12))


def _legend(row: ChannelInfo) -> str:
    return "orange: for the target, blue: against it" if row.signed else "dark to yellow: weak to strong"


_SCRIPT = Template(r"""/*
$about
 *
 * Written by gigacam for QuPath $versions from its published interface; it was not run there before it was
 * given to you. Open the slide, then run this in the script editor. Opacity: the slider of the toolbar.
 * Change `channel` to see another one. To remove the overlay: getCurrentViewer().resetCustomPixelLayerOverlay()
 */
import java.awt.image.BufferedImage
import javafx.application.Platform
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.images.servers.ImageServers
import qupath.lib.regions.ImageRegion
import qupath.lib.regions.RegionRequest

int channel = 0
def heatmap = new File($heatmap)

def channels = [$channels]   // as the file calls them
def names = [$names]
def legends = [$legend]
def windows = [$windows]
def signed = [$signs]
int slideWidth = $width, slideHeight = $height
double downX = $down_x, downY = $down_y   // level-0 px of the slide a heatmap px
double maxPixels = 3.2e7                   // of the overlay in memory, 4 bytes each

int[] viridis = [
    $unsigned
] as int[]
int[] diverging = [
    $signed
] as int[]

def viewer = getCurrentViewer()
def slide = viewer?.getImageData()?.getServer()
if (slide == null) {
    println 'Open the slide first.'
    return
}
if (slide.getWidth() != slideWidth || slide.getHeight() != slideHeight) {
    println "The open image is $${slide.getWidth()} x $${slide.getHeight()} px, the heatmap was made for a slide of $${slideWidth} x $${slideHeight}: nothing is shown."
    return
}
if (!heatmap.exists()) {
    println "$${heatmap} is not there: set `heatmap` in this script to where heatmap.ome.tif lies now."
    return
}

def server = ImageServers.buildServer(heatmap.toURI().toString())
def found = server.getMetadata().getChannels().collect { it.getName() }
if (found != channels) {
    println "$${heatmap} holds the channels $${found}, this script was written for $${channels}: nothing is shown. Export qupath once more, which writes both."
    return
}
double low = windows[channel][0], high = windows[channel][1]
int[] colours = signed[channel] ? diverging : viridis

// The finest level that fits into memory.
double downsample = 1
while (server.getWidth() / downsample * (server.getHeight() / downsample) > maxPixels)
    downsample *= 2

def regions = new LinkedHashMap<ImageRegion, BufferedImage>()
int step = (int) (2048 * downsample)
for (int y = 0; y < server.getHeight(); y += step) {
    for (int x = 0; x < server.getWidth(); x += step) {
        int w = Math.min(step, server.getWidth() - x)
        int h = Math.min(step, server.getHeight() - y)
        def raster = server.readRegion(RegionRequest.createInstance(server.getPath(), downsample, x, y, w, h)).getRaster()
        int columns = raster.getWidth(), rows = raster.getHeight()
        float[] values = raster.getSamples(0, 0, columns, rows, channel, (float[]) null)
        int[] argb = new int[values.length]
        boolean any = false
        for (int i = 0; i < values.length; i++) {
            double value = values[i]
            if (Double.isNaN(value))
                continue   // nobody looked: transparent
            double share = Math.max(0d, Math.min(1d, (value - low) / (high - low)))
            double strength = signed[channel] ? Math.abs(2 * share - 1) : share
            double grown = (strength - $shown_from) / (1 - $shown_from)
            if (grown <= 0)
                continue
            int alpha = (int) Math.round(255 * $full_alpha * Math.pow(grown, 0.6))
            argb[i] = (alpha << 24) | colours[(int) Math.rint(share * 255)]
            any = true
        }
        if (!any)
            continue
        def picture = new BufferedImage(columns, rows, BufferedImage.TYPE_INT_ARGB)
        picture.setRGB(0, 0, columns, rows, argb, 0, columns)
        // From the picture's own size: the last px of a level may reach past the slide.
        def place = ImageRegion.createInstance(
            (int) Math.round(x * downX), (int) Math.round(y * downY),
            (int) Math.round(columns * downsample * downX), (int) Math.round(rows * downsample * downY), 0, 0)
        regions.put(place, picture)
    }
}

Platform.runLater {
    viewer.setCustomPixelLayerOverlay(new BufferedImageOverlay(viewer.getOverlayOptions(), regions))
    viewer.repaint()
}
println "$${names[channel]}: $${low} to $${high}, $${legends[channel]}. A px of the overlay is $${downX * downsample} x $${downY * downsample} px of the slide."
println $intended_use
""")
