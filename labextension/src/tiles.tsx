/** The switch between metrics, one tile each: its newest value and its shape. */
import * as React from 'react';
import { busiest, latest, offeredMetrics } from './curves';
import { formatCount, formatValue } from './format';
import { IIndexed, lineOfRun } from './lines';
import { metricWord } from './metrics';
import { IRunViewProps } from './runviewstate';
import { Spark } from './spark';

/** In a tile the trend counts, not the noise. */
const SPARK_SMOOTHING = 0.7;

/** One tile for each metric that one of the runs has. */
export function Tiles(
  props: IRunViewProps & { chosen: readonly IIndexed[] }
): JSX.Element {
  const { chosen, view, now, trans, onView } = props;
  const runs = chosen.map(({ run }) => run);
  const offered = offeredMetrics(runs, view.metric);
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
        const newest = latest(busiest(runs, metric), metric);
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
              {newest !== null && metric.startsWith('tokens')
                ? formatCount(newest)
                : formatValue(newest)}
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
