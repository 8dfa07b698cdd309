/** What things are called, and what a run is doing, in the reader's language. */
import { TranslationBundle } from '@jupyterlab/translation';
import { shortId } from './format';
import { IRun, ISession, IState } from './objects';

/** What a run is doing, as a person would say it. */
export type Phase = 'starting' | 'training' | 'idle' | 'failed' | 'closed';

/** A run counts as training as long as its last sign of life is not older than this (seconds). */
const QUIET = 10;

/** What `run` is doing at `now` (seconds since 1970). */
export function phaseOf(run: IRun, now: number): Phase {
  if (run.status === 'failed' || run.status === 'closed') {
    return run.status;
  }
  if (run.status === 'creating') {
    return 'starting';
  }
  const { time } = run.curve;
  const sign = Math.max(run.last_request, time[time.length - 1] ?? 0);
  return run.pending > 0 || (run.curve.step.length > 0 && now - sign < QUIET)
    ? 'training'
    : 'idle';
}

/** A {@link Phase} in words. */
export function phaseWord(phase: Phase, trans: TranslationBundle): string {
  switch (phase) {
    case 'starting':
      return trans.__('starting');
    case 'training':
      return trans.__('training');
    case 'idle':
      return trans.__('idle');
    case 'failed':
      return trans.__('failed');
    case 'closed':
      return trans.__('closed');
  }
}

/** A name for each run: that of its session where it has one, else its number in order of creation. */
export function runNames(
  state: IState,
  trans: TranslationBundle
): Map<string, string> {
  const names = new Map<string, string>();
  const used = new Map<string, number>();
  let number = 0;
  for (const run of state.runs.values()) {
    number += 1;
    const given = plain(state.sessions.get(run.session)?.display_name);
    const times = (used.get(given) ?? 0) + 1;
    used.set(given, times);
    const repeated = times > 1 ? ` ${times}` : '';
    names.set(run.id, given ? given + repeated : trans.__('Run %1', number));
  }
  return names;
}

/** A session's name, or the part of its id that a person compares. */
export function sessionName(session: ISession): string {
  return plain(session.display_name) || shortId(session.id);
}

/** A name without the characters that would turn around what stands beside it (UAX #9, section 2). */
function plain(name: string | null | undefined): string {
  return (name ?? '').replace(/[\u202a-\u202e\u2066-\u2069]/g, '');
}

/** Runs that are named where one is asked for that is not there. */
const NAMED = 5;

/** What is said of a run that is not this user's: the words of the notebook and of the command line. */
export function strangerSentence(
  run: string,
  state: IState,
  trans: TranslationBundle
): string {
  const yours = [...runNames(state, trans).values()].reverse();
  return yours.length
    ? trans.__(
        '“%1” is no run of yours; you have %2 (`%tuft runs` lists them).',
        run,
        yours.slice(0, NAMED).join(', ')
      )
    : trans.__(
        '“%1” is no run of yours, and there is none yet; tuft_jupyter.create_training_client(rank=8).result() starts one.',
        run
      );
}
