/** The run cards. Each is also the switch that puts its run on the chart. */
import { TranslationBundle } from '@jupyterlab/translation';
import { codeIcon, closeIcon, launchIcon } from '@jupyterlab/ui-components';
import * as React from 'react';
import { CommandIDs } from './commandids';
import { latest, lineOf, throughput } from './curves';
import { formatCount, formatValue } from './format';
import { useListing } from './listing';
import { IRun } from './objects';
import { phaseOf, phaseWord } from './names';
import { IconButton, Section } from './parts';
import { IShown, RUN_MIME } from './shown';

/** Cards that are shown at first, if no more runs train. */
const FIRST_CARDS = 5;

/** Props of {@link Runs}. */
export interface IRunsProps extends IShown {
  shown: ReadonlySet<string>;
  onToggle: (run: string) => void;
}

/** All runs, the newest first; at first the newest and those that train. */
export function Runs(props: IRunsProps): JSX.Element {
  const { names, now, state, trans } = props;
  const runs = [...state.runs.values()];
  const { visible, search, more } = useListing({
    things: runs.map((run, index) => ({ run, index })).reverse(),
    first: FIRST_CARDS,
    words: ({ run }) =>
      [names.get(run.id), run.id, run.base_model, run.tenant].join(' '),
    urgent: ({ run }) => ['starting', 'training'].includes(phaseOf(run, now)),
    label: trans.__('Search runs'),
    trans
  });
  return (
    <Section title={trans.__('Runs')} count={runs.length}>
      {search}
      <ul className="jp-Tuft-list">
        {visible.map(({ run, index }) => (
          <RunCard key={run.id} {...props} run={run} index={index} />
        ))}
      </ul>
      {more}
    </Section>
  );
}

function RunCard(
  props: IRunsProps & { run: IRun; index: number }
): JSX.Element {
  const { run, trans } = props;
  const name = props.names.get(run.id) ?? run.id;
  const shown = props.shown.has(run.id);
  const phase = phaseOf(run, props.now);
  const rate = phase === 'training' ? throughput(run) : null;
  const line = lineOf(props.index);
  const style = { '--tuft-line': `var(${line.colour})` } as React.CSSProperties;
  const dashed = line.dashed ? ' jp-mod-dashed' : '';
  const open = () =>
    void props.commands.execute(CommandIDs.openRuns, { runs: [run.id] });
  const about = [
    run.base_model,
    run.rank !== null && trans.__('rank %1', run.rank),
    run.tenant
  ]
    .filter(Boolean)
    .join(' · ');
  return (
    <li
      className={`jp-Tuft-card${shown ? ' jp-mod-on' : ''}`}
      style={style}
      draggable
      onDragStart={event => {
        event.dataTransfer.setData(RUN_MIME, run.id);
        event.dataTransfer.effectAllowed = 'copy';
      }}
      onDoubleClick={() => open()}
    >
      <div className="jp-Tuft-cardHead">
        <button
          className="jp-Tuft-runName"
          aria-pressed={shown}
          title={
            shown
              ? trans.__('Hide %1 on the chart (%2)', name, run.id)
              : trans.__('Show %1 on the chart (%2)', name, run.id)
          }
          onClick={() => props.onToggle(run.id)}
        >
          <span
            className={`jp-Tuft-swatch${dashed}${shown ? ' jp-mod-on' : ''}`}
          />
          <span className="jp-Tuft-ellipsis">{name}</span>
        </button>
        <span className={`jp-Tuft-phase jp-mod-${phase}`}>
          {phaseWord(phase, trans)}
        </span>
      </div>
      <div className="jp-Tuft-cardSub">
        <span className="jp-Tuft-ellipsis" title={about}>
          {about}
        </span>
        <div
          className="jp-Tuft-actions"
          role="group"
          aria-label={trans.__('Actions on %1', name)}
        >
          <IconButton
            icon={launchIcon}
            label={trans.__('Open %1 in the run view', name)}
            onClick={open}
          />
          <IconButton
            icon={codeIcon}
            label={trans.__('Insert code to resume %1', name)}
            onClick={() =>
              void props.commands.execute(CommandIDs.insertResume, {
                run: run.id
              })
            }
          />
          {(run.status === 'ready' || run.status === 'creating') && (
            <IconButton
              icon={closeIcon}
              label={trans.__('End %1', name)}
              onClick={() =>
                void props.commands.execute(CommandIDs.closeRun, {
                  run: run.id
                })
              }
            />
          )}
        </div>
      </div>
      <RunProblem {...props} />
      {run.status !== 'failed' && (
        <dl className="jp-Tuft-figures">
          <Figure label={trans.__('step')} value={formatCount(run.step)} />
          <Figure
            label={trans.__('loss')}
            value={formatValue(latest(run, 'loss'))}
          />
          {rate === null ? (
            <Figure
              label={trans.__('tokens')}
              value={formatCount(run.tokens)}
            />
          ) : (
            <Figure label={trans.__('tokens/s')} value={formatCount(rate)} />
          )}
          <Figure
            label={trans.__('pending')}
            title={trans.__('Operations that wait or run')}
            value={formatCount(run.pending)}
          />
        </dl>
      )}
    </li>
  );
}

/** Why a run could not be started, or why the newest of its requests failed. */
export function RunProblem(props: {
  run: IRun;
  trans: TranslationBundle;
}): JSX.Element | null {
  const { run, trans } = props;
  const { error, last_error, status } = run;
  if (error) {
    return <p className="jp-Tuft-error">{error}</p>;
  }
  return last_error && status !== 'closed' ? (
    <p className="jp-Tuft-error" title={last_error}>
      {trans.__('Its last request failed: %1', last_error)}
    </p>
  ) : null;
}

function Figure(props: {
  label: string;
  value: string;
  title?: string;
}): JSX.Element {
  return (
    <div title={props.title}>
      <dt>{props.label}</dt>
      <dd>{props.value}</dd>
    </div>
  );
}
