/** Code that a person would have to type: put into the active notebook, or into the clipboard where there is none. */
import { INotebookTracker, NotebookActions } from '@jupyterlab/notebook';
import { ICheckpoint, IRun } from './objects';

const IMPORT = 'import tuft_jupyter';

/** The first cell of a fine-tuning notebook. */
export function startCode(model: string): string {
  return [
    `%tuft init ${model}`,
    IMPORT,
    'training = tuft_jupyter.create_training_client().result()'
  ].join('\n');
}

/** Uses a checkpoint: goes on training from it, or samples with it. */
export function checkpointCode({ kind, path }: ICheckpoint): string {
  const service = [IMPORT, 'service = tuft_jupyter.get_service_client()'];
  return [
    ...service,
    kind === 'weights'
      ? `training = service.create_training_client_from_state_with_optimizer(${quoted(path)}).result()`
      : `sampler = service.create_sampling_client(model_path=${quoted(path)}).result()`
  ].join('\n');
}

/** Goes on with a run at its next step. */
export function resumeCode({ id }: IRun): string {
  return `training = %tuft resume ${id}`;
}

function quoted(text: string): string {
  return JSON.stringify(text);
}

/** Put `code` into a new cell below the active one. False if there is no notebook. */
export function insertCell(
  notebooks: INotebookTracker | null,
  code: string
): boolean {
  const notebook = notebooks?.currentWidget?.content;
  if (!notebook?.model) {
    return false;
  }
  const active = notebook.activeCell?.model;
  if (active?.type !== 'code' || active.sharedModel.getSource().trim()) {
    NotebookActions.insertBelow(notebook);
  }
  notebook.activeCell!.model.sharedModel.setSource(code);
  return true;
}
