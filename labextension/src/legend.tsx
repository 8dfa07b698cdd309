/** The head of the run view: the compared runs as chips, the list from which more are added, and the exports. */
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { CommandIDs } from './commandids';
import { latest } from './curves';
import { formatValue } from './format';
import { IIndexed, lineOfRun } from './lines';
import { IRun } from './objects';
import { IRunViewProps } from './runviewstate';

/** Props of {@link Legend}. */
export interface ILegendProps extends IRunViewProps {
  chosen: readonly IIndexed[];
  /** The run about which facts are shown. */
  about: IRun | undefined;
  onAbout: (run: string) => void;
}

/** See the head of the file. */
export function Legend(props: ILegendProps): JSX.Element {
  const { chosen, view, state, names, trans, onView } = props;
  const others = [...state.runs.values()]
    .filter(run => !view.runs.includes(run.id))
    .reverse();
  return (
    <header className="jp-Tuft-legend">
      <ul aria-label={trans.__('Compared runs')}>
        {chosen.map(one => (
          <Chip key={one.run.id} {...props} {...one} />
        ))}
      </ul>
      {others.length > 0 && (
        <HTMLSelect
          className="jp-Tuft-select"
          aria-label={trans.__('Add a run to the comparison')}
          value=""
          onChange={event =>
            onView({ runs: [...view.runs, event.target.value] })
          }
        >
          <option value="" disabled>
            {trans.__('Add run…')}
          </option>
          {others.map(run => (
            <option key={run.id} value={run.id}>
              {names.get(run.id) ?? run.id}
            </option>
          ))}
        </HTMLSelect>
      )}
      <span className="jp-Tuft-space" />
      {chosen.length > 0 && <Exports {...props} />}
    </header>
  );
}

/** One compared run: a button that shows what is known of it, and one that takes it away. */
function Chip(props: ILegendProps & IIndexed): JSX.Element {
  const { run, index, about, view, names, now, trans, onView } = props;
  const name = names.get(run.id) ?? run.id;
  const line = lineOfRun(run, index, name, now, view.metric);
  const style = { '--tuft-line': `var(${line.colour})` } as React.CSSProperties;
  const on = about === run;
  const remove = trans.__('Remove %1 from the comparison', name);
  return (
    <li className={`jp-Tuft-chip${on ? ' jp-mod-on' : ''}`} style={style}>
      <button
        aria-pressed={on}
        title={trans.__('Show what is known about %1', name)}
        onClick={() => props.onAbout(run.id)}
      >
        <span
          className={`jp-Tuft-swatch jp-mod-on${line.dashed ? ' jp-mod-dashed' : ''}`}
        />
        <span className="jp-Tuft-ellipsis">{name}</span>
        <b>{formatValue(latest(run, view.metric))}</b>
      </button>
      <button
        className="jp-Tuft-chipClose"
        aria-label={remove}
        title={remove}
        onClick={() =>
          onView({ runs: view.runs.filter(one => one !== run.id) })
        }
      >
        ×
      </button>
    </li>
  );
}

/** Formats in which the compared metrics leave, with their proper names. */
const FORMATS = { csv: 'CSV', jsonl: 'JSONL', tensorboard: 'TensorBoard' };

function Exports({ view, commands, trans }: ILegendProps): JSX.Element {
  return (
    <div
      className="jp-Tuft-controls"
      role="group"
      aria-label={trans.__('Save the compared metrics as a file')}
    >
      <span className="jp-Tuft-quiet jp-Tuft-small">{trans.__('Export')}</span>
      {Object.entries(FORMATS).map(([format, name]) => (
        <button
          key={format}
          className="jp-Tuft-textButton"
          aria-label={trans.__('Export %1', name)}
          onClick={() =>
            void commands.execute(CommandIDs.exportMetrics, {
              runs: view.runs,
              format
            })
          }
        >
          {name}
        </button>
      ))}
    </div>
  );
}
