"""Write the viewer's colour tables, `workers/viewer/static/tables.js`, from matplotlib's and the overview's own.

python deploy/colour_tables.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from workers.export.figure import colours

TARGET = Path(__file__).resolve().parents[1] / "workers" / "viewer" / "static" / "tables.js"
NAMES = ("viridis", "cividis", "magma", "gray")


def source() -> str:
    """The module's text: 256 colours a table, six hexadecimal digits a colour."""
    tables = {name: np.rint(mpl.colormaps[name](np.arange(256))[:, :3] * 255) for name in NAMES}
    tables["signed"] = colours(signed=True)
    rows = [f'    {name}: "{table.astype(np.uint8).tobytes().hex()}",\n' for name, table in tables.items()]
    return (
        "// Written by deploy/colour_tables.py: 256 colours a table, RRGGBB each. `signed` is blue - grey - orange about zero.\n"
        f"export const TABLES = {{\n{''.join(rows)}}};\n"
    )


if __name__ == "__main__":
    TARGET.write_text(source(), encoding="utf-8")
