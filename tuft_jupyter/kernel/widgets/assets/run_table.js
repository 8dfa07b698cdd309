/** RunTable: runs with their state now. */

const RUN_COLUMNS = [
  [
    'run',
    run =>
      element(
        'span',
        {},
        run.name,
        ' ',
        copier(run.id, 'copy', `Copy the id of run ${run.name}`)
      )
  ],
  ['base model', run => run.base_model],
  ['rank', run => String(run.rank ?? ''), true],
  [
    'state',
    run => (run.pending ? `${run.status}, ${run.pending} waiting` : run.status)
  ],
  ['step', run => String(run.step), true],
  ['loss', run => digits(run.loss), true],
  ['tokens/s', run => (run.pending ? digits(run.tokens_per_second) : ''), true],
  [
    'last request',
    run =>
      run.last_request ? `${ago(Date.now() / 1000 - run.last_request)} ago` : ''
  ],
  [
    'why it waits',
    run => (run.pending || run.status === 'failed' ? (run.why ?? '') : '')
  ]
];

export default tableWidget({
  rows: 'runs',
  caption: 'Runs',
  columns: RUN_COLUMNS,
  empty: 'No run yet: the first one appears here.',
  fromState: state =>
    state.runs.map(run => ({
      ...run,
      name: shortName(run.id),
      loss: run.curve.loss.at(-1),
      why: run.error
    }))
});
