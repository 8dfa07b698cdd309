import { LabIcon } from '@jupyterlab/ui-components';
import pinSvg from '../style/pin.svg';
import tuftSvg from '../style/tuft.svg';

/** A tuft of grass. */
export const tuftIcon = new LabIcon({ name: 'tuft:logo', svgstr: tuftSvg });

/** A drawing pin: what is pinned stays. */
export const pinIcon = new LabIcon({ name: 'tuft:pin', svgstr: pinSvg });
