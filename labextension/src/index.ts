/** The JupyterLab plugins: the live state as a service for other extensions, and the panel that shows it. */
import {
  ILayoutRestorer,
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { ICommandPalette, IThemeManager } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Api } from './api';
import { Feed } from './feed';
import { tuftIcon } from './icons';
import { TuftPanel } from './panel';
import { readSettings } from './settings';
import { IFineTuning } from './tokens';

const PANEL = 'tuft-jupyter:panel';

const OPEN = 'tuft:open-panel';

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
    ISettingRegistry,
    IThemeManager,
    ITranslator
  ],
  activate: (
    app: JupyterFrontEnd,
    palette: ICommandPalette | null,
    launcher: ILauncher | null,
    restorer: ILayoutRestorer | null,
    registry: ISettingRegistry | null,
    themes: IThemeManager | null,
    translator: ITranslator | null
  ): IFineTuning => {
    const trans = (translator ?? nullTranslator).load('tuft_jupyter');
    const feed = new Feed(new Api(app.serviceManager.serverSettings));
    const widget = new TuftPanel(feed, trans);
    app.shell.add(widget, 'left', { rank: 500, type: 'TuFT' });
    restorer?.add(widget, widget.id);

    app.commands.addCommand(OPEN, {
      label: args =>
        args['isPalette'] ? trans.__('Show TuFT Panel') : trans.__('TuFT'),
      caption: trans.__('Show fine-tuning runs, loss curves and checkpoints'),
      icon: args => (args['isPalette'] ? undefined : tuftIcon),
      describedBy: {
        args: {
          type: 'object',
          properties: {
            isPalette: {
              type: 'boolean',
              description: trans.__(
                'Whether the command is shown in the palette'
              )
            }
          }
        }
      },
      execute: () => app.shell.activateById(widget.id)
    });
    palette?.addItem({
      command: OPEN,
      category: trans.__('Fine-Tuning'),
      args: { isPalette: true }
    });
    launcher?.add({ command: OPEN, category: trans.__('Other'), rank: 10 });

    themes?.themeChanged.connect(widget.themeChanged, widget);
    if (registry) {
      void registry.load(PANEL).then(settings => {
        widget.configure(readSettings(settings));
        settings.changed.connect(() =>
          widget.configure(readSettings(settings))
        );
      });
    }
    return feed;
  }
};

export default panel;
export { IFineTuning } from './tokens';
