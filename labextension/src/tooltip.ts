/** The box beside the pointer: what the lines of a chart are worth there. Text only, no markup from anywhere. */
import { formatValue } from './format';

const GAP = 12;
const WIDTH = 260;

/** Lines named at once: those whose values are closest to the pointer. */
const ROWS = 8;

/** One line's value under the pointer. `undefined`: the line is not there. */
export interface IReading {
  label: string;
  colour: string;
  value: number | null | undefined;
}

/** See the head of the file. */
export class Tooltip {
  constructor() {
    this._node.className = 'jp-Tuft-tooltip';
    this._node.hidden = true;
  }

  /** Live inside `parent`, a positioned element. */
  attach(parent: HTMLElement): void {
    this._node.hidden = true;
    parent.appendChild(this._node);
  }

  hide(): void {
    this._node.hidden = true;
  }

  /** Show the readings beside `left` (pixels); `pointer` is the value at the height of the pointer. */
  show(
    title: string,
    readings: readonly IReading[],
    pointer: number,
    left: number
  ): void {
    const there = readings.filter(({ value }) => value !== undefined);
    const away = ({ value }: IReading) =>
      Math.abs((value ?? Infinity) - pointer);
    const closest = [...there].sort((a, b) => away(a) - away(b)).slice(0, ROWS);
    const shown = there.filter(reading => closest.includes(reading));
    const rows = shown.map(reading => {
      const row = document.createElement('div');
      const first = shown.length > 1 && reading === closest[0];
      row.className = first ? 'jp-mod-closest' : '';
      const swatch = document.createElement('span');
      swatch.className = 'jp-Tuft-swatch jp-mod-on';
      swatch.style.setProperty('--tuft-line', `var(${reading.colour})`);
      const name = document.createElement('span');
      name.className = 'jp-Tuft-tooltipName';
      name.textContent = reading.label;
      const figure = document.createElement('b');
      figure.textContent = formatValue(reading.value);
      row.append(swatch, name, figure);
      return row;
    });
    const head = document.createElement('div');
    head.className = 'jp-Tuft-tooltipStep';
    const more = there.length - shown.length;
    head.textContent = more ? `${title} (+${more})` : title;
    const node = this._node;
    node.replaceChildren(head, ...rows);
    node.hidden = false;
    const width = node.parentElement?.clientWidth ?? 0;
    const onTheRight = left < width / 2;
    const room = Math.max(left, width - left) - GAP;
    node.style.maxWidth = `${Math.min(room, WIDTH)}px`;
    node.style.left = onTheRight ? `${left + GAP}px` : '';
    node.style.right = onTheRight ? '' : `${width - left + GAP}px`;
  }

  private readonly _node = document.createElement('div');
}
