/** Saved weights and weights pinned for sampling: the paths that the SDK takes, and what can be done with them. */
import {
  codeIcon,
  deleteIcon,
  downloadIcon,
  fileUploadIcon,
  runIcon,
  usersIcon
} from '@jupyterlab/ui-components';
import * as React from 'react';
import { CommandIDs } from './commandids';
import { formatBytes, formatRelative } from './format';
import { pinIcon } from './icons';
import { useListing } from './listing';
import { ICheckpoint, ISampler } from './objects';
import { CopyButton, IconButton, Path, Section } from './parts';
import { IShown } from './shown';

/** Entries that are shown at first. */
const FIRST_ENTRIES = 6;

/** All checkpoints, the newest first. */
export function Checkpoints(props: IShown): JSX.Element {
  const { names, state, trans } = props;
  const entries = [...state.checkpoints.values()].reverse();
  const { visible, search, more } = useListing({
    things: entries,
    first: FIRST_ENTRIES,
    words: entry =>
      [entry.name, entry.path, names.get(entry.run), entry.tenant].join(' '),
    label: trans.__('Search checkpoints'),
    trans
  });
  return (
    <Section
      title={trans.__('Checkpoints')}
      count={entries.length}
      actions={
        <IconButton
          icon={fileUploadIcon}
          label={trans.__('Upload a PEFT adapter, or drop its folder here')}
          onClick={() => void props.commands.execute(CommandIDs.uploadAdapter)}
        />
      }
    >
      {entries.length === 0 && (
        <p className="jp-Tuft-quiet">
          {trans.__(
            'Saved weights appear here, with the path to load them. A PEFT adapter from elsewhere can be dropped here.'
          )}
        </p>
      )}
      {search}
      <ul className="jp-Tuft-list">
        {visible.map(entry => (
          <Entry key={entry.path} {...props} checkpoint={entry} />
        ))}
      </ul>
      {more}
    </Section>
  );
}

/** One checkpoint. */
export function Entry(
  props: IShown & { checkpoint: ICheckpoint }
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
      <Buttons {...props} checkpoint={c} />
    </li>
  );
}

/** What can be done with a checkpoint. */
function Buttons(props: IShown & { checkpoint: ICheckpoint }): JSX.Element {
  const { checkpoint: c, commands, trans } = props;
  const run = (command: string) => () =>
    void commands.execute(command, { checkpoint: c.path });
  const pinned = c.expires === null;
  return (
    <div
      className="jp-Tuft-actions"
      role="group"
      aria-label={trans.__('Actions on %1', c.name)}
    >
      <IconButton
        icon={codeIcon}
        label={trans.__('Insert code to load %1', c.name)}
        onClick={run(CommandIDs.insertCheckpoint)}
      />
      {commands.hasCommand(CommandIDs.openPlayground) && (
        <IconButton
          icon={runIcon}
          label={trans.__('Try %1 in the playground', c.name)}
          onClick={run(CommandIDs.openPlayground)}
        />
      )}
      <IconButton
        icon={downloadIcon}
        label={trans.__('Download %1', c.name)}
        onClick={run(CommandIDs.downloadCheckpoint)}
      />
      <IconButton
        icon={pinIcon}
        pressed={pinned}
        label={
          pinned
            ? trans.__('%1 is kept for good: let it expire in a week', c.name)
            : trans.__('Pin %1, so that it never expires', c.name)
        }
        onClick={run(
          pinned ? CommandIDs.expireCheckpoint : CommandIDs.keepCheckpoint
        )}
      />
      <IconButton
        icon={usersIcon}
        pressed={c.public}
        label={
          c.public
            ? trans.__('%1 is published: make it private', c.name)
            : trans.__('Publish %1 to the other users of this server', c.name)
        }
        onClick={run(
          c.public
            ? CommandIDs.unpublishCheckpoint
            : CommandIDs.publishCheckpoint
        )}
      />
      <IconButton
        icon={deleteIcon}
        label={trans.__('Delete %1', c.name)}
        onClick={run(CommandIDs.deleteCheckpoint)}
      />
    </div>
  );
}

/** The weights that sampling clients use now, the newest first. */
export function Samplers(props: IShown): JSX.Element {
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
