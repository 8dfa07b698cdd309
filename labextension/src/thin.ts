/** Lines of any length, brought onto one axis in no more points than a screen has columns for. Pure. */

/** A line: `x` never falls, `y` has a value, or null where there is none, for each of them. */
export interface ISeries {
  x: readonly number[];
  y: readonly (number | null)[];
}

/** Several lines over one axis. `undefined`: the line has no point there. */
export interface IAligned {
  x: number[];
  y: (number | null | undefined)[][];
}

/** The first index at which `x` is at least `value`. */
export function lowerBound(x: readonly number[], value: number): number {
  let low = 0;
  let high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/** The index whose `x` is closest to `value`, or -1 for an empty line. */
export function nearest(x: readonly number[], value: number): number {
  const right = Math.min(lowerBound(x, value), x.length - 1);
  const left = Math.max(right - 1, 0);
  return x.length && value - x[left] < x[right] - value ? left : right;
}

/** From the first to the last `x` of all lines, or null where there is none. */
export function extent(lines: readonly ISeries[]): [number, number] | null {
  const filled = lines.filter(({ x }) => x.length > 0);
  return filled.length
    ? [
        Math.min(...filled.map(({ x }) => x[0])),
        Math.max(...filled.map(({ x }) => x[x.length - 1]))
      ]
    : null;
}

/**
 * What of `lines` lies between `from` and `to`, and one point beyond on either side.
 *
 * As it is where that is few points; else per column the lowest and the highest value of each line, in the order in
 * which they came: what is drawn covers the same pixels, whatever the number of points.
 */
export function thin(
  lines: readonly ISeries[],
  from: number,
  to: number,
  columns: number
): IAligned {
  const parts = lines.map(({ x }) => [
    Math.max(0, lowerBound(x, from) - 1),
    Math.min(x.length, lowerBound(x, to) + 2)
  ]);
  const longest = Math.max(0, ...parts.map(([start, end]) => end - start));
  return longest <= 2 * columns
    ? exact(lines, parts)
    : extremes(lines, parts, from, (to - from) / columns, columns);
}

/** Every point of every line. */
export function align(lines: readonly ISeries[]): IAligned {
  return exact(
    lines,
    lines.map(({ x }) => [0, x.length])
  );
}

function exact(lines: readonly ISeries[], parts: number[][]): IAligned {
  const all: number[] = [];
  lines.forEach(({ x }, k) => {
    for (let i = parts[k][0]; i < parts[k][1]; i++) {
      all.push(x[i]);
    }
  });
  const sorted = Float64Array.from(all).sort();
  const x: number[] = [];
  for (const value of sorted) {
    if (!x.length || x[x.length - 1] !== value) {
      x.push(value);
    }
  }
  const y = lines.map((line, k) => {
    let [i] = parts[k];
    const [, end] = parts[k];
    return x.map(value => {
      let here: number | null | undefined;
      while (i < end && line.x[i] <= value) {
        here = line.y[i++]; // of several at one place, the last
      }
      return here;
    });
  });
  return { x, y };
}

function extremes(
  lines: readonly ISeries[],
  parts: number[][],
  from: number,
  width: number,
  columns: number
): IAligned {
  // One column more on either side holds the points beyond the edges.
  const x: number[] = [];
  for (let column = -1; column <= columns; column++) {
    x.push(from + (column + 0.25) * width, from + (column + 0.75) * width);
  }
  const y = lines.map((line, k) => {
    const out = new Array<number | null | undefined>(x.length).fill(undefined);
    const lowAt = new Int32Array(columns + 2).fill(-1);
    const highAt = new Int32Array(columns + 2).fill(-1);
    for (let i = parts[k][0]; i < parts[k][1]; i++) {
      const value = line.y[i];
      if (value === null) {
        continue;
      }
      const c =
        1 +
        Math.min(columns, Math.max(-1, Math.floor((line.x[i] - from) / width)));
      if (lowAt[c] < 0) {
        lowAt[c] = highAt[c] = i;
      } else if (value < line.y[lowAt[c]]!) {
        lowAt[c] = i;
      } else if (value > line.y[highAt[c]]!) {
        highAt[c] = i;
      }
    }
    for (let c = 0; c < lowAt.length; c++) {
      if (lowAt[c] >= 0) {
        out[2 * c] = line.y[Math.min(lowAt[c], highAt[c])];
        out[2 * c + 1] = line.y[Math.max(lowAt[c], highAt[c])];
      }
    }
    return out;
  });
  return { x, y };
}
