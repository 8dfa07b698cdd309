/** The sidebar panel: what {@link IFineTuning} knows, drawn a few times a second while somebody looks. */
import { ReactWidget } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { Message } from '@lumino/messaging';
import * as React from 'react';
import { Checkpoints, Samplers } from './checkpoints';
import { ConnectionHead, Missing, Welcome } from './connection';
import { Metric } from './curves';
import { Feed } from './feed';
import { Resources } from './gpu';
import { tuftIcon } from './icons';
import { IState } from './model';
import { phaseOf, runNames } from './names';
import { Curves } from './plots';
import { Runs } from './runs';
import { Sessions } from './sessions';
import { DEFAULTS, IPanelSettings } from './settings';

/** Runs that are on the chart before anybody chooses. */
const CHOSEN_RUNS = 4;

/** See the head of the file. */
export class TuftPanel extends ReactWidget {
  constructor(
    private readonly _feed: Feed,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.id = 'tuft-panel';
    this.addClass('jp-TuftPanel');
    this.title.icon = tuftIcon;
    this.title.caption = _trans.__('TuFT: fine-tuning');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', _trans.__('TuFT: fine-tuning'));
    _feed.changed.connect(this._onChanged, this);
  }

  /** Take new settings over. */
  configure(settings: IPanelSettings): void {
    this._settings = settings;
    this._metric = settings.metric;
    this.update();
  }

  /** Draw again in the colours of the present theme. */
  themeChanged(): void {
    this._theme += 1;
    this.update();
  }

  render(): JSX.Element {
    const feed = this._feed;
    const trans = this._trans;
    const { state, status } = feed;
    this._drawn = Date.now();
    const names = runNames(state, trans);
    const now = feed.now();
    const locale = document.documentElement.lang || 'en';
    const shown = this._shown(state, now);
    const view = { state, names, shown, now, locale, trans };
    const missing = feed.connection === 'missing';
    return (
      <>
        <ConnectionHead
          source={feed}
          onRetry={() => feed.retry()}
          trans={trans}
        />
        {missing && <Missing trans={trans} />}
        {!missing && status?.backend.installed && state.runs.size === 0 && (
          <Welcome status={status} trans={trans} />
        )}
        {state.runs.size > 0 && (
          <>
            <Curves
              {...view}
              metric={this._metric}
              onMetric={metric => this._setMetric(metric)}
              theme={this._theme}
            />
            <Runs {...view} onToggle={run => this._toggle(run, shown)} />
            <Checkpoints {...view} />
          </>
        )}
        {state.samplers.size > 0 && <Samplers {...view} />}
        {!missing && status && <Resources gauges={feed.gauges} trans={trans} />}
        {state.sessions.size > 0 && <Sessions {...view} />}
      </>
    );
  }

  dispose(): void {
    this._feed.changed.disconnect(this._onChanged, this);
    window.clearTimeout(this._timer);
    super.dispose();
  }

  protected onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._feed.watched = true;
    this.update();
  }

  protected onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._feed.watched = false;
  }

  protected onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this._feed.watched = this.isVisible;
  }

  protected onBeforeDetach(msg: Message): void {
    this._feed.watched = false;
    super.onBeforeDetach(msg);
  }

  /** Draw now, or as soon as the rate allows. */
  private _onChanged(): void {
    if (this._timer || !this.isVisible) {
      return;
    }
    const due = this._drawn + 1000 / this._settings.drawsPerSecond;
    this._timer = window.setTimeout(
      () => {
        this._timer = 0;
        if (this.isVisible) {
          this.update();
        }
      },
      Math.max(0, due - Date.now())
    );
  }

  /** The runs on the chart: what was chosen by hand, else those that train now, else the newest with a curve. */
  private _shown(state: IState, now: number): Set<string> {
    const newest = [...state.runs.values()].reverse();
    const drawn = newest.filter(run => run.curve.step.length > 0);
    const training = drawn.filter(run => phaseOf(run, now) === 'training');
    const proposed = training.length ? training : drawn.slice(0, 1);
    const shown = new Set(
      (proposed.length ? proposed : newest.slice(0, 1))
        .slice(0, CHOSEN_RUNS)
        .map(run => run.id)
    );
    for (const [run, chosen] of this._chosen) {
      if (chosen) {
        shown.add(run);
      } else {
        shown.delete(run);
      }
    }
    return shown;
  }

  private _toggle(run: string, shown: ReadonlySet<string>): void {
    // What is on the chart when somebody begins to choose stays there.
    shown.forEach(id => this._chosen.set(id, true));
    this._chosen.set(run, !shown.has(run));
    this.update();
  }

  private _setMetric(metric: Metric): void {
    this._metric = metric;
    this.update();
  }

  private _settings = DEFAULTS;
  private _metric: Metric = DEFAULTS.metric;
  private readonly _chosen = new Map<string, boolean>();
  private _theme = 0;
  private _drawn = 0;
  private _timer = 0;
}
