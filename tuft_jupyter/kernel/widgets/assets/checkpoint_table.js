/** CheckpointTable: saved weights, their paths to copy and the code that loads one. */

const KINDS = {
  weights: 'training',
  sampler_weights: 'sampler',
  external_weights: 'export'
};

function code(checkpoint) {
  const path = JSON.stringify(checkpoint.path);
  return checkpoint.kind === 'weights'
    ? `training = tuft_jupyter.get_service_client().create_training_client_from_state_with_optimizer(${path}).result()`
    : `sampler = tuft_jupyter.get_service_client().create_sampling_client(model_path=${path}).result()`;
}

const CHECKPOINT_COLUMNS = [
  ['path', c => element('code', {}, c.path)],
  ['kind', c => KINDS[c.kind] ?? c.kind],
  ['step', c => String(c.step), true],
  ['size', c => bytes(c.size_bytes), true],
  ['saved', c => `${ago(Date.now() / 1000 - c.created)} ago`],
  [
    'kept',
    c =>
      c.expires === null
        ? 'for good'
        : `for ${ago(c.expires - Date.now() / 1000)}`
  ],
  ['shared', c => (c.public ? 'published' : '')],
  [
    '',
    c =>
      element(
        'span',
        {},
        copier(c.path, 'path', `Copy the path of ${c.name}`),
        copier(code(c), 'code', `Copy the code that loads ${c.name}`)
      )
  ]
];

export default tableWidget({
  rows: 'checkpoints',
  caption: 'Checkpoints',
  columns: CHECKPOINT_COLUMNS,
  empty: 'No checkpoint yet: training.save_state(name) makes one.',
  fromState: (state, model) =>
    state.checkpoints.filter(c => !model.get('run') || c.run === model.get('run'))
});
