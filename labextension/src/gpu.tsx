/** What the machine does: processor, memory, GPUs where there are any, and the processes that compute. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { IGauges } from './api';
import { formatBytes, formatShare } from './format';
import { Meter, Section } from './parts';

/** See the head of the file. */
export function Resources(props: {
  gauges: IGauges | null;
  trans: TranslationBundle;
}): JSX.Element {
  const { gauges, trans } = props;
  return (
    <Section title={trans.__('Resources')}>
      {gauges ? (
        <Gauges gauges={gauges} trans={trans} />
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
