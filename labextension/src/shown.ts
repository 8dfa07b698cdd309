/** What every part of the panel and of the views is given to draw from. */
import { TranslationBundle } from '@jupyterlab/translation';
import { CommandRegistry } from '@lumino/commands';
import { IRunMemory } from './api';
import { IState } from './objects';

/** See the head of the file. */
export interface IShown {
  state: IState;
  /** What each run is called. */
  names: Map<string, string>;
  /** What runs in training take in memory, as far as it is known. */
  memory: { readonly [run: string]: IRunMemory };
  /** The server's clock, seconds since 1970. */
  now: number;
  locale: string;
  commands: CommandRegistry;
  trans: TranslationBundle;
}

/** The kind of what is dragged when a run is. */
export const RUN_MIME = 'application/x-tuft-run';
