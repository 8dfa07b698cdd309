/** What other JupyterLab extensions can ask of this one. */
import { Token } from '@lumino/coreutils';
import { ISignal } from '@lumino/signaling';
import { IGauges, ILogLine, IStatus, IWaiting } from './api';
import { IState } from './objects';

/** The version of this extension; a test holds that it is the package's. */
export const VERSION = '0.1.0';

/**
 * How the page stands to the server:
 * `connecting` at first, `live` while records come in, `lost` until an attempt succeeds again (`retryAt` says when the next
 * one is due), `missing` when the server extension is not there, `forbidden` when it does not let this user in, `unusable` when it cannot serve and says
 * why (see `problem`), `asleep` while nobody looks.
 */
export type Connection =
  | 'asleep'
  | 'connecting'
  | 'live'
  | 'lost'
  | 'missing'
  | 'forbidden'
  | 'unusable';

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
  /** The runs whose requests wait or run. */
  readonly queue: readonly IWaiting[];
  /** The newest lines of the server's log. */
  readonly log: readonly ILogLine[];
  /** Why the server cannot serve, while `connection` is `unusable`; or is `lost`, and the server says so itself. */
  readonly problem: string;
  /** The server's clock, in seconds since 1970. */
  now(): number;
}

/** The token of {@link IFineTuning}. */
export const IFineTuning = new Token<IFineTuning>(
  'tuft-jupyter:IFineTuning',
  'Fine-tuning runs, checkpoints and resource use of this server, live.'
);
