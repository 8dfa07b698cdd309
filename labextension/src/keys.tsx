/** The keys section, for admins: who may connect and until when; a new key is shown once. */
import { Dialog, showDialog } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { deleteIcon, HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';
import { formatRelative } from './format';
import { IKey, INewKey, Keys } from './keyroutes';
import { CopyButton, IconButton, Section } from './parts';

const DAY = 86400;

/** Props of {@link KeysSection}. */
export interface IKeysProps {
  keys: Keys;
  /** The server's clock, seconds since 1970. */
  now: number;
  locale: string;
  trans: TranslationBundle;
}

/** See the head of the file. Nothing is asked of the server before the section is opened. */
export function KeysSection(props: IKeysProps): JSX.Element {
  return (
    <Section title={props.trans.__('Keys')} folded>
      <KeyList {...props} />
    </Section>
  );
}

function KeyList(props: IKeysProps): JSX.Element {
  const { keys, trans } = props;
  const [known, setKnown] = React.useState<IKey[] | null>(null);
  const [secret, setSecret] = React.useState('');
  const [problem, setProblem] = React.useState('');
  const [busy, setBusy] = React.useState(false);
  /** Do something, and show the list as it is afterwards. Whether it worked. */
  const attempt = async (work: () => Promise<unknown>): Promise<boolean> => {
    setBusy(true);
    try {
      await work();
      setKnown(await keys.list());
      setProblem('');
      return true;
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
      return false;
    } finally {
      setBusy(false);
    }
  };
  const first = React.useRef(attempt);
  React.useEffect(() => void first.current(async () => undefined), []);
  return (
    <>
      {problem && (
        <p className="jp-Tuft-error" role="alert">
          {problem}
        </p>
      )}
      {secret ? (
        <Secret secret={secret} onDone={() => setSecret('')} trans={trans} />
      ) : (
        <NewKey
          busy={busy}
          onCreate={asked =>
            attempt(async () => setSecret(await keys.create(asked)))
          }
          trans={trans}
        />
      )}
      {known === null && !problem && (
        <p className="jp-Tuft-quiet">{trans.__('Loading…')}</p>
      )}
      <ul className="jp-Tuft-list" aria-label={trans.__('Keys in force')}>
        {known?.map(key => (
          <Entry key={key.id} {...props} entry={key} attempt={attempt} />
        ))}
      </ul>
    </>
  );
}

/** The one moment in which a key can be seen. */
function Secret(props: {
  secret: string;
  onDone: () => void;
  trans: TranslationBundle;
}): JSX.Element {
  const { secret, trans } = props;
  const done = React.useRef<HTMLButtonElement>(null);
  React.useEffect(() => done.current?.focus(), []);
  return (
    <div className="jp-Tuft-secret" role="status">
      <p>
        {trans.__(
          'Copy this key now: it is not kept anywhere and cannot be shown again.'
        )}
      </p>
      <div className="jp-Tuft-pathLine">
        <code>{secret}</code>
        <CopyButton
          text={secret}
          label={trans.__('Copy the new key')}
          trans={trans}
        />
      </div>
      <button ref={done} className="jp-Tuft-textButton" onClick={props.onDone}>
        {trans.__('I have it')}
      </button>
    </div>
  );
}

/** The form for a new key. */
function NewKey(props: {
  /** Whether one is being made: a second one would take the place of the first before anybody has seen it. */
  busy: boolean;
  onCreate: (asked: INewKey) => Promise<boolean>;
  trans: TranslationBundle;
}): JSX.Element {
  const { trans } = props;
  const [tenant, setTenant] = React.useState('');
  const [name, setName] = React.useState('');
  const [days, setDays] = React.useState(30);
  const [admin, setAdmin] = React.useState(false);
  return (
    <form
      className="jp-Tuft-newKey"
      aria-label={trans.__('New key')}
      onSubmit={event => {
        event.preventDefault();
        if (props.busy) {
          return;
        }
        const seconds = days ? days * DAY : null;
        void props.onCreate({ tenant: tenant.trim(), name, admin, seconds });
      }}
    >
      <input
        className="jp-Tuft-field"
        required
        aria-label={trans.__('Whom the key is for')}
        placeholder={trans.__('User or team')}
        value={tenant}
        onChange={event => setTenant(event.target.value)}
      />
      <input
        className="jp-Tuft-field"
        aria-label={trans.__('What the key is called')}
        placeholder={trans.__('Note (optional)')}
        value={name}
        onChange={event => setName(event.target.value)}
      />
      <HTMLSelect
        className="jp-Tuft-select"
        aria-label={trans.__('How long the key is good for')}
        value={days}
        onChange={event => setDays(Number(event.target.value))}
      >
        {[1, 7, 30, 365].map(each => (
          <option key={each} value={each}>
            {trans._n('%1 day', '%1 days', each, each)}
          </option>
        ))}
        <option value={0}>{trans.__('no end')}</option>
      </HTMLSelect>
      <label title={trans.__('May see all work and manage keys')}>
        <input
          type="checkbox"
          checked={admin}
          onChange={event => setAdmin(event.target.checked)}
        />
        {trans.__('admin')}
      </label>
      <button
        type="submit"
        className="jp-Tuft-textButton"
        disabled={props.busy}
      >
        {trans.__('Create key')}
      </button>
    </form>
  );
}

/** One key, and what can be done with it. */
function Entry(
  props: IKeysProps & {
    entry: IKey;
    attempt: (work: () => Promise<unknown>) => Promise<boolean>;
  }
): JSX.Element {
  const { entry, keys, now, locale, trans, attempt } = props;
  const issued = entry.source === 'issued';
  const facts = [
    entry.name,
    entry.admin && trans.__('admin'),
    entry.source === 'server' && trans.__('of this server'),
    entry.source === 'configuration' && trans.__('in the configuration'),
    entry.created !== null &&
      formatRelative(Math.min(0, entry.created - now), locale),
    issued &&
      (entry.expires === null
        ? trans.__('no end')
        : entry.expires > now
          ? trans.__('expires %1', formatRelative(entry.expires - now, locale))
          : trans.__('expired'))
  ];
  const revoke = async () => {
    const { button } = await showDialog({
      title: trans.__('Revoke the key of %1?', entry.tenant),
      body: trans.__(
        'Whoever uses it is cut off within a second. What they trained stays. This cannot be undone.'
      ),
      buttons: [
        Dialog.cancelButton({ label: trans.__('Cancel') }),
        Dialog.warnButton({ label: trans.__('Revoke') })
      ]
    });
    if (button.accept) {
      await attempt(() => keys.revoke(entry));
    }
  };
  return (
    <li className="jp-Tuft-entry">
      <div className="jp-Tuft-entryHead">
        <b className="jp-Tuft-ellipsis" title={entry.id}>
          {entry.tenant}
        </b>
        {issued && (
          <div className="jp-Tuft-actions">
            <button
              className="jp-Tuft-textButton"
              onClick={() =>
                void attempt(() =>
                  keys.expire(entry, entry.expires === null ? 7 * DAY : null)
                )
              }
            >
              {entry.expires === null
                ? trans.__('End in a week')
                : trans.__('Keep')}
            </button>
            <IconButton
              icon={deleteIcon}
              label={trans.__('Revoke the key of %1', entry.tenant)}
              onClick={() => void revoke()}
            />
          </div>
        )}
      </div>
      <div className="jp-Tuft-entryFacts">
        {facts.filter(Boolean).join(' · ')}
      </div>
    </li>
  );
}
