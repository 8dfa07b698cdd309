/** What a chart shows, as text: the newest value, a sentence per line, and a table. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import type { ILine } from './chart';
import { Metric } from './curves';
import { formatCount, formatValue } from './format';
import { metricWord } from './metrics';
import { align, ISeries } from './thin';

/** Rows of the table: the newest steps. */
const TABLE_ROWS = 100;

/** A screen reader hears the values no more often than this. */
const SPOKEN_MS = 3000;

/** A line of text, and the same as a status that changes no more often than a person can listen to. */
export function Reading({ parts }: { parts: [string, string] }): JSX.Element {
  const text = parts.filter(Boolean).join(': ');
  const newest = React.useRef(text);
  newest.current = text;
  const [spoken, setSpoken] = React.useState(text);
  React.useEffect(() => {
    const timer = window.setInterval(
      () => setSpoken(newest.current),
      SPOKEN_MS
    );
    return () => window.clearInterval(timer);
  }, []);
  return (
    <>
      <p className="jp-Tuft-reading" aria-hidden="true">
        {parts[0] && <span className="jp-Tuft-ellipsis">{parts[0]}</span>}
        <span>{parts[1]}</span>
      </p>
      <p className="jp-Tuft-spoken" role="status">
        {spoken}
      </p>
    </>
  );
}

/** The index of the lowest value, or -1. */
export function lowest({ y }: ISeries): number {
  let best = -1;
  y.forEach((value, i) => {
    if (value !== null && (best < 0 || value < y[best]!)) {
      best = i;
    }
  });
  return best;
}

/** From where to where a line went, in one sentence. */
export function sentence(
  line: ILine,
  metric: Metric,
  trans: TranslationBundle
): string {
  const points = line.y
    .map((value, i) => [line.x[i], value] as const)
    .filter(([, value]) => value !== null);
  if (!points.length) {
    return trans.__('%1 has no value yet.', line.label);
  }
  const [first, last] = [points[0], points[points.length - 1]];
  const low = points.reduce((a, b) => (b[1]! < a[1]! ? b : a));
  return trans.__(
    '%1: %2 went from %3 to %4 over %5 points, the lowest was %6.',
    line.label,
    metricWord(metric, trans).toLowerCase(),
    formatValue(first[1]),
    formatValue(last[1]),
    formatCount(points.length),
    formatValue(low[1])
  );
}

/** The newest values of all lines. */
export function Table(props: {
  lines: readonly ILine[];
  /** What the first column is called, and how its values are written. */
  head: string;
  xLabel: (x: number) => string;
  trans: TranslationBundle;
}): JSX.Element {
  const { lines, trans } = props;
  const length = Math.max(0, ...lines.map(({ x }) => x.length));
  const { x, y } = align(
    lines.map(line => ({
      x: line.x.slice(-TABLE_ROWS),
      y: line.y.slice(-TABLE_ROWS)
    }))
  );
  const rows = x.map((_, i) => i).slice(-TABLE_ROWS);
  rows.reverse();
  return (
    <div
      className="jp-Tuft-table"
      role="region"
      aria-label={trans.__('Values by step')}
      tabIndex={0}
    >
      <table>
        <thead>
          <tr>
            <th scope="col">{props.head}</th>
            {lines.map((line, i) => (
              <th scope="col" key={i} title={line.label}>
                {line.label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(i => (
            <tr key={x[i]}>
              <th scope="row">{props.xLabel(x[i])}</th>
              {y.map((column, k) => (
                <td key={k}>{formatValue(column[i])}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      {length > TABLE_ROWS && (
        <p>
          {trans.__(
            'The newest %1 of %2 points.',
            TABLE_ROWS,
            formatCount(length)
          )}
        </p>
      )}
    </div>
  );
}
