/** What other JupyterLab extensions can ask of this one. */
import { Token } from '@lumino/coreutils';
import { ISignal } from '@lumino/signaling';
import { IGauges, IStatus } from './api';
import { IState } from './model';

/**
 * How the page stands to the server:
 * `connecting` at first, `live` while records come in, `lost` between two attempts (a `retryAt` is set), `missing`
 * when the server extension is not there, `forbidden` when it does not let this user in, `asleep` while nobody looks.
 */
export type Connection =
  'asleep' | 'connecting' | 'live' | 'lost' | 'missing' | 'forbidden';

/** The live state of fine-tuning on this server. */
export interface IFineTuning {
  /** Emitted after anything below has changed. */
  readonly changed: ISignal<IFineTuning, void>;
  readonly connection: Connection;
  /** When the next attempt to connect is due (milliseconds since 1970), while `connection` is `lost`. */
  readonly retryAt: number | null;
  readonly state: IState;
  readonly status: IStatus | null;
  readonly gauges: IGauges | null;
  /** The server's clock, in seconds since 1970. */
  now(): number;
}

/** The token of {@link IFineTuning}. */
export const IFineTuning = new Token<IFineTuning>(
  'tuft-jupyter:IFineTuning',
  'Fine-tuning runs, checkpoints and resource use of this server, live.'
);
