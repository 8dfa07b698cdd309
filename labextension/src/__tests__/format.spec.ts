import {
  formatBytes,
  formatCount,
  formatMoment,
  formatRelative,
  formatShare,
  formatTick,
  formatValue,
  shortId,
  splitPath
} from '../format';

describe('formats', () => {
  it.each([
    [0, '0 B'],
    [999, '999 B'],
    [1024, '1.0 kB'],
    [999_600, '1.0 MB'],
    [12_345_678, '12 MB'],
    [139e9, '139 GB']
  ])('%d bytes as %s', (bytes, text) => expect(formatBytes(bytes)).toBe(text));

  it('use and total in one unit', () => {
    expect(formatShare(512e6, 24e9)).toBe('0.5 / 24 GB');
    expect(formatShare(15.2e9, 25.3e9)).toBe('15 / 25 GB');
  });

  it.each([
    [7, '7'],
    [12_345, '12,345'],
    [327_680, '328k'],
    [999_600, '1.0M'],
    [12_300_000, '12M']
  ])('the count %d as %s', (count, text) =>
    expect(formatCount(count)).toBe(text)
  );

  it.each([
    [null, '–'],
    [undefined, '–'],
    [0, '0.00'],
    [0.0035871, '0.00359'],
    [0.42131, '0.4213'],
    [12.3456, '12.35'],
    [2048, '2048'],
    [0.0001, '1e-4'],
    [-0.000123, '-1.23e-4'],
    [1234567, '1.23e6']
  ])('the value %p as %s', (value, text) =>
    expect(formatValue(value)).toBe(text)
  );

  it.each([
    [1, 0.5, '1.0'],
    [0.25, 0.25, '0.25'],
    [3, 1, '3'],
    [0, 0.0001, '0'],
    [0.00015, 0.00005, '1.5e-4'],
    [20000, 5000, '20k'],
    [1e12, 5e11, '1e12']
  ])('the tick %d at distance %d as %s', (value, distance, text) =>
    expect(formatTick(value, distance)).toBe(text)
  );

  it.each([
    ['a loss that hardly moves', 0.6931, 0.00005],
    ['a zoom into ten thousand steps', 12_300, 20],
    ['a zoom into a hundred thousand steps', 150_000, 1],
    ['a long run', 149_000, 500],
    ['a learning rate', 0.0001, 0.00000005],
    ['a loss that explodes', 1.2e9, 1e7]
  ])('ticks of %s that differ', (_, from, distance) => {
    const ticks = [0, 1, 2, 3].map(i => from + i * distance);
    const words = ticks.map(tick => formatTick(tick, distance));
    expect(new Set(words).size).toBe(4);
    words.forEach(word => expect(word.length).toBeLessThanOrEqual(9));
  });

  it.each([
    [-3, '3 sec. ago'],
    [-200, '3 min. ago'],
    [82_000, 'in 22 hr.'],
    [-200_000, '2 days ago'],
    [-47 * 3600, '1 day ago'],
    [-0.4, 'now']
  ])('%d seconds as %s', (seconds, text) =>
    expect(formatRelative(seconds)).toBe(text)
  );

  it('a time of another day with its date', () => {
    const noon = new Date(2026, 10, 22, 12).getTime() / 1000;
    expect(formatMoment(noon, noon + 3600)).not.toContain('2026');
    expect(formatMoment(noon, noon + 86400)).toContain('2026');
  });

  it('ids by what tells them apart', () => {
    expect(shortId('6f1c2a52-0000-4000-8000-000000000001')).toBe('6f1c2a52');
    expect(shortId('short')).toBe('short');
  });

  it('paths in two parts without losing a character', () => {
    const path = 'tinker://6f1c2a52:train:0/weights/final';
    expect(splitPath(path)).toEqual([
      'tinker://6f1c2a52:train:0/weights',
      '/final'
    ]);
    expect(splitPath('plain')).toEqual(['', 'plain']);
  });
});
