import { align, history, latest, lineOf, throughput } from '../curves';
import { ICurve, IRun } from '../model';
import { goldenState } from './support';

function run(step: number[], loss: (number | null)[], seconds = 1): IRun {
  const curve: ICurve = {
    step,
    loss,
    time: step.map((_, i) => 1000 + i * seconds),
    tokens: step.map(() => 100),
    grad_norm: step.map(() => null),
    learning_rate: step.map(() => 0.001)
  };
  return { ...goldenState().runs[0], curve };
}

describe('curves', () => {
  it('of several runs stand over one axis', () => {
    const aligned = align(
      [run([1, 2, 3], [3, 2, 1]), run([2, 4], [5, null])],
      'loss'
    );
    expect(aligned.steps).toEqual([1, 2, 3, 4]);
    expect(aligned.values).toEqual([
      [3, 2, 1, undefined],
      [undefined, 5, undefined, null]
    ]);
  });

  it('show the branch that led to the present weights', () => {
    const rewound = run([1, 2, 3, 4, 3, 4], [9, 8, 7, 6, 5, 4]);
    expect(history(rewound.curve)).toEqual([0, 1, 4, 5]);
    expect(align([rewound], 'loss')).toEqual({
      steps: [1, 2, 3, 4],
      values: [[9, 8, 5, 4]]
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
});
