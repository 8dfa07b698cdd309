/** The JupyterLab plugin: the live state as a service for other extensions, and the panel and views that show it. */
import {
  ILayoutRestorer,
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import {
  ICommandPalette,
  IThemeManager,
  MainAreaWidget,
  WidgetTracker
} from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { Actions } from './actions';
import { Api } from './api';
import { CommandIDs } from './commandids';
import { addActions, Commands } from './commands';
import { Feed } from './feed';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { TuftPanel } from './panel';
import { DEFAULTS, readSettings } from './settings';
import { IFineTuning } from './tokens';
import { RunView } from './views';

const PANEL = 'tuft-jupyter:panel';

const panel: JupyterFrontEndPlugin<IFineTuning> = {
  id: PANEL,
  description:
    'Shows fine-tuning runs, loss curves, checkpoints and resource use of this server.',
  autoStart: true,
  provides: IFineTuning,
  optional: [
    ICommandPalette,
    ILauncher,
    ILayoutRestorer,
    INotebookTracker,
    ISettingRegistry,
    IThemeManager,
    ITranslator
  ],
  activate: (
    app: JupyterFrontEnd,
    palette: ICommandPalette | null,
    launcher: ILauncher | null,
    restorer: ILayoutRestorer | null,
    notebooks: INotebookTracker | null,
    registry: ISettingRegistry | null,
    themes: IThemeManager | null,
    translator: ITranslator | null
  ): IFineTuning => {
    const trans = (translator ?? nullTranslator).load('tuft_jupyter');
    const api = new Api(app.serviceManager.serverSettings);
    const feed = new Feed(api);
    const context: IContext = { feed, commands: app.commands, trans };
    const commands = new Commands(context, palette);
    const widgets = new Set<LiveWidget>();
    let settings = DEFAULTS;
    const adopt = (widget: LiveWidget) => {
      widgets.add(widget);
      widget.disposed.connect(() => widgets.delete(widget));
      widget.configure(settings);
    };

    const sidebar = new TuftPanel(context);
    adopt(sidebar);
    app.shell.add(sidebar, 'left', { rank: 500, type: 'TuFT' });
    restorer?.add(sidebar, sidebar.id);
    commands.add(CommandIDs.openPanel, {
      label: trans.__('Show TuFT Panel'),
      caption: trans.__('Show fine-tuning runs, loss curves and checkpoints'),
      execute: () => app.shell.activateById(sidebar.id)
    });

    const views = new WidgetTracker<MainAreaWidget<RunView>>({
      namespace: 'tuft-runs'
    });
    commands.add(CommandIDs.openRuns, {
      label: trans.__('Compare Runs'),
      caption: trans.__('Open a large chart of fine-tuning runs'),
      icon: tuftIcon,
      takes: ['runs'],
      execute: args => openRuns(app, context, views, adopt, args)
    });
    addActions(commands, context, new Actions(api, trans), notebooks);

    void restorer?.restore(views, {
      command: CommandIDs.openRuns,
      args: widget => widget.content.arguments,
      name: widget => widget.content.id
    });
    launcher?.add({
      command: CommandIDs.openRuns,
      category: trans.__('Fine-Tuning'),
      rank: 1
    });
    themes?.themeChanged.connect(() =>
      widgets.forEach(widget => widget.themeChanged())
    );
    if (registry) {
      void registry.load(PANEL).then(loaded => {
        const take = () => {
          settings = readSettings(loaded);
          widgets.forEach(widget => widget.configure(settings));
        };
        take();
        loaded.changed.connect(take);
      });
    }
    return feed;
  }
};

/** Open a run view; without runs, one of what trains now or was trained last. */
function openRuns(
  app: JupyterFrontEnd,
  context: IContext,
  views: WidgetTracker<MainAreaWidget<RunView>>,
  adopt: (widget: LiveWidget) => void,
  args: ReadonlyPartialJSONObject
): MainAreaWidget<RunView> {
  const known = [...context.feed.state.runs.keys()];
  const runs = args.runs ?? (args.run ? [args.run] : known.slice(-4));
  const content = new RunView(context, { ...args, runs });
  const widget = new MainAreaWidget({ content });
  widget.id = content.id;
  widget.toolbar.hide();
  adopt(content);
  content.changed.connect(() => void views.save(widget));
  app.shell.add(widget, 'main', { mode: 'tab-after' });
  void views.add(widget);
  app.shell.activateById(widget.id);
  return widget;
}

export default panel;
export { IFineTuning } from './tokens';
