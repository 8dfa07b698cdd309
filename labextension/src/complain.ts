/** Says what went wrong, whole: JupyterLab cuts what it pops up, and the way out stands at a sentence's end. */
import { Notification, showErrorMessage } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';

/** Characters that JupyterLab shows of a notification. */
const SHOWN = 140;

const SECONDS = 12;

/** See the head of the file. */
export function complain(reason: unknown, trans: TranslationBundle): void {
  const text = reason instanceof Error ? reason.message : String(reason);
  const readAll = {
    label: trans.__('Read all'),
    callback: () => void showErrorMessage(trans.__('Fine-tuning'), text)
  };
  Notification.error(text, {
    autoClose: 1000 * SECONDS,
    actions: text.length > SHOWN ? [readAll] : []
  });
}
