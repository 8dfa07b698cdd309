import { toCsv, toJsonLines } from '../export';
import { goldenState } from './support';

describe('exported metrics', () => {
  const [run] = goldenState().runs;

  it('have one line per step and no name that a spreadsheet runs', () => {
    const lines = toCsv([{ run, name: '=HYPERLINK("x")' }]).split('\r\n');
    expect(lines[0]).toBe(
      'run,name,step,time,loss,kl,grad_norm,learning_rate,tokens'
    );
    expect(lines[1]).toBe(
      `${run.id},"'=HYPERLINK(""x"")",1,1790000002.25,4,0.125,2.5,0.001,96`
    );
    expect(lines.length).toBe(4);
  });

  it('are JSON objects, one per line', () => {
    const lines = toJsonLines([{ run, name: 'pirate' }])
      .trim()
      .split('\n');
    expect(lines.map(line => JSON.parse(line).step)).toEqual([1, 2]);
    expect(JSON.parse(lines[1]).loss).toBe(2);
  });
});
