/** From runs to the lines of a chart. Pure. */
import type { ILine } from './chart';
import { Axis, lineOf, Metric, seriesOf } from './curves';
import { IRun, IState } from './objects';
import { phaseOf } from './names';

/** A run with its place in the order of creation, which gives it its colour. */
export interface IIndexed {
  run: IRun;
  index: number;
}

/** The line of a run, in the colour that the run has everywhere. `index` counts runs in order of creation. */
export function lineOfRun(
  run: IRun,
  index: number,
  name: string,
  now: number,
  metric: Metric,
  axis: Axis = 'step',
  smoothing = 0
): ILine {
  return {
    label: name,
    ...lineOf(index),
    live: phaseOf(run, now) === 'training',
    ...seriesOf(run, metric, axis, smoothing),
    raw: smoothing > 0 ? seriesOf(run, metric, axis) : undefined
  };
}

/** The runs with the given ids, in order of creation, each with its place in that order. */
export function chosenRuns(
  state: IState,
  chosen: ReadonlySet<string>
): IIndexed[] {
  return [...state.runs.values()]
    .map((run, index) => ({ run, index }))
    .filter(({ run }) => chosen.has(run.id));
}
