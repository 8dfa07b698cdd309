/** A line of the size of a word. The number beside it is its text. */
import * as React from 'react';
import { extent, ISeries, thin } from './thin';

const WIDTH = 96;
const HEIGHT = 26;
const MARGIN = 2;

/** Props of {@link Spark}. */
export interface ISparkProps {
  lines: readonly (ISeries & { colour: string })[];
}

/** See the head of the file. */
export function Spark({ lines }: ISparkProps): JSX.Element {
  const whole = extent(lines);
  const [from, to] = whole ?? [0, 1];
  const { x, y } = thin(lines, from, to, WIDTH / 2);
  let low = Infinity;
  let high = -Infinity;
  for (const column of y) {
    for (const value of column) {
      if (typeof value === 'number') {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  const across = (value: number) =>
    MARGIN + ((value - from) / (to - from || 1)) * (WIDTH - 2 * MARGIN);
  // what a constant differs by from step to step is rounding, not news
  const up = (value: number) =>
    high - low > 1e-6 * Math.abs(high)
      ? HEIGHT - MARGIN - ((value - low) / (high - low)) * (HEIGHT - 2 * MARGIN)
      : HEIGHT / 2;
  return (
    <svg
      className="jp-Tuft-spark"
      viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
      preserveAspectRatio="none"
      aria-hidden="true"
    >
      {y.map((column, k) => (
        <polyline
          key={k}
          style={{ stroke: `var(${lines[k].colour})` }}
          points={column
            .map((value, i) =>
              typeof value === 'number'
                ? `${across(x[i]).toFixed(1)},${up(value).toFixed(1)}`
                : ''
            )
            .filter(Boolean)
            .join(' ')}
        />
      ))}
    </svg>
  );
}
