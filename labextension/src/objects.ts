/**
 * What the server knows: sessions, runs, samplers and checkpoints, as its lab routes send them.
 *
 * The twin of `tuft_jupyter/core/objects.py`; `model.ts` makes and changes them from records, and nobody else does.
 * Times are seconds since 1970, sizes bytes, losses nats per weighted token.
 */

/** A client that connected: one `tinker.ServiceClient`. */
export interface ISession {
  id: string;
  tenant: string;
  created: number;
  display_name: string | null;
  sdk_version: string;
  /** Why it ended, or null while it is open. */
  finished: string | null;
}

/** One entry per optimizer step in each column. */
export interface ICurve {
  step: number[];
  time: number[];
  loss: (number | null)[];
  tokens: number[];
  grad_norm: (number | null)[];
  learning_rate: (number | null)[];
  /** Divergence from the policy that sampled, nats per token with an advantage; null where the loss knows none. */
  kl: (number | null)[];
}

/** An adapter in training. */
export interface IRun {
  id: string;
  session: string;
  tenant: string;
  base_model: string;
  rank: number | null;
  created: number;
  status: 'creating' | 'ready' | 'failed' | 'closed';
  error: string | null;
  /** Why the last operation failed, or null if it did not. */
  last_error: string | null;
  step: number;
  tokens: number;
  /** Milliseconds that the engine worked for this run. */
  engine_ms: number;
  /** Accepted operations without an outcome. */
  pending: number;
  last_request: number;
  loss_sum: number;
  weight_sum: number;
  kl_sum: number;
  kl_tokens: number;
  step_tokens: number;
  passes: number;
  curve: ICurve;
}

/** Weights pinned for sampling. */
export interface ISampler {
  id: string;
  session: string;
  tenant: string;
  base_model: string;
  created: number;
  model_path: string | null;
  /** Whose weights these are, and after which step; null for a base model. */
  run: string | null;
  step: number | null;
}

/** Saved weights. */
export interface ICheckpoint {
  path: string;
  run: string;
  tenant: string;
  kind: 'weights' | 'sampler_weights' | 'external_weights';
  name: string;
  created: number;
  size_bytes: number;
  expires: number | null;
  public: boolean;
  step: number;
}

/** The state as the server sends it: plain JSON. */
export interface ISnapshot {
  n: number;
  sessions: ISession[];
  runs: IRun[];
  samplers: ISampler[];
  checkpoints: ICheckpoint[];
}

/** The state by id, in order of creation. `n` is the last record applied. */
export interface IState {
  n: number;
  sessions: Map<string, ISession>;
  runs: Map<string, IRun>;
  samplers: Map<string, ISampler>;
  checkpoints: Map<string, ICheckpoint>;
}
