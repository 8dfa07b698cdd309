/** The large chart of a run view, with its controls, the same values as a table and in words, and the keys it knows. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { Canvas, emptyWord } from './canvas';
import type { Chart, IChartOptions, ILine, IPick } from './chart';
import { Controls } from './controls';
import { Metric, seriesOf } from './curves';
import { formatCount, formatDuration } from './format';
import { IIndexed, lineOfRun } from './lines';
import { metricWord } from './metrics';
import { IRun } from './objects';
import { reading, stepTick } from './plots';
import { Reading, sentence, Table } from './readings';
import { IPicked, IRunViewProps } from './runviewstate';

/** Props of {@link Figure}. */
export interface IFigureProps extends IRunViewProps {
  chosen: readonly IIndexed[];
  onPick: (picked: IPicked) => void;
  theme: number;
}

/** See the head of the file. */
export function Figure(props: IFigureProps): JSX.Element {
  const { chosen, view, names, now, trans, onPick } = props;
  const [asTable, setAsTable] = React.useState(false);
  const [zoomed, setZoomed] = React.useState(false);
  const chart = React.useRef<Chart | null>(null);
  const summary = React.useId();
  const lines = chosen.map(({ run, index }) =>
    lineOfRun(
      run,
      index,
      names.get(run.id) ?? run.id,
      now,
      view.metric,
      view.axis,
      view.smoothing
    )
  );
  // The chart calls back long after it was made, when other runs may be chosen.
  const current = React.useRef({ chosen, onPick });
  current.current = { chosen, onPick };
  const bySteps = view.axis === 'step';
  const options = React.useMemo(
    (): IChartOptions => ({
      height: null,
      xLabel: bySteps
        ? step => trans.__('step %1', formatCount(step))
        : formatDuration,
      xTick: bySteps ? stepTick : formatDuration,
      wholeX: bySteps,
      log: view.log,
      onZoom: range => setZoomed(range !== null),
      onPick: ({ line, index }) => {
        const { run } = current.current.chosen[line];
        current.current.onPick({ run: run.id, step: stepsOf(run)[index] });
      }
    }),
    [trans, bySteps, view.log]
  );
  const label = trans.__(
    '%1 over %2',
    metricWord(view.metric, trans),
    bySteps ? trans.__('steps') : trans.__('time')
  );
  return (
    <section className="jp-Tuft-sheet jp-Tuft-figure1">
      <Controls
        {...props}
        asTable={asTable}
        onTable={() => {
          setZoomed(false);
          setAsTable(!asTable);
        }}
        zoomed={zoomed}
        onReset={() => chart.current?.zoom(null)}
        title={label}
      />
      {asTable ? (
        <Table
          lines={lines}
          head={bySteps ? trans.__('step') : trans.__('time')}
          xLabel={bySteps ? formatCount : formatDuration}
          trans={trans}
        />
      ) : (
        <Canvas
          lines={lines}
          options={options}
          picked={pickOf(chosen, view.picked)}
          theme={props.theme}
          label={label}
          describedBy={summary}
          chartRef={chart}
          empty={emptyWord(lines, view.log, trans)}
        />
      )}
      <Reading
        parts={reading(
          chosen.map(({ run }) => run),
          names,
          view.metric,
          trans
        )}
      />
      <InWords id={summary} lines={lines} metric={view.metric} trans={trans} />
    </section>
  );
}

/** The text alternative of the chart, and how it is used from the keyboard. */
function InWords(props: {
  id: string;
  lines: readonly ILine[];
  metric: Metric;
  trans: TranslationBundle;
}): JSX.Element {
  const { id, lines, metric, trans } = props;
  return (
    <details className="jp-Tuft-summary">
      <summary>{trans.__('In words, and keys')}</summary>
      <div id={id}>
        {lines.map((line, k) => (
          <p key={k}>{sentence(line, metric, trans)}</p>
        ))}
        <p>
          {trans.__(
            'Drag to zoom, double click for everything, click a point for its step. With the chart focused: arrow keys walk along the steps, + and − zoom, < and > move, 0 shows everything.'
          )}
        </p>
      </div>
    </details>
  );
}

/** The steps of the run's line, point by point. */
function stepsOf(run: IRun): readonly number[] {
  return seriesOf(run, 'tokens').x;
}

/** Where on the chart a picked step is, or null if it is on none of its lines. */
function pickOf(
  chosen: readonly IIndexed[],
  picked: IPicked | null
): IPick | null {
  const line = chosen.findIndex(({ run }) => run.id === picked?.run);
  if (line < 0 || picked === null || picked.step === null) {
    return null;
  }
  const index = stepsOf(chosen[line].run).indexOf(picked.step);
  return index < 0 ? null : { line, index };
}
