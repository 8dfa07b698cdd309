/** What metrics and axes are called, in the reader's language. */
import { TranslationBundle } from '@jupyterlab/translation';
import { Metric } from './curves';

/** A {@link Metric} in words. */
export function metricWord(metric: Metric, trans: TranslationBundle): string {
  switch (metric) {
    case 'loss':
      return trans.__('Loss');
    case 'kl':
      return trans.__('KL (k3)');
    case 'grad_norm':
      return trans.__('Gradient norm');
    case 'learning_rate':
      return trans.__('Learning rate');
    case 'tokens_per_second':
      return trans.__('Tokens/s');
    case 'tokens':
      return trans.__('Tokens per step');
  }
}
