import {
  history,
  latest,
  lineOf,
  seriesOf,
  smoothed,
  throughput
} from '../curves';
import { ICurve, IRun } from '../objects';
import { align, extent, nearest, thin } from '../thin';
import { goldenState } from './support';

function run(step: number[], loss: (number | null)[], seconds = 1): IRun {
  const curve: ICurve = {
    step,
    loss,
    time: step.map((_, i) => 1000 + i * seconds),
    tokens: step.map(() => 100),
    grad_norm: step.map(() => null),
    learning_rate: step.map(() => 0.001),
    kl: step.map(() => null)
  };
  return { ...goldenState().runs[0], curve };
}

describe('curves', () => {
  it('of several runs stand over one axis', () => {
    const aligned = align(
      [run([1, 2, 3], [3, 2, 1]), run([2, 4], [5, null])].map(one =>
        seriesOf(one, 'loss')
      )
    );
    expect(aligned.x).toEqual([1, 2, 3, 4]);
    expect(aligned.y).toEqual([
      [3, 2, 1, undefined],
      [undefined, 5, undefined, null]
    ]);
  });

  it('show the branch that led to the present weights', () => {
    const rewound = run([1, 2, 3, 4, 3, 4], [9, 8, 7, 6, 5, 4]);
    expect(history(rewound.curve)).toEqual([0, 1, 4, 5]);
    expect(seriesOf(rewound, 'loss')).toEqual({
      x: [1, 2, 3, 4],
      y: [9, 8, 5, 4]
    });
  });

  it('give tokens per second from the second step on', () => {
    expect(throughput(run([1], [1]))).toBeNull();
    expect(throughput(run([1, 2, 3], [3, 2, 1], 0.5))).toBeCloseTo(200);
  });

  it('give the newest value', () => {
    expect(latest(run([1, 2], [2, 1]), 'loss')).toBe(1);
    expect(latest(run([], []), 'loss')).toBeNull();
  });

  it('look different from each other', () => {
    const looks = [...Array(12).keys()].map(i => JSON.stringify(lineOf(i)));
    expect(new Set(looks).size).toBe(12);
  });

  it('follow a curve that grows and goes back', () => {
    const growing = run([1, 2, 3], [3, 2, 1]);
    expect(seriesOf(growing, 'loss').x).toEqual([1, 2, 3]);
    growing.curve.step.push(2);
    growing.curve.loss.push(7);
    growing.curve.time.push(2000);
    expect(seriesOf(growing, 'loss')).toEqual({ x: [1, 2], y: [3, 7] });
    expect(seriesOf(growing, 'tokens_per_second').y[0]).toBeNull();
  });

  it('are whole after the clock was set back', () => {
    const jumped = run([1, 2, 3, 4], [4, 3, 2, 1]);
    jumped.curve.time = [1000, 1001, 400, 1002];
    const line = seriesOf(jumped, 'loss', 'time');
    expect(line.x).toEqual([0, 1, 1, 2]);
    expect(align([line])).toEqual({ x: [0, 1, 2], y: [[4, 2, 1]] });
  });

  it('do not pile up while a slider is moved', () => {
    const one = run([1, 2, 3], [3, 2, 1]);
    const first = seriesOf(one, 'loss', 'step', 0.001);
    const raw = seriesOf(one, 'loss');
    for (let i = 1; i < 100; i++) {
      seriesOf(one, 'loss', 'step', i / 100);
      expect(seriesOf(one, 'loss')).toBe(raw);
    }
    expect(seriesOf(one, 'loss', 'step', 0.001)).not.toBe(first);
  });

  it('are smoothed without a bias towards zero', () => {
    expect(smoothed([4, null, 4, 4], 0.9)).toEqual([4, null, 4, 4]);
    const [, second] = smoothed([0, 1], 0.5);
    expect(second).toBeCloseTo(2 / 3);
  });

  it('keep every extreme when they are thinned', () => {
    const x = [...Array(10_000).keys()];
    const y = x.map(i => (i === 4321 ? 99 : i === 777 ? -99 : Math.sin(i)));
    const drawn = thin([{ x, y }], 0, 9999, 200);
    expect(drawn.x.length).toBeLessThan(500);
    const values = drawn.y[0].filter((v): v is number => typeof v === 'number');
    expect(Math.max(...values)).toBe(99);
    expect(Math.min(...values)).toBe(-99);
    const zoomed = thin([{ x, y }], 4300, 4340, 200);
    expect(zoomed.x).toContain(4321);
    expect(zoomed.x.length).toBeLessThan(50);
  });

  it('find the nearest point', () => {
    expect(nearest([1, 5, 9], 6)).toBe(1);
    expect(nearest([1, 5, 9], 100)).toBe(2);
    expect(nearest([], 1)).toBe(-1);
    expect(extent([{ x: [], y: [] }])).toBeNull();
  });
});
