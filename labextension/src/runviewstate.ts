/** What a run view shows: plain JSON, so that it comes back after a reload, and can be told to the command that opens it. */
import { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { Axis, Metric, METRICS } from './curves';
import { IShown } from './shown';

/** The run of which facts are shown, and the step that was picked on its line. */
export interface IPicked {
  run: string;
  step: number | null;
}

/** See the head of the file. */
export interface IRunViewState {
  runs: string[];
  metric: Metric;
  axis: Axis;
  /** What each step keeps of the average before it: 0 (nothing) up to, not including, 1. */
  smoothing: number;
  log: boolean;
  picked: IPicked | null;
}

/** What every part of a run view is given. */
export interface IRunViewProps extends IShown {
  view: IRunViewState;
  onView: (change: Partial<IRunViewState>) => void;
}

/** What is written in the arguments of a command, in values that can be used. */
export function readRunView(args: ReadonlyPartialJSONObject): IRunViewState {
  const smoothing = Number(args.smoothing ?? 0);
  return {
    runs: Array.isArray(args.runs) ? args.runs.map(String) : [],
    metric: METRICS.find(metric => metric === args.metric) ?? 'loss',
    axis: args.axis === 'time' ? 'time' : 'step',
    smoothing: smoothing >= 0 && smoothing < 1 ? smoothing : 0,
    log: args.log === true,
    picked: readPicked(args.picked)
  };
}

function readPicked(given: unknown): IPicked | null {
  const { run, step } = (given ?? {}) as { run?: unknown; step?: unknown };
  return typeof run === 'string'
    ? { run, step: typeof step === 'number' ? step : null }
    : null;
}
