/**
 * A chart of several lines, drawn by uPlot on a canvas: zoom by dragging, hover, pick a point, linear or log scale.
 *
 * Draws the same number of points whatever the length of the lines (see `thin.ts`), and reads colours from the theme at
 * each draw. Knows no React and no model. A canvas tells a screen reader nothing, so whoever uses it puts the same values
 * into text.
 */
import uPlot from 'uplot';
import { atLeastSomething, plotOptions, translucent } from './chartoptions';
import { extent, ISeries, lowerBound, nearest, thin } from './thin';
import { Tooltip } from './tooltip';

/** One line: how it is called and drawn. `colour` is the name of a CSS variable. */
export interface ILine extends ISeries {
  label: string;
  colour: string;
  dashed: boolean;
  /** Whether the line still grows: its end is marked. */
  live: boolean;
  /** What the line is a smoothed version of: drawn faintly below it. */
  raw?: ISeries;
}

/** A point of a line: `line` counts lines, `index` the line's points. */
export interface IPick {
  line: number;
  index: number;
}

/** How a chart looks and what it tells. */
export interface IChartOptions {
  /** Pixels, or null: as high as its host. */
  height: number | null;
  /** What a position on the x axis is called in the tooltip. */
  xLabel: (x: number) => string;
  /** The tick of the x axis, and how far it is to the next one. */
  xTick: (x: number, distance: number) => string;
  /** Whether the x axis has whole numbers; else it has seconds. */
  wholeX: boolean;
  log?: boolean;
  /** Called with each new range of the x axis; null: everything. Without it the chart cannot be zoomed. */
  onZoom?: (range: [number, number] | null) => void;
  onPick?: (pick: IPick) => void;
}

/** See the head of the file. */
export class Chart {
  constructor(
    private readonly _host: HTMLElement,
    private _options: IChartOptions
  ) {
    this._observer = new ResizeObserver(() => this._fit());
    this._observer.observe(_host);
  }

  /** Show these lines. `picked` is marked. */
  update(lines: readonly ILine[], picked: IPick | null = null): void {
    this._lines = lines;
    this._picked = picked;
    this._draw();
  }

  /** Change how the chart looks. */
  configure(options: IChartOptions): void {
    const old = this._options;
    this._options = options;
    if (old.log !== options.log || old.wholeX !== options.wholeX) {
      this._plot?.destroy();
      this._plot = null;
    }
  }

  /** Show `from`..`to` of the x axis, or everything. */
  zoom(range: [number, number] | null): void {
    this._range = range;
    this._draw();
    this._options.onZoom?.(range);
  }

  /** Widen (factor > 1) or narrow the shown range around its middle, or move it by a share of its width. */
  adjust(factor: number, shift = 0): void {
    const whole = extent(this._lines);
    if (!whole || !this._options.onZoom) {
      return;
    }
    const [from, to] = this._range ?? whole;
    const half = ((to - from) / 2) * factor;
    const middle = (from + to) / 2 + shift * (to - from);
    const low = Math.max(whole[0], middle - half);
    const high = Math.min(whole[1], middle + half);
    const all = low <= whole[0] && high >= whole[1];
    if (high > low) {
      this.zoom(all ? null : [low, high]);
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

  /** Give uPlot the points that the shown range and the present width ask for. */
  private _draw(): void {
    const whole = extent(this._lines);
    const [from, to] = atLeastSomething(this._range ?? whole);
    const drawn = this._lines.flatMap(line =>
      line.raw ? [line.raw, line] : [line]
    );
    const columns = Math.max(60, Math.round(this._host.clientWidth));
    const { x, y } = thin(drawn, from, to, columns);
    if (this._options.log) {
      y.forEach(column =>
        column.forEach((value, i) => {
          if (typeof value === 'number' && value <= 0) {
            column[i] = null;
          }
        })
      );
    }
    const data = [x, ...y] as uPlot.AlignedData;
    const plot = this._plot;
    // What uPlot is told of a line but once.
    const looks = this._lines.map(line => [line.dashed, !line.raw]).join();
    if (plot && looks === this._looks) {
      plot.batch(() => {
        plot.setData(data, false);
        plot.setScale('x', { min: from, max: to });
      });
    } else {
      plot?.destroy();
      this._looks = looks;
      this._plot = this._make(data);
    }
  }

  private _make(data: uPlot.AlignedData): uPlot {
    const options = plotOptions({
      ...this._options,
      width: Math.max(this._host.clientWidth, 120),
      height: this._options.height ?? Math.max(this._host.clientHeight, 120),
      theme: name => this._theme(name),
      range: () => this._range ?? extent(this._lines),
      series: this._lines.flatMap((line, i) => {
        const of = () => this._lines[i] ?? line;
        const style = {
          dashed: line.dashed,
          colour: () => this._theme(of().colour)
        };
        const single = this._lines.length === 1 && !line.raw;
        const thick = { ...style, faint: false, filled: single };
        return line.raw
          ? [{ ...style, dashed: false, faint: true, filled: false }, thick]
          : [thick];
      }),
      onSelect: (from, to) => this.zoom([from, to]),
      onReset: () => this.zoom(null),
      onPoint: () => this._point(),
      onDraw: plot => this._mark(plot)
    });
    const plot = new uPlot(options, data, this._host);
    this._tooltip.attach(plot.over);
    // After uPlot's own listener, which swallows the click at the end of a drag.
    plot.over.addEventListener('click', () => this._click());
    return plot;
  }

  private _fit(): void {
    const { clientWidth, clientHeight } = this._host;
    const height = this._options.height ?? clientHeight;
    const plot = this._plot;
    if (
      plot &&
      clientWidth > 0 &&
      height > 0 &&
      (clientWidth !== plot.width || height !== plot.height)
    ) {
      plot.setSize({ width: clientWidth, height });
      this._draw();
    }
  }

  private _theme(variable: string): string {
    // One style for the whole draw: asking for it anew costs more than drawing.
    return getComputedStyle(this._host).getPropertyValue(variable).trim();
  }

  /** A dot with a halo where a live line grows, a ring and a rule at what is picked. */
  private _mark(plot: uPlot): void {
    this._lines.forEach(line => {
      let last = line.x.length - 1;
      while (last >= 0 && line.y[last] === null) {
        last -= 1;
      }
      if (line.live && last >= 0) {
        this._dot(plot, line, last, [6.5, 0.22], [3, 1]);
      }
    });
    const picked = this._picked && this._lines[this._picked.line];
    if (picked && this._picked!.index < picked.x.length) {
      this._rule(plot, picked.x[this._picked!.index]);
      this._dot(plot, picked, this._picked!.index, [8, 0.3], [4, 1]);
    }
  }

  private _dot(
    plot: uPlot,
    line: ILine,
    index: number,
    ...rings: number[][]
  ): void {
    const { ctx, bbox } = plot;
    const value = line.y[index];
    if (value === null) {
      return;
    }
    const x = plot.valToPos(line.x[index], 'x', true);
    const y = plot.valToPos(value, 'y', true);
    if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) {
      return;
    }
    ctx.save();
    ctx.fillStyle = this._theme(line.colour);
    for (const [radius, alpha] of rings) {
      ctx.globalAlpha = alpha;
      ctx.beginPath();
      ctx.arc(x, y, radius * devicePixelRatio, 0, 2 * Math.PI);
      ctx.fill();
    }
    ctx.restore();
  }

  private _rule(plot: uPlot, at: number): void {
    const { ctx, bbox } = plot;
    const x = Math.round(plot.valToPos(at, 'x', true));
    if (x < bbox.left || x > bbox.left + bbox.width) {
      return;
    }
    ctx.save();
    ctx.strokeStyle = translucent(
      ctx,
      this._theme('--jp-ui-font-color0'),
      '66'
    );
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  /** The values under the pointer, beside it: those of the real points, not of the drawn ones. */
  private _point(): void {
    const plot = this._plot;
    const left = plot?.cursor.left ?? -1;
    if (!plot || left < 0 || !this._lines.some(({ x }) => x.length)) {
      this._tooltip.hide();
      return;
    }
    const at = this._pointAt(plot.posToVal(left, 'x'));
    const rows = this._lines.map(line => {
      const i = nearest(line.x, at);
      const here = i >= 0 && Math.abs(line.x[i] - at) <= this._reach(line, i);
      return { ...line, value: here ? line.y[i] : undefined };
    });
    this._tooltip.show(
      this._options.xLabel(at),
      rows,
      plot.posToVal(plot.cursor.top ?? 0, 'y'),
      plot.valToPos(at, 'x')
    );
  }

  /** The x of the point that is closest to `x`, over all lines. */
  private _pointAt(x: number): number {
    let best = NaN;
    for (const line of this._lines) {
      const i = nearest(line.x, x);
      if (i >= 0 && !(Math.abs(best - x) <= Math.abs(line.x[i] - x))) {
        best = line.x[i];
      }
    }
    return best;
  }

  /** How far from a point the line still speaks for its surroundings: half the way to its neighbours. */
  private _reach(line: ISeries, index: number): number {
    const { x } = line;
    const before = x[index] - (x[index - 1] ?? x[index]);
    const after = (x[index + 1] ?? x[index]) - x[index];
    return Math.max(before, after) / 2;
  }

  /** Pick the point of the line that is closest to the pointer. */
  private _click(): void {
    const plot = this._plot;
    const { left = -1, top = -1 } = plot?.cursor ?? {};
    if (!plot || left < 0 || !this._options.onPick) {
      return;
    }
    const at = plot.posToVal(left, 'x');
    let best: IPick | null = null;
    let distance = Infinity;
    this._lines.forEach(({ x, y }, line) => {
      const index = nearest(x, at);
      const value = y[index];
      if (index < 0 || value === null) {
        return;
      }
      const across = plot.valToPos(x[index], 'x') - left;
      const away = Math.hypot(across, plot.valToPos(value, 'y') - top);
      if (away < distance) {
        best = { line, index };
        distance = away;
      }
    });
    if (best) {
      this._options.onPick(best);
    }
  }

  /** Pick the point `by` further along the picked line, or the last point of the first line. */
  step(by: number): void {
    const line = Math.min(this._picked?.line ?? 0, this._lines.length - 1);
    const series = this._lines[line];
    if (!series?.x.length || !this._options.onPick) {
      return;
    }
    const last = series.x.length - 1;
    let index = this._picked ? this._picked.index + by : last;
    index = Math.max(0, Math.min(last, index));
    this._options.onPick({ line, index });
    const at = series.x[index];
    if (this._range && (at < this._range[0] || at > this._range[1])) {
      const half = (this._range[1] - this._range[0]) / 2;
      this.zoom([at - half, at + half]);
    }
  }

  /** Points of the longest line in the shown range, for those who ask what they see. */
  shownPoints(): number {
    const [from, to] = this._range ?? [-Infinity, Infinity];
    return Math.max(
      0,
      ...this._lines.map(({ x }) => lowerBound(x, to) - lowerBound(x, from))
    );
  }

  private _lines: readonly ILine[] = [];
  private _picked: IPick | null = null;
  private _range: [number, number] | null = null;
  private _plot: uPlot | null = null;
  private _looks = '';
  private readonly _observer: ResizeObserver;
  private readonly _tooltip = new Tooltip();
}
