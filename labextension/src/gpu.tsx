/** What the machine does: processor, memory, GPUs where there are any, the processes that compute, and what runs take. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { IGauges, IRunMemory } from './api';
import { formatBytes, formatDuration, formatShare } from './format';
import { Meter, Section } from './parts';
import { IShown } from './shown';

/** Runs in the table: those that take most. */
const MOST_RUNS = 6;

/** Props of {@link Resources}. */
export interface IResourcesProps extends IShown {
  gauges: IGauges | null;
}

/** See the head of the file. */
export function Resources(props: IResourcesProps): JSX.Element {
  const { gauges, trans } = props;
  return (
    <Section title={trans.__('Resources')}>
      {gauges ? (
        <>
          <Gauges gauges={gauges} trans={trans} />
          <RunUse {...props} />
        </>
      ) : (
        <p className="jp-Tuft-quiet">{trans.__('No measurement yet.')}</p>
      )}
    </Section>
  );
}

function Gauges(props: {
  gauges: IGauges;
  trans: TranslationBundle;
}): JSX.Element {
  const { trans } = props;
  const { cpu, gpus, loop_lag_ms, memory, workers } = props.gauges;
  const percent = (value: number) => `${Math.round(value)} %`;
  const onGpu = workers.some(worker => worker.gpu_memory);
  return (
    <>
      <Meter label={trans.__('CPU')} value={percent(cpu)} share={cpu / 100} />
      <Meter
        label={trans.__('Memory')}
        value={formatShare(memory.used, memory.total)}
        share={memory.used / memory.total}
        runOut
      />
      {gpus.map((gpu, i) => (
        <React.Fragment key={i}>
          <Meter
            label={gpu.name}
            value={percent(gpu.utilization)}
            share={gpu.utilization / 100}
          />
          <Meter
            label={trans.__('%1 memory', gpu.name)}
            value={formatShare(gpu.used, gpu.total)}
            share={gpu.used / gpu.total}
            runOut
          />
        </React.Fragment>
      ))}
      <table className="jp-Tuft-workers">
        <caption className="jp-Tuft-spoken">{trans.__('Processes')}</caption>
        <colgroup>
          <col />
          <col />
          <col />
          {onGpu && <col />}
        </colgroup>
        <thead>
          <tr>
            <th scope="col">{trans.__('Process')}</th>
            <th scope="col">{trans.__('CPU')}</th>
            <th scope="col">{trans.__('Memory')}</th>
            {onGpu && <th scope="col">{trans.__('GPU')}</th>}
          </tr>
        </thead>
        <tbody>
          {workers.map(worker => (
            <tr key={worker.pid}>
              <th
                scope="row"
                title={trans.__('%1, process %2', worker.name, worker.pid)}
              >
                {worker.name}
              </th>
              <td>{percent(worker.cpu)}</td>
              <td>{formatBytes(worker.memory)}</td>
              {onGpu && (
                <td>
                  {worker.gpu_memory ? formatBytes(worker.gpu_memory) : '–'}
                </td>
              )}
            </tr>
          ))}
          <tr>
            <th
              scope="row"
              title={trans.__(
                'How late the notebook server runs what is due: a large value makes notebooks feel slow'
              )}
            >
              {trans.__('notebook server loop')}
            </th>
            <td colSpan={onGpu ? 3 : 2}>
              {trans.__('%1 ms late', loop_lag_ms.toFixed(1))}
            </td>
          </tr>
        </tbody>
      </table>
    </>
  );
}

/** What each run took of the engine's time, and takes of memory. */
function RunUse(props: IShown): JSX.Element | null {
  const { memory, state, names, trans } = props;
  const total = (run: string) => memory[run].model + memory[run].idle;
  const held = Object.keys(memory)
    .filter(run => state.runs.has(run) && total(run) > 0)
    .sort((a, b) => total(b) - total(a));
  if (!held.length) {
    return null;
  }
  const others = held.slice(MOST_RUNS);
  return (
    <table className="jp-Tuft-workers">
      <caption className="jp-Tuft-spoken">{trans.__('Runs')}</caption>
      <colgroup>
        <col />
        <col />
        <col />
      </colgroup>
      <thead>
        <tr>
          <th scope="col">{trans.__('Run')}</th>
          <th scope="col" title={trans.__('How long the engine worked for it')}>
            {trans.__('Engine')}
          </th>
          <th
            scope="col"
            title={trans.__('Weights, gradients and optimizer of the adapter')}
          >
            {trans.__('Memory')}
          </th>
        </tr>
      </thead>
      <tbody>
        {held.slice(0, MOST_RUNS).map(run => (
          <tr key={run}>
            <th scope="row" title={run}>
              {names.get(run) ?? run}
            </th>
            <td>
              {formatDuration((state.runs.get(run)?.engine_ms ?? 0) / 1000)}
            </td>
            <td title={placeWord(memory[run], trans)}>
              {formatBytes(total(run))}
            </td>
          </tr>
        ))}
        {others.length > 0 && (
          <tr>
            <th scope="row">
              {trans._n('%1 more', '%1 more', others.length, others.length)}
            </th>
            <td />
            <td>
              {formatBytes(others.reduce((sum, run) => sum + total(run), 0))}
            </td>
          </tr>
        )}
      </tbody>
    </table>
  );
}

/** Where a run's memory is. */
export function placeWord(
  memory: IRunMemory,
  trans: TranslationBundle
): string {
  return memory.model
    ? trans.__('in the model')
    : trans.__('idle, in host memory');
}
