/**
 * A line chart of one metric over the steps of several runs, drawn by uPlot on a canvas.
 *
 * Colours are read from the theme at each draw. Knows no React and no model: it gets columns and draws them. A canvas
 * tells a screen reader nothing, so whoever uses it puts the same values into text.
 */
import uPlot from 'uplot';
import { formatTick, formatValue } from './format';

const HEIGHT = 190;
const TOOLTIP_GAP = 10;
const TOOLTIP_WIDTH = 180;

/** One line: how it is called and drawn. `colour` is the name of a CSS variable. */
export interface ILine {
  label: string;
  colour: string;
  dashed: boolean;
  /** Whether the line still grows: its end is marked. */
  live: boolean;
}

/** See the head of the file. */
export class Chart {
  constructor(
    private readonly _host: HTMLElement,
    private readonly _stepLabel: (step: number) => string
  ) {
    this._observer = new ResizeObserver(() => this._fit());
    this._observer.observe(_host);
    this._tooltip.className = 'jp-Tuft-tooltip';
  }

  /** Show `values[i]` over `steps` as `lines[i]`. */
  update(
    lines: readonly ILine[],
    steps: number[],
    values: (number | null | undefined)[][]
  ): void {
    const data = [steps, ...values] as uPlot.AlignedData;
    this._lines = lines;
    if (this._plot && this._plot.series.length === lines.length + 1) {
      this._plot.setData(data);
    } else {
      this._plot?.destroy();
      this._plot = new uPlot(this._options(), data, this._host);
      this._plot.over.appendChild(this._tooltip);
      this._tooltip.hidden = true;
    }
  }

  /** Draw again, after the theme has changed. */
  redraw(): void {
    this._plot?.redraw(false, true);
  }

  dispose(): void {
    this._observer.disconnect();
    this._plot?.destroy();
    this._plot = null;
  }

  private _fit(): void {
    const width = this._host.clientWidth;
    if (this._plot && width > 0 && width !== this._plot.width) {
      this._plot.setSize({ width, height: HEIGHT });
    }
  }

  private _theme(variable: string): string {
    return getComputedStyle(this._host).getPropertyValue(variable).trim();
  }

  private _font(): string {
    return `10px ${this._theme('--jp-ui-font-family')}`;
  }

  private _options(): uPlot.Options {
    const axis: uPlot.Axis = {
      stroke: () => this._theme('--jp-ui-font-color2'),
      font: this._font(),
      ticks: { show: false },
      grid: {
        stroke: plot =>
          translucent(plot.ctx, this._theme('--jp-ui-font-color0'), '1f'),
        width: 1
      }
    };
    return {
      width: Math.max(this._host.clientWidth, 120),
      height: HEIGHT,
      padding: [8, 12, 0, 0],
      legend: { show: false },
      scales: { x: { time: false, range: (_, min, max) => xRange(min, max) } },
      axes: [
        {
          ...axis,
          size: 22,
          gap: 4,
          space: 48,
          incrs: WHOLE_STEPS,
          grid: { show: false },
          values: (_, ticks) =>
            ticks.map(v => (v >= 1e4 ? formatTick(v, 1) : `${v}`))
        },
        {
          ...axis,
          size: 42,
          gap: 4,
          space: 32,
          values: (_, ticks, __, ___, distance) =>
            ticks.map(v => formatTick(v, distance))
        }
      ],
      cursor: {
        drag: { x: false, y: false },
        y: false,
        points: { size: 7, width: 0 }
      },
      series: [{}, ...this._lines.map((_, i) => this._series(i))],
      hooks: {
        draw: [plot => this._markEnds(plot)],
        setCursor: [plot => this._point(plot)]
      }
    };
  }

  private _series(index: number): uPlot.Series {
    const stroke = () => this._theme(this._lines[index].colour);
    return {
      stroke,
      width: 1.75,
      spanGaps: true,
      dash: this._lines[index].dashed ? [5, 3] : undefined,
      points: {
        show: plot => plot.data[0].length <= 24,
        size: 4,
        width: 0,
        fill: stroke
      },
      fill: plot =>
        this._lines.length === 1 ? fade(plot, stroke()) : 'transparent'
    };
  }

  /** A dot with a halo where a live curve grows. */
  private _markEnds(plot: uPlot): void {
    const { ctx } = plot;
    const unit = devicePixelRatio;
    this._lines.forEach((line, i) => {
      const column = plot.data[i + 1];
      let last = column.length - 1;
      while (last >= 0 && (column[last] ?? null) === null) {
        last -= 1;
      }
      if (!line.live || last < 0) {
        return;
      }
      const x = plot.valToPos(plot.data[0][last], 'x', true);
      const y = plot.valToPos(column[last] as number, 'y', true);
      ctx.save();
      ctx.fillStyle = this._theme(line.colour);
      for (const [radius, alpha] of [
        [6.5, 0.22],
        [3, 1]
      ]) {
        ctx.globalAlpha = alpha;
        ctx.beginPath();
        ctx.arc(x, y, radius * unit, 0, 2 * Math.PI);
        ctx.fill();
      }
      ctx.restore();
    });
  }

  /** The values under the pointer, beside it. */
  private _point(plot: uPlot): void {
    const { idx, left } = plot.cursor;
    const tip = this._tooltip;
    const hidden = idx === null || idx === undefined || !(left! >= 0);
    tip.hidden = hidden;
    if (hidden) {
      return;
    }
    const head = document.createElement('div');
    head.className = 'jp-Tuft-tooltipStep';
    head.textContent = this._stepLabel(plot.data[0][idx]);
    const rows = this._lines.map((line, i) => {
      const row = document.createElement('div');
      const value = plot.data[i + 1][idx];
      row.hidden = value === undefined;
      const swatch = document.createElement('span');
      swatch.className = 'jp-Tuft-swatch jp-mod-on';
      swatch.style.setProperty('--tuft-line', `var(${line.colour})`);
      const name = document.createElement('span');
      name.className = 'jp-Tuft-tooltipName';
      name.textContent = line.label;
      const figure = document.createElement('b');
      figure.textContent = formatValue(value);
      row.append(swatch, name, figure);
      return row;
    });
    tip.replaceChildren(head, ...rows);
    const { clientWidth } = plot.over;
    const x = plot.valToPos(plot.data[0][idx], 'x');
    const onTheRight = x < clientWidth / 2;
    const room = Math.max(x, clientWidth - x) - TOOLTIP_GAP;
    tip.style.maxWidth = `${Math.min(room, TOOLTIP_WIDTH)}px`;
    tip.style.left = onTheRight ? `${x + TOOLTIP_GAP}px` : '';
    tip.style.right = onTheRight ? '' : `${clientWidth - x + TOOLTIP_GAP}px`;
  }

  private _lines: readonly ILine[] = [];
  private _plot: uPlot | null = null;
  private readonly _observer: ResizeObserver;
  private readonly _tooltip = document.createElement('div');
}

const WHOLE_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500].flatMap(n => [
  n,
  ...(n >= 100 ? [n * 10, n * 100, n * 1000] : [])
]);
WHOLE_STEPS.sort((a, b) => a - b);

/** At least a few steps wide, so that a curve of one point has a place. */
function xRange(min: number, max: number): [number, number] {
  return max > min ? [min, max] : [(min ?? 1) - 1, (max ?? 1) + 1];
}

/** A theme colour with an alpha (two hexadecimal digits). */
function translucent(
  ctx: CanvasRenderingContext2D,
  colour: string,
  alpha: string
): string {
  ctx.save();
  ctx.fillStyle = colour;
  const opaque = String(ctx.fillStyle);
  ctx.restore();
  // The canvas spells an opaque colour as #rrggbb, to which an alpha can be added.
  return /^#[0-9a-f]{6}$/.test(opaque) ? opaque + alpha : 'transparent';
}

/** The line's colour, fading out towards the bottom. */
function fade({ ctx, bbox }: uPlot, colour: string): CanvasGradient | string {
  const { top, height } = bbox;
  if (!Number.isFinite(top + height)) {
    return 'transparent';
  }
  const gradient = ctx.createLinearGradient(0, top, 0, top + height);
  gradient.addColorStop(0, translucent(ctx, colour, '38'));
  gradient.addColorStop(1, translucent(ctx, colour, '00'));
  return gradient;
}
