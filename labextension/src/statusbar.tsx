/** The item in the status bar: how many runs train, and how busy the machine is. A click shows the panel. */
import * as React from 'react';
import { CommandIDs } from './commandids';
import { tuftIcon } from './icons';
import { IContext, LiveWidget } from './live';
import { phaseOf } from './names';

/** See the head of the file. */
export class StatusItem extends LiveWidget {
  constructor(context: IContext) {
    super(context);
    this.id = 'tuft-status';
    this.addClass('jp-TuftStatus');
  }

  render(): JSX.Element | null {
    const { feed, commands, trans } = this.context;
    const { state, now } = this.shown();
    if (feed.connection === 'missing') {
      return null;
    }
    const training = [...state.runs.values()].filter(
      run => phaseOf(run, now) === 'training'
    ).length;
    const { gauges } = feed;
    const gpu = gauges?.gpus.length
      ? Math.max(...gauges.gpus.map(({ utilization }) => utilization))
      : null;
    const use =
      gauges === null
        ? ''
        : gpu === null
          ? trans.__('CPU %1 %', Math.round(gauges.cpu))
          : trans.__('GPU %1 %', Math.round(gpu));
    const trouble = ['lost', 'forbidden', 'unusable'].includes(feed.connection);
    const text = trouble
      ? trans.__('fine-tuning: not available')
      : [trans._n('%1 run', '%1 runs', training, training), use]
          .filter(Boolean)
          .join(' · ');
    return (
      <button
        className={`jp-TuftStatus-button${training ? ' jp-mod-training' : ''}`}
        title={trans.__('Runs that train now. Click for the TuFT panel.')}
        onClick={() => void commands.execute(CommandIDs.openPanel)}
      >
        <tuftIcon.react tag="span" stylesheet="statusBar" />
        <span>{text}</span>
      </button>
    );
  }
}
