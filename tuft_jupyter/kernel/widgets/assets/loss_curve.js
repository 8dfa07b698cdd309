/** LossCurve: the curves of runs over their steps, with metric, scale, smoothing, zoom, hover, and the values as text. */

const COLOURS = [
  '#1e88e5',
  '#ef6c00',
  '#43a047',
  '#ab47bc',
  '#d81b60',
  '#00acc1',
  '#8d6e63',
  '#7986cb'
];
const NAMES = {
  loss: 'loss (nats per token)',
  grad_norm: 'gradient norm',
  learning_rate: 'learning rate',
  tokens: 'tokens per step'
};
const SETTINGS = ['metric', 'log_scale', 'smoothing'];
const HEIGHT = 240;
const LISTED = 12;

/** Exponential moving average, without the pull of its start. Gaps stay gaps. */
function smoothed(values, weight) {
  let sum = 0;
  let mass = 0;
  return values.map(value => {
    if (value === null) {
      return null;
    }
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

/** The points that led to the present weights: a run that loaded earlier ones left the steps that came after those. */
function branch(columns) {
  const kept = [];
  columns.step.forEach((step, i) => {
    while (kept.length && columns.step[kept.at(-1)] >= step) {
      kept.pop();
    }
    kept.push(i);
  });
  const along = values => kept.map(i => values[i]);
  return Object.fromEntries(
    Object.entries(columns).map(([name, values]) => [name, along(values)])
  );
}

/** The place of the value of `column` that is closest to `index`, or -1. */
function closest(column, index) {
  for (let away = 0; away < column.length; away++) {
    for (const at of [index - away, index + away]) {
      if (Number.isFinite(column[at])) {
        return at;
      }
    }
  }
  return -1;
}

class Curves {
  constructor(model, root) {
    this.model = model;
    this.runs = [];
    this.zoomed = false;
    this.plot = null;
    this.legend = element('div', { class: 'tuft-legend' });
    this.host = element('div', {
      class: 'tuft-plot',
      role: 'img',
      tabindex: '0'
    });
    this.values = element('div', {});
    this.reading = element('p', { class: 'tuft-reading' });
    const listed = element(
      'details',
      {},
      element('summary', {}, 'Values as a table'),
      this.values
    );
    root.append(this.controls(), this.legend, this.host, this.reading, listed);
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.host);
    this.themes = new MutationObserver(() => this.plot?.redraw(false, true));
    for (const node of [document.documentElement, document.body]) {
      this.themes.observe(node, { attributes: true });
    }
    this.changed = () => this.draw();
    for (const name of SETTINGS) {
      model.on(`change:${name}`, this.changed);
    }
  }

  controls() {
    const set = (name, value) => {
      this.model.set(name, value);
      this.model.save_changes();
      this.draw();
    };
    const options = Object.entries(NAMES).map(([value, text]) =>
      element('option', { value }, text)
    );
    this.metric = element(
      'select',
      {
        'aria-label': 'Metric',
        onchange: event => set('metric', event.target.value)
      },
      ...options
    );
    this.log = element('input', {
      type: 'checkbox',
      onchange: event => set('log_scale', event.target.checked)
    });
    this.smooth = element('input', {
      type: 'range',
      min: '0',
      max: '0.98',
      step: '0.02',
      'aria-label': 'Smoothing',
      oninput: event => set('smoothing', Number(event.target.value))
    });
    return element(
      'div',
      { class: 'tuft-controls' },
      this.metric,
      element('label', {}, this.log, ' log scale'),
      element('label', {}, 'smoothing ', this.smooth),
      element(
        'span',
        { class: 'tuft-hint' },
        'drag to zoom, double click for all'
      )
    );
  }

  show(picture) {
    this.runs = picture.runs.map(run => ({
      ...run,
      columns: branch(run.columns)
    }));
    this.missing = picture.missing ?? [];
    this.draw();
  }

  draw() {
    const metric = this.model.get('metric');
    const log = this.model.get('log_scale');
    const weight = this.model.get('smoothing');
    this.metric.value = metric;
    this.log.checked = log;
    this.smooth.value = String(weight);
    const lines = this.runs.map(run => {
      // What is not positive has no place on a logarithmic scale.
      const raw = (run.columns[metric] ?? []).map(value =>
        log && !(value > 0) ? null : value
      );
      return [run.columns.step, weight ? smoothed(raw, weight) : raw];
    });
    const data = lines.length ? uPlot.join(lines) : [[]];
    const shape = `${metric} ${log} ${this.runs.map(run => run.id)}`;
    if (this.plot && this.shape === shape) {
      this.plot.setData(data, !this.zoomed);
      if (this.zoomed) {
        this.plot.redraw();
      }
    } else {
      this.plot?.destroy();
      this.shape = shape;
      this.zoomed = false;
      this.plot = this.runs.length
        ? new uPlot(this.options(log), data, this.host)
        : null;
    }
    this.say(metric);
  }

  options(log) {
    const colour = name =>
      getComputedStyle(this.host).getPropertyValue(name).trim();
    const axis = {
      stroke: () => colour('--tuft-faint'),
      grid: { stroke: () => colour('--tuft-line'), width: 1 },
      ticks: { show: false },
      font: '11px sans-serif'
    };
    const series = this.runs.map((run, i) => ({
      label: run.name,
      stroke: COLOURS[i % COLOURS.length],
      width: 1.75,
      dash: i >= COLOURS.length ? [6, 4] : undefined,
      spanGaps: true,
      points: {
        show: plot => plot.data[0].length <= 40,
        size: 4,
        width: 0,
        fill: COLOURS[i % COLOURS.length]
      }
    }));
    return {
      width: Math.max(this.host.clientWidth, 200),
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [
        {
          ...axis,
          size: 28,
          grid: { show: false },
          incrs: [
            1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4,
            1e5
          ]
        },
        {
          ...axis,
          size: 56,
          values: (_, ticks) =>
            ticks.map(tick => (tick === null ? '' : digits(tick)))
        }
      ],
      series: [{}, ...series],
      hooks: {
        setSelect: [
          plot => (this.zoomed = this.zoomed || plot.select.width > 0)
        ],
        setCursor: [plot => this.point(plot)],
        ready: [
          plot =>
            plot.over.addEventListener('dblclick', () => (this.zoomed = false))
        ]
      }
    };
  }

  /** The legend with the values closest to the pointer, else the last ones, each with its step. */
  point(plot) {
    const index = plot?.cursor.idx;
    this.legend.replaceChildren(
      ...this.runs.map((run, i) => {
        const column = plot ? plot.data[i + 1] : [];
        const at = closest(column, index ?? column.length - 1);
        const swatch = element('span', { class: 'tuft-swatch' });
        swatch.style.background = COLOURS[i % COLOURS.length];
        const step = at < 0 ? run.step : plot.data[0][at];
        const state = run.live ? ' · running' : '';
        const text = ` ${run.name} · step ${step} · ${digits(column[at])}${state}`;
        return element('span', { class: 'tuft-entry' }, swatch, text);
      })
    );
  }

  /** The same for those who do not see the canvas. */
  say(metric) {
    this.point(this.plot);
    const said = this.runs.map(run => {
      const values = (run.columns[metric] ?? []).filter(
        value => value !== null
      );
      const last = values[values.length - 1];
      return values.length
        ? `${run.name}: step ${run.step}, ${metric} ${digits(last)}, lowest ${digits(values.reduce((a, b) => Math.min(a, b)))}`
        : `${run.name}: no value of ${metric} yet`;
    });
    const lost = this.missing.map(
      run => `${shortName(run)}: the server does not know this run`
    );
    this.reading.textContent =
      [...said, ...lost].join('; ') ||
      'No run yet: the first one appears here.';
    this.host.setAttribute(
      'aria-label',
      `${NAMES[metric]} over steps. ${this.reading.textContent}`
    );
    const rows = this.runs.flatMap(run =>
      run.columns.step
        .map((step, i) => ({
          run: run.name,
          step,
          value: (run.columns[metric] ?? [])[i]
        }))
        .slice(-LISTED)
    );
    const columns = [
      ['run', row => row.run],
      ['step', row => String(row.step), true],
      [metric, row => digits(row.value), true]
    ];
    this.values.replaceChildren(
      table(`The last ${LISTED} values`, columns, rows, 'No value yet.')
    );
  }

  fit() {
    const width = this.host.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) {
      this.plot.setSize({ width, height: HEIGHT });
    }
  }

  dispose() {
    this.sizes.disconnect();
    this.themes.disconnect();
    for (const name of SETTINGS) {
      this.model.off(`change:${name}`, this.changed);
    }
    this.plot?.destroy();
  }
}

function fromState(model, state) {
  const named = model.get('runs');
  const newest = [...state.runs]
    .sort((a, b) => b.created - a.created)
    .slice(0, 1);
  const shown = named.length
    ? state.runs.filter(run => named.includes(run.id))
    : newest;
  return {
    runs: shown.map(run => ({
      id: run.id,
      name: shortName(run.id),
      live: run.pending > 0,
      step: run.step,
      columns: run.curve
    }))
  };
}

function render({ model, el }) {
  const root = element('div', { class: 'tuft-widget' });
  el.append(root);
  const curves = new Curves(model, root);
  const end = follow(
    model,
    root,
    picture => picture.runs && curves.show(picture),
    state => fromState(model, state)
  );
  return () => {
    end();
    curves.dispose();
  };
}

export default { render };
