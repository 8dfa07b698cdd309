/** Copy uPlot from node_modules to where the notebook widgets read it: part of `npm run build`. */
import { copyFileSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = new URL('../', import.meta.url);
const from = new URL('node_modules/uplot/dist/', root);
const to = new URL('tuft_jupyter/kernel/widgets/built/', root);

mkdirSync(to, { recursive: true });
for (const [source, name] of [
  ['uPlot.iife.min.js', 'uplot.js'],
  ['uPlot.min.css', 'uplot.css']
]) {
  copyFileSync(
    fileURLToPath(new URL(source, from)),
    fileURLToPath(new URL(name, to))
  );
}
