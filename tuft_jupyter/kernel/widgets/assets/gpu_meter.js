/** GpuMeter: bars of what the machine does, each with its value in words. */

function bar(label, part, text) {
  const percent = Math.round(100 * Math.min(Math.max(part, 0), 1));
  return element(
    'div',
    { class: 'tuft-meter' },
    element('span', { class: 'tuft-meterLabel' }, label),
    element('meter', {
      min: '0',
      max: '100',
      high: '90',
      value: String(percent),
      'aria-label': `${label}: ${text}`
    }),
    element('span', {}, text)
  );
}

function gpuBars({ name, used, total, utilization }) {
  return [
    bar(name, utilization / 100, `${Math.round(utilization)} %`),
    bar(`${name} memory`, used / total, `${bytes(used)} of ${bytes(total)}`)
  ];
}

function render({ model, el }) {
  const root = element('div', { class: 'tuft-widget' });
  const body = element('div', {});
  root.append(body);
  el.append(root);
  const draw = ({ gauges }) => {
    if (!gauges) {
      return;
    }
    const gpus = gauges.gpus ?? [];
    body.replaceChildren(
      ...(gpus.length
        ? gpus.flatMap(gpuBars)
        : [element('p', { class: 'tuft-note' }, 'No GPU on this machine.')]),
      bar('CPU', gauges.cpu / 100, `${Math.round(gauges.cpu)} %`),
      bar(
        'memory',
        gauges.memory.used / gauges.memory.total,
        `${bytes(gauges.memory.used)} of ${bytes(gauges.memory.total)}`
      ),
      ...gauges.workers.map(worker =>
        element(
          'div',
          { class: 'tuft-note' },
          `${worker.name}: ${bytes(worker.memory)}, CPU ${Math.round(worker.cpu)} %`
        )
      )
    );
  };
  return follow(model, root, draw, () => null);
}

export default { render };
