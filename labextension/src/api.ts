/**
 * The server extension's lab routes: one snapshot over HTTP, then live messages over a websocket.
 *
 * Knows addresses and message shapes, and nothing of what is done with them.
 */
import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';
import { IRecord } from './model';
import { ISnapshot } from './objects';

/** A base model that the server offers. */
export interface IModelStatus {
  name: string;
  state: 'idle' | 'loading' | 'ready' | 'failed';
  detail: string;
}

/** How the service is. */
export interface IStatus {
  version: string;
  /** When the server began, seconds since 1970: tells one from the next. Absent from older servers. */
  started?: number;
  tenant: string;
  /** Whether the tenant manages this server: its keys among them. Absent from older servers. */
  admin?: boolean;
  ready: boolean;
  /** What the service waits for, in words, or null. */
  waiting_for: string | null;
  /** Where the journal is kept, a colon, and what it survives. */
  persistence: string;
  /** What an acknowledged record survives: the end of the server, that of its process, that of the machine. */
  durability?: 'nothing' | 'process' | 'machine';
  /** Why nothing can be written now, or null. */
  problem?: string | null;
  backend: { installed: boolean; detail: string };
  models: IModelStatus[];
  /** GPUs that base models have of their own; absent from older servers. */
  placements?: IPlacement[];
  /** What works, but is better known, in sentences; absent from older servers. */
  notes?: string[];
}

/** GPUs reserved for a base model. `mesh` is how its processes are laid out over them, 0 where there are none. */
export interface IPlacement {
  model: string;
  /** Whether training and sampling share GPUs: `separate`, `colocate`, or one of the two alone. */
  mode: string;
  gpus: number;
  mesh: {
    data_parallel: number;
    training_nodes: number;
    sampling_replicas: number;
    tensor_parallel: number;
    nodes_per_replica: number;
  };
}

/** A process that computes. `cpu` is percent of one core, `memory` bytes. */
export interface IWorkerGauge {
  name: string;
  pid: number;
  cpu: number;
  memory: number;
  /** Bytes on GPUs; absent from older servers. */
  gpu_memory?: number;
}

/** `used` and `total` are bytes, `utilization` percent. */
export interface IGpuGauge {
  name: string;
  used: number;
  total: number;
  utilization: number;
}

/** Bytes that a run takes: on the model's device while it is in use, or in host memory while it is idle. */
export interface IRunMemory {
  model: number;
  idle: number;
}

/** Resource use at one moment. `cpu` is percent of the machine, `loop_lag_ms` how late the server's loop runs. */
export interface IGauges {
  time: number;
  cpu: number;
  memory: { used: number; total: number };
  loop_lag_ms: number;
  workers: IWorkerGauge[];
  gpus: IGpuGauge[];
  /** Of each run in training; sent as it changes. Absent from older servers. */
  runs?: { [run: string]: IRunMemory };
}

/** A run whose requests wait or run, and what for. */
export interface IWaiting {
  run: string;
  pending: number;
  why: string;
}

/** A line of the server's log. */
export interface ILogLine {
  n: number;
  time: number;
  level: string;
  text: string;
}

/** What the websocket sends. `resync` asks for a new snapshot. */
export type FeedMessage =
  | { type: 'records'; records: IRecord[] }
  | { type: 'status'; status: IStatus }
  | ({ type: 'gauges' } & IGauges)
  | { type: 'queue'; queue: IWaiting[] }
  | { type: 'log'; lines: ILogLine[] }
  | { type: 'resync' };

/** The answer to `GET state`. */
export interface IStateAnswer {
  state: ISnapshot;
  status: IStatus;
}

/** Why there is no answer, in the terms in which a person can mend it. */
export class ApiError extends Error {
  constructor(
    /**
     * `missing`: no server extension; `forbidden`: not allowed; `unusable`: the server says in the message why it cannot
     * serve; `unreachable`: anything else, worth trying again; the message is what the server says of it, if anything.
     */
    readonly reason: 'missing' | 'forbidden' | 'unusable' | 'unreachable',
    message: string
  ) {
    super(message);
    this.name = 'ApiError';
  }
}

/** What the feed needs of a server. */
export interface IApi {
  /** The present state and status. Rejects with an {@link ApiError}. */
  state(): Promise<IStateAnswer>;

  /** A socket with the messages after record `since`. */
  open(since: number): WebSocket;
}

/** The lab routes of the server that serves this page. */
export class Api implements IApi {
  constructor(private readonly _server: ServerConnection.ISettings) {}

  /** The address of a path below the server's base. */
  address(path: string): string {
    return URLExt.join(this._server.baseUrl, path);
  }

  /** A request to one route of the table, with Jupyter's identity. Rejects with the server's own words. */
  async call(method: string, route: string, body?: unknown): Promise<unknown> {
    const path = URLExt.join('tuft/lab/api/v1', route);
    const response = await this._request(method, path, body);
    const text = await response.text();
    return text ? JSON.parse(text) : null;
  }

  /** A file that the server makes. Rejects with the server's own words. */
  async file(path: string): Promise<Blob> {
    return (await this._request('GET', path)).blob();
  }

  /** Keep an adapter made elsewhere: a tar archive of a PEFT directory. Resolves with its path. */
  async upload(archive: Blob, model: string, name: string): Promise<string> {
    const query = new URLSearchParams({ base_model: model, name });
    const path = `tuft/lab/api/v1/tuft/adapters?${query}`;
    const headers = { 'Content-Type': 'application/x-tar' };
    const response = await this._send(path, {
      method: 'POST',
      body: archive,
      headers
    });
    return (await response.json()).tinker_path;
  }

  /** A request for text; the answer is a stream of events. */
  text(route: string, body: unknown, signal: AbortSignal): Promise<Response> {
    return this._request(
      'POST',
      URLExt.join('tuft/lab/oai', route),
      body,
      signal
    );
  }

  async state(): Promise<IStateAnswer> {
    const url = this.address('tuft/lab/state');
    let response: Response;
    try {
      response = await ServerConnection.makeRequest(url, {}, this._server);
    } catch {
      throw new ApiError('unreachable', '');
    }
    if (response.ok) {
      return response.json();
    }
    if (response.status === 502 || response.status === 503) {
      const { problem } = await response.json().catch(() => ({}));
      if (problem) {
        const reason = response.status === 503 ? 'unusable' : 'unreachable';
        throw new ApiError(reason, problem);
      }
    }
    const reasons: { [status: number]: ApiError['reason'] } = {
      401: 'forbidden',
      403: 'forbidden',
      404: 'missing'
    };
    throw new ApiError(reasons[response.status] ?? 'unreachable', '');
  }

  open(since: number): WebSocket {
    const { wsUrl, token, appendToken } = this._server;
    const query = new URLSearchParams({ since: String(since) });
    if (appendToken && token) {
      query.set('token', token);
    }
    const url = URLExt.join(wsUrl, 'tuft/lab/feed');
    return new this._server.WebSocket(`${url}?${query}`);
  }

  private _request(
    method: string,
    path: string,
    body?: unknown,
    signal?: AbortSignal
  ): Promise<Response> {
    return this._send(path, {
      method,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body)
    });
  }

  private async _send(path: string, init: RequestInit): Promise<Response> {
    const response = await ServerConnection.makeRequest(
      this.address(path),
      init,
      this._server
    );
    if (!response.ok) {
      throw new Error(await reason(response));
    }
    return response;
  }
}

/** Why a request was refused: what the server says, else its status. */
async function reason(response: Response): Promise<string> {
  const text = await response.text();
  try {
    const { detail, message, error } = JSON.parse(text);
    return detail?.message ?? detail ?? error?.message ?? message ?? text;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}
