/** The playground: one prompt, answered side by side by the base model and by any checkpoints, as tokens are drawn. */
import { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { IModelStatus } from './api';
import { Ask, complete, IQuestion } from './complete';
import { lineOf } from './curves';
import { formatDuration } from './format';
import { CopyButton } from './parts';
import { IShown } from './shown';

/** Answers side by side. */
const MOST_COLUMNS = 6;

/** What a playground shows; plain JSON, so that it can be restored. */
export interface IPlaygroundState extends IQuestion {
  models: string[];
}

/** Props of {@link PlaygroundBody}. */
export interface IPlaygroundProps extends IShown {
  view: IPlaygroundState;
  onView: (change: Partial<IPlaygroundState>) => void;
  bases: readonly IModelStatus[];
  ask: Ask;
}

/** What a model has said so far. */
interface IAnswer {
  text: string;
  pieces: number;
  began: number;
  /** Seconds until the first piece, and until now. */
  first: number | null;
  took: number;
  state: 'waiting' | 'writing' | 'done' | 'cut' | 'stopped' | 'failed';
}

/** See the head of the file. */
export function PlaygroundBody(props: IPlaygroundProps): JSX.Element {
  const { view, onView, ask, trans } = props;
  const [answers, setAnswers] = React.useState<(IAnswer | null)[]>([]);
  const running = React.useRef<AbortController | null>(null);
  const [busy, setBusy] = React.useState(false);
  React.useEffect(() => () => running.current?.abort(), []);
  const models = choices(props);
  const columns = view.models.length
    ? view.models
    : models.slice(0, 1).map(({ value }) => value);
  const ready = view.prompt.trim() !== '' && columns.length > 0;

  const stop = () => running.current?.abort();
  const run = async () => {
    stop();
    const controller = new AbortController();
    running.current = controller;
    setBusy(true);
    setAnswers(columns.map(() => null));
    const put = (column: number, answer: IAnswer) => {
      if (running.current === controller) {
        setAnswers(all => all.map((one, i) => (i === column ? answer : one)));
      }
    };
    await Promise.all(
      columns.map((model, i) =>
        listen(ask, model, view, controller.signal, answer => put(i, answer))
      )
    );
    if (running.current === controller) {
      setBusy(false);
    }
  };
  const change = (models: string[], kept: (IAnswer | null)[]) => {
    stop();
    setAnswers(kept);
    onView({ models });
  };

  return (
    <div
      className="jp-Tuft-view jp-Tuft-playground"
      onKeyDown={event => {
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
          event.preventDefault();
          event.stopPropagation();
          if (ready && !busy) {
            void run();
          }
        }
      }}
    >
      <form
        className="jp-Tuft-sheet"
        onSubmit={event => {
          event.preventDefault();
          if (busy) {
            stop();
          } else if (ready) {
            void run();
          }
        }}
      >
        <Prompt view={view} onView={onView} trans={trans} />
        <div className="jp-Tuft-controls">
          <Sampling view={view} onView={onView} trans={trans} />
          <span className="jp-Tuft-space" />
          <button
            type="submit"
            className="jp-Tuft-primary"
            disabled={!busy && !ready}
            title={trans.__('Ctrl+Enter')}
          >
            {busy ? trans.__('Stop') : trans.__('Run')}
          </button>
        </div>
      </form>
      <div className="jp-Tuft-answers">
        {columns.map((model, i) => (
          <Answer
            key={i}
            place={i}
            model={model}
            models={models}
            answer={answers[i] ?? null}
            onModel={chosen =>
              change(
                columns.map((one, k) => (k === i ? chosen : one)),
                answers.map((one, k) => (k === i ? null : one))
              )
            }
            onRemove={
              columns.length > 1
                ? () =>
                    change(
                      columns.filter((_, k) => k !== i),
                      answers.filter((_, k) => k !== i)
                    )
                : undefined
            }
            trans={trans}
          />
        ))}
        {columns.length < MOST_COLUMNS && (
          <button
            className="jp-Tuft-addColumn"
            onClick={() => {
              const next =
                models.find(({ value }) => !columns.includes(value)) ??
                models[0];
              if (next) {
                change([...columns, next.value], answers);
              }
            }}
          >
            {trans.__('+ Compare with another model')}
          </button>
        )}
      </div>
    </div>
  );
}

interface IChoice {
  value: string;
  label: string;
}

/** What can answer: base models, then checkpoints, the newest first. */
function choices(props: IPlaygroundProps): IChoice[] {
  const { bases, state, names, trans } = props;
  return [
    ...bases.map(({ name }) => ({
      value: name,
      label: trans.__('%1 (base model)', name)
    })),
    ...[...state.checkpoints.values()]
      .filter(({ kind }) => kind !== 'external_weights')
      .reverse()
      .map(({ path, name, run, step }) => ({
        value: path,
        label: trans.__(
          '%1 of %2, step %3',
          name,
          names.get(run) ?? run,
          `${step}`
        )
      }))
  ];
}

/** Collect an answer and tell of it with each piece. Never rejects. */
async function listen(
  ask: Ask,
  model: string,
  question: IQuestion,
  signal: AbortSignal,
  tell: (answer: IAnswer) => void
): Promise<void> {
  const began = performance.now();
  let answer: IAnswer = {
    text: '',
    pieces: 0,
    began,
    first: null,
    took: 0,
    state: 'waiting'
  };
  const say = (change: Partial<IAnswer>) => {
    answer = { ...answer, took: (performance.now() - began) / 1000, ...change };
    tell(answer);
  };
  say({});
  try {
    for await (const piece of complete(ask, model, question, signal)) {
      say({
        text: answer.text + piece.text,
        pieces: answer.pieces + (piece.text ? 1 : 0),
        first: answer.first ?? (performance.now() - began) / 1000,
        state:
          piece.finish === null
            ? 'writing'
            : piece.finish === 'length'
              ? 'cut'
              : 'done'
      });
    }
    if (answer.state === 'waiting' || answer.state === 'writing') {
      say({ state: 'done' });
    }
  } catch (error) {
    if (signal.aborted) {
      say({ state: 'stopped' });
    } else {
      const reason = error instanceof Error ? error.message : String(error);
      say({ text: reason, state: 'failed' });
    }
  }
}

/** The parts of the form, and what they change. */
interface IFormProps {
  view: IPlaygroundState;
  onView: (change: Partial<IPlaygroundState>) => void;
  trans: TranslationBundle;
}

function Prompt({ view, onView, trans }: IFormProps): JSX.Element {
  const chat = view.mode === 'chat';
  return (
    <>
      <div className="jp-Tuft-controls">
        <h3>{trans.__('Prompt')}</h3>
        <div
          className="jp-Tuft-segments"
          role="group"
          aria-label={trans.__('Kind of prompt')}
        >
          {(['chat', 'text'] as const).map(mode => (
            <button
              key={mode}
              type="button"
              aria-pressed={view.mode === mode}
              onClick={() => onView({ mode })}
            >
              {mode === 'chat' ? trans.__('Chat') : trans.__('Continue text')}
            </button>
          ))}
        </div>
      </div>
      {chat && (
        <input
          className="jp-Tuft-field"
          aria-label={trans.__('System message')}
          placeholder={trans.__('System message (optional)')}
          value={view.system}
          onChange={event => onView({ system: event.target.value })}
        />
      )}
      <textarea
        className="jp-Tuft-field"
        rows={3}
        aria-label={chat ? trans.__('Message') : trans.__('Text to continue')}
        placeholder={
          chat ? trans.__('Ask something…') : trans.__('Begin a text…')
        }
        value={view.prompt}
        onChange={event => onView({ prompt: event.target.value })}
      />
    </>
  );
}

function Sampling({ view, onView, trans }: IFormProps): JSX.Element {
  return (
    <>
      <label className="jp-Tuft-slider">
        {trans.__('Temperature')}
        <input
          type="range"
          min={0}
          max={2}
          step={0.05}
          value={view.temperature}
          onChange={event =>
            onView({ temperature: Number(event.target.value) })
          }
        />
        <output>{view.temperature.toFixed(2)}</output>
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Top p')}
        <input
          type="range"
          min={0.05}
          max={1}
          step={0.05}
          value={view.topP}
          onChange={event => onView({ topP: Number(event.target.value) })}
        />
        <output>{view.topP.toFixed(2)}</output>
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Tokens')}
        <input
          type="number"
          className="jp-Tuft-field"
          min={1}
          max={32768}
          value={view.maxTokens}
          onChange={event => {
            const maxTokens = Math.round(Number(event.target.value));
            if (maxTokens >= 1) {
              onView({ maxTokens });
            }
          }}
        />
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Seed')}
        <input
          type="number"
          className="jp-Tuft-field"
          placeholder={trans.__('random')}
          value={view.seed ?? ''}
          onChange={event => {
            const { value } = event.target;
            onView({ seed: value === '' ? null : Math.round(Number(value)) });
          }}
        />
      </label>
    </>
  );
}

/** One model and what it says. */
function Answer(props: {
  place: number;
  model: string;
  models: IChoice[];
  answer: IAnswer | null;
  onModel: (model: string) => void;
  onRemove?: () => void;
  trans: TranslationBundle;
}): JSX.Element {
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
  const { pieces, first, took, state } = answer;
  const parts: string[] = [];
  if (pieces) {
    parts.push(trans._n('%1 token', '%1 tokens', pieces, pieces));
  }
  if (pieces > 1 && first !== null && took > first) {
    parts.push(
      trans.__('%1 tokens/s', ((pieces - 1) / (took - first)).toFixed(1))
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
