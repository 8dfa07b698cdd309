/** The playground: one prompt, answered side by side by the base model and by any checkpoints, as tokens are drawn. */
import * as React from 'react';
import { Answer } from './answer';
import { IModelStatus } from './api';
import { Ask, IQuestion } from './complete';
import { IAnswer, listen } from './listening';
import { choices, IPlaygroundProps } from './playgroundstate';
import { Prompt, Sampling } from './question';

/** Answers side by side. */
const MOST_COLUMNS = 6;

/** Props of {@link PlaygroundBody}. */
export interface IPlaygroundBodyProps extends IPlaygroundProps {
  bases: readonly IModelStatus[];
  ask: Ask;
}

/** See the head of the file. */
export function PlaygroundBody(props: IPlaygroundBodyProps): JSX.Element {
  const { view, onView, bases, trans } = props;
  const { answers, busy, start, stop, keep } = useAnswers(props.ask);
  const models = choices(props, bases);
  const columns = view.models.length
    ? view.models
    : models.slice(0, 1).map(({ value }) => value);
  const ready = view.prompt.trim() !== '' && columns.length > 0;
  const change = (models: string[], kept: (IAnswer | null)[]) => {
    keep(kept);
    onView({ models });
  };
  const replace = (column: number, model: string) =>
    change(
      columns.map((one, i) => (i === column ? model : one)),
      answers.map((one, i) => (i === column ? null : one))
    );
  const remove = (column: number) =>
    change(
      columns.filter((_, i) => i !== column),
      answers.filter((_, i) => i !== column)
    );
  const add = () => {
    const next =
      models.find(({ value }) => !columns.includes(value)) ?? models[0];
    if (next) {
      change([...columns, next.value], answers);
    }
  };
  const submit = () => {
    if (busy) {
      stop();
    } else if (ready) {
      void start(columns, view);
    }
  };
  return (
    <div
      className="jp-Tuft-view jp-Tuft-playground"
      onKeyDown={event => {
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
          event.preventDefault();
          event.stopPropagation();
          if (!busy) {
            submit();
          }
        }
      }}
    >
      <form
        className="jp-Tuft-sheet"
        onSubmit={event => {
          event.preventDefault();
          submit();
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
            onModel={chosen => replace(i, chosen)}
            onRemove={columns.length > 1 ? () => remove(i) : undefined}
            trans={trans}
          />
        ))}
        {columns.length < MOST_COLUMNS && (
          <button className="jp-Tuft-addColumn" onClick={add}>
            {trans.__('+ Compare with another model')}
          </button>
        )}
      </div>
    </div>
  );
}

/** What each column says, and the questions that are under way. */
function useAnswers(ask: Ask) {
  const [answers, setAnswers] = React.useState<(IAnswer | null)[]>([]);
  const [busy, setBusy] = React.useState(false);
  const running = React.useRef<AbortController | null>(null);
  React.useEffect(() => () => running.current?.abort(), []);

  /** Ask every model; what was asked before is stopped and forgotten. */
  const start = async (models: readonly string[], question: IQuestion) => {
    keep(models.map(() => null));
    const controller = new AbortController();
    running.current = controller;
    setBusy(true);
    const put = (column: number, answer: IAnswer) => {
      if (running.current === controller) {
        setAnswers(all => all.map((one, i) => (i === column ? answer : one)));
      }
    };
    await Promise.all(
      models.map((model, i) =>
        listen(ask, model, question, controller.signal, answer =>
          put(i, answer)
        )
      )
    );
    if (running.current === controller) {
      setBusy(false);
    }
  };

  /** Stop drawing; what was said so far stays. */
  const stop = () => running.current?.abort();

  /** Stop, and show these answers. */
  const keep = (kept: (IAnswer | null)[]) => {
    stop();
    running.current = null;
    setBusy(false);
    setAnswers(kept);
  };
  return { answers, busy, start, stop, keep };
}
