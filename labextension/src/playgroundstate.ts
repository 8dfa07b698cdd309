/** What a playground shows: plain JSON, so that it comes back after a reload; and which models can answer. */
import { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { IModelStatus } from './api';
import { IQuestion } from './complete';
import { IShown } from './shown';

/** See the head of the file. */
export interface IPlaygroundState extends IQuestion {
  models: string[];
}

/** What every part of a playground is given. */
export interface IPlaygroundProps extends IShown {
  view: IPlaygroundState;
  onView: (change: Partial<IPlaygroundState>) => void;
}

/** A model that can answer, and what it is called. */
export interface IChoice {
  value: string;
  label: string;
}

/** What can answer: base models, then checkpoints, the newest first. */
export function choices(
  { state, names, trans }: IShown,
  bases: readonly IModelStatus[]
): IChoice[] {
  return [
    ...bases.map(({ name }) => ({
      value: name,
      label: trans.__('%1 (base model)', name)
    })),
    ...[...state.checkpoints.values()]
      .filter(({ kind }) => kind !== 'external_weights')
      .reverse()
      .map(({ path, name, run, step }) => ({
        value: path,
        label: trans.__(
          '%1 of %2, step %3',
          name,
          names.get(run) ?? run,
          `${step}`
        )
      }))
  ];
}

/** What is written in the arguments of a command, in values that can be used. */
export function readPlayground(
  args: ReadonlyPartialJSONObject
): IPlaygroundState {
  const number = (value: unknown, otherwise: number) =>
    typeof value === 'number' && Number.isFinite(value) ? value : otherwise;
  const text = (value: unknown) => (typeof value === 'string' ? value : '');
  return {
    mode: args.mode === 'text' ? 'text' : 'chat',
    system: text(args.system),
    prompt: text(args.prompt),
    models: Array.isArray(args.models) ? args.models.map(String) : [],
    temperature: number(args.temperature, 0.7),
    topP: number(args.topP, 1),
    maxTokens: number(args.maxTokens, 128),
    seed: typeof args.seed === 'number' ? args.seed : null
  };
}
