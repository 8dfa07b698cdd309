/** How our charts look: axes, grid, lines and gestures, as uPlot takes them. */
import uPlot from 'uplot';
import { formatTick } from './format';

/** How one drawn line looks. */
export interface ILook {
  /** The colour of the present theme. */
  colour: () => string;
  dashed: boolean;
  /** A line in the background. */
  faint: boolean;
  /** Whether the area below it is filled. */
  filled: boolean;
}

/** What {@link plotOptions} needs to know. */
export interface IPlot {
  width: number;
  height: number;
  series: ILook[];
  xTick: (x: number, distance: number) => string;
  wholeX: boolean;
  log?: boolean;
  /** The value of a CSS variable. */
  theme: (variable: string) => string;
  /** What the x axis shows, or null while there is nothing. */
  range: () => [number, number] | null;
  onZoom?: unknown;
  onSelect: (from: number, to: number) => void;
  onReset: () => void;
  onPoint: () => void;
  onDraw: (plot: uPlot) => void;
}

/** Pixels that a pressed pointer may move before it drags. */
const STILL = 4;

/** See the head of the file. */
export function plotOptions(plot: IPlot): uPlot.Options {
  const large = plot.height > 220;
  const axis: uPlot.Axis = {
    stroke: () => plot.theme('--jp-ui-font-color2'),
    font: `${large ? 12 : 10}px ${plot.theme('--jp-ui-font-family')}`,
    ticks: { show: false },
    grid: {
      stroke: ({ ctx }) =>
        translucent(ctx, plot.theme('--jp-ui-font-color0'), '1f'),
      width: 1
    }
  };
  return {
    width: plot.width,
    height: plot.height,
    padding: [8, 14, 0, 0],
    legend: { show: false },
    scales: {
      x: { time: false, range: () => atLeastSomething(plot.range()) },
      y: plot.log ? { distr: 3 } : {}
    },
    axes: [
      {
        ...axis,
        size: large ? 28 : 22,
        gap: 4,
        space: large ? 64 : 48,
        incrs: plot.wholeX ? WHOLE : SPANS,
        grid: { show: false },
        // Without a point there is no axis beside it, and the first number would be cut off.
        values: (u, ticks, __, ___, distance) =>
          ticks.map(x =>
            u.scales.y.min === null ? '' : plot.xTick(x, distance)
          )
      },
      {
        ...axis,
        size: large ? 54 : 42,
        gap: 4,
        space: 32,
        values: (_, ticks, __, ___, distance) =>
          ticks.map(v =>
            v === null ? '' : formatTick(v, plot.log ? v : distance)
          )
      }
    ],
    cursor: {
      drag: { x: Boolean(plot.onZoom), y: false, setScale: false, dist: STILL },
      y: false,
      points: { show: false },
      bind: {
        // uPlot's own double click forgets that our data are of one range only.
        dblclick: () => () => {
          plot.onReset();
          return null;
        }
      }
    },
    series: [{}, ...plot.series.map(look => lineOptions(look, plot.log))],
    hooks: {
      draw: [plot.onDraw],
      setCursor: [plot.onPoint],
      setSelect: [u => select(u, plot)]
    }
  };
}

/** The marked range becomes what is shown. */
function select(u: uPlot, plot: IPlot): void {
  const { left, width } = u.select;
  if (width <= STILL) {
    return;
  }
  const from = u.posToVal(left, 'x');
  const to = u.posToVal(left + width, 'x');
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  plot.onSelect(from, to);
}

function lineOptions(look: ILook, log?: boolean): uPlot.Series {
  return {
    stroke: ({ ctx }) =>
      look.faint ? translucent(ctx, look.colour(), '40') : look.colour(),
    width: look.faint ? 1.25 : 1.75,
    spanGaps: true,
    dash: look.dashed ? [6, 4] : undefined,
    points: {
      show: u => !look.faint && u.data[0].length <= 24,
      size: 4,
      width: 0,
      fill: look.colour
    },
    fill: u => (look.filled && !log ? fade(u, look.colour()) : 'transparent')
  };
}

const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500].flatMap(n => [
  n,
  ...(n >= 100 ? [n * 10, n * 100, n * 1000, n * 10_000] : [])
]);
WHOLE.sort((a, b) => a - b);

/** Distances between times that a clock has, in seconds. */
const SPANS = [
  ...[0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30],
  ...[1, 2, 5, 10, 15, 30].map(minutes => minutes * 60),
  ...[1, 2, 6, 12, 24, 48, 120, 240, 480].map(hours => hours * 3600)
];

/** At least a little wide, so that a line of one point has a place. */
export function atLeastSomething(
  range: [number, number] | null
): [number, number] {
  const [from, to] = range ?? [0, 2];
  return to > from ? [from, to] : [from - 1, to + 1];
}

/** A theme colour with an alpha (two hexadecimal digits). */
export function translucent(
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
