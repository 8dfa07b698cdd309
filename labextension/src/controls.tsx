/** What stands above the large chart: its title, and how the lines are drawn. */
import * as React from 'react';
import { Axis } from './curves';
import { IRunViewProps } from './runviewstate';

/** Props of {@link Controls}. */
export interface IControlsProps extends IRunViewProps {
  title: string;
  asTable: boolean;
  onTable: () => void;
  zoomed: boolean;
  onReset: () => void;
}

/** See the head of the file. */
export function Controls(props: IControlsProps): JSX.Element {
  const { view, onView, trans } = props;
  return (
    <div className="jp-Tuft-controls">
      <h3>{props.title}</h3>
      <span className="jp-Tuft-space" />
      {props.zoomed && !props.asTable && (
        <button className="jp-Tuft-textButton" onClick={props.onReset}>
          {trans.__('Show everything')}
        </button>
      )}
      <label className="jp-Tuft-slider">
        {trans.__('Smoothing')}
        <input
          type="range"
          min={0}
          max={0.99}
          step={0.01}
          value={view.smoothing}
          onChange={event => onView({ smoothing: Number(event.target.value) })}
        />
        <output>{view.smoothing.toFixed(2)}</output>
      </label>
      <div
        className="jp-Tuft-segments"
        role="group"
        aria-label={trans.__('Horizontal axis')}
      >
        {(['step', 'time'] as Axis[]).map(axis => (
          <button
            key={axis}
            aria-pressed={view.axis === axis}
            onClick={() => {
              props.onReset();
              onView({ axis });
            }}
          >
            {axis === 'step' ? trans.__('Steps') : trans.__('Time')}
          </button>
        ))}
      </div>
      <button
        className="jp-Tuft-textButton"
        aria-pressed={view.log}
        onClick={() => onView({ log: !view.log })}
      >
        {trans.__('Log scale')}
      </button>
      <button
        className="jp-Tuft-textButton"
        aria-pressed={props.asTable}
        onClick={props.onTable}
      >
        {trans.__('Table')}
      </button>
    </div>
  );
}
