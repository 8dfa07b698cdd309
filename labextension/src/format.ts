/** Numbers, times and identifiers in few characters. Pure. */

const BYTE_UNITS = ['B', 'kB', 'MB', 'GB', 'TB'];

/** A size in decimal units: `4.1 kB`. */
export function formatBytes(bytes: number): string {
  let unit = 0;
  let size = bytes;
  while (size >= 999.5 && unit < BYTE_UNITS.length - 1) {
    size /= 1000;
    unit += 1;
  }
  const digits = unit > 0 && size < 9.95 ? 1 : 0;
  return `${size.toFixed(digits)} ${BYTE_UNITS[unit]}`;
}

/** Used and total in the unit of the total: `4.1 / 24 GB`. */
export function formatShare(used: number, total: number): string {
  const [size, unit] = formatBytes(total).split(' ');
  const scaled = used / 1000 ** BYTE_UNITS.indexOf(unit);
  return `${scaled.toFixed(scaled < 9.95 ? 1 : 0)} / ${size} ${unit}`;
}

/** A count: `987`, `12,345`, from a hundred thousand on `328k`, `1.2M`. */
export function formatCount(count: number): string {
  if (count >= 999_500) {
    return `${(count / 1e6).toFixed(count < 9.95e6 ? 1 : 0)}M`;
  }
  return count >= 1e5
    ? `${Math.round(count / 1e3)}k`
    : Math.round(count).toLocaleString('en-US');
}

/** A measured value with three or four significant digits, `–` where there is none. */
export function formatValue(value: number | null | undefined): string {
  if (value === null || value === undefined) {
    return '–';
  }
  const size = Math.abs(value);
  if (size >= 1e5) {
    return value.toExponential(2).replace('e+', 'e');
  }
  if (size > 0 && size < 1e-3) {
    const [digits, exponent] = value.toExponential(2).split('e');
    return `${Number(digits)}e${exponent}`;
  }
  return size >= 1000
    ? value.toFixed(0)
    : value.toPrecision(size < 0.1 ? 3 : 4);
}

/** The tick of an axis: as many digits as tell it from its neighbours at this distance, and no more. */
export function formatTick(value: number, distance: number): string {
  const size = Math.abs(value);
  const power = size > 0 ? Math.floor(Math.log10(size)) : 0;
  if (size >= 1e7 || (size > 0 && size < 1e-2 && distance < 1e-3)) {
    const shown = value.toExponential(digitsFor(distance / 10 ** power));
    const [digits, exponent] = shown.split('e');
    return `${Number(digits)}e${Number(exponent)}`;
  }
  if (size >= 1e4) {
    return distance < 100
      ? Math.round(value).toLocaleString('en-US')
      : `${(value / 1e3).toFixed(digitsFor(distance / 1e3))}k`;
  }
  return size === 0 && distance < 1e-3
    ? '0'
    : value.toFixed(digitsFor(distance));
}

/** Digits behind the point that multiples of `distance` have. */
function digitsFor(distance: number): number {
  let digits = 0;
  while (digits < 6 && !isWhole(distance * 10 ** digits)) {
    digits += 1;
  }
  return digits;
}

function isWhole(value: number): boolean {
  return value >= 0.5 && Math.abs(value - Math.round(value)) < 1e-6;
}

const SPANS: [number, Intl.RelativeTimeFormatUnit][] = [
  [60, 'second'],
  [3600, 'minute'],
  [86400, 'hour'],
  [Infinity, 'day']
];
const SECONDS = { second: 1, minute: 60, hour: 3600, day: 86400 } as Record<
  Intl.RelativeTimeFormatUnit,
  number
>;

/** `3 min. ago`, `in 23 hr.`; the reader's language where the browser knows it. Negative seconds are past. */
export function formatRelative(seconds: number, locale = 'en'): string {
  const [, unit] = SPANS.find(([limit]) => Math.abs(seconds) < limit)!;
  const whole = Math.trunc(seconds / SECONDS[unit]);
  // “yesterday” would be said of what is 47 hours old
  return new Intl.RelativeTimeFormat(locale, {
    style: 'short',
    numeric: whole ? 'always' : 'auto'
  }).format(whole, unit);
}

/** The time of day, with the date unless that is today's. */
export function formatMoment(time: number, now: number): string {
  const [moment, today] = [new Date(time * 1000), new Date(now * 1000)];
  return moment.toDateString() === today.toDateString()
    ? moment.toLocaleTimeString()
    : moment.toLocaleString();
}

/** The part of an id that a person compares: eight characters of a session's uuid. */
export function shortId(id: string): string {
  return id.length > 10 ? id.slice(0, 8) : id;
}

/**
 * A long path in two parts, of which a narrow column may shorten the first:
 * `tinker://6f1c2a52-…:train:0/weights` and `/final`.
 */
export function splitPath(path: string): [string, string] {
  const slash = path.lastIndexOf('/');
  return slash > 0 ? [path.slice(0, slash), path.slice(slash)] : ['', path];
}

/** A span of time: `0.4 s`, `12 s`, `3:07`, `1:02:45`. */
export function formatDuration(seconds: number): string {
  if (seconds < 60) {
    return `${seconds < 9.95 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
  }
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60)];
  const two = (value: number) => String(value % 60).padStart(2, '0');
  return hours
    ? `${hours}:${two(minutes)}:${two(whole)}`
    : `${minutes}:${two(whole)}`;
}
