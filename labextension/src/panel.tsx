/** The sidebar panel: what {@link IFineTuning} knows, drawn a few times a second while somebody looks. */
import * as React from 'react';
import { Checkpoints, Samplers } from './checkpoints';
import { CommandIDs } from './commandids';
import { ConnectionHead, Missing, Welcome } from './connection';
import { Metric } from './curves';
import { Resources } from './gpu';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { IDropped } from './upload';
import { IState } from './objects';
import { phaseOf } from './names';
import { Curves } from './plots';
import { Runs } from './runs';
import { Sessions } from './sessions';
import { adapterOf, entriesOf } from './upload';
import { Keys } from './keyroutes';
import { KeysSection } from './keys';
import { Log, Queue } from './waiting';
import { DEFAULTS, IPanelSettings } from './settings';

/** Runs that are on the chart before anybody chooses. */
const CHOSEN_RUNS = 4;

/** See the head of the file. */
export class TuftPanel extends LiveWidget {
  constructor(
    context: IContext,
    private readonly _onDrop: (adapter: IDropped | null) => void
  ) {
    super(context);
    const title = context.trans.__('TuFT: fine-tuning');
    this.id = 'tuft-panel';
    this.addClass('jp-TuftPanel');
    this.addClass('jp-Tuft');
    this.title.icon = tuftIcon;
    this.title.caption = title;
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', title);
    this.node.addEventListener('dragover', event => this._over(event));
    this.node.addEventListener('dragleave', () => this._leave());
    this.node.addEventListener('drop', event => void this._drop(event));
  }

  configure(settings: IPanelSettings): void {
    this._metric = settings.metric;
    super.configure(settings);
  }

  render(): JSX.Element {
    const { feed, commands, trans } = this.context;
    const { state, status } = feed;
    const view = this.shown();
    const shown = this._shown(state, view.now);
    const missing = feed.connection === 'missing';
    return (
      <>
        <ConnectionHead
          source={feed}
          onRetry={() => feed.retry()}
          trans={trans}
        />
        {missing && <Missing trans={trans} />}
        {feed.connection === 'live' &&
          status?.backend.installed &&
          state.runs.size === 0 && <Welcome status={status} trans={trans} />}
        {state.runs.size > 0 && (
          <>
            <Curves
              {...view}
              shown={shown}
              metric={this._metric}
              onMetric={metric => this._setMetric(metric)}
              onOpen={picked =>
                void commands.execute(CommandIDs.openRuns, {
                  runs: [...shown],
                  metric: this._metric,
                  picked
                })
              }
              theme={this.theme}
            />
            <Runs
              {...view}
              shown={shown}
              onToggle={run => this._toggle(run, shown)}
            />
            <Queue {...view} queue={feed.queue} />
          </>
        )}
        {!missing && status && <Checkpoints {...view} />}
        {state.samplers.size > 0 && <Samplers {...view} />}
        {!missing && status && <Resources {...view} gauges={feed.gauges} />}
        {state.sessions.size > 0 && <Sessions {...view} />}
        {!missing && status?.admin && (
          <KeysSection {...view} keys={this._keys} />
        )}
        {!missing && <Log {...view} lines={feed.log} />}
      </>
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
      if (chosen && state.runs.has(run)) {
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

  /** Files from outside the page: an adapter. */
  private _over(event: DragEvent): void {
    if (event.dataTransfer?.types.includes('Files')) {
      event.preventDefault();
      event.dataTransfer.dropEffect = 'copy';
      this.addClass('jp-mod-over');
    }
  }

  private _leave(): void {
    this.removeClass('jp-mod-over');
  }

  private async _drop(event: DragEvent): Promise<void> {
    this._leave();
    const { dataTransfer } = event;
    if (dataTransfer?.types.includes('Files')) {
      event.preventDefault();
      event.stopPropagation();
      const files = [...dataTransfer.files];
      this._onDrop(await adapterOf(files, entriesOf(dataTransfer)));
    }
  }

  private readonly _keys = new Keys(this.context.api);
  private _metric: Metric = DEFAULTS.metric;
  private readonly _chosen = new Map<string, boolean>();
}
