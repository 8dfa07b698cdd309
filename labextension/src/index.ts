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
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Signal } from '@lumino/signaling';
import { Actions } from './actions';
import { Api } from './api';
import { CommandIDs } from './commandids';
import { addActions, Commands } from './commands';
import { Feed } from './feed';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { TuftPanel } from './panel';
import { DEFAULTS, readSettings } from './settings';
import { StatusItem } from './statusbar';
import { IFineTuning } from './tokens';
import { Playground, RunView, TabView } from './views';

const PANEL = 'tuft-jupyter:panel';

/** What a tab of ours can say about itself, whatever it shows. */
type ITab = Pick<TabView<object>, 'arguments' | 'changed'>;

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
    IStatusBar,
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
    statusBar: IStatusBar | null,
    themes: IThemeManager | null,
    translator: ITranslator | null
  ): IFineTuning => {
    const trans = (translator ?? nullTranslator).load('tuft_jupyter');
    const api = new Api(app.serviceManager.serverSettings);
    const feed = new Feed(api);
    const context: IContext = { api, feed, commands: app.commands, trans };
    const commands = new Commands(context, palette);
    const widgets = new Set<LiveWidget>();
    let settings = DEFAULTS;
    const adopt = (widget: LiveWidget) => {
      widgets.add(widget);
      widget.disposed.connect(() => widgets.delete(widget));
      widget.configure(settings);
    };

    const actions = new Actions(api, trans);
    const sidebar = new TuftPanel(
      context,
      adapter =>
        void actions.upload(
          adapter,
          (feed.status?.models ?? []).map(({ name }) => name)
        )
    );
    adopt(sidebar);
    app.shell.add(sidebar, 'left', { rank: 500, type: 'TuFT' });
    restorer?.add(sidebar, sidebar.id);
    commands.add(CommandIDs.openPanel, {
      label: trans.__('Show TuFT Panel'),
      caption: trans.__('Show fine-tuning runs, loss curves and checkpoints'),
      execute: () => app.shell.activateById(sidebar.id)
    });

    /** Show a view in a tab; the tracker brings it back after a reload. */
    const tabs = (namespace: string, command: string) => {
      const tracker = new WidgetTracker<MainAreaWidget<LiveWidget & ITab>>({
        namespace
      });
      void restorer?.restore(tracker, {
        command,
        args: widget => widget.content.arguments,
        name: widget => widget.content.id
      });
      return (content: LiveWidget & ITab) => {
        const widget = new MainAreaWidget({ content });
        widget.toolbar.hide();
        adopt(content);
        content.changed.connect(() => void tracker.save(widget));
        // Notebook 7 has room for one document in its main area; below it there are tabs.
        const area = app.name === 'Jupyter Notebook' ? 'down' : 'main';
        app.shell.add(widget, area, { mode: 'tab-after' });
        void tracker.add(widget);
        app.shell.activateById(widget.id);
        return widget;
      };
    };
    const showRuns = tabs('tuft-runs', CommandIDs.openRuns);
    commands.add(CommandIDs.openRuns, {
      label: trans.__('Compare Runs'),
      caption: trans.__('Open a large chart of fine-tuning runs'),
      icon: tuftIcon,
      takes: ['runs', 'metric', 'picked'],
      execute: args => {
        const newest = [...feed.state.runs.keys()].slice(-4);
        return showRuns(new RunView(context, { runs: newest, ...args }));
      }
    });
    const showPlayground = tabs('tuft-playground', CommandIDs.openPlayground);
    commands.add(CommandIDs.openPlayground, {
      label: trans.__('Playground'),
      caption: trans.__('Ask the base model and checkpoints side by side'),
      icon: tuftIcon,
      takes: ['checkpoint'],
      execute: args => {
        const base = feed.status?.models[0]?.name;
        const models = [base, args.checkpoint].filter(Boolean) as string[];
        return showPlayground(new Playground(context, { models, ...args }));
      }
    });
    addActions(commands, context, actions, notebooks);

    const status = new StatusItem(context);
    const statusChanged = new Signal<object, void>(status);
    adopt(status);
    statusBar?.registerStatusItem(status.id, {
      item: status,
      align: 'left',
      rank: 10,
      isActive: () => settings.statusBar,
      activeStateChanged: statusChanged
    });
    const category = trans.__('Fine-Tuning');
    launcher?.add({ command: CommandIDs.openRuns, category, rank: 1 });
    launcher?.add({ command: CommandIDs.openPlayground, category, rank: 2 });
    themes?.themeChanged.connect(() =>
      widgets.forEach(widget => widget.themeChanged())
    );
    if (registry) {
      void registry.load(PANEL).then(loaded => {
        const take = () => {
          settings = readSettings(loaded);
          widgets.forEach(widget => widget.configure(settings));
          statusChanged.emit();
        };
        take();
        loaded.changed.connect(take);
      });
    }
    return feed;
  }
};

export default panel;
export { IFineTuning } from './tokens';
