/** From a run's curve to what is drawn: which metric, which colour, which steps, how smooth. Pure. */
import { ICurve, IRun } from './objects';
import { ISeries } from './thin';

/** What can be drawn. `tokens_per_second` is computed here, the others are columns of the curve. */
export const METRICS = [
  'loss',
  'kl',
  'grad_norm',
  'learning_rate',
  'tokens_per_second',
  'tokens'
] as const;

/** One of {@link METRICS}. */
export type Metric = (typeof METRICS)[number];

/** What a metric can be drawn against: the step, or the seconds since the run's first step. */
export type Axis = 'step' | 'time';

/** Theme colours that stay apart from one another in the light, the dark and the high-contrast theme. */
const COLOURS = [
  '--jp-brand-color1',
  '--jp-warn-color1',
  '--jp-mirror-editor-operator-color',
  '--jp-success-color1',
  '--jp-mirror-editor-string-color',
  '--jp-info-color1'
];

/** How the `index`-th run is drawn: a CSS variable, dashed once all colours are taken. */
export function lineOf(index: number): { colour: string; dashed: boolean } {
  return {
    colour: COLOURS[index % COLOURS.length],
    dashed: Math.floor(index / COLOURS.length) % 2 === 1
  };
}

interface IKept {
  length: number;
  kept: number[];
}

const histories = new WeakMap<ICurve, IKept>();

/**
 * The entries of a curve that led to the present weights, in order of step.
 *
 * A run that loaded earlier weights counts its steps from there; the steps of the branch that it left are not shown.
 * Looks only at what has come since it was last asked about this curve.
 */
export function history(curve: ICurve): readonly number[] {
  const { step } = curve;
  let known = histories.get(curve);
  if (!known || known.length > step.length) {
    known = { length: 0, kept: [] };
    histories.set(curve, known);
  }
  const { kept } = known;
  for (let i = known.length; i < step.length; i++) {
    while (kept.length && step[kept[kept.length - 1]] >= step[i]) {
      kept.pop();
    }
    kept.push(i);
  }
  known.length = step.length;
  return kept;
}

/** The metrics between which one chooses for these runs: the loss, the chosen one, and all that one of them has. */
export function offeredMetrics(
  runs: readonly IRun[],
  chosen: Metric
): Metric[] {
  return METRICS.filter(
    metric =>
      metric === 'loss' ||
      metric === chosen ||
      runs.some(run => has(run, metric))
  );
}

/** The run that was busy last, of those that have the metric where there are any. */
export function busiest(runs: readonly IRun[], metric: Metric): IRun {
  const able = runs.filter(run => has(run, metric));
  return (able.length ? able : runs).reduce((best, run) =>
    run.last_request >= best.last_request ? run : best
  );
}

/** The value of a metric at an entry of a curve, where `before` is the entry in front of it. */
function valueAt(
  curve: ICurve,
  metric: Metric,
  entry: number,
  before: number | undefined
): number | null {
  if (metric !== 'tokens_per_second') {
    return curve[metric][entry] ?? null;
  }
  if (before === undefined) {
    return null;
  }
  const seconds = curve.time[entry] - curve.time[before];
  return seconds > 0 ? curve.tokens[entry] / seconds : null;
}

interface IMade {
  length: number;
  series: ISeries;
}

const made = new WeakMap<ICurve, Map<string, IMade>>();

/** Series that are kept of a curve: what two views show at once. A slider that is moved asks for a hundred. */
const MOST_MADE = 24;

/** A run's metric along an axis. Made anew only after the curve has grown. */
export function seriesOf(
  { curve }: IRun,
  metric: Metric,
  axis: Axis = 'step',
  smoothing = 0
): ISeries {
  const key = `${metric} ${axis} ${smoothing}`;
  const known = made.get(curve) ?? new Map<string, IMade>();
  made.set(curve, known);
  const former = known.get(key);
  known.delete(key);
  const current = former?.length === curve.step.length;
  const series = current
    ? former!.series
    : make(curve, metric, axis, smoothing);
  known.set(key, { length: curve.step.length, series });
  for (const oldest of known.keys()) {
    if (known.size <= MOST_MADE) {
      break;
    }
    known.delete(oldest);
  }
  return series;
}

function make(
  curve: ICurve,
  metric: Metric,
  axis: Axis,
  smoothing: number
): ISeries {
  const kept = history(curve);
  const y = kept.map((i, k) => valueAt(curve, metric, i, kept[k - 1]));
  return {
    x: axis === 'step' ? kept.map(i => curve.step[i]) : since(curve, kept),
    y: smoothing > 0 ? smoothed(y, smoothing) : y
  };
}

/** Seconds since the first of these entries. A clock that was set back stands still until it has caught up. */
function since({ time }: ICurve, kept: readonly number[]): number[] {
  let latest = time[kept[0]];
  return kept.map(i => {
    latest = Math.max(latest, time[i]);
    return latest - time[kept[0]];
  });
}

/** Whether any entry of the curve has a value of the metric. */
export function has({ curve }: IRun, metric: Metric): boolean {
  return metric === 'tokens_per_second'
    ? curve.step.length > 1
    : curve[metric].some(value => value !== null);
}

/**
 * An exponential moving average that is right from the first value on (the bias towards zero is divided out, as in
 * Adam). `weight`, between 0 and 1, is what each step keeps of the average before it.
 */
export function smoothed(
  values: readonly (number | null)[],
  weight: number
): (number | null)[] {
  let average = 0;
  let mass = 0;
  return values.map(value => {
    if (value === null) {
      return null;
    }
    average = weight * average + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return average / mass;
  });
}

/** Tokens per second over the last twenty steps, or null before the second step. */
export function throughput({ curve }: IRun): number | null {
  const kept = history(curve).slice(-21);
  if (kept.length < 2) {
    return null;
  }
  const first = kept[0];
  const last = kept[kept.length - 1];
  const tokens = kept.slice(1).reduce((sum, i) => sum + curve.tokens[i], 0);
  const seconds = curve.time[last] - curve.time[first];
  return seconds > 0 ? tokens / seconds : null;
}

/** The newest value of a metric, or null. */
export function latest(run: IRun, metric: Metric): number | null {
  if (metric === 'tokens_per_second') {
    return throughput(run);
  }
  const column = run.curve[metric];
  return column.length ? column[column.length - 1] : null;
}
