/** The widgets of the main area. They know what they show, so that the layout can be restored after a reload. */
import { ISignal, Signal } from '@lumino/signaling';
import { ReadonlyPartialJSONObject, UUID } from '@lumino/coreutils';
import * as React from 'react';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { Ask } from './complete';
import { PlaygroundBody } from './playground';
import { IPlaygroundState, readPlayground } from './playgroundstate';
import { RunViewBody } from './runview';
import { IRunViewState, readRunView } from './runviewstate';
import { AskSamples, IStepSamples } from './stepsamples';

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
    return { id: this.id, ...this.view } as ReadonlyPartialJSONObject;
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
        known={this.context.feed.status !== null}
        onView={change => this.set(change)}
        askSamples={this._askSamples}
      />
    );
  }

  private readonly _askSamples: AskSamples = async (run, step) => {
    const path = `tuft/runs/${encodeURIComponent(run)}/samples?step=${step}`;
    return (await this.context.api.call('GET', path)) as IStepSamples;
  };
}

/** See `playground.tsx`. */
export class Playground extends TabView<IPlaygroundState> {
  constructor(context: IContext, args: ReadonlyPartialJSONObject = {}) {
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

  private readonly _ask: Ask = (route, body, signal) =>
    this.context.api.text(route, body, signal);
}
