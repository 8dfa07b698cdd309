/** The widgets of the main area. They know what they show, so that the layout can be restored after a reload. */
import { ISignal, Signal } from '@lumino/signaling';
import { ReadonlyPartialJSONObject, UUID } from '@lumino/coreutils';
import * as React from 'react';
import { METRICS } from './curves';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { Ask } from './complete';
import { IPlaygroundState, PlaygroundBody } from './playground';
import { IRunViewState, RunViewBody } from './runview';

/** A view in a tab of its own, which says what it shows in the words of the command that opens it. */
export abstract class TabView<T extends object> extends LiveWidget {
  constructor(
    context: IContext,
    args: ReadonlyPartialJSONObject,
    kind: string,
    protected view: T
  ) {
    super(context);
    this.id = String(args.id ?? `tuft-${kind}-${UUID.uuid4()}`);
    this.addClass('jp-Tuft');
    this.addClass('jp-TuftView');
    this.title.icon = tuftIcon;
    this.title.closable = true;
    this.node.setAttribute('role', 'region');
  }

  /** What the view shows, as the arguments of its command. */
  get arguments(): ReadonlyPartialJSONObject {
    return { id: this.id, ...this.view };
  }

  /** Emitted after {@link arguments} has changed. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  protected set(change: Partial<T>): void {
    this.view = { ...this.view, ...change };
    this._changed.emit();
    this.update();
  }

  private readonly _changed = new Signal<this, void>(this);
}

/** See `runview.tsx`. */
export class RunView extends TabView<IRunViewState> {
  constructor(context: IContext, args: ReadonlyPartialJSONObject = {}) {
    super(context, args, 'runs', readRunView(args));
    this.title.label = context.trans.__('Runs');
    this.node.setAttribute('aria-label', context.trans.__('Compared runs'));
  }

  render(): JSX.Element {
    const shown = this.shown();
    const [first, ...others] = this.view.runs
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
        view={this.view}
        theme={this.theme}
        onView={change => this.set(change)}
      />
    );
  }
}

/** See `playground.tsx`. */
export class Playground extends TabView<IPlaygroundState> {
  constructor(
    context: IContext,
    private readonly _ask: Ask,
    args: ReadonlyPartialJSONObject = {}
  ) {
    super(context, args, 'playground', readPlayground(args));
    const name = context.trans.__('Playground');
    this.title.label = name;
    this.node.setAttribute('aria-label', name);
  }

  render(): JSX.Element {
    return (
      <PlaygroundBody
        {...this.shown()}
        view={this.view}
        bases={this.context.feed.status?.models ?? []}
        ask={this._ask}
        onView={change => this.set(change)}
      />
    );
  }
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

function readPlayground(args: ReadonlyPartialJSONObject): IPlaygroundState {
  const number = (value: unknown, otherwise: number) =>
    typeof value === 'number' && Number.isFinite(value) ? value : otherwise;
  const text = (value: unknown) => (typeof value === 'string' ? value : '');
  return {
    mode: args.mode === 'text' ? 'text' : 'chat',
    system: text(args.system),
    prompt: text(args.prompt),
    models: Array.isArray(args.models) ? args.models.map(String) : [],
    temperature: number(args.temperature, 0.7),
    topP: number(args.topP, 1),
    maxTokens: number(args.maxTokens, 128),
    seed: typeof args.seed === 'number' ? args.seed : null
  };
}
