/** A run's metrics as a file: CSV or JSON lines, one row per step. Pure. */
import { history, Metric, METRICS } from './curves';
import { IRun } from './objects';

type Row = { [column: string]: string | number | null };

function rows(runs: readonly { run: IRun; name: string }[]): Row[] {
  const measured = METRICS.filter(
    (metric): metric is Exclude<Metric, 'tokens_per_second'> =>
      metric !== 'tokens_per_second' &&
      runs.some(({ run }) => run.curve[metric] !== undefined)
  );
  return runs.flatMap(({ run, name }) =>
    history(run.curve).map(i => {
      const row: Row = {
        run: run.id,
        name,
        step: run.curve.step[i],
        time: run.curve.time[i]
      };
      measured.forEach(metric => {
        row[metric] = run.curve[metric]?.[i] ?? null;
      });
      return row;
    })
  );
}

/** RFC 4180. A name that a spreadsheet would take for a formula is written so that it does not. */
export function toCsv(runs: readonly { run: IRun; name: string }[]): string {
  const table = rows(runs);
  const columns = Object.keys(table[0] ?? { run: '', step: 0 });
  const field = (value: string | number | null) => {
    const text =
      typeof value === 'string' && /^[=+\-@\t\r]/.test(value)
        ? `'${value}`
        : String(value ?? '');
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return [columns, ...table.map(row => columns.map(c => row[c]))]
    .map(row => row.map(field).join(',') + '\r\n')
    .join('');
}

/** One JSON object per line. */
export function toJsonLines(
  runs: readonly { run: IRun; name: string }[]
): string {
  return rows(runs)
    .map(row => JSON.stringify(row) + '\n')
    .join('');
}
