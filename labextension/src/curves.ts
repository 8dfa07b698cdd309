/** From curves to what is drawn: which metric, which colour, which steps. Pure. */
import { CURVE_COLUMNS, ICurve, IRun } from './model';

/** What can be drawn against the step. */
export type Metric = Exclude<(typeof CURVE_COLUMNS)[number], 'step' | 'time'>;

export const METRICS: readonly Metric[] = [
  'loss',
  'grad_norm',
  'learning_rate',
  'tokens'
];

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

/**
 * The entries of a curve that led to the present weights, in order of step.
 *
 * A run that loaded earlier weights counts its steps from there; the steps of the branch that it left are not shown.
 */
export function history(curve: ICurve): number[] {
  const kept: number[] = [];
  let before = Infinity;
  for (let i = curve.step.length - 1; i >= 0; i--) {
    if (curve.step[i] < before) {
      kept.push(i);
      before = curve.step[i];
    }
  }
  return kept.reverse();
}

/** All steps of the given runs in order, and per run the metric at each of them (undefined where it has none). */
export interface IAligned {
  steps: number[];
  values: (number | null | undefined)[][];
}

/** Bring the curves of several runs onto one axis. */
export function align(runs: readonly IRun[], metric: Metric): IAligned {
  const curves = runs.map(({ curve }) => {
    const kept = history(curve);
    return new Map(kept.map(i => [curve.step[i], curve[metric][i]]));
  });
  const steps = [...new Set(curves.flatMap(curve => [...curve.keys()]))];
  steps.sort((a, b) => a - b);
  return {
    steps,
    values: curves.map(curve => steps.map(step => curve.get(step)))
  };
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
export function latest({ curve }: IRun, metric: keyof ICurve): number | null {
  const column = curve[metric];
  return column.length ? column[column.length - 1] : null;
}
