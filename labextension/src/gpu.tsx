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
        <caption>{trans.__('Processes')}</caption>
        <colgroup>
          <col />
          <col />
          <col />
        </colgroup>
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
            <td colSpan={2}>
              {trans.__('%1 ms late', loop_lag_ms.toFixed(1))}
            </td>
          </tr>
        </tbody>
      </table>
    </>
  );
}
