/** The run view in the main area: one large chart that compares runs, and everything about one of them. */
import * as React from 'react';
import { RunFacts } from './facts';
import { Figure } from './figure';
import { Legend } from './legend';
import { chosenRuns } from './lines';
import { strangerSentence } from './names';
import { IPicked, IRunViewProps } from './runviewstate';
import { RUN_MIME } from './shown';
import { AskSamples } from './stepsamples';
import { Tiles } from './tiles';

/** Props of {@link RunViewBody}. */
export interface IRunViewBodyProps extends IRunViewProps {
  /** Counts theme changes. */
  theme: number;
  /** Whether the runs of this user are known. */
  known: boolean;
  askSamples: AskSamples;
}

/** See the head of the file. */
export function RunViewBody(props: IRunViewBodyProps): JSX.Element {
  const { view, state, trans, onView } = props;
  const { picked } = view;
  const setPicked = (picked: IPicked) => onView({ picked });
  const chosen = chosenRuns(state, new Set(view.runs));
  const about =
    chosen.find(({ run }) => run.id === picked?.run) ??
    chosen[chosen.length - 1];
  const add = (run: string) =>
    onView({ runs: [...new Set([...view.runs, run])] });
  return (
    <DropZone onRun={add}>
      <Legend
        {...props}
        chosen={chosen}
        about={about?.run}
        onAbout={run => setPicked({ run, step: null })}
      />
      {props.known && <Strangers {...props} />}
      {about ? (
        <>
          <Tiles {...props} chosen={chosen} />
          <div className="jp-Tuft-viewBody">
            <Figure {...props} chosen={chosen} onPick={setPicked} />
            <RunFacts
              {...props}
              {...about}
              step={picked?.run === about.run.id ? picked.step : null}
              onUnpick={() => setPicked({ run: about.run.id, step: null })}
            />
          </div>
        </>
      ) : (
        <p className="jp-Tuft-viewEmpty">
          {state.runs.size
            ? trans.__(
                'Choose runs to compare: add them above, or drag them here from the panel.'
              )
            : trans.__('No run yet. Curves appear here with the first step.')}
        </p>
      )}
    </DropZone>
  );
}

/** What is to be shown, and is no run of this user: another user's, or of another server. */
function Strangers({
  view,
  state,
  onView,
  trans
}: IRunViewProps): JSX.Element | null {
  const strangers = view.runs.filter(run => !state.runs.has(run));
  if (!strangers.length) {
    return null;
  }
  const remove = () =>
    onView({ runs: view.runs.filter(run => state.runs.has(run)) });
  return (
    <div className="jp-Tuft-trouble" role="alert">
      {strangers.map(run => (
        <p key={run}>{strangerSentence(run, state, trans)}</p>
      ))}
      <button className="jp-Tuft-textButton" onClick={remove}>
        {trans.__('Remove from the comparison')}
      </button>
    </div>
  );
}

/** Takes the runs that are dragged here from the panel. */
function DropZone(props: {
  onRun: (run: string) => void;
  children: React.ReactNode;
}): JSX.Element {
  const [over, setOver] = React.useState(false);
  return (
    <div
      className={`jp-Tuft-view${over ? ' jp-mod-over' : ''}`}
      onDragOver={event => {
        if (event.dataTransfer.types.includes(RUN_MIME)) {
          event.preventDefault();
          event.dataTransfer.dropEffect = 'copy';
          setOver(true);
        }
      }}
      onDragLeave={event => {
        if (!event.currentTarget.contains(event.relatedTarget as Node)) {
          setOver(false);
        }
      }}
      onDrop={event => {
        const run = event.dataTransfer.getData(RUN_MIME);
        setOver(false);
        if (run) {
          event.preventDefault();
          props.onRun(run);
        }
      }}
    >
      {props.children}
    </div>
  );
}
