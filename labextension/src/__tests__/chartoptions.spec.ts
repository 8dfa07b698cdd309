import uPlot from 'uplot';
import { IPlot, plotOptions } from '../chartoptions';

/** What stands below a chart whose values go from `lowest` on; null: there are none yet. */
function numbersBelow(lowest: number | null): unknown {
  const plot = {
    width: 300,
    height: 180,
    series: [],
    theme: () => '',
    xTick: String
  } as unknown as IPlot;
  const drawn = { scales: { y: { min: lowest } } } as unknown as uPlot;
  const values = plotOptions(plot).axes?.[0].values as (
    ...given: unknown[]
  ) => unknown;
  return values(drawn, [0, 1, 2], 0, 48, 1);
}

test('a chart without a point has no numbers, the first of which would be cut off', () => {
  expect(numbersBelow(0.5)).toEqual(['0', '1', '2']);
  expect(numbersBelow(null)).toEqual(['', '', '']);
});
