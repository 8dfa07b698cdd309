/**
 * What a person can do with runs and checkpoints. Each action says what went wrong, and asks before it destroys.
 *
 * The server's part is the same table of routes that the SDK uses; nothing here changes the page's state, the feed does.
 */
import {
  Clipboard,
  Dialog,
  InputDialog,
  Notification,
  showDialog
} from '@jupyterlab/apputils';
import { URLExt } from '@jupyterlab/coreutils';
import { TranslationBundle } from '@jupyterlab/translation';
import { Api } from './api';
import { complain } from './complain';
import { ICheckpoint, IRun } from './objects';
import { IDropped } from './upload';

/** See the head of the file. */
export class Actions {
  constructor(
    private readonly _api: Api,
    private readonly _trans: TranslationBundle
  ) {}

  /** Keep a checkpoint for good, or let it expire in `seconds`. */
  async expire(checkpoint: ICheckpoint, seconds: number | null): Promise<void> {
    await this._try(() =>
      this._api.call('PUT', `${routeOf(checkpoint)}/ttl`, {
        ttl_seconds: seconds
      })
    );
  }

  /** Let every tenant of the server load a checkpoint, or only its owner. */
  async publish(checkpoint: ICheckpoint, open: boolean): Promise<void> {
    await this._try(() =>
      this._api.call(open ? 'POST' : 'DELETE', `${routeOf(checkpoint)}/publish`)
    );
  }

  /** Delete a checkpoint, after a question. */
  async remove(checkpoint: ICheckpoint): Promise<void> {
    const trans = this._trans;
    const { button } = await showDialog({
      title: trans.__('Delete %1?', checkpoint.name),
      body: trans.__(
        'The weights at %1 are removed from the disk. This cannot be undone.',
        checkpoint.path
      ),
      buttons: [
        Dialog.cancelButton({ label: trans.__('Cancel') }),
        Dialog.warnButton({ label: trans.__('Delete') })
      ]
    });
    if (button.accept) {
      await this._try(() => this._api.call('DELETE', routeOf(checkpoint)));
    }
  }

  /** Save a checkpoint's adapter as a tar archive: a plain PEFT directory. */
  async download(checkpoint: ICheckpoint): Promise<void> {
    await this._try(async () => {
      const route = `${routeOf(checkpoint)}/archive`;
      const { url } = (await this._api.call('GET', route)) as { url: string };
      const ticket = url.slice(url.lastIndexOf('/') + 1);
      const address = this._api.address(
        URLExt.join('tuft/lab/api/v1/tuft/files', ticket)
      );
      save(address, `${checkpoint.name}.tar`);
    });
  }

  /** Keep an adapter made elsewhere, for one of the `models`. */
  async upload(
    dropped: IDropped | null,
    models: readonly string[]
  ): Promise<void> {
    const trans = this._trans;
    if (!dropped) {
      Notification.warning(
        trans.__(
          'That is no PEFT adapter: drop a folder with adapter_config.json and adapter_model.safetensors, or a tar archive of one.'
        ),
        { autoClose: 8000 }
      );
      return;
    }
    const model =
      models.length > 1
        ? (
            await InputDialog.getItem({
              title: trans.__('Which base model is %1 for?', dropped.name),
              items: [...models]
            })
          ).value
        : models[0];
    if (!model) {
      return;
    }
    const work = this._api.upload(dropped.archive, model, dropped.name);
    Notification.promise(work, {
      pending: { message: trans.__('Uploading %1…', dropped.name) },
      success: { message: path => trans.__('Uploaded as %1', path) },
      error: { message: () => trans.__('%1 was not uploaded', dropped.name) }
    });
    await this._try(() => work);
  }

  /** End a run, after a question: its worker's memory is free again. */
  async close(run: IRun, name: string): Promise<void> {
    const trans = this._trans;
    const { button } = await showDialog({
      title: trans.__('End %1?', name),
      body: trans.__(
        'The run cannot be trained further. Its curve and its checkpoints stay.'
      ),
      buttons: [
        Dialog.cancelButton({ label: trans.__('Cancel') }),
        Dialog.warnButton({ label: trans.__('End run') })
      ]
    });
    if (button.accept) {
      await this._try(() =>
        this._api.call('POST', 'unload_model', { model_id: run.id })
      );
    }
  }

  /** Put a text into the clipboard and say so. */
  copy(text: string): void {
    Clipboard.copyToSystem(text);
    Notification.info(this._trans.__('Copied %1', text), { autoClose: 2000 });
  }

  /** Save a content as a file. */
  saveAs(content: BlobPart, type: string, name: string): void {
    const address = URL.createObjectURL(new Blob([content], { type }));
    save(address, name);
    window.setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }

  /** Save a run's metrics in a format that the server writes. */
  async saveMetrics(run: IRun, format: 'tensorboard'): Promise<void> {
    await this._try(async () => {
      const query = new URLSearchParams({ run: run.id, format });
      const content = await this._api.file(`tuft/lab/export?${query}`);
      const name = `events.out.tfevents.${run.id.replace(/:/g, '-')}`;
      this.saveAs(content, 'application/octet-stream', name);
    });
  }

  private async _try(work: () => Promise<unknown>): Promise<void> {
    try {
      await work();
    } catch (error) {
      complain(error, this._trans);
    }
  }
}

/** The route of a checkpoint in the table. */
function routeOf({ path }: ICheckpoint): string {
  const [run, kind, name] = path.replace('tinker://', '').split('/');
  const parts = ['training_runs', run, 'checkpoints', kind, name];
  return parts.map(encodeURIComponent).join('/');
}

function save(address: string, name: string): void {
  const link = document.createElement('a');
  link.href = address;
  link.download = name;
  document.body.appendChild(link);
  link.click();
  link.remove();
}
