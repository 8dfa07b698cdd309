/** The chart as a React component. Its library is the larger half of the extension: it comes with the first chart. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import type { Chart, IChartOptions, ILine, IPick } from './chart';

/** Props of {@link Canvas}. */
export interface ICanvasProps {
  lines: readonly ILine[];
  options: IChartOptions;
  picked?: IPick | null;
  /** Counts theme changes. */
  theme: number;
  label: string;
  /** The id of the element that says in words what the chart shows. */
  describedBy?: string;
  /** What stands in for lines of which there is nothing to draw. */
  empty: string;
  /** Where whoever uses the chart can reach it. */
  chartRef?: React.MutableRefObject<Chart | null>;
}

/** See the head of the file. A chart that can be zoomed can be focused, and used from the keyboard. */
export function Canvas(props: ICanvasProps): JSX.Element {
  const { lines, options, picked, theme, chartRef } = props;
  const host = React.useRef<HTMLDivElement>(null);
  const first = React.useRef(options);
  const [chart, setChart] = React.useState<Chart | null>(null);
  React.useEffect(() => {
    let made: Chart | null = null;
    let gone = false;
    const outer = chartRef;
    void import('./chart').then(module => {
      if (!gone) {
        made = new module.Chart(host.current!, first.current);
        setChart(made);
      }
    });
    return () => {
      gone = true;
      made?.dispose();
      if (outer) {
        outer.current = null;
      }
    };
  }, [chartRef]);
  React.useEffect(() => {
    if (chartRef) {
      chartRef.current = chart;
    }
    chart?.configure(options);
    chart?.update(lines, picked ?? null);
  });
  React.useEffect(() => chart?.redraw(), [chart, theme]);
  const interactive = Boolean(options.onZoom);
  return (
    <div className="jp-Tuft-chart">
      <div
        ref={host}
        className="jp-Tuft-chartHost"
        role={interactive ? 'application' : 'img'}
        tabIndex={interactive ? 0 : undefined}
        aria-label={props.label}
        aria-describedby={props.describedBy}
        onKeyDown={event => {
          if (interactive && chart && press(chart, event)) {
            event.preventDefault();
            event.stopPropagation();
          }
        }}
      />
      {!lines.some(({ y }) => y.some(value => drawn(value, options.log))) && (
        <p className="jp-Tuft-chartEmpty">{props.empty}</p>
      )}
    </div>
  );
}

/** Whether a value has a place on the scale. */
function drawn(value: number | null, log?: boolean): boolean {
  return value !== null && (!log || value > 0);
}

/** What stands in for a chart of `lines` while nothing of them can be drawn. */
export function emptyWord(
  lines: readonly ILine[],
  log: boolean,
  trans: TranslationBundle
): string {
  if (lines.every(({ y }) => y.length === 0)) {
    return trans.__('The first step is still to come.');
  }
  return log
    ? trans.__('No value above zero, which is all that a log scale can show.')
    : trans.__('No value yet.');
}

/** What a key does to a chart; whether it did anything. */
function press(chart: Chart, event: React.KeyboardEvent): boolean {
  if (event.altKey || event.ctrlKey || event.metaKey) {
    return false;
  }
  const page = Math.max(1, Math.round(chart.shownPoints() / 10));
  const keys: { [key: string]: () => void } = {
    ArrowLeft: () => chart.step(event.shiftKey ? -page : -1),
    ArrowRight: () => chart.step(event.shiftKey ? page : 1),
    PageUp: () => chart.step(-page),
    PageDown: () => chart.step(page),
    Home: () => chart.step(-Infinity),
    End: () => chart.step(Infinity),
    '+': () => chart.adjust(0.5),
    '=': () => chart.adjust(0.5),
    '-': () => chart.adjust(2),
    '<': () => chart.adjust(1, -0.25),
    '>': () => chart.adjust(1, 0.25),
    '0': () => chart.zoom(null),
    Escape: () => chart.zoom(null)
  };
  const found = keys[event.key];
  found?.();
  return Boolean(found);
}
