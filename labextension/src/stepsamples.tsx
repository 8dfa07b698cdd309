/** What a run's weights said around a step: prompts and answers, as the server keeps them for whoever asked. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { formatCount } from './format';

/** Tokens, and their text where the server has the tokenizer at hand. */
export interface IWords {
  tokens: number[];
  text: string | null;
}

/** One sample request with (the first of) its answers; `sequences` counts them all. */
export interface ISample {
  time: number;
  temperature: number;
  prompt: IWords;
  sequences: number;
  answers: (IWords & { stop_reason: string })[];
}

/** The answer to `GET tuft/runs/{run}/samples`. */
export interface IStepSamples {
  /** Whose weights these samples are of; null if none are kept. */
  step: number | null;
  /** All steps of which samples are kept. */
  steps: number[];
  samples: ISample[];
  /** Whether the server keeps samples at all. */
  keeping: boolean;
}

/** Asks the server for the samples at a step, or the last ones before it. */
export type AskSamples = (run: string, step: number) => Promise<IStepSamples>;

/** Whoever walks along the steps with a key held down asks once, at the end. */
const PAUSE_MS = 200;

/** Answers in front of the "show all" button. */
const FIRST_ANSWERS = 2;

/** Props of {@link StepSamples}. */
export interface IStepSamplesProps {
  run: string;
  step: number;
  askSamples: AskSamples;
  trans: TranslationBundle;
}

/** See the head of the file. */
export function StepSamples(props: IStepSamplesProps): JSX.Element {
  const { run, step, askSamples, trans } = props;
  const [found, setFound] = React.useState<IStepSamples | Error | null>(null);
  React.useEffect(() => {
    let over = false;
    const timer = window.setTimeout(() => {
      askSamples(run, step).then(
        samples => over || setFound(samples),
        reason => over || setFound(new Error(reason?.message ?? reason))
      );
    }, PAUSE_MS);
    return () => {
      over = true;
      window.clearTimeout(timer);
    };
  }, [run, step, askSamples]);
  return (
    <div className="jp-Tuft-said" aria-busy={found === null}>
      <h4>
        {found && 'step' in found && found.step !== null
          ? trans.__('Samples of step %1', formatCount(found.step))
          : trans.__('Samples')}
      </h4>
      {found instanceof Error ? (
        <p className="jp-Tuft-error">{found.message}</p>
      ) : found?.samples.length ? (
        found.samples.map((sample, i) => (
          <Sample key={`${found.step} ${i}`} sample={sample} trans={trans} />
        ))
      ) : (
        <p className="jp-Tuft-quiet">{absent(found, trans)}</p>
      )}
    </div>
  );
}

function absent(found: IStepSamples | null, trans: TranslationBundle): string {
  if (found === null) {
    return trans.__('Looking for samples…');
  }
  return found.keeping
    ? trans.__(
        'None near this step. What you sample from weights that this run saved is shown here; the newest are kept in memory.'
      )
    : trans.__('This server keeps no samples (keep_samples is false).');
}

function Sample(props: {
  sample: ISample;
  trans: TranslationBundle;
}): JSX.Element {
  const { sample, trans } = props;
  const [all, setAll] = React.useState(false);
  const shown = all ? sample.answers : sample.answers.slice(0, FIRST_ANSWERS);
  return (
    <article
      className="jp-Tuft-sample"
      aria-label={trans.__('Sample: %1', plain(sample.prompt, trans))}
    >
      <p className="jp-Tuft-samplePrompt" tabIndex={0}>
        {plain(sample.prompt, trans)}
      </p>
      {shown.map((answer, i) => (
        <p key={i} className="jp-Tuft-sampleAnswer">
          {plain(answer, trans)}
          {answer.stop_reason === 'length' && (
            <span
              className="jp-Tuft-quiet"
              title={trans.__('cut at the limit')}
            >
              …
            </span>
          )}
        </p>
      ))}
      <div className="jp-Tuft-entryFacts">
        {[
          trans._n(
            '%1 answer',
            '%1 answers',
            sample.sequences,
            sample.sequences
          ),
          trans.__('temperature %1', sample.temperature)
        ].join(' · ')}
        {sample.answers.length > FIRST_ANSWERS && (
          <button className="jp-Tuft-textButton" onClick={() => setAll(!all)}>
            {all
              ? trans.__('Show fewer')
              : trans.__('Show %1', sample.answers.length)}
          </button>
        )}
      </div>
    </article>
  );
}

function plain({ text, tokens }: IWords, trans: TranslationBundle): string {
  return text ?? trans.__('tokens %1', tokens.join(' '));
}
