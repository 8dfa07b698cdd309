/** A server for tests: golden records, a snapshot to answer with, and sockets that do what the test says. */
import { readFileSync } from 'fs';
import { resolve } from 'path';
import { IApi, IStateAnswer, IStatus } from '../api';
import { IRecord } from '../model';
import { ISnapshot } from '../objects';

const GOLDEN = resolve(__dirname, '../../../tests/golden');

export function goldenFeed(): IRecord[] {
  return readFileSync(resolve(GOLDEN, 'feed.jsonl'), 'utf-8')
    .split('\n')
    .filter(Boolean)
    .map(line => JSON.parse(line));
}

export function goldenState(): ISnapshot {
  return JSON.parse(readFileSync(resolve(GOLDEN, 'state.json'), 'utf-8'));
}

/** A record of a copy, and the state that it alone gives. */
export function goldenCopy(): { feed: IRecord; state: ISnapshot } {
  return JSON.parse(readFileSync(resolve(GOLDEN, 'copied.json'), 'utf-8'));
}

/** Records of what leaves, and the state after the golden ones and these. */
export function goldenForgotten(): { records: IRecord[]; state: ISnapshot } {
  return JSON.parse(readFileSync(resolve(GOLDEN, 'forgotten.json'), 'utf-8'));
}

export const READY: IStatus = {
  version: '0.1.0',
  tenant: 'alice',
  ready: true,
  waiting_for: null,
  persistence: 'file journal.sqlite: survives a crash',
  backend: { installed: true, detail: '' },
  models: [{ name: 'tuft/demo', state: 'ready', detail: '' }]
};

/** What the server says while it knows nothing. */
export function emptyAnswer(): IStateAnswer {
  return {
    state: { n: 0, sessions: [], runs: [], samplers: [], checkpoints: [] },
    status: READY
  };
}

export class FakeSocket {
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: string }) => void) | null = null;
  onclose: (() => void) | null = null;
  closed = false;

  constructor(readonly since: number) {}

  close(): void {
    this.closed = true;
  }

  /** The server accepts. */
  accept(): void {
    this.onopen?.();
  }

  send(message: object): void {
    this.onmessage?.({ data: JSON.stringify(message) });
  }

  /** The connection breaks. */
  lose(): void {
    this.onclose?.();
  }
}

export class FakeApi implements IApi {
  answer: () => Promise<IStateAnswer> = async () => emptyAnswer();
  asked = 0;
  sockets: FakeSocket[] = [];

  async state(): Promise<IStateAnswer> {
    this.asked += 1;
    return this.answer();
  }

  /** What a route answers, by method and route; a refusal is thrown. */
  routes: { [route: string]: (body: unknown) => unknown } = {};

  async call(method: string, route: string, body?: unknown): Promise<unknown> {
    return this.routes[`${method} ${route}`](body);
  }

  open(since: number): WebSocket {
    const socket = new FakeSocket(since);
    this.sockets.push(socket);
    return socket as unknown as WebSocket;
  }

  get socket(): FakeSocket {
    return this.sockets[this.sockets.length - 1];
  }
}

/** Let everything that waits for an answer go on. */
export async function settle(): Promise<void> {
  for (let i = 0; i < 5; i++) {
    await Promise.resolve();
  }
}

/** Hide or show the page. */
export function hidePage(hidden: boolean): void {
  Object.defineProperty(document, 'hidden', {
    configurable: true,
    value: hidden
  });
  document.dispatchEvent(new Event('visibilitychange'));
}
