/** The widgets of the main area. They know what they show, so that the layout can be restored after a reload. */
import { ISignal, Signal } from '@lumino/signaling';
import { ReadonlyPartialJSONObject, UUID } from '@lumino/coreutils';
import * as React from 'react';
import { METRICS } from './curves';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { IRunViewState, RunViewBody } from './runview';

/** See `runview.tsx`. */
export class RunView extends LiveWidget {
  constructor(context: IContext, args: ReadonlyPartialJSONObject = {}) {
    super(context);
    this.id = String(args.id ?? `tuft-runs-${UUID.uuid4()}`);
    this._view = readRunView(args);
    this.addClass('jp-Tuft');
    this.addClass('jp-TuftView');
    this.title.icon = tuftIcon;
    this.title.closable = true;
    this.title.label = context.trans.__('Runs');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', context.trans.__('Compared runs'));
  }

  /** What the view shows, as the arguments of the command that opens it. */
  get arguments(): ReadonlyPartialJSONObject {
    return { id: this.id, ...this._view };
  }

  /** Emitted after {@link arguments} has changed. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** Show one more run. */
  add(runs: readonly string[]): void {
    this._set({ runs: [...new Set([...this._view.runs, ...runs])] });
  }

  render(): JSX.Element {
    const shown = this.shown();
    const [first, ...others] = this._view.runs
      .map(run => shown.names.get(run))
      .filter(Boolean);
    this.title.label = first
      ? others.length
        ? `${first} +${others.length}`
        : first
      : shown.trans.__('Runs');
    return (
      <RunViewBody
        {...shown}
        view={this._view}
        theme={this.theme}
        onView={change => this._set(change)}
      />
    );
  }

  private _set(change: Partial<IRunViewState>): void {
    this._view = { ...this._view, ...change };
    this._changed.emit();
    this.update();
  }

  private _view: IRunViewState;
  private readonly _changed = new Signal<this, void>(this);
}

/** What is written in the arguments of a command, in values that can be used. */
function readRunView(args: ReadonlyPartialJSONObject): IRunViewState {
  const smoothing = Number(args.smoothing ?? 0);
  return {
    runs: Array.isArray(args.runs) ? args.runs.map(String) : [],
    metric: METRICS.find(metric => metric === args.metric) ?? 'loss',
    axis: args.axis === 'time' ? 'time' : 'step',
    smoothing: smoothing >= 0 && smoothing < 1 ? smoothing : 0,
    log: args.log === true
  };
}
