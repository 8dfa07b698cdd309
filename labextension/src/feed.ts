/**
 * Keeps the page's copy of the state current: a snapshot, then records over one websocket.
 *
 * Promises: at most one socket; none while nobody looks; no record lost or applied twice; after a lost connection a
 * fresh snapshot, because a server that was started again may count its records anew. When the server answers `resync`
 * (it cannot send what came after `since`), records wait while a snapshot is fetched, and those after it are applied.
 * Knows nothing of how things are drawn.
 */
import { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';
import {
  ApiError,
  FeedMessage,
  IApi,
  IGauges,
  ILogLine,
  IStatus,
  IWaiting
} from './api';
import { apply, emptyState, fromSnapshot, IRecord } from './model';
import { IState } from './objects';
import { Connection, IFineTuning } from './tokens';

const FIRST_RETRY_MS = 1000;
const LAST_RETRY_MS = 30000;

/** Where no server extension is, one seldom appears without a reload. */
const MISSING_RETRY_MS = 120_000;

/** A server that is there tells of its machine each second. A path that broke tells nothing, not even that it did. */
const SILENCE_MS = 45_000;

const LOG_LINES = 200;

/** See the head of the file. */
export class Feed implements IFineTuning, IDisposable {
  constructor(private readonly _api: IApi) {
    document.addEventListener('visibilitychange', this._onLook);
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get connection(): Connection {
    return this._connection;
  }

  get retryAt(): number | null {
    return this._retryAt;
  }

  get state(): IState {
    return this._state;
  }

  get status(): IStatus | null {
    return this._status;
  }

  get gauges(): IGauges | null {
    return this._gauges;
  }

  get queue(): readonly IWaiting[] {
    return this._queue;
  }

  get log(): readonly ILogLine[] {
    return this._log;
  }

  get problem(): string {
    return this._problem;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  now(): number {
    return Date.now() / 1000 + this._clockSkew;
  }

  /** Whether somebody looks at `viewer`, which shows what this feed knows. The page itself must be visible too. */
  look(viewer: object, looks: boolean): void {
    if (looks) {
      this._viewers.add(viewer);
    } else {
      this._viewers.delete(viewer);
    }
    this._onLook();
  }

  /** Try now what would be tried later. */
  retry(): void {
    if (this._awake() && this._connection !== 'live') {
      this._stop();
      this._retries = 0;
      void this._start();
    }
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    document.removeEventListener('visibilitychange', this._onLook);
    this._stop();
    Signal.clearData(this);
  }

  private _awake(): boolean {
    return !this._isDisposed && this._viewers.size > 0 && !document.hidden;
  }

  private _onLook = (): void => {
    if (this._awake() && this._connection === 'asleep') {
      void this._start();
    } else if (!this._awake() && this._connection !== 'asleep') {
      this._stop();
      this._gauges = null;
      this._become('asleep');
    }
  };

  private _become(connection: Connection): void {
    this._connection = connection;
    this._changed.emit();
  }

  /** End whatever is under way. What it still answers is of a former attempt, and ignored. */
  private _stop(): void {
    this._attempt += 1;
    window.clearTimeout(this._timer);
    this._retryAt = null;
    this._socket?.close();
    this._socket = null;
  }

  private async _start(): Promise<void> {
    const attempt = ++this._attempt;
    this._retryAt = null;
    this._held = null;
    // Whoever reads what is wrong goes on reading while it is tried again.
    const again = this._retries > 0 && this._connection !== 'asleep';
    this._become(again ? this._connection : 'connecting');
    if (this._stale && !(await this._load(attempt))) {
      return;
    }
    const socket = this._api.open(this._state.n);
    this._socket = socket;
    const lost = () => {
      if (attempt === this._attempt) {
        this._stale = true;
        this._retryLater('lost');
      }
    };
    const heard = () => {
      window.clearTimeout(this._timer);
      this._timer = window.setTimeout(lost, SILENCE_MS);
    };
    heard();
    socket.onopen = () => {
      if (attempt === this._attempt) {
        this._become('live');
      }
    };
    socket.onmessage = event => {
      if (attempt === this._attempt) {
        this._retries = 0;
        heard();
        this._receive(JSON.parse(event.data) as FeedMessage);
      }
    };
    socket.onclose = lost;
  }

  /** Fetch a snapshot and take it over, unless the attempt ended meanwhile. Whether to go on. */
  private async _load(attempt: number): Promise<boolean> {
    const load = ++this._loads;
    try {
      const answer = await this._api.state();
      if (attempt !== this._attempt || load !== this._loads) {
        return false;
      }
      this._state = fromSnapshot(answer.state);
      this._status = answer.status;
      this._stale = false;
      return true;
    } catch (error) {
      if (attempt === this._attempt) {
        const reason = error instanceof ApiError ? error.reason : 'unreachable';
        const problem = error instanceof ApiError ? error.message : '';
        this._retryLater(reason === 'unreachable' ? 'lost' : reason, problem);
      }
      return false;
    }
  }

  private _receive(message: FeedMessage): void {
    switch (message.type) {
      case 'records':
        if (this._held) {
          this._held.push(...message.records);
          return;
        }
        message.records.forEach(record => apply(this._state, record));
        break;
      case 'status': {
        const former = this._status;
        this._status = message.status;
        if (former && former.started !== message.status.started) {
          // Records of another server may have the same numbers.
          void this._resync();
        }
        break;
      }
      case 'gauges':
        this._gauges = {
          ...message,
          runs: message.runs ?? this._gauges?.runs
        };
        this._clockSkew = message.time - Date.now() / 1000;
        break;
      case 'queue':
        this._queue = message.queue;
        break;
      case 'log': {
        // A server that was started again counts its lines anew.
        const last = this._log[this._log.length - 1]?.n ?? 0;
        const first = message.lines[0]?.n ?? 0;
        const former = first > last ? this._log : [];
        this._log = [...former, ...message.lines].slice(-LOG_LINES);
        break;
      }
      case 'resync':
        void this._resync();
        return;
    }
    this._changed.emit();
  }

  private async _resync(): Promise<void> {
    this._stale = true;
    this._held = [];
    if (await this._load(this._attempt)) {
      this._held.forEach(record => apply(this._state, record));
      this._held = null;
      this._changed.emit();
    }
  }

  /** Wait twice as long each time, and not at the same moment as everybody else. */
  private _retryLater(connection: Connection, problem = ''): void {
    this._stop();
    this._problem = problem;
    const soon = Math.min(FIRST_RETRY_MS * 2 ** this._retries, LAST_RETRY_MS);
    const wait = connection === 'missing' ? MISSING_RETRY_MS : soon;
    const jittered = wait * (0.75 + Math.random() / 2);
    this._retries += 1;
    this._gauges = null;
    this._retryAt = Date.now() + jittered;
    this._timer = window.setTimeout(() => void this._start(), jittered);
    this._become(connection);
  }

  private _state = emptyState();
  private _status: IStatus | null = null;
  private _gauges: IGauges | null = null;
  private _queue: readonly IWaiting[] = [];
  private _log: readonly ILogLine[] = [];
  private _problem = '';
  private _connection: Connection = 'asleep';
  private _retryAt: number | null = null;
  private _clockSkew = 0;
  private readonly _viewers = new Set<object>();
  private _stale = true;
  private _attempt = 0;
  private _loads = 0;
  private _held: IRecord[] | null = null;
  private _retries = 0;
  private _timer = 0;
  private _socket: WebSocket | null = null;
  private _isDisposed = false;
  private _changed = new Signal<this, void>(this);
}
