// Numbers, lengths and words as people read them.

export const INTENDED_USE = "For research use only. Not for use in diagnostic procedures.";

export const COVERAGE = ["pending", "evaluated", "failed", "background", "left out", "outside"];
export const PENDING = 0, EVALUATED = 1, FAILED = 2, BACKGROUND = 3, LEFT_OUT = 4, OUTSIDE = 5;
export const COVERAGE_WORDS = [
    "not computed yet", "evaluated", "failed: no value", "background: not evaluated", "left out by choice", "outside the image",
];

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A power of ten, written. */
export const tenTo = (power) => `10${[...String(power)].map((sign) => RAISED[sign]).join("")}`;

/** What to divide a scale's numbers by, as a power of ten, so that they stay short; mostly 0. */
export function commonPower(numbers) {
    const power = Math.floor(Math.log10(Math.max(...numbers.map(Math.abs))));
    return power > -3 && power < 4 ? 0 : power;
}

/** Significant digits, a true minus sign, a written power of ten where the number is very small or large. */
export function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
        const [mantissa, power] = value.toExponential(digits - 1).split("e");
        return `${mantissa.replace("-", "−")} × ${tenTo(Number(power))}`;
    }
    return String(Number(value.toPrecision(digits))).replace("-", "−");
}

/** Whole numbers with thin spaces between thousands. */
export const grouped = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f");

/** A length given in `um` or `mm`, in the unit people would use. */
export function length(size, unit, digits = 3) {
    const um = unit === "mm" ? size * 1000 : size;
    return Math.abs(um) >= 1000 ? `${number(um / 1000, digits)} mm` : `${number(um, digits)} µm`;
}

/** The largest of 1, 2, 5 times a power of ten that is not above `most`. */
export function niceLength(most) {
    const power = 10 ** Math.floor(Math.log10(most));
    return Math.max(...[1, 2, 5].map((m) => m * power).filter((v) => v <= most * (1 + 1e-9)));
}

/** Array-order sizes as `x × y (× z)`, once where all are equal. */
export function sides(sizes, unit) {
    const shown = [...sizes].reverse().map((size) => number(size));
    const name = unit === "um" ? "µm" : unit;
    return new Set(shown).size === 1 ? `${shown[0]} ${name}` : `${shown.join(" × ")} ${name}`;
}

const UNITS = {
    logit: "logit", "logit/cell": "logit per cell", score: "unit of the score",
    "score/cell": "unit of the score, per cell", 1: "no unit",
};
export const unitWords = (unit) => UNITS[unit] ?? unit;

/** Seconds as people say them. */
export function duration(seconds) {
    if (!seconds) return "";
    if (seconds < 90) return `${number(seconds, 2)} s`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${number(seconds / 3600, 2)} h`;
}

/** A score of a report: over tiles it has a mean and a highest value, of a bag it is one number. */
export const scoreWords = ({ mean, highest, quantity }) =>
    highest === null ? `${number(mean)} (${quantity})` : `mean ${number(mean)}, highest ${number(highest)} (${quantity})`;
