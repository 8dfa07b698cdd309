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

function render({ model, el }) {
  const root = element('div', { class: 'tuft-widget' });
  const body = element('div', { class: 'tuft-scroll' });
  root.append(body);
  el.append(root);
  const draw = picture =>
    picture.checkpoints &&
    body.replaceChildren(
      table(
        'Checkpoints',
        CHECKPOINT_COLUMNS,
        picture.checkpoints,
        'No checkpoint yet: training.save_state(name) makes one.'
      )
    );
  return follow(model, root, draw, state => ({
    checkpoints: state.checkpoints
      .filter(c => !model.get('run') || c.run === model.get('run'))
      .reverse()
  }));
}

export default { render };
