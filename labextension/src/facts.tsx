/** Beside the big chart: what a run is, what happened in one of its steps, and its checkpoints. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { IRunMemory } from './api';
import { Entry } from './checkpoints';
import { history, lineOf, seriesOf, throughput } from './curves';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatRelative,
  formatValue
} from './format';
import { placeWord } from './gpu';
import { IRun } from './objects';
import { phaseOf, phaseWord } from './names';
import { CopyButton } from './parts';
import { lowest } from './readings';
import { RunProblem } from './runs';
import { IShown } from './shown';
import { FactList, StepFacts } from './stepfacts';
import { AskSamples } from './stepsamples';

/** Props of {@link RunFacts}. */
export interface IRunFactsProps extends IShown {
  run: IRun;
  index: number;
  /** The step that is picked, or null. */
  step: number | null;
  onUnpick: () => void;
  askSamples: AskSamples;
}

/** See the head of the file. */
export function RunFacts(props: IRunFactsProps): JSX.Element {
  const { run, index, state, names, now, locale, trans, step } = props;
  const name = names.get(run.id) ?? run.id;
  const phase = phaseOf(run, now);
  const style = {
    '--tuft-line': `var(${lineOf(index).colour})`
  } as React.CSSProperties;
  const saved = [...state.checkpoints.values()]
    .filter(checkpoint => checkpoint.run === run.id)
    .reverse();
  const time = history(run.curve).map(i => run.curve.time[i]);
  const loss = seriesOf(run, 'loss');
  const best = lowest(loss);
  const rate = throughput(run);
  return (
    <aside
      className="jp-Tuft-aside"
      style={style}
      aria-label={trans.__('About %1', name)}
    >
      {step !== null && <StepFacts {...props} name={name} step={step} />}
      <section className="jp-Tuft-sheet">
        <div className="jp-Tuft-cardHead">
          <h3 className="jp-Tuft-ellipsis" title={run.id}>
            {name}
          </h3>
          <span className={`jp-Tuft-phase jp-mod-${phase}`}>
            {phaseWord(phase, trans)}
          </span>
        </div>
        <RunProblem run={run} trans={trans} />
        <FactList
          facts={[
            [trans.__('Steps'), formatCount(run.step)],
            [trans.__('Tokens'), formatCount(run.tokens)],
            [trans.__('Tokens/s'), rate === null ? '–' : formatCount(rate)],
            [
              trans.__('Lowest loss'),
              best < 0
                ? '–'
                : trans.__(
                    '%1 at step %2',
                    formatValue(loss.y[best]),
                    formatCount(loss.x[best])
                  )
            ],
            [
              trans.__('Trained for'),
              time.length
                ? formatDuration(time[time.length - 1] - time[0])
                : '–'
            ],
            [trans.__('Engine time'), formatDuration(run.engine_ms / 1000)],
            [trans.__('Memory'), held(props.memory[run.id], trans)],
            [
              trans.__('Created'),
              formatRelative(Math.min(0, run.created - now), locale)
            ],
            [trans.__('Base model'), run.base_model],
            [trans.__('LoRA rank'), run.rank === null ? '–' : `${run.rank}`],
            [trans.__('Owner'), run.tenant],
            [trans.__('Waiting'), waiting(run, trans)]
          ]}
        />
        <div className="jp-Tuft-pathLine">
          <code className="jp-Tuft-runId jp-Tuft-ellipsis" title={run.id}>
            {run.id}
          </code>
          <CopyButton text={run.id} trans={trans} />
        </div>
      </section>
      <section className="jp-Tuft-sheet">
        <h3>{trans.__('Checkpoints')}</h3>
        {saved.length === 0 && (
          <p className="jp-Tuft-quiet">
            {trans.__('None yet: save_state or save_weights_for_sampler.')}
          </p>
        )}
        <ul className="jp-Tuft-list">
          {saved.map(checkpoint => (
            <Entry key={checkpoint.path} {...props} checkpoint={checkpoint} />
          ))}
        </ul>
      </section>
    </aside>
  );
}

function held(
  memory: IRunMemory | undefined,
  trans: TranslationBundle
): string {
  const bytes = memory ? memory.model + memory.idle : 0;
  return memory && bytes
    ? `${formatBytes(bytes)}, ${placeWord(memory, trans)}`
    : '–';
}

function waiting(run: IRun, trans: TranslationBundle): string {
  return run.pending > 0
    ? trans._n('%1 operation', '%1 operations', run.pending, run.pending)
    : '–';
}
