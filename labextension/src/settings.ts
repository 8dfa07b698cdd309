/** The panel's settings, with what holds where the registry has none. The schema is `schema/panel.json`. */
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { Metric, METRICS } from './curves';

/** See `schema/panel.json`. */
export interface IPanelSettings {
  metric: Metric;
  drawsPerSecond: number;
  statusBar: boolean;
}

export const DEFAULTS: IPanelSettings = {
  metric: 'loss',
  drawsPerSecond: 10,
  statusBar: true
};

/** What the registry says, in values that can be used. */
export function readSettings(
  settings: ISettingRegistry.ISettings
): IPanelSettings {
  const { metric, drawsPerSecond, statusBar } = settings.composite;
  return {
    metric: METRICS.find(known => known === metric) ?? DEFAULTS.metric,
    drawsPerSecond:
      typeof drawsPerSecond === 'number' && drawsPerSecond > 0
        ? drawsPerSecond
        : DEFAULTS.drawsPerSecond,
    statusBar: statusBar !== false
  };
}
