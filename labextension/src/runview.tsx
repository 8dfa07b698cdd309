/** The run view in the main area: one large chart that compares runs, and everything about one of them. */
import { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { Canvas } from './canvas';
import type { Chart, IChartOptions, IPick } from './chart';
import { CommandIDs } from './commandids';
import { Axis, has, latest, Metric, METRICS } from './curves';
import { RunFacts } from './facts';
import { formatCount, formatDuration, formatValue } from './format';
import { chosenRuns, lineOfRun } from './lines';
import { metricWord } from './metrics';
import { IRun } from './model';
import { reading, stepTick } from './plots';
import { Reading, sentence, Table } from './readings';
import { IShown, RUN_MIME } from './shown';
import { Spark } from './spark';

/** What a run view shows; plain JSON, so that it can be restored. */
export interface IRunViewState {
  runs: string[];
  metric: Metric;
  axis: Axis;
  smoothing: number;
  log: boolean;
}

/** Props of {@link RunViewBody}. */
export interface IRunViewProps extends IShown {
  view: IRunViewState;
  onView: (change: Partial<IRunViewState>) => void;
  theme: number;
}

/** In a tile the trend counts, not the noise. */
const SPARK_SMOOTHING = 0.7;

type Indexed = { run: IRun; index: number };

/** See the head of the file. */
export function RunViewBody(props: IRunViewProps): JSX.Element {
  const { view, state, names, now, trans, onView } = props;
  const [asTable, setAsTable] = React.useState(false);
  const [range, setRange] = React.useState<[number, number] | null>(null);
  const [picked, setPicked] = React.useState<{
    run: string;
    step: number | null;
  } | null>(null);
  const [over, setOver] = React.useState(false);
  const chart = React.useRef<Chart | null>(null);
  const summary = React.useId();
  const chosen = chosenRuns(state, new Set(view.runs));
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
  const chosenNow = React.useRef(chosen);
  chosenNow.current = chosen;
  const options = React.useMemo(
    (): IChartOptions => ({
      height: null,
      xLabel: view.axis === 'step' ? stepLabel(trans) : formatDuration,
      xTick: view.axis === 'step' ? stepTick : formatDuration,
      wholeX: view.axis === 'step',
      log: view.log,
      onZoom: setRange,
      onPick: ({ line, index }) => {
        const { run } = chosenNow.current[line];
        setPicked({ run: run.id, step: seriesStep(run, index) });
      }
    }),
    [trans, view.axis, view.log]
  );
  const about =
    chosen.find(({ run }) => run.id === picked?.run) ??
    chosen[chosen.length - 1];
  const label = trans.__(
    '%1 over %2',
    metricWord(view.metric, trans),
    view.axis === 'step' ? trans.__('steps') : trans.__('time')
  );
  return (
    <div
      className={`jp-Tuft-view${over ? ' jp-mod-over' : ''}`}
      onDragOver={event => {
        if (event.dataTransfer.types.includes(RUN_MIME)) {
          event.preventDefault();
          event.dataTransfer.dropEffect = 'copy';
          setOver(true);
        }
      }}
      onDragLeave={event => {
        if (!event.currentTarget.contains(event.relatedTarget as Node)) {
          setOver(false);
        }
      }}
      onDrop={event => {
        const run = event.dataTransfer.getData(RUN_MIME);
        setOver(false);
        if (run) {
          event.preventDefault();
          onView({ runs: [...new Set([...view.runs, run])] });
        }
      }}
    >
      <Legend {...props} chosen={chosen} onAbout={setPicked} about={about} />
      {chosen.length === 0 ? (
        <p className="jp-Tuft-viewEmpty">
          {state.runs.size
            ? trans.__(
                'Choose runs to compare: add them above, or drag them here from the panel.'
              )
            : trans.__('No run yet. Curves appear here with the first step.')}
        </p>
      ) : (
        <>
          <Tiles {...props} chosen={chosen} />
          <div className="jp-Tuft-viewBody">
            <section className="jp-Tuft-sheet jp-Tuft-figure1">
              <Controls
                {...props}
                asTable={asTable}
                onTable={() => {
                  setRange(null);
                  setAsTable(!asTable);
                }}
                zoomed={range !== null}
                onReset={() => chart.current?.zoom(null)}
                title={label}
              />
              {asTable ? (
                <Table
                  lines={lines}
                  head={
                    view.axis === 'step' ? trans.__('step') : trans.__('time')
                  }
                  xLabel={view.axis === 'step' ? formatCount : formatDuration}
                  trans={trans}
                />
              ) : (
                <Canvas
                  lines={lines}
                  options={options}
                  picked={pickOf(chosen, picked)}
                  theme={props.theme}
                  label={label}
                  describedBy={summary}
                  chartRef={chart}
                  empty={trans.__('The first step is still to come.')}
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
              <details className="jp-Tuft-summary">
                <summary>{trans.__('In words, and keys')}</summary>
                <div id={summary}>
                  {lines.map((line, k) => (
                    <p key={k}>{sentence(line, view.metric, trans)}</p>
                  ))}
                  <p>
                    {trans.__(
                      'Drag to zoom, double click for everything, click a point for its step. With the chart focused: arrow keys walk along the steps, + and − zoom, < and > move, 0 shows everything.'
                    )}
                  </p>
                </div>
              </details>
            </section>
            {about && (
              <RunFacts
                {...props}
                {...about}
                step={picked?.run === about.run.id ? picked.step : null}
                onUnpick={() => setPicked({ run: about.run.id, step: null })}
              />
            )}
          </div>
        </>
      )}
    </div>
  );
}

function stepLabel(trans: TranslationBundle): (step: number) => string {
  return step => trans.__('step %1', formatCount(step));
}

/** The step at a point of the run's line. */
function seriesStep(run: IRun, index: number): number {
  return stepsOf(run)[index];
}

function stepsOf(run: IRun): readonly number[] {
  return lineOfRun(run, 0, '', 0, 'tokens').x;
}

function pickOf(
  chosen: Indexed[],
  picked: { run: string; step: number | null } | null
): IPick | null {
  const line = chosen.findIndex(({ run }) => run.id === picked?.run);
  if (line < 0 || picked === null || picked.step === null) {
    return null;
  }
  const index = stepsOf(chosen[line].run).indexOf(picked.step);
  return index < 0 ? null : { line, index };
}

/** The compared runs, and the list from which more are added. */
function Legend(
  props: IRunViewProps & {
    chosen: Indexed[];
    about: Indexed | undefined;
    onAbout: (picked: { run: string; step: null }) => void;
  }
): JSX.Element {
  const { chosen, about, view, state, names, now, trans, onView, commands } =
    props;
  const others = [...state.runs.values()]
    .filter(run => !view.runs.includes(run.id))
    .reverse();
  return (
    <header className="jp-Tuft-legend">
      <ul aria-label={trans.__('Compared runs')}>
        {chosen.map(({ run, index }) => {
          const name = names.get(run.id) ?? run.id;
          const line = lineOfRun(run, index, name, now, view.metric);
          return (
            <li
              key={run.id}
              className={`jp-Tuft-chip${about?.run === run ? ' jp-mod-on' : ''}`}
              style={
                { '--tuft-line': `var(${line.colour})` } as React.CSSProperties
              }
            >
              <button
                aria-pressed={about?.run === run}
                title={trans.__('Show what is known about %1', name)}
                onClick={() => props.onAbout({ run: run.id, step: null })}
              >
                <span
                  className={`jp-Tuft-swatch jp-mod-on${line.dashed ? ' jp-mod-dashed' : ''}`}
                />
                <span className="jp-Tuft-ellipsis">{name}</span>
                <b>{formatValue(latest(run, view.metric))}</b>
              </button>
              <button
                className="jp-Tuft-chipClose"
                aria-label={trans.__('Remove %1 from the comparison', name)}
                title={trans.__('Remove %1 from the comparison', name)}
                onClick={() =>
                  onView({ runs: view.runs.filter(id => id !== run.id) })
                }
              >
                ×
              </button>
            </li>
          );
        })}
      </ul>
      {others.length > 0 && (
        <HTMLSelect
          className="jp-Tuft-select"
          aria-label={trans.__('Add a run to the comparison')}
          value=""
          onChange={event =>
            onView({ runs: [...view.runs, event.target.value] })
          }
        >
          <option value="" disabled>
            {trans.__('Add run…')}
          </option>
          {others.map(run => (
            <option key={run.id} value={run.id}>
              {names.get(run.id) ?? run.id}
            </option>
          ))}
        </HTMLSelect>
      )}
      <span className="jp-Tuft-space" />
      {chosen.length > 0 && (
        <div className="jp-Tuft-controls">
          {['csv', 'jsonl'].map(format => (
            <button
              key={format}
              className="jp-Tuft-textButton"
              title={trans.__('Save the compared metrics as a file')}
              onClick={() =>
                void commands.execute(CommandIDs.exportMetrics, {
                  runs: view.runs,
                  format
                })
              }
            >
              {trans.__('Export %1', format.toUpperCase())}
            </button>
          ))}
        </div>
      )}
    </header>
  );
}

/** One tile for each metric that a run has: its newest value, its shape, and the switch that makes it the large chart. */
function Tiles(props: IRunViewProps & { chosen: Indexed[] }): JSX.Element {
  const { chosen, view, now, trans, onView } = props;
  const offered = METRICS.filter(
    metric =>
      metric === 'loss' ||
      metric === view.metric ||
      chosen.some(({ run }) => has(run, metric))
  );
  const newest = chosen.reduce((best, one) =>
    one.run.last_request >= best.run.last_request ? one : best
  ).run;
  const move = (event: React.KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      const next = offered.indexOf(view.metric) + by;
      const metric = offered[(next + offered.length) % offered.length];
      onView({ metric });
      const group = event.currentTarget;
      window.requestAnimationFrame(() =>
        group.querySelector<HTMLElement>('[aria-checked="true"]')?.focus()
      );
    }
  };
  return (
    <div
      className="jp-Tuft-tiles"
      role="radiogroup"
      aria-label={trans.__('Metric of the chart')}
      onKeyDown={move}
    >
      {offered.map(metric => {
        const on = metric === view.metric;
        return (
          <button
            key={metric}
            role="radio"
            aria-checked={on}
            tabIndex={on ? 0 : -1}
            className={`jp-Tuft-tile${on ? ' jp-mod-on' : ''}`}
            onClick={() => onView({ metric })}
          >
            <span className="jp-Tuft-tileName">
              {metricWord(metric, trans)}
            </span>
            <b>
              {metric === 'tokens_per_second' || metric === 'tokens'
                ? formatCount(latest(newest, metric) ?? 0)
                : formatValue(latest(newest, metric))}
            </b>
            <Spark
              lines={chosen.map(({ run, index }) =>
                lineOfRun(run, index, '', now, metric, 'step', SPARK_SMOOTHING)
              )}
            />
          </button>
        );
      })}
    </div>
  );
}

function Controls(
  props: IRunViewProps & {
    title: string;
    asTable: boolean;
    onTable: () => void;
    zoomed: boolean;
    onReset: () => void;
  }
): JSX.Element {
  const { view, onView, trans } = props;
  return (
    <div className="jp-Tuft-controls">
      <h3>{props.title}</h3>
      <span className="jp-Tuft-space" />
      {props.zoomed && !props.asTable && (
        <button className="jp-Tuft-textButton" onClick={props.onReset}>
          {trans.__('Show everything')}
        </button>
      )}
      <label className="jp-Tuft-slider">
        {trans.__('Smoothing')}
        <input
          type="range"
          min={0}
          max={0.99}
          step={0.01}
          value={view.smoothing}
          onChange={event => onView({ smoothing: Number(event.target.value) })}
        />
        <output>{view.smoothing.toFixed(2)}</output>
      </label>
      <div
        className="jp-Tuft-segments"
        role="group"
        aria-label={trans.__('Horizontal axis')}
      >
        {(['step', 'time'] as Axis[]).map(axis => (
          <button
            key={axis}
            aria-pressed={view.axis === axis}
            onClick={() => {
              props.onReset();
              onView({ axis });
            }}
          >
            {axis === 'step' ? trans.__('Steps') : trans.__('Time')}
          </button>
        ))}
      </div>
      <button
        className="jp-Tuft-textButton"
        aria-pressed={view.log}
        onClick={() => onView({ log: !view.log })}
      >
        {trans.__('Log scale')}
      </button>
      <button
        className="jp-Tuft-textButton"
        aria-pressed={props.asTable}
        onClick={props.onTable}
      >
        {trans.__('Table')}
      </button>
    </div>
  );
}
