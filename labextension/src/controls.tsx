/** What stands above the large chart: its title, and how the lines are drawn. */
import * as React from 'react';
import { Axis } from './curves';
import { Segments, Slider } from './inputs';
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
    <div className="jp-Tuft-controls jp-mod-end">
      <h3>{props.title}</h3>
      {props.zoomed && !props.asTable && (
        <button className="jp-Tuft-textButton" onClick={props.onReset}>
          {trans.__('Show everything')}
        </button>
      )}
      <Slider
        label={trans.__('Smoothing')}
        min={0}
        max={0.99}
        step={0.01}
        value={view.smoothing}
        onValue={smoothing => onView({ smoothing })}
      />
      <Segments<Axis>
        label={trans.__('Horizontal axis')}
        words={{ step: trans.__('Steps'), time: trans.__('Time') }}
        value={view.axis}
        onValue={axis => {
          props.onReset();
          onView({ axis });
        }}
      />
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
