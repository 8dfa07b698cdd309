/** The panel's chart of the shown runs, its metric, and the same values as text and as a table. */
import { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { Canvas, emptyWord } from './canvas';
import type { IChartOptions } from './chart';
import { busiest, latest, Metric, offeredMetrics } from './curves';
import { formatCount, formatTick, formatValue } from './format';
import { chosenRuns, lineOfRun } from './lines';
import { metricWord } from './metrics';
import { IRun, IState } from './objects';
import { Section } from './parts';
import { Reading, Table } from './readings';

const HEIGHT = 190;

/** Props of {@link Curves}. */
export interface ICurvesProps {
  state: IState;
  names: Map<string, string>;
  shown: ReadonlySet<string>;
  metric: Metric;
  onMetric: (metric: Metric) => void;
  /** Open the shown runs in a large chart, at a point if one was clicked. */
  onOpen: (picked?: { run: string; step: number }) => void;
  /** Counts theme changes. */
  theme: number;
  now: number;
  trans: TranslationBundle;
}

/** See the head of the file. */
export function Curves(props: ICurvesProps): JSX.Element {
  const { state, metric, names, now, trans } = props;
  const [asTable, setAsTable] = React.useState(false);
  const chosen = chosenRuns(state, props.shown);
  const runs = chosen.map(({ run }) => run);
  const lines = chosen.map(({ run, index }) =>
    lineOfRun(run, index, names.get(run.id) ?? run.id, now, metric)
  );
  // The chart calls back long after it was made, when other runs may be shown.
  const clicked = React.useRef<IChartOptions['onPick']>();
  clicked.current = ({ line, index }) =>
    props.onOpen({ run: runs[line].id, step: lines[line].x[index] });
  const options = React.useMemo(
    (): IChartOptions => ({
      height: HEIGHT,
      onPick: pick => clicked.current?.(pick),
      xLabel: step => trans.__('step %1', formatCount(step)),
      xTick: stepTick,
      wholeX: true
    }),
    [trans]
  );
  const actions = (
    <>
      <HTMLSelect
        aria-label={trans.__('Metric')}
        value={metric}
        onChange={event => props.onMetric(event.target.value as Metric)}
      >
        {offeredMetrics(runs, metric).map(m => (
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
      <button
        className="jp-Tuft-textButton"
        title={trans.__('Open these runs beside your notebook')}
        onClick={() => props.onOpen()}
      >
        {trans.__('Enlarge')}
      </button>
    </>
  );
  return (
    <Section title={trans.__('Curves')} actions={actions}>
      {asTable ? (
        <Table
          lines={lines}
          head={trans.__('step')}
          xLabel={formatCount}
          trans={trans}
        />
      ) : (
        <Canvas
          lines={lines}
          options={options}
          theme={props.theme}
          label={trans.__('%1 over steps', metricWord(metric, trans))}
          empty={lines.length ? emptyWord(lines, false, trans) : ''}
        />
      )}
      <Reading parts={reading(runs, names, metric, trans)} />
    </Section>
  );
}

/** The tick of an axis of steps. */
export function stepTick(step: number, distance: number): string {
  return formatTick(step, Math.max(1, distance));
}

/** The newest value of the run that was busy last: whose (with several runs), and what. */
export function reading(
  runs: IRun[],
  names: Map<string, string>,
  metric: Metric,
  trans: TranslationBundle
): [string, string] {
  if (!runs.length) {
    return ['', trans.__('No run is chosen: click one below.')];
  }
  const newest = busiest(runs, metric);
  const values = trans.__(
    'step %1, %2 %3',
    formatCount(newest.step),
    metricWord(metric, trans).toLowerCase(),
    formatValue(latest(newest, metric))
  );
  return [runs.length > 1 ? (names.get(newest.id) ?? newest.id) : '', values];
}
