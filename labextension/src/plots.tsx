/** The chart of the shown runs, its metric, and the same values as text and as a table. */
import { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import type { Chart, ILine } from './chart';
import { align, IAligned, latest, lineOf, Metric, METRICS } from './curves';
import { formatCount, formatValue } from './format';
import { IRun, IState } from './model';
import { phaseOf } from './names';
import { Section } from './parts';

/** Rows of the table: the newest steps. */
const TABLE_ROWS = 100;

/** A screen reader hears the values no more often than this. */
const SPOKEN_MS = 3000;

/** Props of {@link Curves}. */
export interface ICurvesProps {
  state: IState;
  names: Map<string, string>;
  shown: ReadonlySet<string>;
  metric: Metric;
  onMetric: (metric: Metric) => void;
  /** Counts theme changes. */
  theme: number;
  now: number;
  trans: TranslationBundle;
}

function metricWord(metric: Metric, trans: TranslationBundle): string {
  switch (metric) {
    case 'loss':
      return trans.__('Loss');
    case 'grad_norm':
      return trans.__('Gradient norm');
    case 'learning_rate':
      return trans.__('Learning rate');
    case 'tokens':
      return trans.__('Tokens per step');
  }
}

/** See the head of the file. */
export function Curves(props: ICurvesProps): JSX.Element {
  const { state, metric, trans } = props;
  const [asTable, setAsTable] = React.useState(false);
  const runs: IRun[] = [];
  const lines: ILine[] = [];
  [...state.runs.values()].forEach((run, index) => {
    if (props.shown.has(run.id)) {
      runs.push(run);
      lines.push({
        label: props.names.get(run.id) ?? run.id,
        ...lineOf(index),
        live: phaseOf(run, props.now) === 'training'
      });
    }
  });
  const aligned = align(runs, metric);
  const actions = (
    <>
      <HTMLSelect
        aria-label={trans.__('Metric')}
        value={metric}
        onChange={event => props.onMetric(event.target.value as Metric)}
      >
        {METRICS.map(m => (
          <option key={m} value={m}>
            {metricWord(m, trans)}
          </option>
        ))}
      </HTMLSelect>
      <button
        className="jp-Tuft-textButton"
        aria-pressed={asTable}
        onClick={() => setAsTable(!asTable)}
      >
        {asTable ? trans.__('Chart') : trans.__('Table')}
      </button>
    </>
  );
  return (
    <Section title={trans.__('Curves')} actions={actions}>
      {asTable ? (
        <Table lines={lines} aligned={aligned} trans={trans} />
      ) : (
        <Canvas lines={lines} aligned={aligned} {...props} />
      )}
      <Reading parts={reading(runs, lines, metric, trans)} />
    </Section>
  );
}

/** The newest value of the run that was busy last: whose (with several runs), and what. */
function reading(
  runs: IRun[],
  lines: ILine[],
  metric: Metric,
  trans: TranslationBundle
): [string, string] {
  if (!runs.length) {
    return ['', trans.__('No run is chosen: click one below.')];
  }
  const newest = runs.reduce((best, run) =>
    run.last_request >= best.last_request ? run : best
  );
  const values = trans.__(
    'step %1, %2 %3',
    formatCount(newest.step),
    metricWord(metric, trans).toLowerCase(),
    formatValue(latest(newest, metric))
  );
  return [runs.length > 1 ? lines[runs.indexOf(newest)].label : '', values];
}

/** A line of text, and the same as a status that changes no more often than a person can listen to. */
function Reading({ parts }: { parts: [string, string] }): JSX.Element {
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

function Canvas(
  props: ICurvesProps & { lines: ILine[]; aligned: IAligned }
): JSX.Element {
  const { lines, aligned, metric, theme, trans } = props;
  const host = React.useRef<HTMLDivElement>(null);
  const [chart, setChart] = React.useState<Chart | null>(null);
  React.useEffect(() => {
    let made: Chart | null = null;
    let gone = false;
    // The drawing library is the larger half of the extension: it comes with the first run.
    void import('./chart').then(module => {
      if (!gone) {
        made = new module.Chart(host.current!, step =>
          trans.__('step %1', formatCount(step))
        );
        setChart(made);
      }
    });
    return () => {
      gone = true;
      made?.dispose();
    };
  }, [trans]);
  React.useEffect(() => chart?.update(lines, aligned.steps, aligned.values));
  React.useEffect(() => chart?.redraw(), [chart, theme]);
  return (
    <div className="jp-Tuft-chart">
      <div
        ref={host}
        role="img"
        aria-label={trans.__('%1 over steps', metricWord(metric, trans))}
      />
      {aligned.steps.length === 0 && (
        <p className="jp-Tuft-chartEmpty">
          {lines.length > 0 && trans.__('The first step is still to come.')}
        </p>
      )}
    </div>
  );
}

function Table(props: {
  lines: ILine[];
  aligned: IAligned;
  trans: TranslationBundle;
}): JSX.Element {
  const { steps, values } = props.aligned;
  const { trans } = props;
  const rows = steps.map((_, i) => i).slice(-TABLE_ROWS);
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
            <th scope="col">{trans.__('step')}</th>
            {props.lines.map((line, i) => (
              <th scope="col" key={i} title={line.label}>
                {line.label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(i => (
            <tr key={steps[i]}>
              <th scope="row">{formatCount(steps[i])}</th>
              {values.map((column, k) => (
                <td key={k}>{formatValue(column[i])}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      {steps.length > TABLE_ROWS && (
        <p>
          {trans.__(
            'The newest %1 of %2 steps.',
            TABLE_ROWS,
            formatCount(steps.length)
          )}
        </p>
      )}
    </div>
  );
}
