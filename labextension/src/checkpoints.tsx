/** Saved weights and weights pinned for sampling, with the paths that the SDK takes. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { formatBytes, formatRelative } from './format';
import { ICheckpoint, ISampler, IState } from './model';
import { CopyButton, Path, Section } from './parts';

/** Entries in front of the "show all" button. */
const FIRST_ENTRIES = 6;

/** Props of {@link Checkpoints}. */
export interface ICheckpointsProps {
  state: IState;
  names: Map<string, string>;
  now: number;
  locale: string;
  trans: TranslationBundle;
}

/** All checkpoints, the newest first. */
export function Checkpoints(props: ICheckpointsProps): JSX.Element {
  const { state, trans } = props;
  const [all, setAll] = React.useState(false);
  const entries = [...state.checkpoints.values()].reverse();
  const visible = all ? entries : entries.slice(0, FIRST_ENTRIES);
  return (
    <Section title={trans.__('Checkpoints')} count={entries.length}>
      {entries.length === 0 && (
        <p className="jp-Tuft-quiet">
          {trans.__('Saved weights appear here, with the path to load them.')}
        </p>
      )}
      <ul className="jp-Tuft-list">
        {visible.map(entry => (
          <Entry key={entry.path} {...props} checkpoint={entry} />
        ))}
      </ul>
      {entries.length > FIRST_ENTRIES && (
        <button className="jp-Tuft-textButton" onClick={() => setAll(!all)}>
          {all
            ? trans.__('Show the newest only')
            : trans.__('Show all %1 checkpoints', entries.length)}
        </button>
      )}
    </Section>
  );
}

function Entry(
  props: ICheckpointsProps & { checkpoint: ICheckpoint }
): JSX.Element {
  const { checkpoint: c, locale, now, trans } = props;
  const facts = [
    props.names.get(c.run) ?? c.run,
    trans.__('step %1', c.step),
    formatBytes(c.size_bytes),
    formatRelative(Math.min(0, c.created - now), locale)
  ];
  if (c.public) {
    facts.push(trans.__('public'));
  }
  if (c.expires !== null) {
    facts.push(
      c.expires > now
        ? trans.__('expires %1', formatRelative(c.expires - now, locale))
        : trans.__('expired')
    );
  }
  return (
    <li className="jp-Tuft-entry">
      <div className="jp-Tuft-entryHead">
        <b className="jp-Tuft-ellipsis" title={c.name}>
          {c.name}
        </b>
        <span className="jp-Tuft-tag">
          {c.kind === 'weights'
            ? trans.__('training')
            : c.kind === 'external_weights'
              ? trans.__('export')
              : trans.__('sampler')}
        </span>
      </div>
      <div className="jp-Tuft-pathLine">
        <Path path={c.path} />
        <CopyButton text={c.path} trans={trans} />
      </div>
      <div className="jp-Tuft-entryFacts">{facts.join(' · ')}</div>
    </li>
  );
}

/** The weights that sampling clients use now, the newest first. */
export function Samplers(props: ICheckpointsProps): JSX.Element {
  const { state, locale, now, trans } = props;
  const samplers = [...state.samplers.values()].reverse();
  return (
    <Section title={trans.__('Samplers')} count={samplers.length}>
      <ul className="jp-Tuft-list">
        {samplers.slice(0, FIRST_ENTRIES).map((sampler: ISampler) => (
          <li key={sampler.id} className="jp-Tuft-entry">
            <div className="jp-Tuft-entryHead">
              <b className="jp-Tuft-ellipsis" title={sampler.id}>
                {sampler.base_model}
              </b>
              <span className="jp-Tuft-entryFacts">
                {formatRelative(Math.min(0, sampler.created - now), locale)}
              </span>
            </div>
            {sampler.model_path ? (
              <div className="jp-Tuft-pathLine">
                <Path path={sampler.model_path} />
                <CopyButton text={sampler.model_path} trans={trans} />
              </div>
            ) : (
              <div className="jp-Tuft-entryFacts">
                {trans.__('base model or unnamed weights')}
              </div>
            )}
          </li>
        ))}
      </ul>
    </Section>
  );
}
