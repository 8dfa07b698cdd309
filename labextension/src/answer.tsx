/** One column of the playground: a model, and what it says. */
import { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { lineOf } from './curves';
import { formatDuration } from './format';
import { IAnswer } from './listening';
import { CopyButton } from './parts';
import { IChoice } from './playgroundstate';

/** Seconds below which a rate would say more of the network than of the model. */
const SHORTEST = 0.05;

/** Props of {@link Answer}. */
export interface IAnswerProps {
  /** From 0, from the left. */
  place: number;
  model: string;
  models: readonly IChoice[];
  answer: IAnswer | null;
  onModel: (model: string) => void;
  onRemove?: () => void;
  trans: TranslationBundle;
}

/** See the head of the file. */
export function Answer(props: IAnswerProps): JSX.Element {
  const { model, models, answer, place, trans } = props;
  const known = models.some(({ value }) => value === model);
  const style = {
    '--tuft-line': `var(${lineOf(place).colour})`
  } as React.CSSProperties;
  const label = models.find(({ value }) => value === model)?.label ?? model;
  const live = answer?.state === 'waiting' || answer?.state === 'writing';
  return (
    <section
      className="jp-Tuft-sheet jp-Tuft-answer"
      style={style}
      aria-label={label}
    >
      <div className="jp-Tuft-answerHead">
        <HTMLSelect
          className="jp-Tuft-select"
          aria-label={trans.__('Model of column %1', place + 1)}
          title={model}
          value={model}
          onChange={event => props.onModel(event.target.value)}
        >
          {!known && <option value={model}>{model}</option>}
          {models.map(({ value, label }) => (
            <option key={value} value={value}>
              {label}
            </option>
          ))}
        </HTMLSelect>
        {props.onRemove && (
          <button
            className="jp-Tuft-chipClose"
            aria-label={trans.__('Remove column %1', place + 1)}
            title={trans.__('Remove column %1', place + 1)}
            onClick={props.onRemove}
          >
            ×
          </button>
        )}
      </div>
      <div
        className={`jp-Tuft-answerText jp-mod-${answer?.state ?? 'empty'}`}
        role="log"
        aria-live="polite"
        aria-busy={live}
        aria-label={trans.__('Answer of %1', label)}
        tabIndex={0}
      >
        {answer?.state === 'waiting' && (
          <span className="jp-Tuft-quiet">
            {trans.__('Waiting for the model…')}
          </span>
        )}
        {answer?.text}
        {answer?.state === 'writing' && <span className="jp-Tuft-caretBar" />}
      </div>
      <div className="jp-Tuft-answerFoot">
        <span>
          {answer ? figures(answer, trans) : trans.__('No answer yet')}
        </span>
        {answer && answer.state !== 'failed' && answer.text && (
          <CopyButton
            text={answer.text}
            label={trans.__('Copy this answer')}
            trans={trans}
          />
        )}
      </div>
    </section>
  );
}

function figures(answer: IAnswer, trans: TranslationBundle): string {
  const { tokens, first, took, state } = answer;
  const parts: string[] = [];
  if (tokens) {
    parts.push(trans._n('%1 token', '%1 tokens', tokens, tokens));
  }
  if (tokens > 1 && first !== null && took - first > SHORTEST) {
    parts.push(
      trans.__('%1 tokens/s', ((tokens - 1) / (took - first)).toFixed(1))
    );
  }
  if (first !== null) {
    parts.push(trans.__('first after %1', formatDuration(first)));
  }
  const ends: { [state: string]: string } = {
    cut: trans.__('cut at the limit'),
    stopped: trans.__('stopped'),
    failed: trans.__('failed')
  };
  return [...parts, ends[state]].filter(Boolean).join(' · ');
}
