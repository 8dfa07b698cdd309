/**
 * What the server knows, as the browser sees it: a fold of journal records.
 *
 * The twin of `tuft_jupyter/core/state.py`; both are tested on the golden files in `tests/golden`. The module knows
 * neither JupyterLab nor the network, and promises that applying the records after a snapshot gives the snapshot
 * that the server would send next. What a state holds is in `objects.ts`.
 */
import { IRun, ISnapshot, IState } from './objects';

// Records are JSON of many shapes, and fields of later versions may be missing or new.
// eslint-disable-next-line @typescript-eslint/no-explicit-any
type Data = Record<string, any>;

/** One line of the journal, which is also one live event. */
export interface IRecord {
  n: number;
  kind: string;
  tenant: string;
  time: number;
  data: Data;
}

/** The state in front of the first record. */
export function emptyState(): IState {
  return {
    n: 0,
    sessions: new Map(),
    runs: new Map(),
    samplers: new Map(),
    checkpoints: new Map()
  };
}

/** The state that a snapshot describes. The snapshot's objects become part of the state. */
export function fromSnapshot(snapshot: ISnapshot): IState {
  return {
    n: snapshot.n,
    sessions: new Map(snapshot.sessions.map(s => [s.id, s])),
    runs: new Map(snapshot.runs.map(r => [r.id, r])),
    samplers: new Map(snapshot.samplers.map(s => [s.id, s])),
    checkpoints: new Map(snapshot.checkpoints.map(c => [c.path, c]))
  };
}

/** The inverse of {@link fromSnapshot}. */
export function toSnapshot(state: IState): ISnapshot {
  return {
    n: state.n,
    sessions: [...state.sessions.values()],
    runs: [...state.runs.values()],
    samplers: [...state.samplers.values()],
    checkpoints: [...state.checkpoints.values()]
  };
}

/**
 * Fold one record into the state, and say whether it was new.
 *
 * Records up to `state.n` change nothing, so they may come twice. Gaps are normal: other people's records are not
 * sent. Records of an unknown kind, or of a run that is not in the state, change nothing but `n`.
 */
export function apply(state: IState, record: IRecord): boolean {
  if (record.n <= state.n) {
    return false;
  }
  state.n = record.n;
  HANDLERS.get(record.kind)?.(state, record, record.data);
  return true;
}

type Handler = (state: IState, record: IRecord, data: Data) => void;

const HANDLERS = new Map<string, Handler>([
  ['session_opened', sessionOpened],
  ['session_finished', sessionFinished],
  ['op_accepted', opAccepted],
  ['op_done', opDone],
  ['op_failed', opFailed],
  ['sampler_opened', samplerOpened],
  ['checkpoint_changed', checkpointChanged],
  ['weights_copied', weightsCopied],
  ['run_closed', runClosed],
  ['run_resumed', runResumed],
  ['forgotten', forgotten]
]);

function createsRun(op: string): boolean {
  return op === 'create_model' || op === 'load_weights';
}

function sessionOpened(state: IState, record: IRecord, data: Data): void {
  state.sessions.set(data.session, {
    id: data.session,
    tenant: record.tenant,
    created: record.time,
    display_name: data.display_name ?? null,
    sdk_version: data.sdk_version ?? '',
    finished: null
  });
}

function sessionFinished(state: IState, _: IRecord, data: Data): void {
  const session = state.sessions.get(data.session);
  if (session && session.finished === null) {
    session.finished = data.reason;
  }
}

function opAccepted(state: IState, record: IRecord, data: Data): void {
  if (createsRun(data.op) && !state.runs.has(data.run)) {
    state.runs.set(data.run, newRun(record, data));
  }
  const run = state.runs.get(data.run);
  if (run) {
    run.pending += 1;
    run.last_request = record.time;
  }
}

function newRun(record: IRecord, data: Data): IRun {
  return {
    id: data.run,
    session: data.args.session,
    tenant: record.tenant,
    base_model: data.args.base_model,
    rank: data.args.lora?.rank ?? null,
    created: record.time,
    status: 'creating',
    error: null,
    last_error: null,
    step: 0,
    tokens: 0,
    engine_ms: 0,
    pending: 0,
    last_request: 0,
    loss_sum: 0,
    weight_sum: 0,
    kl_sum: 0,
    kl_tokens: 0,
    step_tokens: 0,
    passes: 0,
    curve: {
      step: [],
      time: [],
      loss: [],
      tokens: [],
      grad_norm: [],
      learning_rate: [],
      kl: []
    }
  };
}

function opDone(state: IState, record: IRecord, data: Data): void {
  const run = state.runs.get(data.run);
  if (!run) {
    return;
  }
  run.pending -= 1;
  run.last_error = null;
  const facts: Data = data.facts ?? {};
  run.engine_ms += facts.engine_ms ?? 0;
  if (createsRun(data.op)) {
    run.status = 'ready';
    run.step = facts.step ?? run.step;
    forgetGradients(run);
  } else if (data.op === 'forward_backward') {
    run.loss_sum += facts.loss_sum ?? 0;
    run.weight_sum += facts.weight_sum ?? 0;
    run.kl_sum += facts.kl_sum ?? 0;
    run.kl_tokens += facts.kl_tokens ?? 0;
    run.step_tokens += facts.tokens ?? 0;
    run.passes += 1;
    run.tokens += facts.tokens ?? 0;
  } else if (data.op === 'optim_step') {
    optimizerStep(run, record.time, facts);
  } else if (
    data.op === 'save_weights' ||
    data.op === 'save_weights_for_sampler'
  ) {
    if (facts.checkpoint) {
      saved(state, run, record, facts);
    }
    if (facts.sampler) {
      const from = { run: run.id, step: run.step };
      samplerOpened(state, record, { ...facts.sampler, ...from });
    }
  } else if (data.op === 'unload_model') {
    run.status = 'closed';
  }
}

function forgetGradients(run: IRun): void {
  run.loss_sum = run.weight_sum = run.step_tokens = run.passes = 0;
  run.kl_sum = run.kl_tokens = 0;
}

function optimizerStep(run: IRun, time: number, facts: Data): void {
  const weighted = run.passes > 0 && run.weight_sum > 0;
  run.step += 1;
  run.curve.step.push(run.step);
  run.curve.time.push(time);
  run.curve.loss.push(weighted ? run.loss_sum / run.weight_sum : null);
  run.curve.tokens.push(run.step_tokens);
  run.curve.grad_norm.push(facts.grad_norm ?? null);
  run.curve.learning_rate.push(facts.learning_rate ?? null);
  run.curve.kl.push(run.kl_tokens > 0 ? run.kl_sum / run.kl_tokens : null);
  forgetGradients(run);
}

/** A copy belongs to a closed run of its own. */
function weightsCopied(state: IState, record: IRecord, data: Data): void {
  const run = newRun(record, data);
  run.status = 'closed';
  run.last_request = record.time;
  run.step = data.step;
  state.runs.set(run.id, run);
  saved(state, run, record, data.facts);
}

function saved(state: IState, run: IRun, record: IRecord, facts: Data): void {
  const { path, kind, name, expires } = facts.checkpoint;
  state.checkpoints.set(path, {
    path,
    run: run.id,
    tenant: run.tenant,
    kind,
    name,
    created: record.time,
    size_bytes: facts.size_bytes ?? 0,
    expires: expires ?? null,
    public: false,
    step: run.step
  });
}

function opFailed(state: IState, _: IRecord, data: Data): void {
  const run = state.runs.get(data.run);
  if (!run) {
    return;
  }
  run.pending -= 1;
  run.last_error = data.error;
  if (createsRun(data.op) && run.status === 'creating') {
    run.status = 'failed';
    run.error = data.error;
  }
}

function samplerOpened(state: IState, record: IRecord, data: Data): void {
  const saved = state.checkpoints.get(data.model_path);
  state.samplers.set(data.sampler, {
    id: data.sampler,
    session: data.session,
    tenant: record.tenant,
    base_model: data.base_model,
    created: record.time,
    model_path: data.model_path ?? null,
    run: saved?.run ?? data.run ?? null,
    step: saved?.step ?? data.step ?? null
  });
}

function checkpointChanged(state: IState, _: IRecord, data: Data): void {
  const checkpoint = state.checkpoints.get(data.path);
  if (!checkpoint) {
    return;
  }
  if (data.deleted) {
    state.checkpoints.delete(data.path);
    return;
  }
  if ('expires' in data) {
    checkpoint.expires = data.expires;
  }
  if ('public' in data) {
    checkpoint.public = data.public;
  }
}

function runClosed(state: IState, _: IRecord, data: Data): void {
  const run = state.runs.get(data.run);
  if (run) {
    run.status = 'closed';
  }
}

function runResumed(state: IState, _: IRecord, data: Data): void {
  const run = state.runs.get(data.run);
  if (run) {
    run.session = data.session;
  }
}

function forgotten(state: IState, _: IRecord, data: Data): void {
  data.runs.forEach((id: string) => state.runs.delete(id));
  data.samplers.forEach((id: string) => state.samplers.delete(id));
  data.sessions.forEach((id: string) => state.sessions.delete(id));
}
