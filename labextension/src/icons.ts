import { LabIcon } from '@jupyterlab/ui-components';
import tuftSvg from '../style/tuft.svg';

/** A tuft of grass. */
export const tuftIcon = new LabIcon({ name: 'tuft:logo', svgstr: tuftSvg });
