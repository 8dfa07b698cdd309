/** What happened in one step of a run, and what its weights said then. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { history } from './curves';
import {
  formatCount,
  formatDuration,
  formatMoment,
  formatValue
} from './format';
import { metricWord } from './metrics';
import { IRun } from './objects';
import { AskSamples, StepSamples } from './stepsamples';

/** A term and what holds for it. */
export type Fact = [string, React.ReactNode];

/** Facts, one per line. */
export function FactList({ facts }: { facts: Fact[] }): JSX.Element {
  return (
    <dl className="jp-Tuft-factList">
      {facts.map(([term, value]) => (
        <div key={term}>
          <dt>{term}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

/** Props of {@link StepFacts}. */
export interface IStepFactsProps {
  run: IRun;
  name: string;
  step: number;
  /** The server's clock, seconds since 1970. */
  now: number;
  onUnpick: () => void;
  askSamples: AskSamples;
  trans: TranslationBundle;
}

/** See the head of the file. */
export function StepFacts(props: IStepFactsProps): JSX.Element | null {
  const { run, name, step, trans } = props;
  const kept = history(run.curve);
  const k = kept.findIndex(i => run.curve.step[i] === step);
  if (k < 0) {
    return null;
  }
  const { curve } = run;
  const i = kept[k];
  const before = k > 0 ? kept[k - 1] : null;
  const took = before === null ? null : curve.time[i] - curve.time[before];
  const change =
    before === null || curve.loss[i] === null || curve.loss[before] === null
      ? null
      : curve.loss[i] - curve.loss[before];
  const facts: Fact[] = [
    [trans.__('Loss'), formatValue(curve.loss[i])],
    [
      trans.__('Change'),
      change === null ? '–' : `${change > 0 ? '+' : ''}${formatValue(change)}`
    ],
    [trans.__('Gradient norm'), formatValue(curve.grad_norm[i])],
    [trans.__('Learning rate'), formatValue(curve.learning_rate[i])],
    [trans.__('Tokens'), formatCount(curve.tokens[i])],
    [trans.__('Took'), took === null ? '–' : formatDuration(took)],
    [trans.__('At'), formatMoment(curve.time[i], props.now)]
  ];
  if (curve.kl[i] !== null) {
    facts.splice(2, 0, [metricWord('kl', trans), formatValue(curve.kl[i])]);
  }
  return (
    <section className="jp-Tuft-sheet jp-mod-picked">
      <div className="jp-Tuft-cardHead">
        <h3 className="jp-Tuft-ellipsis">
          {trans.__('Step %1 of %2', formatCount(step), name)}
        </h3>
        <button
          className="jp-Tuft-textButton"
          title={trans.__('Show the run only')}
          onClick={props.onUnpick}
        >
          {trans.__('Close')}
        </button>
      </div>
      <div aria-live="polite" aria-label={trans.__('Step %1', step)}>
        <FactList facts={facts} />
      </div>
      <StepSamples {...props} key={run.id} run={run.id} />
    </section>
  );
}
