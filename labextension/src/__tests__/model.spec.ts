import { apply, emptyState, fromSnapshot, toSnapshot } from '../model';
import { IState } from '../objects';
import {
  goldenCopy,
  goldenFeed,
  goldenForgotten,
  goldenState
} from './support';

function fold(from: IState, records = goldenFeed()): IState {
  records.forEach(record => apply(from, record));
  return from;
}

describe('the fold', () => {
  it('gives the state that Python gives', () => {
    expect(toSnapshot(fold(emptyState()))).toEqual(goldenState());
  });

  it('shows a copy of weights as Python does', () => {
    const { feed, state } = goldenCopy();
    expect(toSnapshot(fold(emptyState(), [feed]))).toEqual(state);
  });

  it('forgets what Python forgets', () => {
    const { records, state } = goldenForgotten();
    const all = fold(emptyState());
    expect(toSnapshot(fold(all, records))).toEqual(state);
  });

  it('goes on from a snapshot taken after any record', () => {
    const records = goldenFeed();
    for (let cut = 0; cut <= records.length; cut++) {
      const early = toSnapshot(fold(emptyState(), records.slice(0, cut)));
      const sent = JSON.parse(JSON.stringify(early));
      const state = fold(fromSnapshot(sent), records.slice(cut));
      expect(toSnapshot(state)).toEqual(goldenState());
    }
  });

  it('takes a record that comes twice once', () => {
    const twice = goldenFeed().flatMap(record => [record, record]);
    const state = fold(fold(emptyState(), twice));
    expect(toSnapshot(state)).toEqual(goldenState());
  });

  it('does without the records of other people', () => {
    const mine = goldenFeed().filter(record => record.tenant === 'alice');
    const state = fold(emptyState(), mine);
    const all = goldenState();
    expect(toSnapshot(state)).toEqual({
      n: all.n,
      sessions: all.sessions.filter(s => s.tenant === 'alice'),
      runs: all.runs.filter(r => r.tenant === 'alice'),
      samplers: all.samplers.filter(s => s.tenant === 'alice'),
      checkpoints: all.checkpoints.filter(c => c.tenant === 'alice')
    });
  });

  it('survives records of runs and kinds that it does not know', () => {
    const state = fold(emptyState());
    const before = JSON.stringify([...state.runs]);
    ['op_accepted', 'op_done', 'op_failed', 'run_closed', 'new'].forEach(
      (kind, i) =>
        apply(state, {
          n: 100 + i,
          kind,
          tenant: 'alice',
          time: 0,
          data: { run: 'unknown', op: 'optim_step' }
        })
    );
    expect(JSON.stringify([...state.runs])).toEqual(before);
    expect(state.n).toBe(104);
  });
});
