import { nullTranslator } from '@jupyterlab/translation';
import { CommandRegistry } from '@lumino/commands';
import { Widget } from '@lumino/widgets';
import { Api, ApiError, IStateAnswer } from '../api';
import { emptyWord } from '../canvas';
import { Feed } from '../feed';
import { ISnapshot } from '../objects';
import { TuftPanel } from '../panel';
import {
  emptyAnswer,
  FakeApi,
  goldenFeed,
  goldenState,
  READY,
  settle
} from './support';

const plots: { setData: jest.Mock; redraw: jest.Mock; data: unknown }[] = [];

// jsdom has no canvas.
jest.mock('uplot', () =>
  jest.fn().mockImplementation((options: { series: unknown[] }, data) => {
    const plot = {
      data,
      series: options.series,
      over: document.createElement('div'),
      setData: jest.fn(),
      setScale: jest.fn(),
      batch: (work: () => void) => work(),
      redraw: jest.fn(),
      destroy: jest.fn()
    };
    plots.push(plot);
    return plot;
  })
);

class FakeResizeObserver {
  observe(): void {}
  disconnect(): void {}
}

describe('the panel', () => {
  let api: FakeApi;
  let feed: Feed;
  let panel: TuftPanel;
  let commands: CommandRegistry;

  beforeEach(() => {
    plots.length = 0;
    Object.assign(globalThis, { ResizeObserver: FakeResizeObserver });
    api = new FakeApi();
    commands = new CommandRegistry();
    feed = new Feed(api);
    panel = new TuftPanel(
      {
        api: api as unknown as Api,
        feed,
        commands,
        trans: nullTranslator.load('tuft_jupyter')
      },
      () => undefined
    );
    panel.configure({
      metric: 'loss',
      drawsPerSecond: 1000,
      statusBar: true
    });
  });

  afterEach(() => {
    panel.dispose();
    feed.dispose();
  });

  /** Show the panel over a server that answers so. */
  async function show(answer: IStateAnswer): Promise<void> {
    api.answer = async () => answer;
    Widget.attach(panel, document.body);
    await settle();
    api.socket.accept();
    await eventually(() => expect(texts('[role="status"]')).not.toEqual([]));
  }

  /** Wait until `check` passes: React and Lumino draw when they find time. */
  async function eventually(check: () => void): Promise<void> {
    for (let tries = 0; tries < 200; tries++) {
      try {
        return check();
      } catch {
        await new Promise(done => setTimeout(done, 5));
      }
    }
    check();
  }

  function texts(selector: string): string[] {
    return [...panel.node.querySelectorAll(selector)].map(
      node => node.textContent ?? ''
    );
  }

  function answer(change: (state: ISnapshot) => void = () => {}): IStateAnswer {
    const state = goldenState();
    change(state);
    return { state, status: READY };
  }

  it('has a name that a screen reader can say', () => {
    expect(panel.node.getAttribute('role')).toBe('region');
    expect(panel.node.getAttribute('aria-label')).toBe('TuFT: fine-tuning');
  });

  it('says what to type when there is nothing', async () => {
    await show(emptyAnswer());
    await eventually(() =>
      expect(texts('pre').join()).toContain('%tuft init tuft/demo')
    );
  });

  it('shows runs with their figures', async () => {
    await show(answer());
    await eventually(() => expect(texts('.jp-Tuft-card').length).toBe(2));
    const cards = texts('.jp-Tuft-card');
    expect(cards[0]).toContain('tuft/demo: no backend installed');
    expect(cards[1]).toContain('pirate');
    expect(cards[1]).toContain('rank 8');
    expect(cards[1]).toContain('loss2.000');
  });

  it('shows the newest of many runs, and those that train', async () => {
    const [one] = goldenState().runs;
    await show(
      answer(state => {
        state.runs = [...Array(30).keys()].map(i => ({
          ...{ ...one, status: 'ready' as const, last_request: 0 },
          ...{ id: `s:train:${i}`, tenant: `student-${i}` },
          pending: i === 3 ? 1 : 0
        }));
      })
    );
    const owners = () =>
      texts('.jp-Tuft-card').map(card => /student-(\d+)/.exec(card)![1]);
    await eventually(() =>
      expect(owners()).toEqual(['29', '28', '27', '26', '3'])
    );
    expect(
      panel.node.querySelector('input[aria-label="Search runs"]')
    ).not.toBeNull();
  });

  it('S1-45: shows the whole path of every checkpoint, with a copy button', async () => {
    await show(answer());
    const paths = goldenState().checkpoints.map(c => c.path);
    await eventually(() =>
      expect(texts('[aria-label="Checkpoints"] .jp-Tuft-path').sort()).toEqual(
        paths.sort()
      )
    );
    const buttons = [...panel.node.querySelectorAll('button[aria-label]')].map(
      button => button.getAttribute('aria-label')
    );
    paths.forEach(path => expect(buttons).toContain(`Copy ${path}`));
  });

  it('shows names of any kind as text', async () => {
    const evil = '<img src=x onerror="window.evil = true"><script>1</script>';
    await show(
      answer(state => {
        state.sessions[0].display_name = evil;
        state.runs[0].base_model = evil;
        state.checkpoints[0].name = evil;
        state.runs[1].error = evil;
      })
    );
    await eventually(() => expect(texts('.jp-Tuft-runName')).toContain(evil));
    expect(texts('.jp-Tuft-error')).toEqual([evil]);
    expect(panel.node.querySelector('img, script')).toBeNull();
  });

  it('says why the last request of a run failed, until one succeeds', async () => {
    const { id } = goldenState().runs[0];
    await show(answer(state => (state.runs[0].status = 'ready')));
    const op = (kind: string, n: number, data: object) => ({
      ...{ n: goldenState().n + n, kind, tenant: 'alice', time: 0 },
      data: { run: id, op: 'forward_backward', ...data }
    });
    const failed = op('op_failed', 1, { error: 'the loss is nan' });
    api.socket.send({ type: 'records', records: [failed] });
    await eventually(() =>
      expect(texts('.jp-Tuft-error')).toContain(
        'Its last request failed: the loss is nan'
      )
    );
    const done = op('op_done', 2, { facts: {} });
    api.socket.send({ type: 'records', records: [done] });
    await eventually(() =>
      expect(texts('.jp-Tuft-error').join()).not.toContain('nan')
    );
  });

  it('opens no run that was forgotten while it was on the chart', async () => {
    const execute = jest.spyOn(commands, 'execute').mockResolvedValue(null);
    const [first, second] = goldenState().runs.map(({ id }) => id);
    await show(answer());
    await eventually(() => expect(texts('.jp-Tuft-runName').length).toBe(2));
    panel.node
      .querySelector<HTMLElement>('.jp-Tuft-runName[aria-pressed="false"]')!
      .click();
    const data = { runs: [second], samplers: [], sessions: [] };
    const gone = { kind: 'forgotten', tenant: 'alice', time: 0, data };
    const n = goldenState().n + 1;
    api.socket.send({ type: 'records', records: [{ ...gone, n }] });
    await eventually(() => expect(texts('.jp-Tuft-runName').length).toBe(1));
    [...panel.node.querySelectorAll('button')]
      .find(node => node.textContent === 'Enlarge')!
      .click();
    expect(execute.mock.lastCall?.[1]).toMatchObject({ runs: [first] });
  });

  it('draws another run in its own dashes', async () => {
    const { Chart } = await import('../chart');
    const chart = new Chart(document.createElement('div'), {
      height: 100,
      xLabel: String,
      xTick: String,
      wholeX: true
    });
    const line = { label: '', colour: '', live: false, x: [1], y: [1] };
    chart.update([{ ...line, dashed: false }]);
    chart.update([{ ...line, dashed: false }]);
    expect(plots.length).toBe(1);
    chart.update([{ ...line, dashed: true }]);
    expect(plots.length).toBe(2);
  });

  it('makes one key, however often its button is pressed', async () => {
    let made = 0;
    api.routes = {
      'GET tuft/keys': () => ({ keys: [] }),
      'POST tuft/keys': () => ({ key: `tml-${++made}` })
    };
    await show({ ...emptyAnswer(), status: { ...READY, admin: true } });
    const keys = () => panel.node.querySelector('[aria-label="Keys"]')!;
    await eventually(() => expect(keys()).not.toBeNull());
    keys().querySelector('button')!.click();
    const form = () => keys().querySelector('form')!;
    await eventually(() =>
      expect(form().querySelector('button')!.disabled).toBe(false)
    );
    const submit = () =>
      form().dispatchEvent(
        new Event('submit', { bubbles: true, cancelable: true })
      );
    submit();
    await settle();
    submit();
    await eventually(() => expect(texts('code')).toContain('tml-1'));
    expect(made).toBe(1);
  });

  it('lets no name turn around what stands beside it', async () => {
    await show(
      answer(state => (state.sessions[0].display_name = '\u202eevil\u2066'))
    );
    await eventually(() => expect(texts('.jp-Tuft-runName')).toContain('evil'));
    expect(panel.node.textContent).not.toMatch(/[\u202e\u2066]/);
  });

  it('says so where there is nothing that it could draw', async () => {
    await show(
      answer(state => state.runs.forEach(run => run.curve.loss.fill(null)))
    );
    await eventually(() =>
      expect(texts('.jp-Tuft-chartEmpty')).toEqual(['No value yet.'])
    );
    const { step } = goldenState().runs[0].curve;
    const line = { label: '', colour: '', dashed: false, live: false, x: step };
    const word = (y: number[], log: boolean) =>
      emptyWord([{ ...line, y }], log, nullTranslator.load(''));
    expect(
      word(
        step.map(() => 0),
        true
      )
    ).toContain('log scale');
    expect(word([], true)).toContain('still to come');
  });

  it('draws points as records come in', async () => {
    await show(emptyAnswer());
    api.socket.send({ type: 'records', records: goldenFeed().slice(0, 9) });
    await eventually(() => expect(plots[0]?.data).toEqual([[1], [4]]));
    expect(texts('[role="status"]')).toContain('step 1, loss 4.000');
    api.socket.send({ type: 'records', records: goldenFeed() });
    await eventually(() =>
      expect(plots[0].setData).toHaveBeenLastCalledWith(
        [
          [1, 2],
          [4, 2]
        ],
        false
      )
    );
  });

  it('draws again when the theme changes', async () => {
    await show(answer());
    await eventually(() => expect(plots.length).toBe(1));
    const before = plots[0].redraw.mock.calls.length;
    panel.themeChanged();
    await eventually(() =>
      expect(plots[0].redraw.mock.calls.length).toBe(before + 1)
    );
  });

  it('puts a run on the chart and takes it away by a click', async () => {
    await show(answer());
    const pressed = () =>
      [...panel.node.querySelectorAll('.jp-Tuft-runName')].map(node =>
        node.getAttribute('aria-pressed')
      );
    await eventually(() => expect(pressed()).toEqual(['false', 'true']));
    panel.node
      .querySelector<HTMLElement>('.jp-Tuft-runName[aria-pressed="true"]')!
      .click();
    await eventually(() => expect(pressed()).toEqual(['false', 'false']));
  });

  it('shows the values of the chart as a table', async () => {
    await show(answer());
    const button = () =>
      [...panel.node.querySelectorAll('button')].find(
        node => node.textContent === 'Table'
      );
    await eventually(() => expect(button()).toBeDefined());
    button()!.click();
    await eventually(() =>
      expect(texts('.jp-Tuft-table tbody tr')).toEqual(['22.000', '14.000'])
    );
  });

  it.each([
    ['missing', 'Fine-tuning is not set up on this server'],
    ['unusable', 'Fine-tuning is not set up correctly'],
    ['forbidden', 'You may not see fine-tuning on this server'],
    ['unreachable', 'The notebook server does not answer']
  ] as const)('stays calm when the server is %s', async (reason, sentence) => {
    api.answer = () => Promise.reject(new ApiError(reason, ''));
    Widget.attach(panel, document.body);
    await eventually(() =>
      expect(texts('[role="status"]')).toEqual([sentence])
    );
  });

  it('S1-04: says how to install a missing backend', async () => {
    const backend = { installed: false, detail: 'torch is missing' };
    await show({
      ...emptyAnswer(),
      status: { ...READY, ready: false, backend }
    });
    await eventually(() =>
      expect(texts('[role="status"]')).toEqual([
        'No training backend is installed'
      ])
    );
    expect(texts('pre')).toEqual(['pip install "tuft-jupyter[backend]"']);
  });

  it('closes the connection while it is hidden', async () => {
    await show(answer());
    panel.hide();
    expect(api.socket.closed).toBe(true);
    panel.show();
    expect(api.sockets.length).toBe(2);
    expect(api.socket.since).toBe(goldenState().n);
  });
});
