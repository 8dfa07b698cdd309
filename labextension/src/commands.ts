/** Every action as a command: in the palette, for buttons, for keyboard shortcuts and for other extensions. */
import { ICommandPalette, InputDialog } from '@jupyterlab/apputils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { TranslationBundle } from '@jupyterlab/translation';
import { fileUploadIcon, LabIcon } from '@jupyterlab/ui-components';
import { CommandRegistry } from '@lumino/commands';
import { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { Actions } from './actions';
import { CommandIDs } from './commandids';
import { complain } from './complain';
import { toCsv, toJsonLines } from './export';
import { checkpointCode, insertCell, resumeCode, startCode } from './insert';
import { IContext } from './live';
import { ICheckpoint, IRun } from './objects';
import { runNames, strangerSentence } from './names';
import { adapterOf, chooseFiles } from './upload';

const DAY = 86400;

/** What a command can be told in its arguments; what is not told is asked. */
type Argument = 'checkpoint' | 'run' | 'runs' | 'metric' | 'picked' | 'format';

const TYPES: { [name in Argument]?: string } = {
  runs: 'array',
  picked: 'object'
};

function argumentWord(name: Argument, trans: TranslationBundle): string {
  switch (name) {
    case 'checkpoint':
      return trans.__('The path of a checkpoint');
    case 'run':
      return trans.__('The id of a run');
    case 'runs':
      return trans.__('The ids of several runs');
    case 'metric':
      return trans.__('What the chart shows');
    case 'picked':
      return trans.__('The run and the step to begin with');
    case 'format':
      return trans.__('csv, jsonl or tensorboard');
  }
}

/** What {@link addCommand} needs to know. */
interface ICommand {
  label: string;
  caption?: string;
  icon?: LabIcon;
  takes?: Argument[];
  execute: (args: ReadonlyPartialJSONObject) => unknown;
  isEnabled?: () => boolean;
}

/** Adds commands and puts them into the palette. */
export class Commands {
  constructor(
    private readonly _context: IContext,
    private readonly _palette: ICommandPalette | null
  ) {}

  /** Add one command. */
  add(id: string, command: ICommand): void {
    const { commands, trans } = this._context;
    const properties: {
      [name: string]: { type: string; description: string };
    } = {};
    for (const name of command.takes ?? []) {
      const type = TYPES[name] ?? 'string';
      properties[name] = { type, description: argumentWord(name, trans) };
    }
    const options: CommandRegistry.ICommandOptions = {
      label: command.label,
      caption: command.caption ?? command.label,
      icon: command.icon,
      describedBy: { args: { type: 'object', properties } },
      isEnabled: command.isEnabled ?? (() => true),
      execute: command.execute
    };
    commands.addCommand(id, options);
    this._palette?.addItem({ command: id, category: trans.__('Fine-Tuning') });
  }

  /** The checkpoint that the arguments name, or that the person chooses. */
  async checkpoint(
    args: ReadonlyPartialJSONObject,
    title: string
  ): Promise<ICheckpoint | undefined> {
    const { state } = this._context.feed;
    const path =
      args.checkpoint ??
      (await pick(title, [...state.checkpoints.keys()].reverse()));
    return state.checkpoints.get(String(path));
  }

  /** The run that the arguments name, or that the person chooses. */
  async run(
    args: ReadonlyPartialJSONObject,
    title: string
  ): Promise<IRun | undefined> {
    const { state } = this._context.feed;
    if (args.run) {
      const run = state.runs.get(String(args.run));
      if (!run) {
        const { trans } = this._context;
        complain(strangerSentence(String(args.run), state, trans), trans);
      }
      return run;
    }
    const names = runNames(state, this._context.trans);
    const labels = [...state.runs.keys()].reverse();
    const chosen = await pick(
      title,
      labels.map(id => `${names.get(id)} · ${id}`)
    );
    return chosen
      ? state.runs.get(chosen.slice(chosen.lastIndexOf(' · ') + 3))
      : undefined;
  }
}

async function pick(title: string, items: string[]): Promise<string | null> {
  const { value } = await InputDialog.getItem({ title, items });
  return value;
}

/** The commands about runs and checkpoints. */
export function addActions(
  commands: Commands,
  context: IContext,
  actions: Actions,
  notebooks: INotebookTracker | null
): void {
  const { feed, trans } = context;
  const anyRun = () => feed.state.runs.size > 0;
  const anyCheckpoint = () => feed.state.checkpoints.size > 0;
  const insert = (code: string) =>
    insertCell(notebooks, code) || actions.copy(code);

  const forCheckpoint = (
    id: string,
    label: string,
    action: (checkpoint: ICheckpoint) => unknown,
    caption?: string
  ) =>
    commands.add(id, {
      label,
      caption,
      takes: ['checkpoint'],
      isEnabled: anyCheckpoint,
      execute: async args => {
        const found = await commands.checkpoint(args, label);
        return found && action(found);
      }
    });
  const forRun = (
    id: string,
    label: string,
    action: (run: IRun) => unknown,
    caption?: string
  ) =>
    commands.add(id, {
      label,
      caption,
      takes: ['run'],
      isEnabled: anyRun,
      execute: async args => {
        const found = await commands.run(args, label);
        return found && action(found);
      }
    });

  commands.add(CommandIDs.insertStart, {
    label: trans.__('Insert Code to Start Fine-Tuning'),
    execute: () =>
      insert(startCode(feed.status?.models[0]?.name ?? 'tuft/demo'))
  });
  commands.add(CommandIDs.uploadAdapter, {
    label: trans.__('Upload a PEFT Adapter…'),
    caption: trans.__('A tar archive, or the two files of a PEFT directory'),
    icon: fileUploadIcon,
    execute: async () => {
      const chosen = await chooseFiles();
      await actions.upload(
        await adapterOf(chosen, []),
        (feed.status?.models ?? []).map(({ name }) => name)
      );
    }
  });
  forCheckpoint(
    CommandIDs.insertCheckpoint,
    trans.__('Insert Code to Load a Checkpoint'),
    checkpoint => insert(checkpointCode(checkpoint))
  );
  forCheckpoint(
    CommandIDs.copyCheckpoint,
    trans.__('Copy the Path of a Checkpoint'),
    checkpoint => actions.copy(checkpoint.path)
  );
  forCheckpoint(
    CommandIDs.downloadCheckpoint,
    trans.__('Download a Checkpoint'),
    checkpoint => actions.download(checkpoint),
    trans.__('As a tar archive: a plain PEFT directory')
  );
  forCheckpoint(
    CommandIDs.keepCheckpoint,
    trans.__('Pin a Checkpoint'),
    checkpoint => actions.expire(checkpoint, null),
    trans.__('It never expires')
  );
  forCheckpoint(
    CommandIDs.expireCheckpoint,
    trans.__('Let a Checkpoint Expire in a Week'),
    checkpoint => actions.expire(checkpoint, 7 * DAY)
  );
  forCheckpoint(
    CommandIDs.publishCheckpoint,
    trans.__('Publish a Checkpoint'),
    checkpoint => actions.publish(checkpoint, true),
    trans.__('Every tenant of this server may load it')
  );
  forCheckpoint(
    CommandIDs.unpublishCheckpoint,
    trans.__('Make a Checkpoint Private'),
    checkpoint => actions.publish(checkpoint, false)
  );
  forCheckpoint(
    CommandIDs.deleteCheckpoint,
    trans.__('Delete a Checkpoint…'),
    checkpoint => actions.remove(checkpoint)
  );
  forRun(
    CommandIDs.insertResume,
    trans.__('Insert Code to Resume a Run'),
    run => insert(resumeCode(run))
  );
  forRun(CommandIDs.closeRun, trans.__('End a Run…'), run =>
    actions.close(run, runNames(feed.state, trans).get(run.id) ?? run.id)
  );
  commands.add(CommandIDs.exportMetrics, {
    label: trans.__('Export the Metrics of Runs'),
    caption: trans.__('As CSV, JSON lines, or files for TensorBoard'),
    takes: ['runs', 'format'],
    isEnabled: anyRun,
    execute: async args => {
      const title = trans.__('Export the Metrics of Runs');
      const asked = Array.isArray(args.runs)
        ? args.runs.map(id => ({ run: String(id) }))
        : [args];
      const chosen = await Promise.all(
        asked.map(each => commands.run(each, title))
      );
      const names = runNames(feed.state, trans);
      const found = chosen
        .filter((run): run is IRun => run !== undefined)
        .map(run => ({ run, name: names.get(run.id) ?? run.id }));
      if (!found.length) {
        return;
      }
      if (args.format === 'tensorboard') {
        // TensorBoard knows runs by their files.
        for (const { run } of found) {
          await actions.saveMetrics(run, 'tensorboard');
        }
      } else if (args.format === 'jsonl') {
        const rows = toJsonLines(found);
        actions.saveAs(rows, 'application/jsonl', 'metrics.jsonl');
      } else {
        actions.saveAs(toCsv(found), 'text/csv', 'metrics.csv');
      }
    }
  });
}
