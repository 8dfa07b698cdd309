/** A widget that draws what {@link IFineTuning} knows, a few times a second, and only while somebody looks. */
import { ReactWidget } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { CommandRegistry } from '@lumino/commands';
import { Message } from '@lumino/messaging';
import { Api } from './api';
import { Feed } from './feed';
import { runNames } from './names';
import { DEFAULTS, IPanelSettings } from './settings';
import { IShown } from './shown';

/** What every part of the extension works with. */
export interface IContext {
  api: Api;
  feed: Feed;
  commands: CommandRegistry;
  trans: TranslationBundle;
}

/** See the head of the file. */
export abstract class LiveWidget extends ReactWidget {
  constructor(protected readonly context: IContext) {
    super();
    context.feed.changed.connect(this._onChanged, this);
  }

  /** Take new settings over. */
  configure(settings: IPanelSettings): void {
    this.settings = settings;
    this.update();
  }

  /** Draw again in the colours of the present theme. */
  themeChanged(): void {
    this.theme += 1;
    this.update();
  }

  dispose(): void {
    if (this.isDisposed) {
      return;
    }
    this.context.feed.changed.disconnect(this._onChanged, this);
    this.context.feed.look(this, false);
    window.clearTimeout(this._timer);
    super.dispose();
  }

  /** What to draw now. */
  protected shown(): IShown {
    const { feed, commands, trans } = this.context;
    this._drawn = Date.now();
    return {
      state: feed.state,
      names: runNames(feed.state, trans),
      memory: feed.gauges?.runs ?? {},
      now: feed.now(),
      locale: document.documentElement.lang || 'en',
      commands,
      trans
    };
  }

  protected onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this.context.feed.look(this, true);
    this.update();
  }

  protected onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this.context.feed.look(this, false);
  }

  protected onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this.context.feed.look(this, this.isVisible);
  }

  protected onBeforeDetach(msg: Message): void {
    this.context.feed.look(this, false);
    super.onBeforeDetach(msg);
  }

  /** Draw now, or as soon as the rate allows. */
  private _onChanged(): void {
    if (this._timer || !this.isVisible) {
      return;
    }
    const due = this._drawn + 1000 / this.settings.drawsPerSecond;
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

  protected settings = DEFAULTS;
  /** Counts theme changes. */
  protected theme = 0;
  private _drawn = 0;
  private _timer = 0;
}
